"""Lightning modules, data, metrics, callbacks and the command around `gradsurgery`; usually `import lightning_modules as lm`.

Needs the extra `gradsurgery[lightning]`. Everything is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_modules import callbacks, metrics, objectives, references
    from lightning_modules.data import ForgetRetainDataModule, TOFUDataModule
    from lightning_modules.module import UnlearningModule
    from lightning_modules.uld import ULDModule

__all__ = [
    "ForgetRetainDataModule",
    "TOFUDataModule",
    "ULDModule",
    "UnlearningModule",
    "callbacks",
    "metrics",
    "objectives",
    "references",
]

_HOMES = {"ForgetRetainDataModule": "data", "TOFUDataModule": "data", "ULDModule": "uld", "UnlearningModule": "module"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    try:
        module = importlib.import_module(f"{__name__}.{_HOMES.get(name, name)}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("gradsurgery", "lightning_modules"):
            raise
        hint = f"lightning_modules.{name} needs {error.name}: pip install 'gradsurgery[lightning]'"
        raise ModuleNotFoundError(hint, name=error.name) from error
    return getattr(module, name) if name in _HOMES else module


def __dir__() -> list[str]:
    return [*globals(), *__all__]
