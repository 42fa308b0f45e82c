"""What a run does not know to do where every device holds a shard of the model."""

from __future__ import annotations

from lightning_modules.run.options.finish import FinishOptions
from lightning_modules.run.options.flat import AUTO
from lightning_modules.run.options.method import MethodOptions
from lightning_modules.run.options.shared import FSDP2


def check_whole(method: MethodOptions, finish: FinishOptions) -> None:
    """Raise ValueError on options that need the whole model, with --strategy fsdp2."""
    if method.teacher is not None:
        raise ValueError(
            f"--teacher: expected a teacher that each device can hold beside the model, found --strategy {FSDP2}; train on one device, "
            "or by ddp"
        )
    if method.radius == AUTO:
        raise ValueError(
            f"--radius auto: expected numbers with --strategy {FSDP2}, found auto, which needs the whole model on one device; measure "
            "it there, and give what config.yaml then has, such as '{start: 0.03, end: 0.15}'"
        )
    if method.retain_anchor:
        raise ValueError(
            f"--retain-anchor: expected 0 with --strategy {FSDP2}, found {method.retain_anchor}: it pulls whole weights; leave it out, or "
            "train on one device, or by ddp"
        )
    if finish.finish_steps:
        raise ValueError(
            f"--finish-steps: expected 0 with --strategy {FSDP2}, found {finish.finish_steps}: the finish needs the whole model "
            "before unlearning beside the trained one; leave it out, or train on one device"
        )
