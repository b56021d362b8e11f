"""The station: a store, the person who sits at it, and the writer beside them. What the page calls."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeVar

from fedbiscuit.data.records import client_of
from fedbiscuit.station import exchange, queue
from fedbiscuit.station.background import Background
from fedbiscuit.station.nouns import Event, Presentation
from fedbiscuit.station.scoring import Readers, Scorer
from fedbiscuit.station.store import Store
from fedbiscuit.station.writing import Authors, Writer, Writing

__all__ = ["Station"]

T = TypeVar("T")

MIRROR_SECONDS = 2.0
"""``comparisons.jsonl`` is written anew, whole, when nothing has changed for so long, and not at each click."""


class Station:
    """One person at one store. After every change the writer knows, and ``comparisons.jsonl`` follows soon. Thread-safe.

    What is deleted is gone from both when the call returns.
    """

    def __init__(
        self,
        store: Store,
        person: str = "me",
        asking: queue.Asking | None = None,
        authors: Callable[[], Authors] | None = None,
        readers: Callable[[], Readers] | None = None,
        run: Path | None = None,
        site: Path | None = None,
    ) -> None:
        """authors: from ``writing.authors_of``; None: nothing is written here, only pairs that exist are compared. readers: from
        ``scoring.readers_of``, of the selectors that ``asking.selectors`` names. run, site: folders for ``looking``.
        """
        client_of({"client": person})  # as strict as where the exported file will be read
        self.store, self.person, self.asking = store, person, asking or queue.Asking()
        self.run, self.site = run, site
        self._closed = False
        exchange.sweep(store)
        exchange.refresh(store)  # a crash may have come between the two
        self._mirror = Background("comparisons.jsonl", self._refresh, MIRROR_SECONDS)
        self.writer = Writer(store, person, authors) if authors is not None else None
        self._scorer = Scorer(store, self.asking.selectors, readers) if readers is not None else None

    def close(self) -> None:
        """Stop the threads and bring ``comparisons.jsonl`` up to date; the store stays open."""
        if self._closed:
            return
        self._closed = True
        for thread in (self.writer, self._scorer, self._mirror):
            if thread is not None:
                thread.close()
        exchange.refresh(self.store)

    def settle(self) -> None:
        """Wait until ``comparisons.jsonl`` is up to date."""
        self._mirror.settle()

    def problem(self) -> str:
        """Why ``comparisons.jsonl`` could not be written, or pairs not be scored, a sentence; "" if all is well."""
        return self._mirror.error or (self._scorer.error if self._scorer is not None else "")

    def present(self, blind: bool = False) -> Presentation | None:
        """What the person sees now; None: nothing is left (the writer may be at work)."""
        return queue.present(self.store, self.person, replace(self.asking, blind=blind))

    def progress(self, blind: bool = False) -> queue.Progress:
        """How far the person is."""
        return queue.progress(self.store, self.person, replace(self.asking, blind=blind))

    def consistency(self) -> queue.Consistency:
        """How far the person's answers can be relied on."""
        return queue.consistency(self.store.history(self.person))

    def writing(self) -> Writing | None:
        """What the writer does; None: there is none."""
        return None if self.writer is None else self.writer.status()

    def judge(self, token: str, picked: Literal[0, 1] | None, seconds: float | None = None, reason: str = "") -> Event:
        """As ``Store.judge``."""
        return self._changed(self.store.judge(token, picked, seconds, reason))

    def skip(self, token: str, seconds: float | None = None, reason: str = "") -> Event:
        """As ``Store.skip``."""
        return self._changed(self.store.skip(token, seconds, reason))

    def flag(self, token: str, reason: str = "") -> Event:
        """As ``Store.flag``."""
        return self._changed(self.store.flag(token, reason))

    def undo(self, token: str | None = None) -> Presentation | None:
        """As ``Store.undo``. Give the token that ``Progress.last`` named, so that two clicks are one undo."""
        return self._changed(self.store.undo(self.person, token))

    def ask(self, prompts: list[str], blind: bool = False) -> int:
        """Add prompts for the writer; how many were new. Blank ones are left out."""
        texts = [text.strip() for text in prompts if text.strip()]
        return self._changed(self.store.add_prompts(texts, blind))

    def import_file(self, path: Path) -> exchange.Imported:
        """As ``exchange.import_file``."""
        return self._changed(exchange.import_file(self.store, path))

    def import_prompts(self, path: Path, blind: bool = False) -> tuple[int, int]:
        """As ``exchange.import_prompts``."""
        return self._changed(exchange.import_prompts(self.store, path, blind))

    def forget_pair(self, id: str) -> None:
        """As ``Store.forget_pair``."""
        with self._forgetting():
            self.store.forget_pair(id)

    def forget_prompt(self, id: int) -> None:
        """As ``Store.forget_prompt``."""
        with self._forgetting():
            self.store.forget_prompt(id)

    def forget_person(self) -> None:
        """As ``Store.forget_person``, of the one who sits here."""
        with self._forgetting():
            self.store.forget_person(self.person)

    def forget_all(self) -> None:
        """As ``Store.forget_all``."""
        with self._forgetting():
            self.store.forget_all()

    def _changed(self, result: T) -> T:
        for thread in (self._mirror, self.writer, self._scorer):
            if thread is not None:
                thread.nudge()
        return result

    @contextlib.contextmanager
    def _forgetting(self) -> Iterator[None]:
        with exchange.forgetting(self.store):
            yield
        self._changed(None)

    def _refresh(self) -> bool:
        exchange.refresh(self.store)
        return False
