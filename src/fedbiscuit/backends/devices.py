"""Several devices of one machine: the clients of a round are spread over processes, each with an LM of its own.

One of them is this process; the others answer tasks over a socket, as bytes (``wire.py``). Which process answers makes no
difference to the answer, but for a client's scores of the adapters: these stay in the process that made them, so a client
scores and takes its seat always in the same one.
"""

from __future__ import annotations

import collections
import contextlib
import socket
import subprocess
import threading
from collections.abc import Sequence

from fedbiscuit.backends.inprocess import InProcessBackend
from fedbiscuit.backends.wire import MAX_BYTES, pack_reply, pack_task, unpack_reply, unpack_task
from fedbiscuit.types import ClientId, EnvironmentFault, Reply, Task

__all__ = ["Helper", "SeveralDevices", "serve"]


class Helper:
    """Another process that answers tasks. ``command`` starts it; it finds the number of its socket as the last word."""

    def __init__(self, command: Sequence[str], name: str):
        self.name = name
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen([*command, str(theirs.fileno())], pass_fds=[theirs.fileno()])
        self._socket = ours

    def ask(self, task: Task) -> Reply:
        """Its reply. ``EnvironmentFault`` where it is gone."""
        try:
            _send(self._socket, pack_task(task))
            data = _receive(self._socket)
        except OSError:
            data = None
        if data is None:
            raise EnvironmentFault(
                f"the process for {self.name} has ended with code {self._end()} (its own message is above); "
                "go on with --resume, or on fewer devices"
            )
        return unpack_reply(data)

    def stop(self) -> None:
        """Wake whoever waits for its reply, from another thread."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End it: without its socket it stops by itself."""
        self._socket.close()
        self._end()

    def _end(self) -> int:
        """Its exit code, after ten seconds of patience."""
        try:
            return self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


class SeveralDevices:
    """A backend over this process and helpers, which whoever started them ends."""

    def __init__(self, here: InProcessBackend, helpers: Sequence[Helper]):
        self._here = here
        self._helpers = list(helpers)
        self._home = {client: i % (1 + len(helpers)) for i, client in enumerate(sorted(here.clients()))}
        self.at_once = here.at_once * (1 + len(helpers))

    def clients(self) -> list[ClientId]:
        """All clients that have something to train on."""
        return self._here.clients()

    def run(self, tasks: Sequence[Task]) -> list[Reply]:
        """One reply a task, in their order. Training goes to whichever process is free, scores and seats to the client's own."""
        anyone = collections.deque(i for i, task in enumerate(tasks) if task.kind == "train")
        own: list[collections.deque[int]] = [collections.deque() for _ in range(1 + len(self._helpers))]
        for i, task in enumerate(tasks):
            if task.kind != "train":
                own[self._home.get(task.client, 0)].append(i)
        replies: dict[int, Reply] = {}
        faults: list[BaseException] = []

        def work(place: int) -> None:
            try:
                while not faults:
                    try:
                        i = own[place].popleft() if own[place] else anyone.popleft()
                    except IndexError:
                        return
                    replies[i] = self._ask(place, tasks[i])
            except BaseException as fault:
                faults.append(fault)
                for helper in self._helpers:  # nobody waits for the others' tasks, not after Ctrl-C either
                    helper.stop()

        threads = [threading.Thread(target=work, args=(place,), daemon=True) for place in range(1, len(own))]
        for thread in threads:
            thread.start()
        work(0)
        for thread in threads:
            thread.join()
        if faults:
            raise faults[0]
        return [replies[i] for i in range(len(tasks))]

    def _ask(self, place: int, task: Task) -> Reply:
        return self._helpers[place - 1].ask(task) if place else self._here.run([task])[0]


def serve(number: int, backend: InProcessBackend) -> None:
    """Answer tasks from a socket until the other side closes it."""
    with socket.socket(fileno=number) as connection, contextlib.suppress(OSError):
        while (data := _receive(connection)) is not None:
            _send(connection, pack_reply(backend.run([unpack_task(data)])[0]))


def _send(connection: socket.socket, data: bytes) -> None:
    connection.sendall(len(data).to_bytes(8, "little"))
    connection.sendall(data)


def _receive(connection: socket.socket) -> bytes | None:
    """The next message; None where the other side has gone, also in the middle of one."""
    head = _exactly(connection, 8)
    size = int.from_bytes(head or b"", "little")
    return _exactly(connection, size) if head and size <= MAX_BYTES else None


def _exactly(connection: socket.socket, size: int) -> bytes | None:
    data = bytearray(size)
    view, got = memoryview(data), 0
    while got < size:
        count = connection.recv_into(view[got:])
        if count == 0:
            return None
        got += count
    return bytes(data)
