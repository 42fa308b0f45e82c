"""Lightning modules, data, metrics, callbacks and the command around `gradsurgery`.

Usually imported as `import lightning_modules as lm`. It needs the extra `gradsurgery[lightning]`. Every name of
`__all__` is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_modules import metrics
    from lightning_modules.data.muse import MUSEDataModule
    from lightning_modules.data.pairs import ForgetRetainDataModule
    from lightning_modules.data.tofu_module import TOFUDataModule
    from lightning_modules.data.wmdp import WMDPDataModule
    from lightning_modules.report import g_effect
    from lightning_modules.training import callbacks, objectives, references
    from lightning_modules.training.checkpoint_file import CheckpointFile
    from lightning_modules.training.module import UnlearningModule
    from lightning_modules.training.noise import NoiseSettings
    from lightning_modules.training.perturb import PerturbSettings
    from lightning_modules.training.uld import ULDModule

__all__ = [
    "CheckpointFile",
    "ForgetRetainDataModule",
    "MUSEDataModule",
    "NoiseSettings",
    "PerturbSettings",
    "TOFUDataModule",
    "ULDModule",
    "UnlearningModule",
    "WMDPDataModule",
    "callbacks",
    "g_effect",
    "metrics",
    "objectives",
    "references",
]

_HOMES = {
    "CheckpointFile": "training.checkpoint_file",
    "ForgetRetainDataModule": "data.pairs",
    "MUSEDataModule": "data.muse",
    "NoiseSettings": "training.noise",
    "PerturbSettings": "training.perturb",
    "TOFUDataModule": "data.tofu_module",
    "ULDModule": "training.uld",
    "UnlearningModule": "training.module",
    "WMDPDataModule": "data.wmdp",
    "callbacks": "training",
    "g_effect": "report",
    "metrics": "",
    "objectives": "training",
    "references": "training",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    try:
        home = importlib.import_module(f"{__name__}.{_HOMES[name]}".rstrip("."))
        return getattr(home, name) if name[0].isupper() else importlib.import_module(f"{home.__name__}.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("gradsurgery", "lightning_modules"):
            raise
        hint = f"lightning_modules.{name} needs {error.name}: pip install 'gradsurgery[lightning]'"
        raise ModuleNotFoundError(hint, name=error.name) from error


def __dir__() -> list[str]:
    return [*globals(), *__all__]
