"""The finish: a second, short training."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_modules.run.options.flat import not_negative


@dataclass(frozen=True)
class FinishOptions:
    """A short training after the forgetting, which makes the answers fluent again.

    Attributes:
        finish_steps: optimizer steps of a training after the forgetting that teaches other answers to the forget
            questions, those of --teacher or --substitutes, and holds the retain answers to the model before; 0 for none
        finish_lr: its learning rate; by default half of --lr
        substitutes: file of other answers to the forget questions, one or more for each, for the finish and
            --substitute-weight; by default those to the 5 retain questions that share most words with it
    """

    finish_steps: int = 0
    finish_lr: float | None = None
    substitutes: str | None = None

    def check(self) -> None:
        """Raise ValueError on options outside their domain, or without effect."""
        not_negative(self, "finish_steps")
        if self.finish_lr is not None and self.finish_lr <= 0.0:
            raise ValueError(f"expected --finish-lr > 0, found {self.finish_lr}")
        if not self.finish_steps and self.finish_lr is not None:
            raise ValueError("expected --finish-steps with --finish-lr, for example 20, found 0, which is no finish")
