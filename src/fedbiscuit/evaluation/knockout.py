"""Best of n by knock-out: neighbours meet, the better one goes on, until one is left."""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["knock_out"]

Match = tuple[int, int, int]
"""(field, first, second): which field, and the numbers of the two that meet in it."""


def knock_out(sizes: Sequence[int], prefer: Callable[[list[Match]], Sequence[float]]) -> list[int]:
    """The winner's number, counted from 0, in each field of ``sizes[i]`` entrants; size - 1 matches a field.

    ``prefer`` is asked once a turn for the matches of all fields: the probability that the first of each is better. At
    0.5 the one with the lower number goes on; the last of an odd field waits for the next turn.
    """
    if min(sizes, default=1) < 1:
        raise ValueError("every field needs an entrant")
    left = [list(range(size)) for size in sizes]
    while any(len(field) > 1 for field in left):
        matches = [
            (number, field[i], field[i + 1]) for number, field in enumerate(left) for i in range(0, len(field) - 1, 2)
        ]
        winners: list[list[int]] = [[] for _ in left]
        for (number, first, second), p in zip(matches, prefer(matches), strict=True):
            winners[number].append(first if p >= 0.5 else second)
        left = [won + field[len(won) * 2 :] for won, field in zip(winners, left, strict=True)]
    return [field[0] for field in left]
