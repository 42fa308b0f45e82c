"""Forgetting one request while earlier ones stay forgotten: each a protected objective beside retention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import gradsurgery as gs
from lightning_modules.training.module import UnlearningModule
from lightning_modules.training.objectives import Batches, Context, Objective, objective
from lightning_modules.training.soundness import check_retained

Sketch = Mapping[str, Tensor]
"""The gradient of a request by the name of each weight, as dense tensors."""


class ProtectingModule(UnlearningModule):
    r"""An `UnlearningModule` whose step, to first order, lets no earlier request be remembered.

    Of an earlier request whose text is there, the protected loss is CE-U's, which is low as long as its answers are
    forgotten:

    $$L = \frac{1}{n} \sum_{\text{answer tokens}} -\log(1 - p_y)$$

    It falls or stays in a step whose update has no negative product with its gradient, which the rules of
    `gradsurgery.rules` see to for all protected rows at once. Of a request of which a sketch is left, the row is that
    sketch: the gradient of the same loss where the request had just been forgotten.

    Args:
        arguments: Of `UnlearningModule`, the model.
        texts: Names of the protected rows that have a batch, see `lightning_modules.data.earlier`.
        sketches: Name of a protected row -> the sketches that take turns in it, one a step.
        weight: Multiple of each of these rows' gradients to add after the rule.
        surgery: Base optimizer -> `GradientSurgery`; it is told the objectives.
        options: Of `UnlearningModule`.

    Raises:
        ValueError: If a sketch is of other weights than those that are trained, or `retain_loss` is None.

    Cost: a backward pass and a row for each protected row with a text, a row for each with sketches, and with a moving
    average as many averages.
    """

    def __init__(
        self,
        *arguments: Any,
        texts: Sequence[str] = (),
        sketches: Mapping[str, Sequence[Sketch]] | None = None,
        weight: float = 0.0,
        surgery: Any,
        **options: Any,
    ) -> None:
        check_retained(**options)
        kept = {} if sketches is None else dict(sketches)
        names = (*texts, *kept)
        surgery = partial(surgery, objectives=("forget", "retain", *names))
        if weight:
            added = dict(surgery.keywords.get("add") or {})
            surgery = partial(surgery, add=added | dict.fromkeys(names, weight))
        super().__init__(*arguments, surgery=surgery, **options)
        self.objectives |= {name: objective(gs.losses.ceu) for name in texts}
        self.objectives |= {name: self._along(found) for name, found in kept.items()}
        self._sketched = tuple(kept)
        for name, found in kept.items():
            for sketch in found:
                self._check(name, sketch)

    def training_step(self, batch: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
        """As `UnlearningModule`'s, with the earlier requests."""
        return super().training_step({**batch, **dict.fromkeys(self._sketched, batch["retain"])})

    def _along(self, sketches: Sequence[Sketch]) -> Objective:
        """A loss that is linear in the weights, so that its gradient is a sketch."""

        def loss(context: Context, batches: Batches, name: str) -> Tensor:  # noqa: ARG001 (an objective's arguments)
            sketch = sketches[self._trainer.global_step % len(sketches) if self._trainer is not None else 0]
            parts = [
                (weight * sketch[key].to(weight)).sum()
                for key, weight in self.model.named_parameters()
                if weight.requires_grad
            ]
            return torch.stack([part.float() for part in parts]).sum()

        return loss

    def _check(self, name: str, sketch: Sketch) -> None:
        trained = {key: list(w.shape) for key, w in self.model.named_parameters() if w.requires_grad}
        there = {key: list(tensor.shape) for key, tensor in sketch.items()}
        if trained != there:
            odd = sorted(key for key in {*trained, *there} if trained.get(key) != there.get(key))
            raise ValueError(
                f"{name}: expected a sketch of the weights that are trained, found another at {', '.join(odd[:3])}"
                f"{' and more' * (len(odd) > 3)}; train all weights of the same model, as the request's own run did"
            )
