"""What is asked of a task, and what several tasks need: prompts to answer, and the prompts that a policy has seen."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fedbiscuit.pipeline.judges import Judge, labeler
from fedbiscuit.pipeline.session import Session
from fedbiscuit.types import ConfigError, DataError

__all__ = ["Asked", "chooser", "held_out", "trained_prompts", "write_answers"]


@dataclass(frozen=True, slots=True)
class Asked:
    """Which policies or selectors: the last ones, with ``checkpoints`` all that were kept too, or ``checkpoint`` alone."""

    checkpoints: bool = False
    checkpoint: int | None = None


def held_out(session: Session) -> tuple[str, ...]:
    """The prompts that the policy was not trained on, as many as ``evaluation.num_prompts``; an error without any."""
    prompts = session.held_out_prompts[: session.cfg.evaluation.num_prompts]
    if not prompts:
        raise DataError("there is no prompt that the policy was not trained on; name a file with some in data.prompts")
    return prompts


def chooser(session: Session) -> Judge:
    """The selectors that label; ``ConfigError`` where this run has none, or has not trained them yet."""
    path, cfg = session.run.path, session.cfg
    if cfg.selectors.local.objective != "choice":
        raise ConfigError(
            f"{path}: objective {cfg.selectors.local.objective} trains a policy and no selectors, so there is nobody to "
            "choose; take a run that trains selectors"
        )
    if session.trains and not (path / "selectors" / "u0").is_dir():
        raise ConfigError(f"{path}: the selectors are not trained yet; run `fedbiscuit train {path}` first")
    return labeler(session)


def trained_prompts(session: Session) -> set[str]:
    """The prompts that the aligned policy has been trained on."""
    if session.cfg.selectors.local.objective != "choice":
        return {comparison.prompt for data in session.clients.values() for comparison in data.train}
    return {row["prompt"] for row in session.run.read_lines("preferences.jsonl")}


def write_answers(session: Session, task: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """The answers themselves, to be read by people: ``evaluations/TASK_answers.jsonl``."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    session.run.write_text(f"evaluations/{task}_answers.jsonl", text)
