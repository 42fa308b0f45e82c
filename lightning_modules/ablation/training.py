"""Training with two losses and a rule, as `unlearn` trains, looked at on the way."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_modules.ablation.grid import Run
from lightning_modules.ablation.matching import Matching, Target, between
from lightning_modules.ablation.placebo import Placebo
from lightning_modules.ablation.retention import Ended
from lightning_modules.ablation.scoring import Scorer
from lightning_modules.run import assembly
from lightning_modules.run.loading import make_data
from lightning_modules.training.module import UnlearningModule
from lightning_modules.training.objectives import by_name, needs_reference
from lightning_modules.training.references import SecondModel
from lightning_modules.training.trainer import trainer_options


def train(run: Run, model: nn.Module, tokenizer: Any, scorer: Scorer, targets: Sequence[Target]) -> Ended:
    """Train until every target is met or the epochs are over; adapters are merged at the end."""
    options = run.options()
    training = options.training
    data = make_data(options, tokenizer)
    before = copy.deepcopy(model.state_dict())
    started = time.perf_counter()
    adapted = assembly.adapted(model, training, data, options.output.seed)
    spent = time.perf_counter() - started if training.lora_rank else 0.0
    tally = Tally()
    matching = MatchTargets(
        targets,
        scorer.along,
        scorer.thoroughly,
        every_n_steps=run.grid.train.evaluate_every,
        tolerance=run.grid.evaluate.tolerance,
        progress=tally.shares,
        spent=spent,
    )
    callbacks: list[Callback] = [tally, matching]
    if run.method.placebo:
        callbacks.append(Placebo(run.method.bound_rule(), seed=run.data_seed))
    try:
        L.Trainer(**on_this_device(run, callbacks)).fit(build_module(adapted, run), data)
    except FloatingPointError as error:
        matching.give_up(f"diverged: {error}")
    merged = assembly.merged(adapted)
    # FILA's importance: a backward pass for every batch of both sets.
    extra = 2 * len(data.train_dataloader()) if training.lora_init == "fila" else 0
    return Ended(matching, merged, merged.load_state_dict, before, copy.deepcopy(merged.state_dict()), extra)


def build_module(model: nn.Module, run: Run) -> UnlearningModule:
    """The module that `unlearn` would train; for a placebo without the rule, which `Placebo` then imitates."""
    options = run.options()
    method = options.method
    if run.method.placebo:
        method = replace(method, rule="gradient_difference", rule_options={"alpha": 0.0})
    losses = by_name(method.forget_loss), by_name(method.retain_loss)
    reference = SecondModel() if any(needs_reference(loss) for loss in losses) else None
    return assembly.make_module(model.train(), method, options.training, reference)


def on_this_device(run: Run, callbacks: Sequence[Callback]) -> dict[str, Any]:
    """Arguments of a Lightning Trainer that trains on this process's device and leaves no files."""
    cuda = torch.cuda.is_available()
    return trainer_options(
        accelerator="gpu" if cuda else "cpu",
        devices=[torch.cuda.current_device()] if cuda else 1,
        precision=run.grid.train.precision,
        max_epochs=run.options().training.epochs,
        callbacks=list(callbacks),
    )


class Tally(Callback):
    """Counts the steps whose gradients conflict, and those whose real change raises the retain loss to first order."""

    def __init__(self) -> None:
        self.steps = self.conflicts = self.raising = 0
        self.measured = True

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:  # noqa: ARG002 (Lightning's)
        """Read the step's record."""
        if not isinstance(pl_module, UnlearningModule) or (record := pl_module.surgery.record) is None:
            return
        self.steps += 1
        self.conflicts += record.conflict
        left, made = record.actual_change, record.unguarded_change
        self.measured = self.measured and left is not None
        if left is not None and made is not None:
            # What a guard leaves is rounding: 3e-6 of what it took away, measured, where steps are small.
            self.raising += bool((left > 1e-4 * made.abs()).any())

    def shares(self) -> dict[str, float]:
        """Shares of the steps so far; NaN where nothing was measured (guard: none)."""
        steps = max(1, self.steps)
        return {"conflicts": self.conflicts / steps, "raising": self.raising / steps if self.measured else float("nan")}


class MatchTargets(Matching, Callback):
    """Match along training: the states are those after every so many steps, and training stops when all targets are met.

    A match is between the parameters of two states; then they are put back, so that training goes on as if nobody had looked.

    Args:
        targets: As `Matching`.
        score: As `Matching`; it runs every `every_n_steps`, at the start and the end.
        describe: As `Matching`.
        every_n_steps: Optimizer steps between scores.
        tolerance: As `Matching`.
        progress: As `Matching`.
        spent: Seconds of the method's own before training, which count.

    Attributes:
        curve: As `Matching`'s, with `step` and `seconds` (without those of looking).
    """

    def __init__(
        self,
        targets: Sequence[Target],
        score: Callable[[nn.Module], Mapping[str, float]],
        describe: Callable[[nn.Module], Mapping[str, Any]],
        *,
        every_n_steps: int = 2,
        tolerance: float = 0.04,
        progress: Callable[[], Mapping[str, float]] = dict,
        spent: float = 0.0,
    ) -> None:
        super().__init__(targets, score, describe, tolerance=tolerance, progress=progress)
        self.every_n_steps, self.spent = every_n_steps, spent
        self._before: list[Tensor] = []
        self._started = self._away = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Score the start; a target that it passes can never be met."""
        self._started = time.perf_counter()
        self._look(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Score every so many steps."""
        if trainer.global_step % self.every_n_steps == 0:
            self._look(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Score the end, and say of what is still open how far it came."""
        self._look(trainer, pl_module)
        self.close(f"after {trainer.global_step} steps ({trainer.current_epoch} epochs)")

    def _look(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step, model = trainer.global_step, pl_module.get_submodule("model")
        if self.curve and self.curve[-1]["step"] >= step:
            return
        came = time.perf_counter()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        after = [parameter.detach().clone() for parameter in parameters]
        at = {"step": float(step), "seconds": self.spent + came - self._started - self._away}
        self.look(model, at, between(parameters, self._before, after))
        self._before = after
        self._away += time.perf_counter() - came
        trainer.should_stop = trainer.should_stop or not self.open
