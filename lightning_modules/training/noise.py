"""Retention where nobody wrote a text: the outputs on noised retain examples stay those of the start model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_modules.evaluation.processes import every_process
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
    Several processes tell each other the tokens of their batches.

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


def noised(batch: Batch, share: float, replicas: Mapping[str, int] | None = None) -> dict[str, Tensor]:
    """A batch in which a share of the tokens is replaced; labels and attention stay as they are.

    Processes with parts of one batch replace what one process would that has all of it, as long as their generators are
    in the same state: `seed_everything` directly before `Trainer.fit`, and no dropout on a CPU.

    Args:
        batch: `input_ids`, `attention_mask` and `labels`, `[B, T]`; padding is left alone, and never a replacement.
        share: The probability that a token is replaced. Which are, and by which, torch's generator of the CPU draws.
        replicas: `num_replicas`, the number W of parts, and `rank`: which of them this is, with the rows rank, rank + W
            and so on, as in `PairSampler`. Every process of the group calls this. None for a whole batch.

    Returns:
        `input_ids`, `attention_mask` and `labels`, `[B, T]`.

    Example:
        >>> batch = {"input_ids": torch.tensor([[1, 2, 3, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
        >>> batch["labels"] = torch.tensor([[-100, 2, 3, -100]])
        >>> mixed = noised(batch, 0.5)["input_ids"]
        >>> set(mixed[0, :3].tolist()) <= {1, 2, 3}, int(mixed[0, 3])
        (True, 0)
    """
    ids, mask = batch["input_ids"], batch["attention_mask"]
    if replicas is None or replicas["num_replicas"] == 1:
        mixed = _mixed(ids, mask.bool(), share)
    else:
        rank, (rows, length) = replicas["rank"], ids.shape
        whole = _mixed(*_together(ids, mask, rank), share)
        mixed = whole[rank :: replicas["num_replicas"]][:rows, :length].to(ids.device)
    return {"input_ids": mixed, "attention_mask": mask, "labels": batch["labels"]}


def _mixed(ids: Tensor, real: Tensor, share: float) -> Tensor:
    known = ids[real]
    # On the CPU, whose generator a resumed run finds as it was, and which is the same beside every device.
    replaced = torch.rand(ids.shape).to(ids.device) < share
    drawn = torch.randint(len(known), ids.shape).to(ids.device)
    return torch.where(replaced & real, known[drawn], ids)


def _together(ids: Tensor, mask: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The tokens of all parts of a batch, and which of them are real, on the CPU; the parts take turns at the rows."""
    # By part and not by process: under tensor parallelism several processes have the same one.
    parts = dict(every_process(lambda: (rank, torch.stack([ids.cpu(), mask.to(ids).cpu()]))))
    rows, length = (max(part.shape[axis] for part in parts.values()) for axis in (1, 2))
    equal = [
        pad(parts[rank], (0, length - parts[rank].shape[2], 0, rows - parts[rank].shape[1])) for rank in sorted(parts)
    ]
    whole, real = torch.stack(equal, 2).flatten(1, 2)
    return whole, real.bool()
