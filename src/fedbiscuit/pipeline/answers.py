"""What the policy answers to held-out prompts, written once and kept: every judge sees the same answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from fedbiscuit.pipeline.labels import write, write_raw
from fedbiscuit.pipeline.session import Session
from fedbiscuit.rundir import sha256_of

__all__ = ["ANSWERS", "held_out_answers"]

ANSWERS = "evaluations/answers.jsonl"
WAY = "1"
"""Changes when answers to the same prompts come out otherwise, so that old ones are left alone."""


def held_out_answers(session: Session, prompts: Sequence[str], folder: str | None) -> list[dict[str, Any]]:
    """An answer to each prompt by the policy in ``folder``, or by the raw one, with the same random numbers.

    Rows with ``text``, ``token_ids`` and ``finished``. What ``evaluations/answers.jsonl`` has is not written again; a row's
    ``key`` is a digest of all that its answer depends on.
    """
    cfg, lm, run = session.cfg, session.policy_lm, session.run
    how = cfg.generation
    sampling = None if cfg.evaluation.greedy else [how.temperature, how.top_p]
    adapter = None if folder is None else sha256_of(run.path / folder / "adapter_model.safetensors")
    source = [WAY, lm.digest, adapter, cfg.seed, how.max_new_tokens, how.chat, how.system, sampling]
    keys = [hashlib.sha256(json.dumps([*source, prompt]).encode()).hexdigest() for prompt in prompts]
    found = {row["key"]: row for row in run.read_lines(ANSWERS)}
    ready = folder is None
    for start in range(0, len(prompts), how.batch_size):
        batch = range(start, min(start + how.batch_size, len(prompts)))
        if any(keys[i] not in found for i in batch):  # a batch is written whole: who shares it changes last bits
            if not ready:
                lm.put_adapter(run.load_adapter(str(folder), base=lm.digest))
                ready = True
            writes = write_raw if folder is None else write
            written = writes(session, lm, [prompts[i] for i in batch], 1, "held-out", cfg.evaluation.greedy)
            rows = [
                {"key": keys[i], "policy": folder or "raw", "prompt": row["prompt"], **row["completions"][0]}
                for i, row in zip(batch, written, strict=True)
                if keys[i] not in found
            ]
            run.append_lines(ANSWERS, rows)
            found |= {row["key"]: row for row in rows}
        session.progress(f"answers of {folder or 'the raw policy'}", batch.stop, len(prompts), "")
    return [found[key] for key in keys]
