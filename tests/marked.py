"""What programs write into documents: it stands between two comment lines, and nothing else of the file is touched."""

from __future__ import annotations

from pathlib import Path


def marked(text: str, begin: str, end: str) -> str | None:
    """What stands between the two comment lines; None where they are not."""
    if begin not in text or end not in text:
        return None
    return text.split(begin, 1)[1].split(end, 1)[0].strip()


def write_marked(path: Path, begin: str, end: str, content: str) -> None:
    """Replace what stands between the two comment lines of a file.

    Raises:
        ValueError: If the file has no such lines; it is as it was then.
    """
    text = path.read_text(encoding="utf-8")
    if marked(text, begin, end) is None:
        raise ValueError(
            f"{path.name}: expected the lines {begin} and {end}, found none; put them where the tables belong"
        )
    before, rest = text.split(begin, 1)
    path.write_text(f"{before}{begin}\n{content}\n{end}{rest.split(end, 1)[1]}", encoding="utf-8")
