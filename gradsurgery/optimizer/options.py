"""Options: what a user chooses for surgery, checked when it is chosen, and settable between steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch

from gradsurgery import rules
from gradsurgery.optimizer.average import EMA
from gradsurgery.optimizer.capture import Window
from gradsurgery.optimizer.guard import check_guard
from gradsurgery.optimizer.metric import MetricOption, check_metric
from gradsurgery.optimizer.scope import Scope, blocks_of_both
from gradsurgery.optimizer.update import multiples, resolve_rule
from gradsurgery.optimizer.wrapper import Wrapper, local_bytes
from gradsurgery.rules import elementwise

_CONSTRUCTED = ("objectives", "scope", "accumulate", "ema_dtype")

Guard: TypeAlias = Literal["update", "measure"] | None


@dataclass
class Options:
    """The options as `GradientSurgery` describes them. It is changed in place, for the reason that `Adjustable` gives.

    Attributes:
        rule: The rule.
        rule_start: What a `gradsurgery.rules.StatefulRule` was chosen with.
        scope: What shares one Gram matrix.
        record_scope: Of what the record holds Gram matrices too.
        metric: The inner product.
        guard: Whether the parameter change is projected, or measured.
        add: The multiple of each current row that is added, one for each objective.
        max_norm: Norm to clip to.
        accumulate: Whether rows stay apart after ``combine``.
        perturbed: Whether a row may be taken at moved weights.
    """

    rule: Callable[..., Any]
    rule_start: dict[str, Any]
    scope: Scope
    record_scope: Scope | None
    metric: MetricOption
    guard: Guard
    add: list[float]
    max_norm: float | None
    accumulate: bool
    perturbed: bool = False


class Adjustable(Wrapper):
    """A wrapper whose options are read and, between steps, set as attributes; a schedule sets them.

    Each is checked as the constructor checks it. Lightning calls an optimizer's methods on a proxy, and an attribute
    that such a method rebinds would never reach this object. So whatever changes while training lives in objects that
    are changed in place.

    ``objectives``, ``scope``, ``accumulate`` and ``ema_dtype`` can be read only.
    """

    _objectives: tuple[str, ...]
    _options: Options
    _ema: EMA
    _window: Window

    if not TYPE_CHECKING:  # a type checker knows that these have no setter, and would take any name now

        def __setattr__(self, name: str, value: object) -> None:
            if name in _CONSTRUCTED:
                raise AttributeError(
                    f"{name}: expected to be set when the optimizer is constructed, found it set to {value!r} afterwards; construct "
                    f"another with {name}={value!r}"
                )
            super().__setattr__(name, value)

    @property
    def objectives(self) -> tuple[str, ...]:
        """The names, the rectified one first."""
        return self._objectives

    @property
    def scope(self) -> Scope:
        """What shares one Gram matrix."""
        return self._options.scope

    @property
    def accumulate(self) -> bool:
        """Whether rows stay apart after ``combine``."""
        return self._options.accumulate

    @property
    def ema_dtype(self) -> torch.dtype:
        """The type that the averages are kept in."""
        return self._ema.dtype

    @property
    def rule(self) -> Callable[..., Any]:
        """The rule. Setting another starts it anew: a `gradsurgery.rules.StatefulRule` as it was constructed."""
        return self._options.rule

    @rule.setter
    def rule(self, value: Callable[..., Any] | str) -> None:
        self._window.refuse_change("rule", self._parameters())
        options = self._options
        options.rule = resolve_rule(value, len(self.objectives), scope=options.scope, metric=options.metric)
        options.rule_start = start_of(options.rule)

    @property
    def ema_decay(self) -> Mapping[str, float]:
        r"""The weight of the old value in each average, by objective; only those that have one. Set it as a whole.

        With the decay $d$ of the coming step, and $n$ steps behind an average, its bias-corrected value gets the weight
        $d (1 - d^n) / (1 - d^{n+1})$, and the row the rest; so $d = 0$ is no memory. After the first step, the
        objectives that have an average stay the same. Setting another decay costs a pass over the averages.

        Raises:
            ValueError: As the constructor, or if other objectives than before have one.
            RuntimeError: If it is set in the middle of a step.
        """
        return MappingProxyType(self._ema.decays)

    @ema_decay.setter
    def ema_decay(self, value: float | Mapping[str, float] | None) -> None:
        self._window.refuse_change("ema_decay", self._parameters())
        self._ema.change_decays(value)

    @property
    def add(self) -> Mapping[str, float]:
        """The multiples of current rows that are added after the rule, by objective; those that are not 0.

        Set it as a whole.
        """
        multiples = zip(self.objectives, self._options.add, strict=True)
        return MappingProxyType({name: multiple for name, multiple in multiples if multiple})

    @add.setter
    def add(self, value: Mapping[str, float] | None) -> None:
        self._window.refuse_change("add", self._parameters())
        self._options.add = multiples(value or {}, self.objectives)

    @property
    def max_norm(self) -> float | None:
        """The norm that the combined gradient is clipped to; None does not clip."""
        return self._options.max_norm

    @max_norm.setter
    def max_norm(self, value: float | None) -> None:
        self._window.refuse_change("max_norm", self._parameters())
        self._options.max_norm = check_norm(value)

    @property
    def guard(self) -> Guard:
        """What happens to the parameter change after the base's step."""
        return self._options.guard

    @guard.setter
    def guard(self, value: Guard) -> None:
        self._window.refuse_change("guard", self._parameters())
        check_guard(value, self._parameters(), self.objectives)
        self._options.guard = value

    @property
    def metric(self) -> MetricOption:
        """The inner product in which conflict is measured."""
        return self._options.metric

    @metric.setter
    def metric(self, value: MetricOption) -> None:
        self._window.refuse_change("metric", self._parameters())
        check_metric(value, self._base)
        resolve_rule(self._options.rule, len(self.objectives), scope=self._options.scope, metric=value)
        self._options.metric = value

    @property
    def record_scope(self) -> Scope | None:
        """Of what the record holds Gram matrices beside those that the rule sees."""
        return self._options.record_scope

    @record_scope.setter
    def record_scope(self, value: Scope | None) -> None:
        self._window.refuse_change("record_scope", self._parameters())
        blocks_of_both(self._options.scope, value, self.param_groups)
        self._options.record_scope = value

    def _reads_names(self) -> bool:
        return callable(self._options.scope) or callable(self._options.record_scope)

    def memory_estimate(self) -> int:
        """Bytes on this rank that surgery holds at most, besides what a plain step of the base holds at the same time.

        K - 1 rows while backward passes run, and one average for each protected row with ``ema_decay`` from the first
        step on. One row more with ``accumulate`` or an elementwise rule. One copy of the parameters with ``guard``,
        but only between combining and the end of the step, when activations are gone; and one once ``perturbed`` was
        called, while an objective runs at moved weights. Other activations than those of a plain step are not counted:
        contexts hold those of one objective at a time, ``join`` of all.
        """
        parameters = self._parameters()
        one_more = self._options.accumulate or elementwise.is_elementwise(self.rule)
        copies = len(self.objectives) - 1 + one_more + (self.guard is not None or self._options.perturbed)
        averages = len(self._ema.decays) * local_bytes(parameters, self._ema.dtype.itemsize)
        return copies * local_bytes(parameters) + averages


def check_norm(max_norm: float | None) -> float | None:
    """The option ``max_norm``.

    Raises:
        ValueError: If it is not a positive number.
    """
    if max_norm is not None and not max_norm > 0.0:
        raise ValueError(f"max_norm: expected a positive number, found {max_norm}")
    return max_norm


def start_of(rule: Callable[..., Any]) -> dict[str, Any]:
    """The state that a `gradsurgery.rules.StatefulRule` starts with; empty for any other rule."""
    return rule.state_dict() if isinstance(rule, rules.StatefulRule) else {}
