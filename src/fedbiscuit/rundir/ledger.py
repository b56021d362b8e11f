"""The ledger of a site, ``ledger.jsonl``: a line for every message of a server, with what was asked and what left."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedbiscuit.types import EnvironmentFault, IntegrityError

__all__ = ["ALL_THAT_WAS_SENT", "LEDGER", "NOTHING_SENT", "Summary", "read_ledger", "summaries"]

LEDGER = "ledger.jsonl"
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


def read_ledger(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a ledger; one that a crash has torn is passed over. ``IntegrityError`` for a line of another kind."""
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
            if not {"time", "run", "rounds", "asked", "bytes_in", "bytes_out"} <= row.keys():
                raise IntegrityError(f"{path}:{number}: not a line of a ledger; has somebody written to it?")
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
