"""What the policy answers: the raw one, the aligned one, and those that were kept along the way.

Answers to held-out prompts are kept in ``evaluations/answers.jsonl``: every judge sees the same ones.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedbiscuit.models.policy import log_ratios
from fedbiscuit.pipeline.labels import write, write_raw
from fedbiscuit.pipeline.session import Session
from fedbiscuit.rundir import sha256_of
from fedbiscuit.types import ConfigError

__all__ = [
    "ANSWERS",
    "RAW",
    "Candidate",
    "adapter_digest",
    "answers_of",
    "candidates",
    "held_out_answers",
    "kept",
    "mean_words",
    "moved",
    "unit_of",
    "warn_without_checkpoints",
]

log = logging.getLogger("fedbiscuit")

ANSWERS = "evaluations/answers.jsonl"
WAY = "1"
"""Changes when answers to the same prompts come out otherwise, so that old ones are left alone."""

Completion = dict[str, Any]
"""One answer as in ``completions.jsonl``: text, token_ids, finished."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A policy to look at. folder: its adapter in the run folder, None for the raw policy. step: where it was kept."""

    name: str
    folder: str | None
    step: int | None = None


RAW = Candidate("raw policy", None, 0)


def unit_of(session: Session) -> str:
    """What a policy's checkpoints are counted in: DPO steps, or rounds where clients train the policy itself."""
    return "step" if session.cfg.selectors.local.objective == "choice" else "round"


def kept(session: Session, kind: str, content: str) -> list[tuple[int, str]]:
    """(number, folder) of the checkpoints of a kind, ``round`` or ``step``, that hold ``content``, in order."""
    parent = session.run.path / "checkpoints"
    return [
        (int(path.name.removeprefix(f"{kind}-")), f"checkpoints/{path.name}")
        for path in sorted(parent.glob(f"{kind}-*"))
        if (path / content).exists()
    ]


def warn_without_checkpoints(session: Session, asked: bool) -> None:
    """Say it where all that were kept are ``asked`` for, and none were."""
    if asked and not any((session.run.path / "checkpoints").glob("*-*")):
        log.warning(
            "%s: nothing was kept along the way, so only the last is looked at; set selectors.keep_every and "
            "alignment.keep_every before training",
            session.run.path,
        )


def candidates(
    session: Session, checkpoints: bool = False, checkpoint: int | None = None, needs_policy: bool = True
) -> list[Candidate]:
    """The raw policy, then the aligned one; with ``checkpoints`` all kept ones between them, or ``checkpoint`` alone.

    ``ConfigError`` where there is none yet; without ``needs_policy`` the raw one is enough.
    """
    path, unit = session.run.path, unit_of(session)
    found = [
        Candidate(f"after {unit} {number}", f"{folder}/policy", number)
        for number, folder in kept(session, unit, "policy")
    ]
    last = session.cfg.alignment.steps if unit == "step" else session.cfg.selectors.rounds
    aligned = [Candidate("aligned policy", "policy", last)] if (path / "policy").is_dir() else []
    if checkpoint is not None:
        chosen = [one for one in (*aligned, *found) if one.step == checkpoint][:1]
        if not chosen:
            there = ", ".join(str(one.step) for one in found) or "none"
            key = "alignment.keep_every" if unit == "step" else "selectors.keep_every"
            raise ConfigError(f"{path}: no policy was kept after {unit} {checkpoint}; kept: {there} (see {key})")
        return [RAW, *chosen]
    if aligned:
        return [RAW, *([one for one in found if one.step != last] if checkpoints else []), *aligned]
    if needs_policy:
        command = "align" if unit == "step" else "train"
        raise ConfigError(f"{path}: there is no aligned policy yet; run `fedbiscuit {command} {path}` first")
    return [RAW, *(found if checkpoints else [])]


def answers_of(
    session: Session,
    prompts: Sequence[str],
    folder: str | None,
    purpose: str = "held-out",
    num_completions: int = 1,
    greedy: bool | None = None,
) -> list[list[Completion]]:
    """The answers to each prompt by the policy in ``folder``, or by the raw one, with the same random numbers.

    That policy's adapter stays in the slot. ``greedy``: as ``evaluation.greedy`` says where it is None.
    """
    cfg, lm = session.cfg, session.policy_lm
    if folder is not None:
        lm.put_adapter(session.run.load_adapter(folder, base=lm.digest))
    writes = write_raw if folder is None else write
    size = max(1, cfg.generation.batch_size // max(1, num_completions // cfg.generation.num_completions))
    told = f"answers of {folder or 'the raw policy'}"
    written: list[list[Completion]] = []
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        how = cfg.evaluation.greedy if greedy is None else greedy
        written += [row["completions"] for row in writes(session, lm, batch, num_completions, purpose, how)]
        session.progress(told, start + len(batch), len(prompts), "")
    return written


def held_out_answers(session: Session, prompts: Sequence[str], folder: str | None) -> list[Completion]:
    """An answer to each prompt by the policy in ``folder``, or by the raw one, with the same random numbers.

    Rows with ``text``, ``token_ids`` and ``finished``. What ``evaluations/answers.jsonl`` has is not written again; a row's
    ``key`` is a digest of all that its answer depends on.
    """
    cfg, lm, run = session.cfg, session.policy_lm, session.run
    how = cfg.generation
    sampling = None if cfg.evaluation.greedy else [how.temperature, how.top_p]
    adapter = adapter_digest(session, folder)
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


def adapter_digest(session: Session, folder: str | None) -> str | None:
    """The sha256 of a policy's adapter; None for the raw policy."""
    return None if folder is None else sha256_of(session.run.path / folder / "adapter_model.safetensors")


def moved(session: Session, prompts: Sequence[str], answers: Sequence[Completion]) -> list[float]:
    """The nats by which the policy in the slot finds each answer likelier than the raw one does.

    Their mean is the KL divergence, were answers drawn at temperature 1 from all tokens.
    """
    cfg, lm, size = session.cfg, session.policy_lm, session.cfg.generation.batch_size
    nats: list[float] = []
    for start in range(0, len(prompts), size):
        span = slice(start, start + size)
        ids = [lm.chat_prompt(prompt, cfg.generation.system, cfg.generation.chat) for prompt in prompts[span]]
        nats += log_ratios(lm, ids, [answer["token_ids"] for answer in answers[span]]).tolist()
    return nats


def mean_words(texts: Sequence[str]) -> float:
    """How many words a text has on average."""
    return sum(len(text.split()) for text in texts) / len(texts)
