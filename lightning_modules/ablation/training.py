"""Training with two losses and a rule, as `unlearn` trains, and matching on the way."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_modules.ablation.ending import Cost, ended
from lightning_modules.ablation.grid import Run
from lightning_modules.ablation.many_rows import ManyRows, RowsData
from lightning_modules.ablation.matching import Matching, Target, between
from lightning_modules.ablation.memory import peak_megabytes, reset_peak
from lightning_modules.ablation.placebo import Placebo
from lightning_modules.ablation.retention import Ended
from lightning_modules.ablation.scoring import Scorer
from lightning_modules.ablation.stale import training_data
from lightning_modules.evaluation.likelihood import device_of
from lightning_modules.run import assembly
from lightning_modules.run.options import AUTO
from lightning_modules.run.options.names import NO_RULE
from lightning_modules.run.radius import measure, search_settings
from lightning_modules.training.adversary import AdversarialModule, AdversarySettings
from lightning_modules.training.callbacks import AnchorPull, ProgressLines
from lightning_modules.training.merging import merged
from lightning_modules.training.module import UnlearningModule
from lightning_modules.training.objectives import by_name, needs_reference
from lightning_modules.training.references import SecondModel
from lightning_modules.training.trainer import trainer_options


def train(run: Run, model: nn.Module, tokenizer: Any, scorer: Scorer, targets: Sequence[Target]) -> Ended:
    """Train until every target is met or the epochs are over, or until the method's own end, and merge the adapters.

    The method's own end (`Targets.end`) may be another, short training.
    """
    options = run.options()
    training, home = options.training, device_of(model)
    data = training_data(run, tokenizer)
    before = copy.deepcopy(model.state_dict())
    started = time.perf_counter()
    adapted = assembly.adapted(model, training, data, options.output.seed)
    # FILA's importance takes a backward pass for every batch of both sets.
    extra = 2 * len(data.train_dataloader()) if training.lora_init == "fila" else 0
    radius = None
    if run.method.radius == AUTO:
        data.setup()
        forget = data.splits["forget"]
        radius = measure(options, adapted, tokenizer, forget)
        extra += search_settings(options).count(len(forget))
        run = replace(run, method=replace(run.method, radius=radius))
    anchor = assembly.make_anchor(options, adapted, data)
    held: list[Callback] = [] if anchor is None else [AnchorPull(anchor)]
    spent = time.perf_counter() - started
    tally = Tally()
    matching = MatchTargets(
        targets,
        scorer.along,
        scorer.thoroughly,
        every_n_steps=run.grid.train.evaluate_every,
        tolerance=run.grid.evaluate.tolerance,
        progress=tally.progress,
        spent=spent,
        stop_below=run.method.stop_below if run.grid.targets.end else None,
        until_end=bool(run.grid.targets.end),
    )
    callbacks: list[Callback] = [*held, tally, matching]
    if run.method.placebo:
        callbacks.append(Placebo(run.method.bound_rule(), seed=run.data_seed))
    rows = run.method.retain_rows
    diverged, cost = None, Cost()
    whole: Any = None
    try:
        trained = RowsData(data, rows, run.method.row_examples) if rows else data
        L.Trainer(**on_this_device(run, callbacks)).fit(build_module(adapted, run), trained)
        whole = merged(adapted)
        if run.grid.targets.end:
            tally.start_watching()
            cost = ended(run, whole, before, tokenizer, lambda steps: on_this_device(run, held, steps))
            tally.stop_watching()
    except FloatingPointError as error:
        diverged = f"diverged: {error}"
        matching.give_up(diverged)
    whole = merged(adapted) if whole is None else whole
    whole.to(home)  # Lightning leaves a model on the CPU, where its scores and the attacks on it would be computed
    return Ended(
        matching,
        whole,
        whole.load_state_dict,
        before,
        copy.deepcopy(whole.state_dict()),
        extra,
        radius=radius,
        cost=cost,
        peak_megabytes=tally.peak,
        diverged=diverged,
    )


def build_module(model: nn.Module, run: Run) -> UnlearningModule:
    """The module that `unlearn` would train; for a placebo without the rule, which `Placebo` replaces."""
    options = run.options()
    method = options.method
    if run.method.placebo:
        method = replace(method, rule=NO_RULE, rule_options={})
    losses = by_name(method.forget_loss), by_name(method.retain_loss)
    compared = method.retain_noise or any(needs_reference(loss) for loss in losses)
    reference = SecondModel() if compared else None
    model = model.train()
    if run.method.retain_rows:
        rows, weight = run.method.retain_rows, run.method.retain_weight
        kind: Any = partial(ManyRows, rows=rows, retain_weight=weight)
    elif run.method.adversary:
        kind = partial(AdversarialModule, adversary=AdversarySettings(**run.method.adversary))
    else:
        kind = UnlearningModule if run.method.placebo else None  # a placebo reads the retain row
    return assembly.make_module(model, method, options.training, reference, kind, options.loading)


def on_this_device(run: Run, callbacks: Sequence[Callback], steps: int | None = None) -> dict[str, Any]:
    """Arguments of a Lightning Trainer that trains on this process's device and leaves no files.

    Args:
        run: With the epochs or steps of its method.
        callbacks: Besides the lines of progress.
        steps: Instead of those.
    """
    cuda, training = torch.cuda.is_available(), run.options().training
    steps = training.steps if steps is None else steps
    return trainer_options(
        accelerator="gpu" if cuda else "cpu",
        devices=[torch.cuda.current_device()] if cuda else 1,
        precision=run.grid.train.precision,
        max_epochs=training.epochs if steps is None else -1,
        max_steps=-1 if steps is None else steps,
        callbacks=[*callbacks, ProgressLines(f"Training {run.id}")],
    )


class Tally(Callback):
    """Counts the steps whose gradients conflict, and those that raise the retain loss to first order; watches memory.

    Attributes:
        steps: Steps so far.
        conflicts: Those in which the gradients conflict.
        raising: Those in which the parameter change raises the retain loss to first order.
        measured: Whether every step so far has measured its change (guard: measure or update).
        peak: The most memory of the process or device during a step so far (`memory.peak_megabytes`); None where the
            system does not say. On a CPU it counts what the scoring between steps has left with the allocator.
    """

    def __init__(self) -> None:
        self.steps = self.conflicts = self.raising = 0
        self.measured = True
        self.peak: float | None = None
        self._watching = False

    def start_watching(self) -> None:
        """Watch the memory from here on."""
        self._watching = reset_peak()

    def stop_watching(self) -> None:
        """Take what was watched into `peak`."""
        found = peak_megabytes() if self._watching else None
        self.peak = found if self.peak is None else max(self.peak, found or 0.0)

    def on_train_batch_start(self, *_: Any) -> None:
        """Watch the step's memory."""
        self.start_watching()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:  # noqa: ARG002 (Lightning's)
        """Read the step's record and memory."""
        self.stop_watching()
        if not isinstance(pl_module, UnlearningModule) or (record := pl_module.surgery.record) is None:
            return
        self.steps += 1
        self.conflicts += record.conflict
        actual, unguarded = record.actual_change, record.unguarded_change
        self.measured = self.measured and actual is not None
        if actual is not None and unguarded is not None:
            # After a guard only rounding is left: 3e-6 of what the guard removed, measured where steps are small.
            self.raising += bool((actual > 1e-4 * unguarded.abs()).any())

    def shares(self) -> dict[str, float]:
        """The counts as shares of the steps so far; `raising` is NaN if a step was not measured (guard: none)."""
        steps = max(1, self.steps)
        return {"conflicts": self.conflicts / steps, "raising": self.raising / steps if self.measured else float("nan")}

    def progress(self) -> dict[str, Any]:
        """What is recorded of a match besides its scores: the shares, and the peak of memory."""
        return {**self.shares(), "peak_megabytes": self.peak}


class MatchTargets(Matching, Callback):
    """Matches along training: a state is scored every few steps, and training stops when all targets are met.

    A match is on the line between the parameters of two scored states. After it the parameters are put back, so that
    matching does not change the training.

    Args:
        targets: As in `Matching`.
        score: As in `Matching`; it is called every `every_n_steps`, at the start and at the end.
        describe: As in `Matching`.
        every_n_steps: Optimizer steps between two scores.
        tolerance: As in `Matching`.
        progress: As in `Matching`.
        spent: Seconds that the method took before training; they are added to those of training.
        stop_below: Stop once `forget_probability` is below this.
        until_end: Do not stop where all targets are met.

    Attributes:
        curve: As in `Matching`, with `step` and `seconds`, in which the time of scoring is left out.
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
        stop_below: float | None = None,
        until_end: bool = False,
    ) -> None:
        super().__init__(targets, score, describe, tolerance=tolerance, progress=progress)
        self.stop_below, self.until_end = stop_below, until_end
        self.every_n_steps, self.spent = every_n_steps, spent
        self._before: list[Tensor] = []
        self._started = self._away = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Score the start. A target that it has already passed is missed."""
        self._started = time.perf_counter()
        self._look(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Score the model if it is time."""
        if trainer.global_step % self.every_n_steps == 0:
            self._look(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Score the end; the targets that are still open are missed."""
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
        reached = self.stop_below is not None and self.curve[-1]["forget_probability"] < self.stop_below
        trainer.should_stop = trainer.should_stop or reached or not (self.open or self.until_end)
