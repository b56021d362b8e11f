"""The page of a run that goes on: written again whenever the run's files have changed, by a process of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from fedbiscuit.report.page import render
from fedbiscuit.report.reading import FILES, FOLDERS, read_run
from fedbiscuit.rundir import RunDir, atomic_write

__all__ = ["watch_report"]

Signature = tuple[object, ...]


def watch_report(run_dir: Path, seconds: int, written: Callable[[Path], None] = lambda path: None) -> Path:
    """Write ``report.html`` again when the run's files have changed, looking every so many seconds, until the run ends.

    A run has ended when no process has its folder open. Until then the page in a browser loads itself again as often. The
    last page does not, also where Ctrl-C ends the watching. ``written`` is told of each page. Raises as
    ``write_report``; a run that has only just begun is waited for.
    """
    path, run, last = run_dir / "report.html", RunDir.view(run_dir), None
    try:
        while True:
            goes_on = run.in_use()  # asked before the files are read, so that the last page has the run's last word
            now = _signature(run_dir)
            begun = (run_dir / "config.yaml").exists()
            if not goes_on:
                return path
            if begun and now != last:
                atomic_write(path, render(read_run(run_dir), refresh=seconds))
                last = now
                written(path)
            time.sleep(seconds)
    finally:
        if (run_dir / "config.yaml").exists():
            atomic_write(path, render(read_run(run_dir)))
            written(path)


def _signature(run_dir: Path) -> Signature:
    """What differs when the page would: size and time of each file, and which folders are there."""
    found: list[object] = [name for name in FOLDERS if (run_dir / name).is_dir()]
    for name in FILES:
        path = run_dir / name
        if path.exists():
            state = path.stat()
            found.append((name, state.st_mtime_ns, state.st_size))
    return tuple(found)
