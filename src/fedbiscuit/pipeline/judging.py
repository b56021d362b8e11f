"""A language model judges the aligned policy's answers against the raw one's: ``evaluations/judge-PROTOCOL.json``.

Every reply of the judge is kept in ``evaluations/judge-PROTOCOL.jsonl`` as it comes in, under a digest of all that it
depends on; what is there is not asked, and not paid, again.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fedbiscuit.config import JudgeSettings
from fedbiscuit.evaluation.judge import (
    PROTOCOLS,
    Outcome,
    Protocol,
    Reply,
    fill,
    load_wording,
    outcome_of_pair,
    outcome_of_ratings,
    question_key,
)
from fedbiscuit.evaluation.metrics import bootstrap_interval
from fedbiscuit.evaluation.winrate import strict_win_rate
from fedbiscuit.pipeline.answers import held_out_answers
from fedbiscuit.pipeline.asking import ask_here, ask_server, judge_lm, key_of, say_what_leaves
from fedbiscuit.pipeline.session import Session
from fedbiscuit.types import ConfigError, DataError, FedbiscuitError, rng_for

__all__ = ["check_judge", "judge_run"]

ENOUGH_REFUSALS = 3
"""So many questions refused and none answered: the judge is not one for this run."""


@dataclass(frozen=True, slots=True)
class Question:
    """What a judge is asked about one prompt. answers: as it is shown them. swapped: the raw answer stands first."""

    prompt: int
    answers: tuple[str, ...]
    swapped: bool
    text: str
    key: str


def check_judge(settings: JudgeSettings) -> None:
    """Stop where something is missing, before a model is loaded and before the settings are written down."""
    if not settings.model:
        raise ConfigError(
            "judge.model: empty; name who judges: --model MODEL loads it here, --endpoint URL --model NAME asks a server"
        )
    if settings.endpoint:
        key_of(settings)
    load_wording(PROTOCOLS[settings.protocol], settings.template)


def judge_run(session: Session) -> str:
    """Judge the run's answers to held-out prompts; returns the name of the file with the result."""
    settings, run = session.cfg.judge, session.run
    wording = load_wording(PROTOCOLS[settings.protocol], settings.template)
    if not (run.path / "policy").is_dir():
        raise ConfigError(f"{run.path}: there is no aligned policy to judge; run `fedbiscuit align {run.path}` first")
    prompts = session.held_out_prompts[: session.cfg.evaluation.num_prompts]
    if not prompts:
        raise DataError("there is no prompt that the policy was not trained on; set data.prompts")
    raw = [row["text"] for row in held_out_answers(session, prompts, None)]
    aligned = [row["text"] for row in held_out_answers(session, prompts, "policy")]
    judge = _identity(session)
    questions = _questions(session, wording, judge, prompts, aligned, raw)
    kept = _kept(session)
    num_kept = len({q.key for q in questions} & kept.keys())
    refused = _ask(session, judge, prompts, questions, kept)
    name = f"evaluations/judge-{settings.protocol}.json"
    result = _result(session, judge, questions, kept, refused)
    result |= {"wording": hashlib.sha256(wording.encode()).hexdigest(), "replies_from_before": num_kept}
    others = [one for one in (run.read_json(name) or {}).get("judges", []) if one["judge"] != judge]
    run.write_json(name, {"protocol": settings.protocol, "judges": [*others, result]})
    return name


# Questions


def _identity(session: Session) -> dict[str, Any]:
    """Who judges and how it writes: with the question all that a reply depends on."""
    settings = session.cfg.judge
    how = {"max_tokens": settings.max_tokens, "temperature": settings.temperature}
    if settings.endpoint:
        return {"model": settings.model, "endpoint": settings.endpoint.rstrip("/"), **how}
    lm = judge_lm(session)
    return {"model": lm.public_name, "digest": lm.digest, **how}


def _questions(
    session: Session,
    wording: str,
    judge: Mapping[str, Any],
    prompts: Sequence[str],
    aligned: Sequence[str],
    raw: Sequence[str],
) -> list[Question]:
    """All questions in the order of the prompts; none about a pair of equal answers."""
    settings = session.cfg.judge
    protocol = PROTOCOLS[settings.protocol]
    questions = []
    for i, (prompt, ours, theirs) in enumerate(zip(prompts, aligned, raw, strict=True)):
        shown: list[tuple[tuple[str, ...], bool]] = [((ours, theirs), False), ((theirs, ours), True)]
        if not protocol.pairwise:
            shown = [((ours,), False), ((theirs,), True)]
        elif ours == theirs:
            shown = []
        elif settings.orders == "one":
            shown = [rng_for(session.cfg.seed, "judge order", prompt).choice(shown)]
        for answers, swapped in shown:
            text = fill(wording, dict(zip(protocol.fields, (prompt, *answers), strict=True)))
            key = question_key(settings.protocol, wording, judge, prompt, answers)
            questions.append(Question(i, answers, swapped, text, key))
    return questions


# Replies


def _replies_file(session: Session) -> str:
    return f"evaluations/judge-{session.cfg.judge.protocol}.jsonl"


def _kept(session: Session) -> dict[str, Reply]:
    """The replies of earlier times by the keys of their questions. What was refused then may be taken now."""
    fields = Reply.__dataclass_fields__
    return {
        row["key"]: Reply(**{name: row[name] for name in fields})
        for row in session.run.read_lines(_replies_file(session))
        if not row["refused"]
    }


def _ask(
    session: Session,
    judge: Mapping[str, Any],
    prompts: Sequence[str],
    questions: Sequence[Question],
    kept: dict[str, Reply],
) -> dict[str, str]:
    """Ask what nobody has answered yet; each reply goes to the file, then into ``kept``. Returns refusals by key."""
    missing = list({q.key: q for q in questions if q.key not in kept}.values())
    refused: dict[str, str] = {}
    if not missing:
        return refused
    file, total, answered = _replies_file(session), len({q.key for q in questions}), 0
    if session.cfg.judge.endpoint:
        say_what_leaves(session, prompts)
    ask = ask_server if session.cfg.judge.endpoint else ask_here
    try:
        with contextlib.closing(ask(session, [question.text for question in missing])) as replies:
            for number, reply in replies:
                question = missing[number]
                row = {"key": question.key, "judge": judge, "prompt": prompts[question.prompt]}
                session.run.append_lines(file, [{**row, "answers": question.answers, **asdict(reply)}])
                if reply.refused:
                    refused[question.key] = reply.refused
                else:
                    kept[question.key] = reply
                    answered += 1
                note = f"{len(refused)} refused" if refused else ""
                session.progress("judge", answered + len(refused), len(missing), note)
                if not answered and len(refused) >= min(ENOUGH_REFUSALS, total):
                    raise ConfigError(
                        f"{session.cfg.judge.model} took none of the first {len(refused)} questions: {reply.refused}; "
                        "check judge.model, judge.max_tokens and judge.length_field, or use another judge"
                    )
    except FedbiscuitError as error:
        raise type(error)(
            f"{error}\n{total - len(missing) + answered} of {total} replies are kept in {session.run.path / file}; the same "
            "command asks only for the rest"
        ) from error
    return refused


# The result


def _result(
    session: Session,
    judge: Mapping[str, Any],
    questions: Sequence[Question],
    kept: Mapping[str, Reply],
    refused: Mapping[str, str],
) -> dict[str, Any]:
    """Counts, win rate, and what was said of every prompt; ``said`` is as points of the aligned answer, or ratings."""
    cfg, settings = session.cfg, session.cfg.judge
    protocol = PROTOCOLS[settings.protocol]
    by_prompt: dict[int, list[Question]] = {}
    for question in questions:
        by_prompt.setdefault(question.prompt, []).append(question)
    num_prompts = len(session.held_out_prompts[: cfg.evaluation.num_prompts])
    outcomes = [_outcome(protocol, by_prompt.get(i, []), kept) for i in range(num_prompts)]
    why = Counter(outcome.why for outcome in outcomes)
    replies = [kept[q.key] for q in questions if q.key in kept]
    unread = [reply for reply in replies if protocol.read(reply.text) is None]
    key = (cfg.seed, "judge", settings.protocol)
    return {
        "judge": dict(judge),
        "orders": settings.orders if protocol.pairwise else None,
        "prompts": num_prompts,
        "win_rate": strict_win_rate([outcome.points for outcome in outcomes], key, cfg.evaluation.bootstrap),
        "ratings": None if protocol.pairwise else _ratings(outcomes, key, cfg.evaluation.bootstrap),
        "inconsistent": {"count": why["inconsistent"], "share": why["inconsistent"] / num_prompts},
        "unparsable": {
            "prompts": why["unparsable"],
            "replies": len(unread),
            "cut_off": sum(not reply.finished for reply in unread),
            "refused": len(refused),
            "asked": len(questions),
            "first": next((reply.text for reply in unread), None) or next(iter(refused.values()), None),
        },
        "identical": why["identical"],
        "tokens": {
            "in": sum(reply.tokens_in or 0 for reply in replies),
            "out": sum(reply.tokens_out or 0 for reply in replies),
        },
        "outcomes": [
            {
                "prompt": i,
                "points": outcome.points,
                "why": outcome.why,
                "said": outcome.said,
                "keys": [question.key for question in by_prompt.get(i, [])],
            }
            for i, outcome in enumerate(outcomes)
        ],
    }


def _outcome(protocol: Protocol, questions: Sequence[Question], kept: Mapping[str, Reply]) -> Outcome:
    """What the replies about one prompt come to."""
    if not questions:
        return Outcome(0.5, "identical")
    said = [protocol.read(kept[q.key].text) if q.key in kept else None for q in questions]
    if not protocol.pairwise:
        return outcome_of_ratings(*said)
    return outcome_of_pair([p if p is None or not q.swapped else 1 - p for p, q in zip(said, questions, strict=True)])


def _ratings(outcomes: Sequence[Outcome], key: tuple[object, ...], resamples: int) -> dict[str, Any]:
    """Mean rating of aligned and raw answers, over the answers that were rated."""
    found = {}
    for i, name in enumerate(("aligned", "raw")):
        given = [rating for outcome in outcomes if (rating := outcome.said[i]) is not None]
        mean = sum(given) / len(given) if given else None
        interval = bootstrap_interval(given, (*key, name), resamples) if given else None
        found[name] = {"mean": mean, "interval": interval, "answers": len(given)}
    return found
