"""UnlearningModule: two losses, one optimizer that keeps their gradients apart, Lightning's automatic optimization."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import gradsurgery as gs
from gradsurgery.optimizer.perturbation import Perturbation
from lightning_modules.metrics import AnswerProbability
from lightning_modules.training.heads import AnswerHead
from lightning_modules.training.noise import NoiseSettings, noised
from lightning_modules.training.objectives import name_of, needs_reference, needs_refusals, objective
from lightning_modules.training.packing import keep_differentiable
from lightning_modules.training.perturb import PerturbSettings
from lightning_modules.training.probability import add_answers, uncollated
from lightning_modules.training.references import Reference
from lightning_modules.training.resuming import ResumableModule
from lightning_modules.training.sharding import parts
from lightning_modules.training.soundness import (
    check_alone,
    check_batches,
    check_model,
    check_numbers,
    naming_the_batch,
)
from lightning_modules.training.token_count import mean_token_count
from lightning_modules.training.trainer import number_of_steps
from lightning_modules.training.warmup import Schedule, Scheduled, with_warmup

_VALIDATED = ("forget", "retain")  # whatever other objectives a subclass has


class UnlearningModule(ResumableModule):
    """Forget one set of answers, keep the others, with gradient surgery between the two.

    Every training step takes the batch `{"forget": ..., "retain": ...}` (`ForgetRetainDataModule` makes them), computes
    the losses on the answer tokens, and hands them to `GradientSurgery.join`. Accumulation, clipping, precision
    plugins, schedulers, DDP and resuming are Lightning's own.

    A loss is the mean over the answer tokens of all processes, so that two processes with half the batch each do what
    one does with all of it. The batches of an accumulated step count equally, whatever their number of answer tokens.

    Validation takes two loaders, of the forget and of the retain examples in this order, and logs their mean answer
    probability as `forget/probability` and `retain/probability` (see `validation_step`).

    A Hugging Face model runs as backbone and head apart, so that only answer tokens go through the head and the logits
    of all tokens are never held (`heads.AnswerHead`). Any other model computes its own logits.

    Args:
        model: Anything that maps `input_ids` and `attention_mask` to an output with `logits [B, T, V]`.
        forget_loss: What is minimised on the forget batch: a loss of `gradsurgery.losses`, a `functools.partial` of
            one, any function of logits `[N, V]` and labels `[N]` with a value per token, or an objective
            (`objectives.idk`, `objectives.rmu`). See `objectives.objective`. The value of a token must not depend on
            other tokens, as by weights that are normalised over the batch: the function sees some rows at a time.
        retain_loss: The same for the retain batch. None leaves it out, as where an anchor holds what is to be kept
            (`callbacks.AnchorPull`): a step takes one backward pass, and the rule has one row.
        skip_first: Answer tokens that the forget loss leaves out at the start of each answer. None means 1 for CE-U,
            as in its paper, and 0 for any other loss.
        optimizer: Trainable parameters, by name -> a base optimizer.
        surgery: Base optimizer -> `GradientSurgery` with the objectives "forget" and "retain"; without a retain loss it
            is told `objectives=("forget",)`. To accumulate several batches it must have `accumulate=True`.
        warmup_steps: Steps over which the learning rate rises linearly; then it stays.
        schedule: Instead of `warmup_steps`: the share of the learning rate at a step, counted from 0, of so many steps
            of the whole training, such as `lightning_modules.training.warmup.falling_late`.
        perturb: Take the forget gradient at weights that are moved along a direction, see `PerturbSettings`. The forget
            loss is then computed in the backward pass, and is no part of the scalar that `training_step` returns.
        noise: Hold the outputs on noised retain examples to those of the start model too, see `NoiseSettings`.
        reference: The start model (the model before unlearning), for losses and `noise` that compare with it:
            `references.SecondModel()` (a frozen copy), `AdapterOff()` or `Precomputed(path)`.
        retain_inside: Multiple of the retain loss inside the forget objective, before the rule (the GRU code's
            `*_gd_gru`). What is added after the rule is `GradientSurgery`'s `add`.
        dual: PDU's multiplier of the retain loss. It is updated after each optimizer step, with that step's mean retain
            loss of all processes, and saved with the module.

    Raises:
        ValueError: If a number is negative, if `retain_loss` teaches refusals, or is None beside `noise`,
            `retain_inside` or `dual`, if a loss compares with a start model and there is no `reference`, if
            `skip_first` is given to a loss that chooses its own tokens, if gradients cannot pass the model's 4-bit
            weights (`packing.keep_differentiable`), or if `perturb` is given with `retain_inside`, or `schedule` with
            `warmup_steps`.
        TypeError: If a loss is not a function, or the model gives no logits.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes))
        >>> module = UnlearningModule(model, surgery=partial(gs.GRU, guard="update"))
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        forget_loss: Any = gs.losses.ceu,
        retain_loss: Any | None = gs.losses.cross_entropy,
        skip_first: int | None = None,
        optimizer: Callable[[Iterable[tuple[str, nn.Parameter]]], torch.optim.Optimizer] = partial(
            torch.optim.AdamW, lr=1e-5, weight_decay=0.01
        ),
        surgery: Callable[[torch.optim.Optimizer], gs.GradientSurgery] = gs.GRU,
        warmup_steps: int = 0,
        schedule: Schedule | None = None,
        perturb: PerturbSettings | None = None,
        noise: NoiseSettings | None = None,
        reference: Reference | None = None,
        retain_inside: float = 0.0,
        dual: gs.losses.DualVariable | None = None,
    ) -> None:
        super().__init__()
        check_model(model)
        check_numbers(skip_first=skip_first, warmup_steps=warmup_steps, retain_inside=retain_inside)
        keep_differentiable(model)
        self.model = model
        self._answer_head = AnswerHead(model)
        self.objectives = {"forget": objective(forget_loss, skip_first)}
        if retain_loss is None:
            check_alone(noise=noise, retain_inside=retain_inside, dual=dual)
            told: Any = surgery
            surgery = partial(told, objectives=("forget",))
        else:
            self.objectives["retain"] = objective(retain_loss, 0)
        self.make_optimizer, self.make_surgery = optimizer, surgery
        self.warmup_steps, self.schedule, self.perturb = warmup_steps, schedule, perturb
        self.noise = noise
        self._divergence = objective(gs.losses.kl_divergence)
        self._scheduled: Scheduled | None = None
        self._at: Perturbation | None = None
        self._steps = 0
        self.reference, self.retain_inside, self.dual = reference, retain_inside, dual
        self.losses: dict[str, Tensor] = {}
        self._retain_losses: list[Tensor] = []
        self._indices: dict[str, Tensor | None] = {}
        # A dictionary, so that the metrics are no submodules: Lightning would move their float64 states along, also to
        # a device that has no float64.
        self._probabilities: dict[str, AnswerProbability] = {}
        if retain_loss is not None and needs_refusals(retain_loss):
            raise ValueError(
                f"retain_loss: expected a loss that keeps answers, found {name_of(retain_loss)}, which teaches refusals"
            )
        if perturb is not None and retain_inside:
            raise ValueError(
                f"retain_inside: expected 0 with perturb, found {retain_inside}: the two losses are computed at different weights; use "
                "add={'retain': ...} of the surgery"
            )
        if schedule is not None and warmup_steps:
            raise ValueError(
                f"warmup_steps: expected 0 with a schedule, which says every learning rate, found {warmup_steps}"
            )
        self._direction = None if perturb is None else objective(perturb.direction, 0)
        compared = [forget_loss] if retain_loss is None else [forget_loss, retain_loss]
        compared += [] if perturb is None else [perturb.direction]
        compared += [] if noise is None else [gs.losses.kl_divergence]
        if reference is None:
            for loss in compared:
                if needs_reference(loss):
                    raise ValueError(
                        f"{name_of(loss)}: expected a reference to compare with, found none; reference=lm.references.SecondModel() "
                        "is a frozen copy of the model"
                    )
        else:
            reference.prepare(model)

    @property
    def surgery(self) -> gs.GradientSurgery:
        """The optimizer, once Lightning has configured it."""
        optimizer = self.optimizers(use_pl_optimizer=False)
        if not isinstance(optimizer, gs.GradientSurgery):
            raise TypeError(f"expected one GradientSurgery from the surgery argument, found {type(optimizer).__name__}")
        return optimizer

    @property
    def head(self) -> AnswerHead:
        """The model in two parts, taken apart again when `model` is replaced."""
        if self._answer_head.model is not self.model:
            packs, self._answer_head = self._answer_head.packs, AnswerHead(self.model)
            if packs:
                self._answer_head.pack()
        return self._answer_head

    def configure_model(self) -> None:
        """Shard the model by FSDP2, a layer at a time, where Lightning's `ModelParallelStrategy` trains.

        A model that is sharded already stays as it is. For another mesh or another division into parts (HSDP, say)
        shard the model in a subclass's `configure_model`.

        Raises:
            RuntimeError: If the strategy has `tensor_parallel_size` above 1, and the model is not parallelized yet.
        """
        mesh = self.device_mesh
        if mesh is None or any(isinstance(parameter, DTensor) for parameter in self.model.parameters()):
            return
        if mesh["tensor_parallel"].size() > 1:
            raise RuntimeError(
                "ModelParallelStrategy: expected tensor_parallel_size=1, found "
                f"{mesh['tensor_parallel'].size()}, for which every family of models needs a plan of its own; parallelize the model in "
                "configure_model of a subclass"
            )
        for part in parts(self.model):
            fully_shard(part, mesh=mesh["data_parallel"], reshard_after_forward=True)

    def training_step(self, batch: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
        """The losses, joined into one scalar whose backward pass does the surgery."""
        check_batches(batch, self.objectives)
        if self._scheduled is not None and not self._scheduled.begun:
            raise RuntimeError(
                "schedule: expected on_train_start of UnlearningModule before the first step; call super()"
            )
        self._indices.update({name: batch[name].get("index") for name in self.objectives})
        perturbed = () if self.perturb is None else ("forget",)
        losses: dict[str, Any] = {
            name: compute(self, batch, name) for name, compute in self.objectives.items() if name not in perturbed
        }
        self.losses = {name: loss.detach() for name, loss in losses.items()}
        self.log_dict({f"loss/{name}": loss for name, loss in self.losses.items()}, prog_bar=True)
        if self.retain_inside:
            losses["forget"] = losses["forget"] + self.retain_inside * losses["retain"]
        if self.dual is not None:
            self._retain_losses.append(self.losses["retain"])
            losses["retain"] = losses["retain"] * self.dual.value
        if self.noise is not None:
            mixed = noised(batch["retain"], self.noise.share, self.trainer.distributed_sampler_kwargs)
            found = self._divergence(self, {"retain": mixed}, "retain")
            self.log("loss/noise", found.detach(), prog_bar=True)
            losses["retain"] = losses["retain"] + self.noise.weight * found
        losses |= {name: self._perturbed(batch, name) for name in perturbed}
        return self.surgery.join(retain_graph=bool(self.retain_inside), **losses)

    def _perturbed(self, batch: Mapping[str, Mapping[str, Tensor]], name: str) -> gs.Perturbed:
        """The objective at moved weights; it and its direction are computed in the backward pass."""
        if self._at is None or self.perturb is None or self._direction is None:
            raise RuntimeError(
                "perturb: expected on_train_start of UnlearningModule before the first step; call super()"
            )
        self._at.radius = self.perturb.radius(self.trainer.global_step, self._steps)

        def loss() -> Tensor:
            value = self.objectives[name](self, batch, name)
            self.losses[name] = value.detach()
            return value

        return gs.Perturbed(loss=loss, direction=partial(self._direction, self, batch, name), at=self._at)

    def on_after_backward(self) -> None:
        """Log the loss that only the backward pass knows."""
        if self.perturb is not None:
            self.log("loss/forget", self.losses["forget"], prog_bar=True)

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        """Lightning's; then the dual variable moves, before callbacks that save it see the step.

        Where a gradient is not finite, the error names the objective and the batch.
        """
        with naming_the_batch(self._indices, *arguments[:2]):
            super().optimizer_step(*arguments, **options)
        if self.dual is None or not self._retain_losses:
            return
        mean = torch.stack(self._retain_losses).mean()
        self._retain_losses = []
        self.dual.update(self.trainer.strategy.reduce(mean, reduce_op="mean") if self.trainer.world_size > 1 else mean)

    def on_train_start(self) -> None:
        """Go on from where a resumed run was, with the learning rate and the radius of its step."""
        self._retain_losses = []
        super().on_train_start()
        if self._scheduled is not None:
            self._scheduled.begin(number_of_steps(self.trainer, "schedule"))
        if self.perturb is not None:
            self._steps = number_of_steps(self.trainer, "perturb, end") if self.perturb.grows else 0
            self._at = self.surgery.perturbed(self.perturb.start, scale=self.perturb.scale)

    def on_validation_epoch_start(self) -> None:
        """A fresh metric for each split."""
        exact = torch.device("cpu") if self.device.type == "mps" else self.device  # Apple's GPUs have no float64
        self._probabilities = {name: AnswerProbability().to(exact) for name in _VALIDATED}

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:  # noqa: ARG002 (Lightning's signature)
        """Score a batch's answers, as `callbacks.TradeoffCurve` scores them.

        Args:
            batch: Of the first of two loaders forget examples, of the second retain examples, as `collate` makes them:
                `input_ids`, `attention_mask` and `labels`, `[B, T]`. A training batch, `{"forget": ..., "retain":
                ...}`, from any loader is scored as well. Any other batch is left alone, with a warning.
            batch_idx: Lightning's.
            dataloader_idx: Which loader the batch comes from.
        """
        splits: Mapping[str, Any] = batch if isinstance(batch, Mapping) else {}
        if "input_ids" in splits and len(self.trainer.num_val_batches) == len(_VALIDATED):
            splits = {_VALIDATED[dataloader_idx]: batch}
        scored = [name for name in self._probabilities if name in splits]
        if not scored:
            rank_zero_warn(
                "validation: expected two loaders, of forget and of retain examples, or batches with both, found others; "
                "they are not scored"
            )
        with torch.autocast(self.device.type, enabled=False):  # as the curve scores
            for name in scored:
                rows = uncollated(splits[name])
                add_answers(self._probabilities[name], self.model, rows, pad_token_id=0, batch_size=len(rows))

    def on_validation_epoch_end(self) -> None:
        """Log the mean answer probability of each split, over all batches and processes."""
        for name, metric in self._probabilities.items():
            with metric.sync_context():  # in every process: one without a batch would keep the others waiting
                seen = bool(metric.count)
            if seen:
                mean = metric.compute()
                mean = mean.float() if self.device.type == "mps" else mean
                self.log(f"{name}/probability", mean, prog_bar=True, sync_dist=True)
        self._probabilities = {}

    def mean_count(self, count: int) -> Tensor:
        """The mean over all processes of a count of tokens, see `token_count.mean_token_count`."""
        return mean_token_count(count, self._trainer, self.device)

    def configure_optimizers(self) -> Any:
        """The wrapped base optimizer, and its warm-up or schedule."""
        named = [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        if not named:
            raise ValueError(
                "model: expected parameters that require a gradient, found none; call requires_grad_() on those to be trained"
            )
        optimizer: Any = self.make_surgery(self.make_optimizer(named))
        if not isinstance(optimizer, gs.GradientSurgery):
            raise TypeError(f"expected one GradientSurgery from the surgery argument, found {type(optimizer).__name__}")
        if self.schedule is None:
            return with_warmup(optimizer, self.warmup_steps)
        self._scheduled = Scheduled(optimizer, self.schedule)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self._scheduled.scheduler, "interval": "step"},
        }
