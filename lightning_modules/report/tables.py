"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, text: Collection[str]) -> list[str]:
    """Returns the lines of a Markdown table.

    Cells are written as they are: a cell that holds a vertical bar must be escaped before.

    Args:
        header: the names of the columns.
        rows: the cells of each row, as many as there are columns.
        text: the names of the columns that hold text; the others hold numbers, which are aligned on the right.

    Example:
        >>> markdown_table(["split", "n"], [["forget", "40"]], text={"split"})
        ['| split | n |', '|---|---:|', '| forget | 40 |']
    """
    alignment = "|".join("---" if name in text else "---:" for name in header)
    return [f"| {' | '.join(header)} |", f"|{alignment}|", *(f"| {' | '.join(row)} |" for row in rows)]
