"""Methods that are trained once and then forget as much as their weight says: ULD and task vectors."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

import gradsurgery as gs
from gradsurgery.task_vectors import StateDict, negate, rectified, task_vector
from lightning_modules.ablation.grid import Run
from lightning_modules.ablation.matching import Matching, Target
from lightning_modules.ablation.retention import Ended
from lightning_modules.ablation.scoring import Scorer
from lightning_modules.ablation.stale import training_data
from lightning_modules.ablation.training import on_this_device
from lightning_modules.data.pairs import ForgetRetainDataModule
from lightning_modules.evaluation.likelihood import device_of
from lightning_modules.run.loading import make_data
from lightning_modules.training.uld import train_assistant
from lightning_modules.training.warmup import with_warmup

_STATES = 20  # scored from weight 0 to the largest; targets between two of them are found by bisection


def by_assistant(run: Run, model: nn.Module, tokenizer: Any, scorer: Scorer, targets: Sequence[Target]) -> Ended:
    """ULD (2406.08607): train the assistant. The state is the weight with which its logits are subtracted."""
    options, clock = run.options(), _Clock()
    unlearned = train_assistant(
        model,
        tokenizer,
        training_data(run, None).read(),
        replace(options.uld_settings(), lr=run.method.lr or run.grid.train.lr),
        trainer=on_this_device(run, [clock]),  # with the row's epochs
    )

    def load(state: StateDict) -> None:
        unlearned.weight = float(state["weight"])

    def at(weight: float) -> StateDict:
        return {"weight": torch.tensor(weight, dtype=torch.float64)}

    return _walk(run, Weighted(unlearned, at, load), clock, scorer, targets)


def by_task_vector(run: Run, model: nn.Module, tokenizer: Any, scorer: Scorer, targets: Sequence[Target]) -> Ended:
    """Negation (2212.04089): take away a multiple of what fine-tuning on the forget set adds to the weights."""
    clock, before = _Clock(), copy.deepcopy(model.state_dict())
    vector = _fine_tuned(run, model, tokenizer, make_data(run.options(), None).read()["forget"], clock, before)
    line = Weighted(model, partial(negate, before, vector), model.load_state_dict)
    return _walk(run, line, clock, scorer, targets)


def by_rectified(run: Run, model: nn.Module, tokenizer: Any, scorer: Scorer, targets: Sequence[Target]) -> Ended:
    """TRU-style (unverified): the task vectors of both halves of the forget set, each rectified against the other."""
    clock, before = _Clock(), copy.deepcopy(model.state_dict())
    rows = make_data(run.options(), None).read()["forget"]
    # Two halves instead of every other example, because neighbours are often about one person, and the two vectors
    # should be about different people.
    halves = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    vectors = [_fine_tuned(run, model, tokenizer, half, clock, before) for half in halves]
    moved = rectified(before, vectors, vectors[::-1])
    vector = task_vector(moved, before)  # from the moved weights back to the start, since `negate` takes it away
    line = Weighted(model, partial(negate, before, vector), model.load_state_dict)
    return _walk(run, line, clock, scorer, targets)


class Weighted(NamedTuple):
    """A model whose state is determined by one number, the weight of what is taken away from it.

    Attributes:
        model: Holds any of the states.
        state: Weight -> state.
        load: Puts a state into the model.
    """

    model: nn.Module
    state: Callable[[float], StateDict]
    load: Callable[[StateDict], object]

    def between(self, first: float, second: float) -> Callable[[float], None]:
        """The states from one weight (position 0) to another (position 1): a path for `match`."""

        def move(position: float) -> None:
            self.load(self.state(first + position * (second - first)))

        return move


def _walk(run: Run, line: Weighted, clock: _Clock, scorer: Scorer, targets: Sequence[Target]) -> Ended:
    """Raise the weight from 0 until every target is met, or the largest weight is reached."""
    matching = Matching(targets, scorer.along, scorer.thoroughly, tolerance=run.grid.evaluate.tolerance)
    last = weight = 0.0
    for number in range(_STATES + 1):
        last, weight = weight, run.method.max_weight * number / _STATES
        move = line.between(last, weight)
        move(1.0)
        matching.look(line.model, {"step": float(clock.steps), "seconds": clock.seconds, "weight": weight}, move)
        if not matching.open:
            break
    matching.close(f"at weight {weight:.4g}")
    return Ended(matching, line.model, line.load, line.state(0.0), line.state(weight))


def _fine_tuned(
    run: Run, model: nn.Module, tokenizer: Any, rows: Sequence[Any], clock: _Clock, before: StateDict
) -> dict[str, Tensor]:
    """The task vector of some examples: what fine-tuning on them adds to the weights."""
    options = run.options()
    training, seed, max_length = options.training, options.output.seed, options.data.max_length
    home = device_of(model)
    model.load_state_dict(before)
    # The retain half of a batch is not used.
    data = ForgetRetainDataModule(
        rows, rows, tokenizer, batch_size=training.batch_size, seed=seed, max_length=max_length
    )
    module = FineTuning(model.train(), training.base_optimizer(), training.warmup_steps)
    L.Trainer(**on_this_device(run, [clock])).fit(module, data)
    model.to(home)  # Lightning leaves it on the CPU, where every state of the way would be scored
    return task_vector(before, model.state_dict())


class FineTuning(L.LightningModule):
    """Trains on the mean cross-entropy of the forget batch's answer tokens, and on nothing else.

    Args:
        model: A causal language model, all weights of which are trained.
        optimizer: Parameters -> optimizer.
        warmup_steps: Steps over which the learning rate rises linearly; then it is constant.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[..., torch.optim.Optimizer],
        warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        self.model, self.make_optimizer, self.warmup_steps = model, optimizer, warmup_steps

    def training_step(self, batch: dict[str, dict[str, Tensor]]) -> Tensor:
        """The loss."""
        forget = batch["forget"]
        logits = self.model(input_ids=forget["input_ids"], attention_mask=forget["attention_mask"]).logits
        return gs.losses.cross_entropy(*gs.losses.answer_tokens(logits, forget["labels"])).mean()

    def configure_optimizers(self) -> Any:
        """The optimizer, and its warm-up."""
        return with_warmup(self.make_optimizer(self.model.parameters()), self.warmup_steps)


class _Clock(Callback):
    """Counts the steps and seconds of all trainings that it is a callback of."""

    def __init__(self) -> None:
        self.steps, self.seconds = 0, 0.0
        self._started = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002 (Lightning's)
        self._started = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002 (Lightning's)
        self.steps += trainer.global_step
        self.seconds += time.perf_counter() - self._started
