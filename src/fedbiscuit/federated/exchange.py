"""Asking clients: each gets one task and counts once; what travels is counted; who is refused is remembered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from fedbiscuit.federated.coding import coded
from fedbiscuit.types import Backend, ClientId, FederationError, Metered, Reply, Task, Weights, num_bytes

__all__ = ["Check", "Exchange", "Lent"]

Check = Callable[[Task, Reply], str | None]
"""Why this reply to this task cannot be used, or None."""


class Lent(Mapping[int, Weights]):
    """Some adapters of the server as they travel (``coding.py``), to be read by clients: every look gives fresh copies.

    So a backend may train in the very tensors it was handed, and neither the server nor the next client sees it.
    """

    def __init__(self, adapters: Mapping[int, Weights], comm_dtype: str = "float32") -> None:
        self._adapters = {u: coded(weights, comm_dtype) for u, weights in adapters.items()}
        self.num_bytes = sum(num_bytes(weights) for weights in self._adapters.values())

    def __getitem__(self, u: int) -> Weights:
        return {name: tensor.detach().clone() for name, tensor in self._adapters[u].items()}

    def __iter__(self) -> Iterator[int]:
        return iter(self._adapters)

    def __len__(self) -> int:
        return len(self._adapters)


class Exchange:
    """All the talk with clients in one round, over one backend.

    ``clients`` are those that can be asked, sorted; ``away`` says which sites cannot and why. ``refused`` maps a client to why
    there is no training of it, ``kept_seats`` to why it chose no other seat: the last unusable reply, until a good one comes.
    ``quarantined`` says what was wrong with the last reply that was sent and not let in. ``bytes_down`` (server to clients) and
    ``bytes_up``: what really travelled where the backend knows it, else the data of all tensors as they would travel.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._meter = backend if isinstance(backend, Metered) else _Meter()
        self._before = self._meter.bytes_down, self._meter.bytes_up
        clients = backend.clients()  # which finds out who is away
        self.away = dict(backend.away)
        self.refused: dict[ClientId, str] = {}
        self.kept_seats: dict[ClientId, str] = {}
        self.quarantined: dict[ClientId, str] = {}
        if not clients:
            raise FederationError(
                f"no client can be asked{self.missing()}; check that clients have data and are connected"
            )
        self.clients = _named_once(clients)

    def missing(self) -> str:
        """Who is missing and why, clients and sites, in brackets; nothing where nobody is."""
        found = {**self.refused, **self.away}
        reasons = "; ".join(f"{who}: {why}" for who, why in sorted(found.items()))
        return f" ({reasons})" if found else ""

    @property
    def bytes_down(self) -> int:
        """Server to clients, so far in this round."""
        return self._meter.bytes_down - self._before[0]

    @property
    def bytes_up(self) -> int:
        """Clients to server, so far in this round."""
        return self._meter.bytes_up - self._before[1]

    def ask(self, tasks: Sequence[Task], check: Check) -> dict[ClientId, Reply]:
        """The replies that can be used, by client and sorted by client, in whatever order they arrived."""
        return {reply.client: reply for reply in self.stream(tasks, check)}

    def stream(self, tasks: Sequence[Task], check: Check) -> Iterator[Reply]:
        """The same one by one, with no more of them in memory than the backend brings at once."""
        ordered = sorted(tasks, key=lambda task: task.client)
        size = self._backend.at_once or len(ordered)
        for start in range(0, len(ordered), size):
            yield from self._ask(ordered[start : start + size], check).values()

    def _ask(self, tasks: Sequence[Task], check: Check) -> dict[ClientId, Reply]:
        answers = _by_client(self._backend.run(tasks))
        if isinstance(self._meter, _Meter):
            self._meter.count(tasks, answers)
        task_of = {task.client: task for task in tasks}
        missing = self.refused if any(task.kind == "train" for task in tasks) else self.kept_seats
        accepted = {}
        for client in sorted(task_of | answers):
            replies = answers.get(client, [])
            reason = _fault(task_of.get(client), replies, check)
            if reason is None:
                accepted[client] = replies[0]
                missing.pop(client, None)
            else:
                missing[client] = reason
                if any(reply.ok or reply.unreadable for reply in replies):
                    self.quarantined[client] = reason
        return accepted


class _Meter:
    """Counts tensors for a backend whose clients are in this process."""

    bytes_down = 0
    bytes_up = 0

    def count(self, tasks: Sequence[Task], answers: Mapping[ClientId, Sequence[Reply]]) -> None:
        """One exchange."""
        self.bytes_down += sum(task.adapters.num_bytes for task in tasks if isinstance(task.adapters, Lent))
        self.bytes_up += sum(_delta_bytes(reply) for replies in answers.values() for reply in replies)


def _fault(task: Task | None, replies: Sequence[Reply], check: Check) -> str | None:
    if task is None:
        return "it answered without being asked in this round"
    if not replies:
        return "no reply"
    if any(_plain(other) != _plain(replies[0]) for other in replies[1:]):
        return f"{len(replies)} replies that differ"
    if not replies[0].ok:
        return replies[0].error[:300] or "it failed without saying why"
    return check(task, replies[0])


def _named_once(clients: Iterable[ClientId]) -> tuple[ClientId, ...]:
    counts = Counter(clients)
    name, times = counts.most_common(1)[0]
    if times > 1:
        raise FederationError(f"{times} clients are called {name!r}; give each client a name of its own")
    return tuple(sorted(counts))


def _by_client(replies: Iterable[Reply]) -> dict[ClientId, list[Reply]]:
    answers: dict[ClientId, list[Reply]] = {}
    for reply in replies:
        answers.setdefault(reply.client, []).append(reply)
    return answers


def _delta_bytes(reply: Reply) -> int:
    tensors = reply.delta.items() if isinstance(reply.delta, Mapping) else ()
    return num_bytes({name: tensor for name, tensor in tensors if isinstance(tensor, Tensor)})


def _plain(reply: Reply) -> Reply:
    """The same reply with lists for tensors, so that ``==`` compares every value."""
    if not isinstance(reply.delta, Mapping):
        return reply
    delta: Any = {
        name: (tensor.dtype, tensor.tolist()) if isinstance(tensor, Tensor) else tensor
        for name, tensor in reply.delta.items()
    }
    return replace(reply, delta=delta)
