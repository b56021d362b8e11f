"""Orders and answers as bytes: what goes in comes out, an adapter travels once, and everything malformed is refused with words."""

from __future__ import annotations

import contextlib
import hashlib
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbiscuit.backends import bundle
from fedbiscuit.backends.bundle import (
    Answer,
    Order,
    opened_adapter,
    pack_answer,
    pack_order,
    packed_adapter,
    unpack_answer,
    unpack_order,
)
from fedbiscuit.backends.wire import pack_task
from fedbiscuit.types import FederationError, LocalTraining, Reply, Task

WEIGHTS = {"a": torch.tensor([[1.5, -2.0]]), "b": torch.tensor([float("nan")], dtype=torch.bfloat16)}
DIGEST, PACKED = packed_adapter(WEIGHTS)
OTHER, _ = packed_adapter({"a": torch.zeros(1)})
TASKS = (Task("train", "ann", 3, local=LocalTraining(), consumed=7), Task("seat", "bö", 3, prices=(0.5, 0.0)))
ORDER = Order("demo", "terms", TASKS, ({0: DIGEST}, {}), {DIGEST: PACKED})
names = st.text(min_size=1, max_size=20).filter(lambda text: not any("\ud800" <= c <= "\udfff" for c in text))


def parts_of(data: bytes) -> list[bytes]:
    parts = []
    while data:
        size = int.from_bytes(data[:8], "little")
        parts.append(data[8 : 8 + size])
        data = data[8 + size :]
    return parts


def joined(*parts: bytes) -> bytes:
    return b"".join(len(part).to_bytes(8, "little") + part for part in parts)


def order_with(**changes: object) -> bytes:
    header, *rest = parts_of(pack_order(ORDER))
    return joined(json.dumps(json.loads(header) | changes).encode(), *rest)


def answer_with(**changes: object) -> bytes:
    header, *rest = parts_of(pack_answer(Answer(["ann"], [Reply("ann")])))
    return joined(json.dumps(json.loads(header) | changes).encode(), *rest)


def test_an_adapter_comes_out_bit_for_bit_under_the_digest_of_its_bytes():
    assert hashlib.sha256(PACKED).hexdigest() == DIGEST
    found = opened_adapter(DIGEST, PACKED)
    assert found.keys() == WEIGHTS.keys()
    assert all(torch.equal(found[name].view(torch.uint8), WEIGHTS[name].view(torch.uint8)) for name in WEIGHTS)


def test_the_same_weights_in_another_order_are_the_same_adapter():
    assert packed_adapter(dict(reversed(WEIGHTS.items())))[0] == DIGEST


def test_an_adapter_under_another_name_is_refused():
    with pytest.raises(FederationError, match=f"not the one that it is called .{OTHER[:12]}"):
        opened_adapter(OTHER, PACKED)


def test_an_order_comes_out_as_it_went_in():
    found = unpack_order(pack_order(ORDER))
    assert (found.run, found.terms, tuple(found.tasks)) == (ORDER.run, ORDER.terms, TASKS)
    assert (tuple(found.wanted), dict(found.adapters)) == (ORDER.wanted, ORDER.adapters)


def test_who_is_there_is_an_order_without_tasks():
    assert unpack_order(pack_order(Order("demo", ""))) == Order("demo", "", [], [], {})


def test_an_adapter_that_two_tasks_want_is_in_the_message_once():
    task = TASKS[0]
    one, two = (pack_order(Order("r", "", [task] * count, [{0: DIGEST}] * count, {DIGEST: PACKED})) for count in (1, 2))
    assert one.count(PACKED) == two.count(PACKED) == 1


def test_the_adapters_of_a_task_itself_do_not_travel_with_it():
    task = Task("train", "ann", 0, {0: WEIGHTS})
    assert unpack_order(pack_order(Order("r", "", [task], [{0: DIGEST}]))).tasks[0].adapters == {}


def test_an_answer_comes_out_as_it_went_in():
    answer = Answer(
        ["ann", "bö"], [Reply("ann", 0, WEIGHTS, 4), Reply("bö", ok=False, error="no")], [OTHER], "why", DIGEST
    )
    found = unpack_answer(pack_answer(answer))
    assert (found.clients, found.lacks, found.error, found.order) == (answer.clients, answer.lacks, "why", DIGEST)
    assert torch.equal(found.replies[0].delta["a"], WEIGHTS["a"])
    assert found.replies[1] == answer.replies[1]


@settings(max_examples=100, deadline=None)
@given(
    run=st.text(max_size=50), terms=st.text(max_size=200), data=st.data(),
    count=st.integers(0, 5), adapters=st.lists(st.lists(st.floats(width=32), max_size=4), max_size=4),
)  # fmt: skip
def test_every_order_comes_out_as_it_went_in(run, terms, data, count, adapters):
    content = dict(packed_adapter({"w": torch.tensor(values)}) for values in adapters)
    wanted = [
        data.draw(st.dictionaries(st.integers(0, 99), st.sampled_from(sorted(content)) if content else st.nothing()))
        for _ in range(count)
    ]
    tasks = [
        Task(data.draw(st.sampled_from(("train", "evaluate", "seat"))), data.draw(names), data.draw(st.integers(0, 10**6)),
             prices=tuple(data.draw(st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=3))),
             local=data.draw(st.sampled_from((None, LocalTraining(lr=0.5)))), consumed=data.draw(st.integers(0, 10**9)))
        for _ in range(count)
    ]  # fmt: skip
    asked = {digest for one in wanted for digest in one.values()}
    sent = (
        {digest: content[digest] for digest in data.draw(st.sets(st.sampled_from(sorted(asked)))) if asked}
        if asked
        else {}
    )
    found = unpack_order(pack_order(Order(run, terms, tasks, wanted, sent)))
    assert found == Order(run, terms, tasks, wanted, sent)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "not one of ours"),
        (b"abc", "cut off, or not one of ours"),
        (joined(b"{"), "not one of ours"),
        (joined(b"[]"), "header is not one of ours"),
        (joined(b"[" * 100_000), "not one of ours"),
        (joined(b"\xff"), "not one of ours"),
        (pack_order(ORDER)[:-1], "cut off"),
        (pack_order(ORDER) + b"\0", "cut off"),
        (pack_order(ORDER) + joined(b""), "4 parts for 1 adapters and 2 tasks"),
        (pack_answer(Answer()), "header is not one of ours; do both sides run the same version"),
        (joined(*parts_of(pack_order(ORDER))[:-1]), "2 parts for 1 adapters and 2 tasks"),
        (order_with(more=1), "header is not one of ours"),
        (order_with(run=3), "run: 3 is not a text"),
        (order_with(run="x" * 201), "run: .* is not a text of at most 200 characters"),
        (order_with(terms="x" * (2**20 + 1)), "terms: .* is not a text of at most"),
        (order_with(adapters=3), "adapters: 3 is not a list"),
        (order_with(adapters=["../x"]), "adapters: '../x' is not a digest"),
        (order_with(adapters=[DIGEST.upper()]), "is not a digest"),
        (order_with(adapters=[DIGEST, DIGEST]), "parts for 2 adapters"),
        (order_with(adapters=[OTHER]), f"no task wants adapter {OTHER[:12]}"),
        (order_with(wanted={}), "wanted: {} is not a list"),
        (order_with(wanted=[3, {}]), "wanted: 3 does not name adapters"),
        (order_with(wanted=[{"x": DIGEST}, {}]), "does not name adapters"),
        (order_with(wanted=[{"-1": DIGEST}, {}]), "does not name adapters"),
        (order_with(wanted=[{"1234567": DIGEST}, {}]), "does not name adapters"),
        (order_with(wanted=[{"0": None}, {}]), "wanted: None is not a digest"),
        (order_with(wanted=[{"0": DIGEST}]), "3 parts for 1 adapters and 1 tasks"),
        (joined(*parts_of(pack_order(ORDER))[:2], b"x", pack_task(TASKS[1])), "not one of ours"),
        (joined(*parts_of(pack_order(ORDER))[:2], pack_task(Task("train", "a", 0, {0: WEIGHTS})), pack_task(TASKS[1])),
         "a task brings adapters of its own"),
    ],
)  # fmt: skip
def test_an_order_that_is_none_is_refused_with_words(data, told):
    with pytest.raises(FederationError, match=told):
        unpack_order(data)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (pack_order(ORDER), "header is not one of ours"),
        (answer_with(clients="ann"), "clients: 'ann' is not a list"),
        (answer_with(clients=[None]), "clients: None is not a text"),
        (answer_with(clients=["x" * 1001]), "clients: .* at most 1000 characters"),
        (answer_with(lacks=["x"]), "lacks: 'x' is not a digest"),
        (answer_with(error=None), "error: None is not a text"),
        (answer_with(order=7), "order: 7 is not a text"),
        (joined(b'{"clients":[],"lacks":[],"lacks":[],"error":"","order":""}'), "not one of ours"),
        (joined(b'{"clients":[],"lacks":NaN,"error":"","order":""}'), "not one of ours"),
    ],
)
def test_an_answer_that_is_none_is_refused_with_words(data, told):
    unpack_answer(answer_with())
    with pytest.raises(FederationError, match=told):
        unpack_answer(data)


def test_a_reply_that_cannot_be_read_is_lost_alone():
    header, *rest = parts_of(pack_answer(Answer(["ann"], [Reply("ann"), Reply("bo", 0, WEIGHTS, 4)])))
    found = unpack_answer(joined(header, rest[0], b"x", rest[1]))
    assert [(reply.client, reply.ok, reply.unreadable) for reply in found.replies] == [
        ("ann", True, False), ("", False, True), ("bo", True, False),
    ]  # fmt: skip
    assert found.replies[1].error.startswith("message: not one of ours")


def test_sizes_have_limits(monkeypatch):
    data = pack_order(ORDER)
    for name, limit, told in (
        ("MAX_BYTES", len(data) - 1, "at most"),
        ("MAX_HEADER", 10, "a header of"),
        ("MAX_PARTS", 1, "not one"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(bundle, name, limit)
            with pytest.raises(FederationError, match=told):
                unpack_order(data)
    unpack_order(data)


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=200), cut=st.integers(0, 10**6), flip=st.integers(0, 10**6), bits=st.integers(1, 255))
def test_broken_bytes_are_refused_and_nothing_else_happens(data, cut, flip, bits):
    whole = bytearray(pack_order(ORDER))
    torn = bytes(whole[: cut % len(whole)])
    whole[flip % len(whole)] ^= bits
    for broken in (data, torn):
        for read in (unpack_order, unpack_answer):
            with pytest.raises(FederationError):
                read(broken)
    with contextlib.suppress(FederationError):
        for digest, packed in unpack_order(bytes(whole)).adapters.items():
            opened_adapter(digest, packed)
