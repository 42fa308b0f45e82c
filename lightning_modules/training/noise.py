"""Retention where nobody wrote a text: the outputs on noised retain examples stay those of the start model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_modules.training.heads import Batch


@dataclass(frozen=True)
class NoiseSettings:
    r"""Hold the model's outputs on noised retain examples, `UnlearningModule(noise=...)`.

    A retain loss holds the answers that it is trained on, and those alone: a deep forgetting that leaves them at .99
    can take a fifth of all others. On a memorised answer the start model is certain, so that there is little to learn
    from it. On a text in which some words are wrong it is not, and what it then thinks possible tells much more about
    what it knows. With the start model's distribution $q$ and the model's $p$ this adds

    $$w \, \mathrm{KL}(q \,\|\, p) = w \sum_v q_v \log(q_v / p_v)$$

    to the retain loss, as a mean over the answer tokens of the noised examples. No further data are needed.

    Attributes:
        weight: Multiple $w$ of the divergence.
        share: Of the tokens that are replaced, each by a token from anywhere in the batch.

    Raises:
        ValueError: If the weight is not a positive number, or the share not above 0 and below 1.

    Cost: a further forward and backward pass of the size of the retain batch, and a forward pass of the start model.

    Source: our own; neither GRU's nor CE-U's paper has it.

    Example:
        >>> settings = NoiseSettings(weight=0.1)
        >>> settings.share
        0.3
    """

    weight: float
    share: float = 0.3

    def __post_init__(self) -> None:
        if not 0.0 < self.weight < math.inf:
            raise ValueError(f"noise, weight: expected a number > 0, found {self.weight}")
        if not 0.0 < self.share < 1.0:
            raise ValueError(f"noise, share: expected a number above 0 and below 1, found {self.share}")


def noised(batch: Batch, share: float) -> dict[str, Tensor]:
    """A batch in which a share of the tokens is replaced; labels and attention stay as they are.

    Args:
        batch: `input_ids`, `attention_mask` and `labels`, `[B, T]`; padding is left alone, and never a replacement.
        share: The probability that a token is replaced. Which are, and by which, torch's generator of the CPU draws.

    Returns:
        `input_ids`, `attention_mask` and `labels`, `[B, T]`.

    Example:
        >>> batch = {"input_ids": torch.tensor([[1, 2, 3, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
        >>> batch["labels"] = torch.tensor([[-100, 2, 3, -100]])
        >>> mixed = noised(batch, 0.5)["input_ids"]
        >>> set(mixed[0, :3].tolist()) <= {1, 2, 3}, int(mixed[0, 3])
        (True, 0)
    """
    ids, real = batch["input_ids"], batch["attention_mask"].bool()
    known = ids[real]
    # On the CPU, whose generator a resumed run finds as it was, and which is the same beside every device.
    replaced = torch.rand(ids.shape).to(ids.device) < share
    drawn = torch.randint(len(known), ids.shape).to(ids.device)
    mixed = torch.where(replaced & real, known[drawn], ids)
    return {"input_ids": mixed, "attention_mask": batch["attention_mask"], "labels": batch["labels"]}
