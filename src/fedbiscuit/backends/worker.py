"""The worker of one site: it holds the base model once and the comparisons of all its clients, and answers orders.

It stays when Flower's processes come and go. An order that comes twice is answered with the same replies; a site decides by
its ``Rules`` what it takes part in; nothing leaves before a line about it stands in the site's ledger.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from fedbiscuit.backends.bundle import Answer, Order, digest_of, opened_adapter, pack_answer, unpack_order
from fedbiscuit.backends.inprocess import InProcessBackend
from fedbiscuit.backends.sockets import receive, send
from fedbiscuit.rundir.ledger import LEARNED, append_row
from fedbiscuit.types import (
    ClientId,
    EnvironmentFault,
    FedbiscuitError,
    FederationError,
    Reply,
    Task,
    Weights,
    num_bytes,
)

__all__ = ["KINDS", "Rules", "TakingPart", "Worker", "serve_at", "told_outside"]

KINDS = ("train", "evaluate", "seat")
KEPT_BYTES = 2**30
"""Of adapters that a worker remembers between orders, and as much of replies: the last ones."""
AT_ONCE = 8
"""Orders that are in memory at a time; one is worked on, the others wait."""
SILENCE = 60.0
"""Seconds that whoever has connected may take for the next piece of a message."""
GRACE = 20.0
"""Seconds that a worker told to stop gives the task that it is at."""
TOO_LATE = "nobody waits for the answer any more"
ENTRY = 1000
"""About the bytes of a reply without a delta."""

K = TypeVar("K")
V = TypeVar("V")

log = logging.getLogger("fedbiscuit")


@dataclass(frozen=True, slots=True)
class Rules:
    """What a site takes part in. models: digests of base models, empty for any that it can load. rounds: how many rounds of a
    run it answers, 0 for all. comparisons: how many a client must hold to be named to the server. task_comparisons: how many one
    training may read, steps x batch_size x grad_accum, 0 for any number.
    """

    kinds: tuple[str, ...] = KINDS
    models: tuple[str, ...] = ()
    rounds: int = 0
    comparisons: int = 1
    task_comparisons: int = 0


@dataclass(frozen=True, slots=True)
class TakingPart:
    """One run at a site: its clients with their data and the LM, how many comparisons each holds, the base model's digest.

    look: what an adapter that came is worth to a client, as columns of ``learned.jsonl``; None where that is not wanted.
    """

    backend: InProcessBackend
    held: Mapping[ClientId, int]
    model: str
    look: Callable[[ClientId, Weights], Mapping[str, float]] | None = None


def told_outside(error: BaseException) -> str:
    """What the server is told of an error. What may quote the site's data or paths stays in the site's own log."""
    if isinstance(error, FederationError):
        return str(error)
    log.error("%s: %s", type(error).__name__, error)
    if isinstance(error, MemoryError):
        return "out of memory; lower batch_size and raise grad_accum"
    return f"this site cannot do it ({type(error).__name__}); its own log says why"


@dataclass
class Worker:
    """Answers orders, one at a time. ``open_run`` makes of a run's terms what this site works with."""

    open_run: Callable[[str], TakingPart]
    rules: Rules
    ledger: Path
    _opened: tuple[str, str, TakingPart] | None = None
    _adapters: dict[str, Weights] = field(default_factory=dict)
    _done: dict[tuple[object, ...], Reply] = field(default_factory=dict)
    _to_look_at: list[tuple[TakingPart, Task]] = field(default_factory=list)
    _working: threading.Lock = field(default_factory=threading.Lock)
    _noting: threading.Lock = field(default_factory=threading.Lock)
    _stopping: threading.Event = field(default_factory=threading.Event)

    def answer(self, data: bytes, is_awaited: Callable[[], bool] = lambda: True) -> bytes:
        """The answer to an order, both as bytes. What goes wrong is in the answer; without a ledger there is none else.

        ``is_awaited``: whether somebody still wants the answer; asked before each task.
        """
        order = Order("", "")
        try:
            order = unpack_order(data)
            answer = self._answer(order, is_awaited)
        except FederationError as error:
            answer = Answer(error=str(error))
        except Exception as error:  # whatever it is, the server is told that there is no answer, and the site why
            log.debug("an order failed", exc_info=True)
            answer = Answer(error=told_outside(error))
        return self._noted(order, replace(answer, order=digest_of(data)), len(data))

    def refuse(self, why: str) -> bytes:
        """The answer to a message that was not read."""
        return self._noted(Order("", ""), Answer(error=why), 0)

    def _noted(self, order: Order, answer: Answer, num_in: int) -> bytes:
        """The answer as bytes, once it stands in the ledger."""
        packed = pack_answer(answer)
        try:
            self._note(order, answer, num_in, len(packed))
        except OSError as error:
            log.error("%s: %s; nothing is sent without it", self.ledger, error.strerror or error)
            return pack_answer(Answer(error="this site cannot write its ledger, and sends nothing without"))
        return packed

    def look_back(self) -> None:
        """Write to ``learned.jsonl`` how the selectors that came with the last trainings agree with comparisons that no training
        reads. Nothing of it leaves; it comes after the answer, and the next order waits for one client at most.
        """
        while self._to_look_at and not self._stopping.is_set():
            with self._working:
                if not self._to_look_at or self._opened is None:
                    return
                run, (part, task) = self._opened[0], self._to_look_at.pop(0)
                ((u, adapter),) = task.adapters.items()
                try:
                    found = part.look(task.client, adapter) if part.look is not None else {}
                    row = {"run": run, "round": task.round, "client": task.client, "adapter": u, **found}
                    if found:
                        append_row(self.ledger.with_name(LEARNED), row)
                except (FedbiscuitError, OSError, RuntimeError) as error:  # a diary is not worth a round
                    log.warning("%s: no line for %s in round %d: %s", LEARNED, task.client, task.round, error)
            time.sleep(0.01)  # an order that waits takes the lock now

    def stop(self, grace: float = GRACE) -> bool:
        """Begin no further task; whether the one at hand was done within ``grace`` seconds."""
        self._stopping.set()
        done = self._working.acquire(timeout=grace)
        if done:
            self._working.release()
        return done

    def _answer(self, order: Order, is_awaited: Callable[[], bool]) -> Answer:
        opened = self._opened
        if not order.tasks and opened is not None and opened[:2] == (order.run, order.terms):
            return Answer(self._named(opened[2]))  # who is there? is answered while others train
        with self._working:
            part = self._taking_part(order)
            for digest, packed in order.adapters.items():
                self._adapters.pop(digest, None)
                self._adapters[digest] = opened_adapter(digest, packed)
            wanted = {digest for one in order.wanted for digest in one.values()}
            if lacks := sorted(wanted - self._adapters.keys()):
                return Answer(self._named(part), lacks=lacks)
            replies = [
                self._reply(part, task, one) if is_awaited() else Reply(task.client, ok=False, error=TOO_LATE)
                for task, one in zip(order.tasks, order.wanted, strict=True)
            ]
            _keep_last(self._adapters, num_bytes)
            _keep_last(self._done, lambda reply: num_bytes(reply.delta or {}) + ENTRY)
            return Answer(self._named(part), replies)

    def _named(self, part: TakingPart) -> list[ClientId]:
        """The clients that the server may know of."""
        return sorted(client for client, held in part.held.items() if held >= self.rules.comparisons)

    def _taking_part(self, order: Order) -> TakingPart:
        if self._opened is None or self._opened[:2] != (order.run, order.terms):
            self._opened = None  # the memory of the last run, before that of the next
            self._done.clear()
            self._to_look_at.clear()
            part = self.open_run(order.terms)
            if self.rules.models and part.model not in self.rules.models:
                raise FederationError(
                    f"this site does not permit the base model of this run ({part.model}); its administrator decides "
                    "(allow_models in site.yaml)"
                )
            self._opened = order.run, order.terms, part
        return self._opened[2]

    def _reply(self, part: TakingPart, task: Task, wanted: Mapping[int, str]) -> Reply:
        """The reply to a task, computed once. One that failed is computed again when it is asked for again."""
        if refusal := self._refusal(part, task):
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
        reply = self._done.pop(key, None)
        if reply is None:
            if task.kind == "evaluate":  # what it will have scored takes the place of what seats were chosen by before
                self._done = {k: one for k, one in self._done.items() if k[1] != task.client or k[2] == "train"}
            adapters = {u: self._adapters[digest] for u, digest in wanted.items()}
            full = replace(task, adapters=adapters)
            try:
                reply = part.backend.run([full])[0]
            except Exception as error:  # costs this client, not the others of this site
                log.debug("a task failed", exc_info=True)
                reply = Reply(task.client, ok=False, error=told_outside(error))
            if task.kind == "train" and reply.ok and part.look is not None:
                self._to_look_at.append((part, full))
        if reply.ok:
            self._done[key] = reply
        return reply

    def _refusal(self, part: TakingPart, task: Task) -> str:
        """Why this site does not do a task; empty where it does."""
        rules = self.rules
        if self._stopping.is_set():
            return "this site is stopping"
        if task.client not in part.held:
            return "no such client at this site"
        if part.held[task.client] < rules.comparisons:
            return f"this site answers for clients with {rules.comparisons} comparisons or more"
        if task.kind not in rules.kinds:
            return f"this site does no tasks of the kind {task.kind}"
        if rules.rounds and task.round >= rules.rounds:
            return f"this site takes part in {rules.rounds} rounds"
        reads = task.local.comparisons_per_round if task.kind == "train" and task.local else 0
        if 0 < rules.task_comparisons < reads:
            return f"a training here reads at most {rules.task_comparisons} comparisons, and {reads} were asked for"
        if task.share_losses:
            return "this site shares no losses"
        return ""

    def _note(self, order: Order, answer: Answer, num_in: int, num_out: int) -> None:
        """A line of the ledger, on the disk before the answer leaves. Tasks that wait for adapters are not asked for yet."""
        not_done: dict[str, list[ClientId]] = {}
        for reply in answer.replies:
            if not reply.ok:
                not_done.setdefault(reply.error, []).append(reply.client)
        asked = [] if answer.lacks else order.tasks
        row = {
            "time": round(time.time(), 3),
            "run": order.run,
            "rounds": sorted({task.round for task in asked}),
            "asked": dict(sorted(Counter(task.kind for task in asked).items())),
            "names": len(answer.clients),
            "deltas": sum(reply.delta is not None for reply in answer.replies),
            "seats": sum(reply.seat is not None for reply in answer.replies),
            "bytes_in": num_in,
            "bytes_out": num_out,
            **({"not_done": not_done} if not_done else {}),
            **({"lacks": len(answer.lacks)} if answer.lacks else {}),
            **({"error": answer.error} if answer.error else {}),
        }
        with self._noting:
            append_row(self.ledger, row)


def _keep_last(kept: dict[K, V], size: Callable[[V], int]) -> None:
    """Drop the oldest until the others have at most ``KEPT_BYTES``."""
    total = sum(map(size, kept.values()))
    while total > KEPT_BYTES:
        total -= size(kept.pop(next(iter(kept))))


def serve_at(path: Path, worker: Worker, stop: threading.Event, grace: float = GRACE) -> bool:
    """Answer whoever may open the unix socket at ``path``, which is this user alone, until ``stop`` is set.

    Returns whether the last task was done within ``grace`` seconds of it; its answer is sent then.
    """
    _clear(path)
    at_once = threading.Semaphore(AT_ONCE)
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
            if not at_once.acquire(timeout=0.2):
                continue
            try:
                connection, _ = listener.accept()
            except OSError as error:
                at_once.release()
                if not isinstance(error, TimeoutError):  # out of descriptors, or gone before it was let in
                    log.warning("%s: %s", path, error.strerror or error)
                    time.sleep(0.2)
                continue
            threading.Thread(target=_serve_one, args=(connection, worker, at_once), daemon=True).start()
    path.unlink(missing_ok=True)
    deadline = time.monotonic() + grace
    done = worker.stop(grace)
    return all(at_once.acquire(timeout=max(0.0, deadline - time.monotonic())) for _ in range(AT_ONCE)) and done


def _clear(path: Path) -> None:
    """Remove the socket that a worker before this one has left."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise EnvironmentFault(f"{path}: is no socket; move it away, the worker's socket belongs there")
        path.unlink()


def _serve_one(connection: socket.socket, worker: Worker, at_once: threading.Semaphore) -> None:
    try:
        with contextlib.closing(connection), contextlib.suppress(OSError):
            connection.settimeout(SILENCE)
            try:
                data = receive(connection)
            except FederationError as error:
                send(connection, worker.refuse(str(error)))
                return
            if data is not None:
                send(connection, worker.answer(data, lambda: _listens(connection)))
    finally:
        at_once.release()
    worker.look_back()


def _listens(connection: socket.socket) -> bool:
    """Whether the other side, which has nothing more to say, is still there."""
    look = select.poll()
    look.register(connection, select.POLLIN)
    try:
        return not look.poll(0) or connection.recv(1, socket.MSG_PEEK) != b""
    except OSError:
        return False
