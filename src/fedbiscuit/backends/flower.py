"""Clients behind Flower's SuperNodes: the same tasks, as few messages a node.

A node is asked who its clients are whenever the federation asks, so nodes may come and go. Nothing waits longer than
``timeout``; whoever has not answered by then is a reply that says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from flwr.app import Message
from flwr.serverapp import Grid

from fedbiscuit.backends.bundle import Answer, Order, pack_order, packed_adapter, unpack_answer
from fedbiscuit.backends.flower_messages import message_bytes, record_of
from fedbiscuit.types import ClientId, FederationError, Reply, Task, num_bytes

__all__ = ["FlowerBackend"]

POLL = 0.1
"""Seconds between two looks for replies, at first; up to ten times as many while none comes."""

MESSAGE_BYTES = 2**27
"""Of deltas in one answer. Everybody who carries it needs several times its size in memory, and SuperLink failed when three sites
sent twice as much at once, as it does where its database is locked for more than five seconds.
"""

Said = Callable[[str], None]


class FlowerBackend:
    """Carries tasks to the clients of all connected nodes.

    ``run`` and ``terms`` go with every order. ``timeout``: seconds for one exchange. ``names``: which clients a node may
    have, by node id; None where nodes have no keys, and may name any. ``bytes_down`` and ``bytes_up`` count what was really sent.
    """

    at_once = 0

    def __init__(
        self, grid: Grid, run: str, terms: str, timeout: float, names: Mapping[int, Sequence[str]] | None = None,
        say: Said = lambda text: None,
    ):  # fmt: skip
        self._grid, self._run, self._terms, self._timeout = grid, run, terms, timeout
        self._names = None if names is None else dict(names)
        self._say = say
        self._node_of: dict[ClientId, int] = {}
        self._holds: dict[int, set[str]] = {}
        self.bytes_down = 0
        self.bytes_up = 0

    def clients(self) -> list[ClientId]:
        """The clients of all nodes that answer now. Of a name that two nodes have, neither is asked."""
        nodes = sorted(self._grid.get_node_ids())
        answers = self._exchange({node: Order(self._run, self._terms) for node in nodes})
        owners: dict[ClientId, list[int]] = {}
        for node, answer in sorted(answers.items()):
            if answer.error:
                self._say(f"node {node} takes no part: {answer.error}")
            for client in self._permitted(node, answer.clients):
                owners.setdefault(client, []).append(node)
        for client, found in owners.items():
            if len(found) > 1:
                self._say(
                    f"client {client!r} is offered by {len(found)} nodes ({found[0]}, {found[1]}), so nobody asks it"
                )
        self._node_of = {client: found[0] for client, found in owners.items() if len(found) == 1}
        return sorted(self._node_of)

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
        return [reply for reply in answer.replies if self._node_of.get(reply.client) == node]

    def _permitted(self, node: int, clients: Sequence[str]) -> list[str]:
        """The names that a node may offer."""
        if self._names is None:
            return list(clients)
        allowed = self._names.get(node, ())
        for client in sorted(set(clients) - set(allowed)):
            self._say(f"node {node} offers {client!r}, a name that is not registered for it; it is not asked")
        return [client for client in clients if client in allowed]

    def _exchange(self, orders: Mapping[int, Order]) -> dict[int, Answer]:
        """One answer a node, within the time; what a site holds afterwards is remembered."""
        if not orders:
            return {}
        messages = []
        for node, order in orders.items():
            data = pack_order(order)
            self.bytes_down += len(data)
            messages.append(Message(record_of(data), node, "query", ttl=self._timeout))
        answers = {node: Answer(error=f"no answer within {self._timeout:g} seconds") for node in orders}
        deadline, pause = time.monotonic() + self._timeout, POLL
        waiting: dict[str, int] = dict(zip(self._grid.push_messages(messages), orders, strict=True))
        while waiting and time.monotonic() < deadline:
            came = list(self._grid.pull_messages(list(waiting)))
            for message in came:
                asked = message.metadata.reply_to_message_id
                if asked in waiting:
                    node = waiting.pop(asked)
                    answers[node] = self._read(node, orders[node], message)
            pause = POLL if came else min(pause * 1.3, 10 * POLL)
            if waiting:
                time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
        return answers

    def _read(self, node: int, order: Order, message: Message) -> Answer:
        try:
            data = message_bytes(message)
            self.bytes_up += len(data)
            answer = unpack_answer(data)
        except FederationError as error:
            return Answer(error=str(error))
        self._holds.setdefault(node, set()).update(order.adapters)  # what it lacks, it is sent once more at once
        return answer
