"""The oracle of the optimizer: a plain loop on flattened float64 vectors, as the papers write it.

Each loss takes one call of `torch.autograd.grad`. The moving average follows its definition, m <- d m + (1 - d) r and
m / (1 - d^t). GRU with one protected row is its closed form; with several it is solved as its dual, a non-negative
least-squares problem. The base optimizer is a plain one of torch.optim. Nothing here is taken from the code under test.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from scipy import optimize
from torch import Tensor, nn


@dataclass(frozen=True)
class Step:
    """What the oracle did in one step.

    Attributes:
        gram: Inner products of the rows that the rule saw, ``[S, K, K]``.
        update: The gradient that the base stepped with, flattened.
        rows: The rows that the rule saw, flattened, ``[K, n]``.
        change: The parameter change after the guard, flattened.
        made: The parameter change by the base optimizer, before the guard, flattened.
    """

    gram: Tensor
    update: Tensor
    rows: Tensor
    change: Tensor
    made: Tensor

    @property
    def conflict(self) -> bool:
        return bool((self.gram[:, 0, 1:] < 0.0).any())


@dataclass
class Surgery:
    """A model, a plain optimizer, and the options of surgery.

    Attributes:
        objectives: The first is rectified.
        rule: GRU's projection, or the plain sum.
        ema_decay: By objective.
        add: By objective.
        max_norm: Of the update.
        block: Parameter name -> a key. Parameters with the same key share one Gram matrix.
        preconditioner: (base, parameter) -> diagonal weights of the inner product, or None for 1.
        guard: Whether to project the parameter change.
    """

    model: nn.Module
    base: torch.optim.Optimizer
    objectives: Sequence[str]
    rule: Literal["gru", "sum"] = "gru"
    ema_decay: Mapping[str, float] = field(default_factory=dict)
    add: Mapping[str, float] = field(default_factory=dict)
    max_norm: float | None = None
    block: Callable[[str], Hashable] = lambda name: "all"
    preconditioner: Callable[[torch.optim.Optimizer, Tensor], Tensor | None] = lambda base, parameter: None
    guard: bool = False
    averages: dict[str, Tensor] = field(default_factory=dict)
    steps: Tensor | float = 0.0  # by coordinate: only steps that reached it count

    def step(self, micro_batches: Sequence[Mapping[str, Tensor]]) -> Step:
        """One step, on the mean of each objective's loss over the micro-batches."""
        named = list(self.model.named_parameters())
        parameters = [parameter for _, parameter in named]
        rows, reached = [], [False] * len(parameters)
        for name in self.objectives:
            total = torch.zeros(sum(parameter.numel() for parameter in parameters), dtype=torch.float64)
            for losses in micro_batches:
                found = gradient(losses[name] / len(micro_batches), parameters)
                reached = [there or part is not None for there, part in zip(reached, found, strict=True)]
                total += flat(found, parameters)
            rows.append(total)
        mask = flat(
            [torch.full_like(p, float(there)) for p, there in zip(parameters, reached, strict=True)], parameters
        )
        protected = list(rows)
        averages = dict(self.averages)
        for k, name in enumerate(self.objectives):
            if (decay := self.ema_decay.get(name)) is not None:
                old = self.averages.get(name, torch.zeros_like(rows[k]))
                averages[name] = torch.where(mask > 0, decay * old + (1.0 - decay) * rows[k], old)
                protected[k] = mask * averages[name] / (1.0 - decay ** (self.steps + 1.0))
        weights = flat(
            [torch.ones_like(p) if (w := self.preconditioner(self.base, p)) is None else w for p in parameters],
            parameters,
        )
        keys = [self.block(name) for name, parameter in named for _ in range(parameter.numel())]
        blocks = [torch.tensor([key == wanted for key in keys], dtype=torch.float64) for wanted in dict.fromkeys(keys)]
        stacked = torch.stack(protected)
        gram = torch.stack([(stacked * inside * weights) @ stacked.T for inside in blocks])
        if self.rule == "sum":
            update = stacked.sum(0)
        else:
            update = sum((rectified(stacked[0] * b, stacked[1:] * b, weights) for b in blocks), torch.zeros_like(mask))
        for name, multiple in self.add.items():
            update = update + multiple * rows[list(self.objectives).index(name)]
        if self.max_norm is not None:
            update = update * min(1.0, self.max_norm / (float(update.norm()) + 1e-6))
        offset = 0
        for parameter, there in zip(parameters, reached, strict=True):
            part = update[offset : offset + parameter.numel()].view_as(parameter).to(parameter)
            parameter.grad = part if there else None
            offset += parameter.numel()
        before = flat([parameter.detach() for parameter in parameters], parameters)
        self.base.step()
        made = change = flat([parameter.detach() for parameter in parameters], parameters) - before
        if self.guard:
            change = sum(
                (-rectified(-made * b, stacked[1:] * b, torch.ones_like(b)) for b in blocks), torch.zeros_like(mask)
            )
            offset = 0
            for parameter in parameters:
                part = (before + change)[offset : offset + parameter.numel()]
                parameter.data.copy_(part.view_as(parameter))
                offset += parameter.numel()
        self.base.zero_grad()
        self.averages, self.steps = averages, self.steps + mask
        return Step(gram, update, stacked, change, made)


def gradient(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradient by parameter, None where the loss does not depend on it; the graph is kept."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    found = iter(torch.autograd.grad(loss, trained, allow_unused=True, retain_graph=True))
    return [next(found) if parameter.requires_grad else None for parameter in parameters]


def flat(parts: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Tensor:
    """One float64 vector, 0 where a part is None."""
    return torch.cat(
        [
            torch.zeros(parameter.numel(), dtype=torch.float64) if part is None else part.detach().double().flatten()
            for part, parameter in zip(parts, parameters, strict=True)
        ]
    )


def rectified(forget: Tensor, protected: Tensor, weights: Tensor) -> Tensor:
    """The point nearest to ``forget`` that conflicts with no row of ``protected [m, n]``, in the inner product with ``weights``."""
    if len(protected) == 1:
        product = float((forget * weights * protected[0]).sum())
        if product >= 0.0:
            return forget
        return forget - product / float((protected[0] * weights * protected[0]).sum()) * protected[0]
    root = weights.sqrt()
    lengths = (protected * root).norm(dim=1)
    directions = (protected / torch.where(lengths == 0.0, 1.0, lengths)[:, None]).numpy()
    size = float((forget * root).norm())
    if size == 0.0:
        return forget
    multipliers, _ = optimize.nnls((directions * root.numpy()).T, -(forget * root).numpy() / size)
    return forget + torch.from_numpy(np.asarray(multipliers * size) @ directions)


def preconditioner(base: torch.optim.Optimizer, parameter: Tensor) -> Tensor | None:
    """What the base multiplies the gradient by, from the pseudo-code in torch's documentation; None before its first step."""
    state = base.state.get(parameter, {})
    if not state or int(state["step"]) == 0:
        return None
    group = next(group for group in base.param_groups if any(p is parameter for p in group["params"]))
    match type(base).__name__:
        case "Adam" | "AdamW":
            return 1.0 / ((state["exp_avg_sq"] / (1.0 - group["betas"][1] ** int(state["step"]))).sqrt() + group["eps"])
        case "Adamax":
            return 1.0 / state["exp_inf"]
        case "RMSprop":
            return 1.0 / (state["square_avg"].sqrt() + group["eps"])
        case "Adagrad":
            return 1.0 / (state["sum"].sqrt() + group["eps"])
        case other:
            raise NotImplementedError(other)
