"""report.html: one file that needs neither network nor scripts nor other files."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lightning_modules.data.heldout import RETAIN_HELDOUT
from lightning_modules.data.visible import visible
from lightning_modules.report import attacks, figures, findings, leakage, over_seeds, svg
from lightning_modules.report.benchmarks import benchmark_rows, benchmarks_explained
from lightning_modules.report.finished import MODELS, FinishedRun, columns, shown
from lightning_modules.report.samples import degenerate, is_degenerate, samples
from lightning_modules.report.terminal import about_scores
from lightning_modules.report.utility import utility_explained, utility_rows

if TYPE_CHECKING:
    from jinja2 import Environment

_HERE = Path(__file__).parent
_HINTS = {
    "forget": "to be forgotten: the reference is the value to reach",
    "retain": "to be kept: the value before is the one to keep",
    RETAIN_HELDOUT: "to be kept, and never trained on: the value before is the one to keep",
}
_NOTES = {
    "probability": "of the right answer",
    "rouge_l_recall": "of its words, generated",
    "truth_ratio": "max(0, 1 - R)",
    "nll": "nats a token",
    "exact_memorization": "of its tokens, predicted",
    "extraction_strength": "completed by itself",
}
_WORDS = 24  # words of a long text that are shown at first; a click shows the rest


def templates(folder: Path) -> Environment:
    """The templates in a folder. The engine escapes every text, and shows its control characters."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else visible(value),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def page(run: FinishedRun, by_layer: Path | None = None) -> str:
    """Returns the report as HTML.

    The template engine escapes every text of the run. The figures are inline SVG, the conflict by layer is a PNG.

    Args:
        run: What the folder holds.
        by_layer: The picture of the conflict by layer, if there is one.
    """
    from markupsafe import Markup

    environment = templates(_HERE)
    environment.filters.update(
        shown=shown, between=findings.between, percent=leakage.percent, code=_code, beginning=_beginning, rest=_rest
    )
    return environment.get_template("page.html.jinja").render(
        run=run,
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8") + svg.style(figures.COLOURS)),
        drawn={name: Markup(figure) for name, figure in figures.drawn(run).items()},
        by_layer="" if by_layer is None else base64.b64encode(by_layer.read_bytes()).decode("ascii"),
        title=_title(run),
        summary=findings.summary(run),
        warnings=findings.warnings(run),
        notes=[*findings.notes(run), *run.missing],
        tables=[_table(run, split) for split in run.metrics["after"]],
        quality=[*about_scores(run.metrics), *leakage.given_back(run)],
        attacks=leakage.membership(run.metrics),
        attacked=" ".join(leakage.explained(run.metrics)),
        utility=utility_rows(run.metrics),
        useful=" ".join(utility_explained(run.metrics)),
        benchmarks=benchmark_rows(run.metrics),
        benchmarked=benchmarks_explained(run.metrics),
        conflict=findings.conflict(run),
        chosen={split: samples(run, split) for split in ("forget", "retain")},
        degenerates=_degenerates(run),
        is_degenerate=is_degenerate,
        attacks_told=attacks.sentences(run.probes),
        attack_headings=attacks.HEADINGS,
        attack_rows=[attacks.cells(attack) for attack in attacks.attacks(run.probes)],
        attack_explained=attacks.explained(run.probes),
        rounded=attacks.rounded(run.probes),
        rounded_are=attacks.ROUNDED,
        differences=findings.differences(run),
        unsure=findings.UNSURE,
        one_seed=findings.ONE_SEED,
        seeds=over_seeds.sentences(run),
        by_split=_by_split(run),
        curves=over_seeds.curves(run),
        changed=run.changed,
        config=yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True) if run.config else "",
    )


def _code(text: str) -> Any:
    """Returns one of our sentences, escaped, with the parts between backticks as code."""
    from markupsafe import Markup, escape

    parts = visible(text).split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if index % 2 else escape(part) for index, part in enumerate(parts)
    )


def _beginning(text: str) -> str:
    return text if len(text.split()) <= 2 * _WORDS else " ".join(text.split()[:_WORDS])


def _rest(text: str) -> str:
    return "" if len(text.split()) <= 2 * _WORDS else " ".join(text.split()[_WORDS:])


def _title(run: FinishedRun) -> str:
    """Returns the page's title: the model and the method."""
    known = run.config
    if not known:
        return "Unlearning report"
    rule = "no rule" if known.get("rule") == "none" else known.get("rule")
    how = "ULD" if known.get("method") == "uld" else f"{known.get('forget_loss')} with {rule}"
    model = str(known.get("model"))
    return f"{'A small model from scratch' if model == 'scratch' else Path(model).name} unlearns: {how}"


def _table(run: FinishedRun, split: str) -> dict[str, Any]:
    models = [model for model in MODELS if split in (run.metrics[model] or {})]
    rows = [
        {
            "name": heading,
            "note": "min(R, 1/R)" if (column, split) == ("truth_ratio", "forget") else _NOTES[column],
            "cells": [
                {
                    "model": model,
                    "value": shown(run.value(model, split, column)),
                    "interval": findings.interval_of(run, model, split, column),
                }
                for model in models
            ],
        }
        for column, heading in columns(run)
        if any(run.value(model, split, column) is not None for model in models)
    ]
    return {
        "split": split,
        "hint": _HINTS.get(split, ""),
        "models": models,
        "rows": rows,
        "n": run.metrics["after"][split]["n"],
    }


def _by_split(run: FinishedRun) -> dict[str, dict[str, list[over_seeds.ScoreOverSeeds]]]:
    """Split -> model -> scores over seeds."""
    found: dict[str, dict[str, list[over_seeds.ScoreOverSeeds]]] = {}
    for row in over_seeds.scores_over_seeds(run):
        found.setdefault(row.split, {}).setdefault(row.model, []).append(row)
    return found


def _degenerates(run: FinishedRun) -> list[str]:
    said: list[str] = []
    for split in run.metrics["after"]:
        counts = {model: degenerate(run, model, split) for model in MODELS}
        parts = [f"{found[0]} of {found[1]} {model}" for model, found in counts.items() if found]
        if parts:
            said.append(f"{split}: {', '.join(parts)}")
    return said
