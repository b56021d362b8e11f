"""`make quickstart-flower` on a two-layer model: the same result over Flower, nothing left behind, no process that calls home."""

from __future__ import annotations

import importlib.util
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "quickstart_flower.py"
SECONDS = 1200
SMALL = (
    "model.device=cpu",
    "model.lora.r=2",
    "model.lora.layers_to_transform=[]",
    "data.demo.num_clients=6",
    "data.demo.comparisons_per_client=6",
    "data.demo.validation_per_client=2",
    "data.demo.test_per_client=2",
    "selectors.num_adapters=1",
    "selectors.rounds=2",
    "selectors.local.steps=1",
    "selectors.local.batch_size=2",
)

needs_flower = pytest.mark.skipif(
    importlib.util.find_spec("flwr") is None,
    reason="SKIPPED: flwr is not installed, so the quickstart over Flower is not run (pip install 'fedbiscuit[flower]')",
)


def below(pid: int) -> list[int]:
    """All processes that a process has started, and those that they have."""
    found = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            for child in map(int, children.read_text().split()):
                found += [child, *below(child)]
        except OSError:
            continue
    return found


def read(pid: int, name: str) -> list[str]:
    """The words of a process's command line or environment; none when it has gone."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def lives(pid: int) -> bool:
    """Whether a process is there and no mere entry that nobody has collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@needs_flower
@pytest.mark.skipif(
    not Path("/proc/self/environ").exists(), reason="SKIPPED: it looks at processes as Linux shows them"
)
@pytest.mark.quality  # minutes; tests/system/test_flower.py compares the same way in `make test`
def test_the_quickstart_over_flower_ends_in_the_numbers_of_one_process_and_no_process_calls_home(tmp_path, tiny_model):
    command = [sys.executable, SCRIPT, "--config", ROOT / "configs" / "demo.yaml", "--folder", tmp_path / "out"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("FLWR_")}
    out = (tmp_path / "said").open("wb")
    words = [*map(str, command), *SMALL, f"model.base={tiny_model}"]
    process = subprocess.Popen(words, stdout=out, stderr=out, env=environment | {"OMP_NUM_THREADS": "1"})
    programs, loud, seen, end = set(), set(), set(), time.monotonic() + SECONDS
    try:
        while process.poll() is None:
            assert time.monotonic() < end, (tmp_path / "said").read_text()
            for pid in below(process.pid):
                seen.add(pid)
                names = [Path(word).name for word in read(pid, "cmdline")[:2]]
                environ = read(pid, "environ")
                if flower := {name for name in names if name.startswith(("flwr", "flower-"))}:
                    programs |= flower
                    if environ and "FLWR_TELEMETRY_ENABLED=0" not in environ:
                        loud |= flower
            time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(300)
        out.close()
    said = (tmp_path / "said").read_text()
    assert process.returncode == 0, said
    assert "adapters, groups and all metrics are the same, bit for bit" in said
    assert said.count("validation accuracy") == 1
    assert {
        "flower-superlink",
        "flower-superexec",
        "flower-supernode",
        "flwr",
        "flwr-serverapp",
        "flwr-clientapp",
    } <= programs
    assert not loud
    assert not [pid for pid in seen if lives(pid)]


def test_what_the_quickstart_has_started_ends_with_it_however_that_comes(tmp_path):
    script = runpy.run_path(str(SCRIPT))
    script["_started"].__wrapped__.__globals__["PROGRAM"] = [
        sys.executable,
        "-c",
        "import sys, time; print('up', flush=True); time.sleep(600)",
    ]
    started = []

    def interrupted() -> None:
        with script["background"](tmp_path / "log", "server", "start") as (process, log):
            started.append(process)
            script["await_line"]("up", process, log)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert started[0].returncode == -signal.SIGTERM


def test_two_runs_that_differ_in_one_number_are_told_apart(tmp_path, capsys):
    script = runpy.run_path(str(SCRIPT))
    line = '{"round": 0, "phase": "warmup", "bytes_up": %d, "metrics": {"num_replies": 3, "delta_norm": {"u0": %s}}}\n'
    for name, up, norm in (("there", 5, "0.5"), ("here", 0, "0.5"), ("else", 0, "0.25")):
        (tmp_path / name / "selectors" / "u0").mkdir(parents=True)
        (tmp_path / name / "selectors" / "u0" / "adapter_model.safetensors").write_bytes(b"weights")
        (tmp_path / name / "selectors" / "groups.json").write_text("{}")
        (tmp_path / name / "metrics.jsonl").write_text(line % (up, norm))
    assert script["side_by_side"](tmp_path / "there", tmp_path / "here")
    assert "DIFFERENT" not in capsys.readouterr().out
    assert not script["side_by_side"](tmp_path / "there", tmp_path / "else")
    assert "round 1 (warmup), length of the step of u0" in capsys.readouterr().out
    (tmp_path / "here" / "selectors" / "u0" / "adapter_model.safetensors").write_bytes(b"others")
    assert not script["side_by_side"](tmp_path / "there", tmp_path / "here")
