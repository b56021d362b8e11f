"""What my selector learned, and what left this machine: read from files that are there, nothing made up where they are not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Learned", "Left", "LeftRow", "RoundAccuracy", "what_left", "what_was_learned"]


@dataclass(frozen=True, slots=True)
class RoundAccuracy:
    """Accuracy of the selector of the person's group on the held-out judgements of this person (0 to 1)."""

    round: int
    accuracy: float


@dataclass(frozen=True, slots=True)
class Learned:
    """What a run says of one client. ``missing``: sentences about what it does not say, and how to get it.

    group: the number of its group, from 0; num_groups: how many there are. final, pairs: accuracy at the end, and on how many
    judgements. with_global: how often (0 to 1) my selector and the global one choose the same on them.
    """

    run: str
    client: str
    rounds: tuple[RoundAccuracy, ...]
    group: int | None
    num_groups: int | None
    final: float | None
    pairs: int | None
    with_global: float | None
    missing: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LeftRow:
    """What was asked and what left in one round of one run. asked: how many tasks of each kind."""

    run: str
    round: int
    asked: dict[str, int]
    deltas: int
    seats: int
    bytes_out: int
    bytes_in: int


@dataclass(frozen=True, slots=True)
class Left:
    """The ledger of a site, by run and round, and a sentence that says what it means."""

    rows: tuple[LeftRow, ...]
    bytes_out: int
    bytes_in: int
    sentence: str


def what_was_learned(run: Path, client: str) -> Learned:
    """From the folder of a run; ``ConfigError`` where it is none."""
    raise NotImplementedError


def what_left(site: Path | None) -> Left:
    """From the folder of a site (``fedbiscuit client init``); None: no site, so nothing left through fedbiscuit."""
    raise NotImplementedError
