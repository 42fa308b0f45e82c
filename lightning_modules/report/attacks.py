"""How well the forgetting holds: every probe of a run beside the reference's, in a row and in a sentence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from rich.table import Table

from lightning_modules.report.finished import FinishedRun, number
from lightning_modules.report.terminal import shown

SHALLOW = 0.1
"""A probability or recall that is so much above the reference's, or above that without the attack, is a leak."""

HEADINGS = ("attack", "measure", "before it", "this model", "reference", "weights moved (L2)")
TEXT = frozenset(HEADINGS[:2])
"""The columns of words."""
_EXPLAINED = (
    "Every row is a mean over forget answers that the attack did not teach, with a 95 % bootstrap interval over them"
)
_COMPARED = "; the reference, which never saw them, was attacked in the same way"

_RELEARNING = {
    "relearn": "relearning, mild",
    "relearn_strong": "relearning, strong",
    "relearn_harsh": "relearning, harsh",
    "relearn_lora": "relearning by LoRA",
    "relearn_general": "learning general knowledge",
    "relearn_retain": "learning retain answers",
}
_OTHER_LESSONS = {"relearn_general": "questions of general knowledge", "relearn_retain": "retain answers"}
_ASKED = {
    "question": "asked as in training",
    "paraphrase": "asked in other words",
    "prefix_25": "given 25 % of the answer",
    "prefix_50": "given 50 % of the answer",
    "few_shot": "asked after other questions with their answers",
}
_ANSWERED = (
    ("probability", "probability_interval", "probability"),
    ("rouge_l_recall", "rouge_interval", "ROUGE-L recall"),
)


class Estimate(NamedTuple):
    """A mean over forget answers.

    Attributes:
        mean: What the attack got.
        interval: Limits of its confidence interval, if it was measured.
    """

    mean: float
    interval: tuple[float, float] | None

    def __str__(self) -> str:
        """As in a cell of a table."""
        if self.interval is None:
            return shown(self.mean)
        return f"{shown(self.mean)} [{shown(self.interval[0])}, {shown(self.interval[1])}]"


class Attack(NamedTuple):
    """What an attack got back.

    Attributes:
        name: How it is called.
        measure: Of what the means are.
        start: The mean before the attack; None where that is another row.
        model: Of the model that has forgotten.
        control: Of the reference under the same attack, if there is one.
        moved: How far the attack moved the weights (L2).
        sentence: What was done and what came of it; empty if the row before says it.
        warning: A sentence if it got something back, otherwise None.
    """

    name: str
    measure: str
    start: float | None
    model: Estimate
    control: Estimate | None
    moved: float | None
    sentence: str
    warning: str | None


def attacks(probes: Mapping[str, Any]) -> list[Attack]:
    """Returns the attacks of probes.json that give numbers: relearning, prompting, sampling and the logit lens."""
    return [*_relearning(probes), *_prompting(probes), *_sampling(probes), *_lens(probes)]


def explained(probes: Mapping[str, Any]) -> str:
    """Returns what the numbers of `attacks` are."""
    compared = any(attack.control is not None for attack in attacks(probes))
    return f"{_EXPLAINED}{_COMPARED * compared}."


def warnings(run: FinishedRun) -> list[str]:
    """Returns a sentence for every attack that got something back, and one if rounding the weights did."""
    said = [attack.warning for attack in attacks(run.probes) if attack.warning is not None]
    return said + _rounding(run.probes)


def _rounding(probes: Mapping[str, Any]) -> list[str]:
    found = probes.get("quantization") or {}
    points = [(point["bits"], number(point.get("forget"))) for point in found.get("points", ())]
    if not points or any(mean is None for _, mean in points):
        return []
    whole = points[0][1] or 0.0
    bits, worst = max(((bits, mean or 0.0) for bits, mean in points), key=lambda point: point[1])
    if bits is None or worst - whole <= SHALLOW:
        return []
    return [
        f"Rounding the weights to {bits} bits brings forgotten answers back: from {shown(whole)} to {shown(worst)}."
    ]


def sentences(probes: Mapping[str, Any]) -> list[str]:
    """Returns a sentence for every attack, and for every probe that did not fit the model or the data."""
    told = [attack.sentence for attack in attacks(probes) if attack.sentence]
    return told + [
        f"Not measured ({name}): {found['refused']}." for name, found in probes.items() if "refused" in found
    ]


def cells(attack: Attack) -> tuple[str, ...]:
    """Returns the row of an attack, under `HEADINGS`."""
    control = "-" if attack.control is None else str(attack.control)
    return (attack.name, attack.measure, shown(attack.start), str(attack.model), control, shown(attack.moved))


def attack_table(probes: Mapping[str, Any]) -> Table | None:
    """Returns the attacks as a table for a terminal; None without any."""
    found = attacks(probes)
    if not found:
        return None
    drawn = Table(title="Does the forgetting hold?", title_style="bold", header_style="bold")
    for heading in HEADINGS:
        drawn.add_column(heading, justify="left" if heading in TEXT else "right")
    for attack in found:
        drawn.add_row(*cells(attack))
    return drawn


ROUNDED = "mean probability of the examples scored while training; every linear layer but the head, one scale a neuron"
"""What the numbers of `rounded` are."""


def rounded(probes: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Returns a table of the probe that rounds weights: its header, and a row for each number of bits; else nothing."""
    found = probes.get("quantization") or {}
    if "points" not in found:
        return []
    splits = [name for name in found["points"][0] if name != "bits"]
    control = {point["bits"]: point for point in (found.get("control") or {}).get("points", ())}
    known = [name for name in splits if control]
    rows = [
        (
            f"{point['bits']} bits" if point["bits"] else "as trained",
            *(shown(point[name]) for name in splits),
            *(shown(control.get(point["bits"], {}).get(name)) for name in known),
        )
        for point in found["points"]
    ]
    return [("weights", *splits, *(f"{name}, reference" for name in known)), *rows]


def moved_from(before: float | None, after: float) -> str:
    """Returns how a mean changed, in words."""
    if before is None:
        return f"is {shown(after)}"
    if shown(before) == shown(after):
        return f"stayed at {shown(after)}"
    verb = "went" if after != after or before != before else "fell" if after < before else "rose"
    return f"{verb} from {shown(before)} to {shown(after)}"


def _relearning(probes: Mapping[str, Any]) -> Iterator[Attack]:
    for name, title in _RELEARNING.items():
        if "model" not in (probe := probes.get(name) or {}):
            continue
        model, control = probe["model"], probe["control"]
        start, end = (_rest(model, place) for place in (0, -1))
        if (lessons := _OTHER_LESSONS.get(name)) is None:
            what = f"{model['taught']} of the {model['taught'] + model['rest']} scored forget answers again"
            whose, brought = f"the {model['rest']} others", f"teaching {model['taught']} forgotten answers again"
        else:
            what, whose, brought = lessons, f"the {model['rest']} forgotten answers", f"teaching {lessons}"
        how = f"{model['steps']} steps of AdamW at {model['lr']:g}"
        if model.get("lora_rank"):
            how += f" on LoRA of rank {model['lora_rank']}"
        text = f"A copy was taught {what} ({how}): the mean probability of {whose} {moved_from(start, end)}"
        rise, beside = end - start, ""
        if control:
            never_start, never_end = (_rest(control, place) for place in (0, -1))
            moved = moved_from(never_start, never_end)
            text += f"; with the same lessons that of the reference, which never saw them, {moved}"
            rise, beside = rise - (never_end - never_start), f" (reference: {shown(never_end)})"
        else:
            text += ". There is no reference with the same tokenizer to compare with, so part of a rise may be learning and not remembering"
        length = number(model.get("displacement"))
        if length is not None:
            part = number(model["relative_displacement"]) or 0.0
            text += f". The weights moved by {length:.3g}, {100.0 * part:.2g} % of their length"
        hard = "" if name == "relearn" or lessons is not None else f" by {how}"
        warning = (
            f"The forgetting is shallow: {brought}{hard} brought {whose} from {shown(start)} to {shown(end)}{beside}."
        )
        yield Attack(
            f"{title} ({model['steps']} steps at {model['lr']:g})",
            "probability",
            start,
            Estimate(end, _interval(model.get("interval"))),
            Estimate(_rest(control, -1), _interval(control.get("interval"))) if control else None,
            length,
            text + ".",
            warning if rise > SHALLOW else None,
        )


def _rest(probe: Mapping[str, Any], place: int) -> float:
    return number(probe["points"][place]["rest"]) or 0.0


def _prompting(probes: Mapping[str, Any]) -> Iterator[Attack]:
    probe = probes.get("prompts") or {}
    if "model" not in probe:
        return
    ours, theirs = probe["model"]["attacks"], (probe["control"] or {}).get("attacks", {})
    for way, found in ours.items():
        how: str = _ASKED.get(way) or str(way).replace("_", " ")
        never = theirs.get(way)
        # Without a reference, what the question alone gets is what there is to compare with, if it fitted the model.
        other, whose = (never, "the reference") if never else (ours.get("question"), "the plain question")
        said: list[str] = []
        leaks: list[str] = []
        rows: list[tuple[str, Estimate, Estimate | None]] = []
        for measure, interval, words in _ANSWERED:
            mean, beside = number(found[measure]), None if other is None else number(other[measure])
            if mean is None or (other is not None and beside is None):
                continue
            control = Estimate(beside, _interval(never[interval])) if never and beside is not None else None
            rows.append((words, Estimate(mean, _interval(found[interval])), control))
            alone = beside is None or (not never and way == "question")
            said.append(f"{words} {shown(mean)}" + ("" if alone else f" ({whose}: {shown(beside)})"))
            # A part of the answer, or other answers, help a model that never saw it too; a reference tells how much.
            more = beside is not None and mean - beside > SHALLOW
            leaks += [said[-1]] if more and (never or way == "paraphrase") else []
        sentence = f"Of {found['n']} forgotten answers, {how}, the model gives back: {', '.join(said)}."
        if beyond := found.get("left_out"):
            sentence += f" {beyond} more did not fit into the model's context."
        warning = f"The answers leak when {how}: {', '.join(leaks)}." if leaks else None
        for place, (measured, model, control) in enumerate(rows):
            told = "" if place else sentence
            yield Attack(how, measured, None, model, control, None, sentence=told, warning=None if place else warning)


def _sampling(probes: Mapping[str, Any]) -> Iterator[Attack]:
    probe = probes.get("sampling") or {}
    if "model" not in probe:
        return
    found, never = probe["model"], probe["control"]
    once, best = found["points"][0], found["points"][-1]
    mean, single = (number(point["rouge_l_recall"]) or 0.0 for point in (best, once))
    text = (
        f"The best of {best['k']} answers sampled at temperature {found['temperature']:g} has a ROUGE-L recall of {shown(mean)}, a "
        f"single one {shown(single)}"
    )
    control, beside = None, ""
    if never:
        last = never["points"][-1]
        control = Estimate(number(last["rouge_l_recall"]) or 0.0, _interval(last["interval"]))
        beside = f"; the best of the reference's {shown(control.mean)}"
    leaks = control is not None and mean - control.mean > SHALLOW
    warning = f"Sampling leaks: the best of {best['k']} answers has a ROUGE-L recall of {shown(mean)}{beside}."
    name = f"best of {best['k']} sampled answers"
    own = Estimate(mean, _interval(best["interval"]))
    yield Attack(name, "ROUGE-L recall", single, own, control, None, f"{text}{beside}.", warning if leaks else None)


def _lens(probes: Mapping[str, Any]) -> Iterator[Attack]:
    probe = probes.get("lens") or {}
    if "model" not in probe:
        return
    layers, never = probe["model"]["layers"], (probe["control"] or {}).get("layers")
    inside = max(layers[:-1] or layers, key=lambda layer: number(layer["probability"]) or 0.0)
    place, mean = inside["layer"], number(inside["probability"]) or 0.0
    says = number(layers[-1]["probability"]) or 0.0
    control = None
    if never and len(never) == len(layers):
        control = Estimate(number(never[place]["probability"]) or 0.0, _interval(never[place]["interval"]))
    beside = f" (reference: {shown(control.mean)})" if control else ""
    text = (
        f"Read off before the end, forgotten answers are likeliest after layer {place} of {len(layers) - 1}: their mean probability is "
        f"{shown(mean)} there{beside}, and {shown(says)} at the end."
    )
    leaks = mean - max(says, control.mean if control else 0.0) > SHALLOW
    told = f"their mean probability is {shown(mean)}{beside}, and {shown(says)} at the end"
    warning = f"The answers are still inside: after layer {place} {told}."
    name = f"read off after layer {place} (logit lens)"
    own = Estimate(mean, _interval(inside["interval"]))
    yield Attack(name, "probability", says, own, control, None, text, warning if leaks else None)


def _interval(limits: Any) -> tuple[float, float] | None:
    found = [number(limit) for limit in limits or ()]
    return (found[0], found[1]) if len(found) == 2 and found[0] is not None and found[1] is not None else None
