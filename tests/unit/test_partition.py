"""Comparisons to clients, and each client's comparisons to train, validation and test."""

import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbiscuit.config import PartitionSettings
from fedbiscuit.data.comparisons import read_comparisons
from fedbiscuit.data.partition import divide, named_groups, partition, pooled, set_apart
from fedbiscuit.data.records import pair_of
from fedbiscuit.types import ClientData, Comparison, ConfigError, DataError

SHARED = Path(__file__).parents[3] / "shared" / "data"


def pair(prompt, client=None, split=None, domain=None, a="yes", b="no", choice=0, **meta):
    return Comparison(prompt, a, b, choice, client=client, split=split, domain=domain, meta=meta)


def many(count, client=None, split="train", start=0, **more):
    return [pair(f"{client} {split} {i}", client, split, **more) for i in range(start, start + count)]


def annotators(num_clients=0):
    return PartitionSettings(by="annotator", num_clients=num_clients)


def pieces(share: ClientData):
    return share.train + share.validation + share.test


def sizes(clients):
    return {name: (len(share.train), len(share.validation), len(share.test)) for name, share in clients.items()}


# Annotators


def test_each_annotator_keeps_its_own_splits():
    data = (
        many(3, "bo") + many(2, "ann") + many(1, "ann", "validation") + many(2, "ann", "test") + many(1, "bo", "test")
    )
    clients = partition(data, annotators(), 0, 0.05)
    assert list(clients) == ["ann", "bo"]
    assert sizes(clients) == {"ann": (2, 1, 2), "bo": (2, 1, 1)}


def test_mistake_05_validation_and_test_belong_to_the_same_annotator_as_train():
    data = [c for name in "abcdef" for split in ("train", "validation", "test") for c in many(3, name, split)]
    random.Random(0).shuffle(data)
    for name, share in partition(data, annotators(), 0, 0.05).items():
        assert sizes({name: share}) == {name: (3, 3, 3)}
        assert {comparison.client for comparison in pieces(share)} == {name}
        assert {comparison.split for comparison in share.test} == {"test"}


def test_mistake_05_too_few_annotators_stop_with_the_counts_and_never_become_an_iid_split():
    data = many(3, "ann") + many(3, "bo") + many(3, "cy", "test")
    with pytest.raises(ConfigError, match="5 clients asked for, but only 2 annotators have something to train on"):
        partition(data, annotators(5), 0, 0.05)


def test_the_annotators_with_most_comparisons_are_taken_and_the_rest_is_counted():
    data = many(3, "ann") + many(5, "bo") + many(4, "cy") + many(3, "di")
    division = divide(data, annotators(3), 0, 0.05)
    assert list(division.clients) == ["ann", "bo", "cy"]
    assert division.left_out == {
        "clients beyond data.partition.num_clients": 1,
        "comparisons of clients beyond data.partition.num_clients": 3,
    }


def test_a_client_with_nothing_to_train_on_is_left_out_counted_and_said():
    division = divide(many(3, "ann") + many(4, "bo", "test"), annotators(), 0, 0.05)
    assert list(division.clients) == ["ann"]
    assert division.left_out == {
        "clients with nothing to train on": 1,
        "comparisons of clients with nothing to train on": 4,
    }
    assert any("clients with nothing to train on: 1" in message for message in division.warnings)
    with pytest.raises(DataError, match="no client has anything to train on"):
        divide(many(4, "bo", "test"), annotators(), 0, 0.05)


def test_comparisons_without_an_annotator_stop_with_their_count():
    with pytest.raises(DataError, match="1 of 3 comparisons do not say whose they are; add `client`, or set"):
        partition([*many(2, "ann"), pair("x")], annotators(), 0, 0.05)
    with pytest.raises(DataError, match="no comparisons"):
        partition([], annotators(), 0, 0.05)


# Validation and test from train


@pytest.mark.parametrize(
    ("num_train", "fraction", "num_validation"),
    [(1, 0.05, 0), (2, 0.05, 1), (19, 0.05, 1), (40, 0.05, 2), (100, 0.1, 10), (6000, 0.05, 200), (3, 0.99, 2)],
)
def test_validation_is_a_share_of_train_at_least_1_at_most_200(num_train, fraction, num_validation):
    share = partition(many(num_train, "ann") + many(1, "ann", "test"), annotators(), 0, fraction)["ann"]
    assert (len(share.train), len(share.validation)) == (num_train - num_validation, num_validation)


def test_given_validation_comparisons_are_not_touched():
    share = partition(many(50, "ann") + many(1, "ann", "validation"), annotators(), 0, 0.5)["ann"]
    assert (len(share.train), len(share.validation)) == (50, 1)


def test_data_without_any_split_gets_a_tenth_for_the_test_and_says_so():
    division = divide(many(40, "ann", None) + many(3, "bo", None) + many(1, "cy", None), annotators(), 0, 0.05)
    assert sizes(division.clients) == {"ann": (35, 1, 4), "bo": (1, 1, 1), "cy": (1, 0, 0)}
    assert any("5 of 44 are held out for the test" in message for message in division.warnings)
    assert any("clients without test comparisons: 1, first 'cy'" in message for message in division.warnings)


def test_what_is_held_out_is_drawn_anew_for_each_seed():
    data = many(10, "ann", None)
    drawn = {partition(data, annotators(), seed, 0.05)["ann"].validation[0].prompt for seed in range(40)}
    assert len(drawn) > 5


def test_one_split_anywhere_means_that_the_user_decides():
    assert sizes(partition(many(9, "ann", None) + many(1, "bo"), annotators(), 0, 0.05))["ann"] == (8, 1, 0)


def twins(i, client="ann", split=None):
    one = pair(f"p{i}", client, split, a=f"yes {i}", b=f"no {i}")
    return [one, one.swapped()]


@pytest.mark.parametrize("by", ["annotator", "iid", "dirichlet"])
def test_mistake_11_swapped_twins_of_a_comparison_are_on_one_side_of_every_cut(by):
    data = [Comparison(c.prompt, c.output_a, c.output_b, c.choice, "ann", "d") for i in range(60) for c in twins(i)]
    chosen = PartitionSettings(by=by, num_clients=0 if by == "annotator" else 3, alpha=100.0)
    for seed in range(5):
        sides = Counter()
        for share in partition(data, chosen, seed, 0.2).values():
            for side in (share.train, share.validation, share.test):
                assert side
                sides.update({pair_of(comparison) for comparison in side})
        assert set(sides.values()) == {1}
        assert len(sides) == 60


def test_mistake_11_twins_in_given_splits_of_a_made_client_are_left_out_of_train_and_counted():
    data = [twins(0, "ann", "train")[0], twins(0, "bo", "test")[1], *twins(1, "ann", "train")]
    division = divide(data, PartitionSettings(by="iid", num_clients=1), 0, 0.05)
    assert sizes(division.clients) == {"client-0": (2, 0, 1)}
    assert division.left_out == {"training comparisons whose pair is also held out at the same client": 1}


def test_pairs_judged_many_times_still_leave_something_to_train_on():
    data = [c for i in range(2) for _ in range(10) for c in twins(i, split="train")]
    assert sizes(partition(data, annotators(), 0, 0.05)) == {"ann": (20, 20, 0)}


# Made clients


def test_iid_deals_every_split_evenly():
    data = many(60) + many(30, split="validation") + many(31, split="test")
    clients = partition(data, PartitionSettings(by="iid", num_clients=10), 0, 0.05)
    assert list(clients) == [f"client-{i}" for i in range(10)]
    assert {size[:2] for size in sizes(clients).values()} == {(6, 3)}
    assert sorted(size[2] for size in sizes(clients).values()) == [3] * 9 + [4]


def test_made_clients_ignore_who_chose():
    data = many(20, "ann") + many(20, "bo")
    clients = partition(data, PartitionSettings(by="iid", num_clients=2), 0, 0.05)
    assert all({c.client for c in share.train} == {"ann", "bo"} for share in clients.values())


def posts(num_posts, domains, split="train", per_post=3):
    return [
        pair(f"{split} post {i}", split=split, domain=domains[i % len(domains)], a=f"a{j}")
        for i in range(num_posts)
        for j in range(per_post)
    ]


def test_dirichlet_keeps_all_comparisons_of_a_post_at_one_client():
    data = posts(300, "uvw") + posts(60, "uvw", "test") + posts(60, "uvw", "validation")
    chosen = PartitionSettings(by="dirichlet", num_clients=4, alpha=0.5)
    clients = partition(data, chosen, 1, 0.05)
    holders = {}
    for name, share in clients.items():
        for comparison in pieces(share):
            holders.setdefault(comparison.prompt, set()).add(name)
    assert all(len(names) == 1 for names in holders.values())
    assert sum(len(pieces(share)) for share in clients.values()) == len(data)


def skew(alpha):
    """Mean over clients of the largest share that one domain has in its train comparisons: from 1/4 to 1."""
    chosen = PartitionSettings(by="dirichlet", num_clients=4, alpha=alpha)
    clients = partition(posts(2000, "uvwx"), chosen, 0, 0.05)
    shares = []
    for share in clients.values():
        counts = Counter(comparison.domain for comparison in share.train)
        shares.append(max(counts.values()) / sum(counts.values()))
    return sum(shares) / len(shares)


def test_a_small_alpha_is_skewed_and_a_large_one_is_not():
    assert skew(1000.0) < 0.30
    assert skew(0.3) > 0.45


def test_clients_are_tested_on_the_domains_that_they_train_on():
    data = posts(2000, "uvwx") + posts(2000, "uvwx", "test")
    clients = partition(data, PartitionSettings(by="dirichlet", num_clients=4, alpha=0.3), 0, 0.05)
    for share in clients.values():
        train, test = (Counter(c.domain for c in part) for part in (share.train + share.validation, share.test))
        assert all(abs(train[domain] - test[domain]) <= 6 for domain in "uvwx")


def test_dirichlet_takes_any_column_of_meta_and_names_a_missing_one():
    data = [pair(f"p{i}", split="train", topic=i % 3) for i in range(90)]
    chosen = PartitionSettings(by="dirichlet", num_clients=2, alpha=50.0, column="topic")
    assert len(partition(data, chosen, 0, 0.05)) == 2
    with pytest.raises(DataError, match="domain: 90 of 90 comparisons have no such value"):
        partition(data, chosen.model_copy(update={"column": "domain"}), 0, 0.05)


@pytest.mark.parametrize("by", ["iid", "dirichlet"])
def test_an_empty_made_client_is_an_error_with_the_counts(by):
    with pytest.raises(ConfigError, match=r"of 9 clients would have nothing to train on \(5 comparisons"):
        partition(many(5, domain="d"), PartitionSettings(by=by, num_clients=9), 0, 0.05)
    with pytest.raises(ConfigError, match=r"num_clients: 0, but .* makes clients; say how many"):
        partition(many(5, domain="d"), PartitionSettings(by=by), 0, 0.05)


def test_a_tiny_alpha_does_not_crash():
    chosen = PartitionSettings(by="dirichlet", num_clients=1, alpha=1e-9)
    assert sizes(partition(posts(10, "u"), chosen, 0, 0.05)) == {"client-0": (29, 1, 0)}


# Properties


comparisons = st.builds(
    pair,
    prompt=st.sampled_from("pqrst"),
    client=st.sampled_from(["ann", "bo", "cy"]),
    split=st.sampled_from([None, "train", "validation", "test"]),
    domain=st.sampled_from(["u", "v"]),
    a=st.sampled_from(["1", "2", "3"]),
    b=st.sampled_from(["4", "5", "1"]),
    choice=st.sampled_from([0, 1]),
)


@given(
    st.lists(comparisons, min_size=1, max_size=40),
    st.sampled_from(["annotator", "iid", "dirichlet"]),
    st.integers(0, 5),
)
@settings(max_examples=150, deadline=None)
def test_nothing_is_lost_or_doubled_and_no_pair_is_on_two_sides_of_a_client(data, by, seed):
    chosen = PartitionSettings(by=by, num_clients=0 if by == "annotator" else 2, alpha=5.0)
    try:
        division = divide(data, chosen, seed, 0.2)
    except (ConfigError, DataError):
        return
    left_out = sum(count for reason, count in division.left_out.items() if not reason.startswith("clients"))
    assert sum(len(pieces(share)) for share in division.clients.values()) + left_out == len(data)
    assert not Counter(map(id, (c for share in division.clients.values() for c in pieces(share)))) - Counter(
        map(id, data)
    )
    for share in division.clients.values():
        assert share.train
        sides = [{pair_of(c) for c in side} for side in (share.train, share.validation, share.test)]
        assert not sides[0] & sides[1]
        assert not sides[0] & sides[2]
        assert not sides[1] & sides[2]


@given(st.permutations(range(40)), st.sampled_from(["annotator", "iid", "dirichlet"]))
@settings(max_examples=30, deadline=None)
def test_the_order_of_the_lines_means_nothing_and_the_seed_decides(order, by):
    data = [pair(f"p{i}", "ann" if i % 3 else "bo", domain="uv"[i % 2]) for i in range(40)]
    chosen = PartitionSettings(by=by, num_clients=0 if by == "annotator" else 2, alpha=5.0)

    def held(some, seed):
        return {
            (name, i): {c.prompt for c in side}
            for name, share in partition(some, chosen, seed, 0.3).items()
            for i, side in enumerate((share.train, share.validation, share.test))
        }

    assert held([data[i] for i in order], 0) == held(data, 0)
    assert held(data, 1) != held(data, 0)


def test_pooling_keeps_every_comparison_in_its_split():
    clients = {
        "bo": ClientData(tuple(many(2, "bo")), (), tuple(many(1, "bo", "test"))),
        "ann": ClientData(tuple(many(1, "ann"))),
    }
    whole = pooled(clients)
    assert [comparison.client for comparison in whole.train] == ["ann", "bo", "bo"]
    assert (len(whole.validation), len(whole.test)) == (0, 1)


@pytest.mark.parametrize("name", ["polis_civic", "polis_two_camps", "ukp_convarg"])
def test_real_annotators_keep_all_that_is_theirs(name):
    found = sorted((SHARED / name).glob("pairs.jsonl*"))
    if not found:
        pytest.skip(f"NO REAL DATA: ../shared/data/{name} is not beside this checkout")
    data, _ = read_comparisons(found[0])
    division = divide(data, annotators(), 0, 0.05)
    assert division.left_out == {}
    assert sum(len(pieces(share)) for share in division.clients.values()) == len(data)
    assert all(share.validation for share in division.clients.values())
    for client, share in division.clients.items():
        assert {comparison.client for comparison in pieces(share)} == {client}


def test_people_who_judged_the_same_things_have_them_held_out_alike():
    judged = [pair(f"question {i}", client, a=f"yes {i}") for client in ("ann", "bo", "cy") for i in range(40)]
    division = divide(judged, annotators(), 0, 0.1)
    trained, held_out = ({c.prompt for s in division.clients.values() for c in part(s)} for part in (train_of, held_of))
    assert not trained & held_out
    assert not any("in train of one client" in warning for warning in division.warnings)


def test_answers_that_one_client_trains_on_and_another_is_tested_on_are_remarked_without_splits_too():
    uneven = [pair(f"question {i}", client) for client, count in (("ann", 40), ("bo", 20)) for i in range(count)]
    division = divide(uneven, annotators(), 0, 0.1)
    assert any("in train of one client and in validation or test of another" in w for w in division.warnings)


def test_of_many_prompts_whole_ones_are_held_out_so_that_no_answer_of_theirs_is_in_train():
    ranking = [
        pair(f"question {i}", "ann", a=f"answer {i} {a}", b=f"answer {i} {b}")
        for i in range(20)
        for a in range(4)
        for b in range(a)
    ]
    share = divide(ranking, annotators(), 0, 0.1).clients["ann"]
    assert not {c.prompt for c in train_of(share)} & {c.prompt for c in held_of(share)}
    assert len(share.test) == 12


def train_of(share: ClientData):
    return share.train


def held_of(share: ClientData):
    return share.validation + share.test


@given(st.sets(st.text(min_size=1), min_size=2), st.floats(0.01, 0.99), st.integers(0, 5))
def test_new_clients_are_a_share_of_all_never_none_and_never_everybody(clients, share, seed):
    apart = set_apart(clients, share, seed)
    assert apart < clients
    assert apart
    assert abs(len(apart) - share * len(clients)) <= 1
    assert apart == set_apart(sorted(clients, reverse=True), share, seed)
    assert set_apart(clients, 0.0, seed) == set()


def test_one_client_cannot_be_set_apart():
    with pytest.raises(ConfigError, match="new_clients"):
        set_apart(["ann"], 0.5, 0)


def test_groups_are_named_by_the_data_only_where_each_client_has_one():
    def data(*groups):
        return ClientData(tuple(Comparison("q", "a", "b", 0, meta={"group": g} if g else {}) for g in groups), (), ())

    assert named_groups({"ann": data("x", "x"), "bo": data("w"), "cy": data("x", None)}) == {"ann": 1, "bo": 0, "cy": 1}
    assert named_groups({"ann": data("x"), "bo": data(None)}) is None
    assert named_groups({"ann": data("x", "y")}) is None
