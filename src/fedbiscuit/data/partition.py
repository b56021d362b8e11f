"""Who holds which comparison (docs/algorithm.md section 2): by annotator, by a Dirichlet draw over a column, or at random.

A client's train, validation and test comparisons are its own, and both orders of a pair stay on one side of every cut.
Every draw is a function of the seed and of the comparison's own texts: the order of the lines in a file means nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from fedbiscuit.config import PartitionSettings
from fedbiscuit.data.records import pair_of
from fedbiscuit.types import ClientData, ClientId, Comparison, ConfigError, DataError, rng_for, seed_for

__all__ = ["PARTITIONS", "Division", "divide", "named_groups", "partition", "pooled", "set_apart"]

MAX_VALIDATION = 200
TEST_FRACTION = 0.1
MANY_PROMPTS = 20
"""Prompts a client from which on whole prompts are held out, not only pairs of answers."""

Held = dict[ClientId, list[Comparison]]


@dataclass(frozen=True, slots=True)
class Division:
    """The clients, what was left out by reason (the unit stands in the reason), and what there is to say."""

    clients: dict[ClientId, ClientData]
    left_out: dict[str, int]
    warnings: list[str]


def partition(
    comparisons: Sequence[Comparison], settings: PartitionSettings, seed: int, val_fraction: float
) -> dict[ClientId, ClientData]:
    """The clients of ``divide``, without the counts and warnings."""
    return divide(comparisons, settings, seed, val_fraction).clients


def divide(comparisons: Sequence[Comparison], settings: PartitionSettings, seed: int, val_fraction: float) -> Division:
    """Comparisons to clients, and each client's comparisons to train, validation and test.

    A client without validation comparisons gives ``val_fraction`` of its train ones, 1 to 200. If no comparison at all
    has a split, a tenth of each client's, at least 1, becomes its test part first. Clients come sorted by id.

    Raises ``ConfigError`` when there are fewer annotators than clients asked for, or when a client that is made has
    nothing to train on; ``DataError`` when comparisons lack what the partition needs.
    """
    if not comparisons:
        raise DataError("no comparisons to share out; check the files with: fedbiscuit data check FILE")
    held = PARTITIONS[settings.by](comparisons, settings, seed)
    hold_out_test = not any(comparison.split for comparison in comparisons)
    left_out: dict[str, int] = {}
    shares: dict[ClientId, ClientData] = {}
    for client in sorted(held):
        shares[client], num_shared = _split_share(held[client], seed, val_fraction, hold_out_test)
        _count(left_out, "training comparisons whose pair is also held out at the same client", num_shared)
    idle = [client for client in shares if not shares[client].train]
    if settings.by == "annotator":
        _count(left_out, "clients with nothing to train on", len(idle))
        _count(left_out, "comparisons of clients with nothing to train on", _total(shares[client] for client in idle))
        shares = {client: share for client, share in shares.items() if share.train}
        shares = _largest(shares, settings.num_clients, left_out)
    elif idle:
        raise ConfigError(
            f"data.partition: {len(idle)} of {len(shares)} clients would have nothing to train on ({len(comparisons)} "
            f"comparisons, first empty client {idle[0]}); ask for fewer clients{_milder(settings)}"
        )
    return Division(shares, left_out, _remarks(shares, left_out, hold_out_test))


def pooled(clients: dict[ClientId, ClientData]) -> ClientData:
    """All clients as one, in the order of their ids: what a centralized baseline trains on."""
    shares = [clients[client] for client in sorted(clients)]
    return ClientData(
        tuple(comparison for share in shares for comparison in share.train),
        tuple(comparison for share in shares for comparison in share.validation),
        tuple(comparison for share in shares for comparison in share.test),
    )


def set_apart(clients: Iterable[ClientId], share: float, seed: int) -> set[ClientId]:
    """The clients that take part in no round: about ``share`` of them, at least one unless it is 0, never all."""
    drawn = sorted(clients, key=lambda client: seed_for(seed, "new clients", client))
    if share == 0.0:
        return set()
    if len(drawn) < 2:
        raise ConfigError(f"data.partition.new_clients: {share:g}, but there is only one client; use 0")
    return set(drawn[: min(max(1, round(share * len(drawn))), len(drawn) - 1)])


def named_groups(clients: Mapping[ClientId, ClientData]) -> dict[ClientId, int] | None:
    """The groups that the data itself names (``meta.group``), as numbers; None where not every client has exactly one."""
    named = {
        client: {str(c.meta["group"]) for c in (*data.train, *data.validation, *data.test) if "group" in c.meta}
        for client, data in clients.items()
    }
    if not all(len(groups) == 1 for groups in named.values()):
        return None
    numbers = {group: i for i, group in enumerate(sorted({next(iter(groups)) for groups in named.values()}))}
    return {client: numbers[next(iter(groups))] for client, groups in named.items()}


# To clients


def _by_annotator(comparisons: Sequence[Comparison], settings: PartitionSettings, seed: int) -> Held:
    held: Held = {}
    missing = sum(comparison.client is None for comparison in comparisons)
    if missing:
        raise DataError(
            f"client: {missing} of {len(comparisons)} comparisons do not say whose they are; add `client`, "
            "or set data.partition.by to iid or dirichlet"
        )
    for comparison in comparisons:
        held.setdefault(str(comparison.client), []).append(comparison)
    return held


def _by_dirichlet(comparisons: Sequence[Comparison], settings: PartitionSettings, seed: int) -> Held:
    """For each value of the column, shares of its prompts are drawn from Dirichlet(alpha); a prompt stays whole.

    As in the original, a client that already has its fair part when a value's turn comes gets none of it. Train,
    validation and test prompts are cut by the same shares, so that a client is tested on what it is like.
    """
    held = _new_clients(settings)
    names = list(held)
    by_domain: dict[str, dict[str, list[list[Comparison]]]] = {}
    for _, group in _groups(comparisons, lambda comparison: comparison.prompt, seed):
        domain = _domain(group[0], settings.column, comparisons)
        by_domain.setdefault(domain, {}).setdefault(_main_split(group), []).append(group)
    for domain in sorted(by_domain):
        rng = rng_for(seed, "dirichlet", domain)
        shares = [rng.gammavariate(settings.alpha, 1.0) for _ in names]
        room = [len(held[name]) * len(names) < len(comparisons) for name in names]
        shares = [share if free else 0.0 for share, free in zip(shares, room, strict=True)]
        for groups in by_domain[domain].values():
            for name, part in zip(names, _cut(groups, shares), strict=True):
                held[name] += [comparison for group in part for comparison in group]
    return held


def _by_chance(comparisons: Sequence[Comparison], settings: PartitionSettings, seed: int) -> Held:
    """Pairs are dealt in a random order, split by split; both orders and all opinions of a pair stay together."""
    held = _new_clients(settings)
    names = list(held)
    dealt: dict[str, int] = {}
    for _, group in _groups(comparisons, pair_of, seed):
        split = _main_split(group)
        held[names[dealt.get(split, 0) % len(names)]] += group
        dealt[split] = dealt.get(split, 0) + 1
    return held


def _new_clients(settings: PartitionSettings) -> Held:
    if settings.num_clients == 0:
        raise ConfigError(f"data.partition.num_clients: 0, but {settings.by} makes clients; say how many")
    width = len(str(settings.num_clients - 1))
    return {f"client-{i:0{width}d}": [] for i in range(settings.num_clients)}


def _groups(
    comparisons: Sequence[Comparison], key_of: Callable[[Comparison], object], seed: int
) -> list[tuple[object, list[Comparison]]]:
    """Comparisons that must stay together, in a random order that depends on the keys alone."""
    groups: dict[object, list[Comparison]] = {}
    for comparison in comparisons:
        groups.setdefault(key_of(comparison), []).append(comparison)
    return sorted(groups.items(), key=lambda item: seed_for(seed, "deal", item[0]))


def _main_split(group: Sequence[Comparison]) -> str:
    splits = {comparison.split or "train" for comparison in group}
    return next(split for split in ("train", "validation", "test") if split in splits)


def _domain(comparison: Comparison, column: str, comparisons: Sequence[Comparison]) -> str:
    def value(of: Comparison) -> object:
        return of.domain if column == "domain" else of.meta.get(column)

    if value(comparison) is None:
        missing = sum(value(other) is None for other in comparisons)
        raise DataError(
            f"{column}: {missing} of {len(comparisons)} comparisons have no such value; add it (to `meta`, unless it "
            "is `domain`), or choose another data.partition.column"
        )
    return str(value(comparison))


def _cut(groups: list[list[Comparison]], shares: Sequence[float]) -> list[list[list[Comparison]]]:
    """Consecutive parts of a list, sized by the shares."""
    total = sum(shares)
    if total <= 0.0:  # all draws underflowed (a tiny alpha): the limit of the Dirichlet draw is one client
        shares, total = [1.0] + [0.0] * (len(shares) - 1), 1.0
    ends = [round(len(groups) * part / total) for part in accumulate(shares)]
    return [groups[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _milder(settings: PartitionSettings) -> str:
    return f", or for a larger alpha than {settings.alpha:g}" if settings.by == "dirichlet" else ""


# Within a client


def _split_share(
    mine: Sequence[Comparison], seed: int, val_fraction: float, hold_out_test: bool
) -> tuple[ClientData, int]:
    """A client's three parts, and how many comparisons were left out because their pair is held out too."""
    train, validation, test = (
        [c for c in mine if (c.split or "train") == name] for name in ("train", "validation", "test")
    )
    tested = {pair_of(comparison) for comparison in test}
    clean_validation = [comparison for comparison in validation if pair_of(comparison) not in tested]
    held_out = tested | {pair_of(comparison) for comparison in clean_validation}
    clean_train = [comparison for comparison in train if pair_of(comparison) not in held_out]
    num_shared = len(train) - len(clean_train) + len(validation) - len(clean_validation)
    train, validation = clean_train, clean_validation
    by_prompt = len({comparison.prompt for comparison in train}) >= MANY_PROMPTS
    if hold_out_test:
        test, train = _hold_out(train, round(TEST_FRACTION * len(train)), by_prompt, seed, "test")
    if not validation:
        count = min(MAX_VALIDATION, int(val_fraction * len(train)))
        validation, train = _hold_out(train, count, by_prompt, seed, "validation")
    return ClientData(tuple(train), tuple(validation), tuple(test)), num_shared


def _hold_out(
    train: list[Comparison], count: int, by_prompt: bool, seed: int, purpose: str
) -> tuple[list[Comparison], list[Comparison]]:
    """About ``count`` comparisons, at least one, by whole prompts or whole pairs; the rest is never empty.

    The draw knows the texts and no client, so that people who judged the same things have them held out alike. Of one
    pair: nothing.
    """

    def unit(comparison: Comparison) -> tuple[str, ...]:
        return (comparison.prompt,) if by_prompt else pair_of(comparison)

    groups: dict[tuple[str, ...], int] = {}
    for comparison in train:
        groups[unit(comparison)] = groups.get(unit(comparison), 0) + 1
    if len(groups) < 2:
        return [], train
    taken: set[tuple[str, ...]] = set()
    num_taken = 0
    drawn = sorted(groups, key=lambda texts: seed_for(seed, purpose, *texts))
    for texts in drawn:
        if num_taken + groups[texts] <= count:
            taken.add(texts)
            num_taken += groups[texts]
    if not taken:  # every one was judged more often than we want to take: one that was judged least
        taken = {min(drawn, key=groups.__getitem__)}
    held_out = [comparison for comparison in train if unit(comparison) in taken]
    return held_out, [comparison for comparison in train if unit(comparison) not in taken]


# What to say


def _largest(
    shares: dict[ClientId, ClientData], num_clients: int, left_out: dict[str, int]
) -> dict[ClientId, ClientData]:
    if not shares:
        raise DataError("no client has anything to train on; at least one needs comparisons whose split is train")
    if num_clients == 0:
        return shares
    if len(shares) < num_clients:
        raise ConfigError(
            f"data.partition.num_clients: {num_clients} clients asked for, but only {len(shares)} annotators have "
            "something to train on; ask for fewer, or 0 for all"
        )
    ranked = sorted(shares, key=lambda client: (-_total([shares[client]]), client))
    _count(left_out, "clients beyond data.partition.num_clients", len(ranked) - num_clients)
    _count(
        left_out,
        "comparisons of clients beyond data.partition.num_clients",
        _total(shares[client] for client in ranked[num_clients:]),
    )
    return {client: shares[client] for client in sorted(ranked[:num_clients])}


def _remarks(shares: dict[ClientId, ClientData], left_out: dict[str, int], hold_out_test: bool) -> list[str]:
    warnings = [f"left out: {reason}: {count}" for reason, count in left_out.items()]
    if hold_out_test:
        num_test = sum(len(share.test) for share in shares.values())
        warnings.append(
            f"no comparison has a split: {num_test} of {_total(shares.values())} are held out for the test, about a "
            "tenth of each client's; set `split` to decide yourself"
        )
        trained = {pair_of(c) for share in shares.values() for c in share.train}
        tested = {pair_of(c) for share in shares.values() for c in (*share.validation, *share.test)}
        if trained & tested:
            warnings.append(
                f"{len(trained & tested)} pairs of answers are in train of one client and in validation or test of another; "
                "fine if each client's own judgement is what is predicted"
            )
    unseated = [client for client, share in shares.items() if not share.validation]
    if unseated:
        warnings.append(
            f"clients with too few comparisons for a validation part: {len(unseated)}, first {unseated[0]!r}; they are "
            "not asked in grouping and are seated where there is room"
        )
    untested = [client for client, share in shares.items() if not share.test]
    if untested:
        warnings.append(
            f"clients without test comparisons: {len(untested)}, first {untested[0]!r}; the evaluation is without them"
        )
    return warnings


def _total(shares: Iterable[ClientData]) -> int:
    return sum(len(share.train) + len(share.validation) + len(share.test) for share in shares)


def _count(counts: dict[str, int], reason: str, number: int) -> None:
    if number:
        counts[reason] = counts.get(reason, 0) + number


PARTITIONS: dict[str, Callable[[Sequence[Comparison], PartitionSettings, int], Held]] = {
    "annotator": _by_annotator,
    "dirichlet": _by_dirichlet,
    "iid": _by_chance,
}
