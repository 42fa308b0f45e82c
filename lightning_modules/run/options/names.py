"""The names of rules and losses, for the parser: the tables that hold the functions need torch, which takes seconds.

A test holds them to the tables, `gradsurgery.rules.RULES`, `gradsurgery.rules.elementwise.ELEMENTWISE` and
`objectives.NAMES`.
"""

from __future__ import annotations

RULES = (
    *("sum", "gradient_difference", "gru", "a_gem", "gem", "cos_clip", "pcgrad", "gradvac", "cagrad", "mgda", "imtl_g"),
    *("nash_mtl", "aligned_mtl", "upgrad", "ngdiff", "blur", "gu", "orthograd", "hamu", "hamu_u"),
    *("sago", "sign_agreement", "cglearn", "graddrop", "saliency_mask"),
)

NO_RULE = "none"
"""The forget gradient as it is."""

LOSSES = (
    *("cross_entropy", "gradient_ascent", "ceu", "inverted_hinge", "weighted_gradient_ascent", "satimp"),
    *("unlikelihood", "jensen_shannon_label"),
    *("npo", "simnpo", "dpo"),
    *("undial", "kl_divergence", "uniform", "logit_margin", "jensen_shannon"),
    *("idk", "jensun"),
)

REFUSING = ("dpo", "idk", "jensun")
"""Losses that teach a refusal or another answer instead."""

IMITATING = ("kl_divergence", "undial")
"""Losses that compare with a teacher where there is one, `objectives.distillation`."""
