"""One figure as inline SVG: its colours are variables of the page, its letters are the page's own, its bytes are always
the same."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedbiscuit.report.markup import escaped
from fedbiscuit.report.style import GROUPS, LIGHT

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

__all__ = [
    "MARKERS",
    "NAMED_COLOURS",
    "Drawing",
    "colour",
    "colour_of",
    "draw",
    "marker_of",
    "percents",
    "whole_numbers",
]

WIDTH = 410
NAMED_COLOURS = tuple(LIGHT)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
"""One a group, so that groups differ by more than their colour."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """One figure of the page. ``svg`` is markup already; ``title`` and ``caption`` are plain text."""

    name: str
    title: str
    svg: str
    caption: str


def colour(name: str) -> str:
    """A colour of the page for matplotlib: a code that ``draw`` replaces by the page's variable of that name."""
    return f"#0a00{NAMED_COLOURS.index(name):02x}"


def colour_of(u: int) -> str:
    """The colour of adapter ``u``."""
    return colour(GROUPS[u % len(GROUPS)])


def marker_of(u: int) -> str:
    """The marker of adapter ``u``."""
    return MARKERS[u % len(MARKERS)]


def draw(name: str, label: str, height: int, paint: Callable[[Figure], None]) -> str:
    """The figure that ``paint`` draws, ``height`` pixels for every 410 of width, as an ``<svg>`` element.

    ``label`` says what it shows to readers who do not see it. Settings of the user's matplotlib have no influence.
    """
    import matplotlib
    from matplotlib.figure import Figure

    out = io.StringIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that only the page's fonts have
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_settings(name))
        figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
        paint(figure)
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_the_page(out.getvalue(), label)


def whole_numbers(axis: Axis, most: int = 6) -> None:
    """Whole numbers along an axis, and not many."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(most, integer=True, min_n_ticks=1))


def percents(axis: Axis, every: float | None = None) -> None:
    """Percents along an axis of shares, ``every`` so often or as it fits, with as many digits as they need."""
    from matplotlib.ticker import MaxNLocator, MultipleLocator

    axis.set_major_locator(MultipleLocator(every) if every else MaxNLocator(5, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(lambda value, _: f"{round(100 * value, 2):g}%")


def _settings(name: str) -> dict[Any, Any]:
    ink, muted, grid = colour("ink"), colour("muted"), colour("grid")
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": f"fedbiscuit {name}",  # ids differ between the figures of a page, not between two builds
        "text.parse_math": False,
        "figure.constrained_layout.w_pad": 0.03,
        "figure.constrained_layout.h_pad": 0.03,
        "font.size": 13.0,
        "axes.titlesize": 13.0,
        "axes.labelsize": 13.0,
        "xtick.labelsize": 12.5,
        "ytick.labelsize": 12.5,
        "legend.fontsize": 12.5,
        "legend.frameon": False,
        "legend.handlelength": 1.6,
        "legend.columnspacing": 1.2,
        "legend.borderaxespad": 0.2,
        "text.color": ink,
        "axes.labelcolor": muted,
        "axes.titlecolor": ink,
        "axes.titlelocation": "left",
        "axes.edgecolor": muted,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "grid.color": grid,
        "grid.linewidth": 1.0,
        "xtick.color": muted,
        "ytick.color": muted,
        "ytick.major.size": 0.0,
        "xtick.major.size": 3.0,
        "lines.linewidth": 2.0,
        "lines.markersize": 6.0,
    }


def _for_the_page(svg: str, label: str) -> str:
    """matplotlib's SVG as an element of the page: without its header, styles, fonts, and ids that nothing refers to."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*<style[^>]*>.*?</style>\s*</defs>\s*", "", svg, flags=re.DOTALL)
    wanted = set(re.findall(r'(?:url\(|href=")#([^)"]+)', svg))
    svg = re.sub(r"<[^>]+>", lambda tag: _tag(tag[0], wanted), svg)  # texts have no < or > in them: they are escaped
    opening = f'<svg role="img" aria-label="{escaped(label)}" '
    return opening + svg.removeprefix("<svg ") + "\n"


def _tag(tag: str, wanted: set[str]) -> str:
    """One tag of the SVG: short numbers, the page's colours and letters."""
    tag = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in wanted else "", tag)
    tag = re.sub(r"(\.[0-9]{2})[0-9]+", r"\1", tag)
    tag = re.sub(r"\s+", " ", tag)
    tag = re.sub(r"#0a00([0-9a-f]{2})", lambda found: f"var(--{NAMED_COLOURS[int(found[1], 16)]})", tag)
    if tag.startswith("<text"):
        tag = re.sub(
            r"font(?:-family)?: (?:([0-9.]+px) )?[^;\"]*;? ?", lambda f: f"font-size: {f[1]}; " * bool(f[1]), tag
        )
        tag = re.sub(r' transform="rotate\(-?0 [^"]*"', "", tag)
    return re.sub(r' (?:width|height)="[0-9.]+pt"', "", tag) if tag.startswith("<svg") else tag
