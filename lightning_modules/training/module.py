"""UnlearningModule: two losses, one optimizer that keeps their gradients apart, Lightning's automatic optimization."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

import gradsurgery as gs
from lightning_modules.training.heads import AnswerHead
from lightning_modules.training.objectives import name_of, needs_reference, needs_refusals, objective
from lightning_modules.training.references import Reference


class UnlearningModule(L.LightningModule):
    """Forget one set of answers, keep the others, with gradient surgery between the two.

    Every step takes the batch `{"forget": ..., "retain": ...}` (`ForgetRetainDataModule` makes them), computes both losses on the answer
    tokens, and hands them to `GradientSurgery.join`, so that accumulation, clipping, precision plugins, schedulers, DDP and resuming
    are Lightning's own. Losses are means over the answer tokens of all processes, so that two processes with half the batch each do
    what one does with all of it. Batches of an accumulated step count equally, whatever their number of answer tokens.

    A Hugging Face model runs as backbone and head apart, so that only answer tokens go through the head and the logits of all tokens are
    never held (`heads.AnswerHead`); any other model computes its own logits.

    Args:
        model: Anything that maps `input_ids` and `attention_mask` to an output with `logits [B, T, V]`.
        forget_loss: A loss of `gradsurgery.losses`, a `functools.partial` of one, any function of logits `[N, V]` and labels `[N]` with a
            value per token, or an objective (`objectives.idk`, `objectives.rmu`); to be minimised. See `objectives.objective`.
        retain_loss: The same for the retain batch.
        skip_first: Answer tokens that the forget loss leaves out at the start of each answer; None: 1 for CE-U, as in its paper,
            and 0 for any other.
        optimizer: Trainable parameters, by name -> a base optimizer.
        surgery: Base optimizer -> `GradientSurgery` with the objectives "forget" and "retain". With accumulation over several batches
            it must have `accumulate=True`.
        warmup_steps: The learning rate rises linearly over so many steps, then stays.
        reference: The model before unlearning, for losses that compare with it: `references.SecondModel()` (a frozen copy),
            `AdapterOff()` or `Precomputed(path)`.
        retain_inside: Multiple of the retain loss inside the forget objective, before the rule (the GRU code's `*_gd_gru`). What is added
            after the rule is `GradientSurgery`'s `add`.
        dual: PDU's multiplier of the retain loss, updated after each optimizer step with that step's mean retain loss of all processes, and
            saved with the module.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        >>> module = UnlearningModule(LlamaForCausalLM(config), surgery=partial(gs.GRU, guard="update"))
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        forget_loss: Any = gs.losses.ceu,
        retain_loss: Any = gs.losses.cross_entropy,
        skip_first: int | None = None,
        optimizer: Callable[[Iterable[tuple[str, nn.Parameter]]], torch.optim.Optimizer] = partial(
            torch.optim.AdamW, lr=1e-5, weight_decay=0.01
        ),
        surgery: Callable[[torch.optim.Optimizer], gs.GradientSurgery] = gs.GRU,
        warmup_steps: int = 0,
        reference: Reference | None = None,
        retain_inside: float = 0.0,
        dual: gs.losses.DualVariable | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self._answer_head = AnswerHead(model)
        self.objectives = {"forget": objective(forget_loss, skip_first), "retain": objective(retain_loss, 0)}
        self.make_optimizer, self.make_surgery = optimizer, surgery
        self.warmup_steps = warmup_steps
        self.reference, self.retain_inside, self.dual = reference, retain_inside, dual
        self.losses: dict[str, Tensor] = {}
        self._retain_losses: list[Tensor] = []
        self._steps_seen = 0
        if needs_refusals(retain_loss):
            raise ValueError(
                f"retain_loss: expected a loss that keeps answers, found {name_of(retain_loss)}, which teaches refusals"
            )
        if reference is None:
            for loss in (forget_loss, retain_loss):
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
        """The model in two parts; made anew when `model` is replaced."""
        if self._answer_head.model is not self.model:
            self._answer_head = AnswerHead(self.model)
        return self._answer_head

    def training_step(self, batch: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
        """Both losses, joined."""
        losses = {name: compute(self, batch, name) for name, compute in self.objectives.items()}
        self.losses = {name: loss.detach() for name, loss in losses.items()}
        self.log_dict({f"loss/{name}": loss for name, loss in self.losses.items()}, prog_bar=True)
        if self.retain_inside:
            losses["forget"] = losses["forget"] + self.retain_inside * losses["retain"]
        if self.dual is not None:
            self._retain_losses.append(self.losses["retain"])
            losses["retain"] = losses["retain"] * self.dual.value
        return self.surgery.join(retain_graph=bool(self.retain_inside), **losses)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ARG002 (Lightning's signature)
        """Move the dual variable once per optimizer step."""
        if self.dual is None or not self._retain_losses or self.trainer.global_step == self._steps_seen:
            return
        self._steps_seen = self.trainer.global_step
        mean = torch.stack(self._retain_losses).mean()
        self._retain_losses = []
        self.dual.update(self.trainer.strategy.reduce(mean, reduce_op="mean") if self.trainer.world_size > 1 else mean)

    def on_train_start(self) -> None:
        """A resumed run goes on counting steps from where it was."""
        self._steps_seen, self._retain_losses = self.trainer.global_step, []

    def mean_count(self, count: int) -> Tensor:
        """The mean of a count of tokens over all processes: DDP averages losses, whatever each process counted."""
        world = 1 if self._trainer is None else self.trainer.world_size
        mean = torch.tensor(float(count), device=self.device)
        if world > 1:
            mean = self.trainer.strategy.reduce(mean, reduce_op="mean")
        return mean.clamp_min(1.0 / world)

    def configure_optimizers(self) -> Any:
        """The wrapped base optimizer, and its warm-up."""
        named = [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        optimizer = self.make_surgery(self.make_optimizer(named))
        if not self.warmup_steps:
            return optimizer
        warmup = torch.optim.lr_scheduler.LinearLR(
            optimizer, 1.0 / self.warmup_steps, total_iters=self.warmup_steps - 1
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warmup, "interval": "step"}}
