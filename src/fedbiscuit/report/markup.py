"""Pieces of HTML. Every text that comes from outside goes through ``escaped``; nothing else writes text into the page."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from fedbiscuit.data.visible import visible

__all__ = [
    "Cell",
    "count",
    "duration",
    "escaped",
    "interval",
    "name_on_axis",
    "number",
    "percent",
    "shortened",
    "table",
    "visible",
]


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a table: its text, a smaller remark behind it, and its CSS class."""

    text: str
    remark: str = ""
    kind: str = ""


def escaped(text: object) -> str:
    """Text for a place in the page, where it can be neither markup nor invisible."""
    return html.escape(visible(str(text)), quote=True)


def shortened(text: str, limit: int) -> str:
    """At most ``limit`` characters, with what was cut off said where there is room for it."""
    if len(text) <= limit:
        return text
    if limit < 100:
        return text[: limit - 1] + "…"
    return f"{text[:limit]}… ({len(text) - limit} more characters)"


def name_on_axis(name: str, limit: int = 16) -> str:
    """A name that fits beside a figure: of a long one its beginning and its end, which is where names differ."""
    text = " ".join(visible(name).split())
    end = limit // 2 - 1
    return text if len(text) <= limit else f"{text[: limit - 1 - end]}…{text[-end:]}"


def table(label: str, header: Sequence[str], rows: Sequence[Sequence[Cell]], main: int | None = None) -> str:
    """A table that scrolls sideways by itself on a small screen; its first column names the rows.

    ``main`` is the row to stress. ``label`` is for readers who do not see it.
    """
    head = "".join(f'<th scope="col"{_kind(name)}>{escaped(name.lstrip("<"))}</th>' for name in header)
    body = "\n".join(
        f"<tr{' class=main' if number == main else ''}>{_row(row, header)}</tr>" for number, row in enumerate(rows)
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escaped(label)}">\n<table>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>\n</div>\n"
    )


def _row(row: Sequence[Cell], header: Sequence[str]) -> str:
    cells = []
    for number, (cell, name) in enumerate(zip(row, header, strict=True)):
        kind = f' class="{cell.kind}"' if cell.kind else _kind(name)
        remark = f" <small>{escaped(cell.remark)}</small>" if cell.remark else ""
        tag = ('th scope="row"', "th") if number == 0 else ("td", "td")
        cells.append(f"<{tag[0]}{kind}>{escaped(cell.text)}{remark}</{tag[1]}>")
    return "".join(cells)


def _kind(name: str) -> str:
    """A column whose name starts with ``<`` is set to the left: text, not numbers."""
    return ' class="left"' if name.startswith("<") else ""


# Numbers as text; what is not known is a dash


def percent(share: float | None, digits: int = 1) -> str:
    """``0.784`` as ``78.4%``."""
    return "–" if share is None else f"{100 * share:.{digits}f}%"


def number(value: float | None, digits: int = 3) -> str:
    """A number with a fixed number of digits."""
    return "–" if value is None else f"{value:.{digits}f}"


def interval(bounds: Sequence[float] | None) -> str:
    """``[0.7, 0.84]`` as ``70–84%``."""
    return "" if not bounds else f"{100 * bounds[0]:.0f}–{100 * bounds[1]:.0f}%"


def count(value: int, noun: str, plural: str = "") -> str:
    """``1 client``, ``2,000 clients``."""
    return f"{value:,} {noun if value == 1 else plural or noun + 's'}"


def duration(seconds: float) -> str:
    """``3725`` as ``1 h 2 min``; short ones with a decimal."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds >= 0.095 else f"{1000 * seconds:.0f} ms"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
