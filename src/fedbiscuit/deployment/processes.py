"""Processes that are kept up: started again when they die, ended with all that they have started, their logs kept small.

None outlives the process that started it (on Linux, however that one ends).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Child", "end_with_parent"]

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
STEADY = 60.0
"""Seconds after which a process that dies counts as one that worked: its next start waits ``FIRST_PAUSE`` again."""
LARGE_LOG = 10_000_000
"""Bytes of a log beyond which it is put away as LOG.1, in place of the one before."""


@dataclass
class Child:
    """A process that is started again after a pause that grows while it dies at once.

    ``end_within``: seconds from SIGTERM to SIGKILL, for it and for what it has started.
    """

    name: str
    words: Sequence[object]
    log: Path
    end_within: float
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    process: subprocess.Popen[bytes] | None = None
    pause: float = FIRST_PAUSE
    started: float = 0.0
    not_before: float = 0.0
    read: int = 0
    """Bytes of the log that were looked at."""

    @property
    def pid(self) -> int:
        """0 where it does not run."""
        return self.process.pid if self.process is not None else 0

    def start(self) -> None:
        """Start it in a session of its own, so that Ctrl-C reaches us alone, with its output behind what is in the log."""
        descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            self.read = os.fstat(descriptor).st_size
            self.process = subprocess.Popen(
                [str(word) for word in self.words], env=self.environment, start_new_session=True, stdin=subprocess.DEVNULL,
                stdout=descriptor, stderr=subprocess.STDOUT, preexec_fn=end_with_parent,
            )  # fmt: skip
        finally:
            os.close(descriptor)
        self.started = time.monotonic()

    def has_died(self) -> str:
        """How it ended, once, when it has; the time of the next start is set."""
        if self.process is None or self.process.poll() is None:
            return ""
        code, now = self.process.returncode, time.monotonic()
        self._kill_group()
        self.process = None
        if now - self.started > STEADY:
            self.pause = FIRST_PAUSE
        self.not_before, wait = now + self.pause, self.pause
        self.pause = min(2 * self.pause, LONGEST_PAUSE)
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"the {self.name} {how}; it is started again in {wait:g} s ({self.log} says more)"

    def new_lines(self) -> list[str]:
        """What its log says since the last look, whole lines. A log that has become large is put away."""
        with contextlib.suppress(OSError), self.log.open("rb") as file:
            file.seek(self.read)
            data = file.read(LARGE_LOG)
            end = data.rfind(b"\n") + 1
            self.read += end
            if self.read > LARGE_LOG:
                shutil.copyfile(self.log, self.log.with_name(f"{self.log.name}.1"))
                os.truncate(self.log, 0)  # whoever writes appends, and so goes on at its new end
                self.read = 0
            return data[:end].decode("utf-8", "replace").splitlines()
        return []

    def end(self) -> None:
        """SIGTERM, and after its time SIGKILL, to it and to what it has started."""
        if self.process is None:
            return
        self.process.terminate()
        until = time.monotonic() + self.end_within
        while self._group_lives() and time.monotonic() < until:
            time.sleep(0.05)
        self._kill_group()
        self.process.wait()
        self.process = None

    def _group_lives(self) -> bool:
        assert self.process is not None
        self.process.poll()
        try:
            os.killpg(self.process.pid, 0)
        except (ProcessLookupError, PermissionError):
            return False
        return True

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)


def end_with_parent() -> None:
    """In the child: SIGTERM when the process that started it ends, however it does. Only Linux can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
