"""The report in a real browser (Debian's headless Chromium): it is drawn, fits a phone, and follows dark mode."""

from __future__ import annotations

import html
import json
import re
import runpy
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedbiscuit.report import write_report

CHROMIUM = Path("/usr/bin/chromium")
FAKES = runpy.run_path(str(Path(__file__).parent.parent / "unit" / "test_report.py"))
write_fake_run: Callable[..., Path] = FAKES["write_fake_run"]

MEASURE = """
<script>
const inside = (a, b) => a.left >= b.left - 1 && a.right <= b.right + 1 && a.top >= b.top - 1 && a.bottom <= b.bottom + 1;
const meet = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 2
  && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 4;
// Letters, not lines: a font with high lines reaches into its neighbour's without touching a letter of it.
function place(text, scale, style) {
  const b = text.getBoundingClientRect(), high = 1.17 * scale * parseFloat(style.fontSize), turned = Math.abs(text.getCTM().b) > 0.01;
  const x = turned ? Math.max(0, (b.width - high) / 2) : 0, y = turned ? 0 : Math.max(0, (b.height - high) / 2);
  return {left: b.left + x, right: b.right - x, top: b.top + y, bottom: b.bottom - y, height: b.height - 2 * y};
}
function measure(frame) {
  const page = frame.contentDocument, found = {};
  found.width = page.documentElement.scrollWidth;
  found.background = frame.contentWindow.getComputedStyle(page.body).backgroundColor;
  found.figures = [...page.querySelectorAll('figure svg')].map(svg => {
    const texts = [...svg.querySelectorAll('text')].filter(t => t.textContent.trim());
    const around = svg.getBoundingClientRect(), scale = around.width / svg.viewBox.baseVal.width;
    const boxes = texts.map(t => place(t, scale, frame.contentWindow.getComputedStyle(t)));
    const met = [];
    boxes.forEach((a, i) => boxes.forEach((b, j) => {
      if (i < j && meet(a, b)) met.push([texts[i].textContent, texts[j].textContent]);
    }));
    return {
      name: svg.parentElement.id, width: around.width, letters: Math.min(...boxes.map(b => b.height)), met: met,
      cut: texts.filter((_, i) => !inside(boxes[i], around)).map(t => t.textContent),
    };
  });
  document.getElementById('found').textContent = JSON.stringify(found);
}
</script>
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs Chromium on a file, with a profile of its own; returns what it prints. Skips loudly where there is none."""
    if not CHROMIUM.exists():
        warnings.warn("no /usr/bin/chromium: the report was NOT looked at in a browser", stacklevel=2)
        pytest.skip("no /usr/bin/chromium: apt-get install chromium, to look at the report in a real browser")

    def run(page: Path, *options: str) -> str:
        profile = tmp_path_factory.mktemp("profile")
        command = [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={profile}", *options, page.as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return done.stdout

    return run


def measured(browser: Callable[..., str], page: Path, width: int, *options: str) -> dict[str, Any]:
    """What a reader with a screen of this width gets: page width, background, and the labels of every figure."""
    wrapper = page.with_name(f"frame-{width}.html")
    inner = html.escape(page.read_text(encoding="utf-8"), quote=True)
    wrapper.write_text(
        f'<meta charset="utf-8">{MEASURE}<pre id="found"></pre><iframe onload="measure(this)" '
        f'style="border:0;width:{width}px;height:900px" srcdoc="{inner}"></iframe>',
        encoding="utf-8",
    )
    dom = browser(wrapper, "--window-size=1400,1000", "--dump-dom", *options)
    found = re.search(r'<pre id="found">(.*?)</pre>', dom, flags=re.DOTALL)
    assert found
    measurements: dict[str, Any] = json.loads(html.unescape(found[1]))
    return measurements


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Reports of a usual run, of one with many groups and long names, and of one that is still young."""
    folder = tmp_path_factory.mktemp("runs")
    names = [f"{'ein sehr langer Name ' * 3}{i}" for i in range(40)]
    young = write_fake_run(folder / "young", rounds=11)
    for name in FAKES["FILES"][1:]:
        (young / name).unlink()
    return {
        "usual": write_report(write_fake_run(folder / "usual")),
        "crowded": write_report(write_fake_run(folder / "crowded", names=names, num_adapters=8, rounds=200, warmup=3)),
        "young": write_report(young),
    }


@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("name", ["usual", "crowded", "young"])
def test_the_page_fits_the_screen_and_no_label_is_cut_off_or_covered(
    browser: Callable[..., str], pages: dict[str, Path], name: str, width: int
) -> None:
    found = measured(browser, pages[name], width)
    assert found["width"] <= width
    assert len(found["figures"]) == (4 if name == "young" else 8)
    assert [figure["name"] for figure in found["figures"] if figure["cut"] or figure["met"]] == [], found["figures"]
    assert all(figure["letters"] >= (9.5 if width < 500 else 13) for figure in found["figures"])  # pixels, line height


def test_the_page_follows_the_readers_light_or_dark_system(browser: Callable[..., str], pages: dict[str, Path]) -> None:
    light = measured(browser, pages["usual"], 1200)["background"]
    dark = measured(browser, pages["usual"], 1200, "--blink-settings=preferredColorScheme=0")["background"]
    assert sum(map(int, re.findall(r"\d+", light))) > 600
    assert sum(map(int, re.findall(r"\d+", dark))) < 150


def test_the_page_is_drawn_as_a_picture(browser: Callable[..., str], pages: dict[str, Path], tmp_path: Path) -> None:
    picture = tmp_path / "page.png"
    browser(pages["usual"], "--window-size=1200,4000", f"--screenshot={picture}")
    from matplotlib.image import imread

    pixels = imread(picture)[:, :, :3]
    assert pixels.shape[:2] == (4000, 1200)
    rows = (abs(pixels - pixels[0, 0]) > 0.1).any(axis=(1, 2))
    assert rows[:3500].mean() > 0.5, "most of the page is empty"
    for colour in ((0x1F, 0x66, 0xB5), (0xC2, 0x50, 0x0F), (0x0B, 0x70, 0x80)):  # two groups, and the main line
        near = abs(pixels - [c / 255 for c in colour]).max(axis=2) < 0.02
        assert near.sum() > 500, f"nothing is drawn in {colour}"
