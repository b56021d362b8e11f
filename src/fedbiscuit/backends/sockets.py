"""Messages over a socket: eight bytes of length, then the bytes. Imports nothing heavy, for those who only carry messages."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

from fedbiscuit.types import EnvironmentFault

__all__ = ["MAX_BYTES", "ask_at", "receive", "send"]

MAX_BYTES = 2**31
"""The largest message that is read. A LoRA adapter of a 70-billion model is below one gigabyte."""


def send(connection: socket.socket, data: bytes) -> None:
    """One message."""
    connection.sendall(len(data).to_bytes(8, "little"))
    connection.sendall(data)


def receive(connection: socket.socket) -> bytes | None:
    """The next message; None where the other side has gone, also in the middle of one."""
    head = _exactly(connection, 8)
    size = int.from_bytes(head or b"", "little")
    return _exactly(connection, size) if head and size <= MAX_BYTES else None


def ask_at(path: Path, data: bytes, timeout: float) -> bytes:
    """What the process at a unix socket answers. ``EnvironmentFault`` where none is there, or none in ``timeout`` seconds."""
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as connection:
        connection.settimeout(timeout)
        try:
            connection.connect(str(path))
            send(connection, data)
            answer = receive(connection)
        except TimeoutError:
            raise EnvironmentFault(f"the worker at {path} did not answer in {timeout:g} seconds") from None
        except OSError as error:
            raise EnvironmentFault(
                f"the worker is not there ({path}: {error.strerror or error}); start it with `fedbiscuit client start`"
            ) from None
    if answer is None:
        raise EnvironmentFault(f"the worker at {path} ended while it answered; its own log says why")
    return answer


def _exactly(connection: socket.socket, size: int) -> bytes | None:
    data = bytearray(size)
    view, got = memoryview(data), 0
    while got < size:
        count = connection.recv_into(view[got:])
        if count == 0:
            return None
        got += count
    return bytes(data)
