"""The selectors choose the best of n answers, without any training of the policy: how much is their taste worth?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fedbiscuit.evaluation.knockout import knock_out
from fedbiscuit.pipeline.answers import answers_of, candidates, mean_words
from fedbiscuit.pipeline.judges import Judge, judges_of, said, verdicts
from fedbiscuit.pipeline.session import Session
from fedbiscuit.pipeline.tasks.asked import Asked, chooser, held_out, write_answers

__all__ = ["best_of_n"]


def best_of_n(session: Session, asked: Asked) -> dict[str, Any]:
    """By policy: the winner of a knock-out of ``evaluation.best_of`` answers against one more that took no part in it.

    The selectors that label choose, by their vote in both orders. The other judges are those that count.
    """
    policies = candidates(session, asked.checkpoints, asked.checkpoint, needs_policy=False)
    choosing, prompts, size = chooser(session), held_out(session), session.cfg.evaluation.best_of
    own = replace(choosing, name=f"{choosing.name}, which chose")
    judges = [own, *judges_of(session)[1:]]
    rows, answers = [], []
    for policy in policies:
        written = answers_of(session, prompts, policy.folder, "best of n", size + 1, greedy=False)
        texts = [[one["text"] for one in each] for each in written]
        winners = _winners(session, choosing, prompts, [each[:size] for each in texts])
        best = [each[winner] for each, winner in zip(texts, winners, strict=True)]
        plain = [each[size] for each in texts]
        rows.append(
            {
                "name": policy.name,
                "step": policy.step,
                "judges": verdicts(session, judges, prompts, best, plain),
                "words": {"best": mean_words(best), "plain": mean_words(plain)},
            }
        )
        answers += [
            {"policy": policy.name, "prompt": p, "best": b, "plain": q, "number": n}
            for p, b, q, n in zip(prompts, best, plain, winners, strict=True)
        ]
    write_answers(session, "best-of-n", answers)
    return {"n": size, "prompts": len(prompts), "policies": rows}


def _winners(session: Session, judge: Judge, prompts: Sequence[str], texts: Sequence[Sequence[str]]) -> list[int]:
    """The number of the answer to each prompt that is left of all."""
    total = sum(len(each) - 1 for each in texts)
    done = 0

    def prefer(matches: list[tuple[int, int, int]]) -> list[float]:
        nonlocal done
        asked = [(prompts[field], texts[field][a], texts[field][b]) for field, a, b in matches]
        done += len(matches)
        probabilities = said(session, judge, *zip(*asked, strict=True))
        session.progress("knock-out", done, total, "pairs")
        return probabilities

    return knock_out([len(each) for each in texts], prefer)
