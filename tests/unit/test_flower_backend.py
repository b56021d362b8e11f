"""The Flower backend over a grid that is a dict: who is asked, what travels, and what becomes of every bad answer."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.flower_grid import DictGrid

from fedbiscuit.backends.bundle import Answer, digest_of, pack_answer, unpack_order
from fedbiscuit.backends.worker import Rules, TakingPart, Worker
from fedbiscuit.types import LocalTraining, Reply, Task

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("flwr") is None,
    reason="SKIPPED: flwr is not installed, so the Flower backend is not tested (pip install 'fedbiscuit[flower]')",
)


class Echo:
    """A backend whose clients add one to every tensor, and count how often they were asked."""

    def __init__(self, *names: str):
        self.names, self.asked = names, []

    def run(self, tasks):
        self.asked += [(task.kind, task.client) for task in tasks]
        made = []
        for task in tasks:
            if task.kind != "train":
                made.append(Reply(task.client, seat=1 if task.kind == "seat" else None))
                continue
            ((u, weights),) = task.adapters.items()
            made.append(Reply(task.client, u, {name: w + 1 for name, w in weights.items()}, num_examples=3))
        return made


def worker(tmp_path: Path, echo: Echo, rules: Rules | None = None, model: str = "m") -> Worker:
    part = TakingPart(echo, dict.fromkeys(echo.names, 5), model)
    return Worker(lambda terms: part, rules or Rules(), tmp_path / f"{echo.names[0]}.jsonl")


def backend(grid, timeout: float = 0.3, names=None, said=None, sites=None, least: int = 1):
    from fedbiscuit.backends.flower import FlowerBackend

    return FlowerBackend(grid, "run", "terms", timeout, names, (said if said is not None else []).append, sites, least)


@pytest.fixture
def hurried(monkeypatch):
    """No pause between two looks at which nodes are there."""
    from fedbiscuit.backends import flower

    monkeypatch.setattr(flower, "LOOK_EVERY", 0.0)


def training(client: str, adapters) -> Task:
    return Task("train", client, 2, adapters, local=LocalTraining())


def answering(order: bytes, answer: Answer) -> bytes:
    """An answer to this order."""
    return pack_answer(replace(answer, order=digest_of(order)))


ADAPTERS = {0: {"a": torch.tensor([1.0, 2.0])}}


def test_tasks_go_to_the_node_of_their_client_in_one_message_and_an_adapter_travels_once(tmp_path):
    first, second = Echo("ann", "bo"), Echo("cy")
    grid = DictGrid({1: worker(tmp_path, first).answer, 2: worker(tmp_path, second).answer})
    there = backend(grid)
    assert there.clients() == ["ann", "bo", "cy"]
    replies = there.run([training(client, ADAPTERS) for client in ("ann", "bo", "cy")])
    assert sorted(reply.client for reply in replies) == ["ann", "bo", "cy"]
    assert all(torch.equal(reply.delta["a"], torch.tensor([2.0, 3.0])) for reply in replies)
    assert first.asked == [("train", "ann"), ("train", "bo")]
    assert [node for node, _ in grid.seen] == [1, 2, 1, 2]
    assert [len(unpack_order(data).adapters) for _, data in grid.seen] == [0, 0, 1, 1]
    there.run([Task("evaluate", "ann", 3, ADAPTERS)])
    assert len(unpack_order(grid.seen[-1][1]).adapters) == 0  # it has it already
    assert there.bytes_down == sum(len(data) for _, data in grid.seen)


def test_many_deltas_of_a_node_come_in_several_messages_and_a_silent_node_is_not_asked_again(tmp_path, monkeypatch):
    there = ["ann", "bo", "cy", "di", "el"]
    first, second = Echo(*there), Echo("fay")
    grid = DictGrid({1: worker(tmp_path, first).answer, 2: worker(tmp_path, second).answer})
    asking = backend(grid)
    asking.clients()
    monkeypatch.setattr("fedbiscuit.backends.flower.MESSAGE_BYTES", 2 * 8 + 7)  # two deltas of two floats
    tasks = [training(client, ADAPTERS) for client in [*there, "fay"]]
    replies = asking.run(tasks)
    assert sorted(reply.client for reply in replies if reply.ok) == [*there, "fay"]
    orders = [(node, unpack_order(data)) for node, data in grid.seen[2:]]
    asked = [(node, [task.client for task in order.tasks], len(order.adapters)) for node, order in orders]
    assert asked == [(1, ["ann", "bo"], 1), (2, ["fay"], 1), (1, ["cy", "di"], 0), (1, ["el"], 0)]

    grid.nodes[1] = lambda data: None
    grid.seen.clear()
    replies = asking.run(tasks)
    assert sorted(reply.client for reply in replies if reply.ok) == ["fay"]
    assert {reply.error for reply in replies if not reply.ok} == {"no answer within 0.3 seconds"}
    assert [node for node, _ in grid.seen] == [1, 2]
    assert len(replies) == 6


def test_a_site_that_was_started_again_is_sent_what_it_has_forgotten(tmp_path):
    echo = Echo("ann")
    grid = DictGrid({1: worker(tmp_path, echo).answer})
    there = backend(grid)
    there.clients()
    there.run([training("ann", ADAPTERS)])
    grid.nodes[1] = worker(tmp_path, echo).answer
    replies = there.run([training("ann", ADAPTERS)])
    assert replies[0].ok
    assert [len(unpack_order(data).adapters) for _, data in grid.seen[-2:]] == [0, 1]


def test_fault_80_who_does_not_answer_in_time_is_a_failed_reply_and_the_others_are_not_lost(tmp_path):
    silent = worker(tmp_path, Echo("cy"))
    grid = DictGrid({1: worker(tmp_path, Echo("ann")).answer, 2: silent.answer})
    there = backend(grid)
    there.clients()
    grid.nodes[2] = lambda data: None
    by = {reply.client: reply for reply in there.run([training("ann", ADAPTERS), training("cy", ADAPTERS)])}
    assert by["ann"].ok
    assert by["cy"].error == "no answer within 0.3 seconds"
    del grid.nodes[2]  # it has left
    assert there.clients() == ["ann"]
    (reply,) = there.run([training("cy", ADAPTERS)])
    assert reply.error == "it is not connected"


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"", "message: not one of ours"),
        (b"\x07", "message: cut off, or not one of ours"),
        (b"\x03\0\0\0\0\0\0\0abc", "message: not one of ours"),
        (Answer(["ann"], error="our rules say no"), "our rules say no"),
        (Answer(["ann"], lacks=["f" * 64]), "it keeps no adapters"),
    ],
)
def test_an_answer_that_cannot_be_used_is_a_failed_reply_of_each_client_there(tmp_path, answer, told):
    grid = DictGrid({1: worker(tmp_path, Echo("ann", "bo")).answer})
    there = backend(grid)
    there.clients()
    grid.nodes[1] = lambda data: answer if isinstance(answer, bytes) else answering(data, answer)
    replies = there.run([training("ann", ADAPTERS), training("bo", ADAPTERS)])
    assert [reply.client for reply in replies] == ["ann", "bo"]
    assert all(not reply.ok and told in reply.error for reply in replies)


def test_a_worker_that_is_not_there_is_a_failed_reply_with_the_reason_of_the_site(tmp_path):
    from fedbiscuit.backends.flower_messages import failure_of

    grid = DictGrid({1: worker(tmp_path, Echo("ann")).answer})
    there = backend(grid)
    there.clients()
    grid.nodes[1] = lambda data: failure_of("the worker is not there")
    assert there.run([training("ann", ADAPTERS)])[0].error == "the worker is not there"


def test_replies_for_clients_of_another_node_are_dropped(tmp_path):
    forged = Answer(["ann"], [Reply("cy", 0, {"a": torch.zeros(2)}), Reply("ann", 0, {"a": torch.ones(2)})])
    grid = DictGrid({1: worker(tmp_path, Echo("ann")).answer, 2: worker(tmp_path, Echo("cy")).answer})
    there = backend(grid)
    there.clients()
    grid.nodes[1] = lambda data: answering(data, forged)
    replies = there.run([training("ann", ADAPTERS), training("cy", ADAPTERS)])
    assert sorted(reply.client for reply in replies) == ["ann", "cy"]
    assert torch.equal(next(r for r in replies if r.client == "cy").delta["a"], torch.tensor([2.0, 3.0]))


def test_fault_79_a_name_that_two_nodes_offer_or_that_is_registered_for_another_is_not_asked(tmp_path):
    said: list[str] = []
    grid = DictGrid({1: worker(tmp_path, Echo("ann", "bo")).answer, 2: worker(tmp_path, Echo("bo", "cy")).answer})
    assert backend(grid, said=said).clients() == ["ann", "cy"]
    assert "'bo' is offered by 2 nodes (node 1 and node 2)" in said[0]
    said.clear()
    bound = backend(grid, names={1: ["ann", "bo"], 2: ["cy"]}, said=said)
    assert bound.clients() == ["ann", "bo", "cy"]
    assert said == ["node 2 offers 'bo', a name that is not registered for it; it is not asked"]


def test_a_site_may_refuse_the_run_and_is_then_named_with_its_reason(tmp_path):
    said: list[str] = []
    grid = DictGrid({1: worker(tmp_path, Echo("ann"), Rules(models=("other",))).answer})
    assert backend(grid, said=said).clients() == []
    assert "node 1 takes no part: this site does not permit the base model of this run" in said[0]


def test_fault_79_a_key_that_answers_for_more_clients_than_it_was_registered_for_gets_no_more_seats(tmp_path):
    many = [f"sybil-{i}" for i in range(50)]
    grid = DictGrid({1: worker(tmp_path, Echo("ann", *many)).answer, 2: worker(tmp_path, Echo("bo")).answer})
    assert backend(grid, names={1: ["ann"], 2: ["bo"]}).clients() == ["ann", "bo"]


def test_fault_80_82_a_node_that_comes_back_is_asked_again_and_what_was_lost_with_it_is_not_waited_for(
    tmp_path, hurried
):
    echo, other = Echo("ann"), Echo("bo")
    working = worker(tmp_path, echo)
    grid = DictGrid({1: working.answer, 2: worker(tmp_path, other).answer}, since={1: "9:00"})
    there = backend(grid, timeout=20.0)
    there.clients()
    seen = []

    def killed(data: bytes) -> None:
        """Its SuperNode dies with the order, the worker has done it, and another SuperNode comes."""
        seen.append(data)
        working.answer(data)
        grid.nodes[1], grid.since[1] = working.answer, "9:01"

    grid.nodes[1] = killed
    replies = there.run([training("ann", ADAPTERS), training("bo", ADAPTERS)])
    assert [reply.ok for reply in replies] == [True, True]
    assert echo.asked == [("train", "ann")], "a worker does no work twice"
    assert [data for node, data in grid.seen if node == 1][-2:] == seen * 2
    assert other.asked == [("train", "bo")]


def test_what_superlink_says_of_the_lost_order_does_not_count_once_the_node_is_asked_again(tmp_path, hurried):
    from types import SimpleNamespace

    grid = DictGrid({1: worker(tmp_path, Echo("ann")).answer}, since={1: "9:00"})
    there = backend(grid, timeout=20.0)
    there.clients()
    answer = grid.nodes[1]
    error = SimpleNamespace(reason="gone", code=5)

    def killed(data: bytes) -> None:
        lost = f"id-{len(grid.seen)}"
        grid.nodes[1] = late
        grid.since[1] = "9:01"
        grid.lost = SimpleNamespace(
            metadata=SimpleNamespace(reply_to_message_id=lost), content=None, has_error=lambda: True, error=error
        )

    def late(data: bytes) -> bytes:
        grid.waiting["lost"] = grid.lost
        grid.pull_messages = lambda ids: [grid.waiting.pop(key) for key in ("lost", *ids) if key in grid.waiting]
        return answer(data)

    grid.nodes[1] = killed
    (reply,) = there.run([training("ann", ADAPTERS)])
    assert reply.ok, reply.error


def test_a_message_that_superlink_does_not_take_is_a_failed_reply_and_not_the_end(tmp_path):
    grid = DictGrid({1: worker(tmp_path, Echo("ann")).answer})
    there = backend(grid)
    there.clients()
    grid.push_messages = lambda messages: [None]
    assert there.run([training("ann", ADAPTERS)])[0].error == "no answer within 0.3 seconds"
    grid.push_messages = lambda messages: []
    assert not there.run([training("ann", ADAPTERS)])[0].ok


def test_fault_80_sites_are_waited_for_until_enough_clients_are_there_but_not_for_ever(tmp_path, hurried):
    said: list[str] = []
    grid = DictGrid({1: worker(tmp_path, Echo("ann")).answer})
    looks = []

    def come(ids=grid.get_node_ids):
        looks.append(len(looks))
        if len(looks) == 3:
            grid.nodes[2] = worker(tmp_path, Echo("bo", "cy")).answer
        return ids()

    grid.get_node_ids = come
    assert backend(grid, said=said, least=2, timeout=20.0).clients() == ["ann", "bo", "cy"]
    assert said == ["1 clients are there; waiting for 2, up to 20 seconds"]
    assert [node for node, _ in grid.seen] == [1, 2], "who has answered is not asked again"
    assert backend(DictGrid({}), least=2, timeout=0.05).clients() == []


def test_fault_89_a_clock_that_jumps_moves_no_deadline(tmp_path, monkeypatch):
    import time

    now = time.time
    grid = DictGrid({1: worker(tmp_path, Echo("ann")).answer, 2: lambda data: None})
    for jump in (1e6, -1e6):
        monkeypatch.setattr(time, "time", lambda jump=jump: now() + jump)
        there = backend(grid)
        assert there.clients() == ["ann"]
        assert there.away == {"node 2": "no answer within 0.3 seconds"}


def test_sites_that_take_no_part_are_named_as_their_keys_are_with_the_reason(tmp_path):
    said: list[str] = []
    grid = DictGrid(
        {1: worker(tmp_path, Echo("ann")).answer, 2: worker(tmp_path, Echo("bo"), Rules(models=("x",))).answer}
    )
    names = {1: ["ann"], 2: ["bo"], 3: ["cy"]}
    there = backend(grid, names=names, said=said, sites={1: "site-a", 2: "site-b", 3: "site-c"})
    assert there.clients() == ["ann"]
    assert there.away["site-c"] == "it is not connected"
    assert there.away["site-b"].startswith("this site does not permit the base model of this run")
    assert said == [f"site-b takes no part: {there.away['site-b']}"]
