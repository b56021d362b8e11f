"""Answers are written in the background while the person judges the pairs before."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedbiscuit.station.store import Store

__all__ = ["Author", "Authors", "Writer", "Writing", "authors_of", "blind_result"]


@dataclass(frozen=True, slots=True)
class Author:
    """Who writes answers. write(prompt, how many, progress): their texts; ``progress(share)`` is told 0 to 1 as they grow."""

    name: str
    write: Callable[[str, int, Callable[[float], None]], list[str]]


@dataclass(frozen=True, slots=True)
class Authors:
    """usual: writes both answers to a prompt. blind: in the blind test each of the two writes one; None: there is none."""

    usual: Author
    blind: tuple[Author, Author] | None = None


@dataclass(frozen=True, slots=True)
class Writing:
    """What the writer does. state: nothing to do, the model is being loaded, it writes, it waits until some of the pairs are
    judged, or it cannot go on (``error``; ``Writer.retry``). share: of the pair in work, 0 to 1. written, waiting, failed:
    numbers of prompts.
    """

    state: Literal["idle", "loading", "writing", "full", "failed"]
    share: float
    written: int
    waiting: int
    failed: int
    error: str = ""


class Writer:
    """A thread that writes two answers to each waiting prompt, at most ``ahead`` pairs before the person.

    What waits is in the store, so nothing is lost with the process. An error is kept with its prompt and shown.
    """

    def __init__(self, store: Store, person: str, authors: Callable[[], Authors], ahead: int = 12) -> None:
        """authors: loads the models; called in the thread, when the first prompt waits."""
        raise NotImplementedError

    def nudge(self) -> None:
        """Something has changed: a prompt came, or a pair was judged."""

    def retry(self) -> None:
        """Try again what failed."""

    def status(self) -> Writing:
        """What the writer does now."""
        raise NotImplementedError

    def close(self) -> None:
        """Stop at the next token and wait for the thread."""


def authors_of(model: str, policy: Path | None = None) -> Callable[[], Authors]:
    """Loads, when called, a model (as ``model.base`` names it), and the aligned policy of a run or of an exported folder.

    With a policy, it is the policy that writes both answers, and the blind test sets it against the same model without it.
    """
    raise NotImplementedError


def blind_result(store: Store, person: str) -> dict[str, Any] | None:
    """This person's own verdict: ``name``, ``win_rate`` of the policy, its 95% ``interval``, ``wins``, ``losses``, ``ties``.

    None before the first judgement of the blind test.
    """
    raise NotImplementedError


_ = threading
