"""Work spread over several processes of one machine: the clients' as in one, bit for bit; DPO's but for the last bits."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedbiscuit import pipeline
from fedbiscuit.backends.devices import Helper
from fedbiscuit.backends.wire import unpack, unpack_task
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


def test_int8_is_rounded_alike_in_every_process(tmp_path, tiny_model, helpers):
    changes = ("selectors.comm_dtype=int8", "evaluation.compare_global=false", "selectors.rounds=3")
    one = pipeline.train_selectors(settings(tmp_path, tiny_model, *changes, name="one"))
    two = pipeline.train_selectors(settings(tmp_path, tiny_model, *changes, name="two"), devices=2)
    assert len(helpers) == 1
    assert contents(two) == contents(one)


def test_a_helper_does_its_part_and_when_it_is_killed_the_run_stops_and_can_go_on(
    tmp_path, tiny_model, helpers, monkeypatch
):
    asked = []
    ask = Helper.ask

    def count(self, message):
        asked.append(unpack_task(message).kind)
        if len(asked) == 6:
            os.kill(self._process.pid, signal.SIGKILL)
        return ask(self, message)

    monkeypatch.setattr(Helper, "ask", count)
    with pytest.raises(EnvironmentFault, match="the process for cpu has ended with code -9"):
        pipeline.train_selectors(settings(tmp_path, tiny_model, name="two"), devices=2)
    assert {"train", "evaluate", "seat"} & set(asked)
    two = pipeline.train_selectors(settings(tmp_path, tiny_model, name="two"), resume=True)
    one = pipeline.train_selectors(settings(tmp_path, tiny_model, name="one"))
    assert contents(two) == contents(one)


# DPO


@pytest.fixture(scope="module")
def labeled(tmp_path_factory, tiny_model):
    """Where runs are, and how to get the settings of one that is labeled, by its name."""
    tmp_path = tmp_path_factory.mktemp("labeled")
    little = ["selectors.rounds=3", "evaluation.compare_global=false", "alignment.lr=0.001"]
    cfg = settings(tmp_path, tiny_model, *little, name="labeled")
    pipeline.train_selectors(cfg)
    folder = pipeline.label(cfg)

    def another(name: str, *overrides: str):
        shutil.copytree(folder, folder.with_name(name))
        return settings(tmp_path, tiny_model, *little, *overrides, name=name)

    return another


def assert_same_policy(one: Path, two: Path) -> None:
    """Weights and what was reported are equal within 1e-5."""
    weights, theirs = (load_file(folder / "policy" / "adapter_model.safetensors") for folder in (one, two))
    assert weights.keys() == theirs.keys()
    for name in weights:
        torch.testing.assert_close(theirs[name], weights[name], rtol=0, atol=1e-5)
    rows, their_rows = (flow_run.lines(folder / "alignment.jsonl") for folder in (one, two))
    assert len({row["loss"] for row in rows}) == len(rows) == 5
    for row, their_row in zip(rows, their_rows, strict=True):
        row.pop("accuracy"), their_row.pop("accuracy")  # at first all margins are 0, but for the last bit
        assert their_row == pytest.approx(row, rel=1e-6, abs=1e-5)


def test_dpo_over_two_processes_equals_one_also_when_one_is_killed_and_the_run_goes_on(labeled, helpers, monkeypatch):
    how = (
        "alignment.batch_size=3",
        "alignment.grad_accum=2",
        "alignment.max_grad_norm=0.1",
        "alignment.soft_labels=true",
    )
    one = pipeline.align(labeled("dpo-one", *how))
    asked = []
    ask = Helper.ask

    def count(self, message):
        asked.append(unpack(message, {"step", "batches"})[0])
        if len(asked) == 5:
            os.kill(self._process.pid, signal.SIGKILL)
        return ask(self, message)

    monkeypatch.setattr(Helper, "ask", count)
    cfg = labeled("dpo-two", *how)
    with pytest.raises(
        EnvironmentFault, match=r"the process for cpu has ended with code -9 .* the same command goes on"
    ):
        pipeline.align(cfg, devices=2)
    two = one.with_name("dpo-two")
    assert [path.name for path in (two / "state" / "policy").iterdir()] == ["00000002"]
    assert pipeline.align(cfg, devices=2) == two
    assert [message["step"] for message in asked] == [None, 0, 1, 2, 3, 2, 3, 4]
    assert all(len(batch) == 3 for message in asked[1:] for _, batch in message["batches"])
    assert [process.poll() for process in helpers] == [-9, 0]
    assert_same_policy(one, two)


def test_no_process_is_started_for_a_device_without_a_pair(labeled, helpers, caplog):
    cfg = labeled("lonely", "alignment.batch_size=1", "alignment.steps=1")
    pipeline.align(cfg, devices=2)
    assert helpers == []
    assert "a step has 1 pairs, so it uses 1 of 2 devices" in caplog.text


def test_ctrl_c_ends_an_alignment_over_two_processes_and_says_how_to_go_on(labeled):
    cfg = labeled("stopped", "alignment.steps=100000", "alignment.batch_size=2")
    folder = Path(cfg.runs_dir) / cfg.name
    words = ["align", str(folder), "alignment.steps=100000", "--gpus", "2"]
    process = subprocess.Popen([sys.executable, "-m", "fedbiscuit", *words], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while not (folder / "state" / "policy").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    there = processes_of(folder)
    process.send_signal(signal.SIGINT)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 130, told
    assert len(there) == 2, there
    assert f"stopped; to go on: python -m fedbiscuit {' '.join(words)}" in told
    assert "Traceback" not in told
    assert "warning" not in told.lower()
    assert processes_of(folder) == []


def processes_of(folder: Path) -> list[str]:
    """The command lines on this machine that name a run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_bytes().replace(b"\0", b" ").decode())
    return [line for line in found if str(folder) in line]


# Launchers


COUNTING = """
import atexit, os, sys
if "-m" in sys.orig_argv and sys.orig_argv[sys.orig_argv.index("-m") + 1].startswith("fedbiscuit"):
    import torch
    backward, done = torch.Tensor.backward, []
    def counted(*arguments, **more):
        done.append(1)
        return backward(*arguments, **more)
    torch.Tensor.backward = counted
    atexit.register(lambda: print(len(done), file=open(os.path.join(os.environ["COUNTS"], str(os.getpid())), "w")))
"""
"""A ``sitecustomize.py``: each process of ours leaves a file that says how many backward passes it has computed."""


@pytest.fixture
def launched(tmp_path):
    """Run ``fedbiscuit WORDS`` under a launcher; how many backward passes its processes have computed, the least first."""
    shim = tmp_path / "shim"
    shim.mkdir()
    (shim / "sitecustomize.py").write_text(COUNTING)

    def launch(launcher: list[str], words: list[str]) -> tuple[list[int], subprocess.CompletedProcess]:
        counts = tmp_path / f"counts-{words[0]}"
        counts.mkdir()
        path = os.pathsep.join([str(shim), os.environ.get("PYTHONPATH", "")])
        env = os.environ | {"PYTHONPATH": path, "COUNTS": str(counts), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", *launcher, "-m", "fedbiscuit", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("is ready; next:") == 1
        assert done.stderr.count("process 1 of 2 ends") == 1
        return sorted(int(path.read_text()) for path in counts.iterdir()), done

    return launch


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
LITTLE = ["selectors.rounds=3", "evaluation.compare_global=false"]


@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_a_launcher_with_two_processes_trains_in_two_the_same_selectors(tmp_path, tiny_model, launched, launcher):
    if launcher is ACCELERATE:
        pytest.importorskip("accelerate", reason="accelerate is not installed, so `accelerate launch` is not tested")
    cfg = settings(tmp_path, tiny_model, *LITTLE, name="launched")
    config = tmp_path / "config.yaml"
    config.write_text(dump_config(cfg))
    counts, _ = launched(launcher, ["train", str(config)])
    one = pipeline.train_selectors(settings(tmp_path, tiny_model, *LITTLE, name="one"))
    assert contents(tmp_path / "runs" / "launched") == contents(one)
    assert len(counts) == 3  # of which the second one of the launcher does nothing
    assert counts[0] == 0 < counts[1]
    assert sum(counts) == sum(len(row["cohort"]) for row in flow_run.lines(one / "metrics.jsonl")) * 2


def test_accelerate_launch_with_two_processes_aligns_in_two_the_same_policy(labeled, launched):
    pytest.importorskip("accelerate", reason="accelerate is not installed, so `accelerate launch` is not tested")
    how = ("alignment.grad_accum=2",)
    cfg = labeled("dpo-launched", *how)
    counts, _ = launched(ACCELERATE, ["align", str(Path(cfg.runs_dir) / cfg.name), *how])
    one = pipeline.align(labeled("dpo-here", *how))
    assert counts == [0, 5, 5]  # a micro-batch of each step here and one there
    assert_same_policy(one, Path(cfg.runs_dir) / cfg.name)
