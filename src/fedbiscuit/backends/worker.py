"""The worker of one site: it holds the base model once and the comparisons of all its clients, and answers orders.

It stays when Flower's processes come and go. An order that comes twice is answered with the same replies; a site decides by
its ``Rules`` what it takes part in; what was asked and what left stands in its ledger.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from fedbiscuit.backends.bundle import Answer, Order, opened_adapter, pack_answer, unpack_order
from fedbiscuit.backends.inprocess import InProcessBackend
from fedbiscuit.backends.sockets import receive, send
from fedbiscuit.types import ClientId, EnvironmentFault, FedbiscuitError, Reply, Task, Weights

__all__ = ["Rules", "TakingPart", "Worker", "serve_at"]

KINDS = ("train", "evaluate", "seat")
KEPT_ADAPTERS = 64
"""Adapters that a worker remembers, the last ones."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What a site takes part in. models: digests of base models, empty for any that it can load. rounds: the last round that
    it answers, 0 for all. comparisons: how many a client must hold to be named to the server.
    """

    kinds: tuple[str, ...] = KINDS
    models: tuple[str, ...] = ()
    rounds: int = 0
    comparisons: int = 1


@dataclass(frozen=True, slots=True)
class TakingPart:
    """One run at a site: its clients with their data and the LM, and the base model's digest."""

    backend: InProcessBackend
    held: Mapping[ClientId, int]
    model: str


@dataclass
class Worker:
    """Answers orders, one at a time. ``open_run`` makes of a run's terms what this site works with."""

    open_run: Callable[[str], TakingPart]
    rules: Rules
    ledger: Path
    _run: str = ""
    _terms: str = ""
    _part: TakingPart | None = None
    _adapters: dict[str, Weights] = field(default_factory=dict)
    _done: dict[tuple[object, ...], Reply] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, data: bytes) -> bytes:
        """The answer to an order, both as bytes. What goes wrong is in the answer."""
        with self._lock:
            order = Order("", "")
            try:
                order = unpack_order(data)
                answer = self._answer(order)
            except (FedbiscuitError, MemoryError) as error:
                answer = Answer(error=str(error) or type(error).__name__)
            packed = pack_answer(answer)
            self._note(order, answer, len(data), len(packed))
            return packed

    def _answer(self, order: Order) -> Answer:
        part = self._taking_part(order)
        clients = sorted(client for client, held in part.held.items() if held >= self.rules.comparisons)
        for digest, packed in order.adapters.items():
            self._adapters.pop(digest, None)
            self._adapters[digest] = opened_adapter(digest, packed)
        wanted = {digest for one in order.wanted for digest in one.values()}
        if lacks := sorted(wanted - self._adapters.keys()):
            return Answer(clients, lacks=lacks)
        replies = [self._reply(part, task, one) for task, one in zip(order.tasks, order.wanted, strict=True)]
        while len(self._adapters) > KEPT_ADAPTERS:
            self._adapters.pop(next(iter(self._adapters)))
        return Answer(clients, replies)

    def _taking_part(self, order: Order) -> TakingPart:
        if self._part is None or (order.run, order.terms) != (self._run, self._terms):
            self._part = None  # the memory of the last run, before that of the next
            self._done.clear()
            part = self.open_run(order.terms)
            if self.rules.models and part.model not in self.rules.models:
                raise EnvironmentFault(
                    f"this site does not permit the base model of this run ({part.model[:16]}); its administrator decides "
                    "(models in site.yaml)"
                )
            self._part, self._run, self._terms = part, order.run, order.terms
        return self._part

    def _reply(self, part: TakingPart, task: Task, wanted: Mapping[int, str]) -> Reply:
        refusal = self._refusal(part, task)
        if refusal:
            return Reply(task.client, ok=False, error=refusal)
        key = (
            task.round,
            task.client,
            task.kind,
            task.prices,
            task.local,
            task.consumed,
            tuple(sorted(wanted.items())),
        )
        if key not in self._done:
            for old in [one for one in self._done if one[0] != task.round]:
                del self._done[old]
            adapters = {u: self._adapters[digest] for u, digest in wanted.items()}
            self._done[key] = part.backend.run([replace(task, adapters=adapters)])[0]
        return self._done[key]

    def _refusal(self, part: TakingPart, task: Task) -> str:
        """Why this site does not do a task; empty where it does."""
        rules = self.rules
        if task.client not in part.held:
            return "no such client at this site"
        if part.held[task.client] < rules.comparisons:
            return f"this site answers for clients with {rules.comparisons} comparisons or more"
        if task.kind not in rules.kinds:
            return f"this site does no tasks of the kind {task.kind}"
        if rules.rounds and task.round >= rules.rounds:
            return f"this site takes part in {rules.rounds} rounds"
        if task.share_losses:
            return "this site shares no losses"
        return ""

    def _note(self, order: Order, answer: Answer, num_in: int, num_out: int) -> None:
        """A line of the ledger: what was asked, what left."""
        refused = {reply.client: reply.error for reply in answer.replies if not reply.ok}
        row = {
            "time": round(time.time(), 3),
            "run": order.run,
            "rounds": sorted({task.round for task in order.tasks}),
            "asked": dict(Counter(task.kind for task in order.tasks)),
            "deltas": sum(reply.delta is not None for reply in answer.replies),
            "seats": sum(reply.seat is not None for reply in answer.replies),
            "bytes_in": num_in,
            "bytes_out": num_out,
            **({"refused": refused} if refused else {}),
            **({"error": answer.error} if answer.error else {}),
        }
        with self.ledger.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def serve_at(path: Path, worker: Worker, stop: threading.Event) -> None:
    """Answer whoever may open the unix socket at ``path``, which is this user alone, until ``stop`` is set."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as listener:
        before = os.umask(0o177)
        try:
            listener.bind(str(path))
        except OSError as error:
            raise EnvironmentFault(
                f"{path}: no socket can be made there: {error.strerror or error}; its path may have about 100 characters"
            ) from None
        finally:
            os.umask(before)
        listener.listen()
        listener.settimeout(0.2)
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                connection, _ = listener.accept()
                threading.Thread(target=_serve_one, args=(connection, worker), daemon=True).start()
    path.unlink(missing_ok=True)


def _serve_one(connection: socket.socket, worker: Worker) -> None:
    with contextlib.closing(connection), contextlib.suppress(OSError):
        connection.settimeout(None)
        data = receive(connection)
        if data is not None:
            send(connection, worker.answer(data))
