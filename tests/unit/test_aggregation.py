"""Deltas to one delta, one delta to a step: against closed forms and formulas written here a second time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedbiscuit.config import FederatedSettings
from fedbiscuit.federated.aggregation import AGGREGATORS, CLIP_WINDOW, Pool, clip_limit, server_step, shares
from fedbiscuit.types import FederationError, Reply, Weights


def aggregate(
    replies: Mapping[str, Reply], num_clients: int, cfg: FederatedSettings, clip_norm: float = math.inf
) -> Weights:
    """One delta from these replies."""
    pool = Pool(cfg)
    for client in sorted(replies):
        pool.add(replies[client])
    return pool.delta(num_clients, clip_norm)


def settings_of(**changes: Any) -> FederatedSettings:
    return FederatedSettings(**changes)


def replies_of(
    rows: list[list[float]], counts: list[int] | None = None, dtype: Any = torch.float64
) -> dict[str, Reply]:
    """One reply a row; the values are spread over two tensors."""
    counts = counts or [1] * len(rows)
    return {
        f"c{number:02d}": Reply(
            f"c{number:02d}", 0, {"b": torch.tensor(row[:1], dtype=dtype), "a": torch.tensor([row[1:]], dtype=dtype)}, n
        )
        for number, (row, n) in enumerate(zip(rows, counts, strict=True))
    }


def joined(delta: Weights) -> list[float]:
    return [*delta["b"].flatten().tolist(), *delta["a"].flatten().tolist()]


def averaged(
    rows: list[list[float]], counts: list[int] | None = None, num_clients: int = 0, **changes: Any
) -> list[float]:
    clip_norm = changes.pop("clip_norm", math.inf)
    return joined(
        aggregate(replies_of(rows, counts), num_clients or len(rows), settings_of(**changes), clip_norm=clip_norm)
    )


deltas = st.integers(2, 6).flatmap(
    lambda width: st.lists(
        st.lists(st.floats(-10, 10, width=32), min_size=width, max_size=width), min_size=1, max_size=12
    )
)


# Weights and scale


def test_equal_weights_average_clients_and_example_weights_average_comparisons() -> None:
    rows = [[0.0, 4.0], [8.0, 0.0]]
    assert averaged(rows, [1, 3]) == [4.0, 2.0]
    assert averaged(rows, [1, 3], weights="examples") == [6.0, 1.0]
    assert averaged(rows, [1, 3], weights="examples", aggregator="norm_clipped_mean") == [6.0, 1.0]


def test_population_scale_divides_by_all_clients_so_that_absent_ones_count_as_no_change() -> None:
    assert averaged([[6.0, 0.0], [0.0, 12.0]], num_clients=6, scale="population") == [1.0, 2.0]


def test_mistake_04_a_step_of_one_over_all_clients_is_taken_only_when_asked_for() -> None:
    rows = [[1.0, 1.0]]
    assert averaged(rows, num_clients=100) == [1.0, 1.0]
    assert averaged(rows, num_clients=100, scale="population") == [0.01, 0.01]


def test_mistake_04_counts_weigh_by_their_share_whatever_their_unit() -> None:
    rows = [[0.0, 4.0], [8.0, 0.0]]
    assert averaged(rows, [1, 3], weights="examples") == averaged(rows, [200, 600], weights="examples")


def test_fault_70_counts_that_sum_to_zero_do_not_divide_by_zero() -> None:
    assert shares([0, 0], "examples") == [0.5, 0.5]


def test_fault_70_counts_are_never_a_weight_by_default() -> None:
    assert averaged([[1.0, 0.0], [3.0, 0.0]], [1, 10**6]) == [2.0, 0.0]


def test_fault_65_clients_with_nothing_to_add_count_as_participants() -> None:
    assert averaged([[4.0, 4.0], [0.0, 0.0]]) == [2.0, 2.0]
    assert averaged([[0.0, 0.0]], aggregator="norm_clipped_mean", clip_norm=0.0) == [0.0, 0.0]


def test_tensors_come_back_with_their_names_shapes_and_dtypes() -> None:
    delta = {"m": torch.ones(2, 3, dtype=torch.bfloat16), "v": torch.ones(4)}
    result = aggregate({"ann": Reply("ann", 0, delta, 1)}, 1, settings_of())
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in result.items()} == {
        "m": (torch.Size([2, 3]), torch.bfloat16),
        "v": (torch.Size([4]), torch.float32),
    }


# Aggregators


@given(rows=deltas)
@settings(max_examples=60, deadline=None)
def test_the_mean_is_the_mean_and_the_median_the_median(rows: list[list[float]]) -> None:
    assert averaged(rows) == pytest.approx(np.mean(rows, axis=0), abs=1e-9)
    assert averaged(rows, aggregator="median") == pytest.approx(np.median(rows, axis=0), abs=1e-9)


@given(rows=deltas.filter(lambda rows: len(rows) >= 5))
@settings(max_examples=40, deadline=None)
def test_the_trimmed_mean_equals_scipys(rows: list[list[float]]) -> None:
    from scipy.stats import trim_mean

    assert averaged(rows, aggregator="trimmed_mean") == pytest.approx(trim_mean(rows, 0.2, axis=0), abs=1e-9)


def test_trimming_nothing_is_an_error_that_says_how_many_replies_it_takes() -> None:
    with pytest.raises(FederationError, match=r"trim 0\.2 of 4 replies cuts none; .*at least 5 replies"):
        averaged([[1.0, 1.0]] * 4, aggregator="trimmed_mean")


def test_the_trimmed_mean_drops_one_liar_of_five() -> None:
    assert averaged([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0], [2.0, 2.0], [1e9, -1e9]], aggregator="trimmed_mean") == [
        pytest.approx(7 / 3),
        pytest.approx(5 / 3),
    ]


@given(rows=deltas, clip_norm=st.floats(0.1, 20), data=st.data(), weights=st.sampled_from(["equal", "examples"]))
@settings(max_examples=60, deadline=None)
def test_the_norm_clipped_mean_is_the_weighted_mean_of_shortened_deltas(
    rows: list[list[float]], clip_norm: float, data: st.DataObject, weights: str
) -> None:
    counts = data.draw(st.lists(st.integers(0, 50), min_size=len(rows), max_size=len(rows)))
    shortened = [np.array(row) * min(1.0, clip_norm / (math.hypot(*row) or 1.0)) for row in rows]
    found = averaged(rows, counts, aggregator="norm_clipped_mean", clip_norm=clip_norm, weights=weights)
    weighs = counts if weights == "examples" and any(counts) else None
    assert found == pytest.approx(np.average(shortened, axis=0, weights=weighs), abs=1e-9)


@given(rows=deltas.filter(lambda rows: len(rows) >= 5))
@settings(max_examples=40, deadline=None)
def test_krum_takes_the_delta_with_the_nearest_neighbours(rows: list[list[float]]) -> None:
    def score(number: int) -> float:
        others = [math.dist(rows[number], row) ** 2 for other, row in enumerate(rows) if other != number]
        return sum(sorted(others)[: len(rows) - 3])

    chosen = averaged(rows, aggregator="krum")
    assert min(map(score, range(len(rows)))) == pytest.approx(score(rows.index(chosen)), rel=1e-9, abs=1e-9)


def test_krum_ignores_a_far_liar_and_needs_a_majority_to_do_so() -> None:
    rows = [[1.0, 1.0], [1.1, 1.0], [1.0, 1.1], [0.9, 1.0], [500.0, -500.0]]
    assert averaged(rows, aggregator="krum") == [1.0, 1.0]
    with pytest.raises(FederationError, match="it takes 5"):
        averaged(rows[:4], aggregator="krum")


@pytest.mark.parametrize("aggregator", sorted(AGGREGATORS))
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_no_order_of_arrival_changes_a_single_bit(aggregator: str, data: st.DataObject) -> None:
    rows = data.draw(deltas.filter(lambda rows: len(rows) >= 5))
    counts = [data.draw(st.integers(1, 50)) for _ in rows]
    replies = replies_of(rows, counts, torch.float32)
    shuffled = dict(data.draw(st.permutations(list(replies.items()))))
    cfg = settings_of(aggregator=aggregator, weights="examples")
    first, second = aggregate(replies, 20, cfg, 1.0), aggregate(shuffled, 20, cfg, 1.0)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("aggregator", ["norm_clipped_mean", "median", "trimmed_mean", "krum"])
def test_one_liar_of_seven_cannot_turn_a_robust_rule_around(aggregator: str) -> None:
    honest = [[1.0 + 0.1 * number, 1.0] for number in range(6)]
    found = averaged([*honest, [-1e6, -1e6]], aggregator=aggregator, clip_norm=1.6)
    assert min(found) > 0.5


# The running cap


def test_the_clip_limit_is_the_median_norm_of_the_round() -> None:
    assert clip_limit([1.0, 9.0, 2.0], ()) == (2.0, (2.0,))


def test_the_clip_limit_is_capped_by_the_median_of_recent_rounds() -> None:
    limit, recent = clip_limit([50.0, 60.0, 70.0], (1.0, 2.0, 3.0))
    assert limit == 2.0
    assert recent == (1.0, 2.0, 3.0, 60.0)


def test_the_clip_limit_forgets_rounds_long_past() -> None:
    recent: tuple[float, ...] = ()
    for number in range(100):
        _, recent = clip_limit([float(number)], recent)
    assert recent == tuple(float(number) for number in range(100 - CLIP_WINDOW, 100))


# Server optimizers


def run_server(deltas: list[list[float]], **changes: Any) -> list[float]:
    weights: Weights = {"w": torch.zeros(len(deltas[0]), dtype=torch.float64)}
    moments: dict[str, Tensor] = {}
    for delta in deltas:
        change = {"w": torch.tensor(delta, dtype=torch.float64)}
        weights, moments = server_step(0, weights, change, moments, settings_of(**changes))
    return weights["w"].tolist()


def test_sgd_with_rate_one_adds_the_delta() -> None:
    assert run_server([[1.0, -2.0], [0.5, 0.0]]) == [1.5, -2.0]


@given(steps=st.lists(st.lists(st.floats(-5, 5), min_size=2, max_size=2), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_momentum_and_adam_equal_their_formulas(steps: list[list[float]]) -> None:
    w1, w2, m1, m2 = np.zeros(2), np.zeros(2), np.zeros(2), np.zeros(2)
    v = np.full(2, 1e-3**2)
    for step in map(np.array, steps):
        m1 = 0.9 * m1 + step
        w1 = w1 + 0.5 * m1
        m2 = 0.9 * m2 + 0.1 * step
        v = 0.99 * v + 0.01 * step**2
        w2 = w2 + 0.5 * m2 / (np.sqrt(v) + 1e-3)
    assert run_server(steps, server_optimizer="momentum", server_lr=0.5) == pytest.approx(w1, abs=1e-9)
    assert run_server(steps, server_optimizer="adam", server_lr=0.5) == pytest.approx(w2, abs=1e-9)


def test_a_step_makes_new_tensors_and_keeps_the_moments_of_other_adapters() -> None:
    weights, delta = {"w": torch.ones(2)}, {"w": torch.ones(2)}
    other = torch.tensor([7.0])
    moved, moments = server_step(1, weights, delta, {"0.momentum.w": other}, settings_of(server_optimizer="momentum"))
    assert torch.equal(weights["w"], torch.ones(2))
    assert torch.equal(moved["w"], torch.full((2,), 2.0))
    assert sorted(moments) == ["0.momentum.w", "1.momentum.w"]
    assert moments["0.momentum.w"] is other


def test_a_tensor_without_a_delta_stays_where_it_is() -> None:
    weights = {"a": torch.ones(1), "b": torch.ones(1)}
    moved, _ = server_step(0, weights, {"b": torch.ones(1)}, {}, settings_of())
    assert (moved["a"].item(), moved["b"].item()) == (1.0, 2.0)


def test_the_median_of_medians_is_what_statistics_says() -> None:
    norms = [0.3, 0.1, 0.2, 0.9]
    assert clip_limit(norms, ())[0] == statistics.median(norms)
