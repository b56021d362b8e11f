"""Evaluation of a run: selectors against held-out people, the aligned policy against the raw one; ``evaluation.json``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fedbiscuit.evaluation.metrics import calibration, longer_answer, summarize
from fedbiscuit.evaluation.selectors import judge_by_group, judge_by_vote, score_clients
from fedbiscuit.evaluation.winrate import win_rate
from fedbiscuit.federated.grouping import adjusted_rand_index
from fedbiscuit.models.selector import choice_probability, letter_margins, vote
from fedbiscuit.pipeline.labels import write, write_raw
from fedbiscuit.pipeline.session import Session, resolved
from fedbiscuit.types import ClientId, Comparison, ConfigError, DataError

__all__ = ["evaluate_run"]


def evaluate_run(session: Session) -> None:
    """``evaluation.json``: selectors against held-out people, the aligned policy against the raw one."""
    started = time.monotonic()
    chooses = session.cfg.selectors.local.objective == "choice"
    result = {
        "selectors": _evaluate_selectors(session) if chooses else None,
        "policy": _evaluate_policy(session) if (session.run.path / "policy").is_dir() else None,
    }
    session.run.write_json("evaluation.json", result)
    seconds = time.monotonic() - started
    session.run.append_lines("timings.jsonl", [{"stage": "evaluation", "step": 1, "seconds": seconds}])


def _evaluate_selectors(session: Session) -> dict[str, Any]:
    """Every client's test comparisons by its group's selector, the vote, one global selector, length rules and chance."""
    cfg, run = session.cfg, session.run
    key, resamples = (cfg.seed, "test"), cfg.evaluation.bootstrap
    limit = cfg.evaluation.max_comparisons or None
    test = {client: data.test[:limit] for client, data in session.clients.items() if data.test}
    if not test:
        raise DataError(
            "no client has test comparisons; give some records split: test, or leave `split` out of all of them"
        )
    adapters = session.selectors()
    grouping = _final_grouping(session)
    own_only = cfg.selectors.population == "local"
    total = sum(len(held) for held in test.values()) * (1 if own_only else len(adapters))

    def progress(done: int) -> None:
        session.progress("test", min(done, total), total, "comparisons")

    batch_size = cfg.evaluation.batch_size
    scores = score_clients(session.selector, adapters, test, grouping if own_only else None, batch_size, progress)
    own = judge_by_group(scores, grouping)
    single = len(adapters) == 1
    rows = [summarize("one global selector" if single else "selector of the client's group", own, key, resamples)]
    if not single and not own_only:
        rows.append(
            summarize(
                "vote of all selectors", judge_by_vote(scores, cfg.labels.vote, cfg.labels.temperature), key, resamples
            )
        )
    if (run.path / "global").is_dir():
        everyone = dict.fromkeys(test, 0)
        judged = judge_by_group(
            score_clients(session.selector, session.selectors("global"), test, everyone, batch_size), everyone
        )
        rows.append(summarize("one global selector", judged, key, resamples))
    longer = {client: longer_answer(held) for client, held in test.items()}
    rows.append(summarize("the longer answer", longer, key, resamples))
    shorter = {client: replace(one, probability=1 - one.probability) for client, one in longer.items()}
    rows.append(summarize("the shorter answer", shorter, key, resamples))
    rows.append({"name": "chance", "accuracy": 0.5, "accuracy_comparisons": 0.5, "worst_decile": 0.5})
    truth = _true_groups(session)
    return {
        "rows": rows,
        "clients": {
            client: {
                "adapter": grouping[client],
                "accuracy": own[client].accuracy,
                "comparisons": len(own[client].choice),
                "baseline_longer": longer[client].accuracy,
            }
            for client in sorted(own)
        },
        "calibration": calibration(own),
        "adjusted_rand_index": adjusted_rand_index(grouping, truth) if truth and not single and not own_only else None,
        "left_out": session.left_out,
        "shortened_prompts": session.shortened,
    }


def _final_grouping(session: Session) -> dict[ClientId, int]:
    """The groups as they were at the last round; everybody in group 0 where there is one selector."""
    clients = session.clients
    if session.cfg.selectors.population == "centralized" or resolved(session.cfg.selectors, clients).num_adapters == 1:
        return dict.fromkeys(clients, 0)
    found = session.run.load_state("selectors")
    if found is None:
        raise ConfigError(
            f"{session.run.path}: the selectors are not trained; run `fedbiscuit train {session.run.path}` first"
        )
    return dict(found[2]["grouping"])


def _true_groups(session: Session) -> dict[ClientId, int] | None:
    """The groups that the data itself names (``meta.group``): the reference for grouping, never a feature."""
    if session.dataset.truth is not None:
        return dict(session.dataset.truth.group_of)
    named = {
        client: {str(c.meta["group"]) for c in (*data.train, *data.test) if "group" in c.meta}
        for client, data in session.clients.items()
    }
    if not all(len(groups) == 1 for groups in named.values()):
        return None
    numbers = {group: i for i, group in enumerate(sorted({g for groups in named.values() for g in groups}))}
    return {client: numbers[next(iter(groups))] for client, groups in named.items()}


def _evaluate_policy(session: Session) -> dict[str, Any]:
    """Aligned against raw on held-out prompts, judged by the selectors' vote and, in the demo world, by the truth."""
    cfg, run, lm = session.cfg, session.run, session.policy_lm
    prompts = session.dataset.held_out_prompts[: cfg.evaluation.num_prompts]
    greedy, size, key = cfg.evaluation.greedy, cfg.generation.batch_size, (cfg.seed, "win rate")
    answers: dict[str, list[str]] = {"raw": [], "aligned": []}
    lm.put_adapter(run.load_adapter("policy", base=lm.digest))
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        for name, rows in (
            ("raw", write_raw(session, lm, batch, 1, "held-out", greedy)),
            ("aligned", write(session, lm, batch, 1, "held-out", greedy)),
        ):
            answers[name] += [row["completions"][0]["text"] for row in rows]
        session.progress("answers", start + len(batch), len(prompts), "raw and aligned policy")
    raw, aligned = answers["raw"], answers["aligned"]
    judges = []
    if cfg.selectors.local.objective == "choice":
        judges.append(
            win_rate(
                "the selectors' vote", _selector_verdicts(session, prompts, aligned, raw), key, cfg.evaluation.bootstrap
            )
        )
    truth = session.dataset.truth
    if truth is not None:
        verdicts = [truth.majority_prefers(*one) for one in zip(prompts, aligned, raw, strict=True)]
        judges.append(win_rate("known truth of the majority", verdicts, key, cfg.evaluation.bootstrap))
    return {
        "judges": judges,
        "length": {name: sum(len(text.split()) for text in texts) / len(texts) for name, texts in answers.items()},
        "examples": [
            {"prompt": p, "raw": r, "aligned": a} for p, r, a in list(zip(prompts, raw, aligned, strict=True))[:8]
        ],
    }


def _selector_verdicts(
    session: Session, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]
) -> list[float]:
    """(n) probability that the first answer is better, by the vote in both orders; equal answers are a tie."""
    comparisons = [Comparison(p, a, b) for p, a, b in zip(prompts, first, second, strict=True)]
    fitting, left_out = session.selector.encode(comparisons)
    if left_out:
        raise DataError(
            f"{len(left_out)} pairs of answers do not fit data.max_tokens; raise it or lower max_new_tokens"
        )
    margins = letter_margins(session.selector, session.selectors(), fitting, session.cfg.evaluation.batch_size)
    labels = session.cfg.labels
    said = vote(choice_probability(margins, labels.temperature), labels.vote).probability.tolist()
    return [0.5 if a == b else p for p, a, b in zip(said, first, second, strict=True)]
