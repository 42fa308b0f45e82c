"""ULD: training the assistant whose logits are subtracted from the base model's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor, nn

import gradsurgery as gs
from gradsurgery.logit_difference import LogitDifferenceModel, assistant
from lightning_modules.data.pairs import ForgetRetainDataModule
from lightning_modules.data.uld import uld_data
from lightning_modules.evaluation.likelihood import device_of
from lightning_modules.training.adapters import checked_targets, has_adapter
from lightning_modules.training.resuming import ResumableModule
from lightning_modules.training.token_count import mean_token_count
from lightning_modules.training.trainer import trainer_options
from lightning_modules.training.uld_settings import OF_THE_PAPER, ULDSettings
from lightning_modules.training.warmup import with_warmup

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ULDModule(ResumableModule):
    r"""Trains an assistant to remember the forget set and to know nothing about the rest.

    $$\min_\phi \; \mathrm{mean}_{D'_f} \, [-\log p_\phi(y)] +
    \beta \, \mathrm{mean}_{D'_r} \, \mathrm{KL}(\mathrm{uniform} \,\|\, p_\phi)$$

    ULD (Ji et al. 2024, arXiv 2406.08607), equations 3 to 5. The paper's cross-entropy against the uniform distribution
    is this KL and the constant log V. The batch is `{"forget": ..., "retain": ...}`, as `ForgetRetainDataModule` makes
    it of `uld_data`.

    Both means are over answer tokens (label not -100), shifted: the logits of position t are held to token t + 1. With
    `all_positions=True` the uniform term is taken as in the authors' code, over every position of the retain batch,
    prompt and padding included. Means are over the tokens of all processes, so that two processes with half the batch
    each do what one does with all of it.

    The two objectives do not fight over what is to be kept, so there is no surgery: one plain optimizer steps on their
    sum.

    Checkpoints hold the trainable weights only. The frozen ones are the base model's own storage, and loading a
    checkpoint into them would overwrite the base.

    Args:
        assistant: Of `gradsurgery.logit_difference.assistant`, or any causal language model. What requires a gradient
            is trained.
        retain_weight: Beta. Paper: 6.5; the authors' code: 5.
        all_positions: Whether the uniform term counts every position, see above.
        optimizer: Trainable parameters, by name -> optimizer. The default is AdamW as in the paper (appendix B.5): lr
            1e-3 (5e-4 on Harry Potter), betas (0.9, 0.99), weight decay 0.01. The authors' code has the same learning
            rate and weight decay, and Transformers' default betas.
        warmup_steps: Steps over which the learning rate rises linearly. Paper: none is mentioned; the authors' code:
            10 % of training.

    Raises:
        ValueError: If `retain_weight` is negative, or the assistant has nothing to train.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
        >>> base = LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes))
        >>> module = ULDModule(assistant(base, num_layers=1, lora_rank=2))
    """

    def __init__(
        self,
        assistant: nn.Module,
        *,
        retain_weight: float = 6.5,
        all_positions: bool = False,
        optimizer: Callable[[Iterable[tuple[str, nn.Parameter]]], torch.optim.Optimizer] = partial(
            torch.optim.AdamW, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01
        ),
        warmup_steps: int = 0,
    ) -> None:
        if not retain_weight >= 0.0:
            raise ValueError(f"retain_weight: expected a number >= 0, found {retain_weight}")
        if not any(parameter.requires_grad for parameter in assistant.parameters()):
            raise ValueError(
                "expected an assistant with weights that require a gradient, found none: gradsurgery.logit_difference.assistant adds some"
            )
        super().__init__()
        self.assistant = assistant
        self.retain_weight, self.all_positions = retain_weight, all_positions
        self.make_optimizer, self.warmup_steps = optimizer, warmup_steps
        self.strict_loading = False  # the checkpoint holds a part; on_load_checkpoint is as strict about that part

    def training_step(self, batch: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
        """The sum of both objectives."""
        forget, retain = self.forget_loss(batch["forget"]), self.retain_loss(batch["retain"])
        self.log_dict({"loss/forget": forget.detach(), "loss/retain": retain.detach()}, prog_bar=True)
        return forget + self.retain_weight * retain

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Nothing: how probable answers are to the assistant alone says nothing about the unlearned model.

        Without this method, Lightning warns about the validation loaders of `ForgetRetainDataModule`.
        """

    def forget_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean cross-entropy of the answer tokens of D'_f, in nats."""
        logits, labels = gs.losses.answer_tokens(self._logits(batch), batch["labels"])
        return self._mean(gs.losses.cross_entropy(logits, labels))

    def retain_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean KL(uniform || assistant) on D'_r, in nats; 0 if the assistant is indifferent."""
        logits = self._logits(batch)
        if not self.all_positions:
            return self._mean(gs.losses.uniform(gs.losses.answer_tokens(logits, batch["labels"])[0]))
        return self._mean(gs.losses.uniform(logits.flatten(0, 1)))

    def configure_optimizers(self) -> Any:
        """The optimizer, and its warm-up."""
        optimizer = self.make_optimizer([item for item in self.assistant.named_parameters() if item[1].requires_grad])
        return with_warmup(optimizer, self.warmup_steps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen weights out, and add what a resumed run needs."""
        super().on_save_checkpoint(checkpoint)
        trained = self._trained()
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in trained}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another assistant."""
        expected, found = self._trained(), set(checkpoint["state_dict"])
        if expected != found:
            raise ValueError(
                f"expected a checkpoint of an assistant with these {len(expected)} trained tensors, found {len(found)}, "
                f"{len(expected ^ found)} of them in one of the two only: give it the layers and the rank that it was saved with"
            )
        super().on_load_checkpoint(checkpoint)

    def _trained(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}

    def _logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self.assistant(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits

    def _mean(self, losses: Tensor) -> Tensor:
        return losses.sum() / mean_token_count(len(losses), self._trainer, losses.device)


def train_assistant(
    base: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    splits: Mapping[str, Sequence[Mapping[str, Any]]],
    settings: ULDSettings = OF_THE_PAPER,
    *,
    trainer: Mapping[str, Any] | None = None,
    resume: str | Path | None = None,
) -> LogitDifferenceModel:
    """Unlearns by ULD: trains an assistant of the base on the splits, and returns the two as one model.

    The base's weights are not changed, and the assistant shares them. The caller's CPU random numbers are left as they
    were. Source: arXiv 2406.08607.

    Args:
        base: A Transformers causal language model that has learned both sets.
        tokenizer: Of the base.
        splits: `forget` and `retain`; see `uld_data` for the columns that the forget set needs.
        settings: The paper's, unless others are given.
        trainer: Arguments of `lightning.Trainer` that replace those used here: one device, no log, no checkpoint, no
            progress bar.
        resume: A checkpoint of the assistant's training, from which to go on.

    Returns:
        The model, in eval mode, where the base is.

    Raises:
        ValueError: If the data or a setting is not usable.
    """
    data = uld_data(
        splits, perturbed_per_row=settings.perturbed_per_row, require_augmentation=settings.require_augmentation
    )
    batches = ForgetRetainDataModule(
        data["forget"],
        data["retain"],
        tokenizer,
        batch_size=settings.batch_size,
        seed=settings.seed,
        max_length=settings.max_length,
    )
    options = trainer_options(**{"max_epochs": settings.epochs, "devices": 1, **(trainer or {})})
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed)
        targets = checked_targets(base, settings.lora_targets)
        small = assistant(
            base,
            settings.num_layers,
            settings.lora_rank,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
            target_modules=targets,
        )
        if lacking := [] if isinstance(targets, str) else [name for name in targets if not has_adapter(small, name)]:
            raise ValueError(
                f"lora_targets: expected modules of the assistant's {settings.num_layers} layers, found {', '.join(lacking)}, which only "
                "later layers of the base have"
            )
        # Before training: a wrong weight or filter should not cost an hour.
        model = LogitDifferenceModel(base, small, settings.weight, settings.top_logit_filter)
        module = ULDModule(
            small,
            retain_weight=settings.retain_weight,
            all_positions=settings.all_positions,
            optimizer=partial(torch.optim.AdamW, lr=settings.lr, betas=(0.9, 0.99), weight_decay=settings.weight_decay),
            warmup_steps=settings.warmup_steps,
        )
        L.Trainer(**options).fit(module.train(), batches, ckpt_path=resume, weights_only=True)
    # Lightning leaves the assistant on the CPU, in training mode, maybe with copies of the frozen weights.
    small.to(device_of(base)).requires_grad_(False)
    return LogitDifferenceModel(base, model.assistant, settings.weight, settings.top_logit_filter).eval()
