"""The house: what may import what, that nothing runs in a circle, and that every file is read in one sitting."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("gradsurgery", "lightning_modules")

# From the ground up: a room may import those named, and itself. CONTRIBUTING.md draws the same.
CORE = {
    "native": set[str](),
    "gram": {"native"},
    "rules": {"gram"},
    "losses": {"gram", "native"},
    "optimizer": {"rules", "gram"},
    "lora": {"gram", "losses"},
    "logit_difference": {"lora", "losses"},
    "task_vectors": {"rules", "gram"},
    "integrations": {"optimizer", "losses"},
}
FLOORS = (
    "files",
    "progress",
    "folder",
    "data",
    "metrics",
    "evaluation",
    "training",
    "probes",
    "report",
    "ledger",
    "run",
    "ablation",
    "cli",
)
ALLOWED = {f"gradsurgery.{room}": {f"gradsurgery.{lower}" for lower in lowers} for room, lowers in CORE.items()} | {
    f"lightning_modules.{room}": {f"lightning_modules.{lower}" for lower in FLOORS[:floor]}
    | {f"gradsurgery.{core}" for core in CORE}
    for floor, room in enumerate(FLOORS)
}
LONGEST = 350
MEDIAN = 130


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {name_of(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def imported(source: str) -> Iterator[str]:
    """Every module of ours that this source imports: at the top, inside a function, or for the type checker."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom) and node.module in FILES:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in FILES else node.module


def room_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


def forbidden(module: str, source: str) -> list[str]:
    """A sentence for every import that points upwards."""
    room = room_of(module)
    if room in PACKAGES:  # the package itself only hands out what its rooms hold
        return []
    found: list[str] = []
    for other in dict.fromkeys(imported(source)):
        # `import gradsurgery as gs` is how every room of lightning_modules names the core.
        whole_core = other == "gradsurgery" and room.startswith("lightning_modules")
        if room_of(other) != room and room_of(other) not in ALLOWED[room] and not whole_core:
            lower = ", ".join(sorted(ALLOWED[room])) or "nothing of ours"
            found.append(f"{module} imports {other}, but {room} may import {lower}: arrows point downwards only")
    return found


@pytest.mark.parametrize("module", FILES)
def test_arrows_point_downwards_only(module: str) -> None:
    assert not forbidden(module, FILES[module].read_text())


def test_an_arrow_upwards_is_found_and_named_in_one_sentence() -> None:
    source = "def late():\n    from lightning_modules.run import options\n"
    assert forbidden("lightning_modules.report.html", source)[0].startswith(
        "lightning_modules.report.html imports lightning_modules.run.options, but lightning_modules.report may import "
    )
    assert forbidden("gradsurgery.rules.stateful", "import gradsurgery.optimizer.surgery")
    assert forbidden("gradsurgery.gram", "from gradsurgery import losses")
    assert not forbidden("gradsurgery.optimizer.update", "from gradsurgery import rules\nimport torch")


def test_there_is_no_circle() -> None:
    graph = {module: set(imported(path.read_text())) - {module} for module, path in FILES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other in a circle: {' -> '.join(error.args[1])}")


def test_every_file_is_read_in_one_sitting() -> None:
    lines = {module: len(path.read_text().splitlines()) for module, path in FILES.items()}
    assert {module: number for module, number in lines.items() if number > LONGEST} == {}
    assert median(lines.values()) < MEDIAN


def test_every_room_is_on_a_floor() -> None:
    assert {room_of(module) for module in FILES} - set(PACKAGES) == set(ALLOWED)
