"""The tables that a command ends with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from lightning_modules.report.leakage import ATTACKS
from lightning_modules.report.run import COLUMNS, MODELS, number

MEMORY = (("exact_memorization", "exact\nmemorization"), ("extraction_strength", "extraction\nstrength"))


def tables(metrics: Mapping[str, Any], width: int) -> list[Table]:
    """Everything in metrics.json for a terminal of so many columns: one wide table or two, and a table of attacks if any ran."""
    measured = [column for column in MEMORY if _is_measured(metrics, column[0])]
    whole = table(metrics, (*COLUMNS, *measured))
    if Measurement.get(Console(width=1000), Console(width=1000).options, whole).maximum <= width or not measured:
        drawn = [whole]
    else:
        drawn = [table(metrics), table(metrics, measured, title="What it gives back word for word")]
    return drawn + ([_attacks(metrics)] if metrics.get("membership") else [])


def table(
    metrics: Mapping[str, Any],
    columns: Sequence[tuple[str, str]] = COLUMNS,
    title: str = "What the model knows",
) -> Table:
    """Forget and retain, before and after, and a model that never saw the forget set, for a terminal."""
    drawn = Table(title=title, title_style="bold", header_style="bold")
    drawn.add_column("split")
    drawn.add_column("model")
    for _, heading in columns:
        drawn.add_column(heading.replace(" ", "\n"), justify="right")
    drawn.add_column("n", justify="right")
    for split in metrics["after"]:
        models = [model for model in MODELS if metrics[model] and split in metrics[model]]
        for index, model in enumerate(models):
            scores = metrics[model][split]
            cells = [shown(scores.get(column)) for column, _ in columns]
            drawn.add_row("" if index else split, model, *cells, str(scores["n"]), end_section=index == len(models) - 1)
    return drawn


def _attacks(metrics: Mapping[str, Any]) -> Table:
    """How well each attack tells forget from holdout (AUC), and PrivLeak where there is a reference."""
    attacks: Mapping[str, Mapping[str, Any]] = metrics["membership"]
    known = [model for model in MODELS if any(row.get(_area(model)) is not None for row in attacks.values())]
    leaks = any(row.get("privleak") is not None for row in attacks.values())
    drawn = Table(title="AUC of forget against holdout", title_style="bold", header_style="bold")
    drawn.add_column("attack")
    for heading in [*known, *(["PrivLeak"] if leaks else [])]:
        drawn.add_column(heading, justify="right")
    for name, row in attacks.items():
        leak = number(row.get("privleak"))
        cells = [shown(row.get(_area(model))) for model in known]
        drawn.add_row(ATTACKS.get(name, name), *cells, *(["-" if leak is None else f"{leak:+.1f} %"] if leaks else []))
    return drawn


def _area(model: str) -> str:
    return "auc" if model == "after" else f"{model}_auc"


def _is_measured(metrics: Mapping[str, Any], column: str) -> bool:
    return any(scores.get(column) is not None for model in MODELS for scores in (metrics[model] or {}).values())


def sentences(metrics: Mapping[str, Any]) -> list[str]:
    """What the numbers of `table` mean."""
    said: list[str] = []
    if metrics["reference"]:
        said.append(
            "The reference stands for a model that never saw the forget set: its scores on forget are the values to reach."
        )
    if quality := metrics["forget_quality"]:
        said.append(
            f"Forget quality: KS statistic {shown(quality['statistic'])}, p = {number(quality['pvalue']):.2g} "
            f"(log10 p = {number(quality['log10_pvalue']):.1f}, n = {quality['n']}) between the truth ratios of this model and the "
            "reference; a high p: they cannot be told apart. Compare p at equal n only."
        )
    return said + _memory_sentences(metrics)


def _memory_sentences(metrics: Mapping[str, Any]) -> list[str]:
    said: list[str] = []
    reference: Mapping[str, Any] = metrics["reference"] or {}
    others = {**metrics, "reference": None}
    lacking = [
        heading.replace("\n", " ")
        for column, heading in MEMORY
        if _is_measured(others, column) and any(scores.get(column) is None for scores in reference.values())
    ]
    if lacking:
        said.append(
            f"The reference's log has no {' and '.join(lacking)}, as logs of earlier versions: score the reference again to have it."
        )
    attacks: Mapping[str, Mapping[str, Any]] | None = metrics.get("membership")
    if not attacks:
        return said
    said.append(
        "Membership: an attack's AUC is the chance that it finds a forget answer more familiar than a holdout answer, which no model "
        "has seen. Read it against the reference's, not against 0.5: the two sets differ in more than that."
    )
    perfect = [ATTACKS.get(name, name) for name, row in attacks.items() if number(row.get("reference_auc")) == 1.0]
    if any(row.get("privleak") is not None for row in attacks.values()):
        said.append(
            "PrivLeak is how far an AUC is from the reference's, relative to 1 - that: 0 is best, below 0 the forget set is still "
            "remembered, above 0 it was unlearned too far."
        )
    elif not perfect:
        why = "its log has no scores of a holdout" if reference else "there is none"
        said.append(f"PrivLeak is not computed: it needs the AUCs of a reference, and {why}.")
    if perfect:
        said.append(
            f"PrivLeak is not defined for {', '.join(perfect)}: the reference tells the two sets apart perfectly (AUC 1), so either "
            "it was trained on the forget set or the holdout is of another kind."
        )
    return said


def shown(value: Any) -> str:
    """A score with three decimals, a tiny one with its order of magnitude, and a dash for what was not measured."""
    found = number(value)
    if found is None:
        return "-"
    if found != found:
        return "NaN"
    return f"{found:.1e}" if 0.0 < abs(found) < 5e-4 else f"{found:.3f}"
