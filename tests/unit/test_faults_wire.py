"""Bad updates on the wire: whatever one site sends for one client, only that client's reply is lost, and the reason is known.

The world: three sites behind a grid that is a dict. The site of "bad" says something else; the round must end as it would have
ended without "bad".
"""

from __future__ import annotations

import importlib.util
import json
import math
import pickle
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save
from tests.flower_grid import DictGrid

from fedbiscuit.backends import flower_messages
from fedbiscuit.backends.bundle import Answer, digest_of, pack_answer, unpack_answer
from fedbiscuit.backends.worker import Rules, TakingPart, Worker
from fedbiscuit.config import FederatedSettings
from fedbiscuit.federated.algorithm import fedbiscuit_round, init_state
from fedbiscuit.federated.coding import coded, decoded
from fedbiscuit.types import FederationError, Reply

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("flwr") is None,
    reason="SKIPPED: flwr is not installed, so bad messages over Flower are not tested (pip install 'fedbiscuit[flower]')",
)

A = "q_proj.lora_A.weight"
START = {A: torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])}
Change = Callable[[Reply], Reply | list[Reply] | bytes]


class Town:
    """Clients that add a half to every number and never want another adapter than 0."""

    def __init__(self, kind: str):
        self.kind = kind

    def run(self, tasks):
        made = []
        for task in tasks:
            if task.kind == "train":
                ((u, weights),) = task.adapters.items()
                delta = {name: torch.full_like(w, 0.5) for name, w in decoded(weights, self.kind).items()}
                made.append(Reply(task.client, u, coded(delta, self.kind), 1))
            else:
                made.append(Reply(task.client, seat=0 if task.kind == "seat" else None))
        return made


def parts_of(data: bytes) -> list[bytes]:
    parts = []
    while data:
        size = int.from_bytes(data[:8], "little")
        parts.append(data[8 : 8 + size])
        data = data[8 + size :]
    return parts


def spoiling(worker: Worker, change: Change) -> Callable[[bytes], bytes]:
    """A site that sends something else for the client "bad": a reply, several, or the bytes of one."""

    def answer(order: bytes) -> bytes:
        given = worker.answer(order)
        said = unpack_answer(given)
        out, raw = [], {}
        for reply in said.replies:
            found = change(reply) if reply.client == "bad" and reply.delta is not None else reply
            if isinstance(found, bytes):
                raw[len(out)], found = found, Reply("bad")
            out += found if isinstance(found, list) else [found]
        header, *packed = parts_of(pack_answer(replace(said, replies=out)))
        packed = [raw.get(i, part) for i, part in enumerate(packed)]
        return b"".join(len(part).to_bytes(8, "little") + part for part in [header, *packed])

    return answer


def federation(tmp_path, change: Change | None = None, kind: str = "float32"):
    """Sites with the clients ann, then bad and bo, then cy; ``change`` is what becomes of bad's reply."""
    from fedbiscuit.backends.flower import FlowerBackend

    nodes = {}
    for number, names in enumerate((("ann",), ("bad", "bo"), ("cy",)), 1):
        part = TakingPart(Town(kind), dict.fromkeys(names, 5), "m")
        worker = Worker(lambda terms, part=part: part, Rules(), tmp_path / f"{number}.jsonl")
        nodes[number] = spoiling(worker, change) if change and "bad" in names else worker.answer
    grid = DictGrid(nodes)
    return FlowerBackend(grid, "run", "terms", 5.0), grid


def cfg_of(kind: str = "float32") -> FederatedSettings:
    local = {"steps": 1, "batch_size": 1, "grad_accum": 1}
    return FederatedSettings(cohort_size=0, local=local, comm_dtype=kind, max_attempts=1)


def one_round(tmp_path, change: Change | None = None, kind: str = "float32"):
    backend, _ = federation(tmp_path, change, kind)
    return fedbiscuit_round(init_state([START]), backend, cfg_of(kind), seed=0)


def with_values(**changes) -> Change:
    return lambda reply: replace(
        reply, delta={**reply.delta, **changes.pop("more", {}), A: changes.get("a", reply.delta[A])}
    )


def header_of(reply: Reply, **changes) -> dict:
    keys = ("client", "adapter", "num_examples", "seat", "ok", "error")
    return {**{key: getattr(reply, key) for key in keys}, "metrics": {}, "has_delta": True, **changes}


def written(**changes) -> Change:
    """The reply with another header, good tensors behind it."""
    return lambda reply: save(dict(reply.delta), {"fedbiscuit": json.dumps(header_of(reply, **changes))})


def twice_named(reply: Reply) -> bytes:
    """A tensor's name twice, which the library takes."""
    data = save(dict(reply.delta), {"fedbiscuit": json.dumps(header_of(reply))})
    size = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + size].rstrip()
    entry = json.dumps({A: json.loads(text)[A]}).encode()[1:-1]
    text = text[:-1] + b"," + entry + b"}"
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def refused(tmp_path, change: Change, kind: str = "float32") -> str:
    """Why bad's reply was refused, in a round that ended as one in which nobody but bad was missing."""
    state, record = one_round(tmp_path, change, kind)
    assert record.refused.keys() == {"bad"}
    assert record.quarantined == record.refused
    assert record.metrics["num_replies"] == 3
    moved = decoded(coded({A: torch.full((2, 3), 0.5)}, kind), kind)[A]
    assert torch.equal(state.adapters[0][A], START[A] + moved)
    return record.refused["bad"]


def full(value: float, shape=(2, 3), dtype=torch.float32) -> torch.Tensor:
    return torch.full(shape, value, dtype=dtype)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        pytest.param(with_values(a=full(math.nan)), "6 non-finite values, first at 0", id="test_fault_63_nan"),
        pytest.param(with_values(a=full(math.inf)), "6 non-finite values, first at 0", id="test_fault_64_inf"),
        pytest.param(with_values(a=full(1e30)), "delta has norm", id="test_fault_64_huge"),
        pytest.param(lambda reply: replace(reply, delta={}), "tensor is missing", id="test_fault_66_missing"),
        pytest.param(with_values(more={"x": full(0.0)}), "x: unknown tensor", id="test_fault_66_extra"),
        pytest.param(with_values(a=full(0.5, (4,))), "shape (4,) where (2, 3) is needed", id="test_fault_67"),
        pytest.param(with_values(a=full(0.5, (1,))), "shape (1,) where (2, 3) is needed", id="test_fault_68"),
        pytest.param(with_values(a=full(0.5, (2, 1))), "shape (2, 1) where (2, 3)", id="test_fault_68_column"),
        pytest.param(with_values(a=full(0.5, dtype=torch.bfloat16)), "dtype torch.bfloat16", id="test_fault_69_bfloat16"),
        pytest.param(with_values(a=full(0.5, dtype=torch.float16)), "which is not sent", id="test_fault_69_float16"),
        pytest.param(with_values(a=full(0.5, dtype=torch.float64)), "which is not sent", id="test_fault_69_float64"),
        pytest.param(with_values(a=full(1, dtype=torch.int64)), "which is not sent", id="test_fault_69_int64"),
        pytest.param(written(num_examples=10**12), "num_examples: 1000000000000 is outside 0..1", id="test_fault_70_many"),
        pytest.param(written(num_examples=-39), "num_examples: -39 is not permitted", id="test_fault_70_negative"),
        pytest.param(written(num_examples=math.nan), "NaN is not JSON", id="test_fault_70_nan"),
        pytest.param(written(num_examples="1"), "num_examples: '1' is not permitted", id="test_fault_70_text"),
        pytest.param(lambda reply: [reply, with_values(a=full(0.7))(reply)], "2 replies that differ", id="test_fault_71"),
        pytest.param(written(adapter=1), "it trained adapter 1 where 0 was asked for", id="test_fault_73"),
        pytest.param(written(metrics={"losses": [math.nan]}), "NaN is not JSON", id="test_fault_74"),
        pytest.param(written(has_delta=False), "tensors in a reply that has no delta", id="test_fault_76_no_delta"),
        pytest.param(lambda reply: pickle.dumps(START), "not one of ours", id="test_fault_76_pickle"),
        pytest.param(lambda reply: b"a text", "not one of ours", id="test_fault_76_text"),
        pytest.param(twice_named, "a key occurs twice", id="duplicate_name"),
        pytest.param(with_values(more={f"x{i}": full(0.0, (2**17,)) for i in range(3)}), "bytes of tensors where at most",
                     id="test_fault_77_flood"),
    ],
)  # fmt: skip
def test_fault_63_to_77_over_the_wire_cost_the_reply_of_one_client(tmp_path, change, told):
    assert told in refused(tmp_path, change)


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (with_values(a=full(0.5)), "dtype torch.float32 where"),
        (with_values(a=full(1, (1,), torch.int8)), "dtype torch.int8 where torch.bfloat16|shape .1,. where .2, 3."),
        (lambda reply: replace(reply, delta={}), "tensor is missing"),
    ],
)
def test_fault_66_to_69_smaller_messages_are_checked_as_strictly(tmp_path, kind, change, told):
    assert re.search(told, refused(tmp_path, change, kind))


def test_fault_65_zeros_over_the_wire_count_as_a_participant(tmp_path):
    state, record = one_round(tmp_path, with_values(a=torch.zeros(2, 3)))
    assert record.refused == {}
    assert torch.equal(state.adapters[0][A], START[A] + 0.375)


def test_fault_71_the_same_reply_twice_in_one_answer_counts_once(tmp_path):
    state, record = one_round(tmp_path, lambda reply: [reply, reply])
    assert (record.refused, record.metrics["num_replies"]) == ({}, 4)
    assert torch.equal(state.adapters[0][A], START[A] + 0.5)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_fault_72_an_answer_of_an_earlier_round_is_refused_with_all_its_replies(tmp_path, kind):
    backend, grid = federation(tmp_path, kind=kind)
    honest, kept = grid.nodes[2], []

    def replaying(order: bytes) -> bytes:
        answer = honest(order)
        if unpack_answer(answer).replies:
            kept.append(answer)
            return kept[0]
        return answer

    grid.nodes[2] = replaying
    state, first = fedbiscuit_round(init_state([START]), backend, cfg_of(kind), seed=0)
    state, second = fedbiscuit_round(state, backend, cfg_of(kind), seed=0)
    assert first.refused == {}
    assert second.refused == dict.fromkeys(("bad", "bo"), "it answers another order than the one that it was sent")
    assert second.metrics["num_replies"] == 2


def test_fault_75_a_seat_that_is_no_adapter_or_no_number_leaves_the_client_where_it_was(tmp_path):
    backend, grid = federation(tmp_path)
    honest = grid.nodes[2]
    for seat, told in ((7, "seat: expected an adapter in 0..1, got 7"), (None, "seat: expected"), (0, None)):

        def answer(order: bytes, seat=seat) -> bytes:
            said = unpack_answer(honest(order))
            mine = [replace(r, seat=seat) if r.client == "bad" and r.seat is not None else r for r in said.replies]
            return pack_answer(replace(said, replies=mine))

        grid.nodes[2] = answer
        cfg = cfg_of().model_copy(update={"num_adapters": 2, "warmup_rounds": 0})
        _, record = fedbiscuit_round(init_state([START, START]), backend, cfg, seed=0)
        assert set(record.grouping) == {"ann", "bad", "bo", "cy"}
        assert told is None or record.kept_seats["bad"].startswith(told)


def test_fault_76_77_an_array_that_is_not_plain_bytes_is_never_opened(tmp_path):
    """numpy's own format may hold a pickle, an archive, or a header that announces more than there is."""
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

    from fedbiscuit.backends.flower import FlowerBackend

    arrays = [
        Array("object", (1,), "numpy.ndarray", pickle.dumps(START)),
        Array("uint8", (10**15,), "numpy.ndarray", b"\x93NUMPY\x01\x00" + b"x" * 100),
        Array("uint8", (3,), "torch", b"PK\x03\x04"),
    ]
    for content in (*(RecordDict({"data": ArrayRecord({"bytes": one})}) for one in arrays), RecordDict({}),
                    RecordDict({"data": ArrayRecord({})}), RecordDict({"data": ConfigRecord({"error": b"x"})})):  # fmt: skip
        _, grid = federation(tmp_path)
        grid.nodes[2] = lambda order, content=content: content
        _, record = fedbiscuit_round(init_state([START]), FlowerBackend(grid, "r", "t", 5.0), cfg_of(), seed=0)
        assert record.cohort == ("ann", "cy")


def test_fault_77_a_message_above_the_limit_is_refused_before_it_is_read(monkeypatch):
    message = type("Message", (), {"content": flower_messages.record_of(b"x" * 100), "has_error": lambda self: False})()
    assert flower_messages.message_bytes(message) == b"x" * 100
    monkeypatch.setattr(flower_messages, "MAX_BYTES", 99)
    with pytest.raises(FederationError, match="100 bytes; at most 99 are read"):
        flower_messages.message_bytes(message)


def test_what_a_node_says_of_an_order_is_bound_to_that_order():
    assert digest_of(b"one") != digest_of(b"two")
    assert unpack_answer(pack_answer(Answer(order=digest_of(b"one")))).order == digest_of(b"one")


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_the_bytes_of_a_round_over_the_wire_are_those_of_its_messages(tmp_path, kind):
    backend, grid = federation(tmp_path, kind=kind)
    answers = []
    for node, honest in list(grid.nodes.items()):
        grid.nodes[node] = lambda order, honest=honest: answers.append(honest(order)) or answers[-1]
    state = init_state([START])
    backend.clients()  # what was said before a round is none of its bytes
    before = len(grid.seen), len(answers)
    _, record = fedbiscuit_round(state, backend, cfg_of(kind), seed=0)
    assert record.bytes_down == sum(len(data) for _, data in grid.seen[before[0] :])
    assert record.bytes_up == sum(map(len, answers[before[1] :]))
    assert record.bytes_up > 4 * 6 * {"float32": 4, "bfloat16": 2, "int8": 1}[kind]
