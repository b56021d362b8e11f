"""A run folder becomes one page: ``report.html``, self-contained, with plots.

``reading.py`` takes from the folder what the page needs, ``words.py`` says it in sentences, ``plots.py`` and ``charts.py``
draw it on the canvas of ``canvas.py``, ``page.py`` puts the page together from the pieces of ``markup.py``, and
``style.py`` has its colours; ``watching.py`` makes it again while a run goes on. Several folders become tables side by
side: ``comparison.py`` reads them, ``sidebyside.py`` writes. ``tasks.py`` has the tables of evaluations of their own.
matplotlib is imported when the first figure is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

__all__ = ["comparison_tables", "task_tables", "watch_report", "write_comparison", "write_report"]


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


def watch_report(run_dir: Path, seconds: int, written: Callable[[Path], None] = lambda path: None) -> Path:
    """The same again and again while a run goes on: ``watching.watch_report``."""
    from fedbiscuit.report import watching

    return watching.watch_report(Path(run_dir), seconds, written)


def comparison_tables(run_dirs: Sequence[Path]) -> list[tuple[str, Sequence[str], Sequence[Sequence[str]]]]:
    """Evaluated runs side by side, as tables: a title, a header and rows of texts each.

    Raises ``ConfigError`` for a folder that is no evaluated run.
    """
    from fedbiscuit.report.comparison import read_sections
    from fedbiscuit.report.sidebyside import tables_of

    return [(section.title, *table) for section in read_sections(run_dirs) for table in tables_of(section)]


def task_tables(run_dir: Path, task: str) -> tuple[list[tuple[str, Sequence[str], Sequence[Sequence[str]]]], list[str]]:
    """The tables of ``evaluations/TASK.json`` (a title, a header and rows of texts each), and notes to them."""
    from fedbiscuit.report.tasks import notes_of, tables_of
    from fedbiscuit.rundir import RunDir

    result = RunDir.view(run_dir).read_json(f"evaluations/{task}.json") or {}
    tables: list[tuple[str, Sequence[str], Sequence[Sequence[str]]]] = [
        (title, [name.lstrip("<") for name in header], rows) for title, header, rows in tables_of(result)
    ]
    return tables, notes_of(result)


def write_comparison(run_dirs: Sequence[Path], out: Path) -> list[Path]:
    """The same as Markdown in ``out``, with figures beside it; the paths of what was written."""
    from fedbiscuit.report.sidebyside import write_markdown

    return write_markdown(run_dirs, out)
