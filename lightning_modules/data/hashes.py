"""A short name for data, which is another where the data are others."""

from __future__ import annotations

import hashlib
import json


def hashed(value: object) -> str:
    """A hash of anything that JSON can hold.

    Example:
        >>> hashed({"a": 1, "b": 2})[:12] == hashed({"b": 2, "a": 1})[:12]
        True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
