"""Reading what somebody else wrote: text, JSON and YAML files, or a sentence that says what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

# How files begin that are taken for text by mistake, and what to do with them.
_SIGNATURES = {
    b"\x1f\x8b": "packed with gzip: unpack it",
    b"PK\x03\x04": "a zip archive: unpack it",
    b"PAR1": "a Parquet file: let its name end in .parquet",
    b"\xff\xfe": "UTF-16: save it as UTF-8",
    b"\xfe\xff": "UTF-16: save it as UTF-8",
}
_BROKEN = (ValueError, RecursionError, yaml.YAMLError)
"""What json and PyYAML raise: also for a number of 5000 digits, a date that is none, or 10000 brackets."""


def read_text(path: str | Path, expected: str) -> str:
    """The text of a file, without its byte order mark.

    Args:
        path: Of the file.
        expected: What it should be, for the message: "a file of examples".

    Raises:
        FileNotFoundError: If there is no such file.
        PermissionError: If it cannot be read.
        ValueError: If it is not UTF-8 text; the message says in which line.
    """
    path = existing_file(path, expected)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PermissionError(
            f"expected {expected} at {path}, found a file that cannot be read ({error.strerror})"
        ) from error
    for signature, found in _SIGNATURES.items():
        if content.startswith(signature):
            raise ValueError(f"{path} is not UTF-8 text: expected {expected}, found {found}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}, is not UTF-8 text ({error}): expected {expected}, save it as UTF-8"
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(
            f"{path}, line {line}: expected {expected}, found a NUL character, so that it is binary or UTF-16: save it as UTF-8"
        )
    return text


def existing_file(path: str | Path, expected: str) -> Path:
    """The path, if there is a file.

    Raises:
        FileNotFoundError: If there is none.
    """
    path = Path(path)
    try:
        other = "a device or a pipe" if path.exists() else "nothing"
        found = None if path.is_file() else "a folder" if path.is_dir() else other
    except OSError as error:  # a name that is too long, a folder that nobody may look into
        raise FileNotFoundError(f"expected {expected} at {str(path)[:200]}, found no such place: {error}") from error
    if found is not None:
        raise FileNotFoundError(f"expected {expected} at {path}, found {found} there: check the path")
    return path


def read_json(path: str | Path, expected: str) -> Any:
    """What a JSON file holds.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not JSON.
    """
    return _parsed(path, expected, "JSON", json.loads)


def read_yaml(path: str | Path, expected: str) -> Any:
    """What a YAML file holds. Tags that would make Python objects are refused, and nothing is executed.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not YAML, or a name is there twice in one place, of which YAML would keep the last.
    """
    return _parsed(path, expected, "YAML", lambda text: yaml.load(text, Loader=_Once))


def read_names(path: str | Path, expected: str) -> dict[str, str]:
    """A YAML file of lines `name: text`, each word as it is written: `017` and `2025-03-01` are names, and no numbers.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not YAML, no such lines, or a name is there twice, of which YAML would keep the last.
    """
    node = _parsed(path, expected, "YAML", lambda text: yaml.compose(text, Loader=yaml.SafeLoader))
    if not isinstance(node, yaml.MappingNode) or not node.value:
        found = {yaml.SequenceNode: "a list", yaml.ScalarNode: "a word", yaml.MappingNode: "{}"}.get(type(node))
        raise ValueError(f"{path}: expected {expected}, found {found or 'nothing'}")
    names: dict[str, str] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not all(isinstance(one, yaml.ScalarNode) and one.value for one in (key, value)):
            raise ValueError(f"{path}, line {line}: expected {expected}, found another kind of line")
        if key.value in names:
            raise ValueError(f"{path}, line {line}: expected every name once, found {key.value!r:.80} again")
        names[key.value] = value.value
    return names


class _Once(yaml.SafeLoader):
    """The safe loader, to which a name that is there twice is no YAML."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        own = list(node.value)  # before YAML takes over what an anchor holds, which may be overridden
        found = super().construct_mapping(node, deep=deep)
        names = [key.value for key, _ in own if isinstance(key, yaml.ScalarNode)]
        if twice := [name for name in names if names.count(name) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]} is there twice", node.start_mark)
        return found


def _parsed(path: str | Path, expected: str, language: str, parse: Callable[[str], Any]) -> Any:
    text = read_text(path, expected)
    try:
        return parse(text)
    except _BROKEN as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{path}: expected {language} with {expected}, found something else: {said}") from error
