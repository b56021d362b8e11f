"""A run folder becomes one page: ``report.html``, self-contained, with plots.

``reading.py`` takes from the folder what the page needs, ``words.py`` says it in sentences, ``plots.py`` and ``charts.py``
draw it on the canvas of ``canvas.py``, ``page.py`` puts the page together from the pieces of ``markup.py``, and
``style.py`` has its colours. matplotlib is imported when the first figure is drawn.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["write_report"]


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into a run folder, whole or not at all, and return its path.

    Works at any time of a run: what is not there yet is left out. From the same files the same bytes come out. Raises
    ``ConfigError`` where there is no run, ``IntegrityError`` for a file that cannot be read, and ``EnvironmentFault``
    where the folder cannot be written.
    """
    from fedbiscuit.report.page import render
    from fedbiscuit.report.reading import read_run
    from fedbiscuit.rundir import atomic_write

    path = Path(run_dir) / "report.html"
    atomic_write(path, render(read_run(Path(run_dir))))
    return path
