"""How much of an answer a model reproduces word for word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from lightning_modules.data.tokenization import IGNORED
from lightning_modules.metrics.functional.numbers import Ragged, as_examples, per_example

Tokens = Tensor | Sequence[int]
TokensOfMany = Sequence[Tensor] | Sequence[Sequence[int]]


@overload
def extraction_strength(predicted: Tensor, labels: Tensor) -> float | Tensor: ...
@overload
def extraction_strength(predicted: Sequence[int], labels: Tokens) -> float: ...
@overload
def extraction_strength(predicted: TokensOfMany, labels: TokensOfMany | Tensor) -> Tensor: ...
def extraction_strength(predicted: Tokens | TokensOfMany, labels: Tokens | TokensOfMany) -> float | Tensor:
    r"""The share of an answer that the model completes by itself, once it is shown the beginning.

    $$\mathrm{ES} = 1 - \frac{1}{T} \min
    \lbrace k : \mathrm{predicted}_t = \mathrm{label}_t \ \text{for all } t \ge k \rbrace$$

    with t counted from 0: k tokens of the answer are shown, and the model says the other T - k. The score is 1 where
    greedy decoding gives the whole answer, and 0 where it does not even give the last token. On the forget set lower is
    better, down to the retrained model's score; on what is to be kept, higher is better.

    `predicted` is the argmax at every position of one forward pass over the right answer (teacher forcing). No decoding
    is needed: starting from the first k tokens, greedy decoding gives the rest if and only if every argmax from k on is
    right, because each right one is the next token of the answer. So k is one more than the last position with a wrong
    argmax.

    Source: Carlini et al. 2021 (arXiv 2012.07805) for the idea, UWC (arXiv 2406.09179) for this measure. The authors'
    code finds k by decoding from prefixes, word by word or by bisection, and compares strings: many generations for the
    same number, counted in words. open-unlearning uses teacher forcing too, but scores 1 / T where nothing is
    reproduced (0 here), and leaves out the eos. Here the eos counts if `labels` hold it, as in every other metric of
    this package.

    Args:
        predicted: argmax tokens of one example `[T]`, or of n examples, each `[T_i]`. A negative token stands for
            logits that were NaN, and makes the example's score NaN.
        labels: the answer's tokens in the same shape, already shifted; positions labelled -100 are left out.

    Returns:
        A float for one example, a float64 tensor `[n]` for n of them; in [0, 1].

    Raises:
        ValueError: if there is no example, an example has no labelled token, or the shapes differ.

    Example:
        >>> extraction_strength([7, 9, 3, 4], [7, 8, 3, 4])
        0.5
        >>> extraction_strength([[1, 2], [1, 2, 9]], [[1, 2], [1, 2, 3]])
        tensor([1., 0.], dtype=torch.float64)
    """
    examples, alone = _right_positions(predicted, labels)
    return per_example([_suffix_share(right) for right in examples], alone)


@overload
def exact_memorization(predicted: Tensor, labels: Tensor) -> float | Tensor: ...
@overload
def exact_memorization(predicted: Sequence[int], labels: Tokens) -> float: ...
@overload
def exact_memorization(predicted: TokensOfMany, labels: TokensOfMany | Tensor) -> Tensor: ...
def exact_memorization(predicted: Tokens | TokensOfMany, labels: Tokens | TokensOfMany) -> float | Tensor:
    r"""The share of the answer's tokens that are the model's first choice, given the right tokens before them.

    $$\mathrm{EM} = \frac{1}{T} \sum_t [\mathrm{predicted}_t = \mathrm{label}_t]$$

    On the forget set lower is better, down to the retrained model's score. That is far from 0, because much of a
    sentence can be guessed from its other words. It is never below `extraction_strength`.

    Source: Tirumala et al. 2022 (arXiv 2205.10770); open-unlearning computes the same without the eos.

    Args:
        predicted: argmax tokens of one example `[T]`, or of n examples, each `[T_i]`. A negative token stands for
            logits that were NaN, and makes the example's score NaN.
        labels: the answer's tokens in the same shape, already shifted; positions labelled -100 are left out.

    Returns:
        A float for one example, a float64 tensor `[n]` for n of them; in [0, 1].

    Raises:
        ValueError: if there is no example, an example has no labelled token, or the shapes differ.

    Example:
        >>> exact_memorization([7, 9, 3, 4], [7, 8, 3, 4])
        0.75
    """
    examples, alone = _right_positions(predicted, labels)
    return per_example([float(right.mean()) for right in examples], alone)


def _right_positions(predicted: Ragged, labels: Ragged) -> tuple[list[Tensor], bool]:
    """For each example `[T_i]` float64: 1 where the argmax is the label, 0 where not, NaN where there is no argmax."""
    tokens, alone = as_examples(predicted, "predicted", torch.int64)
    answers, labels_alone = as_examples(labels, "labels", torch.int64)
    if alone != labels_alone or len(tokens) != len(answers):
        raise ValueError(
            f"expected predicted and labels of as many examples, found {len(tokens)} and {len(answers)}"
            + (", one of them by itself" if alone != labels_alone else "")
        )
    return [_right(token, answer) for token, answer in zip(tokens, answers, strict=True)], alone


def _right(predicted: Tensor, labels: Tensor) -> Tensor:
    if predicted.shape != labels.shape:
        raise ValueError(f"expected a predicted token for each label, found {len(predicted)} and {len(labels)} of them")
    keep = labels != IGNORED
    if not keep.any():
        raise ValueError(f"expected at least one token of the answer, found {IGNORED} at every position of an example")
    right = (predicted == labels).double()
    return right.masked_fill(predicted < 0, torch.nan)[keep]


def _suffix_share(right: Tensor) -> float:
    """The share of `right` that comes after its last 0; NaN if it holds a NaN."""
    if right.isnan().any():
        return torch.nan
    wrong = (right == 0.0).nonzero()
    shown = int(wrong[-1]) + 1 if len(wrong) else 0
    return 1.0 - shown / len(right)
