"""Whether this machine's clock is that of the server: Flower refuses a signature whose time is too far from its own."""

from __future__ import annotations

import contextlib
import http.client
import ssl
import time
from datetime import UTC
from email.utils import parsedate_to_datetime
from pathlib import Path

__all__ = ["clock_line", "is_refused", "seconds_ahead"]

AHEAD, BEHIND = 5, 300
"""Seconds by which a site's clock may be ahead of the server's or behind it (Flower 1.41, 1.42)."""
SECONDS = 5.0
"""What the server may take to say its time."""


def seconds_ahead(address: str, ca: Path | None) -> int | None:
    """By how much this machine's clock is ahead of that of the server at HOST:PORT, to a second or two; None: no answer."""
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError, ValueError, TypeError, http.client.HTTPException):
        context = None if ca is None else ssl.create_default_context(cafile=str(ca))
        connection = (
            http.client.HTTPConnection(host.strip("[]"), int(port), timeout=SECONDS)
            if context is None
            else http.client.HTTPSConnection(host.strip("[]"), int(port), timeout=SECONDS, context=context)
        )
        with contextlib.closing(connection):
            connection.request("GET", "/health")
            there = parsedate_to_datetime(connection.getresponse().getheader("Date") or "")
        return round(time.time() - there.astimezone(UTC).timestamp())
    return None


def is_refused(ahead: int | None) -> bool:
    """Whether a server refuses a site whose clock is so many seconds ahead of its own."""
    return ahead is not None and not -BEHIND < ahead < AHEAD


def clock_line(ahead: int | None) -> str:
    """That in words, and what to do."""
    if ahead is None:
        return "cannot be compared with the server's: it does not answer"
    if -2 <= ahead <= 2:
        return "as the server's"
    where = f"{abs(ahead)} s {'ahead of' if ahead > 0 else 'behind'} the server's"
    if not is_refused(ahead):
        return where
    return (
        f"{where}, so the server refuses this site (it may be {AHEAD} s ahead or {BEHIND} s behind); set the wrong one of both, "
        "best by NTP: `timedatectl set-ntp true`"
    )
