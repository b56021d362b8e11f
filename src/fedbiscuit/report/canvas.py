"""One figure as inline SVG: its colours are variables of the page, its letters are the page's own, its bytes are always
the same."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedbiscuit.report.markup import escaped
from fedbiscuit.report.style import GROUPS, LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["MARKERS", "NAMED_COLOURS", "Drawing", "colour", "colour_of", "draw", "even_steps", "marker_of"]

WIDTH = 460
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
    """The figure that ``paint`` draws, ``height`` pixels for every 460 of width, as an ``<svg>`` element.

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
        figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03)  # type: ignore[union-attr, call-arg]
        paint(figure)
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_the_page(out.getvalue(), name, label)


def even_steps(axes: Axes, most: int = 6) -> None:
    """Whole numbers below the axis, and not many."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(most, integer=True, min_n_ticks=1))


def _settings(name: str) -> dict[str, object]:
    ink, muted, grid = colour("ink"), colour("muted"), colour("grid")
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": f"fedbiscuit {name}",  # ids differ between the figures of a page, not between two builds
        "text.parse_math": False,
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


def _for_the_page(svg: str, name: str, label: str) -> str:
    """matplotlib's SVG without header, foreign styles, fonts and ids that another figure has too."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*<style[^>]*>.*?</style>\s*</defs>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="(?!m[0-9a-f]{10}"|p[0-9a-f]{10}"|h[0-9a-f]{10}"|C)[^"]*"', "", svg)
    svg = re.sub(r'(<text style="[^"]*?)font-family: [^;"]*;? ?', r"\1", svg)
    svg = re.sub(r'(<text style=")font: ([0-9.]+px) [^;"]*', r"\1font-size: \2", svg)
    svg = re.sub(r"#0a00([0-9a-f]{2})", lambda found: f"var(--{NAMED_COLOURS[int(found[1], 16)]})", svg)
    svg = re.sub(r' (?:width|height)="[0-9.]+pt"', "", svg, count=2)
    svg = re.sub(r"\n\s*", "\n", svg)
    svg = re.sub(r'(?<=[ \n"][-0-9])([0-9]*\.[0-9]{2})[0-9]+', r"\1", svg) if False else svg
    opening = f'<svg role="img" aria-label="{escaped(label)}" style="font-family:inherit" '
    return opening + svg.removeprefix("<svg ") + "\n"
