"""How fast the forgotten returns when a part of it is taught again."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gradsurgery as gs
from lightning_modules.data.examples import evenly_spaced
from lightning_modules.data.tokenization import Encoded, collate
from lightning_modules.evaluation.likelihood import device_of
from lightning_modules.training.callbacks.probe import Probe
from lightning_modules.training.callbacks.scores import mean_probabilities, plain_copy
from lightning_modules.training.heads import AnswerHead, answer_values


def relearn_probe(
    model: nn.Module,
    forget: Sequence[Encoded],
    retain: Sequence[Encoded] = (),
    *,
    pad_token_id: int,
    steps: int = 20,
    every: int = 4,
    lr: float = 1e-5,
    batch_size: int = 8,
    share: float = 0.25,
    seed: int = 0,
) -> dict[str, Any]:
    """Fine-tunes a copy on part of the forget answers, and scores the answers that it was not taught.

    What was only hidden comes back with its neighbours; what is gone does not. The idea is that of Hu et al., "Jogging the memory of
    unlearned LLMs" (2406.13356), and of "Do unlearning methods remove information from language model weights?" (2410.08827), which
    teaches some facts and tests others. The same probe on a model that never saw the forget set is the control that a number needs: the
    taught answers share style and names with the rest, so that some of the rise is learning and not remembering.

    Taught are round(share * n) answers, evenly spread over the n; AdamW without weight decay at a constant learning rate, mean
    cross-entropy of a batch's answer tokens, batches in a shuffled order, dropout off, weights in float32 whatever the model's dtype (an
    update of 1e-5 is lost in bfloat16). The model and the global random state stay as they are.

    Args:
        model: A causal language model; adapters are merged into the copy.
        forget: n >= 2 forget examples.
        retain: Examples to score beside them; none if empty.
        pad_token_id: Of the tokenizer.
        steps: Optimizer steps.
        every: Steps between scores; the start and the end are scored too.
        lr: Learning rate.
        batch_size: Examples a step, and a forward pass of the scores at most 32.
        share: Of the forget answers that is taught.
        seed: Of the order of the batches.

    Returns:
        `{"steps", "lr", "batch_size", "taught", "rest", "points"}`: the number of taught answers and of the rest, and a point for every
        score, `{"step", "taught", "rest"}` and "retain" if given, mean probabilities.

    Raises:
        ValueError: If an argument is outside its domain, or the share leaves nothing to teach or nothing to test.
        RuntimeError: If the weights are sharded.

    Cost: a float32 copy of the model with AdamW's two states and gradients (16 bytes a parameter), and `steps` training steps.
    """
    for name, value in (("steps", steps), ("every", every), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"relearn_probe: expected {name} >= 1, found {value}")
    if not (lr > 0.0 and math.isfinite(lr)):
        raise ValueError(f"relearn_probe: expected a learning rate > 0, found {lr}")
    count = round(share * len(forget))
    if not 0 < count < len(forget):
        raise ValueError(
            f"relearn_probe: expected a share that teaches some of the forget answers and leaves some, found share={share} of {len(forget)}"
        )
    chosen = set(evenly_spaced(range(len(forget)), count, centred=True))
    taught = [forget[index] for index in sorted(chosen)]
    splits = {"taught": taught, "rest": [row for index, row in enumerate(forget) if index not in chosen]}
    splits |= {"retain": list(retain)} if retain else {}

    learner = plain_copy(model).float().requires_grad_(True).eval()
    points = [{"step": 0, **mean_probabilities(learner, splits, pad_token_id=pad_token_id)}]
    head, order, device = AnswerHead(learner), torch.Generator().manual_seed(seed), device_of(learner)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=lr, weight_decay=0.0)
    waiting: list[int] = []
    with torch.enable_grad():
        for step in range(1, steps + 1):
            if len(waiting) < min(batch_size, count):
                waiting += torch.randperm(count, generator=order).tolist()
            rows, waiting = waiting[:batch_size], waiting[batch_size:]
            batch = collate([taught[row] for row in rows], pad_token_id)
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            loss = answer_values(gs.losses.cross_entropy, head.states(batch), batch["labels"])
            gs.losses.token_mean(*loss).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % every == 0 or step == steps:
                points.append({"step": step, **mean_probabilities(learner, splits, pad_token_id=pad_token_id)})
    settings = {"steps": steps, "lr": lr, "batch_size": batch_size}
    return {**settings, "taught": count, "rest": len(forget) - count, "points": points}


class RelearnProbe(Probe):
    """Runs `relearn_probe` on the trained model at the end of training, and on a control if there is one.

    One process does it; the trained model is never touched. Put it after `BestTradeoff`, so that it probes the model that is kept.

    Args:
        forget: Forget examples.
        retain: Retain examples.
        pad_token_id: Of the tokenizer.
        control: Makes a model with the same tokenizer that never saw the forget set, when it is needed; it may return None.
        folder: The run's folder, to write the result as "relearn" of `probes.json` for the report; None writes nothing.
        settings: Further arguments of `relearn_probe`.

    Attributes:
        result: `{"model": ..., "control": ... or None}`, each as `relearn_probe` returns; None before the end.
    """

    name = "relearn"

    def __init__(
        self,
        forget: Sequence[Encoded],
        retain: Sequence[Encoded] = (),
        *,
        pad_token_id: int,
        control: Callable[[], nn.Module | None] | None = None,
        folder: str | Path | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(folder)
        self.forget, self.retain, self.control = forget, retain, control
        self.settings: dict[str, Any] = {"pad_token_id": pad_token_id, **settings}

    def measure(self, model: nn.Module) -> dict[str, Any]:
        """The model and the control, each as `relearn_probe`."""
        found = {"model": relearn_probe(model, self.forget, self.retain, **self.settings), "control": None}
        never_saw = None if self.control is None else self.control()
        if never_saw is not None:
            never_saw = never_saw.to(device_of(model))
            found["control"] = relearn_probe(never_saw, self.forget, self.retain, **self.settings)
        return found
