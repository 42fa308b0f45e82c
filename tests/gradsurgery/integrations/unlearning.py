"""A tiny Llama, examples with very different numbers of answer tokens, and Trainer with the mixin."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import gradsurgery as gs
from gradsurgery.integrations.transformers import SurgeryTrainerMixin
from tests.problems import TWO, values
from tests.reference import training

VOCABULARY, LENGTH, BATCHES = 17, 8, 5  # batches in an epoch; odd, so that the last window of an epoch is a short one
DECAY, CLIP = 0.7, 0.5


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
    )
    return transformers.LlamaForCausalLM(config)


def example(name: str, index: int) -> dict[str, list[int]]:
    """1 to 7 answer tokens."""
    generator = torch.Generator().manual_seed(1000 * TWO.index(name) + index)
    tokens = torch.randint(0, VOCABULARY, (LENGTH,), generator=generator)
    prompt = int(torch.randint(1, LENGTH, (), generator=generator))
    return {"input_ids": tokens.tolist(), "labels": [-100] * prompt + tokens[prompt:].tolist()}


def examples(number: int = BATCHES) -> dict[str, list[dict[str, list[int]]]]:
    return {name: [example(name, index) for index in range(number)] for name in TWO}


class Unlearn(SurgeryTrainerMixin, transformers.Trainer):
    """As a user writes it."""


class InOrder(Unlearn):
    """The examples in order, so that an oracle can follow."""

    def _get_train_sampler(self, *arguments: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    # Momentum and not Adam, which would hide a gradient of the wrong length.
    return torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)


def surgery(base: torch.optim.Optimizer) -> gs.GradientSurgery:
    return gs.GradientSurgery(base, ema_decay=DECAY)


def arguments(folder: Path, **options: Any) -> transformers.TrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 1,
        "num_train_epochs": 2,
        "max_grad_norm": CLIP,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "use_cpu": True,
        "log_level": "error",
    }
    return transformers.TrainingArguments(**(defaults | options))


def trainer(
    folder: Path,
    model: nn.Module,
    *,
    kind: type[Unlearn] = InOrder,
    accumulate: int = 1,
    data: Any = None,
    **options: Any,
) -> Unlearn:
    """A trainer of that kind; what is no option of Trainer's own constructor goes to its arguments."""
    own = {
        name: options.pop(name)
        for name in ("losses", "eval_dataset", "callbacks", "data_collator", "surgery", "optimizers")
        if name in options
    }
    return kind(
        model,
        arguments(folder, gradient_accumulation_steps=accumulate, **options),
        train_dataset=examples() if data is None else data,
        **{"surgery": surgery, "optimizers": (sgd(model), None), **own},
    )


def oracle(windows: Sequence[Sequence[int]], *, by_token: bool = True) -> Tensor:
    """The parameters after one step for each window of batches.

    Args:
        windows: Numbers of the examples of each step.
        by_token: The loss of a step is the mean over all its tokens; otherwise the mean over its batches' means.
    """
    model = llama()
    reference = training.Surgery(model, sgd(model), TWO, ema_decay={"retain": DECAY}, max_norm=CLIP)
    for window in windows:
        found = [{name: token_losses(model, name, index) for name in TWO} for index in window]
        if by_token:
            totals = {name: torch.cat([entry[name] for entry in found]).mean() for name in TWO}
            reference.step([totals])
        else:
            reference.step([{name: entry[name].mean() for name in TWO} for entry in found])
    return values(model)


def token_losses(model: Any, name: str, index: int) -> Tensor:
    """CE-U of the answer tokens to forget, as its paper's unlikelihood; the cross-entropy of those to keep."""
    row = example(name, index)
    tokens, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
    logits = model(input_ids=tokens).logits[0, :-1]
    answer = labels[1:] != -100
    likelihood = logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0][answer]
    return -(1.0 - likelihood.exp()).log() if name == "forget" else -likelihood


def windows(accumulate: int, epochs: int = 2) -> list[list[int]]:
    """Trainer starts a new window with every epoch."""
    starts = range(0, BATCHES, accumulate)
    return [list(range(start, min(start + accumulate, BATCHES))) for _ in range(epochs) for start in starts]
