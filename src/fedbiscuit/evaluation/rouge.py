"""ROUGE of summaries against those that people wrote, by Google's ``rouge-score``; intervals by our own resampling."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from fedbiscuit.evaluation.metrics import bootstrap_interval
from fedbiscuit.types import EnvironmentFault

__all__ = ["KINDS", "Scorer", "lead", "rouge", "rouge_scorer", "sentences"]

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
"""Words, pairs of words, longest common order of words over the whole text, and the same sentence by sentence."""
Scorer = Callable[[str, str], Any]
"""(reference, summary) to precision, recall and fmeasure by kind."""
SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+|\n+")


def rouge_scorer() -> Scorer:
    """The scorer of ``rouge-score`` with Porter's stemming; ``EnvironmentFault`` where the package is missing."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise EnvironmentFault(
            f"ROUGE needs the package rouge-score ({error}); install it: pip install 'fedbiscuit[eval]'"
        ) from None
    score = RougeScorer(list(KINDS), use_stemmer=True).score
    return lambda reference, summary: score("\n".join(sentences(reference)), "\n".join(sentences(summary)))


def sentences(text: str) -> list[str]:
    """A text in sentences, cut behind . ! ? and at line ends: what ROUGE-Lsum takes one by one."""
    return [part.strip() for part in SENTENCE_END.split(text.strip()) if part.strip()]


def lead(text: str, count: int = 3) -> str:
    """The first sentences of a text: the summary that needs no model, to compare with."""
    return " ".join(sentences(text)[:count])


def rouge(
    scorer: Scorer, summaries: Sequence[str], references: Sequence[str], key: tuple[object, ...], resamples: int = 1000
) -> dict[str, dict[str, Any]]:
    """By kind: mean F1 (``f``) over summaries with its 95% interval over them, mean precision and recall; 0 to 1.

    All kinds, and all calls with the same key, draw the same summaries.
    """
    scores = [scorer(reference, summary) for summary, reference in zip(summaries, references, strict=True)]
    result = {}
    for kind in KINDS:
        values = [float(one[kind].fmeasure) for one in scores]
        result[kind] = {
            "f": sum(values) / len(values),
            "interval": bootstrap_interval(values, key, resamples),
            "precision": sum(float(one[kind].precision) for one in scores) / len(scores),
            "recall": sum(float(one[kind].recall) for one in scores) / len(scores),
        }
    return result
