"""Callbacks of Lightning that watch a run, choose what is kept of it, and test how well the forgetting holds.

| file | content |
|---|---|
| `surgery_logger` | `SurgeryLogger`: the record of every step, `surgery.csv` |
| `g_effect` | `GEffectLogger`: where in the model the objectives conflict, `g_effect.csv` |
| `tradeoff_curve` | `TradeoffCurve`: forget and retain probability while training, `curve.csv` |
| `loss_curve` | `LossCurve`: loss and learning rate of `finetune`, `curve.csv` |
| `anchor_pull` | `AnchorPull`: pulls layers back to a `gradsurgery.LayerAnchor` after every step |
| `checkpoints` | `Checkpoints`: from where an interrupted run goes on, `checkpoints/last.ckpt` |
| `best_tradeoff` | `BestTradeoff`: the weights of the best point of the curve |
| `collapse_alarm` | `CollapseAlarm`: a stop when retention collapses |
| `relearn_probe` | `RelearnProbe`: how fast forgotten answers return |
| `quantization_probe` | `QuantizationProbe`: what a few bits bring back |
| `progress_lines` | `ProgressLines`: where training stands, in a log |
| `probe` | what the two probes share |
| `notes` | what callbacks tell the report |
| `rows` | rows of a CSV file that grows, and `StepRows`, which has one for every step |

A callback of your own is a subclass of Lightning's `Callback` in a file of its own here, added to `__all__`: it reads
`pl_module.surgery.record` (one step), `pl_module.losses`, or the points of a `TradeoffCurve` that comes before it. What
the report should say goes through `notes.note`; what has to survive a resumed run goes into `state_dict`.
"""

from __future__ import annotations

from lightning_modules.training.callbacks.anchor_pull import AnchorPull
from lightning_modules.training.callbacks.best_tradeoff import BestTradeoff, is_better
from lightning_modules.training.callbacks.checkpoints import Checkpoints, seconds_of
from lightning_modules.training.callbacks.collapse_alarm import CollapseAlarm, collapse
from lightning_modules.training.callbacks.g_effect import GEffectLogger
from lightning_modules.training.callbacks.loss_curve import LossCurve
from lightning_modules.training.callbacks.progress_lines import ProgressLines
from lightning_modules.training.callbacks.quantization_probe import (
    QuantizationProbe,
    quantization_probe,
    quantize_,
    round_to_nearest,
)
from lightning_modules.training.callbacks.relearn_probe import RelearnProbe, RelearnSettings, relearn_probe
from lightning_modules.training.callbacks.surgery_logger import SurgeryLogger
from lightning_modules.training.callbacks.tradeoff_curve import TradeoffCurve
from lightning_modules.training.probability import mean_probabilities

__all__ = [
    "AnchorPull",
    "BestTradeoff",
    "Checkpoints",
    "CollapseAlarm",
    "GEffectLogger",
    "LossCurve",
    "ProgressLines",
    "QuantizationProbe",
    "RelearnProbe",
    "RelearnSettings",
    "SurgeryLogger",
    "TradeoffCurve",
    "collapse",
    "is_better",
    "mean_probabilities",
    "quantization_probe",
    "quantize_",
    "relearn_probe",
    "round_to_nearest",
    "seconds_of",
]
