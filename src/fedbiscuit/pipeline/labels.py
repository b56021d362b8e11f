"""The policy writes, the selectors choose: ``completions.jsonl`` and ``preferences.jsonl``."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedbiscuit.data.encoding import EXTRA
from fedbiscuit.models.generation import Sampling, generate
from fedbiscuit.models.labeling import label_completions
from fedbiscuit.models.lm import LM
from fedbiscuit.pipeline.judges import labeler, labeling_selector
from fedbiscuit.pipeline.session import Session
from fedbiscuit.rundir import sha256_of
from fedbiscuit.types import Comparison, ConfigError, DataError

__all__ = ["check_labeling", "write", "write_and_label", "write_raw"]


def check_labeling(session: Session) -> None:
    """Stop before anything is trained where the answers that the policy will write could not be labeled."""
    selector, cfg = labeling_selector(session), session.cfg
    if session.lacks(selector.extra):
        raise ConfigError(
            f"data.template: {selector.template.name} needs {list(selector.extra)}, which the policy's prompts do not have, so "
            "its answers cannot be labeled; use another template, or only `fedbiscuit train` and `fedbiscuit evaluate`"
        )
    smallest, _ = selector.encode([Comparison("x", "x", "x", meta={"fields": dict.fromkeys(EXTRA, "x")})])
    needed = 2 * cfg.generation.max_new_tokens + (len(smallest[0].ab) if smallest else selector.max_tokens)
    if needed > selector.max_tokens:
        raise ConfigError(
            f"data.max_tokens: {selector.max_tokens}, but two answers of generation.max_new_tokens="
            f"{cfg.generation.max_new_tokens} and the template can take {needed} tokens; raise it, or let answers be shorter"
        )
    if not session.prompts:
        raise DataError("data.prompts: there are no prompts to align the policy on; name a file with some")


def write_and_label(session: Session) -> None:
    """``completions.jsonl``, batch by batch, then ``preferences.jsonl``, whole."""
    run, cfg = session.run, session.cfg
    check_labeling(session)
    judge = labeler(session)
    whose = {"selectors": _digests(cfg.labels.selectors)}
    run.check_same("labels.json", whose, "selectors that labeled")
    session.settle()
    prompts = session.prompts[: cfg.generation.num_prompts or None]
    _write_completions(session, prompts)
    if run.read_json("labels.json") is not None:
        return
    written = run.read_lines("completions.jsonl")
    started = time.monotonic()

    def progress(done: int, total: int) -> None:
        session.progress("labels", done, total, "pairs")

    rows, left_out = label_completions(
        judge.selector, judge.adapters, written, cfg.labels, progress, session.dataset.fields
    )
    if not rows:
        reason = max(left_out, key=left_out.__getitem__)
        raise DataError(
            f"no pair of completions could be labeled, mostly for: {reason} ({left_out}); "
            "raise generation.temperature, or give more prompts"
        )
    run.write_text("preferences.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    run.append_lines("timings.jsonl", [{"stage": "labels", "step": len(rows), "seconds": time.monotonic() - started}])
    run.write_json("labels.json", {"pairs": len(rows), "left_out": left_out} | whose)


def _digests(folder: str) -> dict[str, str]:
    """sha256 of each adapter of another run, so that labels are never taken for those of selectors trained since."""
    paths = sorted(Path(folder).glob("selectors/u*/adapter_model.safetensors")) if folder else []
    return {path.parent.name: sha256_of(path) for path in paths}


def _write_completions(session: Session, prompts: Sequence[str]) -> None:
    """The raw policy's completions; a batch that a kill interrupted is written again as a whole."""
    run, how, lm = session.run, session.cfg.generation, session.policy_lm
    have = run.read_lines("completions.jsonl")
    whole = len(have) if len(have) >= len(prompts) else len(have) // how.batch_size * how.batch_size
    run.keep_lines("completions.jsonl", whole)
    for start in range(whole, len(prompts), how.batch_size):
        started = time.monotonic()
        batch = prompts[start : start + how.batch_size]
        rows = write_raw(session, lm, batch, how.num_completions, "completions")
        run.append_lines("completions.jsonl", rows)
        done = start + len(batch)
        seconds = time.monotonic() - started
        run.append_lines("timings.jsonl", [{"stage": "generation", "step": done, "seconds": seconds}])
        session.progress("generation", done, len(prompts), f"{how.num_completions} completions a prompt")


def write_raw(
    session: Session, lm: LM, prompts: Sequence[str], num_completions: int, purpose: str, greedy: bool = False
) -> list[dict[str, Any]]:
    """Rows of ``completions.jsonl`` by the base model alone."""
    with lm.adapter_off():
        return write(session, lm, prompts, num_completions, purpose, greedy)


def write(
    session: Session, lm: LM, prompts: Sequence[str], num_completions: int, purpose: str, greedy: bool
) -> list[dict[str, Any]]:
    how = session.cfg.generation
    sampling = Sampling(how.max_new_tokens, 0.0 if greedy else how.temperature, how.top_p)
    ids = [lm.chat_prompt(prompt, how.system, how.chat) for prompt in prompts]
    written = generate(lm, ids, num_completions, sampling, (session.cfg.seed, purpose))
    return [
        {
            "prompt": prompt,
            "completions": [{"text": c.text, "token_ids": list(c.tokens), "finished": c.finished} for c in completions],
        }
        for prompt, completions in zip(prompts, written, strict=True)
    ]
