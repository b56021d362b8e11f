"""Which numbers of a row go to a tracker, and under which names. Never a text, never anything that is kept by client."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

__all__ = ["scalars"]

COUNTERS = ("round", "step")
"""What a row is about: this is its place on the axis, not a curve."""
ENTERED = ("metrics", "validation", "delta_norm", "selectors", "policy", "length")
"""The tables inside a row whose numbers are forwarded. A table that is not named here is left alone: most of them are by
client (``adapter_of``, ``grouping``, ``clients``), and a new one is not forwarded before somebody has looked at it."""
BY_NAME = ("rows", "judges")
"""Lists of tables in ``evaluation.json``, each with a name of its own."""
INTERVALS = ("interval",)
COUNTED = ("cohort", "refused")
"""By client: forwarded is how many there are."""
UNNAMED = ("metrics", *BY_NAME)
"""These add nothing to a name."""


def scalars(stage: str, row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of one row of ``metrics.jsonl`` or ``alignment.jsonl``, or of ``evaluation.json``, by name.

    >>> scalars("selectors", {"round": 3, "cohort": ["ann"], "metrics": {"validation": {"accuracy": 0.5}}})
    {'selectors/num_cohort': 1.0, 'selectors/validation/accuracy': 0.5}
    """
    return _numbers(stage, {key: value for key, value in row.items() if key not in COUNTERS})


def _numbers(place: str, table: Mapping[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in table.items():
        name = place if key in UNNAMED else f"{place}/{key}"
        if isinstance(value, bool | int | float) and math.isfinite(value):
            found[name] = float(value)
        elif key in ENTERED and isinstance(value, Mapping):
            found |= _numbers(name, value)
        elif key in BY_NAME and isinstance(value, list):
            for one in value:
                found |= _numbers(f"{name}/{_slug(one['name'])}", one)
        elif key in INTERVALS and value:
            found |= {f"{name}_low": float(value[0]), f"{name}_high": float(value[1])}
        elif key in COUNTED:
            found[f"{place}/num_{key}"] = float(len(value))
    return found


def _slug(name: str) -> str:
    """``the selectors' vote`` as ``the-selectors-vote``: what every tracker takes in a name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("'", "")).strip("-")
