"""How well membership scores tell the forget set from other text, relative to a model that never saw it."""

from __future__ import annotations

import math

import torch

from lightning_modules.metrics.functional.numbers import Numbers, as_numbers


def auc(forget_scores: Numbers, holdout_scores: Numbers) -> float:
    r"""The area under the ROC curve of an attack that calls examples with a high score members.

    $$\mathrm{AUC} = P(s_{\mathrm{forget}} > s_{\mathrm{holdout}}) +
    \tfrac{1}{2} P(s_{\mathrm{forget}} = s_{\mathrm{holdout}})$$

    which is the Mann-Whitney statistic, computed exactly, with ties counted half. 1 says that the forget set is
    remembered, 0 that it stands out because it was unlearned too far. A model that never saw it usually does *not*
    score 1/2, because the forget and the holdout set differ in more than membership. So compare with the retrained
    model instead of 1/2 (`priv_leak`).

    open-unlearning's `mia_auc` is the same number (its scores and its labels are both reversed); MUSE prints 1 - AUC.
    Cost: O((n + m) log m).

    Args:
        forget_scores: membership scores of the forget set, `[n]`; higher: more likely a member.
        holdout_scores: of examples that no model was trained on, `[m]`.

    Returns:
        A float in [0, 1]; NaN if a score is NaN, which has no rank.

    Raises:
        ValueError: if a sample is empty or not one-dimensional.

    Example:
        >>> auc([3.0, 1.0], [2.0, 1.0])
        0.625
    """
    members, _ = as_numbers(forget_scores, "forget_scores", "[n]", dimensions=1)
    others, _ = as_numbers(holdout_scores, "holdout_scores", "[m]", dimensions=1)
    if members.isnan().any() or others.isnan().any():
        return math.nan
    ordered = others.sort().values
    below = torch.searchsorted(ordered, members) + torch.searchsorted(ordered, members, right=True)
    return float(below.sum()) / (2 * len(members) * len(others))


def priv_leak(auc: float, reference_auc: float) -> float:
    r"""PrivLeak: how far an attack on the unlearned model is from the same attack on the retrained one, in percent.

    $$\mathrm{PrivLeak} = 100 \cdot
    \frac{(1 - \mathrm{AUC}) - (1 - \mathrm{AUC}_{\mathrm{ref}})}{1 - \mathrm{AUC}_{\mathrm{ref}}}$$

    0 is best: the attack does on the unlearned model as well as on one that never saw the forget set. Below 0 the set
    is still remembered (-100 at AUC 1), above 0 it was unlearned too far. There is no upper bound: with a reference of
    .98, an AUC of 0 gives +4900.

    Source: MUSE (Shi et al. 2024, arXiv 2407.06460), (AUC - AUC_ref) / AUC_ref, where *its* AUC is 1 - AUC of ours.
    open-unlearning's `privleak` computes the formula above from AUCs in our direction, and adds 1e-10 to the
    denominator. Both use Min-K% with k = 0.4. Without a reference open-unlearning takes 1/2; here it has to be given.

    Args:
        auc: `auc(forget_scores, holdout_scores)` of the unlearned model, in [0, 1].
        reference_auc: the retrained model's, with the same attack on the same two sets, in [0, 1).

    Returns:
        A float, in percent; NaN if an AUC is NaN.

    Raises:
        ValueError: if an AUC is not in [0, 1], or the reference's is 1, where the formula divides by 0.

    Example:
        >>> priv_leak(1.0, 0.5), priv_leak(0.5, 0.5), priv_leak(0.0, 0.5)
        (-100.0, 0.0, 100.0)
    """
    for name, value in (("auc", auc), ("reference_auc", reference_auc)):
        if not (0.0 <= value <= 1.0 or math.isnan(value)):
            raise ValueError(f"expected {name} between 0 and 1, found {value}")
    if reference_auc == 1.0:
        raise ValueError(
            "expected reference_auc below 1, found 1: PrivLeak divides by 1 - reference_auc. The reference separates the two "
            "sets perfectly: was it trained on the forget set, or is the holdout set of another kind?"
        )
    return 100.0 * ((reference_auc - auc) / (1.0 - reference_auc))
