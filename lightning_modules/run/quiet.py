"""Fewer words from other libraries."""

from __future__ import annotations

import logging
import warnings


def quiet() -> None:
    """Silence what Lightning and Transformers say about their own settings, so that a command's table stands alone."""
    for name in ("lightning.pytorch", "lightning.fabric", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for pattern in (
        ".*does not have many workers.*",
        ".*number of training batches.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*have no .validation_step.*",
    ):
        warnings.filterwarnings("ignore", message=pattern)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
