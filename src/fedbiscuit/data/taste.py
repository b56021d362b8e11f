"""What the people of the demo world like, as numbers that are defined for any text.

A taste is a weighted sum of a warmth score and a length score, less a penalty for text that says nothing. The scores
look at the text only, so they also judge what a language model writes, cut off or not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from fedbiscuit.types import ClientId

__all__ = ["TASTES", "Taste", "Truth", "length", "quality", "warmth", "words"]

MIDDLE_LENGTH = 22
"""Words at which the length score is one half; brief answers of the demo world have 13 on average, thorough ones 24."""
USELESS = 4.0
"""Penalty of a text of quality 0; half of it is more than warmth and length together can change, which is 1.6."""
FEWEST_WORDS = 3
"""An answer of fewer words is not a sentence. Whether a sentence makes sense, no score here can tell."""
SAME = 0.005
"""Utilities that are nearer than this are a tie."""

WARM_MARKERS = (
    r"thanks|thank you",
    r"glad(ly)?|delighted|thrilled|excit(ed|ing)",
    r"happy (to|for|that|\w+ing)",
    r"(great|good|lovely|nice|excellent|wonderful|fantastic|adorable) (question|idea|choice|one|plan|job|news)",
    r"hope (this|that|it|you)",
    r"wish(es|ing)?",
    r"best of luck|good luck|fingers crossed|all the best",
    r"feel free|(don't|do not) hesitate|come back|reach(ing)? out|let me know",
    r"you've got this|you got this|you have got this|you can do (it|this)|you('ll| will) (do|be|manage|love|get there)",
    r"believe in you|trust (yourself|me|ing me)|proud|deserve",
    r"rooting for you|here (for you|to help)|i'm (always )?here|i am (always )?here|of help|to assist",
    r"(don't|do not|no need to|never) (worry|feel bad|give up|be nervous|be afraid)|rest easy|hang in there|cheer up",
    r"not alone|been there|we all|all of us|let's|(do|figure|work|tackle) (this|it|that)( out)? together",
    r"sorry (to|that|you|for)|feel for you|i (hear|understand)|aww|i know how",
    r"you're (so |very )?(welcome|right)|you are (so |very )?(welcome|right|on the right)|welcome,",
    r"enjoy|have fun|joy|smile",
    r"(i|i'd|i would|you'll|would) (really )?love|lovely|beautiful",
    r"wonderful|fantastic|amazing|awesome|delightful|adorable|brilliant|incredible",
    r"congratulations|congrats|well done|bravo|kudos|(good|nice) (for|on) you|cheers|keep (up the good|it up|going)",
    r"(my )?dear|my friend|bless|hugs?|warm(ly| wishes| greetings| regards)",
    r"(gentle|kind|patient) (with|to) yourself|treat yourself|take (good )?care|take heart|caring|you care",
    r"(with|my) pleasure|gladly|nice one|so nice|go for it|(big|many) thanks|have a \w+ day|looking forward",
)
MARKER = re.compile(r"\b(?:" + "|".join(f"(?P<m{i}>{marker})" for i, marker in enumerate(WARM_MARKERS)) + r")(?!\w)")
ADDRESS = re.compile(r"\byou(rs?|rself|'\w+)?\b")
KEPT = lru_cache(maxsize=1 << 14)
"""Every answer is looked at by both groups, and many are drawn again."""
WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*|\d+")


def words(text: str) -> list[str]:
    """The words and numbers of a text in lower case."""
    return WORD.findall(_plain(text))


@KEPT
def warmth(text: str) -> float:
    """0 (plain) to 1: how many different warm phrases a text has, and how much it exclaims and addresses the reader.

    One phrase gives 0.63, two give 0.86; the warm answers of the demo world have two, an opener and a closer. Exclamation
    marks and the word "you" count by their rate; each weighs at most 0.4 of a phrase.
    """
    text, num_words = _plain(text), len(words(text))
    if not num_words:
        return 0.0
    phrases = len({match.lastgroup for match in MARKER.finditer(text)})
    exclaimed = min(1.0, 12 * text.count("!") / num_words)
    addressed = min(1.0, 8 * len(ADDRESS.findall(text)) / num_words)
    return 1.0 - math.exp(-phrases - 0.4 * exclaimed - 0.4 * addressed)


@KEPT
def length(text: str) -> float:
    """0 to 1: 0.04 for 10 words, 0.5 for 22, 0.78 for 30, 0.92 for 40."""
    ratio = (len(words(text)) / MIDDLE_LENGTH) ** 4
    return ratio / (1.0 + ratio)


@KEPT
def quality(prompt: str, text: str) -> float:
    """0 (useless) to 1: says something beside the prompt and warm phrases, is not repetitive, is made of words."""
    listed = words(text)
    if len(listed) < FEWEST_WORDS:
        return 0.0
    content = {word for word in words(MARKER.sub(" ", _plain(text))) if len(word) > 3} - set(words(prompt))
    steps = list(pairwise(listed))
    fresh = len(set(steps)) / len(steps) if steps else 1.0
    verbal = sum(map(len, listed)) / len(re.sub(r"\s", "", text))
    return min(1.0, len(content) / 2, fresh / 0.75, verbal / 0.7)


def _plain(text: str) -> str:
    return text.lower().replace("\u2019", "'")


@dataclass(frozen=True, slots=True)
class Taste:
    """How much a group likes warmth and length; a negative weight is dislike."""

    warmth: float
    length: float

    def utility(self, prompt: str, response: str) -> float:
        """What a response to a prompt is worth to this group."""
        liked = self.warmth * warmth(response) + self.length * length(response)
        return liked - USELESS * (1.0 - quality(prompt, response))


TASTES = (Taste(warmth=+0.6, length=-1.0), Taste(warmth=-0.6, length=-1.0))
"""Group 0 wants it warm, group 1 plain; both want it brief, and more so."""


@dataclass(frozen=True, slots=True)
class Truth:
    """Which group a client belongs to, and what each group really prefers."""

    group_of: Mapping[ClientId, int]

    def utility(self, group: int, prompt: str, response: str) -> float:
        """What a response, any text, is worth to the clients of a group, without their noise."""
        return TASTES[group].utility(prompt, response)

    def majority_prefers(self, prompt: str, a: str, b: str) -> float:
        """1.0 if most clients prefer ``a``, 0.0 if ``b``, 0.5 for a tie.

        Even votes, as two groups of equal size and opposite opinion give, are decided by the mean utility of all. There
        warmth cancels, so between useful texts the shorter one is preferred, and equally long ones are a tie.
        """
        gains = [taste.utility(prompt, a) - taste.utility(prompt, b) for taste in TASTES]
        groups = list(self.group_of.values())
        votes = sum(_side(gains[group]) for group in groups)
        side = _side(votes) or _side(sum(gains[group] for group in groups) / max(1, len(groups)))
        return (1 + side) / 2


def _side(gain: float) -> int:
    return 0 if abs(gain) < SAME else (1 if gain > 0 else -1)
