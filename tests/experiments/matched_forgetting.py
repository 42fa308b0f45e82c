"""Retention at equal forgetting, with surgery, without, and with a placebo: configuration S of the real TOFU text.

Run it: pytest -m slow -s tests/experiments/test_matched_forgetting.py

A Llama of 1.7M parameters memorises 8 + 2 authors of TOFU; then every method forgets the last two from the same weights with the same
batches (AdamW, learning rate 3e-4 after 5 steps of warm-up, weight decay 0.01, no clipping). Methods forget at different speeds, so they
are compared where they have forgotten equally much: between the two steps where the mean forget probability passes the target, the
parameters are bisected until it is within 4 % of the target.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import gradsurgery as gs
from lightning_modules.data import TOFUDataModule
from lightning_modules.likelihood import answer_nll
from lightning_modules.scratch import scratch_model
from lightning_modules.tofu import tofu_examples
from lightning_modules.tokenization import padding_id

TARGET = 0.05
EPOCHS = 20
CHECK_EVERY = 2


@dataclass(frozen=True)
class Outcome:
    """Where a method stands when it has forgotten as much as the target says."""

    forget_probability: float
    retain_probability: float
    steps: float
    conflicts: float
    step_conflicts: float


class Matched:
    """The start model, the data, and the comparison."""

    def __init__(self, folder: str, model_seed: int = 0) -> None:
        self.splits = tofu_examples("forget10", folder, num_authors=10)
        examples = [*self.splits["retain"], *self.splits["forget"]]
        everything = [row for rows in tofu_examples("forget10", folder).values() for row in rows]
        texts = [f"Q: {row['question']}\nA: {row['answer']}" for row in everything]
        self.model, self.tokenizer = scratch_model(examples, tokenizer_texts=texts, seed=model_seed)
        self.folder = folder

    def probability(self, model: nn.Module, split: str) -> float:
        data = self.data(0)
        nll = answer_nll(model, getattr(data, split), pad_token_id=padding_id(self.tokenizer), batch_size=64)
        return float(torch.exp(-nll).mean())

    def data(self, seed: int) -> object:
        module = TOFUDataModule("forget10", self.tokenizer, folder=self.folder, num_authors=10, seed=seed)
        module.setup()
        return module.dataset

    def run(self, method: str, forget_loss: gs.losses.TokenLoss, seed: int) -> Outcome:
        """Forget until the target is passed, then go back to where it is met."""
        model = copy.deepcopy(self.model)
        base = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.01)
        optimizer = METHODS[method](base)
        warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 5, total_iters=4)
        module = TOFUDataModule("forget10", self.tokenizer, folder=self.folder, num_authors=10, seed=seed)
        module.setup()
        loader = module.train_dataloader()
        generator = torch.Generator().manual_seed(seed)
        before, step, conflicts, step_conflicts = _weights(model), 0, 0, 0
        for epoch in range(EPOCHS):
            loader.sampler.set_epoch(epoch)
            for batch in loader:
                skip = int(forget_loss is gs.losses.ceu)
                with optimizer.objective("retain"):
                    _loss(model, batch["retain"], gs.losses.cross_entropy, 0).backward()
                with optimizer.objective("forget"):
                    _loss(model, batch["forget"], forget_loss, skip).backward()
                record = optimizer.combine()
                if method == "placebo":
                    _push(model, record, generator)
                optimizer.step()
                optimizer.zero_grad()
                warmup.step()
                step += 1
                conflicts += record.conflict
                made, left = optimizer.record.unguarded_change, optimizer.record.actual_change
                step_conflicts += bool(left[0] > 1e-6 * made[0].abs())
                if step % CHECK_EVERY:
                    continue
                if self.probability(model, "forget") < TARGET:
                    share = self._bisect(model, before)
                    return Outcome(
                        self.probability(model, "forget"),
                        self.probability(model, "retain"),
                        step - CHECK_EVERY * (1 - share),
                        conflicts / step,
                        step_conflicts / step,
                    )
                before = _weights(model)
        raise RuntimeError(f"{method} did not reach forget probability {TARGET} in {EPOCHS} epochs")

    def _bisect(self, model: nn.Module, before: Sequence[Tensor]) -> float:
        """Set the model to the mix of `before` and itself that meets the target; returns its own share."""
        after, low, high = _weights(model), 0.0, 1.0
        for _ in range(20):
            share = (low + high) / 2
            with torch.no_grad():
                for parameter, old, new in zip(model.parameters(), before, after, strict=True):
                    parameter.copy_(torch.lerp(old, new, share))
            probability = self.probability(model, "forget")
            if abs(probability - TARGET) < 0.04 * TARGET:
                return share
            low, high = (share, high) if probability > TARGET else (low, share)
        raise RuntimeError("bisection did not meet the target: the forget probability jumps between two steps")


def _loss(model: nn.Module, batch: dict[str, Tensor], function: gs.losses.TokenLoss, skip_first: int) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    tokens = gs.losses.answer_tokens(logits, batch["labels"], skip_first=skip_first)
    return gs.losses.token_mean(function(*tokens), tokens[1])


def _weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def _push(model: nn.Module, record: gs.Record, generator: torch.Generator) -> None:
    """What GRU would have added, as long as it, in a direction that means nothing."""
    gram = record.gram
    length = (-gram[0, 1]).clamp_min(0.0) / gram[1, 1].sqrt()
    parameters = list(model.parameters())
    noise = [torch.randn(parameter.shape, generator=generator) for parameter in parameters]
    norm = torch.stack([row.square().sum() for row in noise]).sum().sqrt()
    for parameter, row in zip(parameters, noise, strict=True):
        parameter.grad.add_(row, alpha=float(length / norm))


# guard="measure" everywhere: it changes nothing and counts the steps that raise the retain loss to first order.
_alone = partial(gs.GradientSurgery, rule=partial(gs.rules.gradient_difference, alpha=0.0), guard="measure")
METHODS: dict[str, Callable[[torch.optim.Optimizer], gs.GradientSurgery]] = {
    "alone": _alone,
    "placebo": partial(_alone, ema_decay=0.2),
    "GRU": partial(gs.GRU, guard="measure"),
    "GRU + guard": partial(gs.GRU, guard="update"),
    "GradDiff, weight 5": partial(
        gs.GradientSurgery, rule=partial(gs.rules.gradient_difference, alpha=5.0), guard="measure"
    ),
}
