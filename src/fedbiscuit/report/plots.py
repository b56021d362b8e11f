"""Figures of the federated phase: what changes from round to round. Each is a function of the run, or None without data."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from fedbiscuit.report.canvas import Drawing, colour, colour_of, draw, percents, whole_numbers
from fedbiscuit.report.markup import count, name_on_axis, percent
from fedbiscuit.report.reading import RunView, validation_series
from fedbiscuit.report.words import GLOBAL
from fedbiscuit.rundir.disk import human_bytes
from fedbiscuit.types import ClientId

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["accuracy_by_round", "bytes_by_round", "flips_by_round", "groups_over_time"]

MAX_STRIPS = 60
"""With more clients than this, groups are shown by their size."""


def accuracy_by_round(run: RunView) -> Drawing | None:
    """Validation accuracy of the selectors and, where there is one, of the global selector."""
    series = validation_series(run.rounds, "accuracy")
    if len(series) < 2:
        return None
    (first, start), (last, end) = series[0], series[-1]
    label = f"Line chart. Validation accuracy: {percent(start)} after round {first}, {percent(end)} after round {last}."
    svg = draw("accuracy", label, 300, lambda figure: _accuracy(figure, run))
    return Drawing("accuracy", "Agreement with people, by round", svg, f"{_spread_words(run)}{_marks_words(run)}")


def _accuracy(figure: Figure, run: RunView) -> None:
    axes = figure.subplots()
    clients = [(number, sorted(found.values())) for number, found in validation_series(run.rounds, "clients")]
    if clients and min(len(found) for _, found in clients) >= 5:
        numbers = [number for number, _ in clients]
        low, high = ([_at(found, share) for _, found in clients] for share in (0.1, 0.9))
        axes.fill_between(numbers, low, high, color=colour("main"), alpha=0.15, linewidth=0)
    _both(figure, axes, run, "accuracy")
    axes.axhline(0.5, color=colour("muted"), linewidth=1.2, linestyle=(0, (4, 3)))
    axes.annotate(
        "chance", (1, 0.5), (-2, 3), xycoords=("axes fraction", "data"), textcoords="offset points", ha="right",
        color=colour("muted"), fontsize=12,
    )  # fmt: skip


def flips_by_round(run: RunView) -> Drawing | None:
    """How often a selector changes its mind when the two answers swap places."""
    series = validation_series(run.rounds, "flip_rate")
    if len(series) < 2:
        return None
    (first, start), (last, end) = series[0], series[-1]
    label = f"Line chart. Flip rate: {percent(start)} after round {first}, {percent(end)} after round {last}."
    svg = draw("flips", label, 260, lambda figure: _flips(figure, run))
    caption = "How often a selector says otherwise when the two answers change places. Lower is better, 0 is ideal."
    return Drawing("flips", "Flips with the order of the answers", svg, caption)


def _flips(figure: Figure, run: RunView) -> None:
    axes = figure.subplots()
    _both(figure, axes, run, "flip_rate")
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])


def bytes_by_round(run: RunView) -> Drawing | None:
    """What went over the network: each round, and together."""
    if len(run.rounds) < 2 or not run.total("bytes_down"):
        return None
    up, down = _bytes_text(run.total("bytes_up")), _bytes_text(run.total("bytes_down"))
    label = f"Two line charts. In all, {up} went up from clients and {down} down to them."
    svg = draw("bytes", label, 340, lambda figure: _bytes(figure, run))
    caption = f"All clients together: {up} up to the server, {down} down to clients. Peaks are regroupings."
    if not run.groupings:
        caption = caption.removesuffix(" Peaks are regroupings.")
    return Drawing("bytes", "Network traffic", svg, caption)


def _bytes(figure: Figure, run: RunView) -> None:
    from matplotlib.ticker import MaxNLocator

    each, together = figure.subplots(2, 1, sharex=True)
    numbers = [row["round"] + 1 for row in run.rounds]
    edges = [numbers[0] - 0.5, *(n + 0.5 for n in numbers)]
    for key, name, shade, style in (("bytes_down", "down", "main", "-"), ("bytes_up", "up", "ink", (0, (5, 1.5)))):
        values = [row.get(key, 0) for row in run.rounds]
        if key == "bytes_down":
            each.stairs(values, edges, fill=True, color=colour(shade), alpha=0.3, linewidth=0)
        each.stairs(values, edges, baseline=None, color=colour(shade), linestyle=style, linewidth=2.0, label=name)
        together.plot(numbers, list(accumulate(values)), color=colour(shade), linestyle=style)
    for axes, title in ((each, "each round"), (together, "sum so far")):
        axes.set_title(title, color=colour("muted"), fontsize=12.5)
        axes.set_ylim(0, 1.06 * axes.get_ylim()[1])
        axes.yaxis.set_major_formatter(lambda value, _: _bytes_text(round(value)))
        axes.yaxis.set_major_locator(MaxNLocator(4))
    together.set_xlim(edges[0], edges[-1])
    together.set_xlabel("round")
    whole_numbers(together.xaxis)
    figure.legend(loc="outside upper left", ncols=2)


def _bytes_text(size: int) -> str:
    return human_bytes(size).replace(".0 ", " ") if size else "0"


def groups_over_time(run: RunView) -> Drawing | None:
    """Which adapter each client had after each regrouping; with very many clients, how many had which."""
    groupings = run.groupings
    if not groupings or not run.has_groups or run.cfg.selectors.grouping == "fixed":
        return None
    last = groupings[-1][1]
    clients = sorted({c for _, grouping in groupings for c in grouping}, key=lambda c: (last.get(c, 99), c))
    moved = [sum(a.get(c) != b.get(c) for c in b if c in a) for (_, a), (_, b) in pairwise(groupings)]
    *sizes, size = [str(sum(u == v for v in last.values())) for u in range(run.num_adapters)]
    now = f"The last groups have {', '.join(sizes)} and {size} clients."
    stability = (
        f" At the last of {len(groupings)} groupings, {count(moved[-1], 'client') if moved[-1] else 'nobody'} moved."
        if moved
        else ""
    )
    label = f"Groups over time, {count(len(groupings), 'grouping')}. {now}{stability}"
    many = len(clients) > MAX_STRIPS
    height = 280 if many else 84 + 19 * len(clients)
    svg = draw("groups", label, height, lambda figure: (_sizes if many else _strips)(figure, run, clients))
    what = (
        "How many clients had which selector"
        if many
        else "One line a client, its colour the selector that it was given"
    )
    return Drawing("groups", "Groups over time", svg, f"{what}, from each regrouping to the next. {now}{stability}")


def _strips(figure: Figure, run: RunView, clients: Sequence[ClientId]) -> None:
    axes = figure.subplots()
    starts = [number for number, _ in run.groupings]
    ends = [*starts[1:], max(len(run.rounds), starts[-1]) + 1]
    for y, client in enumerate(clients):
        for (_, grouping), start, end in zip(run.groupings, starts, ends, strict=True):
            u = grouping.get(client)
            if u is not None:
                axes.broken_barh([(start - 0.5, end - start)], (y - 0.36, 0.72), color=colour_of(u), linewidth=0)
    for start in starts[1:]:
        axes.axvline(start - 0.5, color=colour("card"), linewidth=min(2.0, 24 / len(starts)))
    axes.set_yticks(range(len(clients)), [name_on_axis(c) for c in clients])
    axes.set_ylim(len(clients) - 0.5, -0.5)
    _strip_axis(figure, axes, run, starts)


def _sizes(figure: Figure, run: RunView, clients: Sequence[ClientId]) -> None:
    axes = figure.subplots()
    starts = [number for number, _ in run.groupings]
    edges = [*starts, max(len(run.rounds), starts[-1]) + 1]
    below = [0] * len(starts)
    for u in range(run.num_adapters):
        above = [
            b + sum(v == u for v in grouping.values()) for b, (_, grouping) in zip(below, run.groupings, strict=True)
        ]
        axes.stairs(above, [e - 0.5 for e in edges], baseline=below, fill=True, color=colour_of(u), linewidth=0)
        below = above
    axes.set_ylim(0, len(clients))
    axes.set_ylabel("clients")
    _strip_axis(figure, axes, run, starts)


def _strip_axis(figure: Figure, axes: Axes, run: RunView, starts: Sequence[int]) -> None:
    from matplotlib.patches import Patch

    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    axes.set_xlabel("round")
    if len(starts) <= 8:
        axes.set_xticks(starts)
    else:
        whole_numbers(axes.xaxis)
    axes.set_xlim(starts[0] - 0.5, max(len(run.rounds), starts[-1]) + 0.5)
    patches = [Patch(color=colour_of(u), label=f"selector u{u}") for u in range(run.num_adapters)]
    figure.legend(handles=patches, loc="outside upper left", ncols=min(3, len(patches)), handlelength=1.0)


# Parts of the figures above


def _both(figure: Figure, axes: Axes, run: RunView, key: str) -> None:
    """Lines of the selectors and of the global selector, with the phases of the run marked."""
    own = "selectors of the groups" if run.num_adapters > 1 else "selector"
    lines = [(own, run.rounds, "main", "o", "-"), (GLOBAL, run.global_rounds, "muted", "s", (0, (5, 1.5)))]
    drawn = 0
    for name, rounds, shade, marker, style in lines:
        series = validation_series(rounds, key)
        if series:
            drawn += 1
            marker = marker if len(series) <= 30 else ""
            axes.plot(*zip(*series, strict=True), color=colour(shade), marker=marker, linestyle=style, label=name)
    _mark_phases(axes, run)
    percents(axes.yaxis)
    axes.set_xlabel("round")
    whole_numbers(axes.xaxis)
    if drawn > 1:
        figure.legend(loc="outside upper left", ncols=2)


def _mark_phases(axes: Axes, run: RunView) -> None:
    """The warm-up as a shade, regroupings as thin lines."""
    warmup = sum(row.get("phase") == "warmup" for row in run.rounds)
    if warmup:
        axes.axvspan(0.5, warmup + 0.5, color=colour("shade"), zorder=0, linewidth=0)
        axes.annotate(
            "warm-up", (0.5, 1), (1, 3), xycoords=("data", "axes fraction"), textcoords="offset points", va="bottom",
            color=colour("muted"), fontsize=12,
        )  # fmt: skip
    starts = [number for number, _ in run.groupings]
    for start in starts if len(starts) <= 25 else starts[:1]:
        axes.axvline(start - 0.5, color=colour("muted"), linewidth=0.8, linestyle=":", zorder=1)
    axes.set_xlim(0.5, max([len(run.rounds), *(row["round"] + 1 for row in run.global_rounds)]) + 0.5)


def _marks_words(run: RunView) -> str:
    parts = []
    if any(row.get("phase") == "warmup" for row in run.rounds):
        parts.append("Shaded: the warm-up, in which all clients train one selector after the other.")
    if 0 < len(run.groupings) <= 25:
        parts.append("Dotted: clients are grouped anew.")
    return " ".join(parts)


def _spread_words(run: RunView) -> str:
    held = validation_series(run.rounds, "clients")
    many = bool(held) and min(len(found) for _, found in held) >= 5
    return f"Mean over clients, on validation comparisons{'; the band holds the middle 80% of clients' * many}. "


def _at(values: Sequence[float], share: float) -> float:
    """The quantile of sorted values, between neighbours in proportion."""
    place = share * (len(values) - 1)
    below = int(place)
    above = min(below + 1, len(values) - 1)
    return values[below] + (place - below) * (values[above] - values[below])
