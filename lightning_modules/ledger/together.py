r"""Which deletion requests are cheap to forget in one run: a first-order estimate from their gradients' Gram matrix.

With the gradients $g_i$ of the requests' forget losses and $r$ of retention, what GRU leaves of a request is

$$p_i = g_i + \max(0, -\langle g_i, r\rangle) / \langle r, r\rangle \; r, \qquad u_i = p_i / \lVert p_i\rVert .$$

A base optimizer such as AdamW takes steps of about the same length, however long its gradient is. A step of length 1
along $u_i$ forgets request i at the rate $\lVert p_i\rVert$: call what it needs alone one unit of steps. A step of
length 1 along the sum $s = \sum_{j \in G} u_j$ of a group forgets it at the rate $\langle p_i, s\rangle / \lVert
s\rVert$, and the group is done when its slowest request is:

$$\mathrm{steps}(G) = \max_{i \in G} \frac{\lVert s\rVert}{\langle u_i, s\rangle}, \qquad
\mathrm{saved}(G) = 1 - \mathrm{steps}(G) / |G| .$$

It has no scale: neither the length of a gradient nor the learning rate changes it. For two requests of cosine c it is

$$\mathrm{saved} = 1 - 1 / \sqrt{2 (1 + c)} :$$

a half where one gradient forgets both, .29 where they have nothing to do with each other, and nothing from c = -1/2 on.
It knows the start only: gradients turn while a model forgets, requests need different numbers of steps, and a step of
a large group sees only some rows of each. Measured (`examples/ledger/together.py`), it tells pairs of requests about
one author from others, and promises too much: 40 % of the steps where 20 % were saved, 37 % where 6 % were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import gradsurgery as gs

_GAIN = 1e-9
"""Of less than this, rounding decides."""


def cosines(gram: Tensor) -> Tensor:
    """The cosine of every two rows of a Gram matrix, `[K, K]`; 0 with a row that is 0."""
    lengths = gram.diagonal().clamp(min=0).sqrt()
    scale = torch.where(lengths > 0, 1 / lengths, 0)
    return (gram * scale[:, None] * scale).clamp(-1, 1)


def after_surgery(gram: Tensor) -> Tensor:
    """The Gram matrix of what GRU leaves of every request, `[K, K]`.

    Args:
        gram: `[K + 1, K + 1]`, the requests' rows and, as the last, retention's.
    """
    count = len(gram) - 1
    pairs = torch.stack([gram[[i, count]][:, [i, count]] for i in range(count)])
    found = gs.rules.gru(pairs)
    coefficients = torch.cat([torch.diag(found[:, 0]), found[:, 1:]], dim=1)
    return coefficients @ gram.double() @ coefficients.T


def steps(cosine: Tensor, group: Sequence[int]) -> float:
    """The steps that a group needs together, in those that one of its requests needs alone; infinite if one never is.

    Args:
        cosine: Of every two requests, after surgery, `[K, K]`.
        group: The places of its requests.

    Example:
        >>> steps(torch.eye(2), [0]), steps(torch.ones(2, 2), [0, 1]), round(steps(torch.eye(2), [0, 1]), 3)
        (1.0, 1.0, 1.414)
    """
    if len(group) == 1:
        return 1.0
    part = cosine[list(group)][:, list(group)]
    slowest = float(part.sum(dim=1).min())
    return math.sqrt(max(0.0, float(part.sum()))) / slowest if slowest > _GAIN else math.inf


def saved(cosine: Tensor, group: Sequence[int]) -> float:
    """The share of the steps that a group's requests would take one after another, and do not; below 0 it is dearer."""
    return 1.0 - steps(cosine, group) / len(group)


def groups(cosine: Tensor, may_join: Callable[[int, int], bool] = lambda *_: True) -> list[list[int]]:
    """Every request in one group: the two groups are joined whose union saves most steps, as long as one saves any.

    Among equals those of the first requests are joined.

    Args:
        cosine: As of `steps`.
        may_join: Whether two requests may be in one group.

    Returns:
        The places of each group's requests, in their order; the groups in that of their first requests.

    Cost: at most K^2 estimates, each of a matrix of the group's size.
    """
    found = [[place] for place in range(len(cosine))]
    gains: dict[tuple[int, int], float] = {}  # by the first requests of both
    while True:
        for at, one in enumerate(found):
            for other in found[at + 1 :]:
                if (one[0], other[0]) not in gains:
                    gains[one[0], other[0]] = _gain(cosine, one, other, may_join)
        best = max(gains, key=lambda pair: (gains[pair], -pair[0], -pair[1]), default=None)
        if best is None or gains[best] <= _GAIN:
            return found
        one, other = (next(group for group in found if group[0] == first) for first in best)
        found = [group for group in found if group[0] not in best] + [sorted(one + other)]
        found.sort(key=lambda group: group[0])
        gains = {pair: gain for pair, gain in gains.items() if not {*pair} & {*best}}


def _gain(cosine: Tensor, one: list[int], other: list[int], may_join: Callable[[int, int], bool]) -> float:
    if not all(may_join(i, j) for i in one for j in other):
        return -math.inf
    return steps(cosine, one) + steps(cosine, other) - steps(cosine, [*one, *other])
