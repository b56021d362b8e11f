"""The demo world: clients whose tastes are known, so that a result can be checked against the truth.

Clients judge answers to everyday questions: brief or thorough, in a plain or a warm tone. Two groups of equal size
agree about length (both want it brief) and disagree about tone (group 0 wants it warm, group 1 plain). Of a client's
comparisons two thirds differ in tone alone, one sixth in length alone and one sixth in both; where both differ, length
decides. So no single taste fits all clients, and what the majority wants of the policy is brevity.

The three splits ask different questions: a test question occurs in no client's training. Everything is a function of
the settings and the seed. The texts are the project's own, in ``demo_world.json``.

How far a rule gets on test comparisons, with 5% noise and 240 of them a client (160 differ in tone alone), over seeds 0
to 2; ``tests/unit/test_synthetic.py`` computes these::

    the taste of the client's group            0.95             (the noise)
    the best rule that is one for all clients  0.65
    the shorter answer                         0.64 to 0.66     (0.62 to 0.66 for group 0, 0.66 to 0.68 for group 1)
    the longer answer                          0.34 to 0.36
    words counted, logistic regression         0.85 to 0.87     trained on one group
                                               0.61 to 0.64     trained on all clients
    the best single word, present or absent    0.62 to 0.64     for one group
                                               0.54 to 0.56     for all clients
    the best punctuation mark, likewise        0.65 to 0.71     for one group: "!" for group 0, ":" for group 1
                                               0.56 to 0.58     for all clients
    chance                                     0.50

The shorter answer is as good as any rule for all clients: a selector has to beat it, not the longer one. Flipped choices
are whole ones: with 12 or 18 test comparisons a client one is flipped, so the group's taste gets 11/12 or 17/18.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal, TypeVar

from fedbiscuit.config import DemoSettings
from fedbiscuit.data.taste import TASTES, Truth
from fedbiscuit.types import ClientData, ClientId, Comparison, rng_for

__all__ = ["DemoWorld", "Truth", "demo_world", "texts"]

T = TypeVar("T")

NUM_TEST_QUESTIONS = 20
NUM_VALIDATION_QUESTIONS = 10
NUM_HELD_OUT_ACTIVITIES = 24
DIFFERENCES = ("tone", "tone", "tone", "tone", "length", "both")
"""What the two answers of a comparison differ in, in the proportions of a client's comparisons."""
CLEAR = 0.1
"""The least difference in utility of a comparison, for every group: people are asked what they can tell apart."""


@dataclass(frozen=True, slots=True)
class DemoWorld:
    """All clients with their comparisons, prompts to align on, other prompts to evaluate on, and the truth."""

    clients: dict[ClientId, ClientData]
    prompts: tuple[str, ...]
    held_out_prompts: tuple[str, ...]
    truth: Truth


@cache
def texts() -> Mapping[str, Any]:
    """Questions with brief answers and further detail, phrases by tone, and the parts of the unlabeled prompts."""
    content: Mapping[str, Any] = json.loads(files("fedbiscuit.data").joinpath("demo_world.json").read_text("utf-8"))
    return content


def demo_world(settings: DemoSettings, seed: int) -> DemoWorld:
    """The world of a seed; client ``k`` belongs to group ``k % 2``."""
    group_of = {f"client-{k:02d}": k % len(TASTES) for k in range(settings.num_clients)}
    questions = _shuffled(texts()["questions"], rng_for(seed, "demo", "questions"))
    held_out = NUM_TEST_QUESTIONS + NUM_VALIDATION_QUESTIONS
    pools = (questions[held_out:], questions[NUM_TEST_QUESTIONS:held_out], questions[:NUM_TEST_QUESTIONS])
    sizes = (settings.comparisons_per_client, settings.validation_per_client, settings.test_per_client)
    clients = {
        client: ClientData(
            *(
                _comparisons(client, group, split, pool, size, settings.noise, rng_for(seed, "demo", client, split))
                for split, pool, size in zip(("train", "validation", "test"), pools, sizes, strict=True)
            )
        )
        for client, group in group_of.items()
    }
    activities = _shuffled(texts()["activities"], rng_for(seed, "demo", "activities"))
    train, test = activities[NUM_HELD_OUT_ACTIVITIES:], activities[:NUM_HELD_OUT_ACTIVITIES]
    return DemoWorld(clients, _prompts(train), _prompts(test), Truth(group_of))


def _comparisons(
    client: ClientId,
    group: int,
    split: str,
    questions: Sequence[Mapping[str, Any]],
    count: int,
    noise: float,
    rng: random.Random,
) -> tuple[Comparison, ...]:
    """``count`` different comparisons; the share ``noise`` of the choices, rounded to whole ones, is flipped."""
    differences = _shuffled([DIFFERENCES[i % len(DIFFERENCES)] for i in range(count)], rng)
    better_places: list[Literal[0, 1]] = _shuffled([0 if i % 2 else 1 for i in range(count)], rng)
    flipped = set(rng.sample(range(count), round(noise * count)))
    pool = _shuffled(questions, rng)
    drawn: list[Comparison] = []
    seen: set[tuple[str, str]] = set()
    for i, (difference, place) in enumerate(zip(differences, better_places, strict=True)):
        question = pool[i % len(pool)]
        better, worse = _pair(question, difference, group, rng)
        while (better, worse) in seen:
            better, worse = _pair(question, difference, group, rng)
        seen.add((better, worse))
        a, b = (worse, better) if place else (better, worse)
        choice: Literal[0, 1] = 1 if place != (i in flipped) else 0
        meta = {"group": group, "differ": difference, "flipped": i in flipped}
        name = f"{client}-{split}-{i:03d}"
        drawn.append(Comparison(question["question"], a, b, choice, client, "demo", name, split, meta))
    return tuple(drawn)


def _pair(question: Mapping[str, Any], difference: str, group: int, rng: random.Random) -> tuple[str, str]:
    """Two answers, the one that the group prefers first; the groups disagree exactly where tone alone differs."""
    while True:
        brief, warm = rng.random() < 0.5, rng.random() < 0.5
        first = _answer(question, brief, warm, rng)
        second = _answer(question, brief ^ (difference != "tone"), warm ^ (difference != "length"), rng)
        gains = [
            taste.utility(question["question"], first) - taste.utility(question["question"], second) for taste in TASTES
        ]
        disagree = min(gains) < 0 < max(gains)
        if min(map(abs, gains)) >= CLEAR and disagree == (difference == "tone"):
            return (first, second) if gains[group] > 0 else (second, first)


def _answer(question: Mapping[str, Any], brief: bool, warm: bool, rng: random.Random) -> str:
    """One answer; warm and plain ones have their phrases in the same places, so that only the words differ."""
    tone = "warm" if warm else "plain"
    content = " ".join([rng.choice(question["brief"])] + ([] if brief else [rng.choice(question["more"])]))
    opener, closer = (rng.choice(texts()[f"{tone}_{place}s"]) for place in ("opener", "closer"))
    return f"{opener} {content} {closer}"


def _prompts(activities: Sequence[str]) -> tuple[str, ...]:
    """Every activity in every template, ordered so that the first prompts are about different activities."""
    templates: Sequence[str] = texts()["prompt_templates"]
    return tuple(
        templates[(turn + i) % len(templates)].format(activity)
        for turn in range(len(templates))
        for i, activity in enumerate(activities)
    )


def _shuffled(items: Sequence[T], rng: random.Random) -> list[T]:
    return rng.sample(items, len(items))
