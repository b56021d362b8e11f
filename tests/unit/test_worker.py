"""The worker of a site, with a backend that only counts: each order once, adapters once, the site's rules, its ledger."""

from __future__ import annotations

import itertools
import json
import os
import re
import socket
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedbiscuit.backends import sockets, worker
from fedbiscuit.backends.bundle import Answer, Order, digest_of, pack_answer, pack_order, packed_adapter, unpack_answer
from fedbiscuit.backends.sockets import ask_at, receive, send
from fedbiscuit.backends.worker import Rules, TakingPart, Worker, serve_at, told_outside
from fedbiscuit.rundir.ledger import read_learned
from fedbiscuit.types import (
    DataError,
    EnvironmentFault,
    FederationError,
    IntegrityError,
    LocalTraining,
    Reply,
    Task,
)

WEIGHTS = {"w": torch.tensor([1.0, 2.0])}
DIGEST, PACKED = packed_adapter(WEIGHTS)
OTHER, OTHER_PACKED = packed_adapter({"w": torch.tensor([3.0])})
MODEL = "5" * 64
TRAIN = Task("train", "ann", 0, local=LocalTraining())
SEAT = Task("seat", "ann", 0, prices=(0.0, 1.0))


class Backend:
    """Twice the adapter is the delta, 0 the seat. ``trouble`` is raised or replied instead, once."""

    def __init__(self) -> None:
        self.tasks: list[Task] = []
        self.trouble: list[Exception | str] = []
        self.hold = threading.Event()
        self.hold.set()
        self.begun = threading.Event()

    def run(self, tasks):
        self.tasks += tasks
        self.begun.set()
        assert self.hold.wait(20)
        (task,) = tasks
        if self.trouble:
            trouble = self.trouble.pop(0)
            if isinstance(trouble, Exception):
                raise trouble
            return [Reply(task.client, ok=False, error=trouble)]
        if task.kind == "train":
            ((u, weights),) = task.adapters.items()
            return [Reply(task.client, u, {"w": 2 * weights["w"]}, 5)]
        return [Reply(task.client, seat=0) if task.kind == "seat" else Reply(task.client)]


class World:
    """A worker with clients ann, who holds 5 comparisons, and bo, who holds 2."""

    def __init__(self, folder: Path, **rules: object) -> None:
        self.backend = Backend()
        self.opened: list[str] = []
        self.error: Exception | None = None
        self.ledger = folder / "ledger.jsonl"
        self.worker = Worker(self.open_run, Rules(**rules), self.ledger)

    def open_run(self, terms: str) -> TakingPart:
        self.opened.append(terms)
        if self.error:
            raise self.error
        return TakingPart(self.backend, {"ann": 5, "bo": 2}, MODEL)

    def ask(self, *tasks: Task, wanted=None, adapters=None, run: str = "demo", terms: str = "terms") -> Answer:
        if wanted is None:
            wanted = [{0: DIGEST} if task.kind != "seat" else {} for task in tasks]
        if adapters is None:
            adapters = {DIGEST: PACKED} if any(wanted) else {}
        order = pack_order(Order(run, terms, tasks, wanted, adapters))
        answer = unpack_answer(self.worker.answer(order))
        assert not answer.order or answer.order == digest_of(order)
        return replace(answer, order="")

    def rows(self) -> list[dict]:
        return [json.loads(line) for line in self.ledger.read_text().splitlines()]


def nothing_done(*clients: str, error: str = "") -> Answer:
    return Answer(list(clients), [], [], error)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_task_is_done_with_its_adapter(world):
    answer = world.ask(TRAIN)
    assert (answer.clients, answer.error, answer.lacks) == (["ann", "bo"], "", [])
    (reply,) = answer.replies
    assert (reply.client, reply.adapter, reply.num_examples, reply.ok) == ("ann", 0, 5, True)
    assert torch.equal(reply.delta["w"], torch.tensor([2.0, 4.0]))


def test_who_is_there_opens_the_run_and_does_nothing(world):
    assert world.ask() == nothing_done("ann", "bo")
    assert (world.opened, world.backend.tasks) == (["terms"], [])


def test_an_order_that_comes_twice_is_computed_once_and_answered_with_the_same_bytes(world):
    data = pack_order(Order("demo", "terms", [TRAIN, SEAT], [{0: DIGEST}, {}], {DIGEST: PACKED}))
    assert world.worker.answer(data) == world.worker.answer(data)
    assert [task.kind for task in world.backend.tasks] == ["train", "seat"]


@pytest.mark.parametrize(
    "other",
    [
        Task("train", "bo", 0, local=LocalTraining()),
        Task("train", "ann", 1, local=LocalTraining()),
        Task("train", "ann", 0, local=LocalTraining(lr=1.0)),
        Task("train", "ann", 0, local=LocalTraining(), consumed=1),
        Task("evaluate", "ann", 0, local=LocalTraining()),
        Task("seat", "ann", 0),
    ],
)
def test_another_order_is_computed(world, other):
    world.ask(TRAIN)
    world.ask(other)
    assert len(world.backend.tasks) == 2


def test_another_adapter_or_number_of_it_or_other_prices_are_another_order(world):
    world.ask(TRAIN)
    world.ask(TRAIN, wanted=[{1: DIGEST}])
    world.ask(TRAIN, wanted=[{0: OTHER}], adapters={OTHER: OTHER_PACKED})
    world.ask(SEAT)
    world.ask(Task("seat", "ann", 0, prices=(1.0, 0.0)))
    assert len(world.backend.tasks) == 5


def test_an_order_of_an_old_round_does_not_make_the_last_one_be_computed_again(world):
    for number in (7, 3, 7):
        world.ask(Task("seat", "ann", number))
    assert [task.round for task in world.backend.tasks] == [7, 3]


def test_a_task_that_failed_is_tried_again(world):
    world.backend.trouble = ["out of memory"]
    assert [world.ask(TRAIN).replies[0].ok for _ in range(3)] == [False, True, True]
    assert len(world.backend.tasks) == 2


def test_another_run_or_other_terms_begin_anew(world):
    for run, terms in (("demo", "terms"), ("demo", "terms"), ("demo", "more"), ("next", "more"), ("demo", "terms")):
        world.ask(SEAT, run=run, terms=terms)
    assert world.opened == ["terms", "more", "more", "terms"]
    assert len(world.backend.tasks) == 4


# Adapters


def test_an_adapter_that_came_once_need_not_come_again(world):
    world.ask(TRAIN)
    assert world.ask(Task("train", "bo", 0, local=LocalTraining()), adapters={}).replies[0].ok


def test_after_a_restart_adapters_are_asked_for_and_nothing_is_done_before(world, tmp_path):
    world.ask(TRAIN)
    again = World(tmp_path)
    answer = again.ask(TRAIN, SEAT, adapters={})
    assert (answer.lacks, answer.replies, answer.clients) == ([DIGEST], [], ["ann", "bo"])
    assert again.backend.tasks == []
    assert again.ask(TRAIN, SEAT).lacks == []


def test_adapters_and_replies_that_were_not_used_for_long_are_dropped(world, monkeypatch):
    monkeypatch.setattr(worker, "KEPT_BYTES", 8)
    world.ask(TRAIN)
    world.ask(TRAIN, wanted=[{0: OTHER}], adapters={OTHER: OTHER_PACKED})
    assert world.ask(TRAIN, wanted=[{0: DIGEST}], adapters={}).lacks == [DIGEST]
    assert world.ask(TRAIN, wanted=[{0: OTHER}], adapters={}).lacks == []
    assert len(world.backend.tasks) == 3


def test_one_order_may_need_more_than_is_kept(world, monkeypatch):
    monkeypatch.setattr(worker, "KEPT_BYTES", 1)
    both = Task("evaluate", "ann", 0)
    answer = world.ask(both, wanted=[{0: DIGEST, 1: OTHER}], adapters={DIGEST: PACKED, OTHER: OTHER_PACKED})
    assert answer.replies[0].ok
    assert world.backend.tasks[0].adapters.keys() == {0, 1}


def test_what_a_client_scores_anew_makes_its_older_scores_and_seats_be_computed_again(world):
    first, later = Task("evaluate", "ann", 0), Task("evaluate", "ann", 4)
    for task in (first, first, later, first):
        assert world.ask(task).replies[0].ok
    assert [task.round for task in world.backend.tasks] == [
        0,
        4,
        0,
    ]  # the second was the same and came from what is kept


# Refusals


@pytest.mark.parametrize(
    ("rules", "task", "told"),
    [
        ({}, Task("seat", "eve", 0), "no such client at this site"),
        ({"comparisons": 3}, Task("seat", "bo", 0), "clients with 3 comparisons or more"),
        ({"kinds": ("train",)}, SEAT, "no tasks of the kind seat"),
        ({"rounds": 2}, Task("seat", "ann", 2), "takes part in 2 rounds"),
        ({}, Task("evaluate", "ann", 0, share_losses=True), "shares no losses"),
        (
            {"task_comparisons": 240},
            Task("train", "bo", 0, local=LocalTraining(steps=31)),
            "reads at most 240 comparisons, and 248 were asked for",
        ),
    ],
)
def test_a_task_against_the_rules_is_refused_and_the_others_are_done(tmp_path, rules, task, told):
    world = World(tmp_path, **rules)
    answer = world.ask(task, TRAIN)
    assert [reply.ok for reply in answer.replies] == [False, True]
    assert told in answer.replies[0].error
    assert [one.kind for one in world.backend.tasks] == ["train"]
    assert world.rows()[-1]["not_done"] == {answer.replies[0].error: [task.client]}


def test_rules_at_their_edge_permit(tmp_path):
    world = World(tmp_path, comparisons=2, rounds=2, models=(MODEL,), task_comparisons=240)
    assert world.ask(TRAIN).replies[0].ok
    assert world.ask(Task("seat", "bo", 1)).replies[0].ok


def test_a_client_with_too_little_is_not_named(tmp_path):
    assert World(tmp_path, comparisons=3).ask().clients == ["ann"]


def test_a_base_model_that_is_not_permitted_is_refused_with_no_names(tmp_path):
    world = World(tmp_path, models=("6" * 64,))
    for _ in range(2):
        answer = world.ask(SEAT)
        assert (answer.clients, answer.replies) == ([], [])
        assert answer.error.startswith(f"this site does not permit the base model of this run ({MODEL})")
    assert world.backend.tasks == []


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (FederationError("not this model"), "not this model"),
        (IntegrityError("/srv/base: shape (1,)"), "this site cannot do it (IntegrityError); its own log says why"),
        (DataError("mine.jsonl:3: prompt: 'secret'"), "this site cannot do it (DataError); its own log says why"),
        (EnvironmentFault("/home/ann: full"), "this site cannot do it (EnvironmentFault); its own log says why"),
        (KeyError("secret"), "this site cannot do it (KeyError); its own log says why"),
        (MemoryError("secret"), "out of memory; lower batch_size and raise grad_accum"),
    ],
)
def test_what_goes_wrong_is_told_without_the_sites_own_texts(world, caplog, error, told):
    world.error = error
    assert world.ask(SEAT) == nothing_done(error=told)
    assert told_outside(error) == told
    world.error = None
    world.backend.trouble = [error]
    both = [SEAT, replace(SEAT, client="bo")]
    first, second = world.ask(*both).replies
    assert (first.client, first.ok, first.error, second.ok) == ("ann", False, told, True), "it costs one client"
    assert all(reply.ok for reply in world.ask(*both).replies)
    if told != str(error):
        assert str(error) in caplog.text


def test_a_message_that_is_no_order_is_answered_and_noted(world):
    answer = replace(unpack_answer(world.worker.answer(b"\x01" * 30)), order="")
    assert answer == nothing_done(error="message: cut off, or not one of ours")
    (row,) = world.rows()
    assert (row["run"], row["error"], row["bytes_in"]) == ("", answer.error, 30)


def test_an_adapter_that_is_not_what_it_is_called_is_refused_and_not_kept(world):
    assert "not the one that it is called" in world.ask(TRAIN, adapters={DIGEST: OTHER_PACKED}).error
    assert world.ask(TRAIN, adapters={}).lacks == [DIGEST]


# The ledger


def test_the_ledger_has_a_line_for_every_order(world, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1234.5678)
    world.ask()
    world.ask(TRAIN, adapters={})
    data = pack_order(
        Order("demo", "terms", [TRAIN, SEAT, Task("seat", "eve", 2)], [{0: DIGEST}, {}, {}], {DIGEST: PACKED})
    )
    out = world.worker.answer(data)
    hello, lacking, done = world.rows()
    nothing = {"time": 1234.568, "run": "demo", "rounds": [], "asked": {}, "names": 2, "deltas": 0, "seats": 0}
    assert hello == nothing | {key: hello[key] for key in ("bytes_in", "bytes_out")}
    assert lacking == nothing | {key: lacking[key] for key in ("bytes_in", "bytes_out")} | {"lacks": 1}
    assert done == {
        "time": 1234.568, "run": "demo", "rounds": [0, 2], "asked": {"seat": 2, "train": 1}, "names": 2, "deltas": 1,
        "seats": 1, "bytes_in": len(data), "bytes_out": len(out), "not_done": {"no such client at this site": ["eve"]},
    }  # fmt: skip
    assert stat.S_IMODE(world.ledger.stat().st_mode) == 0o600


def test_a_line_that_a_crash_has_torn_does_not_spoil_the_next(world):
    world.ledger.write_text('{"time": 1')
    world.ask(SEAT)
    torn, whole = world.ledger.read_text().splitlines()
    assert torn == '{"time": 1'
    assert json.loads(whole)["seats"] == 1


def test_without_a_ledger_nothing_leaves(tmp_path):
    world = World(tmp_path / "gone")
    assert world.ask(SEAT) == nothing_done(error="this site cannot write its ledger, and sends nothing without")


def test_the_ledger_is_not_written_through_a_link(world, tmp_path):
    world.ledger.symlink_to(tmp_path / "elsewhere")
    assert "cannot write its ledger" in world.ask(SEAT).error
    assert not (tmp_path / "elsewhere").exists()


def test_a_line_is_on_the_disk_before_the_answer_leaves(world, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(world.ledger.read_text()))
    world.ask(SEAT)
    assert json.loads(synced[0])["seats"] == 1


# The socket


@contextmanager
def served(world: World, path: Path, grace: float = 10.0) -> Iterator[threading.Event]:
    stop = threading.Event()
    ended: list[bool] = []
    thread = threading.Thread(target=lambda: ended.append(serve_at(path, world.worker, stop, grace)))
    thread.start()
    try:
        wait_for(lambda: listens(path))
        yield stop
    finally:
        world.backend.hold.set()
        stop.set()
        thread.join(20)
        assert not thread.is_alive()
        world.ended = ended[0]


def wait_for(found) -> None:
    end = time.monotonic() + 20
    while not found():
        assert time.monotonic() < end
        time.sleep(0.01)


def listens(path: Path) -> bool:
    with closing(socket.socket(socket.AF_UNIX)) as knock:
        return knock.connect_ex(str(path)) == 0


def connected(path: Path) -> socket.socket:
    one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    one.settimeout(20)
    one.connect(str(path))
    return one


HELLO = pack_order(Order("demo", "terms"))
SEATED = pack_order(Order("demo", "terms", [SEAT], [{}]))


def test_orders_are_answered_at_a_socket_that_is_this_users_alone(world, tmp_path):
    path = tmp_path / "w"
    with served(world, path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert unpack_answer(ask_at(path, HELLO, 20)).clients == ["ann", "bo"]
    assert not path.exists()
    assert world.ended


def test_what_a_worker_before_has_left_is_cleared_away_but_no_file_of_somebody(world, tmp_path):
    path = tmp_path / "w"
    with closing(socket.socket(socket.AF_UNIX)) as left:
        left.bind(str(path))
    assert not listens(path)
    with served(world, path):
        wait_for(lambda: listens(path))
        assert unpack_answer(ask_at(path, HELLO, 20)).error == ""
    path.write_text("mine")
    with pytest.raises(EnvironmentFault, match="is no socket; move it away"):
        serve_at(path, world.worker, threading.Event())
    assert path.read_text() == "mine"


def test_a_path_that_is_too_long_is_an_error_that_says_so(world, tmp_path):
    with pytest.raises(EnvironmentFault, match="about 100 characters"):
        serve_at(tmp_path / ("x" * 120), world.worker, threading.Event())


def test_who_goes_in_the_middle_of_a_message_or_says_nothing_is_in_nobodys_way(world, tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "SILENCE", 0.3)
    with served(world, tmp_path / "w"):
        with closing(connected(tmp_path / "w")) as one:
            one.sendall((100).to_bytes(8, "little") + b"half")
        silent = [connected(tmp_path / "w") for _ in range(worker.AT_ONCE + 2)]
        assert unpack_answer(ask_at(tmp_path / "w", HELLO, 20)).clients == ["ann", "bo"]
        for one in silent:
            one.close()
    assert len(world.rows()) == 1


def test_a_message_that_announces_too_much_is_refused_before_it_is_read(world, tmp_path, monkeypatch):
    monkeypatch.setattr(sockets, "MAX_BYTES", 1000)
    with served(world, tmp_path / "w"), closing(connected(tmp_path / "w")) as one:
        one.sendall((1001).to_bytes(8, "little"))
        answer = receive(one)
    assert unpack_answer(answer) == nothing_done(error="message: 1001 bytes; at most 1000 are read")
    (row,) = world.rows()
    assert (row["run"], row["error"], row["bytes_in"]) == ("", "message: 1001 bytes; at most 1000 are read", 0)
    assert row["bytes_out"] == len(answer), "nothing leaves without a line"


def test_memory_grows_with_what_came_not_with_what_was_announced():
    import tracemalloc

    left, right = socket.socketpair()
    with closing(left), closing(right):
        left.sendall((2**31).to_bytes(8, "little") + b"x" * 1000)
        left.shutdown(socket.SHUT_WR)
        tracemalloc.start()
        assert receive(right) is None
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert most < 2**22


def test_a_message_comes_through_whole():
    left, right = socket.socketpair()
    data = os.urandom(3 * sockets.CHUNK + 5)
    with closing(left), closing(right):
        thread = threading.Thread(target=send, args=(left, data))
        thread.start()
        assert receive(right) == data
        thread.join()


def test_who_is_there_is_answered_while_a_task_is_done(world, tmp_path):
    world.ask()
    world.backend.hold.clear()
    with served(world, tmp_path / "w"), closing(connected(tmp_path / "w")) as one:
        send(one, SEATED)
        assert world.backend.begun.wait(20)
        assert unpack_answer(ask_at(tmp_path / "w", HELLO, 20)).clients == ["ann", "bo"]
        world.backend.hold.set()
        assert unpack_answer(receive(one)).replies[0].seat == 0


def test_two_orders_at_once_are_done_one_after_the_other_and_the_same_one_once(world, tmp_path):
    world.backend.hold.clear()
    with served(world, tmp_path / "w"):
        both = [connected(tmp_path / "w") for _ in range(2)]
        for one in both:
            send(one, SEATED)
        assert world.backend.begun.wait(20)
        world.backend.hold.set()
        assert receive(both[0]) == receive(both[1])
        for one in both:
            one.close()
    assert len(world.backend.tasks) == 1


def test_whoever_asked_may_go_and_ask_again_for_what_was_done_meanwhile(world, tmp_path):
    world.backend.hold.clear()
    with served(world, tmp_path / "w"):
        with closing(connected(tmp_path / "w")) as one:
            send(one, SEATED)
            assert world.backend.begun.wait(20)
        world.backend.hold.set()
        assert unpack_answer(ask_at(tmp_path / "w", SEATED, 20)).replies[0].seat == 0
    assert len(world.backend.tasks) == 1


def test_told_to_stop_it_ends_the_task_at_hand_sends_it_and_begins_no_other(world, tmp_path):
    world.backend.hold.clear()
    with served(world, tmp_path / "w") as stop, closing(connected(tmp_path / "w")) as one:
        send(one, pack_order(Order("demo", "terms", [SEAT, Task("seat", "bo", 0)], [{}, {}])))
        assert world.backend.begun.wait(20)
        stop.set()
        wait_for(world.worker._stopping.is_set)
        world.backend.hold.set()
        replies = unpack_answer(receive(one)).replies
    assert [(reply.ok, reply.error) for reply in replies] == [(True, ""), (False, "this site is stopping")]
    assert world.ended
    assert len(world.backend.tasks) == 1


def test_told_to_stop_it_waits_for_a_task_no_longer_than_its_grace(world, tmp_path):
    world.backend.hold.clear()
    stop = threading.Event()
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(serve_at(tmp_path / "w", world.worker, stop, 0.2)))
    thread.start()
    wait_for((tmp_path / "w").exists)
    with closing(connected(tmp_path / "w")) as one:
        send(one, SEATED)
        assert world.backend.begun.wait(20)
        stop.set()
        thread.join(10)
        assert found == [False]
        world.backend.hold.set()
        receive(one)


def test_a_worker_that_is_not_there_or_does_not_answer_is_an_error_that_says_so(world, tmp_path):
    """And no path of the site: the server is told it."""
    gone = "this site's worker is not there (No such file or directory); its administrator starts it with `fedbiscuit client start`"
    with pytest.raises(EnvironmentFault, match=f"^{re.escape(gone)}$"):
        ask_at(tmp_path / "w", HELLO, 1)
    world.backend.hold.clear()
    slow = r"^this site's worker did not answer in 0\.3 seconds$"
    with served(world, tmp_path / "w"), pytest.raises(EnvironmentFault, match=slow):
        ask_at(tmp_path / "w", SEATED, 0.3)


def test_fault_80_a_worker_that_answers_bit_by_bit_has_one_deadline_for_all(world, tmp_path, monkeypatch):
    looks = itertools.count(0, 40)  # so many seconds go by from one look at the clock to the next
    monkeypatch.setattr(sockets, "monotonic", lambda: float(next(looks)), raising=False)
    with served(world, tmp_path / "w"):
        with pytest.raises(EnvironmentFault, match=r"did not answer in 100 seconds"):
            ask_at(tmp_path / "w", HELLO, 100)
        assert unpack_answer(ask_at(tmp_path / "w", HELLO, 1e6)).clients == ["ann", "bo"]
        with pytest.raises(EnvironmentFault, match=r"did not answer in 0 seconds"):
            ask_at(tmp_path / "w", HELLO, 0)


def test_a_worker_that_ends_while_it_answers_is_an_error_that_says_so(tmp_path):
    with closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(str(tmp_path / "w"))
        listener.listen()

        def drop() -> None:
            one, _ = listener.accept()
            receive(one)
            one.sendall((100).to_bytes(8, "little") + pack_answer(Answer())[:20])
            one.close()

        thread = threading.Thread(target=drop)
        thread.start()
        with pytest.raises(
            EnvironmentFault, match=r"^this site's worker ended while it answered; its own log says why$"
        ):
            ask_at(tmp_path / "w", HELLO, 20)
        thread.join()


def test_fault_80_an_order_that_nobody_waits_for_any_more_is_left_and_what_was_done_of_it_is_kept(world, tmp_path):
    """So a slow site does not work off one order of the past after the other."""
    both = pack_order(Order("demo", "terms", [SEAT, Task("seat", "bo", 0, prices=(0.0, 1.0))], [{}, {}]))
    world.backend.hold.clear()
    with served(world, tmp_path / "w"):
        with closing(connected(tmp_path / "w")) as one:
            send(one, both)
            assert world.backend.begun.wait(20)
        world.backend.hold.set()
        wait_for(lambda: world.ledger.exists() and len(world.rows()) == 1)
        assert world.rows()[0]["not_done"] == {"nobody waits for the answer any more": ["bo"]}
        assert all(reply.ok for reply in unpack_answer(ask_at(tmp_path / "w", both, 20)).replies)
    assert [task.client for task in world.backend.tasks] == ["ann", "bo"]


def test_a_site_looks_at_what_came_after_it_has_answered_and_a_diary_that_fails_costs_no_answer(world, caplog):
    looked: list[tuple[str, torch.Tensor]] = []

    def look(client, adapter):
        if looked:
            raise OSError("no space")
        looked.append((client, adapter["w"]))
        return {"num_adapters": 2, "accuracy": 0.75, "comparisons": 4}

    part = TakingPart(world.backend, {"ann": 5, "bo": 2}, MODEL, look)
    world.worker.open_run = lambda terms: part
    data = pack_order(Order("demo", "terms", [TRAIN, SEAT], [{1: DIGEST}, {}], {DIGEST: PACKED}))
    first = world.worker.answer(data)
    learned = world.ledger.with_name("learned.jsonl")
    assert (looked, learned.exists()) == ([], False), "the answer leaves first"
    world.worker.look_back()
    assert [client for client, _ in looked] == ["ann"]
    assert torch.equal(looked[0][1], WEIGHTS["w"])
    assert list(read_learned(learned)) == [
        {
            "run": "demo",
            "round": 0,
            "client": "ann",
            "adapter": 1,
            "num_adapters": 2,
            "accuracy": 0.75,
            "comparisons": 4,
        }
    ]
    assert stat.S_IMODE(learned.stat().st_mode) == 0o600
    assert world.worker.answer(data) == first
    world.worker.look_back()
    assert len(looked) == 1, "what was answered from memory is not looked at again"

    assert world.ask(replace(TRAIN, round=1)).replies[0].ok
    world.worker.look_back()
    assert "learned.jsonl: no line for ann in round 1: no space" in caplog.text
    assert world.ask(replace(TRAIN, round=2)).replies[0].ok
    assert world.ask(run="another").error == ""
    world.worker.look_back()
    assert "in round 2" not in caplog.text, "the run before is closed, and its base model with it"
