"""What a client does with a task, and what may leave it."""

from __future__ import annotations

import dataclasses
import io

import pytest
import torch
from safetensors.torch import save

from fedbiscuit.backends.client import Desk, Memory, answer, policy_pair
from fedbiscuit.backends.inprocess import InProcessBackend
from fedbiscuit.data.encoding import load_template
from fedbiscuit.models.selector import Selector
from fedbiscuit.types import ClientData, Comparison, FederationError, LocalTraining, Reply, Task

SECRET = "zebra-secret"


@pytest.fixture(scope="module")
def desk(load_tiny):
    return Desk(Selector.of(load_tiny(), load_template("choice"), (" A", " B"), 200), seed=0)


def comparisons(count: int, choice: int = 0, client: str = "ann") -> tuple[Comparison, ...]:
    return tuple(
        Comparison(f"{SECRET} {i}", f"{SECRET} yes {i}", "no", choice, client, id=f"{SECRET}-{i}") for i in range(count)
    )


def holder(choice: int = 0) -> ClientData:
    return ClientData(comparisons(6), tuple(dataclasses.replace(c, choice=choice) for c in comparisons(5)))


def two_adapters(desk):
    generator = torch.Generator().manual_seed(5)
    base = desk.selector.lm.new_adapter("base")
    other = {n: w if "lora_A" in n else torch.randn(w.shape, generator=generator) * 0.3 for n, w in base.items()}
    return {0: base, 1: other}


@pytest.mark.parametrize("chat", [True, False])
def test_a_prompt_of_the_policy_is_shortened_as_little_as_fits_and_answers_never_are(load_tiny, chat):
    desk = Desk(Selector.of(load_tiny(), load_template("choice"), (" A", " B"), 60), seed=0, chat=chat)
    lm, prompt = desk.selector.lm, "why is the sky blue? " * 20
    first, second = "because", "scattered light, more of it blue"
    short = policy_pair(prompt, first, second, desk)
    assert (short.chosen, short.rejected) == ((*lm.encode(first), lm.end), (*lm.encode(second), lm.end))
    assert short.longest <= 60
    fitting = [n for n in range(len(prompt)) if lm.chat_prompt(prompt[:n], "", chat) == short.prompt]
    assert len(lm.chat_prompt(prompt[: fitting[-1] + 1], "", chat)) + len(short.rejected) > 60
    assert policy_pair("why?", first, "no", desk).prompt == lm.chat_prompt("why?", "", chat)


LOCAL = LocalTraining(steps=2, batch_size=2, lr=0.01)


def replies_of(desk, data, prices=(0.0, 0.0)):
    """All that a client ever answers in a round, by default."""
    adapters, memory = two_adapters(desk), Memory()
    return [
        answer(Task("evaluate", "ann", 0, adapters), data, desk, memory),
        answer(Task("seat", "ann", 0, prices=prices), data, desk, memory),
        answer(Task("train", "ann", 0, {1: adapters[1]}, local=LOCAL), data, desk, memory),
    ]


def content(reply: Reply) -> bytes:
    """Every byte of a reply, tensors included."""
    out = io.StringIO()
    out.write(repr({f.name: getattr(reply, f.name) for f in dataclasses.fields(reply) if f.name != "delta"}))
    return out.getvalue().encode() + (save(dict(reply.delta)) if reply.delta else b"")


def test_no_text_of_the_data_and_no_id_occurs_in_what_leaves_a_client(desk):
    for reply in replies_of(desk, holder()):
        assert SECRET.encode() not in content(reply)
        assert b"yes" not in content(reply)


def test_no_number_that_depends_on_the_validation_choices_leaves_a_client_but_the_seat(desk):
    """The same client with all validation choices the other way round answers the same, but for the seat it may take."""
    for reply, other in zip(replies_of(desk, holder(0)), replies_of(desk, holder(1)), strict=True):
        assert content(dataclasses.replace(reply, seat=None)) == content(dataclasses.replace(other, seat=None))
    assert all(not reply.metrics for reply in replies_of(desk, holder()))


def test_the_seat_does_depend_on_them_and_on_the_prices(desk):
    """So the test above is about something: the losses are there, at the client."""
    seats = {choice: replies_of(desk, holder(choice))[1].seat for choice in (0, 1)}
    assert set(seats.values()) == {0, 1}
    dear = tuple(1e6 if u == seats[0] else 0.0 for u in range(2))
    assert replies_of(desk, holder(0), dear)[1].seat != seats[0]


def test_a_failed_client_is_a_reply_that_names_no_text(desk):
    backend = InProcessBackend(desk, {"ann": ClientData(comparisons(2)), "bo": holder()})
    replies = backend.run([Task("evaluate", c, 0, two_adapters(desk)) for c in ("ann", "bo")])
    assert [reply.ok for reply in replies] == [False, True]
    assert "no validation comparisons" in replies[0].error
    assert SECRET not in replies[0].error


def test_the_delta_is_end_minus_start_and_the_server_tensors_stay_as_they_were(desk):
    adapters = two_adapters(desk)
    before = {n: t.clone() for n, t in adapters[1].items()}
    reply = answer(Task("train", "ann", 3, {1: adapters[1]}, local=LOCAL), holder(), desk, Memory())
    end = desk.selector.lm.adapter()
    assert all(torch.equal(adapters[1][n], before[n]) for n in before)
    assert all(torch.allclose(before[n] + reply.delta[n], end[n], atol=1e-7) for n in before)
    assert reply.adapter == 1
    assert reply.num_examples == 4
    assert any(t.abs().max() > 0 for t in reply.delta.values())


def test_training_is_a_function_of_seed_round_client_and_what_was_consumed(desk):
    def delta(**changes):
        task = dataclasses.replace(Task("train", "ann", 3, {0: two_adapters(desk)[0]}, local=LOCAL), **changes)
        return torch.cat([t.flatten() for _, t in sorted(answer(task, holder(), desk, Memory()).delta.items())])

    first = delta()
    answer(Task("train", "bo", 9, {0: two_adapters(desk)[1]}, local=LOCAL), holder(1), desk, Memory())
    assert torch.equal(first, delta())
    assert not torch.equal(first, delta(consumed=3))


def test_with_freeze_a_only_the_b_matrices_move_and_travel(desk):
    frozen = dataclasses.replace(desk, freeze_a=True)
    start = two_adapters(desk)[1]
    reply = answer(Task("train", "ann", 0, {0: start}, local=LOCAL), holder(), frozen, Memory())
    assert reply.delta
    assert all("lora_B" in name for name in reply.delta)
    end = desk.selector.lm.adapter()
    assert all(torch.equal(end[name], start[name]) for name in start if "lora_A" in name)


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_the_baselines_train_the_policy_itself_and_lower_their_loss(desk, objective):
    from fedbiscuit.backends.client import _objective

    how = dataclasses.replace(LOCAL, objective=objective, steps=20, lr=0.01)
    data, lm = holder(), desk.selector.lm
    start = two_adapters(desk)[0]
    lm.put_adapter(start)
    lm.model.eval()
    before = float(_objective(data.train, desk, how))
    answer(Task("train", "ann", 0, {0: start}, local=how), data, desk, Memory())
    assert float(_objective(data.train, desk, how)) < before


def test_a_fault_of_ours_is_not_hidden_as_a_failed_client(desk):
    backend = InProcessBackend(desk, {"ann": holder()})
    with pytest.raises(KeyError):
        backend.run([Task("train", "nobody", 0, {0: two_adapters(desk)[0]}, local=LOCAL)])


def test_fault_88_what_a_client_says_of_its_memory_or_of_a_strange_adapter_names_no_path(desk, monkeypatch, caplog):
    from fedbiscuit.backends import client
    from fedbiscuit.backends.worker import told_outside

    assert "/" in desk.selector.lm.name
    backend = InProcessBackend(desk, {"ann": holder()}, told_outside)
    strange = {0: {"other": torch.zeros(1)}}
    short = {0: {name: tensor[:1] for name, tensor in two_adapters(desk)[0].items()}}
    for kind, adapters in (("train", strange), ("evaluate", strange), ("train", short)):
        (reply,) = backend.run([Task(kind, "ann", 0, adapters, local=LOCAL)])
        assert "tensors differ" in reply.error or "shape" in reply.error
        assert desk.selector.lm.name not in reply.error

    def fails(*rest):
        raise RuntimeError("CUDA out of memory; process 4711, /home/ann")

    monkeypatch.setattr(client, "selector_loss", fails)
    (reply,) = backend.run([Task("train", "ann", 0, {0: two_adapters(desk)[0]}, local=LOCAL)])
    assert reply.error == "out of memory; lower batch_size and raise grad_accum"
    assert "process 4711" in caplog.text


def test_a_client_that_fails_half_way_leaves_nothing_to_the_next_one(desk, monkeypatch):
    """Its gradients must not be in the next client's first step."""
    from fedbiscuit.backends import client

    task = Task("train", "bo", 0, {0: two_adapters(desk)[0]}, local=LOCAL)
    alone = answer(task, holder(), desk, Memory()).delta
    real, calls = client.selector_loss, []

    def out_of_memory_in_the_second_batch(selector, encoded):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return real(selector, encoded)

    monkeypatch.setattr(client, "selector_loss", out_of_memory_in_the_second_batch)
    how = dataclasses.replace(LOCAL, grad_accum=2)
    broken = dataclasses.replace(task, client="ann", local=how)
    backend = InProcessBackend(desk, {"ann": holder(), "bo": holder()})
    failed, good = backend.run([broken, task])
    assert not failed.ok
    assert "out of memory" in failed.error
    assert all(torch.equal(good.delta[name], alone[name]) for name in alone)


def test_a_diverging_client_tells_no_loss(desk, monkeypatch):
    from fedbiscuit.backends import client

    monkeypatch.setattr(
        client,
        "selector_loss",
        lambda s, e: (
            s.lm.trainable()["base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"].sum() * float("inf")
        ),
    )
    backend = InProcessBackend(desk, {"ann": holder()})
    (reply,) = backend.run([Task("train", "ann", 0, {0: two_adapters(desk)[0]}, local=LOCAL)])
    assert reply.error == "step 0: the gradient is not finite; lower the learning rate (lr 0.01)"


def test_a_client_answers_only_so_many_prices(desk):
    memory = Memory()
    answer(Task("evaluate", "ann", 0, two_adapters(desk)), holder(), desk, memory)
    task = Task("seat", "ann", 0, prices=(0.0, 0.0))
    backend = InProcessBackend(desk, {"ann": holder()})
    backend._memory["ann"] = memory
    replies = backend.run([task] * 100)
    assert 30 <= sum(reply.ok for reply in replies) < 100
    assert "asked for a seat more than" in replies[-1].error


def test_few_validation_comparisons_are_filled_up_with_training_ones_that_come_next(desk, monkeypatch):
    read = []
    real = Selector.encode
    monkeypatch.setattr(Selector, "encode", lambda self, held: read.append(list(held)) or real(self, held))
    data = ClientData(comparisons(6), comparisons(2, choice=1))
    task = Task("evaluate", "ann", 0, two_adapters(desk), consumed=2)
    answer(task, data, desk, Memory())
    assert read.pop() == list(data.validation)
    filled = dataclasses.replace(desk, grouping_comparisons=5)
    answer(task, data, filled, Memory())
    *validation, first, second, third = read.pop()
    assert validation == list(data.validation)
    whole_epoch = {c.id for c in data.train}
    assert {first.id, second.id, third.id} < whole_epoch
    answer(dataclasses.replace(task, consumed=0), data, filled, Memory())
    assert read.pop()[2:4] != [first, second]  # of the stream, from where the client stands in it
    answer(task, ClientData(comparisons(3)), filled, Memory())  # nobody is left out for lack of validation comparisons
    assert len(read.pop()) == 3


def test_many_validation_comparisons_are_cut_to_as_many_as_wanted_always_the_same(desk, monkeypatch):
    read = []
    real = Selector.encode
    monkeypatch.setattr(Selector, "encode", lambda self, held: read.append(list(held)) or real(self, held))
    data = ClientData(comparisons(6), comparisons(12, choice=1))
    cut = dataclasses.replace(desk, grouping_comparisons=5)
    for consumed in (0, 2):
        answer(Task("evaluate", "ann", 0, two_adapters(desk), consumed=consumed), data, cut, Memory())
    first, again = read
    assert first == again
    assert len({c.id for c in first}) == 5
    assert {c.id for c in first} < {c.id for c in data.validation}
    assert first != list(data.validation)[:5]  # a file is often sorted by subject


def test_scoring_once_more_in_a_round_buys_no_more_answers_to_prices(desk, monkeypatch):
    from fedbiscuit.backends import client

    monkeypatch.setattr(client, "MAX_SEATS", 2)
    data, memory, adapters = holder(), Memory(), two_adapters(desk)

    def ask(kind: str, round: int) -> None:
        answer(Task(kind, "ann", round, adapters, (0.0, 0.0) if kind == "seat" else ()), data, desk, memory)

    for kind in ("evaluate", "seat", "evaluate", "seat", "evaluate"):
        ask(kind, 4)
    with pytest.raises(FederationError, match="more than 2 times"):
        ask("seat", 4)
    ask("evaluate", 5)
    ask("seat", 5)
    with pytest.raises(FederationError, match="in round 6, but scored adapters in round 5"):
        ask("seat", 6)
