"""The story, top to bottom: train selectors, let the policy write, label, align, evaluate.

Each stage reads what the stage before left in the run folder and leaves its own there; each can be killed at any moment
and goes on where its last saved state was. ``session.py`` is what all stages share; then a file a stage.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from fedbiscuit.config import Config
from fedbiscuit.evaluation.judge import HELD_OUT
from fedbiscuit.pipeline.alignment import align_policy
from fedbiscuit.pipeline.answers import warn_without_checkpoints
from fedbiscuit.pipeline.comparing import evaluate_run
from fedbiscuit.pipeline.contests import check_contest
from fedbiscuit.pipeline.judges import check_judges
from fedbiscuit.pipeline.judging import check_judge, judge_run
from fedbiscuit.pipeline.labels import check_labeling, write_and_label
from fedbiscuit.pipeline.rounds import train_all
from fedbiscuit.pipeline.session import Connect, Progress, Session, open_run, open_session, silent
from fedbiscuit.pipeline.sharing import export_run, push
from fedbiscuit.pipeline.tasks import Asked, check_task, do_task
from fedbiscuit.types import ConfigError

__all__ = [
    "Progress",
    "align",
    "evaluate",
    "evaluate_task",
    "export_run",
    "judge",
    "label",
    "push",
    "run_all",
    "train_selectors",
]

FOR_ONCE = ("num_prompts", "max_comparisons", "greedy", "batch_size", "bootstrap")
"""Settings that say how much an evaluation of its own looks at, and not what the run's evaluation is."""


def run_all(cfg: Config, resume: bool = False, progress: Progress = silent, devices: int = 1) -> Path:
    """Everything: train selectors, generate, label, align, evaluate. Returns the run folder.

    ``devices``: over how many of this machine the clients of a round, and the pairs of a DPO step, are spread.
    """
    _check_rounds(cfg)
    with open_session(cfg, resume, progress, devices) as session:
        labels = cfg.selectors.local.objective == "choice"
        check_judges(session)
        if labels:
            check_labeling(session)
        if not cfg.labels.selectors:
            train_all(session)
        if labels:
            write_and_label(session)
            align_policy(session)
        evaluate_run(session)
        return session.run.path


def train_selectors(
    cfg: Config,
    resume: bool = False,
    progress: Progress = silent,
    devices: int = 1,
    connect: Connect | None = None,
) -> Path:
    """Train the selectors federatedly; leaves ``selectors/u0..`` in the run folder.

    ``connect`` reaches clients on other machines; without it the data of all is here.
    """
    if cfg.labels.selectors:
        raise ConfigError(f"labels.selectors: this run takes the selectors of {cfg.labels.selectors} and trains none")
    _check_rounds(cfg)
    with open_session(cfg, resume, progress, devices, connect) as session:
        train_all(session)
        return session.run.path


def _check_rounds(cfg: Config) -> None:
    """An old file that aligns says nothing about selectors: none are invented for it."""
    if cfg.selectors.rounds == 0 and not cfg.labels.selectors:
        raise ConfigError(
            "selectors.rounds: 0 rounds train no selectors; take those of another run, as `fedbiscuit align CONFIG --selector "
            "RUN-OR-CONFIG` does, or name it in labels.selectors"
        )


def label(cfg: Config, progress: Progress = silent) -> Path:
    """Let the policy write and the selectors choose; leaves ``completions.jsonl`` and ``preferences.jsonl``."""
    with _opened(cfg, progress) as session:
        write_and_label(session)
        return session.run.path


def align(cfg: Config, progress: Progress = silent, devices: int = 1) -> Path:
    """Fine-tune the policy on ``preferences.jsonl`` by DPO; leaves ``policy/``.

    A run that takes the selectors of another one is labeled first, where that has not been done.
    """
    with _opened(cfg, progress, devices) as session:
        if cfg.labels.selectors:
            write_and_label(session)
        align_policy(session)
        return session.run.path


def _opened(cfg: Config, progress: Progress, devices: int = 1) -> contextlib.AbstractContextManager[Session]:
    """A run that exists, or one that begins with labeling because its selectors are those of another run."""
    if cfg.labels.selectors:
        return open_session(cfg, True, progress, devices)
    return open_run(cfg, progress, devices)


def evaluate(cfg: Config, progress: Progress = silent, checkpoints: bool = False) -> Path:
    """Selectors against held-out people, aligned against raw policy; leaves ``evaluation.json``.

    With ``checkpoints`` also every round and step that ``keep_every`` has kept.
    """
    with open_run(cfg, progress) as session:
        warn_without_checkpoints(session, checkpoints)
        evaluate_run(session, checkpoints)
        return session.run.path


def evaluate_task(
    cfg: Config, task: str, progress: Progress = silent, checkpoints: bool = False, checkpoint: int | None = None
) -> Path:
    """One evaluation of its own (``pipeline/tasks``); leaves ``evaluations/TASK.json``.

    Of the last policy or selectors; with ``checkpoints`` of all that were kept too, with ``checkpoint`` of that one alone.
    """
    asked = Asked(checkpoints, checkpoint)
    check_task(task, asked)
    with open_run(cfg, progress) as session:
        session.for_once = FOR_ONCE
        warn_without_checkpoints(session, checkpoints)
        do_task(session, task, asked)
        return session.run.path


def judge(
    cfg: Config,
    progress: Progress = silent,
    on: str = HELD_OUT,
    checkpoints: bool = False,
    checkpoint: int | None = None,
) -> Path:
    """A language model judges policies' answers against others (``contests.CONTESTS``); returns the file with the results.

    That is ``evaluations/judge-PROTOCOL.json``. On held-out prompts the aligned policy against the raw one; with
    ``checkpoints`` all that were kept too, with ``checkpoint`` that one alone.
    """
    asked = Asked(checkpoints, checkpoint)
    check_contest(on, asked)
    check_judge(cfg.judge)
    with open_run(cfg, progress) as session:
        session.for_once = FOR_ONCE
        warn_without_checkpoints(session, checkpoints)
        return session.run.path / judge_run(session, on, asked)
