"""Signs in place of control characters: a text of a run, or of an error, may hold any."""

from __future__ import annotations

import unicodedata
from typing import Any


def visible(text: Any) -> str:
    r"""Returns a text with visible signs instead of control characters, which are invalid in HTML and invisible.

    Example:
        >>> visible("a\x00b")
        'a␀b'
    """
    return "".join(_visible(character) for character in str(text))


def _visible(character: str) -> str:
    code = ord(character)
    if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cs"):
        return character
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"
