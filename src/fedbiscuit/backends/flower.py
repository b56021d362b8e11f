"""Clients behind Flower's SuperNodes: the same tasks, as few messages a node.

A node is asked who its clients are whenever the federation asks, so nodes may come and go. Nothing waits longer than
``timeout``; whoever has not answered by then is a reply that says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from flwr.app import Message
from flwr.serverapp import Grid

from fedbiscuit.backends.bundle import Answer, Order, digest_of, pack_order, packed_adapter, unpack_answer
from fedbiscuit.backends.flower_messages import message_bytes, record_of
from fedbiscuit.types import ClientId, EnvironmentFault, FederationError, Reply, Task, num_bytes

__all__ = ["FlowerBackend"]

POLL = 0.1
"""Seconds between two looks for replies, at first; up to ten times as many while none comes."""
LOOK_EVERY = 2.0
"""Seconds between two looks at which nodes are there, while their answers are waited for, or they themselves."""

MESSAGE_BYTES = 2**27
"""Of deltas in one answer. Everybody who carries it needs several times its size in memory, and SuperLink failed when three sites
sent twice as much at once, as it does where its database is locked for more than five seconds.
"""

NODE_UNAVAILABLE = 5
"""Flower's code for a node that has not been heard of for a while."""
EXPIRED = (3, 4)
"""Flower's codes for an order and an answer whose time was up before anybody fetched them, or that SuperLink has lost."""
CARRIERS = ("httpx", "grpc")
"""What Flower speaks through, by version; their errors mean that SuperLink is away."""
REASON = 300
"""Characters of what a site says of itself that are kept."""
NAMED = 5
"""Names in a reason; more are counted."""

T = TypeVar("T")
Said = Callable[[str], None]
Registered = Callable[[], Mapping[int, tuple[str, Sequence[str]]]]
"""What each registered node is called and which clients it may have, as it stands now."""


class FlowerBackend:
    """Carries tasks to the clients of all connected nodes.

    ``run`` and ``terms`` go with every order. ``timeout``: seconds for one exchange, and for ``least`` clients to be there.
    ``registered`` is asked whenever the nodes are, so a site may be registered during a run; None where nodes have no keys, and
    may name any client. ``say`` is told who takes no part, ``wait`` that too few are there, and nothing once that is over.
    ``bytes_down`` and ``bytes_up`` count what was really sent.
    """

    at_once = 0

    def __init__(
        self, grid: Grid, run: str, terms: str, timeout: float, registered: Registered | None = None,
        say: Said = lambda text: None, least: int = 1, wait: Said = lambda text: None,
    ):  # fmt: skip
        self._grid, self._run, self._terms, self._timeout, self._least = grid, run, terms, timeout, least
        self._registered, self._sites = registered, dict[int, tuple[str, Sequence[str]]]()
        self._say, self._wait = say, wait
        self._node_of: dict[ClientId, int] = {}
        self._holds: dict[int, set[str]] = {}
        self.away: Mapping[str, str] = {}
        self.bytes_down = 0
        self.bytes_up = 0

    def clients(self) -> list[ClientId]:
        """The clients of all nodes that answer now. Of a name that two nodes have, neither is asked.

        Where fewer than ``least`` are there, more are waited for, within the time. A site that has refused is asked again
        only when it has been started again.
        """
        deadline, answers, is_waiting = time.monotonic() + self._timeout, dict[int, Answer](), False
        since: dict[int, str] = {}
        while True:
            now = self._activations(deadline)
            nodes = sorted(now)
            settled = {node for node, answer in answers.items() if answer.order or not answer.error}
            asked = [node for node in nodes if node not in settled or now.get(node) != since.get(node)]
            since |= now
            answers |= self._exchange({node: Order(self._run, self._terms) for node in asked}, deadline)
            found = self._owned({node: answers[node] for node in nodes})
            if len(found) >= self._least or time.monotonic() + LOOK_EVERY >= deadline:
                if is_waiting:
                    self._wait("")
                return found
            if not is_waiting:
                why = "".join(f"; {who}: {reason}" for who, reason in self.away.items())
                self._wait(
                    f"{len(found)} clients are there; waiting for {self._least}, up to {self._timeout:g} seconds{why}"
                )
            is_waiting = True
            time.sleep(LOOK_EVERY)

    def _owned(self, answers: Mapping[int, Answer]) -> list[ClientId]:
        """Whose clients are whose, by what the nodes that are there have answered, and which sites are away."""
        owners: dict[ClientId, list[int]] = {}
        self._sites = dict(self._registered()) if self._registered else {}
        away = {self._called(node): "it is not connected" for node in self._sites if node not in answers}
        for node, answer in sorted(answers.items()):
            if answer.error:
                away[self._called(node)] = answer.error[:REASON]
            permitted = set(answer.clients if self._registered is None else self._sites.get(node, ("", ()))[1])
            for client in set(answer.clients) & permitted:
                owners.setdefault(client, []).append(node)
            if strange := sorted(set(answer.clients) - permitted):
                away[f"{_some(strange)} of {self._called(node)}"] = "registered for no site, or for another"
        for client, found in sorted(owners.items()):
            if len(found) > 1:
                away[client] = f"{' and '.join(self._called(node) for node in found[:2])} both offer this name"
        self._node_of = {client: found[0] for client, found in owners.items() if len(found) == 1}
        for who, why in away.items():
            if self.away.get(who) != why:
                self._say(f"{who} took no part: {why}")
        self.away = away
        return sorted(self._node_of)

    def _called(self, node: int) -> str:
        return self._sites[node][0] if node in self._sites else f"node {node}"

    def run(self, tasks: Sequence[Task]) -> list[Reply]:
        """One reply a task. A node that does not answer is a failed reply of each of its clients.

        A node whose deltas are too many for one message is asked several times; not again where it did not answer.
        """
        replies: list[Reply] = []
        silent: dict[int, str] = {}
        for part in self._parts(tasks):
            owners = [self._node_of.get(task.client, 0) for task in part]
            asked = [task for task, node in zip(part, owners, strict=True) if node not in silent]
            left = [(task.client, node) for task, node in zip(part, owners, strict=True) if node in silent]
            replies += [Reply(client, ok=False, error=silent[node]) for client, node in left]
            replies += self._ask(asked, silent)
        return replies

    def _parts(self, tasks: Sequence[Task]) -> Iterator[list[Task]]:
        """The tasks in parts in which no node has more deltas than one message should bring."""
        trained = {id(task.adapters): task.adapters for task in tasks if task.kind == "train"}
        largest = max((num_bytes(weights) for one in trained.values() for weights in one.values()), default=0)
        size = max(1, MESSAGE_BYTES // largest) if largest else len(tasks)
        places: dict[int, list[Task]] = {}
        for task in tasks:
            places.setdefault(self._node_of.get(task.client, 0), []).append(task)
        for start in range(0, max(map(len, places.values()), default=0), size):
            yield [task for found in places.values() for task in found[start : start + size]]

    def _ask(self, tasks: Sequence[Task], silent: dict[int, str]) -> list[Reply]:
        """One reply a task, with one message to each node, or two where it lacks adapters; ``silent`` gets who is, and why."""
        packed: dict[tuple[int, int], tuple[str, bytes]] = {}
        wanted: list[dict[int, str]] = []
        content: dict[str, bytes] = {}
        for task in tasks:
            names = {}
            for u in task.adapters:
                key = (id(task.adapters), u)
                if key not in packed:
                    packed[key] = packed_adapter(dict(task.adapters[u]))
                names[u] = packed[key][0]
                content[names[u]] = packed[key][1]
            wanted.append(names)
        places: dict[int, list[int]] = {}
        for i, task in enumerate(tasks):
            places.setdefault(self._node_of.get(task.client, 0), []).append(i)
        away = [Reply(tasks[i].client, ok=False, error="it is not connected") for i in places.pop(0, [])]
        orders = {
            node: self._order(node, [tasks[i] for i in found], [wanted[i] for i in found], content)
            for node, found in places.items()
        }
        answers = self._exchange(orders)
        again = {
            node: replace(
                orders[node], adapters={digest: content[digest] for digest in answer.lacks if digest in content}
            )
            for node, answer in answers.items()
            if answer.lacks and not answer.error
        }
        answers |= self._exchange(again)
        silent |= {node: answer.error for node, answer in answers.items() if answer.error}
        replies = list(away)
        for node, found in places.items():
            replies += self._replies(node, [tasks[i].client for i in found], answers[node])
        return replies

    def _order(
        self, node: int, tasks: Sequence[Task], wanted: Sequence[Mapping[int, str]], content: Mapping[str, bytes]
    ) -> Order:
        needed = {digest for one in wanted for digest in one.values()} - self._holds.get(node, set())
        return Order(self._run, self._terms, tasks, wanted, {digest: content[digest] for digest in needed})

    def _replies(self, node: int, clients: Sequence[ClientId], answer: Answer) -> list[Reply]:
        """The replies of a node; all its clients failed where it did not do its work."""
        why = answer.error or ("it keeps no adapters" if answer.lacks else "")
        if why:
            return [Reply(client, ok=False, error=why) for client in clients]
        whose = [*clients, *[""] * len(answer.replies)]
        named = [replace(reply, client=reply.client or whose[i]) for i, reply in enumerate(answer.replies)]
        return [reply for reply in named if self._node_of.get(reply.client) == node]

    def _exchange(self, orders: Mapping[int, Order], deadline: float | None = None) -> dict[int, Answer]:
        """One answer a node, within the time; what a site holds afterwards is remembered.

        A node that has come back since it was asked has lost its order, and is asked again: a worker does no work twice. One
        that Flower calls gone may come back for as long as others are at work; nobody waits for it alone.
        """
        if not orders:
            return {}
        deadline = time.monotonic() + self._timeout if deadline is None else deadline
        answers = {node: Answer(error=f"no answer within {self._timeout:g} seconds") for node in orders}
        packed = {node: pack_order(order) for node, order in orders.items()}
        since = self._activations(deadline)
        waiting = self._push(packed, deadline)
        refused = Answer(error="SuperLink did not take the message; its log says why")
        answers |= dict.fromkeys(set(orders) - set(waiting.values()), refused)
        gone: set[int] = set()
        pause, looked = POLL, time.monotonic()
        while waiting:
            came = list(self._call(self._grid.pull_messages, list(waiting), deadline=deadline))
            for message in came:
                node = waiting.pop(message.metadata.reply_to_message_id, None)
                if node is None or (message.has_error() and node in waiting.values()):
                    continue
                code = message.error.code if message.has_error() else 0
                if code not in EXPIRED or time.monotonic() < deadline - LOOK_EVERY:  # else it is simply too late
                    answers[node] = self._read(node, orders[node], digest_of(packed[node]), message)
                gone |= {node} if code == NODE_UNAVAILABLE else set()
                waiting = {asked: other for asked, other in waiting.items() if other != node}
            if waiting and time.monotonic() - looked >= LOOK_EVERY:
                now, looked = self._activations(deadline), time.monotonic()
                hoped = gone | set(waiting.values())
                back = {node for node in hoped if now.get(node, since.get(node)) != since.get(node)}
                since |= now
                gone -= back
                waiting |= self._push({node: packed[node] for node in back}, deadline)
            pause = POLL if came else min(pause * 1.3, 10 * POLL)
            if waiting and time.monotonic() >= deadline:
                break
            time.sleep(min(pause, max(0.0, deadline - time.monotonic())) if waiting else 0.0)
        return answers

    def _activations(self, deadline: float) -> dict[int, str]:
        """When each node that is there has come."""
        return {node.node_id: node.last_activated_at for node in self._call(self._grid.get_nodes, deadline=deadline)}

    def _call(self, call: Callable[..., Iterable[T]], *values: Any, deadline: float) -> Iterable[T]:
        """A call of Flower's, which it makes again and again while SuperLink is away, but not beyond the time."""
        if (invoker := getattr(self._grid, "_retry_invoker", None)) is not None:
            invoker.max_time = max(LOOK_EVERY, deadline - time.monotonic())
        try:
            return call(*values)
        except Exception as error:
            if type(error).__module__.partition(".")[0] not in CARRIERS:
                raise
            raise EnvironmentFault(
                f"SuperLink gave no answer that can be used (--timeout is {self._timeout:g} s): {error or type(error).__name__}; "
                "look at its log in the deploy folder, start the server again, and go on with --resume"
            ) from error

    def _push(self, packed: Mapping[int, bytes], deadline: float) -> dict[str, int]:
        """Send them; the node of each message that SuperLink has taken."""
        messages, left = [], max(1.0, deadline - time.monotonic())
        for node, data in packed.items():
            self.bytes_down += len(data)
            messages.append(Message(record_of(data), node, "query", ttl=left))
        taken = list(self._call(self._grid.push_messages, messages, deadline=deadline)) if messages else []
        return {asked: node for asked, node in zip(taken, packed, strict=False) if asked}

    def _read(self, node: int, order: Order, digest: str, message: Message) -> Answer:
        try:
            data = message_bytes(message)
            self.bytes_up += len(data)
            answer = unpack_answer(data)
        except FederationError as error:
            return Answer(error=str(error))
        if answer.order != digest and not answer.error:
            return Answer(error="it answers another order than the one that it was sent")
        self._holds.setdefault(node, set()).update(order.adapters)  # what it lacks, it is sent once more at once
        return answer


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])[:REASON]}{more}"
