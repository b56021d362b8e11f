"""Messages over a socket: eight bytes of length, then the bytes. Imports nothing heavy, for those who only carry messages."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path
from time import monotonic

from fedbiscuit.types import EnvironmentFault, FederationError

__all__ = ["MAX_BYTES", "ask_at", "receive", "send"]

MAX_BYTES = 2**31
"""The largest message that is read. A LoRA adapter of a 70-billion model is below one gigabyte."""
CHUNK = 2**20


def send(connection: socket.socket, data: bytes) -> None:
    """One message."""
    connection.sendall(len(data).to_bytes(8, "little"))
    connection.sendall(data)


def receive(connection: socket.socket, deadline: float | None = None) -> bytes | None:
    """The next message; None where the other side has gone, also in the middle of one.

    ``FederationError`` for one that is too large. Memory grows with what came, not with what was announced. Without a deadline
    the connection's own time limits each piece.
    """
    head = _exactly(connection, 8, deadline)
    size = int.from_bytes(head or b"", "little")
    if size > MAX_BYTES:
        raise FederationError(f"message: {size} bytes; at most {MAX_BYTES} are read")
    return _exactly(connection, size, deadline) if head else None


def ask_at(path: Path, data: bytes, timeout: float) -> bytes:
    """What the worker at a unix socket answers. ``EnvironmentFault`` where none is there, or none in ``timeout`` seconds.

    Its words may go to the server, so they do not name the path.
    """
    deadline = monotonic() + timeout
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as connection:
        try:
            _limit(connection, deadline)
            connection.connect(str(path))
            _limit(connection, deadline)
            send(connection, data)
            answer = receive(connection, deadline)
        except TimeoutError:
            raise EnvironmentFault(f"this site's worker did not answer in {timeout:g} seconds") from None
        except OSError as error:
            raise EnvironmentFault(
                f"this site's worker is not there ({error.strerror or type(error).__name__}); its administrator starts it with "
                "`fedbiscuit client start`"
            ) from None
    if answer is None:
        raise EnvironmentFault("this site's worker ended while it answered; its own log says why")
    return answer


def _limit(connection: socket.socket, deadline: float) -> None:
    """The next call may take what is left."""
    left = deadline - monotonic()
    if left <= 0:
        raise TimeoutError
    connection.settimeout(left)


def _exactly(connection: socket.socket, size: int, deadline: float | None) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        if deadline is not None:
            _limit(connection, deadline)
        try:
            came = connection.recv(min(CHUNK, size - len(data)))
        except ConnectionError:
            return None
        if not came:
            return None
        data += came
    return bytes(data)
