"""For tests of losses of logits: once in plain PyTorch, once by the compiled kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gradsurgery.losses import _backend, backend


@pytest.fixture(params=["eager", "compiled"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "compiled" and isinstance(lacking := _backend._built(), str):
        pytest.skip(lacking)
    with backend(request.param):
        yield request.param
