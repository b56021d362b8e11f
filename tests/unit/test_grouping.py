"""Who trains with whom: partitions, balance, the least loss, and what clients have to tell for it."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbiscuit.federated.grouping import (
    LOSS_RULES,
    adjusted_rand_index,
    choose_seat,
    greedy,
    group_sizes,
    nearest,
    optimal,
    prices,
    seat_newcomers,
)
from fedbiscuit.types import FederationError, Grouping

Losses = dict[str, list[float]]


def world(kind: str, num_clients: int, num_adapters: int, seed: int) -> Losses:
    """Validation losses in nats, as clients might have them."""
    rng = random.Random(f"{kind} {num_clients} {num_adapters} {seed}")
    bias = [rng.gauss(0, 0.08) for _ in range(num_adapters)]
    losses = {}
    for number in range(num_clients):
        camp = min(rng.randrange(num_adapters), rng.randrange(num_adapters))
        if kind == "noise":
            row = [0.65 + rng.gauss(0, 0.03) for _ in bias]
        elif kind == "one adapter is better":
            row = [0.65 + b + rng.gauss(0, 0.03) for b in bias]
        elif kind == "camps":
            row = [0.5 + rng.gauss(0, 0.02) + 0.2 * (u != camp) for u in range(num_adapters)]
        elif kind == "camps of twins":
            row = [0.5 + 0.2 * (u != camp) for u in range(num_adapters)]
        elif kind == "all the same":
            row = [0.65 + b for b in bias]
        elif kind == "hardly different":
            row = [0.69 + rng.gauss(0, 1e-4) for _ in bias]
        else:
            row = [math.log(2)] * num_adapters
        losses[f"client {number:03d}"] = [max(loss, 0.01) for loss in row]
    return losses


KINDS = ("noise", "one adapter is better", "camps", "camps of twins", "all the same", "hardly different", "equal")


def seats_by_prices(losses: Losses, num_adapters: int) -> tuple[Grouping, int]:
    """The seats and the number of exchanges."""
    announced = []

    def ask(announcement: tuple[float, ...]) -> Grouping:
        announced.append(announcement)
        return {client: choose_seat(row, announcement, client) for client, row in losses.items()}

    return prices(ask, num_adapters), len(announced)


def mean_loss(losses: Losses, seats: Grouping) -> float:
    return sum(losses[client][u] for client, u in seats.items()) / len(seats)


loss_tables = st.integers(2, 4).flatmap(
    lambda num_adapters: st.lists(
        st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.5, 0.9]), min_size=num_adapters, max_size=num_adapters),
        min_size=1,
        max_size=14,
    )
)


def named(table: list[list[float]]) -> Losses:
    return {f"c{number}": row for number, row in enumerate(table)}


# The rules that see losses


def test_greedy_closes_the_most_wanted_adapter_as_in_the_worked_example() -> None:
    rankings = {"1": [0, 1, 2], "2": [0, 2, 1], "3": [0, 1, 2], "4": [0, 2, 1], "5": [1, 0, 2]}
    losses = {client: [float(ranking.index(u)) for u in range(3)] for client, ranking in rankings.items()}
    assert greedy(losses, ["3", "1", "5", "2", "4"]) == {"3": 0, "1": 0, "2": 2, "4": 2, "5": 1}


def test_greedy_takes_the_candidates_in_arrival_order() -> None:
    losses = {"a": [0.1, 0.9], "b": [0.1, 0.9], "c": [0.1, 0.9]}
    assert greedy(losses, ["c", "b", "a"]) == {"c": 0, "b": 0, "a": 1}


def test_nearest_gives_each_client_its_best_adapter_however_crowded() -> None:
    assert nearest({"a": [1, 2], "b": [1, 2], "c": [2, 1]}, ["a", "b", "c"]) == {"a": 0, "b": 0, "c": 1}


@pytest.mark.parametrize("rule", ["optimal", "greedy"])
@given(table=loss_tables)
@settings(max_examples=60, deadline=None)
def test_balanced_rules_make_a_partition_with_groups_of_floor_to_ceil(rule: str, table: list[list[float]]) -> None:
    losses = named(table)
    seats = LOSS_RULES[rule](losses, sorted(losses))
    sizes = group_sizes(seats, len(table[0]))
    assert seats.keys() == losses.keys()
    assert max(sizes) <= math.ceil(len(table) / len(table[0]))
    assert min(sizes) >= len(table) // len(table[0])


@given(table=loss_tables.filter(lambda table: len(table[0]) ** len(table) <= 5_000))
@settings(max_examples=40, deadline=None)
def test_optimal_equals_brute_force(table: list[list[float]]) -> None:
    losses, num_adapters = named(table), len(table[0])
    balanced = [
        dict(zip(losses, seats, strict=True))
        for seats in itertools.product(range(num_adapters), repeat=len(table))
        if max(map(seats.count, range(num_adapters))) - min(map(seats.count, range(num_adapters))) <= 1
    ]
    least = min(mean_loss(losses, seats) for seats in balanced)
    assert mean_loss(losses, optimal(losses, sorted(losses))) == pytest.approx(least, abs=1e-12)


# Prices


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_adapters", [2, 3, 5])
@pytest.mark.parametrize("num_clients", [6, 8, 12, 53, 200])
def test_prices_balance_within_a_tenth_and_cost_at_most_two_percent(
    kind: str, num_adapters: int, num_clients: int
) -> None:
    for seed in range(2):
        losses = world(kind, num_clients, num_adapters, seed)
        seats, num_exchanges = seats_by_prices(losses, num_adapters)
        assert seats.keys() == losses.keys()
        assert max(group_sizes(seats, num_adapters)) <= 1.1 * math.ceil(num_clients / num_adapters)
        assert min(group_sizes(seats, num_adapters)) >= 1
        assert mean_loss(losses, seats) <= 1.02 * mean_loss(losses, optimal(losses, sorted(losses)))
        assert num_exchanges <= 30


@given(
    kind=st.sampled_from(KINDS),
    num_clients=st.integers(4, 80),
    num_adapters=st.integers(2, 5),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None)
def test_prices_on_random_worlds(kind: str, num_clients: int, num_adapters: int, seed: int) -> None:
    losses = world(kind, num_clients, num_adapters, seed)
    seats, _ = seats_by_prices(losses, num_adapters)
    assert max(group_sizes(seats, num_adapters)) <= 1.1 * math.ceil(num_clients / num_adapters)
    assert mean_loss(losses, seats) <= 1.02 * mean_loss(losses, optimal(losses, sorted(losses)))


@given(table=loss_tables)
@settings(max_examples=60, deadline=None)
def test_prices_make_a_balanced_partition_of_any_losses(table: list[list[float]]) -> None:
    seats, _ = seats_by_prices(named(table), len(table[0]))
    assert seats.keys() == named(table).keys()
    assert max(group_sizes(seats, len(table[0]))) <= 1.1 * math.ceil(len(table) / len(table[0]))


def test_prices_find_two_camps_of_six_in_one_exchange() -> None:
    losses = {name: [0.5, 0.7] if name < "d" else [0.7, 0.5] for name in "abcdef"}
    seats, num_exchanges = seats_by_prices(losses, 2)
    assert seats == {"a": 0, "b": 0, "c": 0, "d": 1, "e": 1, "f": 1}
    assert num_exchanges == 1


def test_prices_move_the_client_who_minds_least() -> None:
    losses = {"a": [0.5, 0.9], "b": [0.5, 0.9], "c": [0.5, 0.55], "d": [0.9, 0.5]}
    assert seats_by_prices(losses, 2)[0] == {"a": 0, "b": 0, "c": 1, "d": 1}


def test_prices_lose_less_than_the_greedy_rule_at_53_clients_and_3_adapters() -> None:
    by_prices, by_greedy = 0.0, 0.0
    for seed in range(5):
        losses = world("noise", 53, 3, seed)
        order = sorted(losses)
        random.Random(seed).shuffle(order)
        by_prices += mean_loss(losses, seats_by_prices(losses, 3)[0])
        by_greedy += mean_loss(losses, greedy(losses, order))
    assert by_prices < by_greedy


def test_prices_depend_on_who_the_clients_are_and_not_on_their_order() -> None:
    losses = world("camps of twins", 12, 3, 0)
    backwards = dict(reversed(losses.items()))
    assert seats_by_prices(losses, 3) == seats_by_prices(backwards, 3)


def test_seats_that_prices_cannot_separate_are_evened_out() -> None:
    stubborn = prices(lambda announced: dict.fromkeys("abcdefg", announced.index(min(announced))), 2)
    assert sorted(group_sizes(stubborn, 2)) == [3, 4]


def test_no_clients_have_no_seats() -> None:
    assert prices(lambda announced: {}, 3) == {}


def test_a_seat_is_the_least_of_loss_plus_price() -> None:
    assert choose_seat([0.5, 0.6], [0.0, 0.0], "ann") == 0
    assert choose_seat([0.5, 0.6], [0.2, 0.0], "ann") == 1


def test_a_client_answers_the_same_prices_always_the_same() -> None:
    assert len({choose_seat([0.7, 0.7, 0.7], [0.0] * 3, "ann") for _ in range(5)}) == 1


def test_twins_do_not_all_jump_at_once() -> None:
    seats = {choose_seat([0.7, 0.7], [0.0, 0.0], f"client {number}") for number in range(20)}
    assert seats == {0, 1}


def test_fault_74_a_loss_that_is_not_a_number_takes_no_seat() -> None:
    with pytest.raises(FederationError, match="not finite") as caught:
        choose_seat([0.9, math.nan, 0.1], [0.0] * 3, "ann")
    assert "0.9" not in str(caught.value), "the message may travel to the server; losses may not"


# Newcomers and agreement


def test_newcomers_fill_the_smallest_groups_and_nobody_else_moves() -> None:
    assert seat_newcomers({"a": 0, "b": 0, "c": 1}, ["a", "x", "y"], 3) == {"a": 0, "b": 0, "c": 1, "x": 2, "y": 1}


def test_seating_newcomers_leaves_the_old_grouping_as_it_was() -> None:
    old = {"a": 0}
    seat_newcomers(old, ["b"], 2)
    assert old == {"a": 0}


def test_adjusted_rand_index_ignores_the_numbers_of_adapters() -> None:
    assert adjusted_rand_index({"a": 0, "b": 0, "c": 1}, {"a": 1, "b": 1, "c": 0}) == 1.0


def test_adjusted_rand_index_of_one_group_against_two_is_zero() -> None:
    assert adjusted_rand_index(dict.fromkeys("abcd", 0), {"a": 0, "b": 0, "c": 1, "d": 1}) == 0.0


def test_adjusted_rand_index_of_nothing_in_common_is_one() -> None:
    assert adjusted_rand_index({"a": 0}, {"b": 1}) == 1.0


@given(pairs=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=30))
@settings(max_examples=50, deadline=None)
def test_adjusted_rand_index_equals_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    a = {str(number): pair[0] for number, pair in enumerate(pairs)}
    b = {str(number): pair[1] for number, pair in enumerate(pairs)}
    expected = metrics.adjusted_rand_score([pair[0] for pair in pairs], [pair[1] for pair in pairs])
    assert adjusted_rand_index(a, b) == pytest.approx(expected, abs=1e-12)
