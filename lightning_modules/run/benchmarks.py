"""The data modules of benchmarks of long texts, as the options name them."""

from __future__ import annotations

from typing import Any

from lightning_modules.data.muse import MUSEDataModule
from lightning_modules.data.pairs import ForgetRetainDataModule
from lightning_modules.data.wmdp import WMDPDataModule
from lightning_modules.run.options import DataOptions


def benchmark_data(data: DataOptions, tokenizer: Any, **common: Any) -> ForgetRetainDataModule:
    """The data module of --muse or --wmdp.

    Args:
        data: The options; `data.cuts_texts` holds.
        tokenizer: Of the model; the texts are cut into pieces of its tokens.
        common: What all data modules take.

    Raises:
        ValueError: If neither is given, or WMDP's corpus for bio is not.
    """
    if data.muse is not None:
        return MUSEDataModule(data.muse, tokenizer, folder=data.muse_dir, **common)
    if data.wmdp is None:
        raise ValueError("expected --muse or --wmdp, found neither")
    files: dict[str, Any] = {"forget": data.forget, "retain": data.retain}
    return WMDPDataModule(data.wmdp, tokenizer, folder=data.wmdp_dir, **files, **common)
