"""UnlearningModule: two losses, one optimizer that keeps their gradients apart, Lightning's automatic optimization."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

import gradsurgery as gs


class UnlearningModule(L.LightningModule):
    """Forget one set of answers, keep the others, with gradient surgery between the two.

    Every step takes the batch `{"forget": ..., "retain": ...}` (`ForgetRetainDataModule` makes them), computes both losses on the answer
    tokens, and hands them to `GradientSurgery.join`, so that accumulation, clipping, precision plugins, schedulers, DDP and resuming
    are Lightning's own. Losses are means over the answer tokens of all processes, so that two processes with half the batch each do
    what one does with all of it. Batches of an accumulated step count equally, whatever their number of answer tokens.

    Args:
        model: Anything that maps `input_ids` and `attention_mask` to an output with `logits [B, T, V]`.
        forget_loss: Value per token of logits `[N, V]` and labels `[N]`, to be minimised.
        retain_loss: The same for the retain batch.
        skip_first: Answer tokens that the forget loss leaves out at the start of each answer; None: 1 for CE-U, as in its paper,
            and 0 for any other.
        optimizer: Trainable parameters, by name -> a base optimizer.
        surgery: Base optimizer -> `GradientSurgery` with the objectives "forget" and "retain". With accumulation over several batches
            it must have `accumulate=True`.
        warmup_steps: The learning rate rises linearly over so many steps, then stays.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        >>> module = UnlearningModule(LlamaForCausalLM(config), surgery=partial(gs.GRU, guard="update"))
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        forget_loss: gs.losses.TokenLoss = gs.losses.ceu,
        retain_loss: gs.losses.TokenLoss = gs.losses.cross_entropy,
        skip_first: int | None = None,
        optimizer: Callable[[Iterable[tuple[str, nn.Parameter]]], torch.optim.Optimizer] = partial(
            torch.optim.AdamW, lr=1e-5, weight_decay=0.01
        ),
        surgery: Callable[[torch.optim.Optimizer], gs.GradientSurgery] = gs.GRU,
        warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.forget_loss, self.retain_loss = forget_loss, retain_loss
        self.skip_first = int(forget_loss is gs.losses.ceu) if skip_first is None else skip_first
        self.make_optimizer, self.make_surgery = optimizer, surgery
        self.warmup_steps = warmup_steps
        self.losses: dict[str, Tensor] = {}

    @property
    def surgery(self) -> gs.GradientSurgery:
        """The optimizer, once Lightning has configured it."""
        optimizer = self.optimizers(use_pl_optimizer=False)
        if not isinstance(optimizer, gs.GradientSurgery):
            raise TypeError(f"expected one GradientSurgery from the surgery argument, found {type(optimizer).__name__}")
        return optimizer

    def training_step(self, batch: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
        """Both losses, joined."""
        losses = {
            "forget": self.loss(self.forget_loss, batch["forget"], self.skip_first),
            "retain": self.loss(self.retain_loss, batch["retain"], 0),
        }
        self.losses = {name: loss.detach() for name, loss in losses.items()}
        self.log_dict({f"loss/{name}": loss for name, loss in self.losses.items()}, prog_bar=True)
        return self.surgery.join(**losses)

    def loss(self, function: gs.losses.TokenLoss, batch: Mapping[str, Tensor], skip_first: int) -> Tensor:
        """Mean of a token loss over the answer tokens of a batch, on all processes together; 0 if there is none."""
        logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        logits, labels = gs.losses.answer_tokens(logits, batch["labels"], skip_first=skip_first)
        world = 1 if self._trainer is None else self.trainer.world_size
        count = torch.tensor(float(len(labels)), device=logits.device)
        if world > 1:
            # DDP averages over processes, whatever each of them counted: divide by the mean count.
            count = self.trainer.strategy.reduce(count, reduce_op="mean")
        return function(logits, labels).sum() / count.clamp_min(1.0 / world)

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
