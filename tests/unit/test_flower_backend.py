"""The Flower backend over a grid that is a dict: who is asked, what travels, and what becomes of every bad answer."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests.flower_grid import DictGrid

from fedbiscuit.backends.bundle import Answer, digest_of, pack_answer, unpack_order
from fedbiscuit.backends.worker import Rules, TakingPart, Worker
from fedbiscuit.types import EnvironmentFault, LocalTraining, Reply, Task

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


def backend(grid, timeout: float = 0.3, registered=None, said=None, least: int = 1, waits=None):
    """``registered``: a table, looked at whenever the nodes are asked."""
    from fedbiscuit.backends.flower import FlowerBackend

    known = None if registered is None else lambda: registered
    say, wait = ((one if one is not None else []).append for one in (said, waits))
    return FlowerBackend(grid, "run", "terms", timeout, known, say, least, wait)


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
    there = backend(grid, said=said)
    assert there.clients() == ["ann", "cy"]
    assert there.away == {"bo": "node 1 and node 2 both offer this name"}
    assert said == ["bo took no part: node 1 and node 2 both offer this name"]
    bound = backend(grid, registered={1: ("site-a", ["ann", "bo"]), 2: ("site-b", ["cy"])})
    assert bound.clients() == ["ann", "bo", "cy"]
    assert bound.away == {"bo of site-b": "registered for no site, or for another"}


def test_a_site_that_is_registered_during_a_run_takes_part_from_the_next_look_on(tmp_path):
    grid = DictGrid({1: worker(tmp_path, Echo("ann")).answer})
    registered = {1: ("site-a", ["ann"])}
    there = backend(grid, registered=registered)
    assert there.clients() == ["ann"]
    grid.nodes[2] = worker(tmp_path, Echo("bo", "eve")).answer
    registered[2] = ("site-b", ["bo"])
    assert there.clients() == ["ann", "bo"]
    assert there.away == {"eve of site-b": "registered for no site, or for another"}
    del registered[2]
    assert there.clients() == ["ann"], "one that is registered no more is not asked"


def test_a_site_may_refuse_the_run_and_is_then_named_with_its_reason(tmp_path):
    said: list[str] = []
    grid = DictGrid({1: worker(tmp_path, Echo("ann"), Rules(models=("other",))).answer})
    assert backend(grid, said=said).clients() == []
    assert "node 1 took no part: this site does not permit the base model of this run" in said[0]


def test_fault_79_a_key_that_answers_for_more_clients_than_it_was_registered_for_gets_no_more_seats(tmp_path):
    many = [f"sybil-{i}" for i in range(50)]
    grid = DictGrid({1: worker(tmp_path, Echo("ann", *many)).answer, 2: worker(tmp_path, Echo("bo")).answer})
    there = backend(grid, registered={1: ("site-a", ["ann"]), 2: ("site-b", ["bo"])})
    assert there.clients() == ["ann", "bo"]
    named = "sybil-0, sybil-1, sybil-10, sybil-11, sybil-12 and 45 more of site-a"
    assert there.away == {named: "registered for no site, or for another"}


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
    assert there.run([training("ann", ADAPTERS)])[0].error == "SuperLink did not take the message; its log says why"
    grid.push_messages = lambda messages: []
    assert not there.run([training("ann", ADAPTERS)])[0].ok


def gone(asked: str):
    """What SuperLink says of a message to a node that it has not heard of for a while."""
    from types import SimpleNamespace

    error = SimpleNamespace(reason="gone", code=5)
    meta = SimpleNamespace(reply_to_message_id=asked)
    return SimpleNamespace(metadata=meta, content=None, has_error=lambda: True, error=error)


def test_fault_80_a_node_that_superlink_calls_gone_is_asked_again_if_it_comes_back_while_others_work(tmp_path, hurried):
    ann, bo = worker(tmp_path, Echo("ann")), worker(tmp_path, Echo("bo"))
    grid = DictGrid({1: ann.answer, 2: bo.answer}, since={1: "9:00", 2: "9:00"})
    there = backend(grid, timeout=20.0)
    there.clients()
    orders = {}

    def dies(data: bytes) -> None:
        asked = f"id-{len(grid.seen)}"
        grid.waiting[asked] = gone(asked)
        grid.nodes[1] = comes_back

    def comes_back(data: bytes) -> bytes:
        asked, order = orders.pop("bo")
        from fedbiscuit.backends.flower_messages import record_of

        reply = gone(asked)
        reply.has_error, reply.content = (lambda: False), record_of(bo.answer(order))
        grid.waiting[asked] = reply  # the other one is done only now
        return ann.answer(data)

    def works(data: bytes) -> None:
        orders["bo"] = (f"id-{len(grid.seen)}", data)

    pull = grid.pull_messages

    def pulled(ids):
        came = pull(ids)
        if any(message.has_error() for message in came):
            grid.since[1] = "9:02"
        return came

    grid.nodes, grid.pull_messages = {1: dies, 2: works}, pulled
    replies = there.run([training("ann", ADAPTERS), training("bo", ADAPTERS)])
    assert [(reply.client, reply.ok) for reply in replies] == [("ann", True), ("bo", True)]

    grid.nodes[2], grid.nodes[1] = bo.answer, dies
    grid.pull_messages = pull
    by = {reply.client: reply for reply in there.run([training("ann", ADAPTERS), training("bo", ADAPTERS)])}
    assert by["bo"].ok
    assert by["ann"].error == "Flower could not deliver: gone (code 5)", "nobody waits 20 seconds for it alone"


def test_a_site_that_refuses_is_asked_once_while_others_are_waited_for_and_again_when_it_was_started_again(
    tmp_path, hurried
):
    refuses = worker(tmp_path, Echo("bo"), Rules(models=("other",)))
    grid = DictGrid({1: worker(tmp_path, Echo("ann")).answer, 2: refuses.answer}, since={2: "9:00"})
    looks = []

    def look(ids=grid.get_nodes):
        looks.append(len([node for node, _ in grid.seen if node == 2]))
        if len(looks) == 4:  # its administrator has mended the rules
            grid.nodes[2], grid.since[2] = worker(tmp_path, Echo("bo")).answer, "9:05"
        return ids()

    grid.get_nodes = look
    assert backend(grid, least=2, timeout=20.0).clients() == ["ann", "bo"]
    assert looks == [0, 0, 1, 1, 1]
    assert len([node for node, _ in grid.seen if node == 1]) == 1


def test_fault_80_sites_are_waited_for_until_enough_clients_are_there_but_not_for_ever(tmp_path, hurried):
    said: list[str] = []
    grid = DictGrid({1: worker(tmp_path, Echo("ann")).answer})
    looks = []

    def come(ids=grid.get_nodes):
        looks.append(len(looks))
        if len(looks) == 3:
            grid.nodes[2] = worker(tmp_path, Echo("bo", "cy")).answer
        return ids()

    grid.get_nodes = come
    assert backend(grid, waits=said, least=2, timeout=20.0).clients() == ["ann", "bo", "cy"]
    assert said == ["1 clients are there; waiting for 2, up to 20 seconds", ""]
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
    registered = {1: ("site-a", ["ann"]), 2: ("site-b", ["bo"]), 3: ("site-c", ["cy"])}
    there = backend(grid, registered=registered, said=said)
    assert there.clients() == ["ann"]
    assert there.away["site-c"] == "it is not connected"
    assert there.away["site-b"].startswith("this site does not permit the base model of this run")
    assert said == [f"{site} took no part: {there.away[site]}" for site in ("site-c", "site-b")]
    assert there.clients() == ["ann"]
    assert len(said) == 2, "what has been said is not said again"


def test_a_site_fills_no_log_with_its_reasons_and_names(tmp_path):
    long, strange = Answer(error="x" * 400_000), Answer([f"{k}-" + "y" * 900 for k in range(9)])
    grid = DictGrid({1: lambda data: answering(data, long), 2: lambda data: answering(data, strange)})
    there = backend(grid, registered={1: ("site-a", []), 2: ("site-b", [])})
    assert there.clients() == []
    assert there.away["site-a"] == "x" * 300
    (named,) = [who for who in there.away if who.endswith(" of site-b")]
    assert len(named) < 400


@pytest.mark.parametrize("code", [3, 4])
def test_an_order_that_flower_lets_expire_is_an_answer_that_did_not_come_in_time(tmp_path, code):
    from types import SimpleNamespace

    def expires(data: bytes) -> None:
        asked = f"id-{len(grid.seen)}"
        error = SimpleNamespace(reason="it may have expired", code=code)
        meta = SimpleNamespace(reply_to_message_id=asked)
        grid.waiting[asked] = SimpleNamespace(metadata=meta, content=None, has_error=lambda: True, error=error)

    grid = DictGrid({1: worker(tmp_path, Echo("ann")).answer})
    there, patient = backend(grid), backend(grid, timeout=20.0)
    there.clients()
    patient.clients()
    grid.nodes[1] = expires
    assert there.run([training("ann", ADAPTERS)])[0].error == "no answer within 0.3 seconds"
    (reply,) = patient.run([training("ann", ADAPTERS)])
    assert reply.error == f"Flower could not deliver: it may have expired (code {code})", "time was left: it is lost"


def test_while_superlink_is_away_flower_tries_for_the_time_that_is_left_and_then_the_run_stops_with_what_to_do(
    tmp_path,
):
    httpx = pytest.importorskip("httpx")
    from types import SimpleNamespace

    from flwr.supercore.retry import make_simple_http_retry_invoker

    grid = DictGrid({1: worker(tmp_path, Echo("ann")).answer})
    there = backend(grid, timeout=2.0)
    there.clients()
    grid._retry_invoker = make_simple_http_retry_invoker()
    asked = []

    def away(*values):
        asked.append(grid._retry_invoker.max_time)
        raise httpx.ConnectError("connection refused")

    grid.pull_messages = lambda ids: grid._retry_invoker.invoke(away, ids)
    with pytest.raises(EnvironmentFault, match=r"no answer .*--timeout is 2 s\): connection refused; .*--resume"):
        there.run([training("ann", ADAPTERS)])
    assert len(asked) > 1
    assert max(asked) <= 2.0
    grid.pull_messages = lambda ids: SimpleNamespace().nothing
    with pytest.raises(AttributeError):
        there.run([training("ann", ADAPTERS)])


@pytest.mark.parametrize(("age", "left"), [(0.0, 600.0), (450.0, 150.0), (-200.0, 600.0), (700.0, 0.0)])
def test_fault_80_a_site_waits_for_its_worker_no_longer_than_somebody_waits_at_the_server(monkeypatch, age, left):
    import time

    from fedbiscuit import flower_app
    from fedbiscuit.backends import sockets
    from fedbiscuit.backends.flower_messages import record_of

    asked = []
    monkeypatch.setattr(sockets, "ask_at", lambda path, data, timeout: asked.append(timeout) or b"")
    monkeypatch.setattr(time, "time", lambda: 1000.0 + age)
    monkeypatch.setattr(flower_app, "Message", lambda content, reply_to: content)
    metadata = SimpleNamespace(ttl=600.0, created_at=1000.0)
    message = SimpleNamespace(metadata=metadata, content=record_of(b"x"), has_error=lambda: False)
    flower_app._answer(message, SimpleNamespace(node_config={"worker": "/w"}))
    assert asked == [left]
