"""The comparison of several runs as text: Markdown with figures beside it."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from fedbiscuit.evaluation.judge import HELD_OUT
from fedbiscuit.evaluation.metrics import IMPLICIT, UNTRAINED
from fedbiscuit.report.canvas import colour, colour_of, draw, marker_of, percents, whole_numbers
from fedbiscuit.report.comparison import (
    Method,
    Section,
    alignment_curves,
    compare,
    curves,
    mean_and_interval,
    read_sections,
)
from fedbiscuit.report.judgements import LAST, judge_name
from fedbiscuit.report.reading import RunView
from fedbiscuit.report.style import LIGHT
from fedbiscuit.report.words import GLOBAL, NEW
from fedbiscuit.rundir import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["tables_of", "write_markdown"]

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Header and rows."""


def write_markdown(run_dirs: Sequence[Path], out: Path) -> list[Path]:
    """Write the tables to ``out`` as Markdown, with SVG figures for each section beside it; the files written.

    From the same run folders the same bytes come out.
    """
    written, text = [], ["# Runs compared", "", "A row's name tells the settings that few of the other rows have.", ""]
    for number, section in enumerate(read_sections(run_dirs)):
        text += [f"## {section.title}", ""]
        for header, rows in tables_of(section):
            text += [*_markdown(header, rows), ""]
        for name, svg in _figures(section):
            path = out.with_name(f"{out.stem}-{number}-{name}.svg")
            atomic_write(path, svg)
            written.append(path)
            text += [f"![{name}]({path.name})", ""]
    atomic_write(out, "\n".join(text).rstrip() + "\n")
    return [out, *written]


def tables_of(section: Section) -> list[Table]:
    """How often people are agreed with, differences to the first row, calibration, policies, language models as judges, cost.

    Tables without rows and columns without content are left out.
    """
    made = (
        _agreement(section), _differences(section), _calibration(section), _policies(section), _judged(section),
        _cost(section),
    )  # fmt: skip
    tables: list[Table] = []
    for header, rows in made:
        used = [i for i in range(len(header)) if i == 0 or any(row[i] for row in rows)]
        if rows:
            tables.append(([header[i] for i in used], [[row[i] for i in used] for row in rows]))
    return tables


def _agreement(section: Section) -> Table:
    header = (
        "agreement with held-out choices", "seeds", "mean over clients", "95% interval", "each seed", "over comparisons",
        "(A, B) alone", "(B, A) alone", "flips", "worst tenth", "new clients", "adjusted Rand index",
    )  # fmt: skip
    rows = []
    for method in section.with_selectors:
        rows.append(_agreement_row(method, method.name, 0, "accuracy", "new clients, the best fitting selector"))
        if any("vote" in one for run in method.tested for one in run.selectors["clients"].values()):
            rows.append(_agreement_row(method, f"{method.name}, vote", 1, "vote", "new clients, vote of all selectors"))
    rows += [
        _baseline_row(section, UNTRAINED, "baseline_raw", ""),
        _baseline_row(section, "the longer answer", "baseline_longer", "new clients, the longer answer"),
        _baseline_row(section, "the shorter answer", "baseline_longer", "new clients, the longer answer", against=True),
    ]
    return header, [row for row in rows if row[1] != "0"]


def _agreement_row(method: Method, name: str, place: int, key: str, new: str) -> tuple[str, ...]:
    by_seed = method.by_client(key)
    value, interval = mean_and_interval(by_seed)
    orders = method.row("accuracy_in_order", place)
    in_order = [_mean([pair[i] for pair in orders if pair]) for i in (0, 1)]
    rand = method.each(lambda run: run.selectors.get("adjusted_rand_index")) if place == 0 else []
    return (
        name,
        str(len(by_seed)),
        _share(value),
        _interval(interval),
        " ".join(_share(mean(accuracies.values())) for accuracies in by_seed.values()),
        _mean(method.row("accuracy_comparisons", place)),
        *in_order,
        _mean(method.row("flip_rate", place)),
        _mean(method.row("worst_decile", place)),
        _mean([_new(run, new, f"{NEW}, {GLOBAL}", f"{NEW}, {IMPLICIT}") for run in method.tested]),
        " ".join(f"{value:.2f}" for value in rand),
    )


def _baseline_row(section: Section, name: str, key: str, new: str, against: bool = False) -> tuple[str, ...]:
    """A rule that no run trains: the same in all runs of a seed that have it. ``against``: the opposite rule."""

    def share(value: float) -> float:
        return 1 - value if against else value

    runs = {run.cfg.seed: run for method in section.with_selectors for run in method.tested if _has(run, key)}
    by_seed = {
        seed: {client: share(one[key]) for client, one in run.selectors["clients"].items()}
        for seed, run in runs.items()
    }
    value, interval = mean_and_interval(by_seed) if by_seed else (0.0, None)
    found = [_new(run, new) for run in runs.values()]
    told = _mean([None if one is None else share(one) for one in found])
    each = " ".join(_share(mean(accuracies.values())) for accuracies in by_seed.values())
    return (name, str(len(runs)), _share(value), _interval(interval), each, "", "", "", "", "", told, "")


def _has(run: RunView, key: str) -> bool:
    return all(key in one for one in run.selectors["clients"].values())


def _new(run: Any, *names: str) -> float | None:
    found = run.selectors.get("new_clients") or {}
    held = next((found[name] for name in names if name in found), None)
    return mean(held.values()) if held else None


def _differences(section: Section) -> Table:
    first, *others = section.with_selectors or section.methods
    rows = []
    for method in others:
        found = compare(method, first)
        if found is not None:
            interval = [100 * bound for bound in found.interval] if found.interval else None
            told = f"{interval[0]:+.1f} to {interval[1]:+.1f}" if interval else ""
            rows.append((method.name, f"{100 * found.mean:+.1f}", told, f"{found.better} / {found.worse}"))
    return (f"points more than {first.name}, client by client", "mean", "95% interval", "clients better / worse"), rows


def _calibration(section: Section) -> Table:
    header = ("calibration", "loss", "calibration error", "temperature", "loss at it", "calibration error at it")
    rows = [
        (
            method.name,
            _mean(method.row("loss")),
            _mean(method.row("calibration_error")),
            _mean(method.each(lambda run: run.selectors.get("temperature")), 2),
            _mean(method.row("loss_at_temperature")),
            _mean(method.row("calibration_error_at_temperature")),
        )
        for method in section.with_selectors
    ]
    return header, rows


def _policies(section: Section) -> Table:
    """Means over prompts, then over seeds; intervals from resampling prompts. Nobody judges where the cell is empty."""
    header = (
        "aligned against raw policy", "judged by", "seeds", "win rate", "95% interval", "each seed", "words aligned",
        "words raw", "nats from raw",
    )  # fmt: skip
    rows = []
    for method in section.methods:
        aligned = {run.draw: run.policy for run in method.runs if run.policy}
        labelers = {whose for _, whose in aligned}
        words = [_mean([policy["length"][kind] for policy in aligned.values()], 1) for kind in ("aligned", "raw")]
        kl = _mean([policy.get("kl") for policy in aligned.values()], 1)
        judges = {
            draw: {_judge_of(judge["name"], labelers): judge for judge in policy.get("judges", [])}
            for draw, policy in aligned.items()
        }
        names = dict.fromkeys(name for held in judges.values() for name in held)
        for name in names or dict.fromkeys([""] if aligned else []):
            by_seed = {draw: held[name] for draw, held in judges.items() if name in held}
            points = {seed: judge.get("points", {}) for seed, judge in by_seed.items()}
            interval = mean_and_interval(points)[1] if points and all(points.values()) else None
            rates = [judge["win_rate"] for judge in by_seed.values()]
            each = " ".join(map(_share, rates))
            told = (str(len(by_seed or aligned)), _mean(rates), _interval(interval), each)
            rows.append((method.name, str(name), *told, *words, kl))
    return header, rows


def _judge_of(name: str, labelers: Collection[str]) -> str:
    """Its name; where selectors of several runs labeled, by seed, they are one judge: who labeled."""
    return "the vote of the selectors that labeled" if len(labelers) > 1 and name.endswith(", which labeled") else name


def _judged(section: Section) -> Table:
    """Policies by language models: means over prompts, then over seeds; intervals from resampling prompts."""
    header = (
        "judged by a language model", "policy", "against", "judge", "seeds", "win rate", "95% interval", "each seed",
        "ties as half", "at equal length", "undecided",
    )  # fmt: skip
    rows = []
    for method in section.methods:
        groups: dict[tuple[str, ...], dict[tuple[int, str], Any]] = {}
        for run in method.runs:
            for one in run.judged:
                if one["on"] != HELD_OUT or one["policy"] == LAST:
                    policy = one["policy"] if one["on"] == HELD_OUT else f"{one['policy']}, {one['on']}"
                    groups.setdefault((policy, one["against"], judge_name(one)), {})[run.draw] = one
        for told, by_seed in groups.items():
            wins = {
                seed: {row["digest"]: float(row["points"] == 1) for row in one["outcomes"]}
                for seed, one in by_seed.items()
            }
            held = list(by_seed.values())
            _, interval = mean_and_interval(wins)
            rates = [one["win_rate"]["win_rate"] for one in held]
            rows.append(
                (
                    method.name, *told, str(len(held)), _mean(rates), _interval(interval), " ".join(map(_share, rates)),
                    _mean([one["win_rate"]["win_rate_ties_half"] for one in held]),
                    _mean([one["length_controlled"]["win_rate"] for one in held if one["length_controlled"]]),
                    _mean([(one["inconsistent"]["count"] + one["unparsable"]["prompts"]) / one["prompts"] for one in held]),
                )
            )  # fmt: skip
    return header, rows


def _cost(section: Section) -> Table:
    header = ("cost of a run", "rounds", "MB up", "MB down", "minutes")
    rows = [
        (
            method.name,
            _mean(method.each(lambda run: len(run.rounds)), 0),
            _mean(method.each(lambda run: run.total("bytes_up") / 1e6), 0),
            _mean(method.each(lambda run: run.total("bytes_down") / 1e6), 0),
            _mean(method.each(lambda run: sum(r["seconds"] for r in run.timings if r["stage"] == "selectors") / 60), 0),
        )
        for method in section.methods
        if any(run.rounds for run in method.runs)  # those that took another run's selectors have trained none
    ]
    return header, rows


def _figures(section: Section) -> list[tuple[str, str]]:
    figures = []
    if tested := section.with_selectors:
        height = 90 + 34 * len(tested)
        said = f"Dot plot: agreement with held-out choices of {len(tested)} methods, with 95% intervals."
        figures.append(
            ("agreement", _standalone(draw("agreement", said, height, lambda figure: _dots(figure, tested))))
        )
    if any(len(curves(method)) > 1 for method in section.methods):
        height = 300 + 18 * len(section.methods)
        said = "Line chart: validation accuracy of each method by round."
        figures.append(("rounds", _standalone(draw("rounds", said, height, lambda figure: _lines(figure, section)))))
    if any(alignment_curves(method, "win_rate") for method in section.methods):
        height = 560 + 18 * len(section.methods)
        said = "Line charts: win rate, words and distance from the raw policy of each method's policy by step."
        drawn = draw("alignment", said, height, lambda figure: _alignment(figure, section))
        figures.append(("alignment", _standalone(drawn)))
    return figures


def _dots(figure: Figure, methods: Sequence[Method]) -> None:
    axes = figure.subplots()
    for y, method in enumerate(methods):
        value, interval = mean_and_interval(method.by_client())
        low, high = interval or (value, value)
        axes.plot([low, high], [y, y], color=colour("main"), linewidth=3, solid_capstyle="round")
        seeds = [mean(accuracies.values()) for accuracies in method.by_client().values()]
        axes.plot(seeds, [y] * len(seeds), linestyle="", marker="|", markersize=12, color=colour("muted"))
        axes.plot(value, y, color=colour("main"), marker="o", markersize=9)
    axes.axvline(0.5, color=colour("muted"), linewidth=1.2, linestyle=(0, (4, 3)), zorder=0)
    axes.set_yticks(range(len(methods)), [method.name for method in methods])
    axes.set_ylim(len(methods) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    axes.set_xlabel("share of held-out choices agreed with")
    percents(axes.xaxis)


def _lines(figure: Figure, section: Section) -> None:
    axes = figure.subplots()
    for number, method in enumerate(section.methods):
        points = curves(method)
        if len(points) > 1:
            axes.plot(*zip(*points, strict=True), color=colour_of(number), marker=marker_of(number), label=method.name)
    axes.axhline(0.5, color=colour("muted"), linewidth=1.2, linestyle=(0, (4, 3)))
    axes.set_xlabel("round")
    axes.set_title("agreement with validation choices, mean over seeds", color=colour("muted"), fontsize=12.5)
    percents(axes.yaxis)
    whole_numbers(axes.xaxis)
    figure.legend(loc="outside upper left", ncols=1)


def _alignment(figure: Figure, section: Section) -> None:
    titles = {
        "win_rate": "win rate against the raw policy, by the judge to trust most, mean over seeds",
        "words": "words an answer",
        "kl": "nats from the raw policy, an answer",
    }
    panels = figure.subplots(len(titles), 1, sharex=True)
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        for number, method in enumerate(section.methods):
            if points := alignment_curves(method, key):
                label = method.name if key == "win_rate" else None
                axes.plot(*zip(*points, strict=True), color=colour_of(number), marker=marker_of(number), label=label)
        axes.set_title(title, color=colour("muted"), fontsize=12.5)
    panels[0].axhline(0.5, color=colour("muted"), linewidth=1.2, linestyle=(0, (4, 3)))
    percents(panels[0].yaxis)
    panels[-1].set_xlabel("DPO step")
    whole_numbers(panels[-1].xaxis)
    figure.legend(loc="outside upper left", ncols=1)


def _standalone(svg: str) -> str:
    """The element as a file of its own: the page's variables as the colours of its light theme, on white."""
    svg = re.sub(r"var\(--([a-z0-9-]+)\)", lambda found: LIGHT[found[1]], svg)
    return svg.replace("<svg ", '<svg style="background: white; font-family: sans-serif" ', 1)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def _share(value: float) -> str:
    return f"{value:.3f}"


def _interval(bounds: Sequence[float] | None) -> str:
    return f"{bounds[0]:.3f} to {bounds[1]:.3f}" if bounds else ""


def _mean(values: Sequence[float | None], digits: int = 3) -> str:
    held = [value for value in values if value is not None]
    return f"{mean(held):.{digits}f}" if held else ""
