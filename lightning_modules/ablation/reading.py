"""A grid from a YAML file: a list in a row stands for several rows, and what is no grid is refused in a sentence."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from lightning_modules.ablation.grid import Grid
from lightning_modules.ablation.methods import Method
from lightning_modules.ablation.sections import Data, Evaluate, Scratch, Seeds, Targets, Train
from lightning_modules.data.files import read_yaml
from lightning_modules.run.options import FirstOptions

Section = TypeVar("Section")


def read_grid(path: str | Path, tofu_dir: str | None = None) -> Grid:
    """Read a grid from a YAML file and check it.

    The file's keys are the fields of `Grid`. In a row of `methods`, any value may be a list, also inside
    `rule_options`. The row then stands for several rows, one for each combination, and the chosen values are added to
    their names.

    Args:
        path: The file.
        tofu_dir: Replaces `data.tofu_dir` of the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a grid. The message says which key, what was expected and what was found.
    """
    try:
        values = read_yaml(path, "a grid")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"--config: expected a YAML file with a grid, found none at {path}") from error
    known = [entry.name for entry in fields(Grid)]
    if not isinstance(values, Mapping) or not set(values) <= set(known) or not {"methods", "targets"} <= set(values):
        found = list(values) if isinstance(values, Mapping) else type(values).__name__
        raise ValueError(f"{path}: expected methods, targets and any other of {known}, found {found}")
    rows = values["methods"]
    if not isinstance(rows, Sequence) or isinstance(rows, str) or not all(isinstance(row, Mapping) for row in rows):
        raise ValueError(f"{path}, methods: expected a list of rows such as 'name: GA', found {rows!r}")
    sections: dict[str, Any] = {
        name: _section(kind, values[name] or {}, f"{path}, {name}")
        for name, kind in {
            "data": Data,
            "train": Train,
            "evaluate": Evaluate,
            "seeds": Seeds,
            "targets": Targets,
            "first": FirstOptions,
        }.items()
        if name in values
    }
    if "model" in values:
        model = values["model"]
        sections["model"] = model if isinstance(model, str) else _section(Scratch, model or {}, f"{path}, model")
    methods = tuple(
        _section(Method, row, f"{path}, methods, row {number}")
        for number, given in enumerate(rows, start=1)
        for row in expanded(given)
    )
    grid = Grid(methods=methods, baseline=values.get("baseline"), **sections)
    if tofu_dir is not None:
        grid = replace(grid, data=replace(grid.data, tofu_dir=tofu_dir))
    try:
        grid.check()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return grid


def expanded(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each combination of values from the lists in a row, named after the chosen values.

    Example:
        >>> [row["name"] for row in expanded({"name": "GradDiff", "rule_options": {"alpha": [1, 5]}})]
        ['GradDiff alpha=1', 'GradDiff alpha=5']
    """
    places = [(name,) for name, value in row.items() if isinstance(value, list)]
    places += [
        (name, inner)
        for name, value in row.items()
        if isinstance(value, Mapping)
        for inner, choices in value.items()
        if isinstance(choices, list)
    ]
    rows: list[dict[str, Any]] = []
    for chosen in itertools.product(*(_at(row, place) for place in places)):
        made = {name: dict(value) if isinstance(value, Mapping) else value for name, value in row.items()}
        for place, value in zip(places, chosen, strict=True):
            (made if len(place) == 1 else made[place[0]])[place[-1]] = value
        said = "".join(f" {place[-1]}={value}" for place, value in zip(places, chosen, strict=True))
        rows.append(made | {"name": f"{made.get('name', '')}{said}"} if said else made)
    return rows


def _at(row: Mapping[str, Any], place: tuple[str, ...]) -> Any:
    return row[place[0]] if len(place) == 1 else row[place[0]][place[1]]


def _section(kind: type[Section], values: Mapping[str, Any], where: str) -> Section:
    """A dataclass from values in YAML. jsonargparse converts them, among them 3e-4, which YAML takes for a word."""
    from jsonargparse import ArgumentParser

    known = [entry.name for entry in fields(kind)]  # pyright: ignore[reportArgumentType]
    if not isinstance(values, Mapping) or not set(values) <= set(known):
        found = list(values) if isinstance(values, Mapping) else repr(values)
        raise ValueError(f"{where}: expected any of {known}, found {found}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "section")
    try:
        parsed = parser.parse_object({"section": dict(values)})["section"].as_dict()
    except (argparse.ArgumentError, TypeError) as error:
        said = " ".join(str(error).replace("section.", "").split())
        raise ValueError(f"{where}: expected other values, found: {said}") from error
    return kind(**parsed)
