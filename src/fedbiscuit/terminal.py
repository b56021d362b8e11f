"""What the command line shows: live progress, the table at the end, and error lines.

On a terminal by rich; without one plain lines, and never a colour where ``NO_COLOR`` is set (rich sees to that).
"""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = [
    "ProgressLines",
    "clean",
    "print_comparison",
    "print_error",
    "print_evaluation",
    "print_judgements",
    "print_next",
    "print_task",
]

NARROWEST = 24
"""Columns of a table to which a long name may shrink."""
SECONDS_BETWEEN_LINES = 10.0


def clean(text: str) -> str:
    """Text that may hold anything, without what could steer a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def print_error(message: str) -> None:
    """``error: ...`` on stderr, each line of the message with its own."""
    for line in clean(message).splitlines() or ["unknown"]:
        print(f"error: {line}", file=sys.stderr)


class ProgressLines:
    """Call it with ``(stage, step, total, note)`` as work is done; steps count from 1.

    On a terminal there is one live bar a stage, with the time left; elsewhere one plain line at the first and last step
    of a stage and every ten seconds between them. Everything goes to stderr.
    """

    def __init__(self) -> None:
        self._live: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, tuple[float, int]] = {}
        self._last_line = 0.0

    def __enter__(self) -> ProgressLines:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._live = Progress(
                TextColumn("{task.description:<10}", markup=False),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                console=Console(stderr=True),
            )
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, stage: str, step: int, total: int, note: str = "") -> None:
        """Step ``step`` of ``total`` of this stage is done."""
        stage, note = clean(stage), clean(note)
        if self._live is not None:
            if stage not in self._tasks:
                self._tasks[stage] = self._live.add_task(stage, total=total, note=note)
            self._live.update(self._tasks[stage], completed=step, total=total, note=note)
            return
        now = time.monotonic()
        is_first = stage not in self._started
        first_time, first_step = self._started.setdefault(stage, (now, step))
        if is_first or step >= total or now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            left = (now - first_time) / (step - first_step) * (total - step) if step > first_step else 0.0
            parts = [f"{stage} {step}/{total}", note, f"{_clock(left)} left" if left else ""]
            print("  ".join(part for part in parts if part), file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    """Seconds as ``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def print_evaluation(evaluation: Mapping[str, Any]) -> None:
    """What a newcomer wants to see of ``evaluation.json``: selectors, policy, and the checkpoints where they were judged."""
    selectors, policy = evaluation.get("selectors"), evaluation.get("policy")
    if selectors:
        from fedbiscuit.evaluation.metrics import IMPLICIT

        of_policy = selectors["rows"][0]["name"] == IMPLICIT  # a baseline without selectors
        who = "Policy: how often the reward that it implies agrees" if of_policy else "Selectors: how often they agree"
        print(f"\n{who} with people's choices that nobody trained on")
        _print_table(
            ("", "accuracy", "95% interval", "flips with order"), [_agreement(row) for row in selectors["rows"]]
        )
        if selectors.get("adjusted_rand_index") is not None:
            found = selectors["adjusted_rand_index"]
            print(f"  Groups against the true ones: adjusted Rand index {found:.2f} (1 is perfect, 0 is chance)")
        if selectors.get("checkpoints"):
            print("\nSelectors along the way, each client by its group at that time")
            rows = [(str(row["round"]), *_agreement(row)[1:]) for row in selectors["checkpoints"]]
            _print_table(("after round", "accuracy", "95% interval", "flips with order"), rows)
    for reason, count in (evaluation.get("left_out") or {}).items():
        if count:
            print(f"  Left out: {clean(reason)}: {count}")
    if policy and not policy["judges"]:
        print(
            "\nPolicy: there is nobody to judge it (no selectors, and no known truth); evaluation.json has its answers"
        )
    elif policy:
        print(
            "\nPolicy: how often the aligned answer is preferred to the raw one, on prompts that it was not trained on"
        )
        _print_table(
            ("judged by", "win rate", "95% interval", "wins-ties-losses"),
            [(judge["name"], *_wins(judge)) for judge in policy["judges"]],
        )
        if policy.get("checkpoints"):
            print("\nPolicy along the way, against the raw one")
            rows = [
                (row["name"], str(row["step"]), *_wins(row), f"{row['words']:.1f}") for row in policy["checkpoints"]
            ]
            _print_table(
                ("judged by", "after step", "win rate", "95% interval", "wins-ties-losses", "words an answer"), rows
            )


def print_judgements(protocol: str, found: Sequence[Mapping[str, Any]]) -> None:
    """What one judge said of the same things (``evaluations/judge-PROTOCOL.json``), a row a policy: who won, and what could
    not be counted as a win or a loss.
    """
    first, judge = found[0], found[0]["judge"]
    where = f" at {judge['endpoint']}" if judge.get("endpoint") else ""
    orders = {"both": ", each pair in both orders", "one": ", each pair in one order"}.get(first["orders"], "")
    print(f"\nJudge: {clean(judge['model'])}{clean(where)}, protocol {protocol}, {first['prompts']} prompts{orders}")
    header = (
        f"against {first['against']}",
        "win rate",
        "95% interval",
        "wins-ties-losses",
        "ties as half",
        "the same at equal length",
    )
    rows = [
        (one["policy"], *_wins(won), _percent(won["win_rate_ties_half"]), _at_equal_length(one))
        for one in found
        for won in (one["win_rate"],)
    ]
    _print_table(header, rows, width=140)
    for one in found:
        for side, rated in (one["ratings"] or {}).items():
            if rated["mean"] is not None:
                low, high = rated["interval"]
                told = f"{rated['mean']:.2f} ({low:.2f} to {high:.2f}), of {rated['answers']} answers"
                print(f"  Mean rating, {clean(one[side])}: {told}")
    prompts = sum(one["prompts"] for one in found)
    unread = {
        key: sum(one["unparsable"][key] for one in found)
        for key in ("prompts", "replies", "cut_off", "refused", "asked")
    }
    changed = sum(one["inconsistent"]["count"] for one in found)
    if first["orders"] == "both":
        told = "Did not say the same in the other order, counted as ties"
        print(f"  {told}: {changed} of {prompts} ({_percent(changed / prompts)})")
    before = sum(one["replies_from_before"] for one in found)
    print(f"  Replies in all: {unread['asked'] - unread['refused']}, from an earlier time: {before}")
    if same := sum(one["identical"] for one in found):
        print(f"  The same answer by both, ties that were not asked about: {same} of {prompts}")
    if unread["replies"] or unread["refused"]:
        told = (
            f"Replies without a decision: {unread['replies']} of {unread['asked']}, {unread['cut_off']} of them cut off"
        )
        refused = f"; questions that were refused: {unread['refused']}" if unread["refused"] else ""
        print(f"  {told}{refused}; so ties on {unread['prompts']} of {prompts} prompts. The first:")
        text = next((one["unparsable"]["first"] for one in found if one["unparsable"]["first"]), "(nothing)")
        print(f"    {clean(' '.join(text.split()))[:300]}")
    if changed + unread["prompts"] > prompts / 2:
        print(
            "  This judge has decided on less than half of the prompts, so its win rate says little; use a stronger one"
        )


def _at_equal_length(found: Mapping[str, Any]) -> str:
    one = found["length_controlled"]
    return "" if one is None else f"{_percent(one['win_rate'])} ({_interval(one['interval'])})"


def print_comparison(tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]]]]) -> None:
    """Tables of runs side by side, each as wide as it is."""
    title = None
    for heading, header, rows in tables:
        if heading != title:
            print(f"\n{clean(heading)}")
            title = heading
        print()
        _print_table(header, rows, width=1000)


def print_task(tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]]]], notes: Sequence[str]) -> None:
    """The tables of one evaluation of its own, and what to know about it."""
    for title, header, rows in tables:
        print(f"\n{clean(title)}")
        _print_table(header, rows, width=160)
    for note in notes:
        print(textwrap.fill(clean(note), 110, initial_indent="  ", subsequent_indent="  "))


def print_next(report: str, next_commands: Sequence[tuple[str, str]]) -> None:
    """Where the report is, and what to try next."""
    print(f"\nReport: {clean(report)}\n\nNext:")
    width = max(len(command) for command, _ in next_commands)
    for command, purpose in next_commands:
        print(f"  {clean(command):<{width}}  # {purpose}")


def _agreement(row: Mapping[str, Any]) -> tuple[str, ...]:
    name = str(row["name"])
    return name, _percent(row["accuracy"]), _interval(row.get("interval")), _percent(row.get("flip_rate"))


def _wins(judge: Mapping[str, Any]) -> tuple[str, ...]:
    return _percent(judge["win_rate"]), _interval(judge.get("interval")), _record(judge)


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]], width: int = 110) -> None:
    """Aligned columns: the first to the left, the others to the right.

    Where they are wider than ``width`` or the terminal, names go on in the next line. Numbers are never cut.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    cells = [[clean(cell).replace("–", "-") for cell in row] for row in rows]  # one dash, whoever made the table
    console = Console() if sys.stdout.isatty() else Console(width=1000)
    widths = _widths(header, cells, min(console.width - 2, width))
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for number, (name, wide) in enumerate(zip(header, widths, strict=True)):
        table.add_column(Text(name), justify="right" if number else "left", overflow="fold", width=wide)
    for row in cells:
        table.add_row(*map(Text, row))
    room = sum(widths) + 3 * len(widths)
    for line in console.render_lines(table, console.options.update(width=room), pad=False):
        text = "".join(segment.text for segment in line).rstrip()
        console.print(Text("  " + text), soft_wrap=True)


def _widths(header: Sequence[str], cells: Sequence[Sequence[str]], room: int) -> list[int]:
    """A width for each column that fits the room: first long names give way, the longest first, then headers."""
    from rich.cells import cell_len

    longest = [max((cell_len(row[number]) for row in cells), default=0) for number in range(len(header))]
    names = [any(letter.isalpha() for row in cells for letter in row[number]) for number in range(len(header))]
    words = [max(map(cell_len, name.split()), default=0) for name in header]
    least = [
        max(word, min(cell, NARROWEST) if is_name else cell)
        for word, cell, is_name in zip(words, longest, names, strict=True)
    ]
    widths = [max(cell, cell_len(name)) for cell, name in zip(longest, header, strict=True)]
    excess = sum(widths) + 3 * (len(widths) - 1) - room
    for number in sorted(range(len(widths)), key=lambda i: (not names[i], -widths[i])):
        gives = min(max(excess, 0), widths[number] - least[number])
        widths[number] -= gives
        excess -= gives
    return widths


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}%"


def _interval(bounds: Sequence[float] | None) -> str:
    return "" if not bounds else f"{100 * bounds[0]:.0f}-{100 * bounds[1]:.0f}%"


def _record(judge: Mapping[str, Any]) -> str:
    counts = [judge.get(key) for key in ("wins", "ties", "losses")]
    return "" if None in counts else "-".join(str(count) for count in counts)
