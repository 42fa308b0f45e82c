"""The table that a command ends with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from lightning_modules.report.run import COLUMNS, MODELS, number


def table(metrics: Mapping[str, Any]) -> Table:
    """Forget and retain, before and after, and a model that never saw the forget set, for a terminal."""
    drawn = Table(title="What the model knows", title_style="bold", header_style="bold")
    drawn.add_column("split")
    drawn.add_column("model")
    for _, heading in COLUMNS:
        drawn.add_column(heading, justify="right")
    drawn.add_column("n", justify="right")
    for split in metrics["after"]:
        models = [model for model in MODELS if metrics[model] and split in metrics[model]]
        for index, model in enumerate(models):
            scores = metrics[model][split]
            cells = [shown(scores[column]) for column, _ in COLUMNS]
            drawn.add_row("" if index else split, model, *cells, str(scores["n"]), end_section=index == len(models) - 1)
    return drawn


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
    return said


def shown(value: Any) -> str:
    """A score with three decimals, a tiny one with its order of magnitude, and a dash for what was not measured."""
    found = number(value)
    if found is None:
        return "-"
    if found != found:
        return "NaN"
    return f"{found:.1e}" if 0.0 < abs(found) < 5e-4 else f"{found:.3f}"
