"""The figure of ``--task perplexity``: does the policy get better, or only better at pleasing the selectors?"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedbiscuit.report.canvas import Drawing, colour, draw, percents, whole_numbers
from fedbiscuit.report.judgements import by_step
from fedbiscuit.report.markup import percent, shortened, visible
from fedbiscuit.report.reading import RunView

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["signs_of_hacking"]

STYLES = ((0, (5, 1.5)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))


def signs_of_hacking(run: RunView) -> Drawing | None:
    """Win rates by step, and below them distance, perplexities and length. From three policies on."""
    found = run.tasks.get("perplexity") or {}
    policies = found.get("policies") or []
    if len(policies) < 3:
        return None
    judged = by_step(run.judged)
    rows = [
        {**row, "judges": [*row["judges"], *(one for one in judged if one["step"] == row["step"])]} for row in policies
    ]
    last = rows[-1]
    said = "; ".join(f"{percent(judge['win_rate'], 0)} by {judge['name']}" for judge in last["judges"])
    label = f"Line charts from the raw policy to {last['name']}, {last['kl']:.1f} nats away: {said or 'no judges'}."
    unit = str(found.get("unit", "step"))
    names = list(dict.fromkeys(str(judge["name"]) for row in rows for judge in row["judges"]))
    height = 480 + (150 + 22 * len(names)) * bool(names)
    svg = draw("signs", label, height, lambda figure: _signs(figure, rows, names, unit))
    caption = (
        "Win rates against the raw policy: solid is who labeled, dashed are the other judges. A gap that opens means that the "
        "policy exploits the selectors. Below: how far it has moved, how odd its answers are to the raw policy, how odd "
        "people’s preferred answers are to it, and how long its answers are."
    )
    return Drawing("signs", "Signs of reward hacking", svg, caption)


def _signs(figure: Figure, rows: Sequence[Mapping[str, Any]], names: Sequence[str], unit: str) -> None:
    steps = [row["step"] for row in rows]
    lines = {
        "nats from the raw policy, an answer": [row["kl"] for row in rows],
        "perplexity of its answers under the raw policy": [row["answers_under_raw"]["perplexity"] for row in rows],
    }
    if all(row["people_under_policy"] for row in rows):
        values = [row["people_under_policy"]["perplexity"] for row in rows]
        lines["perplexity of people’s answers under it"] = values
    lines["words an answer"] = [row["words"] for row in rows]
    heights = [*([1.6] if names else []), *[1.0] * len(lines)]
    panels = list(figure.subplots(len(heights), 1, sharex=True, height_ratios=heights))
    panels[-1].set_xlabel(unit)
    whole_numbers(panels[-1].xaxis)
    if names:
        _wins(figure, panels.pop(0), rows, names)
    for axes, (title, values) in zip(panels, lines.items(), strict=True):
        axes.plot(steps, values, color=colour("main"), marker="o")
        axes.set_title(title, color=colour("muted"), fontsize=12.5)
        axes.locator_params(axis="y", nbins=3)
        axes.margins(y=0.2)


def _wins(figure: Figure, axes: Axes, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """A line for each judge, from a draw of the raw policy with itself."""
    styles = itertools.cycle(STYLES)
    for name in names:
        judged = [(row["step"], judge) for row in rows for judge in row["judges"] if judge["name"] == name]
        labeled = bool(judged[0][1].get("labeled"))
        axes.plot(
            [rows[0]["step"], *(step for step, _ in judged)], [0.5, *(judge["win_rate"] for _, judge in judged)], marker="o",
            color=colour("main" if labeled else "ink"), linestyle="-" if labeled else next(styles),
            label=shortened(visible(name), 60),
        )  # fmt: skip
    axes.axhline(0.5, color=colour("muted"), linewidth=1.2, linestyle=(0, (4, 3)), zorder=0)
    percents(axes.yaxis)
    axes.set_title("win rate", color=colour("muted"), fontsize=12.5)
    figure.legend(loc="outside upper left")
