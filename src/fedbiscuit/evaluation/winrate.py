"""Which of two policies is preferred: wins, losses, ties, and how sure one can be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedbiscuit.evaluation.metrics import bootstrap_interval

__all__ = ["win_rate"]


def win_rate(
    name: str, probabilities: Sequence[float], key: tuple[object, ...], resamples: int = 1000
) -> dict[str, Any]:
    """One judge's verdict. probabilities: for each prompt, that the first policy's answer is better; 0.5 is a tie.

    win_rate = (wins + ties / 2) / prompts, with its 95% bootstrap interval over prompts.
    """
    points = [1.0 if p > 0.5 else 0.5 if p == 0.5 else 0.0 for p in probabilities]
    return {
        "name": name,
        "win_rate": sum(points) / len(points),
        "interval": bootstrap_interval(points, (*key, name), resamples),
        "wins": points.count(1.0),
        "losses": points.count(0.0),
        "ties": points.count(0.5),
    }
