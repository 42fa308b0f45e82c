"""From a folder to its report."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from lightning_modules.files import write_text
from lightning_modules.folder import G_EFFECT
from lightning_modules.report import figures, html, markdown
from lightning_modules.report.changed import Defaults, changed_options
from lightning_modules.report.g_effect import heat_map
from lightning_modules.report.seeds import read_seeds


def draw(folder: Path, others: Sequence[Path] = (), defaults: Defaults | None = None) -> None:
    """Write report.html and report.md, curves.png where there are curves, and g_effect.png where layers were recorded.

    The same files in the folder give the same bytes, with the same versions of matplotlib and jinja2. If a file is
    missing or cannot be read, the report names it and leaves out what it holds.

    Args:
        folder: The folder of the run that the report is about. The report is written there.
        others: Folders of runs of the same configuration with other seeds, which are only read. With them the report
            says how the scores differ over the seeds, and their curves are drawn behind this run's.
        defaults: What options are when nobody gives them; None leaves out which ones were changed. `run.report.draw`
            gives those of `gradsurgery unlearn`.

    Raises:
        FileNotFoundError: If a folder holds no metrics.json. Nothing is written then.
        ValueError: If metrics.json was not written by `gradsurgery unlearn` or `evaluate`; or if, with others, the runs
            are not of one configuration, or two have the same seed. Nothing is written then.
    """
    run = read_seeds(folder, others, {} if defaults is None else defaults.plain)
    run.changed = None if defaults is None else changed_options(run.config, defaults)
    pictured = figures.write_png(folder / "curves.png", run)
    layers = folder / "g_effect.png"
    readable = True
    if (folder / G_EFFECT).exists():
        try:
            heat_map(folder / G_EFFECT, layers)
        except (ValueError, csv.Error) as error:
            run.missing.append(f"{G_EFFECT} cannot be read ({error}); the report lacks the conflict by layer.")
            readable = False
    by_layer = layers if readable and layers.exists() else None
    write_text(folder / "report.md", markdown.page(run, pictured=pictured, by_layer=by_layer))
    write_text(folder / "report.html", html.page(run, by_layer=by_layer))
