"""The figure of ``--task perplexity``: does the policy get better, or only better at pleasing the selectors?"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedbiscuit.report.canvas import Drawing, colour, draw, percents, whole_numbers
from fedbiscuit.report.markup import percent, shortened, visible
from fedbiscuit.report.reading import RunView

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["signs_of_hacking"]

STYLES = ((0, (5, 1.5)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))


def signs_of_hacking(run: RunView) -> Drawing | None:
    """Win rates by the distance from the raw policy; perplexities and length by step. From three policies on."""
    found = run.tasks.get("perplexity") or {}
    rows = found.get("policies") or []
    if len(rows) < 3:
        return None
    last = rows[-1]
    said = "; ".join(f"{percent(judge['win_rate'], 0)} by {judge['name']}" for judge in last["judges"])
    label = f"Line charts from the raw policy to {last['name']}, {last['kl']:.1f} nats away: {said or 'no judges'}."
    shown = [row for row in rows if row["judges"]]
    height = 470 + 22 * len(_judges(shown)) if shown else 400
    svg = draw("signs", label, height, lambda figure: _signs(figure, rows, shown, str(found.get("unit", "step"))))
    caption = (
        "Above: win rate against the raw policy by the distance from it; thick: who labeled, dashed: the other judges. A gap "
        "that opens means that the policy exploits the selectors. Below: perplexity of its answers under the raw policy "
        "(thick) and of people's preferred answers under it (dashed), and the length of its answers."
    )
    return Drawing("signs", "Signs of reward hacking", svg, caption)


def _judges(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(str(judge["name"]) for row in rows for judge in row["judges"]))


def _signs(figure: Figure, rows: Sequence[Mapping[str, Any]], shown: Sequence[Mapping[str, Any]], unit: str) -> None:
    panels = list(figure.subplots(3 if shown else 2, 1))
    if shown:
        _wins(figure, panels.pop(0), shown)
    perplexity, length = panels
    steps = [row["step"] for row in rows]
    perplexity.plot(steps, [row["answers_under_raw"]["perplexity"] for row in rows], color=colour("main"), marker="o")
    if all(row["people_under_policy"] for row in rows):
        values = [row["people_under_policy"]["perplexity"] for row in rows]
        perplexity.plot(steps, values, color=colour("ink"), marker="s", linestyle=STYLES[0])
    perplexity.set_title("perplexity", color=colour("muted"), fontsize=12.5)
    length.plot(steps, [row["words"] for row in rows], color=colour("main"), marker="o")
    length.set_title("words an answer", color=colour("muted"), fontsize=12.5)
    length.set_xlabel(unit)
    for axes in (perplexity, length):
        whole_numbers(axes.xaxis)
        axes.locator_params(axis="y", nbins=4)


def _wins(figure: Figure, axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    by_distance = sorted(rows, key=lambda row: row["kl"])
    styles = itertools.cycle(STYLES)
    for name in _judges(rows):
        points = [(row["kl"], judge) for row in by_distance for judge in row["judges"] if judge["name"] == name]
        labeled = name == rows[0]["judges"][0]["name"] and not points[0][1]["independent"]
        axes.plot(
            [0, *(kl for kl, _ in points)], [0.5, *(judge["win_rate"] for _, judge in points)], marker="o",
            color=colour("main" if labeled else "ink"), linestyle="-" if labeled else next(styles),
            label=shortened(visible(name), 60),
        )  # fmt: skip
    axes.axhline(0.5, color=colour("muted"), linewidth=1.2, linestyle=(0, (4, 3)), zorder=0)
    percents(axes.yaxis)
    axes.set_title("win rate, by nats from the raw policy", color=colour("muted"), fontsize=12.5)
    figure.legend(loc="outside upper left")
