"""From a loss and a batch to one number: which mean each kind of loss takes, and what it compares with.

Some losses compare with the start model, the model before unlearning. Where its outputs come from is the business of
`references`, which is why these arguments are called `reference`.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, cast

from torch import Tensor

import gradsurgery as gs
from lightning_modules.training.means import (
    Batches,
    Context,
    Objective,
    as_objective,
    mean,
    name_of,
    needs_logits,
    needs_reference,
    unbound,
    usual_skip,
)
from lightning_modules.training.references import Reference, SecondModel, sequence_nll
from lightning_modules.training.teachers import IMITATING as IMITATING
from lightning_modules.training.teachers import distillation as distillation
from lightning_modules.training.teachers import with_alternatives as with_alternatives

NAMES: tuple[str, ...] = (*gs.losses.LOSSES, *gs.losses.SEQUENCE_LOSSES, *gs.losses.ROW_LOSSES, "idk", "jensun")
"""The names that the command line knows. `dpo` and `idk` need refusals in the data, `jensun` its target."""


def by_name(name: str) -> Any:
    """The loss or objective called ``name``.

    Raises:
        ValueError: If there is none.
    """
    tables: dict[str, Any] = gs.losses.LOSSES | gs.losses.SEQUENCE_LOSSES | gs.losses.ROW_LOSSES
    tables = tables | {"idk": idk, "jensun": jensun}
    if name not in tables:
        raise ValueError(f"loss: expected one of {', '.join(NAMES)}, found {name!r}")
    return tables[name]


def objective(loss: Any, skip_first: int | None = None) -> Objective:
    """The objective that a loss stands for: how its values become one number.

    - A loss per token: its mean over the answer tokens of all processes.
    - A loss per sequence (`npo`, `simnpo`, `dpo`): its mean over the sequences of this process.
    - A loss per row of logits (`undial`, `kl_divergence`, `uniform`, `logit_margin`, `jensen_shannon`): as a loss per
      token, with the start model's logits where it takes them.
    - An `Objective` of this file, such as `idk`, `jensun` (JensUn's forget loss) or `rmu(...)`: itself.

    Args:
        loss: The loss, or a `functools.partial` of one.
        skip_first: Answer tokens left out at the start of each answer. None means 1 for `ceu`, as in its paper, and 0
            for any other loss.

    Raises:
        TypeError: If the loss is not a function.
        ValueError: If ``skip_first`` is given to an objective that chooses its own tokens.
    """
    if not callable(loss):
        raise TypeError(f"loss: expected a function, found {loss!r}; lm.objectives.by_name finds one by its name")
    plain = unbound(loss)
    skip = usual_skip(loss) if skip_first is None else skip_first
    if getattr(plain, "is_objective", False):
        if skip:
            raise ValueError(
                f"skip_first: expected 0 or None with {name_of(loss)}, which chooses its own tokens, found {skip}"
            )
        return cast(Objective, loss)
    kind = next((name for name, known in gs.losses.SEQUENCE_LOSSES.items() if known is plain), None)
    if kind is not None:
        return partial(_sequence_mean, loss, kind, skip)
    return partial(_token_mean, loss, skip, needs_logits(loss))


@as_objective
def idk(context: Context, batches: Batches, name: str) -> Tensor:
    """IdkNLL (TOFU, 2401.06121): cross-entropy of refusals to the forget questions, mean over the refusals' tokens."""
    return _token_mean(gs.losses.cross_entropy, 0, False, context, batches, _refusal(batches, name))


@as_objective
def jensun(context: Context, batches: Batches, name: str) -> Tensor:
    """JensUn (2509.02820): `losses.jensen_shannon_label` from a target such as "No idea", mean over its tokens.

    The data gives the target: `ForgetRetainDataModule(target="No idea")` puts its tokens, over and over, in the place
    of the labels of each forget answer, while the model reads the answer itself.
    """
    return _token_mean(gs.losses.jensen_shannon_label, 0, False, context, batches, _refusal(batches, name))


def rmu(layer: int, direction: Tensor | None = None) -> Objective:
    """RMU (2403.03218): moves the hidden states after a layer, `gradsurgery.losses.rmu`, mean over the sequences.

    Args:
        layer: Index into the model's `hidden_states`: 0 is the embedding, l the output of layer l (the authors' layer 7
            is 8 here). To train some layers only, freeze the others' parameters.
        direction: Where the forget states are steered, `[H]` (`gradsurgery.losses.rmu_direction`). None is the retain
            half of RMU: the states are held to those of the start model.

    Raises:
        TypeError: When it is computed, if `direction` is None and the module's `reference` is not a `SecondModel`.
    """

    @as_objective
    def steer(context: Context, batches: Batches, name: str) -> Tensor:
        batch = batches[name]
        hidden = context.head.hidden(batch, layer)
        target = direction
        if target is None:
            if not isinstance(context.reference, SecondModel):
                raise TypeError("rmu: expected reference=SecondModel(...) for the retain half, found another or none")
            target = context.reference.hidden(context.head, batch, layer)
        return gs.losses.rmu(hidden, target.to(hidden), batch["labels"] != gs.losses.IGNORED).mean()

    steer.needs_reference = direction is None  # pyright: ignore[reportFunctionMemberAccess]
    return steer


def with_substitutes(loss: Any, weight: float = 1.0) -> Objective:
    r"""A forget loss, and beside it the cross-entropy of another answer, which is learned in the place of the true one.

    $$L_f + w \, \mathrm{CE}(\text{substitute})$$

    each a mean over its own answer tokens of all processes. Both are one objective, so that with `perturb` the other
    answer is taught where the true one is remembered best. The data gives it:
    `ForgetRetainDataModule(substitutes="similar")`.

    It is ours; `examples/ablation/README.md`, "Depth of a pre-trained model", measures it beside a finish on the same
    answers.

    Args:
        loss: Any forget loss that teaches no answer itself.
        weight: w > 0.

    Returns:
        An objective: a scalar from the forget batch and the third batch beside it, both `[B, T]`.

    Raises:
        ValueError: If the weight is not positive and finite, or the loss teaches an answer itself (`dpo`, `idk`,
            `jensun`).

    Cost: a forward and a backward pass of a batch more.

    Example:
        >>> forget_loss = with_substitutes(gs.losses.ceu)
    """
    if not 0.0 < weight < math.inf:
        raise ValueError(f"substitutes: expected a weight > 0, found {weight}")
    if needs_refusals(loss) or needs_target(loss):
        raise ValueError(f"substitutes: expected a loss that teaches no answer itself, found {name_of(loss)}")
    forget = objective(loss)

    @as_objective
    def instead(context: Context, batches: Batches, name: str) -> Tensor:
        taught = _token_mean(gs.losses.cross_entropy, 0, False, context, batches, _refusal(batches, name))
        return forget(context, batches, name) + weight * taught

    instead.needs_reference = needs_reference(loss)  # pyright: ignore[reportFunctionMemberAccess]
    return instead


def _token_mean(loss: Any, skip: int, with_reference: bool, context: Context, batches: Batches, name: str) -> Tensor:
    return mean(loss, skip, _reference(context, loss) if with_reference else None, context, batches[name])


def _sequence_mean(loss: Any, kind: str, skip: int, context: Context, batches: Batches, name: str) -> Tensor:
    def nll(of: str) -> Tensor:
        return sequence_nll(context.head.states(batches[of]), batches[of]["labels"], skip)

    def before(of: str) -> Tensor:
        return _reference(context, loss).nll(context.head, batches[of], skip, of)

    if kind == "simnpo":
        lengths = gs.losses.answer_lengths(batches[name]["labels"], skip_first=skip)
        return loss(nll(name), lengths).mean()
    if kind == "npo":
        return loss(nll(name), before(name)).mean()
    refusal = _refusal(batches, name)
    return loss(nll(refusal), nll(name), before(refusal), before(name)).mean()


def _refusal(batches: Batches, name: str) -> str:
    if name != "forget" or "refusal" not in batches:
        raise ValueError(
            "expected refusals beside the forget batch, found none; give ForgetRetainDataModule refusals=... (target=... for jensun, "
            "substitutes=... for other answers), and use this loss to forget"
        )
    return "refusal"


def _reference(context: Context, loss: Any) -> Reference:
    if context.reference is None:
        raise ValueError(
            f"{name_of(loss)}: expected a reference, found none; give UnlearningModule "
            "reference=SecondModel(), AdapterOff() or Precomputed(path)"
        )
    return context.reference


def needs_refusals(loss: Any) -> bool:
    """Whether a loss teaches refusals, so that the data needs them: `ForgetRetainDataModule(refusals=...)`."""
    plain = unbound(loss)
    return plain is gs.losses.dpo or plain is idk


def needs_target(loss: Any) -> bool:
    """Whether a loss teaches a target instead, so that the data needs it: `ForgetRetainDataModule(target=...)`."""
    return unbound(loss) is jensun
