"""The table of rules: every coordinate-free rule by its name, and the look-up by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from gradsurgery.rules import elementwise, multi_task, projections


class Rule(Protocol):
    """A pure function ``gram [..., K, K] -> coefficients [..., K]``."""

    def __call__(self, gram: Tensor, /) -> Tensor:
        """The coefficients of the rows."""
        ...


RULES: dict[str, Callable[..., Tensor]] = {
    function.__name__: function
    for function in (
        projections.sum,
        projections.gradient_difference,
        projections.gru,
        projections.a_gem,
        projections.gem,
        projections.cos_clip,
        multi_task.pcgrad,
        projections.gradvac,
        multi_task.cagrad,
        multi_task.mgda,
        multi_task.imtl_g,
        multi_task.nash_mtl,
        multi_task.aligned_mtl,
        multi_task.upgrad,
        multi_task.ngdiff,
        projections.blur,
        projections.gu,
        projections.orthograd,
        projections.hamu,
        projections.hamu_u,
    )
}
"""Every coordinate-free rule by its name. Whatever lists the rules reads this table: `gradsurgery.rules`' names, the
tests. Only the command line, which answers before torch is there, has the names once more; a test compares them."""


def by_name(name: str) -> Callable[..., Any]:
    """The rule called ``name``: a coordinate-free one of `RULES`, or one of `gradsurgery.rules.elementwise`.

    Raises:
        ValueError: If there is no such rule. The message lists the names.

    Example:
        >>> by_name("gru") is projections.gru
        True
    """
    known: dict[str, Callable[..., Any]] = {**RULES, **elementwise.ELEMENTWISE}
    if name not in known:
        raise ValueError(f"rule: expected one of {', '.join(known)}, found {name!r}")
    return known[name]
