"""Teaching a causal language model a set of examples: what makes TOFU's target, its reference, and the small Llama."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import lightning as L
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import gradsurgery as gs
from lightning_modules.data.lengths import LengthBatches
from lightning_modules.data.loader import LengthLoader
from lightning_modules.data.tokenization import Encoded, collate
from lightning_modules.training.finetuning_settings import USUAL, FinetuningSettings
from lightning_modules.training.heads import AnswerHead, answer_values, logits_of
from lightning_modules.training.resuming import ResumableModule
from lightning_modules.training.token_count import mean_token_count
from lightning_modules.training.trainer import trainer_options
from lightning_modules.training.warmup import warmup_and_decay

_HELD = 2**28
"""Logits of a batch's answers, in bytes, that may be held at once. With more, the head and the loss run in chunks."""


class FinetuningModule(ResumableModule):
    r"""Minimises the mean cross-entropy of the answers' tokens, with AdamW.

    $$L = -\frac{1}{N} \sum_{t \in \mathrm{answers}} \log p(\mathrm{token}_t \mid \mathrm{tokens\ before})$$

    A batch holds `input_ids`, `attention_mask` and `labels`, `[B, T]`, as `tokenization.collate` makes them. The mean
    is over the answer tokens of all processes. The learning rate rises over the first tenth of the steps, at most 100,
    and then decays linearly (`warmup.warmup_and_decay`). AdamW has betas 0.9 and 0.98: a second moment over 1000 steps
    would remember the start of a run that may have 100.

    Args:
        model: Maps `input_ids` and `attention_mask` to an output with `logits [B, T, V]`. What requires a gradient is
            trained.
        settings: The learning rate and weight decay.

    Attributes:
        loss: Of the last batch; NaN before the first.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> module = FinetuningModule(LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes)))
    """

    def __init__(self, model: nn.Module, settings: FinetuningSettings = USUAL) -> None:
        super().__init__()
        self.model = model
        self.settings = settings
        self.head = AnswerHead(model)
        self.loss = torch.tensor(float("nan"))

    def training_step(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The mean cross-entropy of the batch's answer tokens, in nats."""
        states = self.head.states(batch)
        hidden, labels = gs.losses.answer_tokens(states.values, batch["labels"])
        if states.head is None or len(labels) * len(states.head.weight) * 4 <= _HELD:
            losses = cross_entropy(logits_of(hidden, states.head), labels, reduction="none")
        else:
            losses, _ = answer_values(gs.losses.cross_entropy, states, batch["labels"])
        loss = losses.sum() / mean_token_count(len(labels), self._trainer, losses.device)
        self.loss = loss.detach()
        if self._trainer is not None:
            self.log("loss", self.loss, prog_bar=True)
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:  # noqa: ARG002 (Lightning's signature)
        """Refuse gradients that are not finite, before a weight changes.

        Raises:
            FloatingPointError: If there is one, and no loss scale that skips such steps (float16).
        """
        if self.trainer.scaler is not None:
            return
        found = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        total = torch.nn.utils.get_total_norm(found)
        if not torch.isfinite(total):
            raise FloatingPointError(
                f"expected finite gradients, found NaN or infinity at optimizer step {self.trainer.global_step}, counted from 0; the "
                "weights are as before it: lower the learning rate, or look at the examples"
            )

    def configure_optimizers(self) -> Any:
        """AdamW and its schedule."""
        trained = [(name, weight) for name, weight in self.model.named_parameters() if weight.requires_grad]
        settings = self.settings
        optimizer = torch.optim.AdamW(trained, lr=settings.lr, betas=(0.9, 0.98), weight_decay=settings.weight_decay)
        schedule = warmup_and_decay(optimizer, self._steps())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _steps(self) -> int:
        """Optimizer steps of the whole training."""
        data, trainer = getattr(self.trainer, "datamodule", None), self.trainer
        if isinstance(data, FinetuningDataModule):
            # Asked for its own estimate here, Lightning would set the loader up before it restores the loader's place.
            return (trainer.max_epochs or 1) * -(-len(data.order()) // trainer.accumulate_grad_batches)
        return int(trainer.estimated_stepping_batches)


class FinetuningDataModule(L.LightningDataModule):
    """Batches of examples of similar length, in an order that depends on the seed alone (`LengthBatches`).

    Args:
        encoded: The examples.
        pad_token_id: Fills up shorter rows, see `tokenization.padding_id`.
        settings: The size of a process's batch, and the seed of the order.
    """

    def __init__(self, encoded: Sequence[Encoded], pad_token_id: int, settings: FinetuningSettings = USUAL) -> None:
        super().__init__()
        self.encoded, self.pad_token_id, self.settings = encoded, pad_token_id, settings

    def order(self) -> LengthBatches:
        """Which examples make the batches of this process, one of the attached trainer's processes."""
        replicas = (self.trainer.distributed_sampler_kwargs if self.trainer is not None else None) or {}
        lengths = [len(example.input_ids) for example in self.encoded]
        return LengthBatches(lengths, self.settings.batch_size, seed=self.settings.seed, **replicas)

    def train_dataloader(self) -> LengthLoader:
        """The batches of this process."""
        examples: Any = self.encoded
        return LengthLoader(
            examples,
            batch_sampler=self.order(),
            collate_fn=partial(collate, pad_token_id=self.pad_token_id),
            generator=torch.Generator(),  # or every epoch would draw from the one that dropout draws from
        )


def taught_alone(
    model: nn.Module,
    data: FinetuningDataModule,
    settings: FinetuningSettings,
    *,
    device: torch.device,
    callbacks: Sequence[Callback] = (),
    compiled: bool = False,
    packed: bool = False,
    **trainer: Any,
) -> None:
    """Teach a model on one device in this process, whatever launcher started it and whatever group it is in.

    Nothing is printed but what the callbacks print.

    Args:
        model: It is left on the CPU or on the device.
        data: The examples.
        settings: How it is taught.
        device: Where.
        callbacks: Of Lightning.
        compiled: Compile the model's backbone, see `heads.AnswerHead.compile`.
        packed: Read batches without padding, see `heads.AnswerHead.pack`.
        trainer: Further arguments of the Trainer, and `ckpt_path` of its `fit`.

    Raises:
        FloatingPointError: If a gradient is not finite.
    """
    kind, index = {"cuda": "gpu"}.get(device.type, device.type), cast("int | None", device.index)
    checkpoint = trainer.pop("ckpt_path", None)
    with _silent():
        alone = L.Trainer(
            **trainer_options(
                accelerator=kind,
                devices=1 if index is None or kind == "cpu" else [index],
                max_epochs=settings.epochs,
                accumulate_grad_batches=settings.accumulate,
                gradient_clip_val=settings.max_norm,
                callbacks=list(callbacks),
                **{"plugins": [LightningEnvironment()]} | trainer,  # srun would want as many devices as it has tasks
            )
        )
        module = FinetuningModule(model.train(), settings)
        if compiled:
            module.head.compile()
        if packed:
            module.head.pack()
        alone.fit(module, data, ckpt_path=checkpoint, weights_only=True)


@contextmanager
def _silent() -> Generator[None]:
    """Lightning's remarks on the machine and on short trainings stay unsaid."""
    names = ("lightning.pytorch", "lightning.fabric")
    levels = [logging.getLogger(name).level for name in names]
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            for pattern in (".*does not have many workers.*", ".*number of training batches.*", ".*LeafSpec.*"):
                warnings.filterwarnings("ignore", message=pattern)
            yield
    finally:
        for name, level in zip(names, levels, strict=True):
            logging.getLogger(name).setLevel(level)
