"""Which of two policies is preferred: wins, losses, ties, and how sure one can be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedbiscuit.evaluation.metrics import bootstrap_interval

__all__ = ["points_of", "strict_win_rate", "win_rate"]


def win_rate(
    name: str, probabilities: Sequence[float], key: tuple[object, ...], resamples: int = 1000
) -> dict[str, Any]:
    """One judge's verdict. probabilities: for each prompt, that the first policy's answer is better; 0.5 is a tie.

    win_rate = (wins + ties / 2) / prompts, with its 95% bootstrap interval over prompts.
    """
    points = list(map(points_of, probabilities))
    return {
        "name": name,
        "win_rate": sum(points) / len(points),
        "interval": bootstrap_interval(points, (*key, name), resamples),
        "wins": points.count(1.0),
        "losses": points.count(0.0),
        "ties": points.count(0.5),
    }


def points_of(probability: float) -> float:
    """1 a win of the first policy, 0 a loss, 0.5 a tie."""
    return 1.0 if probability > 0.5 else 0.5 if probability == 0.5 else 0.0


def strict_win_rate(points: Sequence[float], key: tuple[object, ...], resamples: int = 1000) -> dict[str, Any]:
    """Of a language model's verdicts: 1 a win, 0 a loss, 0.5 a tie, for each prompt.

    win_rate = wins / (wins + losses + ties), with its 95% bootstrap interval over prompts; ``win_rate_ties_half`` and its
    interval count a tie as half a win, as ``win_rate`` does.
    """
    wins = [float(p == 1.0) for p in points]
    return {
        "win_rate": sum(wins) / len(wins),
        "interval": bootstrap_interval(wins, key, resamples),
        "win_rate_ties_half": sum(points) / len(points),
        "interval_ties_half": bootstrap_interval(points, key, resamples),
        "wins": points.count(1.0),
        "losses": points.count(0.0),
        "ties": points.count(0.5),
    }
