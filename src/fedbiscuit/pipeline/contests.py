"""Whose answers a language model compares, and with what: ``fedbiscuit judge RUN --on WHAT``.

Answers to held-out prompts are written here where they are not there yet; those of a task are what the task has left.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedbiscuit.evaluation.judge import HELD_OUT
from fedbiscuit.pipeline.answers import RAW, candidates, held_out_answers
from fedbiscuit.pipeline.session import Session
from fedbiscuit.pipeline.tasks.asked import Asked, held_out
from fedbiscuit.types import ConfigError

__all__ = ["CONTESTS", "PEOPLE", "Contest", "check_contest"]

PEOPLE = "people's summaries"


@dataclass(frozen=True, slots=True)
class Contest:
    """One policy's answers, ``ours``, against others, ``theirs``, prompt by prompt. step: where the policy was kept."""

    policy: str
    step: int | None
    against: str
    prompts: Sequence[str]
    ours: Sequence[str]
    theirs: Sequence[str]


def check_contest(on: str, asked: Asked) -> None:
    """Stop where there is nothing of this name to judge, or checkpoints are asked for where a task has chosen them."""
    if on not in CONTESTS:
        near = difflib.get_close_matches(on, CONTESTS, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(CONTESTS)}"
        raise ConfigError(f"--on: nothing to judge is called {on!r}; {hint}")
    if asked.checkpoints and asked.checkpoint is not None:
        raise ConfigError("--checkpoint and --checkpoints: one or all of them; give one of the two")
    if on != HELD_OUT and asked != Asked():
        raise ConfigError(
            f"--on {on}: all policies are judged whose answers that task has left; give --checkpoints or --checkpoint to "
            f"`fedbiscuit evaluate RUN --task {on}` instead"
        )


def _held_out(session: Session, asked: Asked) -> list[Contest]:
    """Each policy against the raw one."""
    _, *policies = candidates(session, asked.checkpoints, asked.checkpoint)
    prompts = held_out(session)
    texts = {one: [row["text"] for row in held_out_answers(session, prompts, one.folder)] for one in (RAW, *policies)}
    return [Contest(one.name, one.step, RAW.name, prompts, texts[one], texts[RAW]) for one in policies]


def _summarization(session: Session, asked: Asked) -> list[Contest]:
    """Each policy, the raw one too, against the summaries that people wrote."""
    policies, rows = _left(session, "summarization")["policies"], _answers(session, "summarization")
    prompts, written = [row["prompt"] for row in rows], [row["reference"] for row in rows]
    return [
        Contest(one["name"], one["step"], PEOPLE, prompts, [row["answers"][one["name"]] for row in rows], written)
        for one in policies
        if one["name"] in rows[0]["answers"]
    ]


def _best_of_n(session: Session, asked: Asked) -> list[Contest]:
    """What the selectors chose of n answers against one more of the same policy."""
    left, held, found = _left(session, "best-of-n"), _answers(session, "best-of-n"), []
    for one in left["policies"]:
        rows = [row for row in held if row["policy"] == one["name"]]
        columns = [[row[key] for row in rows] for key in ("prompt", "best", "plain")]
        found.append(Contest(f"best of {left['n']}, {one['name']}", one["step"], "one plain answer", *columns))
    return found


def _alpaca_eval(session: Session, asked: Asked) -> list[Contest]:
    """Each policy against the raw one, on the instructions of AlpacaEval."""
    policies = _left(session, "alpaca-eval")["policies"]
    texts: dict[str, Any] = {one["name"]: session.run.read_json(one["file"]) for one in policies}
    if not all(texts.values()):
        raise _nothing(session, "alpaca-eval")
    raw = texts[RAW.name]
    prompts, theirs = [row["instruction"] for row in raw], [row["output"] for row in raw]
    return [
        Contest(one["name"], one["step"], RAW.name, prompts, [row["output"] for row in texts[one["name"]]], theirs)
        for one in policies
        if one["name"] != RAW.name
    ]


def _left(session: Session, task: str) -> Mapping[str, Any]:
    """What a task has found."""
    found = session.run.read_json(f"evaluations/{task}.json")
    if found is None:
        raise _nothing(session, task)
    return dict(found)


def _answers(session: Session, task: str) -> Sequence[Mapping[str, Any]]:
    rows = session.run.read_lines(f"evaluations/{task}_answers.jsonl")
    if not rows:
        raise _nothing(session, task)
    return rows


def _nothing(session: Session, task: str) -> ConfigError:
    path = session.run.path
    return ConfigError(f"{path}: there are no answers of {task}; run `fedbiscuit evaluate {path} --task {task}` first")


CONTESTS: dict[str, Callable[[Session, Asked], list[Contest]]] = {
    HELD_OUT: _held_out,
    "summarization": _summarization,
    "best-of-n": _best_of_n,
    "alpaca-eval": _alpaca_eval,
}
