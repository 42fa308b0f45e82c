"""Forget losses with a teacher: a model that never learned the forget answers, which says what is said instead."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

import gradsurgery as gs
from lightning_modules.training.means import (
    Batches,
    Context,
    Objective,
    as_objective,
    mean,
    mean_over,
    name_of,
    of_tokens,
    states_of,
    unbound,
    usual_skip,
)
from lightning_modules.training.references import SecondModel

IMITATING: tuple[str, ...] = ("kl_divergence", "undial")
"""Losses that can compare with a teacher, `distillation`."""


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
    _check_teacher("distillation", teacher)
    if unbound(loss) not in (gs.losses.kl_divergence, gs.losses.undial):
        raise ValueError(f"distillation: expected {' or '.join(IMITATING)}, found {name_of(loss)}")

    @as_objective
    def distil(context: Context, batches: Batches, name: str) -> Tensor:
        return mean(loss, 0, teacher, context, batches[name])

    return distil


def with_alternatives(loss: Any, teacher: SecondModel, weight: float = 0.3, beta: float = 10.0) -> Objective:
    r"""A forget loss, and beside it what a teacher would say in the answer's place, so that something fluent takes it.

    $$(1 - w) \, L_f + w \, \mathrm{CE}(q, p), \qquad q = \mathrm{softmax}(z_\mathrm{teacher} - \beta e_y)$$

    each a mean over the answer tokens of all processes; the second is `gs.losses.undial`. A loss such as CE-U lowers
    the true token and leaves open which other ones rise: those that the model happens to prefer, more with every step,
    which ends in letters that are no words. With a large $\beta$ the second term is
    $-\log(1 - p_y) + \mathrm{CE}(q, p_{\neq y})$: CE-U's own gradient, and the cross-entropy among the other
    tokens. So $w$ says how much they count, from 0, CE-U, to 1, UNDIAL from a teacher.

    The combination is ours; `examples/ablation/README.md`, "The command on SmolLM2", measures it.

    Args:
        loss: A loss per token, or a `functools.partial` of one.
        teacher: As of `distillation`: a model that never learned the forget answers.
        weight: w, above 0 and below 1.
        beta: How much the teacher's logit of each true token is lowered, >= 0.

    Raises:
        ValueError: If the weight is not between 0 and 1, beta is negative, the teacher has no model, or the loss is
            none of single tokens.

    Cost: the teacher's weights, a forward pass of it, and a second pass of the trained model's last layer.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> before = LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes))
        >>> forget_loss = with_alternatives(gs.losses.ceu, SecondModel(before))
    """
    if not 0.0 < weight < 1.0:
        raise ValueError(f"with_alternatives: expected a weight between 0 and 1, found {weight}")
    if not beta >= 0.0:
        raise ValueError(f"with_alternatives: expected beta >= 0, found {beta}")
    if not of_tokens(loss):
        raise ValueError(f"with_alternatives: expected a loss of single tokens, such as ceu, found {name_of(loss)}")
    _check_teacher("with_alternatives", teacher)
    skip, lowered = usual_skip(loss), partial(gs.losses.undial, beta=beta)

    @as_objective
    def instead(context: Context, batches: Batches, name: str) -> Tensor:
        batch = batches[name]
        states, others = states_of(teacher, context, batch)
        own = mean_over(loss, skip, states, None, context, batch)
        return (1.0 - weight) * own + weight * mean_over(lowered, 0, states, others, context, batch)

    return instead


def _check_teacher(who: str, teacher: SecondModel) -> None:
    if teacher.model is None:
        raise ValueError(
            f"{who}: expected a teacher that never learned the forget set, found SecondModel() without a model"
        )
