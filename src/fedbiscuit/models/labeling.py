"""The selectors choose between the completions of each prompt: pairs with a probability, in TRL's format."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

from fedbiscuit.config import LabelSettings
from fedbiscuit.models.selector import Selector, choice_probability, letter_margins, vote
from fedbiscuit.types import Comparison, Weights

__all__ = ["label_completions"]


def label_completions(
    selector: Selector,
    adapters: Sequence[Weights],
    written: Sequence[Mapping[str, Any]],
    settings: LabelSettings,
    progress: Callable[[int, int], None] = lambda done, total: None,
    fields: Mapping[str, Mapping[str, str]] | None = None,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Preferences from rows of ``completions.jsonl``, and counts of the pairs that were left out, by reason.

    ``fields``: by prompt, what the template may show of it beside its text.

    Every pair of different, not empty completions of a prompt is read by every selector in both orders, and the vote
    decides, with its probability: p > 0.5 makes A the chosen one, p < 0.5 makes B the chosen one (mistake 1).
    """
    left_out = {
        "empty completion": 0,
        "equal completions": 0,
        "longer than max_tokens": 0,
        "too close to call": 0,
        "tie": 0,
    }
    pairs: list[tuple[int, int, int]] = []
    encoded = []
    for row, entry in enumerate(written):
        texts = [completion["text"] for completion in entry["completions"]]
        for a, b in combinations(range(len(texts)), 2):
            if not texts[a] or not texts[b]:
                left_out["empty completion"] += 1
            elif texts[a] == texts[b]:
                left_out["equal completions"] += 1
            else:
                meta = {"fields": (fields or {}).get(entry["prompt"], {})}
                fitting, _ = selector.encode([Comparison(entry["prompt"], texts[a], texts[b], meta=meta)])
                if fitting:
                    pairs.append((row, a, b))
                    encoded += fitting
                else:
                    left_out["longer than max_tokens"] += 1
    if not pairs:
        return [], left_out
    per_prompt = max(1, len(pairs) // max(1, len({row for row, _, _ in pairs})))
    margins = letter_margins(
        selector, adapters, encoded, settings.batch_size * per_prompt, progress=lambda done: progress(done, len(pairs))
    )
    probabilities = choice_probability(margins, settings.temperature, settings.orders)
    said = vote(probabilities, settings.vote)
    chosen_pairs = range(len(pairs)) if settings.pairs == "all" else _extremes(pairs, said.probability.tolist())
    rows = []
    for i in chosen_pairs:
        (row, a, b), p = pairs[i], float(said.probability[i])
        if p == 0.5:
            left_out["tie"] += 1
        elif abs(p - 0.5) < settings.min_margin:
            left_out["too close to call"] += 1
        else:
            better, worse = (a, b) if p > 0.5 else (b, a)
            good, bad = (written[row]["completions"][k] for k in (better, worse))
            rows.append(
                {
                    "prompt": written[row]["prompt"],
                    "chosen": good["text"],
                    "rejected": bad["text"],
                    "probability": max(p, 1 - p),
                    "disagreement": float(said.disagreement[i]),
                    "chosen_token_ids": good["token_ids"],
                    "rejected_token_ids": bad["token_ids"],
                }
            )
    return rows, left_out


def _extremes(pairs: Sequence[tuple[int, int, int]], probabilities: Sequence[float]) -> list[int]:
    """For each prompt the pair of its best and its worst completion, by the mean probability against all others."""
    chosen = []
    for row in sorted({row for row, _, _ in pairs}):
        mine = [i for i, pair in enumerate(pairs) if pair[0] == row]
        points: dict[int, list[float]] = {}
        for i in mine:
            _, a, b = pairs[i]
            points.setdefault(a, []).append(probabilities[i])
            points.setdefault(b, []).append(1 - probabilities[i])
        ranked = sorted(points, key=lambda k: sum(points[k]) / len(points[k]))
        ends = {ranked[0], ranked[-1]}
        chosen += [i for i in mine if set(pairs[i][1:]) == ends]
    return chosen
