"""Greedy summaries of posts that the policy has not seen, against those that people wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fedbiscuit.data.material import Reference, read_references
from fedbiscuit.data.sources import filtered_tldr
from fedbiscuit.evaluation.rouge import lead, rouge, rouge_scorer
from fedbiscuit.pipeline.answers import answers_of, candidates, mean_words
from fedbiscuit.pipeline.judges import judges_of, verdicts
from fedbiscuit.pipeline.session import Session
from fedbiscuit.pipeline.tasks.asked import Asked, trained_prompts, write_answers
from fedbiscuit.types import ConfigError, DataError

__all__ = ["summarization"]


def summarization(session: Session, asked: Asked) -> dict[str, Any]:
    """By policy: ROUGE against the people's summaries, and how often judges prefer its summary to theirs.

    Beside them the first three sentences of each post, which need no model.
    """
    scorer = rouge_scorer()
    policies = candidates(session, asked.checkpoints, asked.checkpoint)
    files, references = _references(session)
    posts, written = [one.prompt for one in references], [one.summary for one in references]
    fields = {one.prompt: one.fields for one in references if one.fields}
    session.dataset = replace(session.dataset, fields={**session.dataset.fields, **fields})
    key, resamples = (session.cfg.seed, "summarization"), session.cfg.evaluation.bootstrap
    judges = judges_of(session)
    answers: dict[str, list[str]] = {}
    rows = []
    for policy in policies:
        mine = [one[0] for one in answers_of(session, posts, policy.folder, "summarization", greedy=True)]
        answers[policy.name] = texts = [one["text"] for one in mine]
        rows.append(
            {
                "name": policy.name,
                "step": policy.step,
                "rouge": rouge(scorer, texts, written, key, resamples),
                "judges": verdicts(session, judges, posts, texts, written),
                "words": mean_words(texts),
                "unfinished": sum(not one["finished"] for one in mine) / len(mine),
            }
        )
    first = [lead(post) for post in posts]
    name = "the post's first three sentences"
    rows.append(
        {
            "name": name,
            "step": None,
            "rouge": rouge(scorer, first, written, key, resamples),
            "judges": verdicts(session, judges, posts, first, written),
            "words": mean_words(first),
        }
    )
    write_answers(
        session,
        "summarization",
        (
            {"prompt": p, "reference": r, "answers": {name: texts[i] for name, texts in answers.items()}}
            for i, (p, r) in enumerate(zip(posts, written, strict=True))
        ),
    )
    return {"references": files, "posts": len(posts), "reference_words": mean_words(written), "policies": rows}


def _references(session: Session) -> tuple[list[str], list[Reference]]:
    """Files, and of what is in them the first ``evaluation.num_prompts`` posts that the policy has not been trained on."""
    cfg = session.cfg
    if cfg.evaluation.references:
        files, seen = [cfg.evaluation.references], trained_prompts(session)
        found = read_references(files[0])
        fresh = [one for one in found if one.prompt not in seen]
        if len(fresh) < len(found):
            session.left_out["posts with a reference that the policy was trained on"] = len(found) - len(fresh)
    elif cfg.data.source in ("tldr", "tldr_sft"):
        files, apart = [part.path for part in filtered_tldr(cfg.data.path)], set(session.held_out_prompts)
        fresh = list(
            {one.prompt: one for path in files for one in read_references(path) if one.prompt in apart}.values()
        )
    else:
        files, fresh = [], []
    if not files:
        raise ConfigError(
            "evaluation.references: empty, and the data has no summaries by people; name a .jsonl file with `post` and "
            "`summary`, such as test.jsonl of tldr_3_filtered"
        )
    fitting = _answerable(session, fresh)[: cfg.evaluation.num_prompts]
    if not fitting:
        raise DataError(
            f"{', '.join(files)}: no post in it that the policy was not trained on and has room to answer; name other posts "
            "in evaluation.references"
        )
    return files, fitting


def _answerable(session: Session, references: Sequence[Reference]) -> list[Reference]:
    room = set(session.answerable([one.prompt for one in references]))
    return [one for one in references if one.prompt in room]
