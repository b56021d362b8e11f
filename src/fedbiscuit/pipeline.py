"""The story, top to bottom: train selectors, let the policy write, label, align, evaluate.

Each stage reads what the stage before left in the run folder and leaves its own there; each can be killed at any moment and
goes on where its last saved state was. The loop that saves, logs, evaluates and stops stands here, in plain sight.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fedbiscuit.backends.client import Desk
from fedbiscuit.backends.inprocess import InProcessBackend
from fedbiscuit.config import Config, FederatedSettings, dump_config, load_config
from fedbiscuit.data.encoding import load_template
from fedbiscuit.data.partition import pooled
from fedbiscuit.data.sources import Dataset, load
from fedbiscuit.evaluation.metrics import calibration, longer_answer, summarize
from fedbiscuit.evaluation.selectors import judge_by_group, judge_by_vote, score_clients
from fedbiscuit.evaluation.winrate import win_rate
from fedbiscuit.federated.algorithm import assign, fedbiscuit_round, init_state
from fedbiscuit.federated.grouping import adjusted_rand_index
from fedbiscuit.models.cards import policy_card, selector_card
from fedbiscuit.models.generation import Sampling, generate
from fedbiscuit.models.labeling import label_completions
from fedbiscuit.models.lm import LM, load_lm
from fedbiscuit.models.policy import Pair, encode_pair, pair_dpo_loss, reference_log_probs
from fedbiscuit.models.selector import Selector, choice_probability, letter_margins, vote
from fedbiscuit.models.training import make_optimizer, stream, train
from fedbiscuit.rundir import RunDir, machine_differences, machine_manifest, run_path
from fedbiscuit.types import ClientData, ClientId, Comparison, ConfigError, DataError, RoundRecord, ServerState, Weights

__all__ = ["Progress", "align", "evaluate", "label", "run_all", "train_selectors"]

log = logging.getLogger("fedbiscuit")

Progress = Callable[[str, int, int, str], None]
"""(stage, step, total, note): step ``step`` of ``total`` of a stage is done; steps count from 1."""


def silent(stage: str, step: int, total: int, note: str) -> None:
    """Show no progress."""


# The commands


def run_all(cfg: Config, resume: bool = False, progress: Progress = silent) -> Path:
    """Everything: train selectors, generate, label, align, evaluate. Returns the run folder."""
    with _open(cfg, resume, progress) as session:
        _train_stage(session)
        if cfg.selectors.local.objective == "choice":
            _label_stage(session)
            _align_stage(session)
        _evaluate_stage(session)
        return session.run.path


def train_selectors(cfg: Config, resume: bool = False, progress: Progress = silent) -> Path:
    """Train the selectors federatedly; leaves ``selectors/u0..`` in the run folder."""
    with _open(cfg, resume, progress) as session:
        _train_stage(session)
        return session.run.path


def label(cfg: Config, resume: bool = True, progress: Progress = silent) -> Path:
    """Let the policy write and the selectors choose; leaves ``completions.jsonl`` and ``preferences.jsonl``."""
    with _open(cfg, resume, progress) as session:
        _label_stage(session)
        return session.run.path


def align(cfg: Config, resume: bool = True, progress: Progress = silent) -> Path:
    """Fine-tune the policy on ``preferences.jsonl`` by DPO; leaves ``policy/``."""
    with _open(cfg, resume, progress) as session:
        _align_stage(session)
        return session.run.path


def evaluate(cfg: Config, resume: bool = True, progress: Progress = silent) -> Path:
    """Selectors against held-out people, aligned against raw policy; leaves ``evaluation.json``."""
    with _open(cfg, resume, progress) as session:
        _evaluate_stage(session)
        return session.run.path


# What all stages share


@dataclass
class Session:
    """One open run: its settings, folder, data and models. Models are loaded when a stage first needs them."""

    cfg: Config
    run: RunDir
    dataset: Dataset
    progress: Progress
    left_out: dict[str, int] = field(default_factory=dict)

    @cached_property
    def lm(self) -> LM:
        """The selectors' LM."""
        return load_lm(self.cfg.model)

    @cached_property
    def policy_lm(self) -> LM:
        """The LM to align: the selectors' own unless the settings name another."""
        other = self.cfg.policy_model
        return self.lm if other is None or other == self.cfg.model else load_lm(other)

    @cached_property
    def selector(self) -> Selector:
        """The LM with the template and letters of the settings."""
        data = self.cfg.data
        return Selector.of(self.lm, load_template(data.template), data.choice_tokens, data.max_tokens)

    @cached_property
    def clients(self) -> dict[ClientId, ClientData]:
        """Every client's comparisons that fit ``max_tokens``; the others are counted in ``left_out``."""
        fitting = {}
        for client, data in self.dataset.clients.items():
            parts = [self._fitting(part) for part in (data.train, data.validation, data.test)]
            fitting[client] = ClientData(*parts)
        if not any(data.train for data in fitting.values()):
            raise DataError(
                f"no client has a comparison that fits data.max_tokens={self.cfg.data.max_tokens}; raise it"
            )
        return fitting

    def _fitting(self, comparisons: Sequence[Comparison]) -> tuple[Comparison, ...]:
        _, too_long = self.selector.encode(comparisons)
        if too_long:
            reason = "comparisons whose two answers do not fit max_tokens"
            self.left_out[reason] = self.left_out.get(reason, 0) + len(too_long)
            log.warning(
                "left out, its answers do not fit data.max_tokens: %s", ", ".join(str(c.id) for c in too_long[:5])
            )
        longer = {id(comparison) for comparison in too_long}
        return tuple(comparison for comparison in comparisons if id(comparison) not in longer)

    def selectors(self, folder: str = "selectors") -> tuple[Weights, ...]:
        """The trained selectors of this run. A missing one is an error: nobody labels with random weights (mistake 10)."""
        num_adapters = _resolved(self.cfg.selectors, self.clients).num_adapters if folder == "selectors" else 1
        return tuple(self.run.load_adapter(f"{folder}/u{u}", base=self.lm.digest) for u in range(num_adapters))


@contextlib.contextmanager
def _open(cfg: Config, resume: bool, progress: Progress) -> Iterator[Session]:
    """Load the data, lock the run folder, check that it belongs to these settings and data, write both down."""
    dataset = load(cfg.data, cfg.seed)
    for warning in dataset.warnings:
        log.warning("%s", warning)
    with RunDir.open(run_path(cfg.runs_dir, cfg.name), resume=resume) as run:
        _check_settings(run, cfg)
        run.check_same("manifest.json", {"data": dataset.digests}, "data files")
        session = Session(cfg, run, dataset, progress, dict(dataset.left_out))
        if run.read_json("manifest.json") is None:
            digests = {"data": dataset.digests, "model": session.lm.digest, "seed": cfg.seed}
            run.write_json("manifest.json", machine_manifest(device=str(session.lm.device)) | digests)
        else:
            run.check_same("manifest.json", {"model": session.lm.digest}, "base model")
            for difference in machine_differences(run.read_json("manifest.json") or {}, machine_manifest()):
                log.warning("%s: %s", run.path, difference)
        run.write_text("config.yaml", dump_config(cfg))
        yield session


def _check_settings(run: RunDir, cfg: Config) -> None:
    """Stop where a run's settings have changed, but for its place and for what no stage has used yet."""
    path = run.path / "config.yaml"
    if not path.exists():
        return
    free = {"name", "runs_dir", "evaluation"}
    if not (run.path / "completions.jsonl").exists():
        free |= {"generation", "labels"}
    if not (run.path / "state" / "policy").exists():
        free |= {"alignment"}
    saved = load_config(path)
    run.check_same("config.yaml", dump_config(cfg.model_copy(update={key: getattr(saved, key) for key in free})), "settings")


# Stage 1: selectors


def _train_stage(session: Session) -> None:
    """The selectors of the settings; with ``compare_global`` also one global selector by the same budget of rounds."""
    _train(session, session.cfg.selectors, "selectors", "metrics.jsonl")
    if session.cfg.evaluation.compare_global and session.cfg.selectors.num_adapters > 1:
        _train(session, _global(session.cfg.selectors), "global", "global_metrics.jsonl")


def _train(session: Session, settings: FederatedSettings, name: str, metrics: str) -> None:
    """Rounds, from the last saved state to the end: run, evaluate when due, log, save, stop early."""
    run, seed = session.run, session.cfg.seed
    clients = {"all": pooled(session.clients)} if settings.population == "centralized" else session.clients
    settings = _resolved(settings, clients)
    desk = Desk(
        session.selector,
        seed,
        settings.lora_aggregation == "freeze_a",
        session.cfg.generation.chat,
        session.cfg.generation.system,
        session.cfg.evaluation.batch_size,
    )
    backend = InProcessBackend(desk, clients)
    found = run.load_state(name)
    state = init_state([session.lm.new_adapter(seed, "adapter", u) for u in range(settings.num_adapters)])
    if found is not None:
        state = _unpacked_state(found[1], found[2])
    run.keep_lines(metrics, state.round)
    history = run.read_lines(metrics)
    while state.round < settings.rounds and not _gave_up(history, settings.patience):
        state, record = fedbiscuit_round(state, backend, settings, seed)
        row = _row(record)
        if settings.eval_every and (state.round % settings.eval_every == 0 or state.round == settings.rounds):
            row["metrics"]["validation"] = _validate(session, state, clients, settings)
        run.append_lines(metrics, [row])
        run.append_lines("timings.jsonl", [{"stage": name, "step": state.round, "seconds": record.seconds}])
        history.append(row)
        if settings.keep_every and state.round % settings.keep_every == 0:
            _save_adapters(session, settings, state, f"checkpoints/round-{state.round:06d}")
        if (
            state.round % settings.save_every == 0
            or state.round == settings.rounds
            or _gave_up(history, settings.patience)
        ):
            run.save_state(name, state.round, *_packed_state(state))
        session.progress(name, state.round, settings.rounds, _note(row))
    _save_adapters(session, settings, state, name)


def _resolved(settings: FederatedSettings, clients: Mapping[ClientId, ClientData]) -> FederatedSettings:
    """The baselines, as the settings that they are: centralized is one pooled client, local only an adapter for each."""
    holders = sorted(client for client, data in clients.items() if data.train)
    if settings.population == "centralized":
        return settings.model_copy(update={"num_adapters": 1, "cohort_size": 1, "warmup_rounds": 0})
    if settings.population == "local":
        groups = {client: u for u, client in enumerate(holders)}
        update = {
            "num_adapters": len(holders),
            "warmup_rounds": 0,
            "grouping": "fixed",
            "groups": groups,
            "scale": "cohort",
        }
        return settings.model_copy(update=update)
    if settings.cohort_size > len(holders):
        raise ConfigError(
            f"selectors.cohort_size: {settings.cohort_size}, but only {len(holders)} clients have comparisons to train on; "
            f"use at most {len(holders)}, or 0 for all"
        )
    if settings.num_adapters > len(holders):
        raise ConfigError(
            f"selectors.num_adapters: {settings.num_adapters} for {len(holders)} clients; use at most one each"
        )
    return settings


def _global(settings: FederatedSettings) -> FederatedSettings:
    """FedBis with the rounds of this FedBiscuit."""
    return settings.model_copy(update={"num_adapters": 1, "warmup_rounds": 0, "grouping": "prices", "groups": {}})


def _validate(
    session: Session, state: ServerState, clients: Mapping[ClientId, ClientData], settings: FederatedSettings
) -> dict[str, Any]:
    """Validation metrics with the selector of each client's own group: read by the experimenter, who holds all the data."""
    limit = settings.eval_comparisons or None
    held = {client: data.validation[:limit] for client, data in clients.items() if data.validation}
    if settings.local.objective != "choice" or not held:
        return {}
    grouping = assign(sorted(held), state.round - 1, state.grouping, settings)
    scores = score_clients(session.selector, state.adapters, held, grouping, session.cfg.evaluation.batch_size)
    judged = judge_by_group(scores, grouping)
    row = summarize("validation", judged, (session.cfg.seed, "validation", state.round))
    kept = {key: row[key] for key in ("loss", "accuracy", "accuracy_comparisons", "flip_rate", "calibration_error")}
    return kept | {"clients": {client: one.accuracy for client, one in judged.items()}}


def _gave_up(history: Sequence[Mapping[str, Any]], patience: int) -> bool:
    """Whether the validation loss has not become better for ``patience`` evaluations."""
    losses = [row["metrics"]["validation"].get("loss") for row in history if "validation" in row["metrics"]]
    known = [loss for loss in losses if loss is not None]
    return bool(patience) and len(known) > patience and min(known[-patience:]) >= min(known[:-patience])


def _row(record: RoundRecord) -> dict[str, Any]:
    """A record as a line of ``metrics.jsonl``: without the clock, so that a resumed run writes the same bytes."""
    return {
        "round": record.round,
        "phase": record.phase,
        "cohort": list(record.cohort),
        "adapter_of": dict(record.adapter_of),
        "regrouped": record.regrouped,
        **({"grouping": dict(record.grouping)} if record.regrouped else {}),
        "metrics": dict(record.metrics) | {"delta_norm": {f"u{u}": norm for u, norm in record.metrics["delta_norm"].items()}},
        "refused": dict(record.refused),
        "bytes_up": record.bytes_up,
        "bytes_down": record.bytes_down,
    }


def _note(row: Mapping[str, Any]) -> str:
    found = row["metrics"].get("validation", {})
    parts = [row["phase"], "new groups" if row["regrouped"] else ""]
    if found:
        parts.append(f"accuracy {found['accuracy']:.3f}")
    if row["refused"]:
        parts.append(f"{len(row['refused'])} refused")
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
    lm, config = session.lm, session.lm.adapter_config()
    for u, weights in enumerate(state.adapters):
        letters = session.cfg.data.choice_tokens
        card = selector_card(lm.name, u, len(state.adapters), state.round, session.cfg.data.template, letters)
        session.run.save_adapter(f"{folder}/u{u}", weights, config, card, base=lm.digest)
    if settings.local.objective != "choice":
        session.run.save_adapter(
            "policy", state.adapters[0], config, policy_card(lm.name, state.round, 0), base=lm.digest
        )


# Stage 2: the policy writes, the selectors choose


def _label_stage(session: Session) -> None:
    """``completions.jsonl``, batch by batch, then ``preferences.jsonl``, whole."""
    run, cfg = session.run, session.cfg
    adapters = session.selectors()
    prompts = session.dataset.prompts[: cfg.generation.num_prompts or None]
    if not prompts:
        raise DataError("data.prompts: there are no prompts to align the policy on; name a file with some")
    _write_completions(session, prompts)
    if run.read_json("labels.json") is not None:
        return
    written = run.read_lines("completions.jsonl")
    started = time.monotonic()

    def progress(done: int) -> None:
        session.progress("labels", done, len(adapters), "")

    rows, left_out = label_completions(session.selector, adapters, written, cfg.labels, progress)
    if not rows:
        raise DataError(
            f"no pair of completions could be labeled ({left_out}); raise generation.temperature or prompts"
        )
    run.write_text("preferences.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    run.append_lines("timings.jsonl", [{"stage": "labels", "step": len(rows), "seconds": time.monotonic() - started}])
    run.write_json("labels.json", {"pairs": len(rows), "left_out": left_out})


def _write_completions(session: Session, prompts: Sequence[str]) -> None:
    """The raw policy's completions; a batch that a kill interrupted is written again as a whole."""
    run, how, lm = session.run, session.cfg.generation, session.policy_lm
    have = run.read_lines("completions.jsonl")
    whole = len(have) if len(have) >= len(prompts) else len(have) // how.batch_size * how.batch_size
    run.keep_lines("completions.jsonl", whole)
    for start in range(whole, len(prompts), how.batch_size):
        started = time.monotonic()
        batch = prompts[start : start + how.batch_size]
        rows = _completions(session, lm, batch, how.num_completions, "completions")
        run.append_lines("completions.jsonl", rows)
        done = start + len(batch)
        seconds = time.monotonic() - started
        run.append_lines("timings.jsonl", [{"stage": "generation", "step": done, "seconds": seconds}])
        session.progress("generation", done, len(prompts), f"{how.num_completions} completions a prompt")


def _completions(
    session: Session, lm: LM, prompts: Sequence[str], num_completions: int, purpose: str, greedy: bool = False
) -> list[dict[str, Any]]:
    """Rows of ``completions.jsonl`` by the base model alone."""
    with lm.adapter_off():
        return _written(session, lm, prompts, num_completions, purpose, greedy)


def _written(
    session: Session, lm: LM, prompts: Sequence[str], num_completions: int, purpose: str, greedy: bool
) -> list[dict[str, Any]]:
    how = session.cfg.generation
    sampling = Sampling(how.max_new_tokens, 0.0 if greedy else how.temperature, how.top_p)
    ids = [lm.chat_prompt(prompt, how.system, how.chat) for prompt in prompts]
    written = generate(lm, ids, num_completions, sampling, (session.cfg.seed, purpose))
    return [
        {
            "prompt": prompt,
            "completions": [{"text": c.text, "tokens": len(c.tokens), "finished": c.finished} for c in completions],
        }
        for prompt, completions in zip(prompts, written, strict=True)
    ]


# Stage 3: DPO


def _align_stage(session: Session) -> None:
    """DPO on the labels, from the last saved step; the reference's log-probabilities are computed once and kept."""
    run, cfg, lm = session.run, session.cfg, session.policy_lm
    rows = run.read_lines("preferences.jsonl")
    if not rows:
        raise ConfigError(f"{run.path}: no preferences.jsonl to align on; run `fedbiscuit label {run.path}` first")
    how, settings, seed = cfg.alignment.as_local(), cfg.alignment, cfg.seed
    prompts = {
        prompt: lm.chat_prompt(prompt, cfg.generation.system, cfg.generation.chat)
        for prompt in {r["prompt"] for r in rows}
    }
    pairs = [
        encode_pair(
            lm,
            prompts[row["prompt"]],
            row["chosen"],
            row["rejected"],
            row["probability"],
            (row["chosen_finished"], row["rejected_finished"]),
        )
        for row in rows
    ]
    found = run.load_state("policy")
    lm.put_adapter(found[1]["policy"] if found else lm.new_adapter(seed, "policy"))
    optimizer = make_optimizer(list(lm.trainable().values()), how)
    first_step = 0
    if found:
        first_step = found[0]
        reference = found[1]["reference"]["log_probs"]
        _restore_optimizer(optimizer, found[1]["optimizer"])
    else:
        session.progress("reference", 1, 1, f"{len(pairs)} pairs")
        reference = reference_log_probs(lm, pairs, settings.batch_size)
    run.keep_lines("alignment.jsonl", first_step)
    per_step = how.batch_size * how.grad_accum

    def batches(step: int) -> list[list[int]]:
        taken = stream(range(len(pairs)), step * per_step, per_step, (seed, "dpo order"))
        return [taken[i : i + how.batch_size] for i in range(0, per_step, how.batch_size)]

    def loss(batch: Sequence[int]) -> tuple[torch.Tensor, dict[str, float]]:
        chosen: list[Pair] = [pairs[i] for i in batch]
        return pair_dpo_loss(lm, chosen, reference[list(batch)], settings.beta, settings.soft_labels)

    def save(step: int) -> None:
        tensors = {
            "policy": lm.adapter(),
            "optimizer": _optimizer_tensors(optimizer),
            "reference": {"log_probs": reference},
        }
        run.save_state("policy", step, tensors, {})

    started = time.monotonic()
    for step, report in enumerate(
        train(lm, batches, loss, how, (seed, "dpo dropout"), optimizer, first_step), first_step + 1
    ):
        run.append_lines("alignment.jsonl", [{"step": step, **report}])
        if settings.keep_every and step % settings.keep_every == 0:
            _save_policy(session, f"checkpoints/step-{step:06d}/policy", step, len(rows))
        if step % settings.save_every == 0 or step == how.steps:
            save(step)
            seconds = time.monotonic() - started
            run.append_lines("timings.jsonl", [{"stage": "alignment", "step": step, "seconds": seconds}])
            started = time.monotonic()
        session.progress("alignment", step, how.steps, f"loss {report['loss']:.3f}, margin {report['margin']:+.3f}")
    _save_policy(session, "policy", how.steps, len(rows))


def _save_policy(session: Session, folder: str, step: int, num_pairs: int) -> None:
    lm = session.policy_lm
    session.run.save_adapter(
        folder, lm.adapter(), lm.adapter_config(), policy_card(lm.name, step, num_pairs), base=lm.digest
    )


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> Weights:
    """The optimizer's state as flat named tensors."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": torch.as_tensor(value) for i, entry in state.items() for name, value in entry.items()}


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Weights) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


# Stage 4: evaluation


def _evaluate_stage(session: Session) -> None:
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
    """Test comparisons of every client: its group's selector, the vote, the global one, the longer answer, chance."""
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
        rows.append(summarize("vote of all selectors", judge_by_vote(scores, cfg.labels.vote), key, resamples))
    if (run.path / "global").is_dir():
        everyone = dict.fromkeys(test, 0)
        judged = judge_by_group(
            score_clients(session.selector, session.selectors("global"), test, everyone, batch_size), everyone
        )
        rows.append(summarize("one global selector", judged, key, resamples))
    longer = {client: longer_answer(held) for client, held in test.items()}
    rows.append(summarize("the longer answer", longer, key, resamples))
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
        "adjusted_rand_index": adjusted_rand_index(grouping, truth) if truth and not single else None,
        "left_out": session.left_out,
    }


def _final_grouping(session: Session) -> dict[ClientId, int]:
    """The groups as they were at the last round; everybody in group 0 where there is one selector."""
    clients = session.clients
    if session.cfg.selectors.population == "centralized" or _resolved(session.cfg.selectors, clients).num_adapters == 1:
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
            ("raw", _completions(session, lm, batch, 1, "held-out", greedy)),
            ("aligned", _written(session, lm, batch, 1, "held-out", greedy)),
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
