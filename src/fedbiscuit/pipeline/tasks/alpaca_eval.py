"""Answers to instructions in the form that the package ``alpaca_eval`` reads."""

from __future__ import annotations

from typing import Any

from fedbiscuit.data.material import read_instructions
from fedbiscuit.pipeline.answers import Candidate, answers_of, candidates, mean_words
from fedbiscuit.pipeline.session import Session
from fedbiscuit.pipeline.tasks.asked import Asked, trained_prompts
from fedbiscuit.types import ConfigError, DataError

__all__ = ["alpaca_eval"]


def alpaca_eval(session: Session, asked: Asked) -> dict[str, Any]:
    """Leaves ``evaluations/alpaca-eval/POLICY/alpaca_eval.json``: a list of {instruction, output, generator, dataset}.

    All policies answer all instructions in the same order, with the same random numbers.
    """
    cfg = session.cfg
    if not cfg.evaluation.instructions:
        raise ConfigError(
            "evaluation.instructions: empty; name a file of instructions, such as the alpaca_eval.json of AlpacaEval"
        )
    policies = candidates(session, asked.checkpoints, asked.checkpoint)
    found = read_instructions(cfg.evaluation.instructions)
    room = set(session.answerable([one.text for one in found]))
    seen = trained_prompts(session)
    fitting = [one for one in found if one.text in room and one.text not in seen]
    num_seen = sum(one.text in seen for one in found)
    if num_seen:
        session.left_out["instructions that the policy was trained on"] = num_seen
    if not fitting:
        raise DataError(
            f"{cfg.evaluation.instructions}: no instruction in it that the policy was not trained on and has room to answer"
        )
    rows = []
    for policy in policies:
        folder = _folder(policy)
        texts = [one.text for one in fitting]
        answers = [one[0] for one in answers_of(session, texts, policy.folder, "alpaca-eval")]
        outputs = [
            {
                "instruction": one.text,
                "output": answer["text"],
                "generator": f"{cfg.name}-{folder}",
                "dataset": one.dataset,
            }
            for one, answer in zip(fitting, answers, strict=True)
        ]
        name = f"evaluations/alpaca-eval/{folder}/alpaca_eval.json"
        session.run.write_json(name, outputs)
        rows.append(
            {
                "name": policy.name,
                "step": policy.step,
                "file": name,
                "words": mean_words([one["output"] for one in outputs]),
                "unfinished": sum(not answer["finished"] for answer in answers) / len(answers),
                "empty": sum(not one["output"] for one in outputs),
            }
        )
    return {"instructions": len(fitting), "system": cfg.generation.system, "policies": rows}


def _folder(policy: Candidate) -> str:
    if policy.folder is None:
        return "raw"
    return "aligned" if policy.folder == "policy" else policy.folder.split("/")[1]
