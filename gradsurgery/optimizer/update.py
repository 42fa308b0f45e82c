"""From rows to the update: Gram matrix, rule, added rows, clipping, and the one pass that writes the update."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from gradsurgery import rules
from gradsurgery.gram import Metric, Row, block_gram, combine_, combine_blocks_, numbers_on, update_
from gradsurgery.optimizer.elementwise import with_answer
from gradsurgery.optimizer.ranks import active
from gradsurgery.optimizer.rows import Rows, check_protected
from gradsurgery.rules import elementwise


@dataclass(frozen=True)
class Update:
    """What was decided: in block s the update is ``sum_b amounts[s, b] * lists[b]``, in unscaled units.

    Attributes:
        gram: Gram matrices that the rule saw, ``[S, K, K]``.
        block_gram: Gram matrices of the recorded blocks, ``[R, K, K]``; None without them.
        coefficients: ``[S, K]`` after clipping, with the added multiples of current rows where those are rows of the
            Gram matrix; None where the rule is elementwise.
        amounts: ``[S, B]``; all NaN where a captured row is not finite.
        predicted_change: ``[K]``, minus the inner product of each row with the update.
        norm: Norm of the update, 0-dim, in the metric of the Gram matrix.
        finite_rows: Whether each captured row is finite, ``[K]`` bool.
        clipped_by: The factor that clipping scaled the update by, 0-dim.
        cancelled: Whether the rows cancel so far that ``norm`` is rounding noise, 0-dim bool.
    """

    gram: Tensor
    block_gram: Tensor | None
    coefficients: Tensor | None
    amounts: Tensor
    predicted_change: Tensor
    norm: Tensor
    finite_rows: Tensor
    clipped_by: Tensor
    cancelled: Tensor

    @property
    def finite(self) -> Tensor:
        """Whether it has no NaN or inf in it, 0-dim bool on its device."""
        return self.amounts.isfinite().all()

    def check_finite(self, objectives: Sequence[str]) -> None:
        """Refuse an update with a NaN or inf in it. It waits for the device.

        Raises:
            FloatingPointError: Naming the objectives whose rows are not finite.
        """
        if bool(self.finite):
            return
        culprits = [name for name, finite in zip(objectives, self.finite_rows.tolist(), strict=True) if not finite]
        if not culprits:
            raise FloatingPointError(
                "step: expected a finite update, found finite rows but a non-finite rule or average; nothing was stepped and zero_grad() "
                "recovers. The rule has no answer for this Gram matrix (optimizer.record.gram), or an average or `add` is not finite: "
                "choose another rule or other numbers"
            )
        raise FloatingPointError(
            f"step: expected finite rows, found a NaN or inf in the gradient of {' and '.join(map(repr, culprits))}; nothing was stepped "
            "and zero_grad() recovers. Look at that loss, lower the learning rate, or use a GradScaler with fp16; numbers above 1e19 count "
            "as inf, because their squares are"
        )


def resolve_rule(rule: Callable[..., Any] | str, number: int, *, scope: object, metric: object) -> Callable[..., Any]:
    """The rule, by its name where that is given.

    Args:
        rule: The rule or its name.
        number: Number of rows.
        scope: The option of that name.
        metric: The option of that name.

    Raises:
        ValueError: If there is no such rule; if it is elementwise, and the scope or metric is one that only a Gram
            matrix has; and by an elementwise rule whose own options are wrong.
    """
    if isinstance(rule, str):
        rule = rules.by_name(rule)
    if not callable(rule):
        raise ValueError(f"rule: expected a function of the Gram matrix or its name, found {rule!r}")
    if isinstance(rule, type):
        raise ValueError(f"rule: expected a function of the Gram matrix, found the class {rule.__name__}; construct it")
    if not elementwise.is_elementwise(rule):
        return rule
    for option, found, only in (("scope", scope, "global"), ("metric", metric, "euclidean")):
        if found != only:
            raise ValueError(
                f"{option}: expected {only!r} with an elementwise rule, which decides coordinate by coordinate and asks for no Gram "
                f"matrix, found {found!r} with {getattr(rule, '__name__', rule)!r}; drop {option}, or use a rule of gradsurgery.rules"
            )
    rule([[] for _ in range(number)])  # a wrong option of the rule shows on rows of no parameters too
    return rule


def multiples(add: Mapping[str, float], objectives: Sequence[str]) -> list[float]:
    """The option ``add`` as one number for each objective, 0 where it names none.

    Raises:
        ValueError: If it names what is not a protected objective, or a multiple is no finite number.
    """
    check_protected("add", add, objectives)
    if bad := {name: found for name, found in add.items() if not isinstance(found, Real) or not math.isfinite(found)}:
        raise ValueError(f"add: expected finite numbers, found {bad}")
    return [add.get(name, 0.0) for name in objectives]


def decide(
    rows: Rows,
    rule: Callable[..., Any],
    *,
    add: Sequence[float],
    max_norm: float | None,
    keep: bool,
    check: Callable[[Tensor], None],
) -> tuple[Update, list[Tensor | None]]:
    """Measure the rows, ask the rule, add the current rows, clip, and write the update.

    Args:
        rows: The rows. The first list is overwritten, or, with an elementwise rule, emptied: nobody reads it again, and
            so it is freed before the base's step.
        rule: Gram matrix -> coefficients (it sees ``[K, K]`` in the global scope), or, if it is elementwise, rows ->
            row.
        add: Multiple of each current row, K numbers.
        max_norm: Euclidean norm to clip to; None does not clip.
        keep: Whether the first captured row will grow and must stay as it is (one copy).
        check: Called with the Gram matrix before the update is decided; raises where ranks disagree. The answer of an
            elementwise rule is row 0 of the matrix then.

    Returns:
        The update as it was decided, and as the row that was written, in the captured rows' loss scale.

    Raises:
        ValueError: If the rule's answer has the wrong shape.
    """
    if elementwise.is_elementwise(rule):
        return _decide_by_coordinates(rows, rule, add, max_norm, check)
    if not (keep or any(add)) and max_norm is None and (found := _decide_on_device(rows, rule)) is not None:
        return found
    update = _decide_by_gram(rows, rule, add, max_norm, check)
    first = [None if tensor is None else tensor.clone() for tensor in rows.lists[0]] if keep else rows.lists[0]
    amounts = rows.in_loss_scale(update.amounts)
    # The amounts are NaN unless every row is finite.
    written = combine_blocks_([first, *rows.lists[1:]], amounts, blocks=rows.part_of_parameter, finite=True)
    return _without_noise(update, rows, written, max_norm), written


def _decide_by_gram(
    rows: Rows,
    rule: Callable[[Tensor], Tensor],
    add: Sequence[float],
    max_norm: float | None,
    check: Callable[[Tensor], None],
) -> Update:
    products, block_gram = rows.measure()
    gram = rows.gram(products)
    check(gram)
    asked = gram[0] if rows.blocks.names is None else gram
    coefficients = rule(asked.clone())  # a user's rule may write into its matrix, and this one is recorded
    found = list(coefficients.shape) if isinstance(coefficients, Tensor) else type(coefficients).__name__
    if found != list(asked.shape[:-1]):
        raise ValueError(
            f"rule: expected coefficients {list(asked.shape[:-1])}, a tensor, for a Gram matrix {list(asked.shape)}, found {found}"
        )
    number = gram.shape[-1]
    coefficients = coefficients.to(gram).view(-1, number)
    added = numbers_on(gram.device, add, torch.float64)
    amounts = rows.amounts(coefficients)
    amounts[:, :number] += added
    factor = _clip_factor(rows, products, amounts, max_norm)
    recorded = coefficients + torch.where(numbers_on(gram.device, rows.averaged), 0.0, added)
    update = _finish(rows, products, gram, amounts * factor, recorded * factor)
    return replace(update, block_gram=block_gram, clipped_by=factor)


def _decide_on_device(rows: Rows, rule: Callable[..., Any]) -> tuple[Update, list[Tensor | None]] | None:
    """As `decide` of two captured rows, in three launches; None, and nothing is done, where that cannot be."""
    name = next((name for known, name in _THREE_PRODUCTS if rule is known), None)
    plain = rows.metric is None and rows.parts is None and rows.blocks.names is None and rows.record_blocks is None
    if name is None or not plain or any(rows.averaged) or len(rows.lists) != 2 or rows.writes or active():
        return None
    found = update_(rows.lists, name)
    if found is None:
        return None
    gram, coefficients = found
    units = rows.units(gram.device)
    gram = gram * units[:, None] * units
    update = _finish(rows, gram, gram, coefficients, coefficients)
    return _without_noise(update, rows, rows.lists[0], None), rows.lists[0]


# Rules of two rows' three inner products, which do not depend on the rows' loss scale.
_THREE_PRODUCTS = ((rules.sum, "sum"), (rules.gru, "gru"), (rules.a_gem, "gru"), (rules.pcgrad, "pcgrad"))


def _decide_by_coordinates(
    rows: Rows,
    rule: Callable[[Sequence[Row]], Any],
    add: Sequence[float],
    max_norm: float | None,
    check: Callable[[Tensor], None],
) -> tuple[Update, list[Tensor | None]]:
    """As `decide`, in new memory. The update's amounts are ``[1, 1 + B]``, that of the rule's answer first."""
    rows.finish_writes()  # the rule reads the rows before they are measured
    extended = with_answer(rows, rule)
    products, block_gram = extended.measure()
    gram = extended.gram(products)
    try:
        check(gram)
    except RuntimeError as error:
        error.add_note(
            "A rule that draws at random, such as graddrop, needs a generator with the same seed on every rank."
        )
        raise
    amounts = torch.zeros_like(products[..., 0])
    amounts[:, 0] = 1.0
    amounts[:, 1 : 1 + len(add)] += numbers_on(amounts.device, add, torch.float64)
    factor = _clip_factor(extended, products, amounts, max_norm)
    amounts = amounts * factor
    block_gram = None if block_gram is None else block_gram[:, 1:, 1:]
    update = _finish(extended, products, gram[:, 1:, 1:], amounts, None)
    update = replace(update, block_gram=block_gram, clipped_by=factor)
    used = [0, *(k + 1 for k, multiple in enumerate(add) if multiple)]
    amounts = extended.in_loss_scale(update.amounts)
    written = combine_blocks_(
        [extended.lists[b] for b in used],
        torch.stack([amounts[:, b] for b in used], 1),
        blocks=extended.part_of_parameter,
    )
    rows.lists[0] = [None] * len(rows.parameters)
    return update, written


def _clip_factor(rows: Rows, products: Tensor, amounts: Tensor, max_norm: float | None) -> Tensor:
    """What brings the update to the norm allowed, 0-dim. Amounts and products give the norm without another pass."""
    if max_norm is None:
        return torch.ones_like(products[0, 0, 0])
    euclidean = products if rows.metric is None else rows.products(None)
    return _clipped_to(max_norm, _norm(euclidean, amounts))


def _clipped_to(max_norm: float, norm: Tensor) -> Tensor:
    return (max_norm / (norm + 1e-6)).clamp_max(1.0)  # as torch.nn.utils.clip_grad_norm_


def _finish(
    rows: Rows,
    products: Tensor,
    gram: Tensor,
    amounts: Tensor,
    coefficients: Tensor | None,
) -> Update:
    number = gram.shape[-1]
    # Without the row that is an elementwise rule's answer.
    weights = numbers_on(gram.device, rows.weights)[..., -number:, :]
    weights_of = "s" if weights.dim() == 3 else ""
    finite = products.diagonal(dim1=-2, dim2=-1).isfinite().all(0)
    owners = numbers_on(finite.device, rows.owners)
    # A user's rule may answer non-finite rows by finite numbers; whoever steps must still see that they were not.
    amounts = torch.where(finite.all(), amounts, torch.nan)
    return Update(
        gram=gram,
        block_gram=None,
        coefficients=coefficients,
        amounts=amounts,
        predicted_change=-torch.einsum(f"{weights_of}kb,sbc,sc->k", weights, products, amounts),
        norm=_norm(products, amounts),
        finite_rows=torch.stack([(finite | (owners != k)).all() for k in range(number)]),
        clipped_by=torch.ones_like(amounts[0, 0]),
        cancelled=_norm(products, amounts).square() < _CANCELLED * _norm(products.abs(), amounts.abs()).square(),
    )


# Below this share of its terms, the norm that c^T G c gives is rounding noise of float32 products.
_CANCELLED = 1e-6


def _without_noise(update: Update, rows: Rows, written: list[Tensor | None], max_norm: float | None) -> Update:
    """Where the rows cancel, take the norm of the row that was written, and clip that in place.

    With f close to -r the update is a small difference of large rows. The Gram matrix does not know its length: that is
    far below the rounding of its entries.

    Cost: nothing where they do not cancel; else two passes over one row. On an accelerator, where asking would make the
    host wait, a norm that is to be clipped is always measured (one pass), and one that is only recorded never.
    """
    if update.norm.device.type == "cpu":
        if not bool(update.cancelled):
            return update
    elif max_norm is None:
        return update
    scale = torch.as_tensor(rows.scale, dtype=torch.float64, device=update.norm.device)

    def measured(metric: Metric | None) -> Tensor:
        return block_gram([written], metric=metric, like=rows.parameters)[0, 0, 0].sqrt() / scale

    norm = measured(rows.metric)
    if max_norm is None:
        return replace(update, norm=norm)
    euclidean = norm if rows.metric is None else measured(None)
    # What was written is clipped by a wrong norm already, and that is undone.
    factor = _clipped_to(max_norm, euclidean / update.clipped_by) / update.clipped_by
    combine_([written], factor[None])
    return replace(
        update,
        coefficients=None if update.coefficients is None else update.coefficients * factor,
        amounts=update.amounts * factor,
        predicted_change=update.predicted_change * factor,
        norm=norm * factor,
        clipped_by=update.clipped_by * factor,
    )


def _norm(products: Tensor, amounts: Tensor) -> Tensor:
    """Norm of the update over all blocks, 0-dim: products ``[S, B, B]``, amounts ``[S, B]``."""
    return torch.einsum("sb,sbc,sc->", amounts, products, amounts).clamp_min(0.0).sqrt()
