"""The selectors and their vote on labelled pairs of the user's, such as RewardBench's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedbiscuit.data import files
from fedbiscuit.data.comparisons import read_comparisons
from fedbiscuit.data.material import labelled_pair
from fedbiscuit.data.records import pair_of
from fedbiscuit.evaluation.agreement import agreement, parts_of
from fedbiscuit.evaluation.metrics import longer_answer
from fedbiscuit.evaluation.selectors import judge_by_group, judge_by_vote, score_clients
from fedbiscuit.models.selector import Selector
from fedbiscuit.pipeline.answers import kept
from fedbiscuit.pipeline.judges import labeling_session
from fedbiscuit.pipeline.session import Session
from fedbiscuit.pipeline.tasks.asked import Asked, chooser
from fedbiscuit.types import Comparison, ConfigError, DataError, Weights

__all__ = ["agreement_with_pairs"]


def agreement_with_pairs(session: Session, asked: Asked) -> dict[str, Any]:
    """By rule (each adapter, their vote, the longer answer): over all pairs, by subset and by client, in both orders.

    Pairs that the selectors were trained on are left out and counted; ``trained_elsewhere``: on what is not known here.
    """
    cfg, path = session.cfg, session.run.path
    if not cfg.evaluation.pairs:
        raise ConfigError(
            "evaluation.pairs: empty; name files of labelled pairs (.jsonl), such as evaluation.pairs=[pairs.jsonl]"
        )
    judge = chooser(session)
    versions: list[tuple[str, int | None, Sequence[Weights]]] = []
    if asked.checkpoints or asked.checkpoint is not None:
        if not session.trains:
            raise ConfigError(f"{path}: takes the selectors of {cfg.labels.selectors}; ask for checkpoints of that run")
        found = kept(session, "round", "u0")
        if asked.checkpoint is not None:
            there = ", ".join(str(number) for number, _ in found) or "none"
            found = [one for one in found if one[0] == asked.checkpoint]
            if not found:
                raise ConfigError(
                    f"{path}: no selectors were kept after round {asked.checkpoint}; kept: {there} (see selectors.keep_every)"
                )
        versions = [(f"after round {number}", number, session.selectors(folder)) for number, folder in found]
    if asked.checkpoint is None:
        versions = [*(one for one in versions if one[1] != cfg.selectors.rounds), ("", None, judge.adapters)]
    wants = "comparisons (.jsonl), or pairs as RewardBench has them"
    comparisons, report = read_comparisons(
        [part.path for place in cfg.evaluation.pairs for part in files.parts_of(place, "evaluation.pairs", wants)],
        drop_empty=cfg.data.drop_empty,
        strict=cfg.data.strict,
        convert=lambda record, path: labelled_pair(record),
        separate_splits=False,
        read=files.iter_records,
    )
    for reason, count in report.left_out.items():
        _note(session, f"labelled pairs: {reason}", count)
    trained = labeling_session(session)
    pairs = _fitting(session, judge.selector, _unseen(session, trained, comparisons))
    by = {"subset": parts_of([c.domain for c in pairs]), "client": parts_of([c.client for c in pairs])}
    key, resamples = (cfg.seed, "agreement"), cfg.evaluation.bootstrap
    rows = []
    for version, number, adapters in versions:
        scores = score_clients(
            judge.selector,
            adapters,
            {"all": pairs},
            None,
            cfg.evaluation.batch_size,
            progress=lambda done: session.progress("agreement", min(done, len(pairs)), len(pairs), "pairs"),
        )
        judged = {f"selector u{u}": judge_by_group(scores, {"all": u})["all"] for u in range(len(adapters))}
        if len(adapters) > 1:
            judged[f"vote of all selectors ({judge.labels.vote})"] = judge_by_vote(
                scores, judge.labels.vote, judge.labels.temperature
            )["all"]
        for name, one in judged.items():
            told = f"{name}, {version}" if version else name
            rows.append({"round": number, **agreement(told, one, by, key, resamples)})
    rows.append({"round": None, **agreement("the longer answer", longer_answer(pairs), by, key, resamples)})
    elsewhere = bool((trained.run.read_json("manifest.json") or {}).get("real_clients"))
    return {"files": report.files, "pairs": len(pairs), "trained_elsewhere": elsewhere, "rows": rows}


def _unseen(session: Session, trained: Session, comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Without those that were trained on: by the same client where it is named, else by anybody.

    ``trained``: the run that trained the selectors.
    """
    own = {(client, pair_of(c)) for client, data in trained.clients.items() for c in data.train}
    anybody = {pair for _, pair in own}
    unseen = [
        c for c in comparisons if (pair_of(c) not in anybody if c.client is None else (c.client, pair_of(c)) not in own)
    ]
    _note(session, "labelled pairs: the selectors were trained on them", len(comparisons) - len(unseen))
    if not unseen:
        raise DataError("evaluation.pairs: the selectors were trained on all of these pairs; name others")
    return unseen


def _fitting(session: Session, selector: Selector, comparisons: Sequence[Comparison]) -> list[Comparison]:
    _, too_long = selector.encode(comparisons)
    longer = {id(comparison) for comparison in too_long}
    fitting = [comparison for comparison in comparisons if id(comparison) not in longer]
    _note(session, "labelled pairs: do not fit max_tokens", len(too_long))
    if not fitting:
        raise DataError(
            f"evaluation.pairs: none of the {len(comparisons)} pairs fits data.max_tokens={selector.max_tokens} of the selectors"
        )
    return fitting


def _note(session: Session, reason: str, count: int) -> None:
    if count:
        session.left_out[reason] = count
