"""Evaluation of a run: selectors against held-out people, the aligned policy against the raw one; ``evaluation.json``."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from fedbiscuit.backends.client import Memory, answer
from fedbiscuit.data.partition import named_groups
from fedbiscuit.evaluation.metrics import IMPLICIT, UNTRAINED, Judged, calibration, longer_answer, summarize
from fedbiscuit.evaluation.selectors import fit_temperature, judge_by_group, judge_by_vote, score_clients
from fedbiscuit.federated.grouping import adjusted_rand_index, choose_seat
from fedbiscuit.pipeline.answers import held_out_answers, kept, mean_words, moved, unit_of
from fedbiscuit.pipeline.judges import check_judges, judges_of, verdicts
from fedbiscuit.pipeline.scoring import held_out, scores_of
from fedbiscuit.pipeline.session import Session
from fedbiscuit.types import ClientId, ConfigError, DataError, Grouping, Task, Weights

__all__ = ["evaluate_run"]

log = logging.getLogger("fedbiscuit")

T = TypeVar("T")


def evaluate_run(session: Session, checkpoints: bool = False) -> None:
    """``evaluation.json``: selectors against held-out people, the aligned policy against the raw one.

    With ``checkpoints`` also what ``keep_every`` has kept along the way, each as a row with its round or step.
    """
    check_judges(session)
    started = time.monotonic()
    result = {
        "selectors": None if session.cfg.labels.selectors else _evaluate_choices(session, checkpoints),
        "policy": _evaluate_policy(session, checkpoints) if (session.run.path / "policy").is_dir() else None,
        "left_out": session.left_out,
    }
    session.run.write_json("evaluation.json", result)
    session.tracking.forward("evaluation", result)
    seconds = time.monotonic() - started
    session.run.append_lines("timings.jsonl", [{"stage": "evaluation", "step": 1, "seconds": seconds}])


def _evaluate_choices(session: Session, checkpoints: bool) -> dict[str, Any] | None:
    """Every client's test comparisons by its group's selector, the vote, one global selector, length rules and chance.

    A baseline that trains the policy itself stands in the selector's place with the reward that the policy implies; None
    where its data has single good answers and nothing to choose from.
    """
    cfg, run = session.cfg, session.run
    key, resamples = (cfg.seed, "test"), cfg.evaluation.bootstrap
    test = held_out(session.clients, "test", cfg.evaluation.max_comparisons)
    if not test and (cfg.selectors.local.objective == "sft" or not session.clients):
        return None
    if not test:
        raise DataError(
            "no client has test comparisons; give some records split: test, or leave `split` out of all of them"
        )
    adapters = session.selectors() if session.trains else (run.load_adapter("policy", base=session.lm.digest),)
    grouping = _grouping(session, "selectors")
    if absent := sorted(test.keys() - grouping.keys()):
        log.warning(
            "%d clients, such as %s, were there in no round and have no group; they are left out",
            len(absent),
            absent[0],
        )
        session.left_out["clients that were there in no round"] = len(absent)
        test = _seated(test, grouping)
    own_only = cfg.selectors.population == "local"
    total = sum(len(held) for held in test.values())

    def progress(done: int) -> None:
        session.progress("test", min(done, total), total, "comparisons")

    batch_size = cfg.evaluation.batch_size
    scores = scores_of(session, adapters, test, grouping if own_only else None, progress=progress)
    own = judge_by_group(scores, grouping)
    single = len(adapters) == 1
    temperature = _temperature(session, adapters, grouping)
    cooled = judge_by_group(scores, grouping, temperature) if temperature else None
    name = "one global selector" if single else "selector of the client's group"
    name = name if session.trains else IMPLICIT
    rows = [summarize(name, own, key, resamples, cooled)]
    voted: dict[ClientId, Judged] = {}
    if not single and not own_only:
        voted = judge_by_vote(scores, cfg.labels.vote, cfg.labels.temperature)
        cooled = judge_by_vote(scores, cfg.labels.vote, temperature) if temperature else None
        rows.append(summarize("vote of all selectors", voted, key, resamples, cooled))
    as_one: dict[ClientId, Judged] = {}
    if (run.path / "global").is_dir():
        everyone = dict.fromkeys(test, 0)
        as_one = judge_by_group(
            score_clients(session.selector, session.selectors("global"), test, everyone, batch_size), everyone
        )
        rows.append(summarize("one global selector", as_one, key, resamples))
    untrained: dict[ClientId, Judged] = {}
    if cfg.evaluation.compare_raw:
        no_change = {name: torch.zeros_like(weights) for name, weights in adapters[0].items()}
        untrained = judge_by_group(scores_of(session, [no_change], test), dict.fromkeys(test, 0))
        rows.append(summarize(UNTRAINED, untrained, key, resamples))
    longer = {client: longer_answer(held) for client, held in test.items()}
    rows.append(summarize("the longer answer", longer, key, resamples))
    shorter = {
        client: replace(one, probability=1 - one.probability, in_order=1 - one.in_order)
        for client, one in longer.items()
    }
    rows.append(summarize("the shorter answer", shorter, key, resamples))
    new = _judge_new_clients(session, adapters) if session.new_clients and not own_only else {}
    rows += [summarize(name, judged, key, resamples) for name, judged in new.items()]
    rows.append({"name": "chance", "accuracy": 0.5, "accuracy_comparisons": 0.5, "worst_decile": 0.5})
    truth = _true_groups(session)
    along = []
    for round, folder in kept(session, "round", "groups.json") if checkpoints else []:
        at = _grouping(session, folder)
        if not at.keys() >= test.keys():  # kept within the warm-up, before there were groups
            continue
        held = score_clients(session.selector, session.selectors(folder), test, at, batch_size)
        along.append({"round": round, **summarize("checkpoint", judge_by_group(held, at), key, resamples)})
        session.progress("checkpoints", round, cfg.selectors.rounds, f"accuracy {along[-1]['accuracy']:.3f}")
    return {
        "rows": rows,
        "checkpoints": along,
        "clients": {
            client: {
                "adapter": grouping[client],
                "accuracy": own[client].accuracy,
                "comparisons": len(own[client].choice),
                "baseline_longer": longer[client].accuracy,
                **({"vote": voted[client].accuracy} if voted else {}),
                **({"same_as_global": _agree(own[client], as_one[client])} if as_one else {}),
                **({"baseline_raw": untrained[client].accuracy} if untrained else {}),
            }
            for client in sorted(own)
        },
        "new_clients": {name: {c: one.accuracy for c, one in sorted(judged.items())} for name, judged in new.items()},
        "temperature": temperature,
        "calibration": calibration(own),
        "adjusted_rand_index": adjusted_rand_index(grouping, truth) if truth and not single and not own_only else None,
    }


def _agree(mine: Judged, other: Judged) -> float:
    """How often two selectors choose the same answer."""
    return float(((mine.probability > 0.5) == (other.probability > 0.5)).mean())


def _grouping(session: Session, folder: str) -> dict[ClientId, int]:
    """The groups for which the selectors in ``folder`` were trained; everybody in group 0 where there is one selector."""
    if session.num_adapters == 1:
        return dict.fromkeys(session.clients, 0)
    found = session.run.read_json(f"{folder}/groups.json")
    if found is None:
        raise ConfigError(
            f"{session.run.path}: the selectors are not trained; run `fedbiscuit train {session.run.path}` first"
        )
    return dict(found["adapter_of"])


def _seated(held: Mapping[ClientId, T], grouping: Grouping) -> dict[ClientId, T]:
    """Those with a group: real clients whose comparisons are known here may never have been connected."""
    return {client: one for client, one in held.items() if client in grouping}


def _temperature(session: Session, adapters: Sequence[Weights], grouping: Grouping) -> float | None:
    """The temperature that fits the own group's selectors to the validation comparisons; the experimenter's number."""
    held = _seated(held_out(session.clients, "validation", session.cfg.evaluation.max_comparisons), grouping)
    return fit_temperature(scores_of(session, adapters, held, grouping), grouping)


def _judge_new_clients(session: Session, adapters: Sequence[Weights]) -> dict[str, dict[ClientId, Judged]]:
    """Clients that took part in no round: by the selector that fits their own comparisons best, by the vote, by length.

    A new client scores the selectors as in grouping, on comparisons of its own that are not tested, and takes the one of
    least loss; it trains nothing.
    """
    cfg = session.cfg
    test = held_out(session.new_clients, "test", cfg.evaluation.max_comparisons)
    if not test:
        return {}
    scores = scores_of(session, adapters, test)
    seats = dict.fromkeys(test, 0)
    for client in test if len(adapters) > 1 else ():
        task, memory = Task("evaluate", client, cfg.selectors.rounds, dict(enumerate(adapters))), Memory()
        answer(task, session.new_clients[client], session.desk, memory)
        seats[client] = choose_seat(memory.losses, (0.0,) * len(adapters), client)
    fitting = judge_by_group(scores, seats)
    if len(adapters) == 1:
        judged = {f"new clients, {'one global selector' if session.trains else IMPLICIT}": fitting}
    else:
        voted = judge_by_vote(scores, cfg.labels.vote, cfg.labels.temperature)
        judged = {"new clients, the best fitting selector": fitting, "new clients, vote of all selectors": voted}
    return judged | {"new clients, the longer answer": {c: longer_answer(held) for c, held in test.items()}}


def _true_groups(session: Session) -> dict[ClientId, int] | None:
    """The groups that the data itself names (``meta.group``): the reference for grouping, never a feature."""
    truth = session.dataset.truth
    return named_groups(session.clients) if truth is None else dict(truth.group_of)


def _evaluate_policy(session: Session, checkpoints: bool) -> dict[str, Any] | None:
    """Aligned against raw on held-out prompts by every judge, with how long its answers are and how far it has moved."""
    prompts = session.held_out_prompts[: session.cfg.evaluation.num_prompts]
    if not prompts:
        log.warning("the policy is not evaluated: there is no prompt that it was not trained on; set data.prompts")
        return None
    judges = judges_of(session)
    raw, _ = _answers(session, prompts, None)
    aligned, kl = _answers(session, prompts, "policy")
    along = []
    for step, folder in kept(session, unit_of(session), "policy") if checkpoints else []:
        answers, nats = _answers(session, prompts, f"{folder}/policy")
        for verdict in verdicts(session, judges, prompts, answers, raw):
            along.append({"step": step, "words": mean_words(answers), "kl": nats, **verdict})
    return {
        "judges": verdicts(session, judges, prompts, aligned, raw),
        "checkpoints": along,
        "length": {"raw": mean_words(raw), "aligned": mean_words(aligned)},
        "kl": kl,
        "examples": [
            {"prompt": p, "raw": r, "aligned": a} for p, r, a in list(zip(prompts, raw, aligned, strict=True))[:8]
        ],
    }


def _answers(session: Session, prompts: Sequence[str], folder: str | None) -> tuple[list[str], float]:
    """An answer to each held-out prompt, and how far the policy in ``folder`` has moved from the raw one, in nats."""
    answers = held_out_answers(session, prompts, folder)
    if folder is None:
        return [one["text"] for one in answers], 0.0
    session.policy_lm.put_adapter(session.run.load_adapter(folder, base=session.policy_lm.digest))
    nats = moved(session, prompts, answers)
    return [one["text"] for one in answers], sum(nats) / len(nats)
