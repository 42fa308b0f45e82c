"""From a loss and a batch to one number: which mean each kind of loss takes, and what it compares with.

Some losses compare with the start model, the model before unlearning. Where its outputs come from is the business of
`references`, which is why these arguments are called `reference`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol, TypeAlias, cast

from torch import Tensor

import gradsurgery as gs
from lightning_modules.training.heads import AnswerHead, Batch, answer_values
from lightning_modules.training.references import Reference, SecondModel, sequence_nll

IMITATING: tuple[str, ...] = ("kl_divergence", "undial")
"""Losses that can compare with a teacher, `distillation`."""

Batches: TypeAlias = Mapping[str, Mapping[str, Tensor]]


class Context(Protocol):
    """What an objective may use of the module that it trains; `UnlearningModule` has all of it.

    Attributes:
        reference: Gives the start model's outputs, for losses that compare with it.
    """

    reference: Reference | None

    @property
    def head(self) -> AnswerHead:
        """The trained model in two parts."""
        ...

    def mean_count(self, count: int) -> Tensor:
        """The mean of a count of tokens over all processes."""
        ...


Objective: TypeAlias = Callable[[Context, Batches, str], Tensor]
"""A function of the module, the batches by name, and the name of its own batch. It returns a scalar to be minimised."""

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
    plain = _unbound(loss)
    skip = int(plain is gs.losses.ceu) if skip_first is None else skip_first
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


def as_objective(function: Any) -> Any:
    """A decorator for `Objective`s: tells a function of (module, batches, name) from a loss per token."""
    function.is_objective = True
    return function


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


def distillation(teacher: SecondModel, loss: Any = gs.losses.kl_divergence) -> Objective:
    r"""Distillation: the answers get the probabilities that a model gives them which never learned them.

    $$\mathrm{KL}(q \,\|\, p) = \sum_v q_v \log(q_v / p_v)$$

    with the teacher's distribution $q$ and the model's $p$ at each answer token, as a mean over the answer tokens of
    all processes, in nats. It is bounded from below by 0, where nothing distinguishes the two on these texts, so that
    nothing is forgotten further than the teacher would have it: neither fluency nor names, only what was learned since.
    `gs.losses.undial` lowers the teacher's logit of each true token by `beta` first, and so forgets further.

    Args:
        teacher: `references.SecondModel(model)` with the trained model's vocabulary, such as the model before it was
            fine-tuned on what is to be forgotten. It is no copy of the trained model.
        loss: `gs.losses.kl_divergence` or `gs.losses.undial`, or a `functools.partial` of one.

    Raises:
        ValueError: If the loss is another one, the teacher has no model, or, when it is computed, another vocabulary.

    Cost: the teacher's weights, and a forward pass of it.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> before = LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes))
        >>> forget_loss = distillation(SecondModel(before))
    """
    if teacher.model is None:
        raise ValueError(
            "distillation: expected a teacher that never learned the forget set, found SecondModel() without a model"
        )

    if _unbound(loss) not in map(by_name, IMITATING):
        raise ValueError(f"distillation: expected {' or '.join(IMITATING)}, found {name_of(loss)}")

    @as_objective
    def distil(context: Context, batches: Batches, name: str) -> Tensor:
        return _mean(loss, 0, teacher, context, batches[name])

    return distil


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
    return _mean(loss, skip, _reference(context, loss) if with_reference else None, context, batches[name])


def _mean(loss: Any, skip: int, reference: Reference | None, context: Context, batch: Batch) -> Tensor:
    states = context.head.states(batch)
    others = None
    if reference is not None:
        others = reference.states(context.head, batch, split=states.head is not None)
        if (others.head is None) != (states.head is None):
            states = context.head.states(batch, split=False)
            others = reference.states(context.head, batch, split=False)
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


def _unbound(loss: Any) -> Any:
    while isinstance(loss, partial):
        loss = loss.func
    return loss


def name_of(loss: Any) -> str:
    """The loss's own name, for messages."""
    return getattr(_unbound(loss), "__name__", type(loss).__name__)


def needs_reference(loss: Any) -> bool:
    """Whether a loss compares with the start model."""
    plain = _unbound(loss)
    return (
        needs_logits(loss)
        or plain is gs.losses.npo
        or plain is gs.losses.dpo
        or getattr(plain, "needs_reference", False)
    )


def needs_logits(loss: Any) -> bool:
    """Whether that comparison takes whole rows of logits, which `references.Precomputed` does not hold."""
    plain = _unbound(loss)
    return any(plain is loss for loss in (gs.losses.undial, gs.losses.kl_divergence, gs.losses.jensen_shannon))


def needs_refusals(loss: Any) -> bool:
    """Whether a loss teaches refusals, so that the data needs them: `ForgetRetainDataModule(refusals=...)`."""
    plain = _unbound(loss)
    return plain is gs.losses.dpo or plain is idk


def needs_target(loss: Any) -> bool:
    """Whether a loss teaches a target instead, so that the data needs it: `ForgetRetainDataModule(target=...)`."""
    return _unbound(loss) is jensun
