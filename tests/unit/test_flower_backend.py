"""The Flower backend over a grid that is a dict: who is asked, what travels, and what becomes of every bad answer."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from tests.flower_grid import DictGrid

from fedbiscuit.backends.bundle import Answer, pack_answer, unpack_order
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
    return Worker(lambda terms: part, rules or Rules(), tmp_path / f"{'-'.join(echo.names)}.jsonl")


def backend(grid, timeout: float = 0.3, names=None, said=None):
    from fedbiscuit.backends.flower import FlowerBackend

    return FlowerBackend(grid, "run", "terms", timeout, names, (said if said is not None else []).append)


def training(client: str, adapters) -> Task:
    return Task("train", client, 2, adapters, local=LocalTraining())


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


def test_who_does_not_answer_in_time_is_a_failed_reply_and_the_others_are_not_lost(tmp_path):
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
        (pack_answer(Answer(["ann"], error="our rules say no")), "our rules say no"),
        (pack_answer(Answer(["ann"], lacks=["f" * 64])), "it keeps no adapters"),
    ],
)
def test_an_answer_that_cannot_be_used_is_a_failed_reply_of_each_client_there(tmp_path, answer, told):
    grid = DictGrid({1: worker(tmp_path, Echo("ann", "bo")).answer})
    there = backend(grid)
    there.clients()
    grid.nodes[1] = lambda data: answer
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
    forged = pack_answer(
        Answer(["ann"], [Reply("cy", 0, {"a": torch.zeros(2)}), Reply("ann", 0, {"a": torch.ones(2)})])
    )
    grid = DictGrid({1: worker(tmp_path, Echo("ann")).answer, 2: worker(tmp_path, Echo("cy")).answer})
    there = backend(grid)
    there.clients()
    grid.nodes[1] = lambda data: forged
    replies = there.run([training("ann", ADAPTERS), training("cy", ADAPTERS)])
    assert sorted(reply.client for reply in replies) == ["ann", "cy"]
    assert torch.equal(next(r for r in replies if r.client == "cy").delta["a"], torch.tensor([2.0, 3.0]))


def test_a_name_that_two_nodes_offer_or_that_is_registered_for_another_is_not_asked(tmp_path):
    said: list[str] = []
    grid = DictGrid({1: worker(tmp_path, Echo("ann", "bo")).answer, 2: worker(tmp_path, Echo("bo", "cy")).answer})
    assert backend(grid, said=said).clients() == ["ann", "cy"]
    assert "'bo' is offered by 2 nodes (1, 2)" in said[0]
    said.clear()
    bound = backend(grid, names={1: ["ann", "bo"], 2: ["cy"]}, said=said)
    assert bound.clients() == ["ann", "bo", "cy"]
    assert said == ["node 2 offers 'bo', a name that is not registered for it; it is not asked"]


def test_a_site_may_refuse_the_run_and_is_then_named_with_its_reason(tmp_path):
    said: list[str] = []
    grid = DictGrid({1: worker(tmp_path, Echo("ann"), Rules(models=("other",))).answer})
    assert backend(grid, said=said).clients() == []
    assert "node 1 takes no part: this site does not permit the base model of this run" in said[0]
