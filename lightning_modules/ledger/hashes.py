"""What stands in a ledger for texts, models and files: SHA-256 hashes."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

_CHUNK = 1 << 20


def canonical(value: object) -> bytes:
    """The one way in which a value is written as JSON: sorted keys, no spaces, ASCII, no NaN.

    Raises:
        ValueError: If JSON cannot hold it.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def sha256(data: bytes) -> str:
    """The hash of some bytes, as 64 digits."""
    return hashlib.sha256(data).hexdigest()


def row_hash(row: Mapping[str, Any]) -> str:
    r"""The hash of a question and its answer, whatever white space and Unicode form they are written in.

    $$\mathrm{SHA256}(\mathrm{canonical}([q, a]))$$ with q and a in Unicode's form NFC, every run of white space one
    space, and none at the ends. Upper and lower case stay apart. Whoever has the exact text, or guesses it, can
    confirm it by this hash: it hides a text, and does not make it anonymous.

    Example:
        >>> row_hash({"question": "Who?", "answer": "Ada."}) == row_hash({"question": " Who?\n", "answer": "Ada. "})
        True
    """
    return sha256(canonical([_normal(str(row["question"])), _normal(str(row["answer"]))]))


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def request_hash(rows: Sequence[str]) -> str:
    """The hash of a request: of the hashes of its different rows, in whatever order they come.

    Example:
        >>> request_hash(["b", "a"]) == request_hash(["a", "b", "a"])
        True
    """
    return sha256(canonical(sorted(set(rows))))


def file_hash(path: Path) -> str:
    """The hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors_hash(folder: Path) -> str:
    """The hash of a saved model's tensors: of the name, type, shape and bytes of each, in the order of their names.

    It does not depend on how the tensors are divided among files, nor on anything else in these files.

    Args:
        folder: With one or more .safetensors files.

    Raises:
        ValueError: If there is none, one of them cannot be read, or a tensor is there twice.

    Cost: every byte is read once; one tensor is in memory at a time.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder}: expected a model saved as .safetensors, found no such file")
    found: dict[str, list[Any]] = {}
    for path in files:
        for name, entry in _tensors(path):
            if name in found:
                raise ValueError(f"{folder}: expected every tensor once, found {name} in two files")
            found[name] = entry
    return sha256(canonical(sorted(found.items())))


def _tensors(path: Path) -> list[tuple[str, list[Any]]]:
    """Name -> type, shape and hash of the bytes."""
    found: list[tuple[str, list[Any]]] = []
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                described = file.get_slice(name)
                data = file.get_tensor(name).reshape(-1).view(torch.uint8)
                digest = hashlib.sha256()
                for start in range(0, len(data), _CHUNK):
                    digest.update(data[start : start + _CHUNK].numpy())
                found.append((name, [described.get_dtype(), list(described.get_shape()), digest.hexdigest()]))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: expected tensors in the safetensors format, found: {error}") from error
    return found


def other_files(folder: Path) -> dict[str, str]:
    """Name -> hash of what is beside the tensors of a saved model: configuration, tokenizer, templates."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".safetensors")
    return {str(path.relative_to(folder)): file_hash(path) for path in paths}
