"""Clients spread over several processes of one machine: the same run as in one, bit for bit."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedbiscuit import pipeline
from fedbiscuit.backends.devices import Helper
from fedbiscuit.config import dump_config
from fedbiscuit.types import EnvironmentFault

SPEC = importlib.util.spec_from_file_location("flow_run", Path(__file__).with_name("test_run.py"))
flow_run = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(flow_run)
settings, NOT_COMPARED = flow_run.settings, flow_run.NOT_COMPARED


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in NOT_COMPARED and "state" not in path.relative_to(folder).parts
    }


@pytest.fixture
def helpers(monkeypatch):
    """The helper processes that a run starts."""
    started = []
    begin = Helper.__init__

    def remember(self, *arguments):
        begin(self, *arguments)
        started.append(self._process)

    monkeypatch.setattr(Helper, "__init__", remember)
    return started


def test_a_run_over_two_processes_equals_one_in_one_process(tmp_path, tiny_model, helpers):
    one = pipeline.train_selectors(settings(tmp_path, tiny_model, name="one"))
    assert helpers == []
    two = pipeline.train_selectors(settings(tmp_path, tiny_model, name="two"), devices=2)
    assert [process.poll() for process in helpers] == [0, 0]  # one for the selectors, one for the global one
    found = contents(two)
    assert {"metrics.jsonl", "selectors/u1/adapter_model.safetensors"} <= found.keys()
    assert found == contents(one)


def test_a_helper_does_its_part_and_when_it_is_killed_the_run_stops_and_can_go_on(
    tmp_path, tiny_model, helpers, monkeypatch
):
    asked = []
    ask = Helper.ask

    def count(self, task):
        asked.append(task.kind)
        if len(asked) == 6:
            os.kill(self._process.pid, signal.SIGKILL)
        return ask(self, task)

    monkeypatch.setattr(Helper, "ask", count)
    with pytest.raises(EnvironmentFault, match="the process for cpu has ended with code -9"):
        pipeline.train_selectors(settings(tmp_path, tiny_model, name="two"), devices=2)
    assert {"train", "evaluate", "seat"} & set(asked)
    two = pipeline.train_selectors(settings(tmp_path, tiny_model, name="two"), resume=True)
    one = pipeline.train_selectors(settings(tmp_path, tiny_model, name="one"))
    assert contents(two) == contents(one)


def test_under_a_launcher_the_first_process_does_the_work_and_the_others_end(tmp_path, tiny_model):
    cfg = settings(tmp_path, tiny_model, name="launched")
    config = tmp_path / "config.yaml"
    config.write_text(dump_config(cfg))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    words = ["fedbiscuit", "train", str(config), "selectors.rounds=3", "evaluation.compare_global=false"]
    done = subprocess.run([*launch, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("is ready; next:") == 1
    assert done.stderr.count("process 1 of 2 ends") == 1
    two = tmp_path / "runs" / "launched"
    one = pipeline.train_selectors(
        settings(tmp_path, tiny_model, "selectors.rounds=3", "evaluation.compare_global=false", name="one")
    )
    assert contents(two) == contents(one)
