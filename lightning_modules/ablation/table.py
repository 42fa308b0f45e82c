"""table.md: the results of a grid for a reader."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median

from lightning_modules.ablation.grid import Grid
from lightning_modules.ablation.results import REFERENCE, Result, differences, number, read_models
from lightning_modules.ablation.scoring import GENERAL
from lightning_modules.ablation.statistics import Paired, Spread, spread
from lightning_modules.files import write_text
from lightning_modules.report.tables import markdown_table

_UTILITY = (
    "model_utility",
    *(f"{split}_{score}" for split in GENERAL for score in ("probability", "rouge_l_recall")),
)

Column = tuple[str, Callable[[Sequence[Result]], str]]

COMPARED = {
    "forget_probability": "retain_probability",
    "forget_nll": "retain_probability",
    "retain_probability": "forget_probability",
    "retained": "forget_probability",
    "end": "retain_probability",
}
"""Score that a target is set for -> score by which methods are compared at that target."""


def write_table(grid: Grid, results: Sequence[Result], folder: Path, path: Path) -> None:
    """Write a section for each target: what is kept and forgotten there, the paired differences, and what it cost."""
    seeds = f"Data seeds {_list(grid.seeds.data)}, model seeds {_list(grid.seeds.model)}"
    lines = ["# Methods where they have forgotten equally much", ""]
    lines += [f"{seeds}; mean ± standard deviation over the runs.", ""]
    lines += _models(grid, folder)
    for target in dict.fromkeys(row["target"] for row in results):
        rows = [row for row in results if row["target"] == target]
        by_method = {method.name: [row for row in rows if row["method"] == method.name] for method in grid.methods}
        compared = COMPARED[target.partition("=")[0]]
        lines += ["", f"## At {_title(grid, target)}", ""]
        lines += _drawn(*_kept_table(grid, by_method, target))
        against = list(_difference_rows(grid, by_method, compared))
        if against:
            lines += [
                "",
                f"Differences between runs with the same two seeds ({compared.replace('_', ' ')}, then retain ROUGE-L):",
                "",
            ]
            lines += _drawn(_DIFFERENCE, against)
        lines += ["", "What it took to get there:", ""]
        costs = [*_costs(grid), *_measured(rows, ("peak MB", _mean("peak_megabytes", 0), "peak_megabytes"))]
        lines += _drawn(("method", *(name for name, _ in costs)), _cost_rows(costs, by_method))
        reasons = dict.fromkeys(
            f"- {row['method']}, model seed {row['model_seed']}, data seed {row['data_seed']}: {row['reason']}"
            for row in rows
            if not row["reached"]
        )
        lines += ["", "Not reached:", "", *reasons] if reasons else []
    lines += ["", *_NOTES]
    lines += _WEIGHT_NOTE if _weighted(grid) else []
    lines += ["", *_MIX_NOTE] if grid.targets.retained else []
    lines += ["", *_HELDOUT_NOTE] if any(row.get("retain_heldout_probability") is not None for row in results) else []
    lines += ["", *_UTILITY_NOTE] if grid.evaluate.utility else []
    lines += ["", *_depth_note(grid)] if grid.evaluate.attacks or grid.targets.end else []
    write_text(path, "\n".join(lines) + "\n")


_NOTES = (
    "Probability and ROUGE-L recall are means over examples; truth ratio is min(R, 1/R); KS compares the truth ratios R with those",
    "of the reference over n questions, with the median of p over the runs (compare p at equal n only). Differences: mean,",
    "Student's 95 % interval (it takes the pairs for independent, which runs from one start model are not quite) and pairs above",
    "0. Seconds are of training alone, as long as other processes let it take. Backward passes are those that a method needs (a",
    "loss alone needs one a step, a second loss another; FILA's importance counts); rows that train by a rule were run with both.",
    "Conflict: steps in which the two gradients conflict. Raise retain: steps whose real parameter change has a positive inner",
    "product with the protected gradient. Peak MB: of the whole process in a training step, or of what a GPU had allocated.",
)
_WEIGHT_NOTE = (
    "Weight: of what is subtracted, ULD's assistant or a task vector; all its training is done before it is chosen, so that steps and",
    "seconds are the same at every target. A backward pass of ULD is that of its assistant, which has fewer layers.",
)
_MIX_NOTE = (
    "Share of start: of the start model in the mix of parameters (UWC, 2406.09179), the smallest that restores the retain probability;",
    "0 where nothing was to be restored. Mixed is what a method ended with, where it had met all other targets; steps and seconds are",
    "those of its end.",
)


_HELDOUT_NOTE = (
    "Held-out retain probability: of answers that are to be kept, that the start model knows and that no step of any method has seen.",
)

_UTILITY_NOTE = (
    "Model utility: TOFU's harmonic mean of nine scores on retain, real authors and world facts; the probability of the last two is the",
    "true answer's share among the options.",
)


def _depth_note(grid: Grid) -> list[str]:
    """What the end, the attacks and the memory are."""
    attacks = "; ".join(
        f"{name}: {settings['steps']:.0f} steps of AdamW at {settings['lr']:g}"
        for name, settings in grid.evaluate.attacks.items()
    )
    said = [
        f"Attacks teach a copy a quarter of the forget answers again ({attacks}); shown is the mean probability of the others."
    ] * bool(attacks)
    if grid.targets.end:
        said += [
            "A method's own end: its steps are over, or its forget probability is below its `stop_below`, and its finish or distillation",
            "is done. Depth is measured there"
            + (", and where methods have forgotten equally much." if grid.evaluate.attack_matches else "."),
        ]
    return [*said, "Degenerate: forget answers that are empty or repeat themselves."]


def _attacks(results: Sequence[Result]) -> list[str]:
    """Columns of the attacks that at least one of these results has."""
    return list(dict.fromkeys(name for row in results for name in row if name.startswith("attack ")))


def _measured(results: Sequence[Result], column: tuple[str, Callable[[Sequence[Result]], str], str]) -> list[Column]:
    """A column, if at least one of these results has its score, the last of the three."""
    return [column[:2]] if any(row.get(column[2]) is not None for row in results) else []


def _kept(metric: str, results: Sequence[Result]) -> list[Column]:
    columns: list[Column] = [
        ("retain probability", _mean_sd("retain_probability")),
        *_measured(
            results,
            ("held-out retain probability", _mean_sd("retain_heldout_probability"), "retain_heldout_probability"),
        ),
        ("retain ROUGE-L", _mean_sd("retain_rouge_l_recall")),
        ("forget probability", _mean_sd("forget_probability")),
        *((name.removeprefix("attack "), _mean_sd(name)) for name in _attacks(results)),
        ("forget NLL", _mean("forget_nll", 2)),
        ("forget ROUGE-L", _mean("forget_rouge_l_recall", 3)),
        *((("degenerate", _share("forget_degenerate")),) if _attacks(results) or metric == "end" else ()),
        ("truth ratio", _mean("forget_truth_ratio", 3)),
        ("KS (n)", _ks),
        ("p", _median_p),
        *(entry for name in _UTILITY for entry in _measured(results, (_words(name), _mean(name, 3), name))),
        ("seconds", _mean("seconds", 1)),
    ]
    if metric == "retained":
        columns.append(("share of start", _mean("share_of_start", 3)))
    first = [column for column in columns if column[0] == COMPARED[metric].replace("_", " ")]
    return first + [column for column in columns if column not in first]


def _kept_table(
    grid: Grid, by_method: Mapping[str, Sequence[Result]], target: str
) -> tuple[Sequence[str], list[list[str]]]:
    """Heads and rows of the table of scores; with a column of notes if a method has one."""
    every = [row for rows in by_method.values() for row in rows]
    columns = _kept(target.partition("=")[0], every)
    notes = [method.note for method in grid.methods]
    heads = ("method", "runs", *(name for name, _ in columns), *(["notes"] if any(notes) else []))
    rows: list[list[str]] = []
    for method, note in zip(grid.methods, notes, strict=True):
        results = by_method[method.name]
        reached = [row for row in results if row["reached"]]
        cells = [method.name, f"{len(reached)} of {len(results)}", *(draw(reached) for _, draw in columns)]
        rows.append([*cells, note] if any(notes) else cells)
    return heads, rows


_DIFFERENCE = ("method", "against", "difference [95 %]", "sd", "above 0", "ROUGE-L [95 %]", "sd", "above 0")


def _difference_rows(grid: Grid, by_method: Mapping[str, Sequence[Result]], compared: str) -> Iterator[list[str]]:
    for method in grid.methods:
        for name in grid.baselines(method):
            scores = (compared, "retain_rouge_l_recall")
            found = [differences(by_method[method.name], by_method[name], score) for score in scores]
            yield [method.name, name, *_paired(found[0]), *_paired(found[1])]


def _cost_rows(costs: Sequence[Column], by_method: Mapping[str, Sequence[Result]]) -> Iterator[list[str]]:
    for name, rows in by_method.items():
        yield [name, *(draw([row for row in rows if row["reached"]]) for _, draw in costs)]


def _costs(grid: Grid) -> list[Column]:
    return [*_COSTS, ("weight", _mean("weight", 3))] if _weighted(grid) else _COSTS


def _weighted(grid: Grid) -> bool:
    return any(method.kind != "surgery" for method in grid.methods)


def _models(grid: Grid, folder: Path) -> list[str]:
    """The table of what the start model and the reference know, for each model seed."""
    rows: list[list[str]] = []
    names = (
        "retain_probability",
        "retain_rouge_l_recall",
        "forget_probability",
        "forget_nll",
        "forget_rouge_l_recall",
        "forget_truth_ratio",
    )
    further = ("retain_heldout_probability",) if _holds_out(grid) else ()
    further += _UTILITY if grid.evaluate.utility else ()
    for seed, known in read_models(grid, folder):
        for name, model in (("start", known["start"]), (REFERENCE, known["reference"])):
            if model is not None:
                scores = [number(model.get(score)) for score in (*names, *further)]
                scores += [number(model.get("attacks", {}).get(attack)) for attack in grid.evaluate.attacks]
                quality = "-" if model["ks_statistic"] is None else f"{model['ks_statistic']:.3f} ({model['ks_n']})"
                p = "-" if model["ks_pvalue"] is None else f"{model['ks_pvalue']:.2g}"
                rows.append(
                    [name, str(seed), *("-" if score is None else f"{score:.3f}" for score in scores), quality, p]
                )
    heads = (
        "model",
        "seed",
        *map(_words, names),
        *("held-out retain probability" if name == "retain_heldout_probability" else _words(name) for name in further),
        *grid.evaluate.attacks,
        "KS (n)",
        "p",
    )
    return _drawn(heads, rows) if rows else []


def _words(score: str) -> str:
    return score.replace("_", " ").replace("rouge l recall", "ROUGE-L").replace("nll", "NLL")


def _holds_out(grid: Grid) -> bool:
    return bool(grid.data.heldout_authors or grid.data.retain_heldout)


def _title(grid: Grid, target: str) -> str:
    metric, _, value = target.partition("=")
    if metric == "end":
        return "each method's own end"
    if metric == "retained":
        return f"{float(value):.0%} of the start's retain probability, restored by mixing with the start model"
    words = f"{metric.replace('_', ' ').replace('nll', 'NLL')}"
    return (
        f"the reference's {words}"
        if value == "reference"
        else f"{words} {value} (within {grid.evaluate.tolerance:.0%})"
    )


def _drawn(heads: Sequence[str], rows: Iterator[list[str]] | Sequence[list[str]]) -> list[str]:
    escaped = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    return markdown_table(heads, escaped, text={"method", "model", "against", "notes"})


def _values(rows: Sequence[Result], name: str) -> list[float]:
    return [row[name] for row in rows if row.get(name) is not None]


def _mean_sd(name: str) -> Callable[[Sequence[Result]], str]:
    return lambda rows: _spread(spread(_values(rows, name)))


def _mean(name: str, digits: int) -> Callable[[Sequence[Result]], str]:
    def draw(rows: Sequence[Result]) -> str:
        found = spread(_values(rows, name))
        return "-" if found is None else f"{found.mean:.{digits}f}"

    return draw


def _share(name: str) -> Callable[[Sequence[Result]], str]:
    def draw(rows: Sequence[Result]) -> str:
        found = spread(_values(rows, name))
        return "-" if found is None or found.mean != found.mean else f"{found.mean:.0%}"

    return draw


_COSTS: list[Column] = [
    ("steps", _mean("steps", 1)),
    ("backward passes", _mean("backward_passes", 1)),
    ("seconds", _mean("seconds", 2)),
    ("conflict", _share("conflicts")),
    ("raise retain", _share("raising")),
]


def _spread(found: Spread | None) -> str:
    if found is None:
        return "-"
    return f"{found.mean:.3f}" + ("" if found.sd is None else f" ± {found.sd:.3f}")


def _paired(found: Paired | None) -> tuple[str, str, str]:
    if found is None:
        return "no pair", "-", "-"
    interval = "" if found.low is None else f" [{found.low:+.3f}, {found.high:+.3f}]"
    return f"{found.mean:+.3f}{interval}", "-" if found.sd is None else f"{found.sd:.3f}", f"{found.wins} of {found.n}"


def _ks(rows: Sequence[Result]) -> str:
    sizes = sorted({int(value) for value in _values(rows, "ks_n")})
    return f"{_mean('ks_statistic', 3)(rows)} ({_list(sizes)})" if sizes else "-"


def _median_p(rows: Sequence[Result]) -> str:
    values = _values(rows, "ks_pvalue")
    return f"{median(values):.2g}" if values else "-"


def _list(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))
