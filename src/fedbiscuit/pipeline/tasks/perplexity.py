"""Signs of reward hacking: has the policy learned what people want, or what pleases the selectors?

Where the selectors' win rate goes on rising while independent judges no longer follow, answers grow longer, and the raw
model finds them odd, the policy exploits the selectors (Gao et al. 2023, "Scaling Laws for Reward Model Overoptimization").
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from fedbiscuit.evaluation.metrics import FEWEST, bootstrap_interval
from fedbiscuit.evaluation.perplexity import perplexity
from fedbiscuit.models.policy import response_log_probs
from fedbiscuit.pipeline.answers import RAW, Candidate, answers_of, candidates, mean_words, unit_of
from fedbiscuit.pipeline.judges import judges_of, verdicts
from fedbiscuit.pipeline.session import Session
from fedbiscuit.pipeline.tasks.asked import Asked, held_out
from fedbiscuit.types import seed_for

__all__ = ["signs_of_hacking"]

log = logging.getLogger("fedbiscuit")
Sequences = Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
"""(prompt, response) as token ids."""


def signs_of_hacking(session: Session, asked: Asked) -> dict[str, Any]:
    """By policy: perplexity of its answers under the raw one, of people's preferred answers under it, KL, length, judges.

    The preferred answers are those of test comparisons, at most ``evaluation.num_prompts``, drawn by a hash.
    """
    cfg, lm = session.cfg, session.policy_lm
    policies = candidates(session, asked.checkpoints, asked.checkpoint)
    prompts = held_out(session)
    people = _people(session)
    judges = judges_of(session)
    key, resamples = (cfg.seed, "perplexity"), cfg.evaluation.bootstrap
    ids = [lm.chat_prompt(prompt, cfg.generation.system, cfg.generation.chat) for prompt in prompts]
    raw_texts: list[str] = []
    rows: list[dict[str, Any]] = []
    for policy in policies:
        written = [one[0] for one in answers_of(session, prompts, policy.folder)]
        texts = [one["text"] for one in written]
        answers = [(prompt, tuple(one["token_ids"])) for prompt, one in zip(ids, written, strict=True)]
        lengths = [len(tokens) for _, tokens in answers]
        under_raw = _log_probs(session, answers, RAW)
        nats = [a - b for a, b in zip(_log_probs(session, answers, policy), under_raw, strict=True)]
        row: dict[str, Any] = {
            "name": policy.name,
            "step": policy.step,
            "answers_under_raw": perplexity(under_raw, lengths, (*key, "answers"), resamples),
            "people_under_policy": None,
            "kl": sum(nats) / len(nats),
            "kl_interval": bootstrap_interval(nats, (*key, "kl"), resamples) if len(nats) >= FEWEST else None,
            "words": mean_words(texts),
            "tokens": sum(lengths) / len(lengths),
            "unfinished": sum(not one["finished"] for one in written) / len(written),
        }
        if people:
            sizes = [len(tokens) for _, tokens in people]
            under = _log_probs(session, people, policy)
            row["people_under_policy"] = perplexity(under, sizes, (*key, "people"), resamples)
        if policy is RAW:
            raw_texts = texts
        row["judges"] = [] if policy is RAW else verdicts(session, judges, prompts, texts, raw_texts)
        rows.append(row)
    return {"prompts": len(prompts), "people": len(people), "unit": unit_of(session), "policies": rows}


def _people(session: Session) -> Sequences:
    """Preferred answers of test comparisons, closed by the end token; [] where the run has no comparisons."""
    if not session.dataset.clients:
        log.warning("this run has no comparisons, so people's answers are not looked at")
        return []
    cfg, lm = session.cfg, session.policy_lm
    everyone = {**session.clients, **session.new_clients}
    found = {(c.prompt, c.chosen) for data in everyone.values() for c in data.test}
    drawn = sorted(found, key=lambda one: seed_for(cfg.seed, "people's answers", *one))
    encoded = [
        (lm.chat_prompt(prompt, cfg.generation.system, cfg.generation.chat), (*lm.encode(answer), lm.end))
        for prompt, answer in drawn
    ]
    fitting = [one for one in encoded if lm.context is None or len(one[0]) + len(one[1]) <= lm.context]
    if len(fitting) < len(encoded):
        session.left_out["people's answers that the policy cannot read whole"] = len(encoded) - len(fitting)
    return fitting[: cfg.evaluation.num_prompts]


@torch.no_grad()
def _log_probs(session: Session, sequences: Sequences, policy: Candidate) -> list[float]:
    """Log-probability of each response under a policy, in nats; its adapter is put in the slot."""
    lm, size = session.policy_lm, session.cfg.generation.batch_size
    lm.model.eval()
    if policy.folder is not None:
        lm.put_adapter(session.run.load_adapter(policy.folder, base=lm.digest))
    found: list[float] = []
    for start in range(0, len(sequences), size):
        prompts, responses = zip(*sequences[start : start + size], strict=True)
        if policy.folder is None:
            with lm.adapter_off():
                found += response_log_probs(lm, prompts, responses).tolist()
        else:
            found += response_log_probs(lm, prompts, responses).tolist()
    return found
