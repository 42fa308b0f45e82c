"""What every Lightning Trainer of this package is told."""

from __future__ import annotations

from typing import Any

import lightning as L


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


def number_of_steps(trainer: L.Trainer, needed_by: str) -> int:
    """Optimizer steps of the whole training, known where it starts.

    Args:
        trainer: That trains.
        needed_by: What depends on the number, for the message.

    Raises:
        ValueError: If the training has no end.
    """
    steps = trainer.estimated_stepping_batches
    if steps == float("inf"):
        raise ValueError(
            f"{needed_by}: expected a Trainer with max_steps or max_epochs, found neither: when does the training end?"
        )
    return int(steps)
