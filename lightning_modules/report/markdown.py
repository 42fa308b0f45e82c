"""report.md: the report as Markdown."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from lightning_modules.data.visible import visible
from lightning_modules.folder import SURGERY
from lightning_modules.report import attacks, findings, leakage, over_seeds
from lightning_modules.report.benchmarks import benchmark_rows, benchmarks_explained
from lightning_modules.report.finished import MODELS, FinishedRun, columns, shown
from lightning_modules.report.samples import samples
from lightning_modules.report.tables import markdown_table
from lightning_modules.report.terminal import about_scores
from lightning_modules.report.utility import utility_explained, utility_rows


def page(run: FinishedRun, *, pictured: bool, by_layer: Path | None = None) -> str:
    """Returns the report as Markdown.

    Args:
        run: What the folder holds.
        pictured: Whether there is a curves.png.
        by_layer: The picture of the conflict by layer, if there is one.
    """
    metrics = run.metrics
    lines = ["# Unlearning report", "", " ".join(findings.summary(run))]
    lines += [
        line
        for text in [*findings.warnings(run), *findings.notes(run), *run.missing]
        for line in ("", f"> {_prose(text)}")
    ]
    header = ("split", "model", *(heading for _, heading in columns(run)), "n")
    lines += ["", *markdown_table(header, _rows(run), text={"split", "model"})]
    lines += ["", "Probability, ROUGE and truth ratio are means over examples; NLL in nats a token."]
    lines += [line for text in [*about_scores(metrics), *leakage.given_back(run)] for line in ("", text)]
    lines += _utility(run)
    lines += _benchmarks(run)
    lines += _membership(run)
    if pictured:
        shown = "Forgetting against retention" + (", and the conflict over the steps" if run.surgery else "")
        lines += ["", f"![{shown}](curves.png)"]
        lines += [line for text in filter(None, [over_seeds.curves(run)]) for line in ("", text)]
    if by_layer is not None:
        lines += ["", f"![Cosine of the forget and the retain row by layer and step]({by_layer.name})"]
    if conflict := findings.conflict(run):
        lines += ["", _prose(" ".join(conflict.sentences())) + f" Every step is a row of `{SURGERY}`."]
    lines += _generations(run)
    lines += _probes(run)
    lines += ["", "## How sure it is", ""]
    lines += [findings.UNSURE if run.others else f"{findings.UNSURE} {findings.ONE_SEED}"]
    for label, mean, interval in findings.differences(run):
        lines += ["", f"- {label}: {mean:+.3f} {findings.between(interval)}"]
    lines += _seeds(run)
    seconds = metrics["seconds"]
    took = " and ".join(f"{value:.1f} s to {name}" for name, value in seconds.items())
    versions = ", ".join(f"{name} {number}" for name, number in metrics["versions"].items())
    lines += ["", "## How it was made", "", _escaped(f"It took {took}. Seed {metrics['seed']}; {versions}.")]
    if run.config:
        if run.changed is None:
            lines += ["", "All options (`config.yaml`):"]
        else:
            said = ", ".join(f"{name} {value}" for name, value in run.changed.items()) or "none"
            lines += ["", f"Options that are not the default: {_escaped(said)}. All of them (`config.yaml`):"]
        text = yaml.safe_dump(run.config, sort_keys=False).rstrip()
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))  # no value may end the block
        lines += ["", f"{fence}yaml", text, fence]
    return "\n".join(lines) + "\n"


def _rows(run: FinishedRun) -> list[list[str]]:
    found: list[list[str]] = []
    for split in run.metrics["after"]:
        for model in MODELS:
            scores = (run.metrics[model] or {}).get(split)
            if scores is None:
                continue
            cells = [
                f"{shown(scores.get(column))} {findings.between(findings.interval_of(run, model, split, column))}".rstrip()
                for column, _ in columns(run)
            ]
            found.append([_escaped(split), model, *cells, str(scores["n"])])
    return found


def _utility(run: FinishedRun) -> list[str]:
    rows = [(_escaped(name), *map(shown, values)) for name, *values in utility_rows(run.metrics)]
    if not rows:
        return []
    table = markdown_table(("mean", *MODELS), rows, text={"mean"})
    return ["", *table, "", _escaped(" ".join(utility_explained(run.metrics)))]


def _benchmarks(run: FinishedRun) -> list[str]:
    rows = [(_escaped(name), *map(_escaped, values)) for name, *values in benchmark_rows(run.metrics)]
    if not rows:
        return []
    table = markdown_table(("benchmark", *MODELS, "n"), rows, text={"benchmark"})
    return ["", *table, "", _escaped(" ".join(benchmarks_explained(run.metrics)))]


def _membership(run: FinishedRun) -> list[str]:
    attacks = leakage.membership(run.metrics)
    if not attacks:
        return []
    rows = [(_escaped(name), *map(shown, areas), leakage.percent(leak)) for name, *areas, leak in attacks]
    table = markdown_table(("attack, AUC", *MODELS, "PrivLeak"), rows, text={"attack, AUC"})
    return ["", *table, "", _escaped(" ".join(leakage.explained(run.metrics)))]


def _generations(run: FinishedRun) -> list[str]:
    lines: list[str] = []
    for split in ("forget", "retain"):
        found = samples(run, split)
        models = [model for model in MODELS if any(model in sample.said for sample in found)]
        rows: list[list[str]] = []
        for sample in found:
            said = [sample.said.get(model, "-") or "(nothing)" for model in models]
            rows.append([_cell(text) for text in (sample.question, sample.answer, *said)])
        if found:
            header = (f"{split}: question", "right answer", *models)
            lines += ["", *markdown_table(header, rows, text=header)]
    heading = [
        "",
        "## What it says now",
        "",
        "Greedy answers, unedited, to questions spread over each split and chosen by their place alone.",
    ]
    return [*heading, *lines] if lines else []


def _probes(run: FinishedRun) -> list[str]:
    lines = [line for text in attacks.sentences(run.probes) for line in ("", _prose(text))]
    if found := attacks.attacks(run.probes):
        rows = [tuple(map(_escaped, attacks.cells(attack))) for attack in found]
        lines += ["", *markdown_table(attacks.HEADINGS, rows, text=attacks.TEXT), "", attacks.explained(run.probes)]
    if quantized := attacks.rounded(run.probes):
        header, *rows = quantized
        lines += ["", f"Weights rounded to fewer bits: {attacks.ROUNDED}.", ""]
        lines += markdown_table(header, rows, text={"weights"})
    return ["", "## Does the forgetting hold?", *lines] if lines else []


def _seeds(run: FinishedRun) -> list[str]:
    if not run.others:
        return []
    names = ("split", "model", "score", "this run", "mean", "standard deviation", "min", "max", "runs")
    first, *further = map(_prose, over_seeds.sentences(run))
    rows = [
        (
            _escaped(row.split),
            row.model,
            row.heading,
            *map(shown, (row.value, row.mean, row.sd, row.low, row.high)),
            str(row.n),
        )
        for row in over_seeds.scores_over_seeds(run)
    ]
    lines = ["", "### Over seeds", "", first, "", *(f"- {text}" for text in further)]
    return [*lines, "", *markdown_table(names, rows, text={"split", "model", "score"})]


def _cell(text: str, words: int = 30) -> str:
    """Returns a text for a cell of a table: on one line, escaped, and at most so many words of it."""
    found = _escaped(text).split()
    return " ".join(found[:words]) + (" ..." if len(found) > words else "")


def _prose(text: str) -> str:
    """Returns one of our sentences, escaped except for the code between backticks."""
    parts = text.split("`")
    return "".join(f"`{part}`" if index % 2 else _escaped(part) for index, part in enumerate(parts))


def _escaped(text: str) -> str:
    """Returns a text without a meaning in HTML or Markdown, so that a generation cannot load a picture or hide."""
    text = visible(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", text)
