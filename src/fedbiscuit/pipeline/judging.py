"""A language model judges a policy's answers against others: ``evaluations/judge-PROTOCOL.json``.

Every reply of the judge is kept in ``evaluations/judge-PROTOCOL.jsonl`` as it comes in, under a digest of all that it
depends on; what is there is not asked, and not paid, again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fedbiscuit.config import JudgeSettings
from fedbiscuit.evaluation.judge import (
    HELD_OUT,
    PROTOCOLS,
    Outcome,
    Protocol,
    Reply,
    fill,
    load_wording,
    outcome_of_pair,
    outcome_of_ratings,
    question_key,
    wording_digest,
)
from fedbiscuit.evaluation.lengths import length_controlled
from fedbiscuit.evaluation.metrics import bootstrap_interval
from fedbiscuit.evaluation.winrate import strict_win_rate
from fedbiscuit.models.vllm_engine import check_vllm
from fedbiscuit.pipeline.answers import adapter_digest, candidates
from fedbiscuit.pipeline.asking import ask_here, ask_server, judge_identity, key_of, say_what_leaves
from fedbiscuit.pipeline.contests import CONTESTS, Contest
from fedbiscuit.pipeline.session import Session
from fedbiscuit.pipeline.tasks.asked import Asked
from fedbiscuit.types import ConfigError, FedbiscuitError, rng_for

__all__ = ["check_judge", "judge_run"]

ENOUGH_REFUSALS = 3
"""So many questions refused and none answered: the judge is not one for this run."""


@dataclass(frozen=True, slots=True)
class Question:
    """What a judge is asked about one prompt. answers: as it is shown them. swapped: the policy's own stands second."""

    place: int
    """Of the prompt in its contest."""
    prompt: str
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
    elif settings.engine == "vllm":
        check_vllm()
    load_wording(PROTOCOLS[settings.protocol], settings.template)


def judge_run(session: Session, on: str, asked: Asked) -> str:
    """Judge the answers of ``on`` (``contests.CONTESTS``); returns the name of the file with the results.

    Those of this time stand at its end. Earlier ones of the same judge stay where they are of other checkpoints, asked
    about in the same way.
    """
    settings, run = session.cfg.judge, session.run
    wording = load_wording(PROTOCOLS[settings.protocol], settings.template)
    judge = judge_identity(session)
    contests = CONTESTS[on](session, asked)
    questions = [_questions(session, wording, judge, contest) for contest in contests]
    kept = _kept(session)
    before = set(kept)
    refused = _ask(session, judge, contests, [one for each in questions for one in each], kept)
    whole = [wording, settings.orders, list(contests[0].prompts), list(contests[0].theirs)]
    way = {"judge": judge, "on": on, "way": hashlib.sha256(json.dumps(whole).encode()).hexdigest()}
    results = [
        way | {"wording": wording_digest(wording)}
        | _result(session, contest, each, kept, refused, before)
        for contest, each in zip(contests, questions, strict=True)
    ]  # fmt: skip
    name = f"evaluations/judge-{settings.protocol}.json"
    earlier = (run.read_json(name) or {}).get("judges", [])
    judged = {contest.policy for contest in contests}
    there = {one.name: adapter_digest(session, one.folder) for one in candidates(session, checkpoints=True)}
    for one in results if on == HELD_OUT else ():
        one["adapter"] = there[one["policy"]]
    others = [one for one in earlier if (one["judge"], one.get("on", HELD_OUT)) != (judge, on)]
    along = [
        one
        for one in earlier
        if way.items() <= one.items() and on == HELD_OUT and one["policy"] not in judged
        if one.get("adapter") == there.get(one["policy"], "")  # still the policy that was judged
    ]
    results.sort(key=lambda one: one["step"] or 0)
    run.write_json(name, {"protocol": settings.protocol, "judges": [*others, *along, *results]})
    return name


# Questions


def _questions(session: Session, wording: str, judge: Mapping[str, Any], contest: Contest) -> list[Question]:
    """All questions in the order of the prompts; none about a pair of equal answers."""
    settings = session.cfg.judge
    protocol = PROTOCOLS[settings.protocol]
    questions = []
    for i, (prompt, ours, theirs) in enumerate(zip(contest.prompts, contest.ours, contest.theirs, strict=True)):
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
            questions.append(Question(i, prompt, answers, swapped, text, key))
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
    contests: Sequence[Contest],
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
        say_what_leaves(session, contests)
    ask = ask_server if session.cfg.judge.endpoint else ask_here
    try:
        with contextlib.closing(ask(session, [question.text for question in missing])) as replies:
            for number, reply in replies:
                question = missing[number]
                row = {"key": question.key, "judge": judge, "prompt": question.prompt}
                session.run.append_lines(file, [{**row, "answers": question.answers, **asdict(reply)}])
                if reply.refused:
                    refused[question.key] = reply.refused
                else:
                    kept[question.key] = reply
                    answered += 1
                note = f"{len(refused)} refused" if refused else ""
                session.progress("judge", answered + len(refused), len(missing), note)
                if len(missing) == total and not answered and len(refused) >= min(ENOUGH_REFUSALS, total):
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
    contest: Contest,
    questions: Sequence[Question],
    kept: Mapping[str, Reply],
    refused: Mapping[str, str],
    before: Container[str],
) -> dict[str, Any]:
    """Counts, win rate, and what was said of every prompt; ``said`` is as points of the policy's answer, or ratings."""
    cfg, settings = session.cfg, session.cfg.judge
    protocol, num_prompts = PROTOCOLS[settings.protocol], len(contest.prompts)
    by_prompt: dict[int, list[Question]] = {}
    for question in questions:
        by_prompt.setdefault(question.place, []).append(question)
    outcomes = [_outcome(protocol, by_prompt.get(i, []), kept) for i in range(num_prompts)]
    points = [outcome.points for outcome in outcomes]
    why = Counter(outcome.why for outcome in outcomes)
    replies = [kept[q.key] for q in questions if q.key in kept]
    unread = [reply for reply in replies if protocol.read(reply.text) is None]
    turned_down = {q.key: refused[q.key] for q in questions if q.key in refused}
    key, resamples = (cfg.seed, "judge", settings.protocol), cfg.evaluation.bootstrap
    return {
        "policy": contest.policy,
        "step": contest.step,
        "against": contest.against,
        "orders": settings.orders if protocol.pairwise else None,
        "prompts": num_prompts,
        "win_rate": strict_win_rate(points, key, resamples),
        "length_controlled": length_controlled(points, contest.ours, contest.theirs, key, resamples),
        "ratings": None if protocol.pairwise else _ratings(outcomes, key, resamples),
        "inconsistent": {"count": why["inconsistent"], "share": why["inconsistent"] / num_prompts},
        "unparsable": {
            "prompts": why["unparsable"],
            "replies": len(unread),
            "cut_off": sum(not reply.finished for reply in unread),
            "refused": len(turned_down),
            "asked": len(questions),
            "first": next((reply.text for reply in unread), None) or next(iter(turned_down.values()), None),
        },
        "identical": why["identical"],
        "tokens": {
            "in": sum(reply.tokens_in or 0 for reply in replies),
            "out": sum(reply.tokens_out or 0 for reply in replies),
        },
        "replies_from_before": len({q.key for q in questions if q.key in before}),
        "outcomes": [
            {
                "prompt": i,
                "digest": hashlib.sha256(contest.prompts[i].encode("utf-8", "surrogatepass")).hexdigest()[:16],
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
    """Mean rating of the policy's answers and of those that they are against, over the answers that were rated."""
    found = {}
    for i, name in enumerate(("policy", "against")):
        given = [rating for outcome in outcomes if (rating := outcome.said[i]) is not None]
        mean = sum(given) / len(given) if given else None
        interval = bootstrap_interval(given, (*key, name), resamples) if given else None
        found[name] = {"mean": mean, "interval": interval, "answers": len(given)}
    return found
