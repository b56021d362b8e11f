"""Characters that would hide or reorder a text, written out: what a person reads is what is there."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

__all__ = ["HIDDEN", "pieces", "visible"]

HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Unicode categories without a glyph: controls, formats, surrogates, private and unassigned ones, line separators."""
JOINERS = "\u200c\u200d"
"""Invisible, but part of ordinary writing: Persian, Indic scripts, emoji."""


def pieces(text: str) -> Iterator[tuple[str, str]]:
    """The text as runs that can be shown as they are, ``(run, "")``, and hidden characters, ``("\\u202e", the character)``."""
    text, start = text.replace("\r\n", "\n"), 0
    for place, c in enumerate(text):
        if c in "\n\t" or c in JOINERS or unicodedata.category(c) not in HIDDEN:
            continue
        if start < place:
            yield text[start:place], ""
        yield c.encode("unicode_escape", "surrogatepass").decode(), c
        start = place + 1
    if start < len(text):
        yield text[start:], ""


def visible(text: str) -> str:
    """The text with everything that would hide or reorder it written out, such as ``\\u202e``."""
    return "".join(shown for shown, _ in pieces(text))
