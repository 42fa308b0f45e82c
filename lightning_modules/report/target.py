"""Whether a run reached the forget probability that it was to end at, in sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_modules.report.finished import number
from lightning_modules.report.terminal import shown


def nothing_to_forget(
    before: Mapping[str, Mapping[str, Any]] | None, level: float | None, of: str = "asked"
) -> str | None:
    """Returns a sentence if the model is at its target before unlearning; None if it is not, or nobody measured it.

    Args:
        before: split -> the scores of the model before unlearning, as in metrics.json.
        level: What the mean probability of the forget answers is to fall below; None or 0 where there is no target.
        of: Whose level it is: "reference", "usual" where nobody named one, or "asked".
    """
    known = number((before or {}).get("forget", {}).get("probability"))
    if known is None or not level or not (known < level or (of != "asked" and known == level)):
        return None
    goal = {
        "reference": f"that of the reference, which never saw them, is {shown(level)}",
        "usual": f"a run usually ends below {level:g}",
    }.get(of, f"--stop-below is {level:g}")
    after = (
        "no step is taken" if of == "asked" else "this one takes all its steps, unless --stop-below says when to end"
    )
    return (
        f"There is nothing to forget: the mean probability of the forget answers is {shown(known)} before unlearning already, and {goal}; "
        f"{after}."
    )


def not_reached(metrics: Mapping[str, Any]) -> str | None:
    """Returns what was reached, and what to raise; None where the target was reached, or there was none.

    Args:
        metrics: The contents of metrics.json.
    """
    target = metrics.get("target")
    if not target or target["reached"]:
        return None
    level, found = number(target["forget_probability"]), number(target["found"])
    text = (
        f"The target was not reached: the run took {target['steps']} optimizer steps and ended with a mean probability of the scored "
        f"forget answers of {shown(found)}, which was to fall below {level:g}"
    )
    if above := target.get("above"):
        return (
            f"{text}; what the ledger holds to a limit did not: {', '.join(above)}. Raise --ledger-weight, --steps or --epochs, in a new "
            "run."
        )
    trained = number(target.get("trained"))
    if trained is not None and level is not None and trained < level:
        how = {
            "--finish-steps": "the finish after it brought it back; take fewer --finish-steps, or a lower --stop-below",
            "--best-below": "its weights are of an earlier step; take a lower --best-below",
        }[target["changed_by"]]
        return f"{text}; training had come to {shown(trained)}, and {how}, in a new run."
    if target["stopped_early"]:
        return f"{text}; it was stopped before its last step."
    words = (
        ", or forget the words of the questions too, --keep-asked-words false,"
        if target.get("keep_asked_words")
        else ","
    )
    return f"{text}; raise --lr, or --steps or --epochs{words} in a new run."
