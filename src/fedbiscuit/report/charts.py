"""Figures of the results: clients, calibration, DPO, win rate. Each is a function of the run, or None without data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedbiscuit.report.canvas import Drawing, colour, colour_of, draw, marker_of, percents, whole_numbers
from fedbiscuit.report.judgements import LAST, by_step
from fedbiscuit.report.markup import count, name_on_axis, percent, shortened, visible
from fedbiscuit.report.reading import RunView

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["accuracy_by_client", "alignment_by_step", "calibration_curve", "win_rates"]

MAX_NAMED = 40
"""With more clients than this, dots are ranked and not named."""


def accuracy_by_client(run: RunView) -> Drawing | None:
    """Each client's selector against the rule "the longer answer is better", on its test comparisons."""
    clients = run.selectors.get("clients") or {}
    if len(clients) < 2:
        return None
    grouped = run.has_groups
    order = sorted(clients, key=lambda c: (clients[c]["adapter"] if grouped else 0, -clients[c]["accuracy"], c))
    if len(clients) > MAX_NAMED:
        order = sorted(clients, key=lambda c: (-clients[c]["accuracy"], c))
    better = sum(one["accuracy"] > one["baseline_longer"] for one in clients.values())
    worst = min(one["accuracy"] for one in clients.values())
    said = f"The selector beats the longer answer for {better} of {count(len(clients), 'client')}."
    label = f"Dot plot of test accuracy for each client. {said} The lowest accuracy is {percent(worst, 0)}."
    height = 96 + 19 * len(clients) if len(clients) <= MAX_NAMED else 460
    svg = draw("clients", label, height, lambda figure: _clients(figure, order, clients, grouped))
    caption = f"Test accuracy of the selector that each client uses, against always taking the longer answer. {said}"
    return Drawing("clients", "Agreement with each client", svg, caption)


def _clients(figure: Figure, order: Sequence[str], clients: Mapping[str, Any], grouped: bool) -> None:
    axes = figure.subplots()
    named = len(order) <= MAX_NAMED
    size = 7.0 if named else 4.0
    rows = [(y, clients[client]) for y, client in enumerate(order)]
    if named:
        for y, one in rows:
            axes.plot([one["baseline_longer"], one["accuracy"]], [y, y], color=colour("grid"), linewidth=3, zorder=1)
    axes.plot(
        [one["baseline_longer"] for _, one in rows], [y for y, _ in rows], linestyle="", marker="o", markersize=size - 1,
        markerfacecolor=colour("card"), markeredgecolor=colour("muted"), markeredgewidth=1.4, label="longer answer",
    )  # fmt: skip
    for u in sorted({one["adapter"] for one in clients.values()}) if grouped else [0]:
        shade = colour_of(u) if grouped else colour("main")
        mine = [(one["accuracy"], y) for y, one in rows if not grouped or one["adapter"] == u]
        axes.plot(
            *zip(*mine, strict=True), linestyle="", marker=marker_of(u), markersize=size, color=shade, zorder=3,
            label=f"selector u{u}" if grouped else "selector",
        )  # fmt: skip
    axes.axvline(0.5, color=colour("muted"), linewidth=1.2, linestyle=(0, (4, 3)), zorder=0)
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    if named:
        axes.set_yticks(range(len(order)), [name_on_axis(c) for c in order])
    else:
        axes.set_yticks([])
        axes.set_ylabel(f"{len(order)} clients, best at the top")
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.set_xlim(right=1.02)
    axes.set_xlabel("share of choices agreed with")
    percents(axes.xaxis)
    figure.legend(loc="outside upper left", ncols=3, handletextpad=0.2)


def calibration_curve(run: RunView) -> Drawing | None:
    """How often the selector is right when it is this sure."""
    bins = [b for b in run.selectors.get("calibration") or [] if b.get("count")]
    if len(bins) < 2:
        return None
    rows = run.selectors.get("rows") or [{}]
    error = rows[0].get("calibration_error")
    means = "" if error is None else f" On average the two differ by {100 * error:.1f} points."
    label = f"Calibration curve with {len(bins)} points; the diagonal is ideal.{means}"
    svg = draw("calibration", label, 330, lambda figure: _calibration(figure, bins))
    caption = (
        "How often the selector is right, by how sure it says it is; on the diagonal it says so rightly, below it is "
        f"too sure. Under it: how many comparisons.{means}"
    )
    return Drawing("calibration", "Calibration", svg, caption)


def _calibration(figure: Figure, bins: Sequence[Mapping[str, float]]) -> None:
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    sure = [b["p"] for b in bins]
    axes.plot([0.5, 1], [0.5, 1], color=colour("muted"), linewidth=1.2, linestyle=(0, (4, 3)))
    axes.plot(sure, [b["accuracy"] for b in bins], color=colour("main"), marker="o")
    axes.set_ylabel("right")
    percents(axes.yaxis, 0.1)
    below.bar(sure, [b["count"] for b in bins], width=0.034, color=colour("main"), alpha=0.55, linewidth=0)
    below.grid(visible=False)
    below.set_yticks([max(b["count"] for b in bins)])
    below.set_xlim(0.485, 1.015)
    below.set_xlabel("sure")
    percents(below.xaxis, 0.1)


def alignment_by_step(run: RunView) -> Drawing | None:
    """DPO's loss, margin and accuracy by step."""
    rows = run.alignment
    if len(rows) < 2:
        return None
    tail = rows[-max(1, len(rows) // 10) :]
    accuracy, margin = (sum(row[key] for row in tail) / len(tail) for key in ("accuracy", "margin"))
    label = f"Three line charts over {len(rows)} DPO steps. At the end the margin is {margin:+.2f}."
    svg = draw("alignment", label, 400, lambda figure: _alignment(figure, rows))
    caption = (
        f"In the last steps the policy prefers the chosen answer in {percent(accuracy, 0)} of pairs, by a margin of "
        f"{margin:+.2f}. Thin: each step; thick: mean of the steps around it; dashed: a policy that has learned nothing."
    )
    return Drawing("alignment", "Alignment of the policy (DPO)", svg, caption)


def _alignment(figure: Figure, rows: Sequence[Mapping[str, Any]]) -> None:
    panels = figure.subplots(3, 1, sharex=True)
    steps = [row["step"] for row in rows]
    reach = len(rows) // 20
    named = (("loss", "loss (nats)", math.log(2)), ("margin", "margin (nats)", 0.0), ("accuracy", "accuracy", 0.5))
    for axes, (key, title, start) in zip(panels, named, strict=True):
        values = [row[key] for row in rows]
        smooth = [_mean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]
        axes.axhline(start, color=colour("muted"), linewidth=1.2, linestyle=(0, (4, 3)))
        if reach:
            axes.plot(steps, values, color=colour("main"), linewidth=0.9, alpha=0.4)
        axes.plot(steps, smooth, color=colour("main"), linewidth=2.2)
        axes.set_title(title, color=colour("muted"), fontsize=12.5)
        axes.locator_params(axis="y", nbins=4)
    percents(panels[-1].yaxis, 0.5)
    panels[-1].set_ylim(-0.05, 1.05)
    panels[-1].set_xlabel("step")
    whole_numbers(panels[-1].xaxis)


def win_rates(run: RunView) -> Drawing | None:
    """The aligned policy against the raw one by each judge; by step where checkpoints were judged."""
    others = by_step(run.judged)
    judges = [*(run.policy.get("judges") or []), *(one for one in others if one["policy"] == LAST)]
    checkpoints = run.policy.get("checkpoints") or []
    if not judges:
        return None
    unit = "DPO step" if run.cfg.selectors.local.objective == "choice" else "round"
    said = "; ".join(f"{percent(judge['win_rate'], 0)} by {judge['name']}" for judge in judges)
    height = 80 + 56 * len(judges) + 190 * len(_along(checkpoints, others))
    svg = draw(
        "wins",
        f"Win rate of the aligned policy: {said}.",
        height,
        lambda f: _wins(f, judges, checkpoints, others, unit),
    )
    caption = "Share of held-out prompts on which the aligned policy’s answer wins (ties half), with 95% intervals."
    return Drawing("wins", "Aligned against raw policy", svg, caption)


def _along(checkpoints: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What checkpoints have a number for, and how it is called; ``others`` have a win rate alone."""
    if len(checkpoints) < 2:
        return {"win_rate": "win rate"} if len(others) > 1 else {}
    named = {"win_rate": "win rate", "words": "words an answer", "kl": "nats from the raw policy, an answer"}
    return {key: name for key, name in named.items() if all(key in c for c in checkpoints)}


def _wins(
    figure: Figure,
    judges: Sequence[Mapping[str, Any]],
    checkpoints: Sequence[Mapping[str, Any]],
    others: Sequence[Mapping[str, Any]],
    unit: str,
) -> None:
    along = _along(checkpoints, others)
    heights = (56 * len(judges) + 30, *[190] * len(along))
    panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)
    axes = panels[0, 0]
    for y, judge in enumerate(judges):
        low, high = judge.get("interval") or (judge["win_rate"], judge["win_rate"])
        axes.plot([low, high], [y, y], color=colour("main"), linewidth=3, solid_capstyle="round")
        axes.plot(judge["win_rate"], y, color=colour("main"), marker="o", markersize=9)
        axes.annotate(
            f"{shortened(visible(str(judge['name'])), 60)}: {percent(judge['win_rate'], 0)}", (0, y), (2, 14),
            xycoords=("axes fraction", "data"), textcoords="offset points", va="center", color=colour("ink"),
            bbox={"facecolor": colour("card"), "edgecolor": "none", "pad": 1.5},
        )  # fmt: skip
    axes.axvline(0.5, color=colour("muted"), linewidth=1.2, linestyle=(0, (4, 3)), zorder=0)
    axes.set_yticks([])
    axes.set_ylim(len(judges) - 0.6, -0.75)
    axes.set_xlim(0, 1)
    axes.grid(visible=True, axis="x")
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "raw wins", "draw", "aligned wins", "100%"])
    axes.tick_params(axis="x", length=0)
    for row, (key, name) in enumerate(along.items(), 1):
        _by_step(panels[row, 0], [*checkpoints, *others] if key == "win_rate" else checkpoints, key, name)
    if along:
        panels[-1, 0].set_xlabel(unit)


def _by_step(axes: Axes, checkpoints: Sequence[Mapping[str, Any]], key: str, name: str) -> None:
    """A number of the checkpoints by step; the win rate has a line for each judge, the others are the same for all."""
    judges = sorted({str(c["name"]) for c in checkpoints})[: None if key == "win_rate" else 1]
    styles = ("-", (0, (5, 1.5)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
    for judge, style in zip(judges, itertools.cycle(styles), strict=False):
        rows = [c for c in checkpoints if c["name"] == judge]
        axes.plot(
            [c["step"] for c in rows], [c[key] for c in rows], color=colour("main"), marker="o", linestyle=style,
            label=shortened(visible(judge), 60),
        )  # fmt: skip
    if key == "win_rate":
        axes.axhline(0.5, color=colour("muted"), linewidth=1.2, linestyle=(0, (4, 3)))
        percents(axes.yaxis)
    if len(judges) > 1:
        axes.legend()
    axes.set_title(name, color=colour("muted"), fontsize=12.5)
    whole_numbers(axes.xaxis)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
