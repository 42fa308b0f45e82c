"""Forget losses with a teacher: a model that never learned the forget answers, which says what is said instead."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

import gradsurgery as gs
from lightning_modules.training.heads import answer_values
from lightning_modules.training.means import (
    Batches,
    Context,
    Objective,
    as_objective,
    mean,
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


def with_alternatives(loss: Any, teacher: SecondModel, weight: float = 1.0, beta: float = 10.0) -> Objective:
    r"""A forget loss, and beside it what a teacher would say in the answer's place, so that something fluent takes it.

    $$L_f + w \, p_y \, \mathrm{CE}(q, p), \qquad q = \mathrm{softmax}(z_\mathrm{teacher} - \beta e_y)$$

    at each token, with its probability $p_y$ a constant; both are means over the answer tokens of all processes. The
    second is `gs.losses.undial` from the teacher, as far as the true token is still known: it ends where that is
    forgotten, and does not hold the model to the teacher beyond. A loss such as CE-U lowers the true token and leaves
    open which other ones rise: those that the model happens to prefer, more with every step, until they are letters
    that make no word. With a large $\beta$ the gradient of the logits is, for CE-U and a small $p_y$,

    $$p_y (e_y + (w - 1) p - w q)$$

    so that with $w = 1$ what the true token loses goes to the tokens that the teacher prefers.

    The combination is ours; `examples/ablation/README.md`, "The command on SmolLM2", measures it.

    Args:
        loss: A loss per token, or a `functools.partial` of one.
        teacher: As of `distillation`: a model that never learned the forget answers.
        weight: w > 0.
        beta: How much the teacher's logit of each true token is lowered, >= 0.

    Raises:
        ValueError: If the weight is not positive and finite, beta is negative, the teacher has no model, or the loss is
            none of single tokens.

    Cost: the teacher's weights, a forward pass of it, and two further passes of the trained model's last layer.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> before = LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes))
        >>> forget_loss = with_alternatives(gs.losses.ceu, SecondModel(before))
    """
    if not 0.0 < weight < math.inf:
        raise ValueError(f"with_alternatives: expected a weight > 0, found {weight}")
    if not beta >= 0.0:
        raise ValueError(f"with_alternatives: expected beta >= 0, found {beta}")
    if not of_tokens(loss):
        raise ValueError(f"with_alternatives: expected a loss of single tokens, such as ceu, found {name_of(loss)}")
    _check_teacher("with_alternatives", teacher)
    skip, lowered = usual_skip(loss), partial(gs.losses.undial, beta=beta)

    @as_objective
    def instead(context: Context, batches: Batches, name: str) -> Tensor:
        labels = batches[name]["labels"]
        states, others = states_of(teacher, context, batches[name])
        values = partial(answer_values, states=states, labels=labels, skip_first=skip)
        with torch.no_grad():
            known = (-values(gs.losses.cross_entropy)[0]).exp()
        own, tokens = values(loss)
        theirs, _ = values(lowered, reference=others, again=True)
        return (own + weight * known * theirs).sum() / context.mean_count(len(tokens))

    return instead


def _check_teacher(who: str, teacher: SecondModel) -> None:
    if teacher.model is None:
        raise ValueError(
            f"{who}: expected a teacher that never learned the forget set, found SecondModel() without a model"
        )
