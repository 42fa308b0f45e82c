"""How the scores of one configuration differ over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from lightning_modules.folder import CURVE
from lightning_modules.report.finished import MODELS, FinishedRun, columns


class ScoreOverSeeds(NamedTuple):
    """A score of one split and model, over the runs.

    Attributes:
        split: The split that was scored.
        model: "before", "after" or "reference".
        heading: The score's name in the tables.
        value: The score of the run whose report this is.
        mean: Its mean over the runs.
        sd: Its sample standard deviation, with divisor n - 1; None for one run.
        low: The smallest score.
        high: The largest score.
        n: The number of runs that have the score.
    """

    split: str
    model: str
    heading: str
    value: float
    mean: float
    sd: float | None
    low: float
    high: float
    n: int


def scores_over_seeds(run: FinishedRun) -> list[ScoreOverSeeds]:
    """Returns every score of the main table, over the runs that have it; an empty list for a single run.

    A run that diverged is not left out: where a score is not finite in one run, its mean, standard deviation, smallest
    and largest value are NaN.
    """
    if not run.others:
        return []
    found: list[ScoreOverSeeds] = []
    for split in run.metrics["after"]:
        for model in MODELS:
            for column, heading in columns(run):
                value = run.value(model, split, column)
                if value is None:
                    continue
                beside = (other.value(model, split, column) for other in run.others)
                found.append(
                    ScoreOverSeeds(split, model, heading, value, *_over([value, *(x for x in beside if x is not None)]))
                )
    return found


def _over(values: Sequence[float]) -> tuple[float, float | None, float, float, int]:
    if not all(map(math.isfinite, values)):
        return math.nan, math.nan, math.nan, math.nan, len(values)
    return fmean(values), stdev(values) if len(values) > 1 else None, min(values), max(values), len(values)


def sd_factors(n: int, confidence: float = 0.95) -> tuple[float, float]:
    r"""Returns a confidence interval of the true standard deviation, as multiples of the one of n normal values.

    $$\sqrt{(n - 1) / \chi^2_{n-1, (1 + c) / 2}}, \qquad \sqrt{(n - 1) / \chi^2_{n-1, (1 - c) / 2}}$$

    Args:
        n: The number of values.
        confidence: c, in (0, 1).

    Raises:
        ValueError: For fewer than two values, or a confidence outside (0, 1).

    Example:
        >>> [round(factor, 2) for factor in sd_factors(3)]
        [0.52, 6.28]
    """
    if n < 2 or not 0.0 < confidence < 1.0:
        raise ValueError(f"sd_factors: expected n >= 2 and a confidence in (0, 1), found {n} and {confidence}")
    from scipy.stats import chi2

    low, high = (math.sqrt((n - 1) / float(chi2.ppf(0.5 + side * confidence / 2.0, n - 1))) for side in (1, -1))
    return low, high


def sentences(run: FinishedRun) -> list[str]:
    """Returns what differs between the runs, what does not, and how uncertain so few are; nothing for a single run."""
    if not run.others:
        return []
    n = 1 + len(run.others)
    seeds = _listed([f"{run.config['seed']} (this one)", *_seeds(run.others)])
    said = [
        f"{n} runs of this configuration were made, with seeds {seeds}.",
        _varied(run.config),
        "The standard deviation is that of single runs (divisor n - 1): how far another seed lands, not how well the mean is known.",
    ]
    low, high = sd_factors(n)
    if n == 2:
        said.append("A standard deviation of two is hardly one: it is their distance divided by the square root of 2.")
    said.append(
        f"It is itself uncertain: for {n} normally distributed values the true standard deviation is {low:.2g} to {high:.2g} times the one "
        f"shown (95 % interval, chi-squared with {n - 1} degree{'' if n == 2 else 's'} of freedom)."
    )
    levels = [level for level in (each.config.get("stop_below") for each in (run, *run.others)) if level]
    if levels:
        least, most = min(levels), max(levels)
        level = f"{least:g} (`--stop-below`)" if least == most else f"its reference's level, {least:g} to {most:g} here"
        said.append(
            f"A run stops once the mean probability of the forget answers is below {level}. Among runs that stopped so, that score is "
            "nearly the same whatever the seed: look at what was kept."
        )
    for name, value in run.metrics["versions"].items():
        versions = {str(value), *(str(other.metrics["versions"].get(name)) for other in run.others)}
        if len(versions) > 1:
            said.append(
                f"The runs were made with different versions of {name} ({', '.join(sorted(versions))}), which the spread holds too."
            )
    stopped = [other for other in run.others if other.training.get("collapse")]
    if stopped:
        said.append(f"The collapse alarm stopped the run{'s' if len(stopped) > 1 else ''}{_with(stopped)}.")
    if any(row.mean != row.mean for row in scores_over_seeds(run)):
        said.append("Where a score is not finite in some run, its spread is NaN: no run was left out.")
    return said


def curves(run: FinishedRun) -> str | None:
    """Returns what the thin lines of the figure are; None for a single run or one without a curve."""
    drawn, lacking = [other for other in run.others if other.curve], [other for other in run.others if not other.curve]
    if not run.curve or not run.others:
        return None
    parts = [f"Thin lines: the same configuration{_with(drawn)}."] if drawn else []
    if lacking:
        parts.append(f"The run{'s' if len(lacking) > 1 else ''}{_with(lacking)} left no {CURVE} that can be read.")
    return " ".join(parts)


def _varied(config: Mapping[str, Any]) -> str:
    """Returns a sentence about what --seed decides, and what it does not."""
    scratch, reference = config.get("model") == "scratch", config.get("reference")
    taught = scratch or bool(config.get("finetune_first"))
    parts = [
        "the order in which the examples are trained on",
        "which examples to keep a run sees at all if it is shorter than a pass over them",
    ]
    if _is_refusing(config):
        parts.append("which refusal each answer to forget gets")
    if not scratch:
        parts.append("what dropout leaves out, in a model that has any")
    if config.get("lora_rank"):
        parts.append("the first weights of the adapters")
    if config.get("retain_noise"):
        parts.append("which tokens of the noised retain examples are replaced")
    if taught:
        model = "the small model that is trained from scratch first" if scratch else "the target that is taught first"
        parts.append(model + (", and with it the reference" if reference is None else ""))
    same = "" if taught else "the model before, "
    same += "" if reference is None else "the reference, "
    return (
        f"Another seed changes {_listed(parts)}. It does not change {same}the sets to forget and to keep, or the examples scored: the "
        "spread says nothing about other data."
    )


def _is_refusing(config: Mapping[str, Any]) -> bool:
    """Whether the run trained on refusals. ULD uses none, and a loss that this version does not know counts as none."""
    from lightning_modules.training import objectives

    loss = config.get("forget_loss")
    return (
        config.get("method") != "uld"
        and loss in objectives.NAMES
        and objectives.needs_refusals(objectives.by_name(loss))
    )


def _with(runs: Sequence[FinishedRun]) -> str:
    return f" with seed{'s' if len(runs) > 1 else ''} {_listed(_seeds(runs))}"


def _seeds(runs: Sequence[FinishedRun]) -> list[str]:
    return [str(other.config["seed"]) for other in runs]


def _listed(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(parts[:-1]), *parts[-1:])))
