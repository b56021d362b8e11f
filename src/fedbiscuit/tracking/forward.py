"""Every row of a run to each tracker, once: also where a run was killed, resumed, or given a tracker half-way."""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from fedbiscuit.rundir import RunDir
from fedbiscuit.tracking.scalars import scalars
from fedbiscuit.tracking.trackers import TRACKERS, Tracker
from fedbiscuit.types import EnvironmentFault, FedbiscuitError

__all__ = ["Tracking", "open_tracking"]

log = logging.getLogger("fedbiscuit")

ROWS = {
    "selectors": ("metrics.jsonl", "selectors"),
    "global": ("global_metrics.jsonl", "global"),
    "alignment": ("alignment.jsonl", "policy"),
}
"""Stage to the file of its rows and to its saved state: rows after the newest state are computed again, and then forwarded."""


class Tracking:
    """The trackers of one open run; with none it does nothing. A tracker that fails is said once and left out from then on."""

    def __init__(self, trackers: Mapping[str, Tracker] | None = None) -> None:
        self._trackers = dict(trackers or {})
        self._failed: list[Tracker] = []

    def forward(self, stage: str, row: Mapping[str, Any]) -> None:
        """The numbers of one row to each tracker that does not have it yet.

        A step is the number of the round or step, counted from 1; evaluations are numbered too, and one that is the same as
        the one before is not forwarded.
        """
        values = scalars(stage, row) if self._trackers else {}
        for name, tracker in list(self._trackers.items()):
            last, held = tracker.seen.get(stage, (0, {}))
            if stage == "evaluation":
                step, known = last + 1, values.items() <= held.items()
            else:
                step = row["round"] + 1 if "round" in row else row["step"]
                known = step <= last
            if values and not known and self._tried(name, partial(tracker.log, stage, step, values)):
                tracker.seen[stage] = (step, values)

    def caught_up(self) -> None:
        """Tell each tracker that it has all earlier rows."""
        for name, tracker in list(self._trackers.items()):
            self._tried(name, tracker.caught_up)

    def close(self, ok: bool) -> None:
        """Finish each tracker; ``ok``: the run has not failed."""
        for name, tracker in list(self._trackers.items()):
            self._tried(name, partial(tracker.close, ok))
        for tracker in self._failed:
            with contextlib.suppress(Exception):
                tracker.close(ok)
        self._trackers, self._failed = {}, []

    def _tried(self, name: str, work: Callable[[], None]) -> bool:
        """Whether the work was done. Training does not stop for a tracker: the run's own files are complete without it."""
        try:
            work()
        except Exception as error:
            self._failed.append(self._trackers.pop(name))
            log.warning(
                "trackers: %s has failed and gets no more numbers (%s); the run goes on, and its own files are complete. "
                "When the run is resumed, %s gets what it has missed",
                name,
                _reason(error),
                name,
            )
            return False
        return True


@contextlib.contextmanager
def open_tracking(names: Sequence[str], run: RunDir, name: str) -> Iterator[Tracking]:
    """The trackers of these names for a run, brought up to the run's last saved states; closed at the end.

    One that cannot be started is an ``EnvironmentFault``: nothing has been trained yet.
    """
    tracking = Tracking({one: _started(one, run, name) for one in names})
    ok = False
    try:
        if names:
            for stage, (file, state) in ROWS.items():
                for row in run.read_lines(file)[: run.saved_step(state)]:
                    tracking.forward(stage, row)
            tracking.forward("evaluation", run.read_json("evaluation.json") or {})
            tracking.caught_up()
        yield tracking
        ok = True
    finally:
        tracking.close(ok)


def _started(tracker: str, run: RunDir, name: str) -> Tracker:
    try:
        return TRACKERS[tracker](run.path, name, _identity(run))
    except FedbiscuitError:
        raise
    except Exception as error:
        raise EnvironmentFault(
            f"trackers: {tracker} cannot be started ({_reason(error)}); put that right, or take it out of trackers"
        ) from error


def _identity(run: RunDir) -> str:
    """What this run is called in trackers that hold many: made once, kept in ``trackers.json``."""
    found = run.read_json("trackers.json")
    if found is None:
        found = {"id": uuid.uuid4().hex[:8]}
        run.write_json("trackers.json", found)
    return str(found["id"])


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
