"""The selector phase: the loop that runs rounds, evaluates, logs, saves and stops early, in plain sight."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fedbiscuit.config import FederatedSettings
from fedbiscuit.data.partition import pooled
from fedbiscuit.evaluation.metrics import summarize
from fedbiscuit.evaluation.selectors import judge_by_group
from fedbiscuit.federated.algorithm import assign, fedbiscuit_round, init_state, phase_of
from fedbiscuit.models.cards import baseline_card, reward_card, selector_card
from fedbiscuit.pipeline.devices import backend_for
from fedbiscuit.pipeline.scoring import held_out, imitation_loss, scores_of
from fedbiscuit.pipeline.session import Session, resolved
from fedbiscuit.rundir.disk import human_bytes
from fedbiscuit.types import ClientData, ClientId, DataError, RoundRecord, ServerState, Weights

__all__ = ["train_all"]

log = logging.getLogger("fedbiscuit")

Row = Mapping[str, Any]
"""A line of ``metrics.jsonl``."""


def train_all(session: Session) -> None:
    """The selectors of the settings; with ``compare_global`` also one global selector by the same budget of rounds."""
    session.settle()
    session.note_left_out()
    _train(session, session.cfg.selectors, "selectors", "metrics.jsonl")
    if session.cfg.evaluation.compare_global and session.cfg.selectors.num_adapters > 1:
        _train(session, _global(session.cfg.selectors), "global", "global_metrics.jsonl")


def _train(session: Session, settings: FederatedSettings, name: str, metrics: str) -> None:
    """Rounds, from the last saved state to the end: run, evaluate when due, log, save, stop early."""
    run, seed = session.run, session.cfg.seed
    trains_selectors = settings.local.objective == "choice"
    clients = {"all": pooled(session.clients)} if settings.population == "centralized" else session.clients
    if session.connect is None and (not clients or _is_trained(session, settings, name, metrics)):
        _take_what_is_trained(session, settings, name, metrics)
        return
    with backend_for(session, clients, settings, name) as backend:
        settings = resolved(settings, None if session.connect else sorted(backend.clients()), clients)
        found = run.load_state(name)
        state = init_state([session.lm.new_adapter(seed, "adapter", u) for u in range(settings.num_adapters)])
        if found is not None:
            state = _unpacked_state(found[1], found[2])
        run.keep_lines(metrics, state.round)
        history = run.read_lines(metrics)
        if settings.patience and not any(data.validation for data in clients.values()):
            log.warning(
                "selectors.patience: %d, but there are no validation comparisons here to judge a round by, so all %d rounds are "
                "run; give some, or set data.val_fraction",
                settings.patience,
                settings.rounds,
            )
        if name == "selectors" and state.round < settings.rounds and not _gave_up(history, settings.patience):
            run.set_aside(
                "evaluation.json", f"evaluation-round-{state.round:06d}.json"
            )  # of these selectors, not of those to come
        while state.round < settings.rounds and not _gave_up(history, settings.patience):
            state, record = fedbiscuit_round(state, backend, settings, seed)
            row = _row(record)
            due = settings.eval_every and state.round % settings.eval_every == 0
            if due or state.round == settings.rounds:
                row["metrics"]["validation"] = _validate(session, state, clients, settings)
            _quarantine(session, record, name)
            run.append_lines(metrics, [row])
            session.tracking.forward(name, row)
            run.append_lines("timings.jsonl", [{"stage": name, "step": state.round, "seconds": record.seconds}])
            history.append(row)
            if settings.keep_every and state.round % settings.keep_every == 0 and name == "selectors":
                _save_adapters(session, settings, state, f"checkpoints/round-{state.round:06d}")
            if settings.patience and _best(history) is row:
                run.save_state(f"{name}-best", state.round, *_packed_state(state))
            if (
                state.round % settings.save_every == 0
                or state.round == settings.rounds
                or _gave_up(history, settings.patience)
            ):
                run.save_state(name, state.round, *_packed_state(state))
            session.progress(name if trains_selectors else "policy", state.round, settings.rounds, _note(row))
    best = run.load_state(f"{name}-best") if settings.patience else None
    _save_adapters(session, settings, state if best is None else _unpacked_state(best[1], best[2]), name)


def _is_trained(session: Session, settings: FederatedSettings, name: str, metrics: str) -> bool:
    """Whether all rounds are done: perhaps by clients on other machines, of whom those whose data are here are some."""
    found = session.run.load_state(name)
    if found is None:
        return False
    return found[0] >= settings.rounds or _gave_up(session.run.read_lines(metrics), settings.patience)


def _take_what_is_trained(session: Session, settings: FederatedSettings, name: str, metrics: str) -> None:
    """The selectors of the last round, where clients on other machines have trained them: nobody here could go on."""
    found = session.run.load_state(name)
    if found is None:
        raise DataError("data.path: empty; name the files with the comparisons to train on")
    if not _is_trained(session, settings, name, metrics):
        raise DataError(
            f"data.path: empty, and {found[0]} of {settings.rounds} rounds are done; go on with --backend flower --deploy FOLDER"
        )
    best = session.run.load_state(f"{name}-best") if settings.patience else None
    _save_adapters(session, settings, _unpacked_state(*(best or found)[1:]), name)


def _global(settings: FederatedSettings) -> FederatedSettings:
    """FedBis with the rounds of this FedBiscuit."""
    return settings.model_copy(update={"num_adapters": 1, "warmup_rounds": 0, "grouping": "prices", "groups": {}})


def _validate(
    session: Session, state: ServerState, clients: Mapping[ClientId, ClientData], settings: FederatedSettings
) -> dict[str, Any]:
    """What validation comparisons say: read by the experimenter, who holds all the data.

    The loss is the one that training lowers: of a policy that imitates good answers, that of these answers.
    """
    found = _validate_choices(session, state, clients, settings)
    if settings.local.objective != "sft":
        return found
    limit = settings.eval_comparisons or None
    good = [one for _, data in sorted(clients.items()) for one in data.validation[:limit]]
    return found | {"loss": imitation_loss(session, state.adapters[0], good)} if good else found


def _validate_choices(
    session: Session, state: ServerState, clients: Mapping[ClientId, ClientData], settings: FederatedSettings
) -> dict[str, Any]:
    """How the selector of each client's own group agrees with its choices; empty where nobody has two answers."""
    held = held_out(clients, "validation", settings.eval_comparisons)
    if phase_of(state.round - 1, settings) == "federated":  # real clients whose data are here may not have come yet
        held = {client: comparisons for client, comparisons in held.items() if client in state.grouping}
    if not held:
        return {}
    grouping = assign(sorted(held), state.round - 1, state.grouping, settings)
    scores = scores_of(session, state.adapters, held, grouping, keep=True)
    judged = judge_by_group(scores, grouping)
    row = summarize("validation", judged, (session.cfg.seed, "validation", state.round))
    kept = {key: row[key] for key in ("loss", "accuracy", "accuracy_comparisons", "flip_rate", "calibration_error")}
    return kept | {"clients": {client: one.accuracy for client, one in judged.items()}}


def _judged(history: Sequence[Row]) -> list[Row]:
    """The rounds after the warm-up that have a validation loss."""
    evaluated = [row for row in history if row["phase"] == "federated" and "validation" in row["metrics"]]
    return [row for row in evaluated if row["metrics"]["validation"].get("loss") is not None]


def _best(history: Sequence[Row]) -> Row | None:
    """The first round of least validation loss after the warm-up; never by test."""
    return min(_judged(history), key=lambda row: row["metrics"]["validation"]["loss"], default=None)


def _gave_up(history: Sequence[Row], patience: int) -> bool:
    """Whether the validation loss has not become better for ``patience`` evaluations after the warm-up."""
    judged = _judged(history)
    return bool(patience) and len(judged) > patience and _best(history) not in judged[-patience:]


def _row(record: RoundRecord) -> dict[str, Any]:
    """A record as a line of ``metrics.jsonl``: without the clock, so that a resumed run writes the same bytes."""
    return {
        "round": record.round,
        "phase": record.phase,
        "cohort": list(record.cohort),
        "adapter_of": dict(record.adapter_of),
        "regrouped": record.regrouped,
        **({"grouping": dict(record.grouping)} if record.regrouped else {}),
        "metrics": dict(record.metrics)
        | {"delta_norm": {f"u{u}": norm for u, norm in record.metrics["delta_norm"].items()}},
        "refused": dict(record.refused),
        **({"kept_seats": dict(record.kept_seats)} if record.kept_seats else {}),
        **({"away": dict(record.away)} if record.away else {}),
        "bytes_up": record.bytes_up,
        "bytes_down": record.bytes_down,
    }


def _quarantine(session: Session, record: RoundRecord, name: str) -> None:
    """What clients sent that was not let in, as ``quarantine/ROUND/CLIENT.json``: the reason, never the tensors.

    CLIENT is a digest: a name that somebody else chose is no file name.
    """
    folder = "quarantine" if name == "selectors" else f"quarantine/{name}"
    for client, reason in record.quarantined.items():
        digest = hashlib.sha256(client.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        row = {"round": record.round, "client": client, "reason": reason}
        session.run.write_json(f"{folder}/{record.round:06d}/{digest}.json", row)


def _note(row: Mapping[str, Any]) -> str:
    found = row["metrics"].get("validation", {})
    parts = [row["phase"], "new groups" if row["regrouped"] else ""]
    if "accuracy" in found:
        parts.append(f"accuracy {found['accuracy']:.3f}")
    elif "loss" in found:
        parts.append(f"loss {found['loss']:.3f}")
    if row["refused"]:
        parts.append(f"{len(row['refused'])} refused")
    parts.append(f"{human_bytes(row['bytes_down'])} down, {human_bytes(row['bytes_up'])} up")
    return ", ".join(part for part in parts if part)


def _packed_state(state: ServerState) -> tuple[dict[str, Weights], dict[str, Any]]:
    """A server state as named tensors and JSON values."""
    tensors = {f"u{u}": dict(weights) for u, weights in enumerate(state.adapters)}
    tensors["server"] = dict(state.server_optimizer_state)
    values = {
        "round": state.round,
        "num_adapters": len(state.adapters),
        "grouping": dict(state.grouping),
        "consumed": dict(state.consumed),
        "clip_norms": list(state.clip_norms),
    }
    return tensors, values


def _unpacked_state(tensors: Mapping[str, Weights], values: Mapping[str, Any]) -> ServerState:
    return ServerState(
        round=values["round"],
        adapters=tuple(tensors[f"u{u}"] for u in range(values["num_adapters"])),
        grouping=values["grouping"],
        consumed=values["consumed"],
        server_optimizer_state=tensors["server"],
        clip_norms=tuple(values["clip_norms"]),
    )


def _save_adapters(session: Session, settings: FederatedSettings, state: ServerState, folder: str) -> None:
    """The selectors as PEFT folders; of a baseline that trains the policy itself, the policy."""
    lm, config = session.lm, session.lm.adapter_config()
    if settings.local.objective != "choice":
        target = "policy" if folder == "selectors" else f"{folder}/policy"
        card = baseline_card(lm.public_name, settings.local.objective, state.round)
        session.run.save_adapter(target, state.adapters[0], config, card, base=lm.digest)
        return
    letters = session.cfg.data.choice_tokens
    for u, weights in enumerate(state.adapters):
        card = selector_card(lm.public_name, u, len(state.adapters), state.round, session.cfg.data.template, letters)
        if settings.kind == "reward":
            card = reward_card(lm.public_name, u, len(state.adapters), state.round)
        session.run.save_adapter(f"{folder}/u{u}", weights, config, card, base=lm.digest)
    session.run.write_json(f"{folder}/groups.json", {"round": state.round, "adapter_of": state.grouping})
