"""DualOptimizer: objectives take turns at stepping one optimizer, each with a state of its own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradsurgery.optimizer.wrapper import Wrapper

_STATE = "gradsurgery_state_"
_STEPS = "gradsurgery_turns_taken"


class DualOptimizer(Wrapper):
    r"""Let objectives take turns at stepping, each with its own moments in the base optimizer.

    When an optimizer steps with forget and retain gradients in turn, its momentum and second moments are a mixture of
    both. Here the state changes with the turn, so that each objective has its own. With Adam, in a turn of objective k,

    $$m_k \leftarrow \beta_1 m_k + (1 - \beta_1) g_k, \qquad v_k \leftarrow \beta_2 v_k + (1 - \beta_2) g_k^2,$$

    $$\theta \leftarrow \theta - \rho_k\,\mathrm{lr}\,\hat m_k / (\sqrt{\hat v_k} + \epsilon),$$

    bias-corrected by the number of k's own turns. `turn` says whose gradient the next step wants:

        loss = losses[optimizer.turn](model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    Gradients are never combined. This is an alternative to `gradsurgery.GradientSurgery`, which refuses it as a base.
    It is a `torch.optim.Optimizer` with the base's parameter groups: schedulers, clipping and GradScaler work on it (a
    step that a GradScaler skips does not end the turn).

    Source: DualOptim (2504.15827). From the abstract: an adaptive learning rate, and momentum decoupled between
    forgetting and retaining. From the authors' code for language models: both moments decoupled, one AdamW
    configuration with a learning-rate ratio, turns of fixed length, gradients of one objective at a time. Ours: any
    base, any number of objectives, any order of turns. Their image experiments forget with Adam and retain with SGD:
    that is two optimizers and needs no wrapper.

    Args:
        base: Any constructed optimizer whose step needs no closure.
        turns: Objectives in the order of their turns, repeated for longer ones: ("forget", "retain", "retain").
        lr_ratio: Multiple of the base's learning rate in an objective's turns, by name; 1 for names left out.

    Raises:
        TypeError: If ``base`` is not a constructed optimizer, or needs a closure (LBFGS).
        ValueError: If there is no turn, or a ratio is negative, NaN, or of an objective that has no turn.

    Cost: one more copy of the base's state for every further objective; no copies of gradients.
    `torch.distributed.checkpoint` is not supported: it creates an optimizer's state by one step, which here creates the
    state of only one objective.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = DualOptimizer(torch.optim.SGD([weight], lr=0.1, momentum=0.9))
        >>> for loss in (-weight.sum(), 2.0 * weight.sum(), -weight.sum()):
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        >>> weight.data, optimizer.turn  # + 0.1, - 0.2, + 0.19: the retain step left no momentum to the forget step
        (tensor([1.0900]), 'retain')
    """

    def __init__(
        self,
        base: torch.optim.Optimizer,
        turns: Sequence[str] = ("forget", "retain"),
        *,
        lr_ratio: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(base)
        if isinstance(turns, str) or not turns:
            raise ValueError(f"turns: expected names of objectives in the order of their turns, found {turns!r}")
        self.turns = tuple(turns)
        self.lr_ratio = dict(lr_ratio or {})
        if bad := {name: ratio for name, ratio in self.lr_ratio.items() if name not in turns or not ratio >= 0.0}:
            raise ValueError(f"lr_ratio: expected numbers >= 0 for objectives of {sorted(set(turns))}, found {bad}")
        # Adagrad has a state from its construction on, and each objective starts from a copy of it.
        self._states: dict[str, Any] = {name: _copied(base.state) for name in dict.fromkeys(turns)}
        self._progress = {"steps": 0}  # changed in place, as Lightning calls methods on a proxy

    @property
    def turn(self) -> str:
        """The objective whose gradient the next step expects in ``.grad``."""
        return self.turns[self._progress["steps"] % len(self.turns)]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step the base with the state of the objective whose turn it is, and pass the turn on.

        Args:
            closure: Called once, with gradients enabled, before anything else.

        Returns:
            The closure's value, or None.
        """
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        ratio = self.lr_ratio.get(self.turn, 1.0)
        rates = [group["lr"] for group in self.param_groups] if ratio != 1.0 else []
        self._base.state = self._states[self.turn]
        try:
            for group, rate in zip(self.param_groups, rates, strict=False):
                group["lr"] = rate * ratio
            self._step_base()
        finally:
            for group, rate in zip(self.param_groups, rates, strict=False):
                group["lr"] = rate
        self._progress["steps"] += 1
        return value

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear ``.grad``."""
        self._base.zero_grad(set_to_none)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._base!r}, turns={self.turns}, lr_ratio={self.lr_ratio})"

    def state_dict(self) -> dict[str, Any]:
        """The base's state_dict, where each parameter's state has the entries of every objective, by longer names."""
        return self._save_between_hooks(self._saved)

    def _saved(self) -> dict[str, Any]:
        merged: dict[Any, dict[str, Any]] = {}
        state_dict: dict[str, Any] = {}
        for name, state in self._states.items():
            self._base.state = state
            state_dict = self._base.state_dict()
            for index, entries in state_dict["state"].items():
                merged.setdefault(index, {}).update({f"{_STATE}{name}_{key}": value for key, value in entries.items()})
        groups = [{**group, _STEPS: self._progress["steps"]} for group in state_dict["param_groups"]]
        return {**state_dict, "state": merged, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # the name is torch.distributed.checkpoint's
        """Restore what `state_dict` returned.

        Args:
            state_dict: From `state_dict`; it is not modified.

        Raises:
            ValueError: If it is not one of a DualOptimizer with these objectives, or the parameter groups do not fit.
        """
        self._load_between_hooks(state_dict, self._load)

    def _load(self, state_dict: dict[str, Any]) -> None:
        # The longest name first, because one may be the beginning of another.
        parts: dict[str, dict[Any, dict[str, Any]]] = {name: {} for name in sorted(self._states, key=len, reverse=True)}
        for index, entries in state_dict["state"].items():
            for key, value in entries.items():
                name = next((name for name in parts if str(key).startswith(f"{_STATE}{name}_")), None)
                if name is None:
                    raise ValueError(
                        f"load_state_dict: expected the states of {list(self._states)}, found {key!r}; construct DualOptimizer with the "
                        "turns it was saved with"
                    )
                parts[name].setdefault(index, {})[str(key).removeprefix(f"{_STATE}{name}_")] = value
        groups = [dict(group) for group in state_dict["param_groups"]]
        steps = [group.pop(_STEPS, None) for group in groups]
        if any(step is None for step in steps):
            raise ValueError(
                "load_state_dict: expected a DualOptimizer's state, found another optimizer's, which has no turns"
            )
        loaded: dict[str, Any] = {}
        for name, part in parts.items():
            self._base.load_state_dict({**state_dict, "state": part, "param_groups": groups})
            loaded[name] = self._base.state
        self._states.update(loaded)
        self._progress["steps"] = int(steps[0])


def _copied(state: Mapping[Any, Mapping[str, Any]]) -> defaultdict[Any, dict[str, Any]]:
    copies: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
    for parameter, entries in state.items():
        copies[parameter] = {
            key: value.clone() if isinstance(value, Tensor) else value for key, value in entries.items()
        }
    return copies
