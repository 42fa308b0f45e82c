"""The key-value caches of two models as one cache."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import Cache


class PairedCache(Cache):
    """The caches of both models as one: whatever `generate` does to the layers of a cache (reorder, crop, select), it does to all.

    Its first layers are the base's, and so are its length and the sizes of its masks.
    """

    def __init__(self, base: Cache, assistant: Cache) -> None:
        # Not super().__init__(), which makes a list of layers: the two lists stay where they are, and may grow.
        self.base, self.assistant = base, assistant

    @property
    def layers(self) -> list[Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The layers of the base's cache, then those of the assistant's."""
        return [*self.base.layers, *self.assistant.layers]

    def update(self, *_: Any, **__: Any) -> Any:
        """Neither model can write here: each is given its own half."""
        raise RuntimeError("expected a model to write to one half of a PairedCache, found a write to the pair")
