"""Files of a site to which its worker adds lines.

``ledger.jsonl`` has one for every message of a server, with what was asked and what left. ``learned.jsonl`` has one for every
selector that came to be trained on, with how it agrees with a client's held-out comparisons; it is for the site alone.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedbiscuit.rundir.disk import write_all
from fedbiscuit.types import EnvironmentFault, IntegrityError

__all__ = ["ALL_THAT_WAS_SENT", "LEARNED", "LEDGER", "NOTHING_SENT", "Summary"]
__all__ += ["append_row", "read_learned", "read_ledger", "summaries"]

LEDGER, LEARNED = "ledger.jsonl", "learned.jsonl"
ALL_THAT_WAS_SENT = (
    "These answers, with the names of clients and how many comparisons they trained on, are all that the worker sent."
)
NOTHING_SENT = "No message has come yet, and nothing was sent."


@dataclass
class Summary:
    """The ledger's lines about one run, summed up. Times in seconds since 1970; ``not_done`` counts tasks by reason,
    ``errors`` whole orders.
    """

    first: float
    last: float
    orders: int = 0
    rounds: set[int] = field(default_factory=set)
    asked: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)
    not_done: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add a line, on the disk when this returns. A line that a crash has torn stays torn, and the new one is whole."""
    line = json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        write_all(descriptor, b"\n" + line if torn else line)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_ledger(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a ledger; one that a crash has torn is passed over. ``IntegrityError`` for a line of another kind."""
    return _rows(path, {"time", "run", "rounds", "asked", "bytes_in", "bytes_out"}, "a ledger")


def read_learned(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a ``learned.jsonl``, likewise."""
    return _rows(
        path, {"run", "round", "client", "adapter", "num_adapters", "accuracy", "comparisons"}, "a learned.jsonl"
    )


def _rows(path: Path, keys: set[str], kind: str) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return
    except OSError as error:
        raise EnvironmentFault(f"{path}: cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        row: Any = None
        with suppress(ValueError):
            row = json.loads(line)
        if isinstance(row, dict):
            if not keys <= row.keys():
                raise IntegrityError(f"{path}:{number}: not a line of {kind}; has somebody written to it?")
            yield row


def summaries(rows: Iterator[Mapping[str, Any]]) -> dict[str, Summary]:
    """By run, in the order of their first lines."""
    found: dict[str, Summary] = {}
    for row in rows:
        one = found.setdefault(row["run"], Summary(row["time"], row["time"]))
        one.last = row["time"]
        one.orders += 1
        one.rounds |= set(row["rounds"])
        one.asked.update(row["asked"])
        one.sent.update({key: row.get(key, 0) for key in ("deltas", "seats", "bytes_in", "bytes_out")})
        one.not_done.update({why: len(clients) for why, clients in row.get("not_done", {}).items()})
        one.errors.update([row["error"]] if "error" in row else [])
    return found
