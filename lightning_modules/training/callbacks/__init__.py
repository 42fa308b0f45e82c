"""What watches a run: its record, its trade-off, its collapse, and how well the forgetting holds."""

from __future__ import annotations

from lightning_modules.training.callbacks.best_tradeoff import BestTradeoff, is_better
from lightning_modules.training.callbacks.collapse_alarm import CollapseAlarm, collapse
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
    "BestTradeoff",
    "CollapseAlarm",
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
]
