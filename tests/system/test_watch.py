"""The page of a run that goes on: a real run in one process, and beside it another one that makes its page again."""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from fedbiscuit.config import dump_config
from fedbiscuit.report import write_report
from fedbiscuit.rundir import RunDir

HERE = Path(__file__).resolve().parent.parent
settings = runpy.run_path(str(HERE / "flow" / "test_run.py"))["settings"]
write_fake_run: Callable[..., Path] = runpy.run_path(str(HERE / "unit" / "test_report.py"))["write_fake_run"]
REFRESH = '<meta http-equiv="refresh" content="1">'
PATIENCE = 300.0


def start(*words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    words = (sys.executable, "-m", "fedbiscuit", *words)
    return subprocess.Popen(words, env=environment, **pipes)


def wait_for(found: Callable[[], object], *processes: subprocess.Popen[str]) -> None:
    end = time.monotonic() + PATIENCE
    while not found():
        assert time.monotonic() < end, "waited too long"
        for process in processes:
            assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def test_a_page_is_written_again_while_a_run_of_another_process_goes_on_and_is_whole_at_its_end(tmp_path, tiny_model):
    longer = ("selectors.rounds=25", "selectors.eval_every=1", "alignment.steps=20", "evaluation.compare_global=false")
    (tmp_path / "cfg.yaml").write_text(dump_config(settings(tmp_path, tiny_model, *longer)))
    run = tmp_path / "runs" / "one"
    page = run / "report.html"
    training = start("train", str(tmp_path / "cfg.yaml"))
    wait_for(lambda: (run / "config.yaml").exists(), training)
    watcher = start("report", str(run), "--watch", "1")
    seen: list[int] = []

    def look() -> bool:
        if page.exists():
            text = page.read_text("utf-8")
            assert text.endswith("</html>\n")
            if REFRESH in text and (found := re.search(r"round (\d+) of 25 done", text)) and int(found[1]) not in seen:
                seen.append(int(found[1]))
        return training.poll() is not None

    wait_for(look)
    told, errors = training.communicate()
    assert training.returncode == 0, errors
    told, errors = watcher.communicate(timeout=PATIENCE)
    assert watcher.returncode == 0, errors
    assert "warning" not in errors
    assert len(seen) >= 2, seen  # the page moved on with the run
    assert seen == sorted(seen)
    assert told.splitlines()[-1] == f"{page}: the run has ended, and this page shows all of it"
    last = page.read_bytes()
    assert REFRESH.encode() not in last
    assert b"the selectors are trained, nothing is labeled yet" in last
    assert write_report(run).read_bytes() == last


def test_ctrl_c_ends_the_watching_and_leaves_a_page_that_loads_itself_no_more(tmp_path):
    run = write_fake_run(tmp_path / "fake")
    (run / "evaluation.json").unlink()
    with RunDir.open(run, resume=True) as opened:
        watcher = start("report", str(run), "--watch", "1")
        page = run / "report.html"
        wait_for(lambda: page.exists() and REFRESH in page.read_text("utf-8"), watcher)
        before = page.stat().st_mtime_ns
        time.sleep(2.5)
        assert page.stat().st_mtime_ns == before  # nothing has changed: nothing is written
        row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        opened.append_lines("metrics.jsonl", [{**row, "round": row["round"] + 1}])
        wait_for(lambda: page.stat().st_mtime_ns != before, watcher)
        assert REFRESH in page.read_text("utf-8")
        watcher.send_signal(signal.SIGINT)
        _, errors = watcher.communicate(timeout=PATIENCE)
    assert watcher.returncode == 130, errors
    assert REFRESH not in page.read_text("utf-8")


def test_a_run_that_nobody_writes_has_ended_also_where_it_was_killed(tmp_path):
    run = write_fake_run(tmp_path / "fake")
    assert not RunDir.view(run).in_use()
    holder = "import sys, os, signal; from fedbiscuit.rundir import RunDir; RunDir.open(sys.argv[1], resume=True); "
    command = [sys.executable, "-c", holder + "os.kill(os.getpid(), signal.SIGKILL)", str(run)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert (run / "run.lock").read_text()  # it still names the process that is gone
    assert not RunDir.view(run).in_use()
    with RunDir.open(run, resume=True):
        assert RunDir.view(run).in_use()
    assert not RunDir.view(run).in_use()


def test_a_wrong_number_of_seconds_is_named(tmp_path, capsys):
    from fedbiscuit.cli import main

    run = write_fake_run(tmp_path / "fake")
    assert main(["report", str(run), "--watch", "-1"]) == 2
    assert (
        "--watch: -1 is not permitted; it must be a whole number of seconds from 1 to 86400" in capsys.readouterr().err
    )
