"""Comparisons out of the store and into it: our JSON lines, TRL's, and the whole history."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedbiscuit.station.store import Store

__all__ = ["COMPARISONS", "Form", "Imported", "export", "import_file", "import_prompts", "records", "refresh"]

COMPARISONS = "comparisons.jsonl"
Form = Literal["comparisons", "trl", "history"]


@dataclass(frozen=True, slots=True)
class Imported:
    """How many lines became new pairs and new lines of the history; and how many were there already."""

    pairs: int
    judgements: int
    known: int


def records(store: Store, form: Form = "comparisons", person: str | None = None) -> Iterator[dict[str, Any]]:
    """What an export has, line by line. Ties, skips, what was undone and the blind test are in ``history`` only."""
    raise NotImplementedError


def export(store: Store, path: Path, form: Form = "comparisons", person: str | None = None) -> int:
    """Write a file that only its owner may read, whole or not at all; how many lines."""
    raise NotImplementedError


def refresh(store: Store) -> None:
    """Bring ``comparisons.jsonl`` in the store's folder up to date; nothing is written where it is."""
    raise NotImplementedError


def import_file(store: Store, path: Path, person: str) -> Imported:
    """Pairs (prompt, output_a, output_b), comparisons in either of our shapes, or an exported history.

    A choice in it becomes this person's judgement, unless the line says whose it is. All or nothing: a fault is a
    ``DataError`` with file and line.
    """
    raise NotImplementedError


def import_prompts(store: Store, path: Path, blind: bool = False) -> int:
    """Prompts from a text file, one a line, or from JSON lines with ``prompt``; how many were new."""
    raise NotImplementedError
