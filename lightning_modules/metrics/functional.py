r"""Pure metric functions: numbers in, numbers out, no model and no state.

Notation: n examples, m perturbed (wrong) answers each; `nll` is the mean negative log-likelihood per token of an answer
given its question, in nats, with the eos counted.

Source: TOFU (Maini et al. 2024, arXiv 2401.06121, section 2.2) as its `aggregate_eval_stat.py` computes it; this is the
definition behind the published tables. Two other definitions circulate under the same names. They differ by up to .12,
and every docstring here says where.

Inputs may be tensors or sequences of numbers. Arithmetic is float64; a float32 tensor gives a float32 result. Invalid
shapes and unknown kinds are a `ValueError`. A NaN stays a NaN: a diverged model must not be mistaken for one that
forgot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

Numbers = Tensor | Sequence[float]

TRUTH_RATIO_KINDS = ("ratio", "forget", "utility")
ROUGE_KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def answer_probability(answer_nll: Numbers) -> Tensor:
    r"""The probability of the answer, normalised for its length: the geometric mean of its tokens' probabilities.

    .. math:: p_i = \exp(-\mathrm{nll}_i) = P(\mathrm{answer}_i \mid \mathrm{question}_i)^{1 / \mathrm{tokens}_i}

    TOFU, section 2.2.2. locuslab/tofu and open-unlearning agree on it. ULD's published tables print something else
    under "Forget Probability": the share of the answer among the options, `p / (p + sum of the perturbed)` (.364 where
    this gives .144).

    Args:
        answer_nll: `[n]`.

    Returns:
        `[n]`, in [0, 1].

    Example:
        >>> answer_probability([0.0, 0.6931471805599453])
        tensor([1.0000, 0.5000], dtype=torch.float64)
    """
    nll, dtype = _numbers(answer_nll, "answer_nll", "[n]", dimensions=1)
    return torch.exp(-nll).to(dtype)


def truth_ratio(
    paraphrase_nll: Numbers, perturbed_nll: Tensor | Sequence[Sequence[float]], kind: str = "ratio"
) -> Tensor:
    r"""How likely wrong answers are, relative to a paraphrase of the right one.

    .. math::
        \log R_i = \mathrm{nll}^{\mathrm{paraphrase}}_i - \frac{1}{m} \sum_j \mathrm{nll}^{\mathrm{perturbed}}_{ij}

    so that R is (geometric mean of the wrong answers' probabilities) / (the right one's): below 1 for a model that
    knows the answer, around 1 for one that does not. All in log space, so that a diverged model (nll of 1000) gives
    finite numbers.

    - `"ratio"`: R itself, what `forget_quality` compares (at most the largest number of its dtype);
    - `"forget"`: min(R, 1/R) = exp(-abs(log R)), near 1 when the model cannot tell right from wrong: higher is better
      forgotten;
    - `"utility"`: max(0, 1 - R), higher is better known (retain, real authors and world facts).

    TOFU, equation 1 and section 2.2.2. Other code bases: `get_model_utility` in locuslab's utils.py takes the
    arithmetic mean over the perturbed probabilities (.449 for .472 on a retain model's retain set); open-unlearning
    adds 1e-10 to the denominator (equal to 2e-8 on published logs, but never above 1e10); locuslab's per-example logs
    and their KS test use 1/R (the p-value is the same).

    Args:
        paraphrase_nll: of the paraphrased answer, `[n]`. Where there is no paraphrase, TOFU uses the answer itself.
        perturbed_nll: of the wrong answers, `[n, m]`.
        kind: `"ratio"`, `"forget"` or `"utility"`.

    Returns:
        `[n]`.

    Example:
        >>> truth_ratio([2.0], [[1.0, 2.0]], kind="ratio")
        tensor([1.6487], dtype=torch.float64)
        >>> truth_ratio([2.0], [[1.0, 2.0]], kind="forget")
        tensor([0.6065], dtype=torch.float64)
        >>> truth_ratio([1.0], [[1000.0, 3000.0]], kind="utility")
        tensor([1.], dtype=torch.float64)
    """
    if kind not in TRUTH_RATIO_KINDS:
        raise ValueError(f"expected kind to be one of {', '.join(TRUTH_RATIO_KINDS)}, found {kind!r}")
    paraphrase, dtype = _numbers(paraphrase_nll, "paraphrase_nll", "[n]", dimensions=1)
    perturbed, _ = _numbers(perturbed_nll, "perturbed_nll", "[n, m]", dimensions=2)
    if len(paraphrase) != len(perturbed):
        raise ValueError(
            "expected paraphrase_nll [n] and perturbed_nll [n, m] with the same n, "
            f"found {list(paraphrase.shape)} and {list(perturbed.shape)}"
        )
    log_ratio = paraphrase - perturbed.mean(dim=-1)
    if kind == "forget":
        return torch.exp(-log_ratio.abs()).to(dtype)
    if kind == "utility":
        return (-torch.expm1(log_ratio)).clamp(min=0).to(dtype)  # expm1: 1 - R keeps its digits where R is near 1
    return log_ratio.exp().clamp(max=torch.finfo(dtype).max).to(dtype)


@overload
def rouge_recall(prediction: str, target: str, kind: str = ..., use_stemmer: bool = ...) -> float: ...
@overload
def rouge_recall(
    prediction: list[str] | tuple[str, ...],
    target: list[str] | tuple[str, ...],
    kind: str = ...,
    use_stemmer: bool = ...,
) -> Tensor: ...
def rouge_recall(
    prediction: str | Sequence[str], target: str | Sequence[str], kind: str = "rougeL", use_stemmer: bool = True
) -> float | Tensor:
    """The share of the target's words that the prediction gives back, in order (ROUGE-L) or in any order (ROUGE-1).

    Source: Lin 2004, as the `rouge-score` package computes it, recall only. TOFU stems (without it .4015 for .4082 on a
    forget set) and reports recall; the F1 that other packages print by default is another number (.287 for .923),
    because it punishes full sentences. open-unlearning strips the text and cuts it at stop words first; here text is
    scored as it comes. Words are runs of a-z and 0-9: a text in another script scores 0.

    Args:
        prediction: the model's text, or n of them.
        target: the right text, or n of them.
        kind: `"rouge1"`, `"rouge2"`, `"rougeL"` or `"rougeLsum"`.
        use_stemmer: compare Porter stems.

    Returns:
        A float for two strings, a float64 tensor `[n]` for two lists.

    Example:
        >>> rouge_recall("He wrote the novel in Lima", "The novel")
        1.0
        >>> rouge_recall(["a b", "c"], ["a b c d", "d"])
        tensor([0.5000, 0.0000], dtype=torch.float64)
    """
    if kind not in ROUGE_KINDS:
        raise ValueError(f"expected kind to be one of {', '.join(ROUGE_KINDS)}, found {kind!r}")
    scorer = _scorer(kind, use_stemmer)
    if isinstance(prediction, str) and isinstance(target, str):
        return float(scorer.score(target, prediction)[kind].recall)
    if isinstance(prediction, str) or isinstance(target, str):
        raise ValueError("expected two strings or two lists of strings, found one of each")
    if len(prediction) != len(target) or not prediction:
        raise ValueError(
            f"expected as many predictions as targets, and at least one, found {len(prediction)} and {len(target)}"
        )
    recalls = [scorer.score(right, text)[kind].recall for text, right in zip(prediction, target, strict=True)]
    return torch.tensor(recalls, dtype=torch.float64)


class ForgetQualityResult(NamedTuple):
    """A two-sample Kolmogorov-Smirnov test. `log10_pvalue` is finite where `pvalue` underflows; `n` is the first sample's size."""

    statistic: float
    pvalue: float
    log10_pvalue: float
    n: int


def forget_quality(truth_ratio: Numbers, reference_truth_ratio: Numbers) -> ForgetQualityResult:
    """Whether two models' truth ratios on the forget set can be told apart: TOFU's forget quality.

    The p-value of the two-sample Kolmogorov-Smirnov test between the truth ratios R of the unlearned model and of one that
    never saw the forget set (TOFU, section 2.2.2; exact up to 10,000 examples, as scipy does). High is better: 1 for the
    retrained model itself, and for a model that still knows everything about 1e-3, 1e-14 and 1e-20 on TOFU's 1, 5 and
    10 % splits, because p falls with n at equal statistic. The test sees ranks only, so R and 1/R give the same.

    Args:
        truth_ratio: `[n]`, `truth_ratio(..., kind="ratio")` of the unlearned model.
        reference_truth_ratio: `[m]`, of the reference.

    Raises:
        ValueError: if a sample is empty or not one-dimensional, or holds a NaN, which has no rank.

    Example:
        >>> forget_quality([0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4])
        ForgetQualityResult(statistic=0.0, pvalue=1.0, log10_pvalue=0.0, n=4)
    """
    from scipy.stats import ks_2samp

    ours, _ = _numbers(truth_ratio, "truth_ratio", "[n]", 1)
    theirs, _ = _numbers(reference_truth_ratio, "reference_truth_ratio", "[m]", 1)
    for name, values in (("truth_ratio", ours), ("reference_truth_ratio", theirs)):
        if values.isnan().any():
            raise ValueError(f"{name}: expected numbers that can be ranked, found NaN: the model diverged")
    result: Any = ks_2samp(ours.cpu().numpy(), theirs.cpu().numpy())
    statistic, pvalue, n, m = float(result.statistic), float(result.pvalue), len(ours), len(theirs)
    # Where the exact p underflows, the leading term of its asymptotic series 2 exp(-2 D^2 nm/(n+m)) is all that is left.
    tail = math.log10(2.0) - 2.0 * statistic**2 * n * m / (n + m) / math.log(10.0)
    return ForgetQualityResult(statistic, pvalue, math.log10(pvalue) if pvalue > 0.0 else tail, n)


@lru_cache(maxsize=8)
def _scorer(kind: Literal["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer: bool) -> RougeScorer:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("ROUGE needs the rouge-score package: pip install rouge-score") from error
    return RougeScorer([kind], use_stemmer=use_stemmer)


def _numbers(values: object, name: str, shape: str, dimensions: int) -> tuple[Tensor, torch.dtype]:
    """Returns `values` as a float64 tensor of the given number of dimensions, and the dtype of the answer."""
    single = isinstance(values, Tensor) and values.dtype in (torch.float32, torch.bfloat16, torch.float16)
    try:
        tensor = torch.as_tensor(values, dtype=torch.float64)
    except (TypeError, ValueError) as error:
        found = type(values).__name__
        raise ValueError(f"expected {name} as numbers of shape {shape}, found {found}: {error}") from error
    if tensor.ndim != dimensions or not tensor.numel():
        raise ValueError(f"expected {name} of shape {shape} and not empty, found {list(tensor.shape)}")
    return tensor, torch.float32 if single else torch.float64
