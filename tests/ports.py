"""Ports for the servers of tests, which other processes bind a moment later."""

from __future__ import annotations

import itertools
import os
import socket

__all__ = ["free_port"]

FIRST, COUNT, EACH = 20_000, 12_000, 60
"""Below 32768, where Linux begins with the ports of outgoing connections: one of those could have it before its server has."""

_next = itertools.count()


def free_port() -> int:
    """A port that nobody listens on now; test processes at the same time look in different places."""
    for _ in range(COUNT):
        port = FIRST + (os.getpid() * EACH + next(_next)) % COUNT
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise AssertionError("no port is free")
