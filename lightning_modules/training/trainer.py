"""What every Lightning Trainer of this package is told."""

from __future__ import annotations

from typing import Any


def trainer_options(**own: Any) -> dict[str, Any]:
    """Arguments of `lightning.Trainer`: no log, no checkpoint, no progress bar and no table, unless told otherwise.

    Args:
        own: Further arguments; they replace the ones above.

    Example:
        >>> trainer_options(max_epochs=2)["enable_checkpointing"], trainer_options(enable_checkpointing=True)["logger"]
        (False, False)
    """
    common = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,  # PairSampler divides the pairs itself
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,  # the trade-off curve scores a run; `trainer.validate` of one's own Trainer does too
    }
    return common | own
