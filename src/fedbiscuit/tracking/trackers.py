"""One small class for each tracker: what it holds already, one row more, and the end.

Each is told of the run's folder, name and id, and puts its data where its own library puts them, or else into the run
folder or beside it. Nothing but numbers is handed over, and what the libraries would collect by themselves (console,
code, machine, use of the processor) is switched off where that can be done.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from fedbiscuit.rundir.disk import sync_folder, write_all
from fedbiscuit.types import EnvironmentFault

__all__ = ["NEEDS", "TRACKERS", "Seen", "Tracker", "check_installed", "seen_in"]

PROJECT = "fedbiscuit"
FINISH_SECONDS = 120.0

Seen = dict[str, tuple[int, Mapping[str, float]]]
"""Stage to the last step that a tracker holds, and to the values there (needed of evaluations only)."""


class Tracker(Protocol):
    """Where numbers are shown."""

    seen: Seen

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Take the numbers of one step. Raises what goes wrong."""

    def caught_up(self) -> None:
        """All rows that the run had before have been forwarded."""

    def close(self, ok: bool) -> None:
        """Write what is still to be written; ``ok``: the run has not failed."""


class TensorBoard:
    """``RUN/tensorboard``: one file of events, written anew from the run's own files each time the run is opened.

    So it holds each step once, whatever was killed before. The new file begins with the sign by which a TensorBoard that
    is open drops what it has read from the old one. Values are float32 there. Written without a thread or a buffer:
    an error comes up where it happens, and a row is on disk when ``log`` returns.
    """

    def __init__(self, run: Path, name: str, identity: str) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        self.seen: Seen = {}
        folder = run / "tensorboard"
        folder.mkdir(exist_ok=True)
        self._old = sorted(folder.glob("events.out.tfevents.*"))
        number = 1 + max((int(path.name.split(".")[3]) for path in self._old), default=0)
        path = folder / f"events.out.tfevents.{number:010}.fedbiscuit"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o666)
        self._write(Event(file_version="brain.Event:2", wall_time=time.time()))
        self._write(Event(session_log=SessionLog(status=SessionLog.START), step=0, wall_time=time.time()))

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """One event a row."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        numbers = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(Event(step=step, wall_time=time.time(), summary=Summary(value=numbers)))

    def caught_up(self) -> None:
        """The older files hold nothing more than the new one."""
        for path in self._old:
            path.unlink()
            sync_folder(path.parent)

    def close(self, ok: bool) -> None:
        """Let the file go."""
        os.close(self._file)

    def _write(self, event: Any) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        write_all(self._file, record.getvalue())


class Wandb:
    """Weights & Biases, in ``RUN/wandb`` and, unless ``WANDB_MODE=offline``, on its server.

    Rounds and steps are axes of their own (``selectors/round``, ``alignment/step``). What the server holds is read from
    the summary of the run that is resumed there. Offline nothing can be read back, so each start writes the whole run
    into a new offline folder and removes the older ones of the same run: one `wandb sync` brings everything, once.
    """

    def __init__(self, run: Path, name: str, identity: str) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        if os.environ.get("WANDB_MODE", "online") in ("online", "run") and not wandb.login(prompt=False, verify=False):
            raise EnvironmentFault(
                "trackers: wandb knows no account here; run `wandb login`, or set WANDB_MODE=offline to keep everything here"
            )
        self._old = sorted((run / "wandb").glob(f"offline-run-*-{identity}"))
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=identity,
            name=name,
            dir=str(run),
            resume="allow",
            reinit="finish_previous",  # with create_new a run that is opened twice in one process loses its numbers
            settings=wandb.Settings(
                console="off",
                disable_code=True,
                disable_git=True,
                save_code=False,
                silent=True,
                symlink=False,
                finish_timeout=FINISH_SECONDS,
                x_disable_machine_info=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_save_requirements=False,
            ),
        )
        for stage in ("selectors", "global", "alignment"):
            self._run.define_metric(f"{stage}/*", step_metric=_axis(stage))
        self.seen = seen_in(dict(self._run.summary))

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """A row of the history; an evaluation goes into the summary, in the place of an earlier one."""
        if stage == "evaluation":
            self._run.summary.update(dict(values))
        else:
            self._run.log({_axis(stage): step, **values})

    def caught_up(self) -> None:
        """The new offline folder has all that the older ones have."""
        now = Path(self._run.settings.sync_dir).resolve()
        for folder in self._old if self._run.settings.mode == "offline" else ():
            if folder.resolve() != now:
                shutil.rmtree(folder)

    def close(self, ok: bool) -> None:
        """Wait until all is written or sent, but not for ever: what is not sent stays in ``RUN/wandb`` for `wandb sync`."""
        self._run.finish(exit_code=0 if ok else 1)


def _axis(stage: str) -> str:
    return f"{stage}/step" if stage == "alignment" else f"{stage}/round"


def seen_in(summary: Mapping[str, Any]) -> Seen:
    """What a run of Weights & Biases holds, from its summary: the last value of each name."""
    seen: Seen = {s: (int(summary[_axis(s)]), {}) for s in ("selectors", "global", "alignment") if _axis(s) in summary}
    values = {key: float(value) for key, value in summary.items() if key.startswith("evaluation/")}
    return seen | ({"evaluation": (1, values)} if values else {})


class MLflow:
    """MLflow: at ``MLFLOW_TRACKING_URI``, or else in ``mlflow.db`` beside the run folders, one file for all runs there.

    Each row is one batch, which its store takes whole or not at all; which steps it has is asked of the store.
    """

    def __init__(self, run: Path, name: str, identity: str) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        from mlflow import MlflowClient

        beside = run.resolve().parent
        place = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{beside / 'mlflow.db'}"
        self._client = MlflowClient(tracking_uri=place)
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(project)
        number = experiment.experiment_id if experiment else self._client.create_experiment(project)
        found = self._client.search_runs([number], f"tags.`fedbiscuit.id` = '{identity}'", max_results=1)
        tags = {"fedbiscuit.id": identity}
        self._id = (found[0] if found else self._client.create_run(number, tags=tags, run_name=name)).info.run_id
        self._client.update_run(self._id, status="RUNNING")
        self.seen = self._held()

    def _held(self) -> Seen:
        seen: Seen = {}
        latest = self._client.get_run(self._id).data.metrics
        for key in latest:
            stage = key.split("/")[0]
            step = max(metric.step for metric in self._client.get_metric_history(self._id, key))
            values = {name: value for name, value in latest.items() if name.startswith("evaluation/")}
            seen[stage] = (max(step, seen.get(stage, (0, {}))[0]), values if stage == "evaluation" else {})
        return seen

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """One batch a row."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def caught_up(self) -> None:
        """Nothing to do."""

    def close(self, ok: bool) -> None:
        """Say how it ended."""
        self._client.set_terminated(self._id, status="FINISHED" if ok else "FAILED")


class Trackio:
    """trackio, in its own place on this machine (``TRACKIO_DIR``); ``trackio show`` has the page.

    Its library writes from a thread of its own, half a second late, and only warns when it cannot. Which steps it holds is
    read from its store; for that the store has to be here, so a Space or another server is refused.
    """

    def __init__(self, run: Path, name: str, identity: str) -> None:
        elsewhere = [key for key in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL") if os.environ.get(key)]
        if elsewhere:
            raise EnvironmentFault(
                f"trackers: trackio is used on this machine only, and {elsewhere[0]} is set; unset it, and bring the "
                "finished project there with `trackio sync`"
            )
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        name = f"{name}-{identity}"  # trackio knows a run by its name, and two folders may have the same
        with contextlib.redirect_stdout(io.StringIO()):
            self._run = trackio.init(PROJECT, name, resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False)
        self.seen: Seen = {}
        for row in SQLiteStorage.get_logs(PROJECT, name):
            values = {key: value for key, value in row.items() if "/" in key}
            stage = next(iter(values), "").split("/")[0]
            if row["step"] > self.seen.get(stage, (0, {}))[0]:
                self.seen[stage] = (row["step"], values)

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Hand over one row."""
        self._run.log(dict(values), step=step)

    def caught_up(self) -> None:
        """Nothing to do."""

    def close(self, ok: bool) -> None:
        """Wait until all is written, at most half a minute."""
        import trackio

        with contextlib.redirect_stdout(io.StringIO()):
            trackio.finish()  # not the run's own method, after which it would be finished again as the process ends


TRACKERS: dict[str, Callable[[Path, str, str], Tracker]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": Wandb,
    "mlflow": MLflow,
}
NEEDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "tensorboard": (("tensorboard",), ("tensorboard>=2.20",)),
    "trackio": (("trackio",), ("trackio>=0.43",)),
    "wandb": (("wandb",), ("wandb>=0.31",)),
    "mlflow": (("mlflow", "sqlalchemy", "alembic"), ("mlflow-skinny>=3.17", "sqlalchemy>=2", "alembic>=1.13")),
}
"""Tracker to the modules that must be there, and to what has to be installed for them: the extra of the same name."""


def check_installed(names: tuple[str, ...]) -> None:
    """An ``EnvironmentFault`` that says what to install, where the library of a tracker is missing. Imports nothing."""
    for name in names:
        modules, packages = NEEDS[name]
        if any(_missing(module) for module in modules):
            wanted = " ".join(f'"{package}"' for package in packages)
            raise EnvironmentFault(
                f"trackers: {name} is not installed; install it (pip install {wanted}), or take it out of trackers"
            )


def _missing(module: str) -> bool:
    """A folder of this name without code, such as one that a tracker has made here, is no library."""
    spec = find_spec(module)
    return spec is None or spec.origin is None
