"""Independent, slow versions: the hash of a model's tensors read byte by byte, and an entry checked by hand."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any


def tensors_hash(folder: Path) -> str:
    """Reads the safetensors format itself: 8 bytes of length, a JSON header with offsets, the data."""
    found: dict[str, list[Any]] = {}
    for path in folder.glob("*.safetensors"):
        raw = path.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + length])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            data = raw[8 + length + first : 8 + length + last]
            found[name] = [entry["dtype"], entry["shape"], hashlib.sha256(data).hexdigest()]
    listed = [[name, found[name]] for name in sorted(found)]
    return hashlib.sha256(json.dumps(listed, separators=(",", ":")).encode()).hexdigest()


def chain_holds(data: bytes) -> bool:
    """Whether every line is the canonical JSON of an entry with its own hash and that of the entry before."""
    previous = "0" * 64
    for line in data.split(b"\n")[:-1]:
        entry = json.loads(line)
        found = entry.pop("hash")
        text = json.dumps(entry, sort_keys=True, separators=(",", ":")).encode()
        if hashlib.sha256(text).hexdigest() != found or entry["previous"] != previous:
            return False
        previous = found
    return data.endswith(b"\n")
