"""Several devices of one machine: work is spread over processes, each with an LM of its own.

One of them is this process; the others answer messages over a socket, as bytes (``wire.py``). Of the clients of a round it
makes no difference which process answers, but for a client's scores of the adapters: these stay in the process that made them,
so a client scores and takes its seat always in the same one.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import socket
import subprocess
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from fedbiscuit.backends.inprocess import InProcessBackend
from fedbiscuit.backends.sockets import receive, send
from fedbiscuit.backends.wire import pack_task, unpack_reply
from fedbiscuit.types import ClientId, EnvironmentFault, Reply, Task

__all__ = ["Helper", "SeveralDevices", "serve", "together"]

T = TypeVar("T")


class Helper:
    """Another process that answers messages. ``command`` starts it; it finds the number of its socket as the last word.

    It has a session of its own: Ctrl-C is for this process alone, and it ends with its socket.
    """

    def __init__(self, command: Sequence[str], name: str):
        self.name = name
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno())], pass_fds=[theirs.fileno()], start_new_session=True
            )
        self._socket = ours

    def ask(self, message: bytes) -> bytes:
        """Its reply. ``EnvironmentFault`` where it is gone."""
        with contextlib.suppress(OSError):  # nobody is there to reply either
            send(self._socket, message)
        data = receive(self._socket)
        if data is None:
            raise EnvironmentFault(
                f"the process for {self.name} has ended with code {self._end()} (its own message is above); "
                "nothing that was saved is lost: the same command goes on from there (run and train with --resume), "
                "also with another --gpus"
            )
        return data

    def stop(self) -> None:
        """End it at once, from any thread: whoever waits for its reply wakes up."""
        self._process.kill()

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
        self.away = here.away

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

        def take(place: int) -> int | None:
            try:
                return own[place].popleft() if own[place] else anyone.popleft()
            except IndexError:
                return None

        def work(place: int) -> None:
            try:
                while (i := take(place)) is not None:
                    replies[i] = self._ask(place, tasks[i])
            except BaseException:  # the others take no more
                for tasks_left in (anyone, *own):
                    tasks_left.clear()
                raise

        together(work, self._helpers)
        return [replies[i] for i in range(len(tasks))]

    def _ask(self, place: int, task: Task) -> Reply:
        return unpack_reply(self._helpers[place - 1].ask(pack_task(task))) if place else self._here.run([task])[0]


def together(work: Callable[[int], T], helpers: Sequence[Helper]) -> list[T]:
    """What ``work(0)`` gives, here, and at the same time ``work(1)``, ``work(2)``.. with a helper each.

    The first fault ends all helpers and is raised as soon as this process has done what it is at; after Ctrl-C nobody waits.
    """
    done: dict[int, T] = {}
    faults: list[BaseException] = []

    def guarded(act: Callable[[], None]) -> None:
        try:
            act()
        except BaseException as fault:
            faults.append(fault)
            for helper in helpers:
                helper.stop()

    def one(place: int) -> None:
        done[place] = work(place)

    def here() -> None:
        one(0)
        for thread in threads:
            thread.join()

    threads = [
        threading.Thread(target=guarded, args=(functools.partial(one, place),), daemon=True)
        for place in range(1, 1 + len(helpers))
    ]
    for thread in threads:
        thread.start()
    guarded(here)
    if faults:
        raise faults[0]
    return [done[place] for place in range(1 + len(helpers))]


def serve(number: int, answer: Callable[[bytes], bytes]) -> None:
    """Answer messages from a socket until the other side closes it."""
    with socket.socket(fileno=number) as connection:
        while (data := receive(connection)) is not None:
            reply = answer(data)
            with contextlib.suppress(OSError):
                send(connection, reply)
