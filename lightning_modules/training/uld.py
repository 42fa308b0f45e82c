"""ULD: training the assistant whose logits are subtracted, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor, nn

import gradsurgery as gs
from gradsurgery.logit_difference import LogitDifferenceModel, assistant
from lightning_modules.data.pairs import ForgetRetainDataModule
from lightning_modules.data.uld import uld_data
from lightning_modules.evaluation.likelihood import device_of
from lightning_modules.training.trainer import trainer_options

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ULDModule", "train_assistant", "uld_data"]


class ULDModule(L.LightningModule):
    r"""Trains an assistant to remember the forget set and to know nothing about the rest.

    .. math:: \min_\phi \; \mathrm{mean}_{D'_f} \, [-\log p_\phi(y)]
              + \beta \, \mathrm{mean}_{D'_r} \, \mathrm{KL}(\mathrm{uniform} \,\|\, p_\phi)

    ULD (Ji et al. 2024, arXiv 2406.08607), equations 3 to 5; the paper's cross-entropy against the uniform distribution is this KL and
    the constant log V. The batch is `{"forget": ..., "retain": ...}` (`ForgetRetainDataModule` of `uld_data`).

    Masks: both means are over answer tokens (label not -100), shifted: position t is held to token t + 1. `all_positions=True` takes the
    uniform term as the authors' code does, over every position of the retain batch, prompt and padding included. Means are over the
    tokens of all processes, so that two processes with half the batch each do what one does with all of it.

    The objectives do not fight over what is to be kept, so there is no surgery: one plain optimizer on their sum.

    Checkpoints hold the trainable weights only. The frozen ones are the base model's own storage, and loading a checkpoint into them
    would overwrite the base.

    Args:
        assistant: of `gradsurgery.logit_difference.assistant`, or any causal language model; what requires a gradient is trained.
        retain_weight: beta. Paper: 6.5; the authors' code: 5.
        all_positions: where the uniform term counts, see above.
        optimizer: trainable parameters, by name -> optimizer. By default AdamW as in the paper (appendix B.5): lr 1e-3 (5e-4 on Harry
            Potter), betas (0.9, 0.99), weight decay 0.01. The authors' code has the same, and Transformers' default betas.
        warmup_steps: steps over which the learning rate rises linearly. Paper: none is mentioned; the authors' code: 10 % of training.

    Raises:
        ValueError: If `retain_weight` is negative, or the assistant has nothing to train.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
        >>> module = ULDModule(assistant(LlamaForCausalLM(config), num_layers=1, lora_rank=2))
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
        if not self.warmup_steps:
            return optimizer
        warmup = torch.optim.lr_scheduler.LinearLR(
            optimizer, 1.0 / self.warmup_steps, total_iters=self.warmup_steps - 1
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warmup, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves the frozen weights out."""
        trained = self._trained()
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in trained}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another assistant."""
        expected, found = self._trained(), set(checkpoint["state_dict"])
        if expected != found:
            raise ValueError(
                f"expected a checkpoint of an assistant with these {len(expected)} trained tensors, found {len(found)}, "
                f"{len(expected ^ found)} of them in one of the two only: give it the layers and the rank that it was saved with"
            )

    def _trained(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}

    def _logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self.assistant(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits

    def _mean(self, losses: Tensor) -> Tensor:
        world = 1 if self._trainer is None else self.trainer.world_size
        count = torch.tensor(float(len(losses)), device=losses.device)
        if world > 1:
            # DDP averages over processes, whatever each of them counted: divide by the mean count.
            count = self.trainer.strategy.reduce(count, reduce_op="mean")
        return losses.sum() / count.clamp_min(1.0 / world)


def train_assistant(
    base: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    splits: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    num_layers: int = 8,
    lora_rank: int = 32,
    lora_alpha: float = 32.0,
    retain_weight: float = 6.5,
    weight: float = 0.75,
    top_logit_filter: float = 0.01,
    lr: float = 1e-3,
    weight_decay: float = 0.01,
    warmup_steps: int = 0,
    epochs: int = 10,
    batch_size: int = 32,
    max_length: int | None = None,
    perturbed_per_row: int = 2,
    require_augmentation: bool = True,
    all_positions: bool = False,
    seed: int = 0,
    trainer: Mapping[str, Any] | None = None,
) -> LogitDifferenceModel:
    """Unlearns by ULD: trains an assistant of the base on the splits, and returns the two as one model.

    The defaults are the paper's for TOFU (arXiv 2406.08607, section 3.2 and appendix B.5); the docstrings of `ULDModule`,
    `gradsurgery.logit_difference.assistant` and `logit_difference` name what the authors' code has instead. The base's weights are not
    changed, and the assistant shares them. The caller's CPU random numbers are left as they were.

    Args:
        base: a Transformers causal language model that learned both sets.
        tokenizer: of the base.
        splits: `forget` and `retain`; see `uld_data` for the columns that the forget set needs.
        num_layers: K, of the assistant.
        lora_rank: of its adapter.
        lora_alpha: of its adapter.
        retain_weight: beta of `ULDModule`.
        weight: of the subtraction.
        top_logit_filter: rate of the filter.
        lr: AdamW's learning rate.
        weight_decay: AdamW's.
        warmup_steps: over which it rises.
        epochs: passes over D'_f.
        batch_size: of D'_f and of D'_r, a step and process.
        max_length: longer examples lose their end.
        perturbed_per_row: of `uld_data`.
        require_augmentation: of `uld_data`.
        all_positions: of `ULDModule`.
        seed: of the adapter's first weights and the order of the data.
        trainer: arguments of `lightning.Trainer` that replace those used here: one device, no log, no checkpoint, no progress bar.

    Returns:
        The model, in eval mode, where the base is.

    Raises:
        ValueError: If the data or a setting is not usable.
    """
    data = uld_data(splits, perturbed_per_row=perturbed_per_row, require_augmentation=require_augmentation)
    batches = ForgetRetainDataModule(
        data["forget"], data["retain"], tokenizer, batch_size=batch_size, seed=seed, max_length=max_length
    )
    options = trainer_options(**{"max_epochs": epochs, "devices": 1, **(trainer or {})})
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        small = assistant(base, num_layers, lora_rank, lora_alpha=lora_alpha)
        # Before training: a wrong weight or filter should not cost an hour.
        model = LogitDifferenceModel(base, small, weight, top_logit_filter)
        make_optimizer = partial(torch.optim.AdamW, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay)
        module = ULDModule(
            small,
            retain_weight=retain_weight,
            all_positions=all_positions,
            optimizer=make_optimizer,
            warmup_steps=warmup_steps,
        )
        L.Trainer(**options).fit(module.train(), batches)
    # Lightning leaves it on the CPU, in training mode, maybe with copies of the frozen weights.
    small.to(device_of(base)).requires_grad_(False)
    return LogitDifferenceModel(base, model.assistant, weight, top_logit_filter).eval()
