"""One run = one folder: what is written is there, what was half written is not."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fedbiscuit
from fedbiscuit.rundir import (
    CRASH_POINTS,
    RunDir,
    atomic_write,
    crash_point,
    expected_of,
    machine_differences,
    machine_manifest,
    read_metadata,
    read_weights,
    run_path,
    sha256_of,
    write_weights,
)
from fedbiscuit.types import ConfigError, EnvironmentFault, IntegrityError, Weights

CONFIG = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


def adapter(start: float = 0.0) -> Weights:
    return {
        "q.lora_A.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3) + start,
        "q.lora_B.weight": torch.arange(8, dtype=torch.bfloat16).reshape(4, 2),
    }


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one
    )


# Files


def test_a_json_file_comes_back_and_a_missing_one_is_none(tmp_path: Path) -> None:
    with RunDir.open(tmp_path / "a", resume=False) as run:
        run.write_json("evaluation.json", {"rows": [1, 2.5, None], "who": "Zoë"})
        assert run.read_json("evaluation.json") == {"rows": [1, 2.5, None], "who": "Zoë"}
        assert run.read_json("report.json") is None
        run.write_text("report.html", "<p>")
        assert (run.path / "report.html").read_text() == "<p>"


def test_nan_in_metrics_becomes_null_and_a_line_separator_cannot_split_a_line(tmp_path: Path) -> None:
    with RunDir.open(tmp_path / "a", resume=False) as run:
        run.append_lines("m.jsonl", [{"loss": float("nan"), "text": "a\u2028b\x85c\ud800"}])
        assert run.read_lines("m.jsonl") == [{"loss": None, "text": "a\u2028b\x85c\ud800"}]
        assert len((run.path / "m.jsonl").read_text("utf-8").splitlines()) == 1


def test_lines_are_added_and_the_first_ones_kept(tmp_path: Path) -> None:
    with RunDir.open(tmp_path / "a", resume=False) as run:
        run.append_lines("metrics.jsonl", [{"round": 0}, {"round": 1}])
        run.append_lines("metrics.jsonl", [{"round": 2}])
        assert run.read_lines("metrics.jsonl") == [{"round": 0}, {"round": 1}, {"round": 2}]
        run.keep_lines("metrics.jsonl", 2)
        assert (run.path / "metrics.jsonl").read_text() == '{"round": 0}\n{"round": 1}\n'
        assert run.read_lines("nothing.jsonl") == []
        run.keep_lines("nothing.jsonl", 0)
        with pytest.raises(IntegrityError, match=r"metrics.jsonl: 2 lines, the saved state has seen 3"):
            run.keep_lines("metrics.jsonl", 3)


def test_a_line_that_was_cut_off_is_left_out_said_and_not_continued(tmp_path: Path, caplog: Any) -> None:
    with RunDir.open(tmp_path / "a", resume=False) as run:
        run.append_lines("metrics.jsonl", [{"round": 0}])
        with (run.path / "metrics.jsonl").open("a") as file:
            file.write('{"round": 1')
        assert run.read_lines("metrics.jsonl") == [{"round": 0}]
        run.append_lines("metrics.jsonl", [{"round": 1}])
        assert (run.path / "metrics.jsonl").read_text() == '{"round": 0}\n{"round": 1}\n'
        assert "cut off" in caplog.text
        assert len(run.notices) == 2


def test_a_broken_line_in_the_middle_names_file_and_line(tmp_path: Path) -> None:
    with RunDir.open(tmp_path / "a", resume=False) as run:
        (run.path / "metrics.jsonl").write_text('{"round": 0}\n{"round"\n{"round": 2}\n')
        with pytest.raises(IntegrityError, match=r"metrics.jsonl:2: cannot be read"):
            run.read_lines("metrics.jsonl")


# States


def test_a_saved_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    with RunDir.open(tmp_path / "a", resume=False) as run:
        assert run.load_state("selectors") is None
        values = {"grouping": {"ann": 0, "bo": 1}, "loss": 0.1 + 0.2, "norms": [1e-300, 3.0]}
        run.save_state("selectors", 7, {"u0": adapter(), "u1": adapter(9), "optimizer": {}}, values)
    with RunDir.open(tmp_path / "a", resume=True) as run:
        found = run.load_state("selectors")
        assert found is not None
        step, tensors, back = found
        assert (step, back, list(tensors)) == (7, values, ["u0", "u1", "optimizer"])
        assert same(tensors["u0"], adapter())
        assert same(tensors["u1"], adapter(9))
        assert run.load_state("alignment") is None


def test_the_last_three_states_are_kept_and_the_newest_is_loaded(tmp_path: Path) -> None:
    with RunDir.open(tmp_path / "a", resume=False) as run:
        for step in (8, 9, 10, 11, 100):
            run.save_state("s", step, {"u0": adapter(step)}, {"step": step})
        assert sorted(os.listdir(run.path / "state" / "s")) == ["00000010", "00000011", "00000100"]
        assert run.load_state("s")[0] == 100  # type: ignore[index]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    with RunDir.open(tmp_path / "a", resume=False) as run:
        run.save_state("s", 1, {"u0": adapter(1)}, {})
        run.save_state("s", 1, {"u0": adapter(2)}, {})
        assert same(run.load_state("s")[1]["u0"], adapter(2))  # type: ignore[index]
        assert os.listdir(run.path / "state" / "s") == ["00000001"]


def test_values_that_json_would_change_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with RunDir.open(tmp_path / "a", resume=False) as run:
        with pytest.raises(TypeError, match="key 0 is not text"):
            run.save_state("s", 1, {}, {"groups": {0: 1}})
        with pytest.raises(IntegrityError, match=r"losses\[1\]: nan cannot be saved"):
            run.save_state("s", 1, {}, {"losses": [0.0, float("nan")]})
        assert run.load_state("s") is None


def test_equal_states_are_equal_files_whatever_the_order_of_the_tensors(tmp_path: Path) -> None:
    backwards = dict(reversed(adapter().items()))
    notes = {"z": "1", "a": "2"}
    one = write_weights(tmp_path / "1.safetensors", adapter(), notes)
    assert one == write_weights(tmp_path / "2.safetensors", backwards, dict(reversed(notes.items())))
    assert one == sha256_of(tmp_path / "1.safetensors")


# Adapters


def test_an_adapter_comes_back_and_its_notes_with_it(tmp_path: Path) -> None:
    with RunDir.open(tmp_path / "a", resume=False) as run:
        run.save_adapter("selectors/u0", adapter(1), CONFIG, "# card", base="f00d")
        run.save_adapter("selectors/u0", adapter(), CONFIG, "# card", base="f00d")
        assert same(run.load_adapter("selectors/u0", expected_of(adapter()), base="f00d"), adapter())
        folder = run.path / "selectors" / "u0"
        assert sorted(os.listdir(folder)) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
        assert json.loads((folder / "adapter_config.json").read_text()) == CONFIG
        assert read_metadata(folder / "adapter_model.safetensors")["fedbiscuit.base"] == "f00d"


def test_the_library_reads_what_we_write_and_we_read_what_it_writes(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = {**adapter(), "steps": torch.tensor(3, dtype=torch.int64), "half": torch.ones(5, dtype=torch.float16)}
    write_weights(tmp_path / "ours.safetensors", weights, {})
    assert same(load_file(tmp_path / "ours.safetensors"), weights)
    save_file(weights, tmp_path / "theirs.safetensors")
    assert same(read_weights(tmp_path / "theirs.safetensors", expected_of(weights)), weights)


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda key: key != "__metadata__"),
        st.tuples(
            st.lists(st.integers(1, 4), max_size=3),
            st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8]),
        ),
        max_size=5,
    )
)
def test_any_tensors_come_back_as_they_were(tmp_path_factory: Any, shapes: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("w") / "w.safetensors"
    generator = torch.Generator().manual_seed(0)
    weights = {
        key: (torch.randn(shape, generator=generator) * 9).abs().to(dtype) for key, (shape, dtype) in shapes.items()
    }
    write_weights(path, weights, {"note": "x"})
    assert same(read_weights(path, expected_of(weights)), weights)


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580])
def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path: Path, length: int) -> None:
    write_weights(tmp_path / "w.safetensors", adapter(), {"note": ""})
    start = int.from_bytes((tmp_path / "w.safetensors").read_bytes()[:8], "little")
    write_weights(tmp_path / "w.safetensors", adapter(), {"note": "x" * (length - start)})
    assert (tmp_path / "w.safetensors").read_bytes()[:8] == length.to_bytes(8, "little")
    assert same(read_weights(tmp_path / "w.safetensors"), adapter())


# Settings and data of a resumed run


def test_resuming_with_another_setting_names_the_first_key_that_differs(tmp_path: Path) -> None:
    text = "seed: 0\nselectors:\n  rounds: 4\n  local:\n    lr: 0.0001\n"
    with RunDir.open(tmp_path / "a", resume=False) as run:
        run.check_same("config.yaml", text, "setting")  # nothing saved yet
        run.write_text("config.yaml", text)
        run.check_same("config.yaml", text.replace("0.0001", "1e-4"), "setting")
        with pytest.raises(
            ConfigError, match=r"config.yaml: selectors.local.lr: setting of this run: 0.0001, now: 0.1;"
        ):
            run.check_same("config.yaml", text.replace("0.0001", "0.1"), "setting")
        with pytest.raises(ConfigError, match=r"selectors.rounds: setting of this run: 4, now: absent"):
            run.check_same("config.yaml", text.replace("  rounds: 4\n", ""), "setting")


def test_fault_30_data_that_changed_during_a_run_stop_the_resume_with_the_file_named(tmp_path: Path) -> None:
    data = tmp_path / "votes.jsonl"
    data.write_text('{"prompt": "a"}\n')
    with RunDir.open(tmp_path / "a", resume=False) as run:
        run.write_json("manifest.json", {"torch": "2", "data": {data.name: sha256_of(data)}})
        run.check_same("manifest.json", {"data": {data.name: sha256_of(data)}}, "data file")
        data.write_text('{"prompt": "b"}\n')
        with pytest.raises(
            IntegrityError, match=r"data.votes.jsonl: data file of this run: [0-9a-f]{64}, now: [0-9a-f]"
        ):
            run.check_same("manifest.json", {"data": {data.name: sha256_of(data)}}, "data file")


def test_fault_90_another_machine_is_named(tmp_path: Path) -> None:
    here = machine_manifest()
    assert here["python"].startswith("3.")
    assert here["torch"]
    assert here["cpu_capability"]
    assert here["threads"] >= 1
    assert machine_differences(here, here) == []
    there = {**here, "cpu_capability": "DEFAULT", "numpy": "0"}
    (sentence,) = machine_differences(here, there)
    assert sentence.startswith(f"cpu_capability was {here['cpu_capability']}, is DEFAULT:")
    assert str(tmp_path) not in json.dumps(here)


@pytest.mark.parametrize("packed", [False, True])
def test_the_commit_is_read_from_the_folder_without_git(tmp_path: Path, monkeypatch: Any, packed: bool) -> None:
    from fedbiscuit.rundir import machine

    commit, git = "0123456789" * 4, tmp_path / ".git"
    monkeypatch.setattr(fedbiscuit, "__file__", str(tmp_path / "src" / "fedbiscuit" / "__init__.py"))
    (tmp_path / "src").mkdir()
    monkeypatch.chdir(tmp_path / "src")
    (git / "refs" / "heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    assert machine.git_commit() is None
    if packed:
        (git / "packed-refs").write_text(f"# pack-refs\n{commit} refs/heads/main\n")
    else:
        (git / "refs" / "heads" / "main").write_text(commit + "\n")
    assert machine.git_commit() == commit


# Opening


def test_a_used_folder_is_refused_without_resume_and_opened_with_it(tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    with RunDir.open(tmp_path / "runs" / "a", resume=True) as run:
        assert "nothing to resume, this is a start" in caplog.text
        run.write_text("config.yaml", "seed: 0\n")
    with pytest.raises(
        ConfigError, match=r"holds a run already; add --resume to go on with it, or give .* another name"
    ):
        RunDir.open(tmp_path / "runs" / "a", resume=False)
    with RunDir.open(tmp_path / "runs" / "a", resume=True) as run:
        assert run.notices == []


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"not the folder of a run \(thesis.txt is in it\)"):
        RunDir.open(tmp_path, resume=True)
    with pytest.raises(ConfigError, match="there is a file of this name"):
        RunDir.open(tmp_path / "thesis.txt", resume=True)
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_a_run_can_be_looked_at_while_another_process_writes_it(tmp_path: Path) -> None:
    with RunDir.open(tmp_path / "a", resume=False) as run:
        run.save_state("s", 3, {"u0": adapter()}, {})
        look = RunDir.view(tmp_path / "a")
        assert look.load_state("s")[0] == 3  # type: ignore[index]
        with pytest.raises(RuntimeError, match="open for reading only"):
            look.write_text("x.txt", "")
    with pytest.raises(RuntimeError, match="closed"):
        run.write_text("x.txt", "")
    with pytest.raises(ConfigError, match="there is no run here"):
        RunDir.view(tmp_path / "b")


def test_run_path_stays_inside(tmp_path: Path) -> None:
    assert run_path(tmp_path, "demo-1") == tmp_path / "demo-1"
    with pytest.raises(ConfigError, match="is not a name for a run"):
        run_path(tmp_path, "../x")


def test_importing_the_run_folder_does_not_import_torch() -> None:
    code = "import sys, fedbiscuit.rundir; print('torch' in sys.modules, 'numpy' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["False", "False"]


def test_atomic_write_gives_a_digest_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    digest = atomic_write(tmp_path / "a.txt", "hello")
    assert digest == sha256_of(tmp_path / "a.txt")
    assert os.listdir(tmp_path) == ["a.txt"]
    with pytest.raises(EnvironmentFault, match=r"missing/a.txt"):
        atomic_write(tmp_path / "missing" / "a.txt", "hello")


# kill -9


CHAOS = r"""
import hashlib, json, os, random, signal, sys, time
from pathlib import Path
import torch
from fedbiscuit.rundir import RunDir, sha256_of
from fedbiscuit.types import IntegrityError

base, points = Path(sys.argv[1]), json.loads(sys.argv[2])
CONFIG = {"peft_type": "LORA", "r": 2, "target_modules": ["q"]}
ROUNDS = 6

def train(weights, step):
    return {key: tensor * 0.5 + step for key, tensor in weights.items()}

def work(folder, tell=None):
    "The loop of a run: goes on from the last complete state, whatever happened."
    with RunDir.open(folder, resume=True) as run:
        found = run.load_state("s") or (0, {"u0": {"a": torch.ones(4, 3)}, "u1": {"b": torch.zeros(2)}}, {"seen": []})
        step, tensors, values = found
        if tell is not None:
            os.write(tell, b"%d\n" % step)
        run.keep_lines("metrics.jsonl", step)
        for step in range(step + 1, ROUNDS + 1):
            tensors = {key: train(weights, step) for key, weights in tensors.items()}
            values = {"seen": values["seen"] + [step]}
            run.append_lines("metrics.jsonl", [{"round": step, "sum": float(tensors["u0"]["a"].sum())}])
            run.save_state("s", step, tensors, values)
            if tell is not None:
                os.write(tell, b"%d\n" % step)
            run.save_adapter("selectors/u0", tensors["u0"], CONFIG, f"card {step}")
        run.save_adapter("selectors/u0", tensors["u0"], CONFIG, f"card {step}")
        run.write_json("evaluation.json", {"rounds": step})

def tree(folder):
    return {str(p.relative_to(folder)): sha256_of(p) for p in sorted(folder.rglob("*")) if p.is_file()}

def killed(folder, environment, delay=None):
    "One attempt in a child; whether it was killed, and the last step that it said was saved."
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.environ.update(environment)
        try:
            work(folder, write)
        finally:
            os._exit(0)
    os.close(write)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    said = os.fdopen(read).read().split()
    return os.WIFSIGNALED(os.waitpid(child, 0)[1]), int(said[-1]) if said else 0

def look(folder):
    "What a resume finds: the state, and what must never be there."
    with RunDir.open(folder, resume=True) as run:
        found = run.load_state("s")
        lines = run.read_lines("metrics.jsonl")
        try:
            run.load_adapter("selectors/u0")
            whole = True
        except IntegrityError as error:
            whole = "there is no adapter here" in str(error)
        dirt = [str(p) for p in folder.rglob("*") if p.name.startswith((".tmp-", ".old-"))]
        return {"step": found[0] if found else 0, "lines": len(lines), "adapter": whole, "dirt": dirt,
                "seen": found[2]["seen"] if found else [], "notices": run.notices}

work(base / "whole")
whole = tree(base / "whole")
results = []
for point in points:
    folder = base / point.replace(":", "-")
    dead, said = killed(folder, {"FEDBISCUIT_CRASH_AT": point})
    result = {"point": point, "dead": dead, "said": said, **look(folder)}
    work(folder)
    results.append({**result, "same": tree(folder) == whole})
rng, folder, kills = random.Random(1), base / "random", 0
for _ in range(25):
    kills += killed(folder, {}, rng.uniform(0.002, 0.06))[0]
work(folder)
print(json.dumps({"points": results, "kills": kills, "same": tree(folder) == whole}))
"""

PASSES = {"file_renamed": (1,), "file_written": (1,), "file_half": (1, 2, 7, 9, 30, 41)}
POINTS = [f"{point}:{n}" for point in CRASH_POINTS for n in PASSES.get(point, (1, 4))]


@pytest.fixture(scope="module")
def chaos(tmp_path_factory: Any) -> dict[str, Any]:
    """Every named point in one process that imports torch once and forks."""
    command = [sys.executable, "-c", CHAOS, str(tmp_path_factory.mktemp("chaos")), json.dumps(POINTS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)  # type: ignore[no-any-return]


@pytest.mark.parametrize("point", POINTS)
def test_fault_83_after_kill_9_at_a_named_point_the_last_complete_state_is_there(
    chaos: dict[str, Any], point: str
) -> None:
    (result,) = [result for result in chaos["points"] if result["point"] == point]
    assert result["dead"], "the point was not reached"
    assert result["said"] <= result["step"] <= result["said"] + 1
    assert result["seen"] == list(range(1, result["step"] + 1))
    assert result["step"] <= result["lines"] <= result["step"] + 1
    assert result["adapter"]
    assert result["dirt"] == []
    assert any("ended without closing" in notice for notice in result["notices"])


@pytest.mark.parametrize("point", POINTS)
def test_fault_83_the_resumed_run_leaves_the_same_bytes_as_an_uninterrupted_one(
    chaos: dict[str, Any], point: str
) -> None:
    (result,) = [result for result in chaos["points"] if result["point"] == point]
    assert result["same"]


def test_fault_83_kills_at_random_times_change_nothing_either(chaos: dict[str, Any]) -> None:
    assert chaos["kills"] >= 1
    assert chaos["same"]


def test_a_crash_point_does_nothing_unless_it_is_asked_for(monkeypatch: Any) -> None:
    monkeypatch.delenv("FEDBISCUIT_CRASH_AT", raising=False)
    crash_point("state_begin")
    monkeypatch.setenv("FEDBISCUIT_CRASH_AT", "elsewhere:1")
    crash_point("state_begin")


# Power loss, which a kill does not show: what must be on the disk before what


def test_every_file_and_folder_is_synced_before_and_after_it_is_renamed(tmp_path: Path, monkeypatch: Any) -> None:
    events: list[tuple[str, str]] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def note_fsync(descriptor: int) -> None:
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def note_rename(old: Any, new: Any) -> None:
        events.append(("rename", Path(new).name))
        (rename if Path(old).is_dir() else replace)(old, new)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to see which file is synced")
    with RunDir.open(tmp_path / "a", resume=False) as run:
        run.save_state("s", 1, {}, {})
        monkeypatch.setattr(os, "fsync", note_fsync)
        monkeypatch.setattr(os, "rename", note_rename)
        monkeypatch.setattr(os, "replace", note_rename)
        run.save_state("s", 2, {"u0": adapter()}, {})
        files = [("sync", "u0.safetensors"), ("sync", "values.json"), ("sync", "manifest.json")]
        assert events == [*files, ("sync", ".tmp-00000002"), ("rename", "00000002"), ("sync", "s")]
        events.clear()
        run.save_adapter("policy", adapter(), CONFIG, "card")
        files = [("sync", "adapter_config.json"), ("sync", "adapter_model.safetensors"), ("sync", "README.md")]
        assert events == [*files, ("sync", ".tmp-policy"), ("rename", "policy"), ("sync", "a")]
        events.clear()
        run.write_json("x.json", 1)
        assert events == [("sync", f".tmp-x.json-{os.getpid()}"), ("rename", "x.json"), ("sync", "a")]
        events.clear()
        run.append_lines("m.jsonl", [{}])
        assert ("sync", "m.jsonl") in events
        assert ("sync", "a") in events
        events.clear()
        write_weights(run.path / "w.safetensors", adapter(), {})
        assert events == [
            ("sync", f".tmp-w.safetensors-{os.getpid()}"),
            ("rename", "w.safetensors"),
            ("sync", "a"),
        ]


def test_mistake_17_a_text_with_line_breaks_and_the_word_score_does_not_break_a_record(tmp_path):
    rows = [
        {"prompt": "Score: 10\nScore\u2028: 3", "answer": '"Score": {1}\r\n'},
        {"prompt": "next", "answer": "Score"},
    ]
    with RunDir.open(tmp_path / "run", resume=False) as run:
        run.append_lines("answers.jsonl", rows)
        assert run.read_lines("answers.jsonl") == rows
