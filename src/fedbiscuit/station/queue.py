"""Which pair a person sees next, in which order, how much is left, and how far the answers can be relied on.

Plain functions of the history. Every draw is a function of (seed, person, pair), never of the order of calls, so a reload, a
second tab or a restart shows the same.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from fedbiscuit.station.nouns import Event, Presentation
from fedbiscuit.station.store import Store
from fedbiscuit.types import rng_for, seed_for

__all__ = [
    "Asking",
    "Consistency",
    "Progress",
    "Showing",
    "consistency",
    "disagreement",
    "next_showing",
    "present",
    "progress",
    "share",
]

APART = 4
"""So many other pairs at least stand between a pair and its repeat, while there are others to ask."""


@dataclass(frozen=True, slots=True)
class Asking:
    """What to ask. repeat_every: after so many pairs one of them comes again in the other order; 0: never.

    selectors: the digest of the selectors whose disagreement orders the pairs, "" for none; random_share: how many of the
    pairs are drawn at random all the same, so that what the selectors agree on, rightly or wrongly, is asked too.
    blind: ask the pairs of the blind test, and only these.
    """

    repeat_every: int = 10
    selectors: str = ""
    random_share: float = 0.3
    blind: bool = False


@dataclass(frozen=True, slots=True)
class Showing:
    """What to show: a pair, 0 for the first time or 1 for the repeat, and whether ``output_b`` stands first."""

    pair: str
    showing: int
    swapped: bool


@dataclass(frozen=True, slots=True)
class Progress:
    """Counts of pairs, without repeats (``repeats``: those that were answered). left: showings to come, repeats among them.

    minutes_left: from the median of this person's seconds; None before the first judgement. waiting: prompts without answers
    as yet. last: the token that an undo takes back, None if there is nothing.
    """

    judged: int
    ties: int
    skipped: int
    repeats: int
    left: int
    waiting: int
    minutes_left: float | None
    last: str | None

    @property
    def total(self) -> int:
        """All showings, done and to come."""
        return self.judged + self.skipped + self.repeats + self.left


@dataclass(frozen=True, slots=True)
class Consistency:
    """How a person judges. choices: answers that were no ties, also of repeats; first: how many went to the answer shown first.

    repeats: pairs with a choice both times; same: how many times it was the same answer; both_first, both_second: the other
    times, when it was the same place.
    """

    choices: int
    first: int
    ties: int
    repeats: int
    same: int
    both_first: int
    both_second: int


def present(store: Store, person: str, how: Asking) -> Presentation | None:
    """What this person sees now: what is open, or else the next showing, which is noted. None: nothing is left to ask."""
    with store.in_turn():
        found = store.open_presentation(person, how.blind)
        if found is not None:
            return found
        known = store.disagreements(how.selectors) if how.selectors else {}
        chosen = next_showing(store.pair_ids(how.blind), store.history(person), store.seed, person, how, known)
        return None if chosen is None else store.show(person, chosen.pair, chosen.showing, chosen.swapped)


def next_showing(
    pairs: Sequence[str],
    events: Sequence[Event],
    seed: int,
    person: str,
    how: Asking,
    disagreements: Mapping[str, float],
) -> Showing | None:
    """The next of ``pairs`` for a person with these events: a repeat where one is due, else a pair not yet answered."""
    among = set(pairs)
    answered = [event for event in _answers(events) if event.pair in among]
    seen = {event.pair for event in answered}
    new = [pair for pair in pairs if pair not in seen]
    again = _due_repeat(answered, seed, person, how.repeat_every, bool(new))
    if again is not None:
        return Showing(again.pair, 1, not again.swapped)
    if not new:
        return None

    def by_lot(pair: str) -> int:
        return _turn(seed, person, pair)

    scored = [pair for pair in new if pair in disagreements]
    lot = rng_for(seed, person, len(answered), "random share").random()
    if scored and lot >= how.random_share:
        pair = min(scored, key=lambda pair: (-disagreements[pair], by_lot(pair)))
    else:
        pair = min(new, key=by_lot)
    return Showing(pair, 0, rng_for(seed, person, pair, "order").random() < 0.5)


@lru_cache(maxsize=1 << 16)  # every pair that waits is asked for it at every click
def _turn(seed: int, person: str, pair: str) -> int:
    return seed_for(seed, person, pair, "turn")


def _due_repeat(answered: Sequence[Event], seed: int, person: str, every: int, others: bool) -> Event | None:
    """The judgement to ask again; while there are other pairs, not one of the last few."""
    first = [event for event in answered if event.kind == "judged" and event.showing == 0]
    done = {event.pair for event in answered if event.showing == 1}
    if not every or len(first) // every <= len(done):
        return None
    recent = {event.pair for event in answered[-APART:]}
    open_ = [event for event in first if event.pair not in done]
    apart = [event for event in open_ if event.pair not in recent]
    if not apart and others:
        return None
    due = {event.pair for event in first[len(done) * every : (len(done) + 1) * every]}
    block = [
        event for event in apart if event.pair in due
    ]  # one of the last `every` pairs, so that all are sampled alike
    return min(block or apart or open_, key=lambda event: seed_for(seed, person, event.pair, "again"), default=None)


def progress(store: Store, person: str, how: Asking) -> Progress:
    """How far this person is, and about how long it will take."""
    with store.in_turn():
        pairs, events = store.pair_ids(how.blind), store.history(person)
        waiting = store.count_prompts("waiting", how.blind)
    among = set(pairs)
    answered = [event for event in _answers(events) if event.pair in among]
    judged = [event for event in answered if event.kind == "judged" and event.showing == 0]
    repeats = sum(event.showing == 1 for event in answered)
    skipped = sum(event.kind == "skipped" and event.showing == 0 for event in answered)
    new = len(pairs) - len(judged) - skipped
    to_come = max(0, (len(judged) + new) // how.repeat_every - repeats) if how.repeat_every else 0
    seconds = [event.seconds for event in answered if event.kind == "judged" and event.seconds is not None]
    left = new + to_come
    return Progress(
        judged=len(judged),
        ties=sum(event.choice is None for event in judged),
        skipped=skipped,
        repeats=repeats,
        left=left,
        waiting=waiting,
        minutes_left=left * statistics.median(seconds) / 60 if seconds else None,
        last=answered[-1].token if answered else None,
    )


def consistency(events: Sequence[Event]) -> Consistency:
    """From the history of one person, with what was undone left out."""
    judged = [event for event in _answers(events) if event.kind == "judged"]
    chosen = [event for event in judged if event.choice is not None]
    by_pair: dict[str, list[Event]] = {}
    for event in chosen:
        by_pair.setdefault(event.pair, []).append(event)
    twice = [both for both in by_pair.values() if {event.showing for event in both} == {0, 1}]
    other = [both for both in twice if both[0].choice != both[1].choice]
    return Consistency(
        choices=len(chosen),
        first=sum(event.first_preferred is True for event in chosen),
        ties=len(judged) - len(chosen),
        repeats=len(twice),
        same=len(twice) - len(other),
        both_first=sum(both[0].first_preferred is True for both in other),
        both_second=sum(both[0].first_preferred is False for both in other),
    )


def share(part: float, whole: int, z: float = 1.959964) -> tuple[float, float, float] | None:
    """A share with its 95% interval (Wilson's, which also means something for 3 of 3); None of nothing. A tie may be half."""
    if not whole:
        return None
    p, spread = part / whole, z * z / whole
    middle, half = p + spread / 2, z * math.sqrt((p * (1 - p) + spread / 4) / whole)
    return p, max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


def disagreement(probabilities: Sequence[float]) -> float:
    """How much selectors disagree on a pair, in nats: the entropy of their mean minus the mean of their entropies.

    probabilities: of each selector, that A is better. 0 where all say the same, however unsure each of them is; log 2 where
    they are sure and split evenly (Houlsby et al. 2011, BALD). Of a single selector its entropy: how unsure it is.
    """
    mean = sum(probabilities) / len(probabilities)
    if len(probabilities) == 1:
        return _entropy(mean)
    return max(0.0, _entropy(mean) - sum(_entropy(p) for p in probabilities) / len(probabilities))


def _entropy(p: float) -> float:
    """Nats of a coin."""
    return -sum(q * math.log(q) for q in (p, 1 - p) if q > 0)


def _answers(events: Sequence[Event]) -> list[Event]:
    """Judgements and skips that stand."""
    return [event for event in events if event.kind in ("judged", "skipped") and not event.undone]
