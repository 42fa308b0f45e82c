"""The key-value caches of two models as one cache."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import Cache


class PairedCache(Cache):
    """The caches of both models as one.

    Whatever `generate` does to the layers of a cache (reorder, crop, select), it does to the layers of both. The base's
    layers come first, so that the length and the sizes of masks are the base's.
    """

    def __init__(self, base: Cache, assistant: Cache) -> None:
        # No super().__init__(), which would create a list of layers: `layers` reads the two caches, which may grow.
        self.base, self.assistant = base, assistant

    @property
    def layers(self) -> list[Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The layers of the base's cache, then those of the assistant's."""
        return [*self.base.layers, *self.assistant.layers]

    def update(self, *_: Any, **__: Any) -> Any:
        """Always raise: a model writes to its own half, never to the pair."""
        raise RuntimeError("expected a model to write to one half of a PairedCache, found a write to the pair")
