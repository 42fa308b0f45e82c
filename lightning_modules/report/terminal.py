"""The tables and sentences that a command prints at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from lightning_modules.report.benchmarks import BenchmarkRow, benchmark_rows, benchmarks_explained
from lightning_modules.report.finished import COLUMNS, MODELS, memory, number, shown
from lightning_modules.report.leakage import explained, membership, percent
from lightning_modules.report.utility import utility_explained, utility_rows

_WITH = {"rouge_l_recall": "those with a word", "truth_ratio": "those with wrong answers"}
"""Which answers have a number that others lack."""


def tables(metrics: Mapping[str, Any], width: int) -> list[Table]:
    """Returns the tables of metrics.json: the scores, and what else there is: utility, benchmark, attacks.

    Args:
        metrics: the contents of metrics.json.
        width: of the terminal, in columns; the scores take two tables where one would be wider.
    """
    measured = memory(metrics)
    whole = table(metrics, (*COLUMNS, *measured))
    if Measurement.get(Console(width=1000), Console(width=1000).options, whole).maximum <= width or not measured:
        drawn = [whole]
    else:
        drawn = [table(metrics), table(metrics, measured, title="What it gives back word for word")]
    drawn += [_utility(metrics)] if utility_rows(metrics) else []
    drawn += [_benchmarks(rows)] if (rows := benchmark_rows(metrics)) else []
    return drawn + ([_attacks(metrics)] if metrics.get("membership") else [])


def table(
    metrics: Mapping[str, Any],
    columns: Sequence[tuple[str, str]] = COLUMNS,
    title: str = "What the model knows",
) -> Table:
    """Returns the scores of every split and model."""
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
            name = "the model" if models == ["after"] and not metrics["before"] else model
            drawn.add_row("" if index else split, name, *cells, str(scores["n"]), end_section=index == len(models) - 1)
    return drawn


def _attacks(metrics: Mapping[str, Any]) -> Table:
    """Returns how well each attack tells forget from holdout (AUC), and PrivLeak where there is a reference."""
    attacks = membership(metrics)
    known = [model for model in MODELS if any(getattr(attack, model) is not None for attack in attacks)]
    leaks = any(attack.privleak is not None for attack in attacks)
    drawn = Table(title="AUC of forget against holdout", title_style="bold", header_style="bold")
    drawn.add_column("attack")
    for heading in [*known, *(["PrivLeak"] if leaks else [])]:
        drawn.add_column(heading, justify="right")
    for attack in attacks:
        cells = [shown(getattr(attack, model)) for model in known]
        drawn.add_row(attack.name, *cells, *([percent(attack.privleak)] if leaks else []))
    return drawn


def _utility(metrics: Mapping[str, Any]) -> Table:
    """Returns model utility and the nine numbers that it is computed from."""
    rows = utility_rows(metrics)
    known = [model for model in MODELS if getattr(rows[0], model) is not None]
    drawn = Table(title="Model utility", title_style="bold", header_style="bold")
    drawn.add_column("mean")
    for model in known:
        drawn.add_column(model, justify="right")
    for row in rows:
        drawn.add_row(row.name, *(shown(getattr(row, model)) for model in known), end_section=row is rows[0])
    return drawn


def _benchmarks(rows: Sequence[BenchmarkRow]) -> Table:
    """Returns what a benchmark scores."""
    known = [index for index, _ in enumerate(MODELS, start=1) if any(row[index] != "-" for row in rows)]
    drawn = Table(title="Benchmark", title_style="bold", header_style="bold")
    drawn.add_column("score")
    for index in known:
        drawn.add_column(MODELS[index - 1], justify="right")
    drawn.add_column("n", justify="right")
    for row in rows:
        drawn.add_row(row.name, *(row[index] for index in known), row.n)
    return drawn


def sentences(metrics: Mapping[str, Any]) -> list[str]:
    """Returns what the numbers of `tables` mean."""
    return [*about_scores(metrics), *utility_explained(metrics), *benchmarks_explained(metrics), *explained(metrics)]


def about_scores(metrics: Mapping[str, Any]) -> list[str]:
    """Returns what the numbers of `table` mean."""
    said: list[str] = []
    if metrics.get("evaluation_precision") == "bf16-mixed":
        said.append(
            "The scores were computed in bf16-mixed: probabilities have two or three digits, and some generated answers are "
            "others than in full precision. The curve, the target and the probes are in float32; "
            "--evaluation-precision 32-true computes all so."
        )
    fewer = [
        f"{heading} over {scores[f'n_{column}']} of {scores['n']} {split} answers, {_WITH[column]}"
        for split, scores in metrics["after"].items()
        for column, heading in COLUMNS
        if column in _WITH and f"n_{column}" in scores
    ]
    if fewer:
        said.append(f"Some means are over fewer answers than n: {'; '.join(fewer)}.")
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
    lacking = [
        heading
        for column, heading in memory({**metrics, "reference": None})
        if any(scores.get(column) is None for scores in (metrics["reference"] or {}).values())
    ]
    if lacking:
        said.append(f"The reference's log has no {' and '.join(lacking)}: score the reference again to have it.")
    return said
