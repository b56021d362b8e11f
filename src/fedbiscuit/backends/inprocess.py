"""All clients around one frozen LM, in this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from fedbiscuit.backends.client import Desk, Memory, answer
from fedbiscuit.types import ClientData, ClientId, FedbiscuitError, Reply, Task

__all__ = ["InProcessBackend"]


class InProcessBackend:
    """Answers tasks one after another with the LM of one desk; the data of all clients is here.

    ``told``: what a failed reply says of an error.
    """

    at_once = 16
    away: Mapping[str, str] = MappingProxyType({})

    def __init__(self, desk: Desk, data: Mapping[ClientId, ClientData], told: Callable[[BaseException], str] = str):
        self._desk = desk
        self._data = data
        self._told = told
        self._memory = {client: Memory() for client in data}

    def clients(self) -> list[ClientId]:
        """All clients that have something to train on."""
        return sorted(client for client, data in self._data.items() if data.train)

    def run(self, tasks: Sequence[Task]) -> list[Reply]:
        """One reply a task. A client that fails is a reply that says why; a fault of ours is not hidden as one."""
        replies = []
        for task in tasks:
            try:
                reply = answer(task, self._data[task.client], self._desk, self._memory[task.client])
            except (FedbiscuitError, MemoryError) as error:
                reply = Reply(task.client, ok=False, error=self._told(error) or type(error).__name__)
            except RuntimeError as error:
                if "out of memory" not in str(error).lower():
                    raise
                lack = MemoryError(f"out of memory: lower batch_size and raise grad_accum ({error})")
                reply = Reply(task.client, ok=False, error=self._told(lack))
            replies.append(reply)
        return replies
