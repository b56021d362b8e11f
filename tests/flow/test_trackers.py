"""Trackers: each real library holds what the run's own files hold, each step once, and nothing that is private.

A library that is not installed is skipped, loudly; docs/trackers.md says what to install.
"""

from __future__ import annotations

import json
import logging
import os
import runpy
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedbiscuit import pipeline
from fedbiscuit.config import Config, dump_config
from fedbiscuit.tracking.scalars import scalars
from fedbiscuit.tracking.trackers import NEEDS, TRACKERS, check_installed, seen_in
from fedbiscuit.types import EnvironmentFault

HERE = runpy.run_path(str(Path(__file__).with_name("test_run.py")))
write_world, lines = HERE["write_world"], HERE["lines"]

Held = dict[str, list[tuple[int, float]]]
"""Name of a curve to its points: (step, value), in the order in which they are stored."""


def settings(tmp_path: Path, model: Path, *overrides: str, name: str = "one") -> Config:
    small = (
        "selectors.rounds=4",
        "selectors.save_every=2",
        "selectors.keep_every=0",
        "evaluation.compare_global=false",
    )
    return HERE["settings"](tmp_path, model, *small, *overrides, name=name)


@pytest.fixture(scope="module", autouse=True)
def here_only(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is sent anywhere, and nothing is put outside the tests' folder."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
            patch.delenv(name, raising=False)
        for name in ("WANDB_PROJECT", "WANDB_API_KEY", "WANDB_DIR"):
            patch.delenv(name, raising=False)
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("TRACKIO_DIR", str(tmp_path_factory.mktemp("trackio")))
        yield


# Reading back what a tracker holds, by its own means


def in_tensorboard(run: Path) -> Held:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    return {tag: [(one.step, one.value) for one in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def in_trackio(run: Path) -> Held:
    from trackio.sqlite_storage import SQLiteStorage

    name = f"{run.name}-{json.loads((run / 'trackers.json').read_text())['id']}"
    held: Held = {}
    for row in sorted(SQLiteStorage.get_logs("fedbiscuit", name), key=lambda one: one["step"]):
        for key, value in row.items():
            if "/" in key:
                held.setdefault(key, []).append((row["step"], value))
    return held


def in_wandb(run: Path) -> Held:
    held: Held = {}
    for folder in (run / "wandb").glob("offline-run-*"):
        for record in wandb_records(next(folder.glob("*.wandb"))):
            if record.WhichOneof("record_type") == "history":
                row = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                axis = next(key for key in row if key.split("/")[-1] in ("round", "step") and "/" in key)
                for key, value in row.items():
                    if "/" in key and key != axis:
                        held.setdefault(key, []).append((row[axis], value))
            if record.WhichOneof("record_type") == "summary":
                for item in record.summary.update:
                    key = item.key or "/".join(item.nested_key)
                    if key.startswith("evaluation/"):
                        held[key] = [(1, json.loads(item.value_json))]  # a later one takes the place of an earlier one
    return held


def wandb_records(path: Path) -> Iterator[object]:
    """The records of an offline file: a log of LevelDB's kind, after a header of seven bytes, in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def in_mlflow(run: Path) -> Held:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{run.parent / 'mlflow.db'}")
    identity = json.loads((run / "trackers.json").read_text())["id"]
    experiment = client.get_experiment_by_name("fedbiscuit")
    (found,) = client.search_runs([experiment.experiment_id], f"tags.`fedbiscuit.id` = '{identity}'")
    keys = found.data.metrics
    return {key: [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, key)] for key in keys}


READERS: dict[str, Callable[[Path], Held]] = {
    "tensorboard": in_tensorboard,
    "trackio": in_trackio,
    "wandb": in_wandb,
    "mlflow": in_mlflow,
}


def missing(tracker: str) -> str:
    """Why a tracker cannot be tested here, or nothing."""
    try:
        check_installed((tracker,))
    except EnvironmentFault as error:
        return str(error)
    return ""


ALL = f"trackers=[{', '.join(name for name in READERS if not missing(name))}]"
"""Every run below has all trackers that are installed at once."""


@pytest.fixture(params=list(READERS))
def tracker(request: pytest.FixtureRequest) -> str:
    if why := missing(request.param):
        warnings.warn(f"{request.param} was NOT tested: {why}", stacklevel=2)
        pytest.skip(why)
    return request.param


@pytest.fixture(scope="module")
def finished(here_only: None, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The folder of a finished run."""
    return pipeline.run_all(settings(tmp_path_factory.mktemp("finished"), tiny_model, ALL))


@pytest.fixture(scope="module")
def killed_twice(here_only: None, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A run that was killed after two rounds that are in no saved state, then after two such steps of the alignment."""
    tmp_path = tmp_path_factory.mktemp("killed")
    cfg = settings(tmp_path, tiny_model, ALL)
    (tmp_path / "cfg.yaml").write_text(dump_config(cfg))
    done = []
    for where in ("state_manifest:2", "state_manifest:3"):
        environment = {**os.environ, "FEDBISCUIT_CRASH_AT": where, "OMP_NUM_THREADS": "1"}
        environment.pop("WANDB_SERVICE", None)  # the process that this one shares, which would not see the other's end
        command = [sys.executable, "-c", HERE["KILL"], str(tmp_path / "cfg.yaml")]
        killed = subprocess.run(command, env=environment, capture_output=True, check=False)
        assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
        run = tmp_path / "runs" / "one"
        done.append([len(lines(run / name)) for name in ("metrics.jsonl", "alignment.jsonl") if (run / name).exists()])
    assert done == [[4], [4, 4]]
    return pipeline.run_all(cfg, resume=True)


@pytest.fixture(scope="module")
def failing(here_only: None, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[Path, list[str]]:
    """A run whose trackers all fail at the third round, and the warnings."""
    tmp_path, told = tmp_path_factory.mktemp("failing"), []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())

    listener = Listener()
    logging.getLogger("fedbiscuit").addHandler(listener)
    with pytest.MonkeyPatch.context() as patch:
        for made in TRACKERS.values():
            log = made.log
            patch.setattr(made, "log", lambda *words, log=log: log(*words) if words[1:3] != ("selectors", 3) else 1 / 0)
        run = pipeline.run_all(settings(tmp_path, tiny_model, ALL))
    logging.getLogger("fedbiscuit").removeHandler(listener)
    return run, told


def in_the_files(run: Path) -> Held:
    """What a tracker should hold, from the run's own files, written out without the code under test."""
    held: Held = {}

    def put(name: str, step: int, value: object) -> None:
        held.setdefault(name, []).append((step, float(value)))

    for row in lines(run / "metrics.jsonl"):
        step = row["round"] + 1
        for key in ("regrouped", "bytes_up", "bytes_down"):
            put(f"selectors/{key}", step, row[key])
        for key in ("cohort", "refused"):
            put(f"selectors/num_{key}", step, len(row[key]))
        for key in ("num_replies", "clipped"):
            put(f"selectors/{key}", step, row["metrics"][key])
        for u, norm in row["metrics"]["delta_norm"].items():
            put(f"selectors/delta_norm/{u}", step, norm)
        for key, value in row["metrics"].get("validation", {}).items():
            if key != "clients":
                put(f"selectors/validation/{key}", step, value)
    for row in lines(run / "alignment.jsonl") if (run / "alignment.jsonl").exists() else []:
        for key, value in row.items():
            if key != "step":
                put(f"alignment/{key}", row["step"], value)
    return held


def rounded(held: Held) -> dict[str, list[tuple[int, float]]]:
    """float32 at the least is kept by all."""
    return {name: [(step, pytest.approx(value, rel=1e-6)) for step, value in sorted(held[name])] for name in held}


def curves(held: Held) -> Held:
    return {name: sorted(points) for name, points in held.items() if not name.startswith("evaluation/")}


# What is forwarded


def test_a_tracker_holds_the_numbers_of_the_files_under_sensible_names(tracker, finished):
    run = finished
    held = READERS[tracker](run)
    assert curves(held) == rounded(in_the_files(run))
    result = json.loads((run / "evaluation.json").read_text())
    own, judge = result["selectors"]["rows"][0], result["policy"]["judges"][0]
    for name, value in {
        "evaluation/selectors/selector-of-the-clients-group/accuracy": own["accuracy"],
        "evaluation/selectors/selector-of-the-clients-group/interval_low": own["interval"][0],
        "evaluation/selectors/chance/accuracy": 0.5,
        "evaluation/policy/the-selectors-vote/win_rate": judge["win_rate"],
        "evaluation/policy/length/aligned": result["policy"]["length"]["aligned"],
        "evaluation/policy/kl": result["policy"]["kl"],
    }.items():
        assert held[name] == [(1, pytest.approx(value, rel=1e-6))], name
    for name in ("selectors/validation/accuracy", "alignment/loss", "alignment/margin", "selectors/delta_norm/u1"):
        assert name in held


def test_no_text_of_a_comparison_and_no_client_reaches_a_tracker(tracker, finished):
    run = finished
    assert "person-3" in (run.parents[1] / "world.jsonl").read_text()
    places = {
        "tensorboard": [run / "tensorboard"],
        "wandb": [run / "wandb"],
        "mlflow": [run.parent / "mlflow.db"],
        "trackio": [Path(os.environ["TRACKIO_DIR"])],
    }[tracker]
    files = [file for place in places for file in ([place] if place.is_file() else place.rglob("*")) if file.is_file()]
    data = b"".join(file.read_bytes() for file in files)
    assert b"alignment/margin" in data or tracker == "wandb"  # it is not compressed, or this shows nothing
    for secret in (b"person-", b"question", b"world.jsonl"):
        assert secret not in data
    assert not [key for key in READERS[tracker](run) if "person" in key]


def test_only_tables_that_are_known_to_hold_no_client_are_entered():
    row = {
        "round": 2, "phase": "federated", "cohort": ["ann", "bo"], "adapter_of": {"ann": 0, "bo": 1}, "regrouped": True,
        "grouping": {"ann": 0, "bo": 1}, "refused": {"cem": "too late"}, "bytes_up": 7, "bytes_down": 8,
        "metrics": {
            "delta_norm": {"u0": 0.5}, "by_client": {"ann": 0.1}, "nan": float("nan"),
            "validation": {"accuracy": 0.75, "loss": None, "clients": {"ann": 1.0, "bo": 0.5}},
        },
    }  # fmt: skip
    assert scalars("selectors", row) == {
        "selectors/num_cohort": 2.0, "selectors/regrouped": 1.0, "selectors/num_refused": 1.0, "selectors/bytes_up": 7.0,
        "selectors/bytes_down": 8.0, "selectors/delta_norm/u0": 0.5, "selectors/validation/accuracy": 0.75,
    }  # fmt: skip
    evaluation = {
        "selectors": {
            "rows": [{"name": "vote of all", "accuracy": 0.5, "interval": None}],
            "clients": {"ann": {"adapter": 0, "accuracy": 1.0}}, "new_clients": {"new": {"bo": 1.0}}, "temperature": 1.5,
        },
        "policy": {"kl": 2.0, "examples": [{"prompt": "p", "raw": "r", "aligned": "a"}]},
        "left_out": {"ann": 3},
    }  # fmt: skip
    assert scalars("evaluation", evaluation) == {
        "evaluation/selectors/vote-of-all/accuracy": 0.5,
        "evaluation/selectors/temperature": 1.5,
        "evaluation/policy/kl": 2.0,
    }


def test_what_a_server_holds_is_read_from_the_summary_of_its_run():
    summary = {"selectors/round": 6, "selectors/bytes_up": 3.0, "alignment/step": 2, "evaluation/kl": 1.5, "_step": 8}
    assert seen_in(summary) == {"selectors": (6, {}), "alignment": (2, {}), "evaluation": (1, {"evaluation/kl": 1.5})}
    assert seen_in({}) == {}


# Going on


def test_after_two_kills_nothing_is_missing_and_nothing_is_there_twice(tracker, killed_twice):
    assert len(lines(killed_twice / "metrics.jsonl")) == 4
    assert len(lines(killed_twice / "alignment.jsonl")) == 5
    assert curves(READERS[tracker](killed_twice)) == rounded(in_the_files(killed_twice))


@pytest.mark.skipif(ALL == "trackers=[]", reason="SKIPPED: no library of a tracker is installed")
def test_a_tracker_that_comes_later_gets_what_was_before_and_each_evaluation_that_differs(tmp_path, tiny_model):
    run = pipeline.train_selectors(settings(tmp_path, tiny_model))
    found = {}
    for step, bootstrap in enumerate((50, 50, 3)):
        pipeline.evaluate(settings(tmp_path, tiny_model, ALL, f"evaluation.bootstrap={bootstrap}"))
        own = json.loads((run / "evaluation.json").read_text())["selectors"]["rows"][0]
        found[step] = own["interval"][0]
        if step == 0:
            continue
        for tracker in ALL.removeprefix("trackers=[").removesuffix("]").split(", "):
            held = READERS[tracker](run)
            assert curves(held) == rounded(in_the_files(run))
            points = held["evaluation/selectors/selector-of-the-clients-group/interval_low"]
            if step == 1:  # the same twice is shown once
                assert points == [(1, pytest.approx(found[0], rel=1e-6))]
            else:
                assert points[-1][1] == pytest.approx(found[2], rel=1e-6)
                assert len(points) == (2 if tracker in ("trackio", "mlflow", "tensorboard") else 1)
    assert found[2] != found[0]


# What goes wrong


def test_a_missing_library_is_an_error_before_anything_is_trained(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setitem(NEEDS, "wandb", (("no_such_wandb",), NEEDS["wandb"][1]))
    with pytest.raises(EnvironmentFault, match=r'wandb is not installed; install it \(pip install "wandb>='):
        pipeline.run_all(settings(tmp_path, tiny_model, "trackers=[wandb]"))
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_a_tracker_has_made_is_not_taken_for_its_library(tmp_path, monkeypatch):
    (tmp_path / "no_such_tracker").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(NEEDS, "wandb", (("no_such_tracker",), ("x",)))
    with pytest.raises(EnvironmentFault, match="wandb is not installed"):
        check_installed(("wandb",))


@pytest.mark.skipif(ALL == "trackers=[]", reason="SKIPPED: no library of a tracker is installed")
def test_trackers_that_fail_in_the_middle_are_said_once_and_the_run_is_the_same(failing, finished):
    run, told = failing
    told = [text for text in told if "has failed" in text]
    names = ALL.removeprefix("trackers=[").removesuffix("]").split(", ")
    assert len(told) == len(names)
    for name, text in zip(names, told, strict=True):
        assert text.startswith(f"trackers: {name} has failed and gets no more numbers (ZeroDivisionError")
    for name in ("metrics.jsonl", "alignment.jsonl", "evaluation.json", "policy/adapter_model.safetensors"):
        assert (run / name).read_bytes() == (finished / name).read_bytes()


def test_a_tracker_that_has_failed_gets_what_it_has_missed_when_the_run_goes_on(tracker, failing, tiny_model):
    run, _ = failing
    pipeline.evaluate(settings(run.parents[1], tiny_model, f"trackers={tracker}"))
    assert curves(READERS[tracker](run)) == rounded(in_the_files(run))


def test_the_extras_of_the_package_are_what_the_error_tells_to_install():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
    for name, (_, packages) in NEEDS.items():
        assert project["optional-dependencies"][name] == list(packages)
