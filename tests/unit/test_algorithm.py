"""The round, on clients made of a few numbers."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbiscuit.config import FederatedSettings
from fedbiscuit.federated.algorithm import (
    assign,
    fedbiscuit_round,
    init_state,
    local_training,
    phase_of,
    regroup_is_due,
    sample_cohort,
    sample_evenly,
    trained_part,
)
from fedbiscuit.federated.exchange import Exchange, Lent
from fedbiscuit.federated.grouping import choose_seat
from fedbiscuit.types import (
    ClientId,
    ConfigError,
    FederationError,
    Grouping,
    Reply,
    ServerState,
    Task,
    Weights,
    num_bytes,
    rng_for,
)

A, B = "base_model.model.q_proj.lora_A.weight", "base_model.model.q_proj.lora_B.weight"


def adapter(value: float = 0.0) -> Weights:
    return {A: torch.full((2,), value), B: torch.full((1,), value)}


class Town:
    """A backend whose clients are wishes: each pulls every adapter towards its number, and scores it by the distance."""

    at_once = 0
    away: ClassVar[dict[str, str]] = {}

    def __init__(self, wishes: dict[ClientId, float], answer: Callable[[Task, Reply], Any] | None = None) -> None:
        self.wishes = wishes
        self.scores: dict[ClientId, list[float]] = {}
        self.asked: list[Task] = []
        self._answer = answer or (lambda task, reply: reply)

    def clients(self) -> list[ClientId]:
        return list(self.wishes)

    def run(self, tasks: Sequence[Task]) -> list[Reply]:
        self.asked += tasks
        replies: list[Reply] = []
        for task in tasks:
            answer = self._answer(task, self._reply(task))
            replies += answer if isinstance(answer, list) else [answer]
        return replies

    def of_kind(self, kind: str) -> list[Task]:
        return [task for task in self.asked if task.kind == kind]

    def _reply(self, task: Task) -> Reply:
        wish = self.wishes[task.client]
        if task.kind == "evaluate":
            self.scores[task.client] = [abs(wish - float(weights[B])) for _, weights in sorted(task.adapters.items())]
            return Reply(task.client, metrics={"losses": self.scores[task.client]} if task.share_losses else {})
        if task.kind == "seat":
            return Reply(task.client, seat=choose_seat(self.scores[task.client], task.prices, task.client))
        ((u, weights),) = task.adapters.items()
        delta = {name: (wish - tensor) / 2 for name, tensor in weights.items()}
        return Reply(task.client, u, delta, 1)


def cfg_of(**changes: Any) -> FederatedSettings:
    """One adapter, all clients, one comparison a round, unless said otherwise."""
    local = {"steps": 1, "batch_size": 1, "grad_accum": 1, **changes.pop("local", {})}
    return FederatedSettings(**{"cohort_size": 0, "local": local, **changes})


def biscuit(**changes: Any) -> FederatedSettings:
    """Two adapters without a warm-up."""
    return cfg_of(**{"num_adapters": 2, "warmup_rounds": 0, "regroup_every": 3, **changes})


def value(state: ServerState, u: int = 0) -> float:
    return float(state.adapters[u][B])


def same_weights(a: ServerState, b: ServerState) -> bool:
    return all(torch.equal(x[name], y[name]) for x, y in zip(a.adapters, b.adapters, strict=True) for name in x)


def spoiled(*clients: ClientId, **changes: Any) -> Callable[[Task, Reply], Reply]:
    """Only these clients send something else when they train."""
    return lambda task, reply: replace(reply, **changes) if task.kind == "train" and task.client in clients else reply


FOUR = {"ann": 1.0, "bo": 1.2, "cy": -1.0, "di": -1.2}


# Schedule


def test_warm_up_trains_one_adapter_after_the_other_and_then_the_groups() -> None:
    cfg = cfg_of(num_adapters=3, warmup_rounds=2)
    assert [phase_of(round, cfg) for round in (0, 5, 6, 100)] == ["warmup", "warmup", "federated", "federated"]
    assert [assign(["ann"], round, {"ann": 2}, cfg)["ann"] for round in range(8)] == [0, 0, 1, 1, 2, 2, 2, 2]


def test_a_single_adapter_has_no_warm_up_and_no_groups() -> None:
    cfg = cfg_of(warmup_rounds=50)
    assert phase_of(0, cfg) == "federated"
    assert not any(regroup_is_due(round, cfg) for round in range(100))


def test_regrouping_begins_after_the_warm_up_and_repeats() -> None:
    cfg = cfg_of(num_adapters=2, warmup_rounds=2, regroup_every=3)
    assert [round for round in range(13) if regroup_is_due(round, cfg)] == [4, 7, 10]


def test_a_cohort_is_sorted_without_repeats_and_depends_on_its_key_only() -> None:
    names = [f"c{number}" for number in range(20)]
    drawn = sample_cohort(names, 5, rng_for(0, 3, 0, "cohort"))
    assert drawn == sorted(set(drawn))
    assert len(drawn) == 5
    assert drawn == sample_cohort(names[::-1], 5, rng_for(0, 3, 0, "cohort"))
    assert drawn != sample_cohort(names, 5, rng_for(0, 4, 0, "cohort"))


def test_a_cohort_of_zero_is_everybody_and_one_larger_than_all_is_an_error() -> None:
    assert sample_cohort(["b", "a"], 0, rng_for(0)) == ["a", "b"]
    with pytest.raises(FederationError, match="a cohort of 3 cannot be drawn from 2 clients"):
        sample_cohort(["b", "a"], 3, rng_for(0))


def test_over_many_rounds_every_client_is_sampled_about_equally_often() -> None:
    names = [f"c{number}" for number in range(10)]
    drawn = [name for round in range(1000) for name in sample_cohort(names, 3, rng_for(1, round, 0, "cohort"))]
    assert all(240 < drawn.count(name) < 360 for name in names)


def test_a_stratified_cohort_has_as_many_of_each_group_and_depends_on_its_key_only() -> None:
    groups = {f"c{number:02d}": int(number < 4) for number in range(20)}
    drawn = sample_evenly(groups, 6, rng_for(0, 3, 0, "cohort"))
    assert drawn == sorted(set(drawn))
    assert sorted(groups[name] for name in drawn) == [0, 0, 0, 1, 1, 1]
    assert drawn == sample_evenly(dict(reversed(groups.items())), 6, rng_for(0, 3, 0, "cohort"))
    assert drawn != sample_evenly(groups, 6, rng_for(0, 4, 0, "cohort"))


def test_a_group_that_is_used_up_gives_no_more_and_zero_takes_all() -> None:
    groups = {"a": 0, "b": 1, "c": 1, "d": 1}
    drawn = sample_evenly(groups, 3, rng_for(0))
    assert "a" in drawn
    assert len(drawn) == 3
    assert sample_evenly(groups, 0, rng_for(0)) == ["a", "b", "c", "d"]
    with pytest.raises(FederationError, match="a cohort of 5 cannot be drawn from 4 clients"):
        sample_evenly(groups, 5, rng_for(0))


@given(st.dictionaries(st.text(max_size=3), st.integers(0, 4), min_size=1, max_size=15), st.data())
def test_groups_in_a_stratified_cohort_differ_by_one_unless_used_up(
    groups: dict[str, int], data: st.DataObject
) -> None:
    size = data.draw(st.integers(1, len(groups)))
    drawn = sample_evenly(groups, size, rng_for(data.draw(st.integers(0, 9))))
    assert len(set(drawn)) == size
    all_of, taken = Counter(groups.values()), Counter(groups[name] for name in drawn)
    for u in all_of:
        assert taken[u] == all_of[u] or taken[u] >= max(taken.values()) - 1


def test_within_its_group_and_over_odd_cohorts_everybody_is_drawn_equally_often() -> None:
    groups = {f"c{number}": int(number < 4) for number in range(10)}
    drawn = Counter(name for round in range(2000) for name in sample_evenly(groups, 3, rng_for(1, round, 0, "cohort")))
    for name, u in groups.items():
        expected = 2000 * 1.5 / (4 if u else 6)
        assert 0.85 * expected < drawn[name] < 1.15 * expected


def test_the_warm_up_has_its_own_cohort_size_and_later_cohorts_come_from_both_groups() -> None:
    tastes = {f"c{number}": (1.0 if number < 3 else -1.0) for number in range(12)}
    groups = {name: int(taste < 0) for name, taste in tastes.items()}
    cfg = biscuit(
        warmup_rounds=1,
        warmup_cohort_size=1,
        cohort_size=4,
        cohort_sampling="stratified",
        grouping="fixed",
        groups=groups,
    )
    state = init_state([adapter(), adapter()])
    town, trained = Town(tastes), []
    for _ in range(6):
        state, record = fedbiscuit_round(state, town, cfg, seed=0)
        trained.append(Counter(record.adapter_of.values()))
    assert trained == [{0: 1}, {1: 1}, *[{0: 2, 1: 2}] * 4]


# One round


def test_a_group_too_small_for_its_robust_rule_waits_and_is_counted_instead_of_ending_the_run() -> None:
    tastes = {f"c{number}": (1.0 if number < 5 else -1.0) for number in range(6)}
    groups = {name: int(taste < 0) for name, taste in tastes.items()}
    cfg = biscuit(aggregator="krum", byzantine=1, cohort_size=0, grouping="fixed", groups=groups)
    state, record = fedbiscuit_round(init_state([adapter(), adapter()]), Town(tastes), cfg, seed=0)
    assert value(state, 0) > 0
    assert value(state, 1) == 0.0
    assert record.metrics["too_few"] == [1]


def test_a_round_of_one_adapter_is_the_average_of_what_clients_learned() -> None:
    state, record = fedbiscuit_round(init_state([adapter()]), Town({"ann": 2.0, "bo": 6.0}), cfg_of(), seed=0)
    assert value(state) == 2.0
    assert state.round == 1
    assert (record.round, record.phase, record.cohort, dict(record.adapter_of)) == (
        0,
        "federated",
        ("ann", "bo"),
        {"ann": 0, "bo": 0},
    )


def test_warm_up_moves_only_the_adapter_whose_turn_it_is() -> None:
    cfg = cfg_of(num_adapters=2, warmup_rounds=1)
    state = init_state([adapter(), adapter()])
    state, record = fedbiscuit_round(state, Town({"ann": 4.0}), cfg, seed=0)
    assert (record.phase, record.grouping) == ("warmup", {})
    assert (value(state, 0), value(state, 1)) == (2.0, 0.0)
    state, _ = fedbiscuit_round(state, Town({"ann": 6.0}), cfg, seed=0)
    assert (value(state, 0), value(state, 1)) == (2.0, 3.0)


def test_clients_of_like_taste_find_each_other_and_each_group_moves_its_own_adapter() -> None:
    state = init_state([adapter(-0.1), adapter(0.1)])
    state, record = fedbiscuit_round(state, Town(FOUR), biscuit(), seed=0)
    assert record.regrouped
    assert state.grouping == {"ann": 1, "bo": 1, "cy": 0, "di": 0}
    assert (value(state, 0), value(state, 1)) == (pytest.approx(-0.6), pytest.approx(0.6))


def test_adapters_that_nobody_trained_do_not_move_nor_does_their_optimizer() -> None:
    cfg = biscuit(grouping="fixed", groups={"ann": 0, "bo": 0}, server_optimizer="momentum")
    start = init_state([adapter(), adapter()])
    state, _ = fedbiscuit_round(start, Town({"ann": 1.0, "bo": 1.0}), cfg, seed=0)
    assert torch.equal(state.adapters[1][A], start.adapters[1][A])
    assert sorted(state.server_optimizer_state) == [f"0.momentum.{A}", f"0.momentum.{B}"]


def test_a_client_continues_its_stream_where_its_last_accepted_round_stopped() -> None:
    cfg = cfg_of(local={"steps": 3, "batch_size": 4, "grad_accum": 2})
    town = Town(FOUR, spoiled("bo", ok=False, error="out of memory"))
    state, _ = fedbiscuit_round(init_state([adapter()]), town, cfg, seed=0)
    assert state.consumed == {"ann": 24, "cy": 24, "di": 24}
    town = Town(FOUR)
    state, _ = fedbiscuit_round(state, town, cfg, seed=0)
    assert {task.client: task.consumed for task in town.asked} == {"ann": 24, "bo": 0, "cy": 24, "di": 24}
    assert state.consumed == {"ann": 48, "bo": 24, "cy": 48, "di": 48}


def test_a_train_task_carries_its_one_adapter_and_how_to_train() -> None:
    town = Town(FOUR)
    fedbiscuit_round(init_state([adapter(), adapter()]), town, biscuit(local={"lr": 0.5}), seed=0)
    assert all(len(task.adapters) == 1 and task.local and task.local.lr == 0.5 for task in town.of_kind("train"))


def test_bytes_are_counted_in_both_directions() -> None:
    _, record = fedbiscuit_round(init_state([adapter()]), Town(FOUR), cfg_of(), seed=0)
    assert (record.bytes_down, record.bytes_up) == (4 * num_bytes(adapter()), 4 * num_bytes(adapter()))
    _, record = fedbiscuit_round(init_state([adapter(), adapter()]), Town(FOUR), biscuit(), seed=0)
    assert record.bytes_down == (4 * 2 + 4) * num_bytes(adapter())


def test_the_metrics_of_a_round_say_how_far_adapters_moved_and_how_large_groups_are() -> None:
    state = init_state([adapter(-0.1), adapter(0.1)])
    _, record = fedbiscuit_round(state, Town(FOUR), biscuit(), seed=0)
    assert record.metrics["group_sizes"] == [2, 2]
    assert record.metrics["delta_norm"] == {0: pytest.approx(0.5 * math.sqrt(3)), 1: pytest.approx(0.5 * math.sqrt(3))}
    assert record.metrics["clipped"] == 0


def test_clipped_deltas_are_counted_and_the_median_norm_is_remembered() -> None:
    town = Town({"ann": 1.0, "bo": 1.0, "cy": 100.0})
    state, record = fedbiscuit_round(init_state([adapter()]), town, cfg_of(aggregator="norm_clipped_mean"), seed=0)
    assert record.metrics["clipped"] == 1
    assert state.clip_norms == (pytest.approx(0.5 * math.sqrt(3)),)
    assert value(state) == pytest.approx(0.5, rel=1e-6)


def test_freeze_a_moves_and_takes_only_the_b_matrices() -> None:
    cfg = cfg_of(lora_aggregation="freeze_a")
    assert list(trained_part(adapter(), cfg)) == [B]
    only_b = Town({"ann": 2.0}, lambda task, reply: replace(reply, delta={B: reply.delta[B]}) if reply.delta else reply)
    state, record = fedbiscuit_round(init_state([adapter()]), only_b, cfg, seed=0)
    assert (value(state), state.adapters[0][A].tolist()) == (1.0, [0.0, 0.0])
    assert record.bytes_up == 4
    with pytest.raises(FederationError, match=r"lora_A\.weight: unknown tensor"):
        fedbiscuit_round(init_state([adapter()]), Town({"ann": 2.0}), cfg, seed=0)


@given(order=st.permutations(list(range(4))), values=st.lists(st.floats(-3, 3), min_size=4, max_size=4))
@settings(max_examples=25, deadline=None)
def test_no_order_of_arrival_changes_a_single_bit(order: list[int], values: list[float]) -> None:
    class Shuffled(Town):
        def run(self, tasks: Sequence[Task]) -> list[Reply]:
            replies = super().run(tasks)
            return [replies[number] for number in order]

    wishes = dict(zip("abcd", values, strict=True))
    state = init_state([adapter(-0.1), adapter(0.1)])
    expected, record = fedbiscuit_round(state, Town(wishes), biscuit(), seed=0)
    found, other = fedbiscuit_round(state, Shuffled(wishes), biscuit(), seed=0)
    assert same_weights(expected, found)
    assert replace(record, seconds=0.0) == replace(other, seconds=0.0)


def test_an_exchange_gives_replies_and_refusals_by_name_whatever_the_order_of_asking() -> None:
    exchange = Exchange(Town(FOUR))
    tasks = [Task("train", client, 0, Lent({0: adapter()})) for client in ("di", "bo", "cy", "ann")]
    assert list(exchange.ask(tasks, lambda task, reply: None)) == ["ann", "bo", "cy", "di"]
    exchange.ask(tasks, lambda task, reply: "no")
    assert list(exchange.refused) == ["ann", "bo", "cy", "di"]


def test_the_same_state_and_seed_give_the_same_round_and_another_seed_another_cohort() -> None:
    wishes = {f"c{number}": float(number) for number in range(12)}
    cfg = cfg_of(cohort_size=4)
    runs = [fedbiscuit_round(init_state([adapter()]), Town(wishes), cfg, seed=seed) for seed in (0, 0, 1)]
    assert same_weights(runs[0][0], runs[1][0])
    assert runs[0][1].cohort == runs[1][1].cohort != runs[2][1].cohort


# Mistakes that must not come back


class Vandal(Town):
    """Trains in the very tensors it was handed, and in the server's own if it could reach them."""

    def _reply(self, task: Task) -> Reply:
        reply = super()._reply(task)
        for weights in task.adapters.values():
            for tensor in weights.values():
                tensor.fill_(math.nan)
        return reply


def test_mistake_03_the_base_of_an_update_is_the_servers_and_not_the_last_clients_weights() -> None:
    start = init_state([adapter(-0.1), adapter(0.1)])
    honest, _ = fedbiscuit_round(start, Town(FOUR), biscuit(), seed=0)
    vandalized, _ = fedbiscuit_round(start, Vandal(FOUR), biscuit(), seed=0)
    assert same_weights(honest, vandalized)
    assert same_weights(start, init_state([adapter(-0.1), adapter(0.1)]))


def test_mistake_03_every_client_starts_from_the_servers_weights() -> None:
    class Trainer(Town):
        def _reply(self, task: Task) -> Reply:
            ((u, weights),) = task.adapters.items()
            starts.append(float(weights[B]))
            weights[B] += 1.0
            return Reply(task.client, u, {name: torch.ones_like(tensor) for name, tensor in weights.items()}, 1)

    starts: list[float] = []
    fedbiscuit_round(init_state([adapter(5.0)]), Trainer(FOUR), cfg_of(), seed=0)
    assert starts == [5.0] * 4


def test_mistake_03_the_first_state_does_not_share_tensors_with_who_made_it() -> None:
    mine = adapter()
    state = init_state([mine])
    mine[B].fill_(9.0)
    assert value(state) == 0.0


@given(num_adapters=st.integers(1, 3), warmup=st.integers(0, 2), optimizer=st.sampled_from(["sgd", "momentum", "adam"]))
@settings(max_examples=25, deadline=None)
def test_mistake_03_a_round_changes_no_tensor_of_the_state_that_went_in(
    num_adapters: int, warmup: int, optimizer: str
) -> None:
    cfg = biscuit(num_adapters=num_adapters, warmup_rounds=warmup, server_optimizer=optimizer)
    state = init_state([adapter(0.1 * u) for u in range(num_adapters)])
    for _ in range(4):
        tensors = [*state.server_optimizer_state.values(), *(t for weights in state.adapters for t in weights.values())]
        before = [tensor.clone() for tensor in tensors]
        following, _ = fedbiscuit_round(state, Vandal(FOUR), cfg, seed=0)
        assert all(torch.equal(old, new) for old, new in zip(before, tensors, strict=True))
        state = following


def test_mistake_04_the_full_average_is_taken_unless_population_is_asked_for_and_in_the_warm_up_even_then() -> None:
    wishes = {f"c{number}": 2.0 for number in range(10)}
    for warmup, of_population in ((0, 0.5), (1, 1.0)):
        cfg = biscuit(cohort_size=5, warmup_rounds=warmup, grouping="fixed", groups=dict.fromkeys(wishes, 0))
        state, _ = fedbiscuit_round(init_state([adapter(), adapter()]), Town(wishes), cfg, seed=0)
        assert value(state) == 1.0
        small = cfg.model_copy(update={"scale": "population"})
        state, _ = fedbiscuit_round(init_state([adapter(), adapter()]), Town(wishes), small, seed=0)
        assert value(state) == of_population


def test_mistake_04_a_count_in_another_unit_is_refused() -> None:
    cfg = cfg_of(weights="examples", local={"batch_size": 8})
    town = Town(FOUR, spoiled("bo", num_examples=16))
    _, record = fedbiscuit_round(init_state([adapter()]), town, cfg, seed=0)
    assert record.refused == {"bo": "num_examples: 16 is outside 0..8"}


# Replies that cannot be used


def refused(answer: Callable[[Task, Reply], Any], wishes: dict[ClientId, float] | None = None) -> dict[str, str]:
    """What is refused in a round, after checking that all other clients counted as if the refused were not there."""
    wishes = wishes or FOUR
    start = init_state([adapter()])
    state, record = fedbiscuit_round(start, Town(wishes, answer), cfg_of(), seed=0)
    good = {client: wish for client, wish in wishes.items() if client not in record.refused}
    assert same_weights(state, fedbiscuit_round(start, Town(good), cfg_of(), seed=0)[0])
    return dict(record.refused)


def test_a_client_that_fails_is_recorded_with_its_reason_and_the_round_goes_on() -> None:
    assert refused(spoiled("bo", ok=False, error="out of memory")) == {"bo": "out of memory"}


def test_a_client_that_does_not_answer_is_recorded() -> None:
    assert refused(lambda task, reply: [] if task.client == "bo" else reply) == {"bo": "no reply"}


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_fault_63_64_a_reply_with_nan_inf_or_a_huge_value_spoils_nothing(bad: float) -> None:
    assert list(refused(spoiled("bo", delta={A: torch.full((2,), bad), B: torch.zeros(1)}))) == ["bo"]


def test_fault_65_a_zero_update_counts_as_a_participant() -> None:
    town = Town({"ann": 2.0, "bo": 0.0})
    for aggregator in ("mean", "norm_clipped_mean", "median"):
        state, record = fedbiscuit_round(init_state([adapter()]), town, cfg_of(aggregator=aggregator), seed=0)
        assert not record.refused
        assert value(state) <= 0.5


@pytest.mark.parametrize(
    "delta",
    [{A: torch.zeros(2)}, {**adapter(), "more": torch.zeros(1)}, {A: torch.zeros(4), B: torch.zeros(1)}, None],
    ids=["missing", "unknown", "shape", "nothing"],
)
def test_fault_66_67_a_reply_with_other_tensors_loses_this_client_only(delta: Weights | None) -> None:
    assert list(refused(spoiled("bo", delta=delta))) == ["bo"]


def test_fault_68_69_a_broadcastable_shape_and_another_dtype_are_refused() -> None:
    assert "shape (1,)" in refused(spoiled("bo", delta={A: torch.zeros(1), B: torch.zeros(1)}))["bo"]
    assert "dtype" in refused(spoiled("bo", delta={A: torch.zeros(2).half(), B: torch.zeros(1)}))["bo"]


def test_fault_71_the_same_reply_twice_counts_once() -> None:
    assert refused(lambda task, reply: [reply, replace(reply)]) == {}


def test_fault_71_two_replies_that_differ_are_both_refused() -> None:
    def twice(task: Task, reply: Reply) -> list[Reply]:
        other = replace(reply, delta={A: torch.ones(2), B: torch.ones(1)})
        return [reply, other] if task.client == "bo" else [reply]

    assert refused(twice) == {"bo": "2 replies that differ"}


def test_fault_72_a_reply_left_over_from_an_earlier_round_is_refused() -> None:
    def with_ghost(task: Task, reply: Reply) -> list[Reply]:
        return [reply, Reply("eve", 0, adapter(1.0), 1)] if task.client == "ann" else [reply]

    assert refused(with_ghost) == {"eve": "it answered without being asked in this round"}


@pytest.mark.parametrize("u", [1, -1, None, "0"])
def test_fault_73_a_reply_for_another_adapter_is_refused(u: Any) -> None:
    assert "where 0 was asked for" in refused(spoiled("bo", adapter=u))["bo"]


def regrouped(changes: dict[str, Any], **settings: Any) -> tuple[Grouping, dict[str, str]]:
    """The grouping when bo answers evaluations and seats with these changes; bo sat in group 0 before."""

    def answer(task: Task, reply: Reply) -> Reply:
        return replace(reply, **changes) if task.kind != "train" and task.client == "bo" else reply

    start = replace(init_state([adapter(-0.1), adapter(0.1)]), grouping={"bo": 0})
    _, record = fedbiscuit_round(start, Town(FOUR, answer), biscuit(**settings), seed=0)
    assert not record.refused, "bo has trained"
    return record.grouping, dict(record.kept_seats)


@pytest.mark.parametrize("losses", [[math.nan, 0.1], [0.1, math.inf], [0.1], "ab", ["0.1", "0.2"], None, [0.1] * 3])
@pytest.mark.parametrize("rule", ["optimal", "greedy", "nearest"])
def test_fault_74_75_losses_that_are_not_u_finite_numbers_are_refused(losses: Any, rule: str) -> None:
    grouping, reasons = regrouped({"metrics": {"losses": losses}}, grouping=rule)
    assert reasons["bo"].startswith("losses: expected")
    assert grouping["bo"] == 0


@pytest.mark.parametrize("seat", [2, -1, None, True, 0.0, "1"])
def test_fault_75_a_seat_that_is_no_adapter_is_refused(seat: Any) -> None:
    grouping, reasons = regrouped({"seat": seat})
    assert reasons["bo"].startswith("seat: expected an adapter in 0..1")
    assert grouping["bo"] == 0


def test_fault_76_a_string_instead_of_a_tensor_is_refused() -> None:
    assert "expected a dense tensor" in refused(spoiled("bo", delta={A: "cos", B: torch.zeros(1)}))["bo"]
    assert "expected tensors by name" in refused(spoiled("bo", delta="cos"))["bo"]


def test_fault_79_two_clients_of_one_name_are_an_error() -> None:
    class Twins(Town):
        def clients(self) -> list[ClientId]:
            return ["ann", "bo", "ann"]

    with pytest.raises(FederationError, match="2 clients are called 'ann'"):
        fedbiscuit_round(init_state([adapter()]), Twins(FOUR), cfg_of(), seed=0)


# Too few replies


def test_fault_81_a_round_with_too_few_replies_is_repeated_with_another_cohort() -> None:
    wishes = {f"c{number:02d}": 2.0 for number in range(12)}
    first = sample_cohort(list(wishes), 3, rng_for(0, 0, 0, "cohort"))
    town = Town(wishes, spoiled(*first[:2], ok=False, error="gone"))
    state, record = fedbiscuit_round(init_state([adapter()]), town, cfg_of(cohort_size=3, min_replies=3), seed=0)
    assert record.cohort != tuple(first)
    assert set(record.refused) >= set(first[:2])
    assert state.consumed.keys() == set(record.cohort)
    assert value(state) == 1.0


def test_fault_81_who_trained_in_a_second_attempt_is_not_called_missing_and_what_was_wrong_before_is_kept() -> None:
    asked: list[ClientId] = []

    def late(task: Task, reply: Reply) -> Reply:
        asked.append(task.client)
        if asked.count(task.client) > 1:
            return reply
        bad = {A: torch.full((2,), math.nan), B: torch.zeros(1)}
        return replace(reply, delta=bad) if task.client == "ann" else Reply(task.client, ok=False, error="too late")

    _, record = fedbiscuit_round(init_state([adapter()]), Town(FOUR, late), cfg_of(min_replies=4), seed=0)
    assert record.metrics["num_replies"] == 4
    assert record.refused == {}
    assert list(record.quarantined) == ["ann"]
    assert "non-finite" in record.quarantined["ann"]


def test_who_answers_no_evaluation_keeps_its_seat_and_is_not_called_missing_when_it_has_trained() -> None:
    def answer(task: Task, reply: Reply) -> Reply:
        no = Reply("bo", ok=False, error="this site does no tasks of the kind evaluate")
        return no if (task.client, task.kind) == ("bo", "evaluate") else reply

    start = replace(init_state([adapter(-0.1), adapter(0.1)]), grouping={"bo": 0})
    _, record = fedbiscuit_round(start, Town(FOUR, answer), biscuit(), seed=0)
    assert (record.metrics["num_replies"], record.grouping["bo"], record.refused) == (4, 0, {})
    assert record.kept_seats == {"bo": "this site does no tasks of the kind evaluate"}


def test_fault_81_when_no_cohort_answers_the_error_names_who_and_why_and_the_state_is_unchanged() -> None:
    state = init_state([adapter()])
    town = Town(FOUR, spoiled(*FOUR, ok=False, error="out of memory"))
    with pytest.raises(FederationError, match=r"round 0: fewer than 1 good replies .*ann: out of memory; bo: out of"):
        fedbiscuit_round(state, town, cfg_of(max_attempts=2), seed=0)
    assert len(town.asked) == 8
    assert same_weights(state, init_state([adapter()]))
    assert (state.round, state.consumed) == (0, {})


def test_asking_for_more_replies_than_a_cohort_has_is_an_error_before_any_training() -> None:
    town = Town(FOUR)
    with pytest.raises(FederationError, match="min_replies is 5, but a cohort has only 4"):
        fedbiscuit_round(init_state([adapter()]), town, cfg_of(min_replies=5), seed=0)
    assert not town.asked


def test_fault_81_too_few_clients_are_an_error_that_names_the_sites_that_are_away_and_why() -> None:
    gone = Town(FOUR)
    gone.away = {"site-c": "it is not connected"}  # type: ignore[misc]
    told = r"min_replies is 5, but a cohort has only 4 clients \(site-c: it is not connected\); mend these clients, or lower"
    with pytest.raises(FederationError, match=told):
        fedbiscuit_round(init_state([adapter()]), gone, cfg_of(min_replies=5), seed=0)
    failing = Town(FOUR, spoiled(*FOUR, ok=False, error="out of memory"))
    failing.away = gone.away  # type: ignore[misc]
    with pytest.raises(FederationError, match=r"good replies .*di: out of memory; site-c: it is not connected\)"):
        fedbiscuit_round(init_state([adapter()]), failing, cfg_of(), seed=0)
    gone.wishes = {}
    with pytest.raises(FederationError, match=r"no client can be asked \(site-c: it is not connected\)"):
        fedbiscuit_round(init_state([adapter()]), gone, cfg_of(), seed=0)


def test_no_clients_and_no_adapters_are_errors_that_say_so() -> None:
    with pytest.raises(FederationError, match="no client can be asked"):
        fedbiscuit_round(init_state([adapter()]), Town({}), cfg_of(), seed=0)
    with pytest.raises(ConfigError, match="at least one adapter"):
        init_state([])


# Regrouping


@pytest.mark.parametrize("rule", ["prices", "optimal", "greedy", "nearest"])
def test_every_rule_finds_two_camps_in_the_round(rule: str) -> None:
    state = init_state([adapter(-0.1), adapter(0.1)])
    _, record = fedbiscuit_round(state, Town(FOUR), biscuit(grouping=rule), seed=0)
    assert record.grouping == {"ann": 1, "bo": 1, "cy": 0, "di": 0}


def test_prices_ask_for_no_loss_and_get_none() -> None:
    losses: list[Any] = []

    def watch(task: Task, reply: Reply) -> Reply:
        losses.append(dict(reply.metrics))
        return reply

    town = Town(FOUR, watch)
    fedbiscuit_round(init_state([adapter(-0.1), adapter(0.1)]), town, biscuit(), seed=0)
    assert not any(task.share_losses for task in town.asked)
    assert not any(losses)


def test_rules_that_need_losses_say_so_in_the_task() -> None:
    town = Town(FOUR)
    fedbiscuit_round(init_state([adapter(-0.1), adapter(0.1)]), town, biscuit(grouping="optimal"), seed=0)
    assert all(task.share_losses and len(task.adapters) == 2 for task in town.of_kind("evaluate"))
    assert not town.of_kind("seat")


@pytest.mark.parametrize("rule", ["prices", "optimal", "greedy", "nearest"])
def test_fault_23_a_client_without_validation_comparisons_keeps_its_group(rule: str) -> None:
    grouping, reasons = regrouped({"ok": False, "error": "no validation comparisons"}, grouping=rule)
    assert reasons == {"bo": "no validation comparisons"}
    assert grouping["bo"] == 0


def test_fault_23_a_newcomer_without_validation_comparisons_sits_in_the_smallest_group() -> None:
    wishes = {"ann": 1.0, "bo": 1.2, "cy": -1.0, "eve": 9.0}

    def answer(task: Task, reply: Reply) -> Reply:
        return replace(reply, ok=False) if task.kind != "train" and task.client == "eve" else reply

    state = init_state([adapter(-0.1), adapter(0.1)])
    _, record = fedbiscuit_round(state, Town(wishes, answer), biscuit(), seed=0)
    assert record.grouping == {"ann": 1, "bo": 1, "cy": 0, "eve": 0}


def test_a_client_that_comes_between_regroupings_is_seated_and_nobody_moves() -> None:
    state = init_state([adapter(-0.1), adapter(0.1)])
    state, _ = fedbiscuit_round(state, Town(FOUR), biscuit(), seed=0)
    state, record = fedbiscuit_round(state, Town({**FOUR, "eve": 1.0}), biscuit(), seed=0)
    assert not record.regrouped
    assert record.grouping == {"ann": 1, "bo": 1, "cy": 0, "di": 0, "eve": 0}


def test_a_client_that_is_away_keeps_its_seat() -> None:
    state = init_state([adapter(-0.1), adapter(0.1)])
    state, _ = fedbiscuit_round(state, Town(FOUR), biscuit(regroup_every=1), seed=0)
    here = {client: wish for client, wish in FOUR.items() if client != "bo"}
    state, _ = fedbiscuit_round(state, Town(here), biscuit(regroup_every=1), seed=0)
    assert state.grouping["bo"] == 1


def test_a_client_that_falls_silent_between_prices_is_held_at_its_last_answer() -> None:
    seats_given: list[int] = []

    def answer(task: Task, reply: Reply) -> Any:
        if task.kind == "seat" and task.client == "bo":
            seats_given.append(reply.seat if reply.seat is not None else -1)
            return reply if len(seats_given) == 1 else []
        return reply

    wishes = {"ann": 1.0, "bo": 1.2, "cy": 1.1, "di": 1.3}
    state = replace(init_state([adapter(-0.1), adapter(0.1)]), grouping={"bo": 0})
    _, record = fedbiscuit_round(state, Town(wishes, answer), biscuit(), seed=0)
    assert len(seats_given) > 1
    assert record.grouping["bo"] == seats_given[0] == 1
    assert sorted(record.grouping.values()) == [0, 0, 1, 1]


def test_a_grouping_cohort_moves_only_its_members() -> None:
    wishes = {f"c{number}": 1.0 if number % 2 else -1.0 for number in range(10)}
    before = {client: number % 2 for number, client in enumerate(wishes)}
    state = replace(init_state([adapter(0.1), adapter(-0.1)]), grouping=before)
    town = Town(wishes)
    _, record = fedbiscuit_round(state, town, biscuit(grouping_cohort=4), seed=0)
    asked = {task.client for task in town.of_kind("evaluate")}
    assert len(asked) == 4
    assert {client for client in wishes if record.grouping[client] != before[client]} <= asked


def test_fixed_groups_are_taken_as_given_and_the_others_are_seated() -> None:
    cfg = biscuit(grouping="fixed", groups={"ann": 1, "bo": 1, "cy": 1})
    town = Town(FOUR)
    _, record = fedbiscuit_round(init_state([adapter(), adapter()]), town, cfg, seed=0)
    assert record.grouping == {"ann": 1, "bo": 1, "cy": 1, "di": 0}
    assert not town.of_kind("evaluate")


def test_a_fixed_group_that_does_not_exist_is_named() -> None:
    cfg = biscuit(grouping="fixed", groups={"ann": 2})
    with pytest.raises(ConfigError, match=r"selectors\.groups\.ann: adapter 2 does not exist"):
        fedbiscuit_round(init_state([adapter(), adapter()]), Town(FOUR), cfg, seed=0)


def test_many_rounds_bring_each_camp_its_own_adapter() -> None:
    cfg = biscuit(warmup_rounds=2, regroup_every=2, cohort_size=4)
    wishes = {f"c{number}": (1.0 if number % 2 else -1.0) + 0.01 * number for number in range(8)}
    state = init_state([adapter(0.01), adapter(-0.01)])
    for _ in range(30):
        state, _ = fedbiscuit_round(state, Town(wishes), cfg, seed=3)
    assert {frozenset(c for c in wishes if state.grouping[c] == u) for u in (0, 1)} == {
        frozenset(list(wishes)[0::2]),
        frozenset(list(wishes)[1::2]),
    }
    assert sorted(round(value(state, u)) for u in (0, 1)) == [-1, 1]


def test_the_learning_rate_falls_evenly_in_the_last_rounds() -> None:
    cfg = biscuit(rounds=10, lr_decay=0.4)
    rates = [local_training(round, cfg).lr / cfg.local.lr for round in range(10)]
    assert rates == pytest.approx([1] * 7 + [0.75, 0.5, 0.25])
    assert [local_training(round, biscuit(rounds=10)) for round in range(10)] == [cfg.local.as_local()] * 10


def test_clients_are_told_the_rate_of_their_round() -> None:
    cfg = biscuit(rounds=4, num_adapters=1, warmup_rounds=0, lr_decay=1.0)
    town, state, seen = Town(FOUR), init_state([adapter()]), []
    for _ in range(4):
        town.asked.clear()
        state, _record = fedbiscuit_round(state, town, cfg, 0)
        seen.append({task.local.lr / cfg.local.lr for task in town.of_kind("train") if task.local})
    assert seen == [{1.0}, {0.75}, {0.5}, {0.25}]


@given(at_once=st.integers(0, 5), wishes=st.lists(st.floats(-3, 3), min_size=1, max_size=9))
@settings(max_examples=25, deadline=None)
def test_how_many_are_asked_at_once_changes_no_bit(at_once: int, wishes: list[float]) -> None:
    clients = {f"c{i}": wish for i, wish in enumerate(wishes)}
    town, whole = Town(clients), Town(clients)
    town.at_once = at_once
    ours, record = fedbiscuit_round(init_state([adapter(0.3)]), town, cfg_of(), 0)
    theirs, expected = fedbiscuit_round(init_state([adapter(0.3)]), whole, cfg_of(), 0)
    assert same_weights(ours, theirs)
    assert (record.bytes_up, record.bytes_down) == (expected.bytes_up, expected.bytes_down)


def test_no_more_deltas_are_held_for_a_mean_than_come_at_once() -> None:
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0

    class Counting(Town):
        def run(self, tasks: Sequence[Task]) -> list[Reply]:
            nonlocal most
            replies = super().run(tasks)
            alive.update(reply.delta[A] for reply in replies if reply.delta)
            most = max(most, len(alive))
            return replies

    for count in (12, 60):
        town, most = Counting({f"c{i:02d}": 1.0 for i in range(count)}), 0
        town.at_once = 3
        fedbiscuit_round(init_state([adapter()]), town, cfg_of(), 0)
        assert most <= 8  # those that come, and those that came just before
