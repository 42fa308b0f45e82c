"""Data sets in their published layout, configurations and splits: from the Hugging Face hub, or from a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lightning_modules.data.files import read_text
from lightning_modules.data.rows import read_rows

# Here and not beside their data modules, which import torch: the parser needs them before torch is there.
MUSECorpus = Literal["news", "books"]
WMDPSubject = Literal["bio", "cyber"]

_ENDINGS = (".json", ".jsonl", ".csv", ".parquet")


@dataclass(frozen=True)
class PublishedSplit:
    """One split of a data set on the hub, and where a folder keeps it.

    Attributes:
        repository: the data set's name on the hub.
        config: the configuration.
        split: the split.
        files: other files that hold the split, without ending and relative to the folder: how its authors also publish
            it.
        within: the folder inside the given one that stands for the data set.
    """

    repository: str
    config: str
    split: str
    files: tuple[str, ...] = field(default=())
    within: str = ""


def published_rows(wanted: PublishedSplit, folder: str | Path | None = None) -> list[tuple[str, dict[str, Any]]]:
    """Returns the rows of a split, each with its place for error messages.

    In a folder it is `CONFIG/SPLIT.json` (also `.jsonl`, `.csv`, `.parquet`, or `.txt`, one text), or
    `CONFIG/SPLIT-*.parquet` as in a clone of the hub's repository, or one of the split's own `files`. A row that is a
    string stands for `{"text": string}`.

    Args:
        wanted: the split.
        folder: where the files are; `None` loads from the hub, which needs the `datasets` package.

    Raises:
        FileNotFoundError: if the folder lacks the split.
        ValueError: if a file is broken or empty, or a row is neither an object nor a string.
        RuntimeError: if the hub cannot be reached, or lacks the split.
        ImportError: without `datasets`, or for Parquet without pyarrow.
    """
    if folder is None:
        return _from_hub(wanted)
    rows: list[tuple[str, dict[str, Any]]] = []
    paths = _files(wanted, Path(folder) / wanted.within)
    for path in paths:
        if path.suffix == ".txt":
            rows.append((str(path), {"text": read_text(path, "a text")}))
            continue
        for where, row in read_rows(path):
            place = f"{path}, {where}"
            if isinstance(row, str):
                rows.append((place, {"text": row}))
            elif isinstance(row, Mapping):
                rows.append((place, dict(row)))
            else:
                raise ValueError(f"{place}: expected an object or a text, found {type(row).__name__}")
    if not rows:
        raise ValueError(f"{paths[0]} is empty: expected the split {wanted.split} of {wanted.repository}")
    return rows


def text_of(row: Mapping[str, Any], name: str, where: str) -> str:
    """Returns a column of a row that holds text.

    Raises:
        ValueError: if there is no such column, it holds something else, or nothing but white space.
    """
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        found = f"the columns {', '.join(map(str, row))}" if name not in row else f"{value!r:.80}"
        raise ValueError(f"{where}: expected {name} with some text, found {found}")
    return value


def _files(wanted: PublishedSplit, folder: Path) -> list[Path]:
    for stem in (f"{wanted.config}/{wanted.split}", *wanted.files):
        place = folder / stem
        for ending in (*_ENDINGS, ".txt"):
            if (path := place.with_name(place.name + ending)).is_file():
                return [path]
        if shards := sorted(place.parent.glob(f"{place.name}-*.parquet")):
            return shards
    named = " or ".join(f"{stem}.json" for stem in (f"{wanted.config}/{wanted.split}", *wanted.files))
    raise FileNotFoundError(
        f"expected {named} in {folder} (or .jsonl, .csv, .parquet, or {wanted.config}/{wanted.split}-*.parquet), found none: give a folder "
        f"with the layout of {wanted.repository} on the hub, or none, to load from there"
    )


def _from_hub(wanted: PublishedSplit) -> list[tuple[str, dict[str, Any]]]:
    name = f"{wanted.config}/{wanted.split} of {wanted.repository}"
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(f"loading {name} from the hub needs the datasets package: pip install datasets") from error
    try:
        rows: Any = load_dataset(wanted.repository, wanted.config, split=wanted.split)
    # Whatever goes wrong (no network, a proxy, a gate, a moved file), the advice is the same.
    except Exception as error:
        raise RuntimeError(
            f"could not load {name} from the hub ({type(error).__name__}: {' '.join(str(error).split())[:400]}): go online once, or give a "
            "folder that holds it"
        ) from error
    return [(f"{name}, row {number}", dict(row)) for number, row in enumerate(rows, start=1)]
