"""What the numbers say: the sentences and small tables of both reports."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

from lightning_modules.data.heldout import RETAIN_HELDOUT
from lightning_modules.evaluation.intervals import Interval, mean_interval
from lightning_modules.report import attacks
from lightning_modules.report.attacks import moved_from
from lightning_modules.report.finished import MODELS, FinishedRun, number, shown
from lightning_modules.report.samples import degenerate
from lightning_modules.report.target import not_reached, nothing_to_forget

UNSURE = (
    "Intervals are 95 % percentile bootstrap intervals of the mean over the examples of a split (5000 draws, seed 0): how much it would "
    "move with other examples of the same kind. They take examples for independent; several questions about one author are not, so read "
    "them as the least that is uncertain."
)
ONE_SEED = (
    "This is one run with one seed. Nothing here says how far another seed would land: `gradsurgery report DIR OTHER_DIR ...` shows the "
    "spread over runs with other seeds, and `gradsurgery ablate --config GRID.yaml` runs methods over data and model seeds, compares them "
    "where they have forgotten equally much, with mean, spread and paired differences."
)


def summary(run: FinishedRun) -> list[str]:
    """Returns a sentence about the probability of each: the forget, the retain and the held-out retain answers."""
    said: list[str] = []
    for split, what in (("forget", "to forget"), ("retain", "to keep"), (RETAIN_HELDOUT, "to keep that no step saw")):
        after = run.value("after", split, "probability")
        if after is None:
            continue
        before, goal = (run.value(model, split, "probability") for model in ("before", "reference"))
        answers = f"the {run.metrics['after'][split]['n']} answers {what}"
        text = f"The mean probability of {answers} {moved_from(before, after)}"
        if split == "forget" and goal is not None:
            text += f"; a model that never saw them gives {shown(goal)}"
        if split != "forget" and before and after == after:
            text += f", {100.0 * after / before:.0f} % of what it was"
        said.append(text + ".")
    return said


MEMORISED = 0.5
"""A mean answer probability below this is no knowledge that could be forgotten."""


def little_to_forget(before: Mapping[str, Mapping[str, Any]] | None) -> str | None:
    """Returns a sentence if the model hardly knew what it was to forget; None if it knew it, or nobody measured it.

    Args:
        before: split -> the scores of the model before unlearning, as in metrics.json.
    """
    known = number((before or {}).get("forget", {}).get("probability"))
    if known is None or not known < MEMORISED:
        return None
    return (
        f"There is little to forget: the mean probability of the forget answers is {shown(known)} before unlearning, below {MEMORISED}; "
        "teach the model these answers first (gradsurgery finetune, or unlearn --finetune-first, with more epochs or a larger learning "
        "rate), or give the model that has learned them."
    )


def little_forgotten(metrics: Mapping[str, Any]) -> str | None:
    """Returns a sentence if a model that knew what it was to forget knows most of it still; else None.

    Args:
        metrics: the contents of metrics.json.
    """
    known, still = (
        number(((metrics[model] or {}).get("forget") or {}).get("probability")) for model in ("before", "after")
    )
    if known is None or still is None or known < MEMORISED or not still > 0.5 * known:
        return None
    return (
        f"Little was forgotten: the mean probability of the forget answers is {shown(still)}, {100.0 * still / known:.0f} % of what it "
        "was; raise --lr, or --steps or --epochs, in a new run."
    )


def warnings(run: FinishedRun) -> list[str]:
    """Returns what a reader must know before the numbers: a collapse, NaN, degenerate answers, shallow forgetting."""
    said: list[str] = []
    before, target = run.metrics["before"], run.training.get("target", {})
    level = target.get("forget_probability", run.config.get("stop_below"))
    # A benchmark says itself how much is known before; the probability of long plain texts does not.
    known_by_itself = bool(run.metrics.get("benchmarks"))
    if not known_by_itself:
        little = nothing_to_forget(before, level, target.get("of", "asked")) or little_to_forget(before)
        said += [] if little is None else [little]
    missed = not_reached(run.metrics) or (None if known_by_itself else little_forgotten(run.metrics))
    said += [] if missed is None else [missed]
    if collapse := run.training.get("collapse"):
        said.append(f"The collapse alarm stopped the run: {collapse['reason']}.")
    broken = sorted(
        f"{model} {split}"
        for model in MODELS
        for split, scores in (run.metrics[model] or {}).items()
        if any(number(value) != number(value) for value in scores.values() if value is not None)
    )
    if broken:
        said.append(f"Some scores are NaN, not a number: {', '.join(broken)}. The model diverged.")
    for split in run.metrics["after"]:
        now, then = degenerate(run, "after", split), degenerate(run, "before", split)
        if now and now[0] / now[1] > 0.05 and (then is None or now[0] / now[1] > then[0] / then[1]):
            earlier = "" if then is None else f", {then[0]} before"
            said.append(
                f"{now[0]} of {now[1]} answers to {split} questions are degenerate (empty, or repeating themselves){earlier}: this model "
                "does not answer them like one that never knew."
                if split == "forget"
                else f"{now[0]} of {now[1]} answers to {split} questions are degenerate (empty, or repeating themselves){earlier}."
            )
    return said + attacks.warnings(run)


def notes(run: FinishedRun) -> list[str]:
    """Returns what a reader would not expect, but which is no problem: whose weights the model has."""
    said: list[str] = []
    if searched := run.training.get("learning_rate"):
        how = "was found from" if searched.get("found", True) else "is the usual one: none was found from"
        said.append(
            f"The learning rate, {searched['lr']:g}, {how} {len(searched['points']) - 1} trial steps (`--lr auto`)."
        )
    best = run.training.get("best")
    if not best:
        return said
    how = "The model is that of" if best["restored"] else "best.ckpt has the weights of"
    return [
        *said,
        f"{how} step {best['step']:.0f} of {best['last_step']:.0f}, the best trade-off by the examples scored while training: the largest "
        f"retain probability where the forget probability is below {best['target']:g}, else the least forget probability.",
    ]


@dataclass(frozen=True)
class Conflict:
    """How the gradients of a run conflicted.

    Attributes:
        steps: The number of steps.
        conflicts: The number of steps in which forgetting and retention conflicted.
        cosine: The mean cosine of the forget and the retain gradient.
        coefficients: Objective -> the mean coefficient of its gradient; empty with an elementwise rule.
        sizes: Objective -> the mean of coefficient times norm of its gradient; empty like `coefficients`.
        raised: Protected objective -> the number of steps whose parameter change raises its loss to first order; empty
            if that was not measured.
    """

    steps: int
    conflicts: int
    cosine: float
    coefficients: dict[str, float]
    sizes: dict[str, float]
    raised: dict[str, int]

    def sentences(self) -> list[str]:
        """Returns the numbers in words."""
        said = [
            f"The forget and the retain gradient conflicted in {self.conflicts} of {self.steps} steps "
            f"({_percent(self.conflicts, self.steps)}), with a mean cosine of {self.cosine:+.3f} over all of them."
        ]
        if self.coefficients:
            parts = [
                f"{value:.3g} times the {name} gradient, of length {self.sizes[name]:.3g}"
                for name, value in self.coefficients.items()
            ]
            said.append(f"What the optimizer was given was on average {', and '.join(parts)}; clipping included.")
        for name, count in self.raised.items():
            said.append(
                f"What the optimizer made of it, the parameter change itself, raised the {name} loss to first order in {count} of "
                f"{self.steps} steps ({_percent(count, self.steps)})."
            )
        if not self.raised:
            said.append(
                "Whether the parameter change itself raised the retain loss was not measured: `--guard measure` does, and `--guard update` "
                "prevents it."
            )
        return said


def conflict(run: FinishedRun) -> Conflict | None:
    """Returns the conflict that surgery.csv records; None without that file."""
    if not run.surgery:
        return None

    def columns(prefix: str) -> dict[str, list[float]]:
        names = [name for name in run.surgery[0] if name.startswith(prefix)]
        return {name.removeprefix(prefix): [row[name] for row in run.surgery] for name in names}

    coefficients, norms = columns("coefficient_"), columns("norm_")
    return Conflict(
        steps=len(run.surgery),
        conflicts=sum(row["conflict"] != 0.0 for row in run.surgery),
        cosine=fmean(row["cosine"] for row in run.surgery),
        coefficients={name: fmean(values) for name, values in coefficients.items()},
        sizes={name: fmean(map(operator.mul, values, norms[name])) for name, values in coefficients.items()},
        raised={name: sum(value > 0.0 for value in values) for name, values in columns("actual_change_").items()},
    )


def _percent(part: int, whole: int) -> str:
    return f"{100.0 * part / whole:.0f} %"


class Difference(NamedTuple):
    """A difference of mean probabilities of two models on the same examples.

    Attributes:
        label: What is subtracted from what.
        mean: The mean difference.
        interval: Its confidence interval, from the differences of the examples; None for fewer than two.
    """

    label: str
    mean: float
    interval: Interval | None


def differences(run: FinishedRun) -> list[Difference]:
    """Returns how far the forget probability is from the reference's, and how both probabilities changed."""
    found: list[Difference] = []
    for split, other, label in (
        ("forget", "reference", "forget probability, after minus reference"),
        ("forget", "before", "forget probability, after minus before"),
        ("retain", "before", "retain probability, after minus before"),
        (RETAIN_HELDOUT, "before", "held-out retain probability, after minus before"),
    ):
        ours, theirs = run.rows("after", split), run.rows(other, split)
        same = [(row["question"], row["answer"]) for row in ours] == [
            (row["question"], row["answer"]) for row in theirs
        ]
        if not ours or not same or any(row["probability"] is None for row in [*ours, *theirs]):
            continue
        values = [mine["probability"] - their["probability"] for mine, their in zip(ours, theirs, strict=True)]
        found.append(Difference(label, fmean(values), mean_interval(values)))
    return found


def between(interval: Interval | None) -> str:
    """Returns an interval in brackets; an empty text for None."""
    return "" if interval is None else f"[{shown(interval.low)}, {shown(interval.high)}]"


def interval_of(run: FinishedRun, model: str, split: str, column: str) -> Interval | None:
    """Returns the confidence interval of one cell of the table; None without a log of the examples."""
    values = [row[column] for row in run.rows(model, split) if row[column] is not None]
    return mean_interval(values)
