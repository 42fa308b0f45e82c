"""From a loss and a batch to one number: which reference and which mean each kind of loss takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

import gradsurgery as gs
from lightning_modules.heads import AnswerHead, answer_values
from lightning_modules.references import Reference, sequence_nll

Batches: TypeAlias = Mapping[str, Mapping[str, Tensor]]


class Context(Protocol):
    """What an objective may use: `UnlearningModule` is one."""

    head: AnswerHead
    reference: Reference | None

    def mean_count(self, count: int) -> Tensor:
        """The mean of a count over all processes."""
        ...


Objective: TypeAlias = Callable[[Context, Batches, str], Tensor]
"""(module, batches by name, name of the batch) -> a scalar to be minimised."""

NAMES: tuple[str, ...] = (*gs.losses.LOSSES, *gs.losses.SEQUENCE_LOSSES, *gs.losses.ROW_LOSSES, "idk")
"""What the command line can name; `dpo` and `idk` need refusals in the data."""


def by_name(name: str) -> Any:
    """The loss or objective called ``name``.

    Raises:
        ValueError: If there is none.
    """
    tables: dict[str, Any] = gs.losses.LOSSES | gs.losses.SEQUENCE_LOSSES | gs.losses.ROW_LOSSES | {"idk": idk}
    if name not in tables:
        raise ValueError(f"loss: expected one of {', '.join(NAMES)}, found {name!r}")
    return tables[name]


def objective(loss: Any, skip_first: int | None = None) -> Objective:
    """What a loss means as an objective.

    - A loss per token: its mean over the answer tokens of all processes.
    - `npo`, `simnpo`, `dpo` (or a `functools.partial` of one): per sequence, their mean over the sequences.
    - `undial`, `kl_divergence`, `uniform`, `logit_margin`: per row, as a loss per token, with the reference's logits where they take them.
    - An `Objective` made here, such as `idk` or `rmu(...)`: itself.

    Args:
        loss: The loss.
        skip_first: Answer tokens left out at the start of each answer; None: 1 for `ceu`, as in its paper, 0 for any other.
    """
    plain = _unbound(loss)
    skip = int(plain is gs.losses.ceu) if skip_first is None else skip_first
    if getattr(plain, "is_objective", False):
        return loss
    if plain in _SEQUENCES:
        return partial(_sequence_mean, loss, _SEQUENCES[plain], skip)
    if plain in _WITH_REFERENCE:
        return partial(_token_mean, gs.losses.as_row_loss(loss), skip, True)
    return partial(_token_mean, gs.losses.as_row_loss(loss), skip, False)


def is_objective(function: Any) -> Any:
    """Mark a function of (module, batches, name) as an `Objective`, so that it is not taken for a loss per token."""
    function.is_objective = True
    return function


@is_objective
def idk(context: Context, batches: Batches, name: str) -> Tensor:
    """IdkNLL: cross-entropy of a refusal to the forget questions, mean over its tokens (TOFU, 2401.06121)."""
    return _token_mean(gs.losses.cross_entropy, 0, False, context, batches, _refusal(batches, name))


def rmu(layer: int, direction: Tensor | None = None) -> Objective:
    """RMU (2403.03218) on the hidden states after a layer, `gradsurgery.losses.rmu`, mean over the sequences.

    Args:
        layer: Index into the model's `hidden_states`: 0 is the embedding, l the output of layer l (the authors' layer 7 is 8 here). To
            train some layers only, freeze the others' parameters.
        direction: `[H]`, where forget states are steered (`gradsurgery.losses.rmu_direction`). None: to the reference's own hidden
            states, which is the retain half.
    """

    @is_objective
    def steer(context: Context, batches: Batches, name: str) -> Tensor:
        batch = batches[name]
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        hidden = _layer(context.head.model, inputs, layer)
        if direction is not None:
            target = direction.to(hidden)
        else:
            second = getattr(context.reference, "model", None)
            if second is None:
                raise TypeError("rmu: expected reference=SecondModel(...) for the retain half, found another or none")
            with torch.no_grad():
                target = _layer(second.to(hidden.device), inputs, layer)
        return gs.losses.rmu(hidden, target, batch["labels"] != gs.losses.IGNORED).mean()

    return steer


def _layer(model: Any, inputs: Mapping[str, Tensor], layer: int) -> Tensor:
    return model(**inputs, output_hidden_states=True).hidden_states[layer]


def _token_mean(loss: Any, skip: int, with_reference: bool, context: Context, batches: Batches, name: str) -> Tensor:
    batch = batches[name]
    states = context.head.states(batch)
    others = None
    if with_reference:
        others = _reference(context, loss).states(context.head, batch, split=states.head is not None)
        if (others.head is None) != (states.head is None):
            states = context.head.states(batch, split=False)
            others = _reference(context, loss).states(context.head, batch, split=False)
    values, tokens = answer_values(loss, states, batch["labels"], skip_first=skip, reference=others)
    return values.sum() / context.mean_count(len(tokens))


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
            "expected refusals beside the forget batch, found none; give ForgetRetainDataModule refusals=..., and use this loss to forget"
        )
    return "refusal"


def _reference(context: Context, loss: Any) -> Reference:
    if context.reference is None:
        raise ValueError(
            f"{name_of(loss)}: expected a reference, found none; give UnlearningModule "
            "reference=SecondModel(), AdapterOff() or Precomputed(path)"
        )
    return context.reference


def _unbound(loss: Any) -> Any:
    while isinstance(loss, partial):
        loss = loss.func
    return loss


def name_of(loss: Any) -> str:
    """The loss's own name, for messages."""
    return getattr(_unbound(loss), "__name__", type(loss).__name__)


_SEQUENCES: dict[Any, str] = {function: name for name, function in gs.losses.SEQUENCE_LOSSES.items()}
_WITH_REFERENCE = (gs.losses.undial, gs.losses.kl_divergence)


def needs_reference(loss: Any) -> bool:
    """Whether a loss compares with the model before unlearning."""
    return _unbound(loss) in (gs.losses.npo, gs.losses.dpo, *_WITH_REFERENCE)


def needs_logits(loss: Any) -> bool:
    """Whether that comparison takes whole rows of logits, which no file holds."""
    return _unbound(loss) in _WITH_REFERENCE


def needs_refusals(loss: Any) -> bool:
    """Whether a loss teaches a refusal: `ForgetRetainDataModule(refusals=...)`."""
    return _unbound(loss) in (gs.losses.dpo, idk)
