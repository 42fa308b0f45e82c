"""What is supported and what is refused, as the tests declare it: the tables of README.md.

    python tests/support.py            print them
    python tests/support.py --write    put them into README.md, between its two comment lines

A test, or a test file in its `pytestmark`, declares ``pytest.mark.supports(row, what)`` or ``pytest.mark.refuses(what, why)``.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.marked import marked, write_marked

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- support: python tests/support.py --write -->", "<!-- /support -->"

ROWS = (
    "A loop by hand",
    "Lightning, automatic optimization",
    "Lightning, manual optimization",
    "Hugging Face Trainer",
    "TRL's SFTTrainer",
    "Accelerate",
    "GradScaler and autocast",
    "DDP",
    "FSDP2 (`fully_shard`)",
    "Tensor parallelism",
    "Checkpoints",
    "PEFT",
    "Rows at moved weights",
    "The command",
)
"""What can be supported, in the table's order."""


class Declared(NamedTuple):
    """One marker."""

    kind: str  # supports or refuses
    subject: str
    text: str
    file: Path


def declared() -> list[Declared]:
    """Every marker of the test files, in the order of their paths and lines."""
    sources = {path: path.read_text() for path in sorted((ROOT / "tests").rglob("test_*.py"))}
    # Parsing them all would take seconds.
    marked = {path: text for path, text in sources.items() if "mark.supports(" in text or "mark.refuses(" in text}
    return [each for path, text in marked.items() for each in markers(text, path)]


def markers(source: str, path: Path) -> Iterator[Declared]:
    """Those of one file."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    for call in sorted(calls, key=lambda node: node.lineno):
        match call:
            case ast.Call(
                func=ast.Attribute(value=ast.Attribute(attr="mark"), attr="supports" | "refuses" as kind),
                args=[ast.Constant(value=str(subject)), ast.Constant(value=str(text))],
            ):
                if kind == "supports" and subject not in ROWS:
                    raise ValueError(f"{path}:{call.lineno}: expected one of {list(ROWS)}, found {subject!r}")
                yield Declared(kind, subject, text, path.relative_to(ROOT))
            case _:
                pass


def tables() -> str:
    """Both tables in Markdown."""
    found = declared()
    lines = ["| where | what is exact | tests |", "|---|---|---|"]
    for row in ROWS:
        of_row = [each for each in found if each.kind == "supports" and each.subject == row]
        if of_row:
            texts = "; ".join(dict.fromkeys(each.text for each in of_row))
            lines.append(f"| {row} | {texts} | {_links(of_row)} |")
    lines += ["", "| refused, or not to be had | why, and what to do | tests |", "|---|---|---|"]
    refused = [each for each in found if each.kind == "refuses"]
    for subject in dict.fromkeys(each.subject for each in refused):
        of_row = [each for each in refused if each.subject == subject]
        texts = "; ".join(dict.fromkeys(each.text for each in of_row))
        lines.append(f"| {subject} | {texts} | {_links(of_row)} |")
    return "\n".join(lines)


def _links(found: list[Declared]) -> str:
    files = dict.fromkeys(each.file for each in found)
    return ", ".join(f"[{path.stem.removeprefix('test_')}]({path.as_posix()})" for path in files)


def block(text: str) -> str | None:
    """What stands between the two comment lines; None where they are not."""
    return marked(text, BEGIN, END)


def main() -> int:
    """Print the tables, or write them."""
    if "--write" not in sys.argv[1:]:
        sys.stdout.write(f"{BEGIN}\n{tables()}\n{END}\n")
        return 0
    try:
        write_marked(ROOT / "README.md", BEGIN, END, tables())
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
