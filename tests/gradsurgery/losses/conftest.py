"""For tests of losses of rows: once in plain PyTorch, once by the compiled kernel."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gradsurgery.losses import _compiled, backend


@pytest.fixture(params=["eager", "compiled"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "compiled" and isinstance(lacking := _compiled.built(), str):
        pytest.skip(lacking)
    with backend(request.param):
        yield request.param
