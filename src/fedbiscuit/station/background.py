"""One piece of work after another in a thread, whenever somebody says that there may be some."""

from __future__ import annotations

import threading
from collections.abc import Callable

from fedbiscuit.types import FedbiscuitError

__all__ = ["Background"]


class Background:
    """A thread that calls ``work`` after each nudge, and again while it returns True. What it raises is ``error``, a sentence."""

    def __init__(self, name: str, work: Callable[[], bool], pause: float = 0.0) -> None:
        """pause: begin when so many seconds have passed without a nudge, or when somebody waits (``settle``)."""
        self._work, self._pause = work, pause
        self._awaited = 0
        self._news = threading.Condition()
        self._asked, self._done = 0, 0
        self.stopping = threading.Event()
        self.error = ""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def nudge(self) -> None:
        """There may be something to do."""
        with self._news:
            self._asked += 1
            self._news.notify_all()

    def settle(self, seconds: float = 60.0) -> bool:
        """Wait until all that was asked for so far is done; False if it takes longer."""
        with self._news:
            asked = self._awaited = self._asked
            self._news.notify_all()
            return self._news.wait_for(lambda: self._done >= asked or self.stopping.is_set(), seconds)

    def close(self) -> None:
        """Let the work that is being done see ``stopping``, and wait for it."""
        with self._news:
            self.stopping.set()
            self._news.notify_all()
        self._thread.join()

    def _wait_for_quiet(self) -> int:
        """How many nudges there are when none has come for a pause, or somebody waits for one that is not done."""

        def hurried() -> bool:
            return self._awaited > self._done or self.stopping.is_set()

        while self._pause and not hurried():
            before = self._asked
            self._news.wait_for(lambda seen=before: hurried() or self._asked > seen, self._pause)  # type: ignore[misc]
            if self._asked == before:
                break
        return self._asked

    def _run(self) -> None:
        while not self.stopping.is_set():
            with self._news:
                self._news.wait_for(lambda: self._asked > self._done or self.stopping.is_set())
                asked = self._wait_for_quiet()
            try:
                while not self.stopping.is_set() and self._work():
                    pass
                self.error = ""
            except FedbiscuitError as error:
                self.error = str(error)
            except Exception as error:  # nobody sees what a thread raises, so it is shown on the page
                self.error = f"{type(error).__name__}: {error}"
            with self._news:
                self._done = asked
                self._news.notify_all()
