"""Evaluations beside the general one, each a file of this folder: ``fedbiscuit evaluate RUN --task NAME``.

A task is a function (session, asked) -> result; the result is written to ``evaluations/NAME.json`` in the run folder. To
add one, write the function, put it into the dict at the foot, and say in ``report/tasks.py`` which tables it becomes.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable
from typing import Any

from fedbiscuit.pipeline.judges import check_judges
from fedbiscuit.pipeline.session import Session
from fedbiscuit.pipeline.tasks.agreement import agreement_with_pairs
from fedbiscuit.pipeline.tasks.alpaca_eval import alpaca_eval
from fedbiscuit.pipeline.tasks.asked import Asked
from fedbiscuit.pipeline.tasks.best_of_n import best_of_n
from fedbiscuit.pipeline.tasks.perplexity import signs_of_hacking
from fedbiscuit.pipeline.tasks.summarization import summarization
from fedbiscuit.types import ConfigError

__all__ = ["TASKS", "Asked", "check_task", "do_task"]


def check_task(name: str, asked: Asked) -> None:
    """Stop where there is no such task, or the checkpoints asked for contradict each other."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(TASKS)}"
        raise ConfigError(f"--task: no task {name!r}; {hint}")
    if asked.checkpoints and asked.checkpoint is not None:
        raise ConfigError("--checkpoint and --checkpoints: one or all of them; give one of the two")


def do_task(session: Session, name: str, asked: Asked) -> None:
    """Do one task and leave its numbers in ``evaluations/NAME.json``."""
    check_judges(session)
    started = time.monotonic()
    result = TASKS[name](session, asked)
    session.run.write_json(f"evaluations/{name}.json", {"task": name, **result, "left_out": session.left_out})
    row = {"stage": "evaluation", "step": 1, "seconds": time.monotonic() - started}
    session.run.append_lines("timings.jsonl", [row])


TASKS: dict[str, Callable[[Session, Asked], dict[str, Any]]] = {
    "summarization": summarization,
    "best-of-n": best_of_n,
    "agreement": agreement_with_pairs,
    "alpaca-eval": alpaca_eval,
    "perplexity": signs_of_hacking,
}
