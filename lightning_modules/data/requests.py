"""Several deletion requests in one file: a name for each, and where its rows are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

from lightning_modules.data.examples import Example, read_examples
from lightning_modules.data.files import read_names

_EXPECTED = "deletion requests, one `name: file of rows` a line"


def read_requests(path: str | Path) -> dict[str, list[Example]]:
    """The rows of every request of a YAML file, one `name: file` a line, in its order.

    Args:
        path: Of the file. The files that it names are such as `read_examples` reads, as seen from where the command is
            started, like any other file that an option names.

    Raises:
        FileNotFoundError: If one of these files is not there.
        ValueError: If it is no such file, a name is there twice or not in one line, or a file is not usable; the
            message names the request.
    """
    found: dict[str, list[Example]] = {}
    for name, file in read_names(path, _EXPECTED).items():
        if not name.strip() or not name.isprintable():
            raise ValueError(f"{path}: expected the name of a request in one line, found {name!r:.80}")
        try:
            found[name] = read_examples(file)
        except (FileNotFoundError, ValueError) as error:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(f"{path}, request {name!r}: {error}") from error
    return found


def together(requests: Mapping[str, Sequence[Example]]) -> list[Example]:
    """The rows of all requests, one request after the other."""
    return list(chain.from_iterable(requests.values()))
