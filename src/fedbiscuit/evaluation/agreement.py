"""How a rule agrees with labelled pairs: over all of them, by subset and by client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedbiscuit.evaluation.metrics import FEWEST, Judged, bootstrap_interval

__all__ = ["agreement", "parts_of"]


def parts_of(names: Sequence[str | None]) -> dict[str, list[int]]:
    """The places of each name, names sorted; what has none is in no part."""
    parts: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        if name is not None:
            parts.setdefault(name, []).append(place)
    return dict(sorted(parts.items()))


def agreement(
    name: str,
    judged: Judged,
    by: Mapping[str, Mapping[str, Sequence[int]]],
    key: tuple[object, ...],
    resamples: int = 1000,
) -> dict[str, Any]:
    """One rule. ``by``: for each way to divide the pairs, such as "subset", the places of each part.

    Over all pairs: accuracy with its 95% interval over pairs, in each order alone, flip rate. For each way the same of
    each part, and ``mean``: the mean over parts, with its interval over parts (None for fewer than five).
    """
    row: dict[str, Any] = {"name": name, **_numbers(judged, range(len(judged.choice)), (*key, name), resamples)}
    for way, parts in by.items():
        if not parts:
            continue
        found = {part: _numbers(judged, places, (*key, name, way, part), resamples) for part, places in parts.items()}
        values = [one["accuracy"] for one in found.values()]
        interval = bootstrap_interval(values, (*key, name, way), resamples) if len(values) >= FEWEST else None
        row[way] = {"mean": {"accuracy": float(np.mean(values)), "interval": interval}, "parts": found}
    return row


def _numbers(judged: Judged, places: Sequence[int], key: tuple[object, ...], resamples: int) -> dict[str, Any]:
    mine = list(places)
    correct = judged.correct[mine]
    return {
        "accuracy": float(correct.mean()),
        "interval": bootstrap_interval(correct.tolist(), key, resamples) if len(mine) >= FEWEST else None,
        "accuracy_in_order": judged.in_order[mine].mean(axis=0).tolist(),
        "flip_rate": float(judged.flipped[mine].mean()),
        "pairs": len(mine),
    }
