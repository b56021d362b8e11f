"""What all stages of a run share: settings, folder, data, models, and the checks that they belong together."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from fedbiscuit.backends.client import Desk, policy_pair
from fedbiscuit.config import Config, FederatedSettings, ModelSettings, dump_config, load_config
from fedbiscuit.data.encoding import load_template
from fedbiscuit.data.partition import named_groups, set_apart
from fedbiscuit.data.sources import Dataset, load
from fedbiscuit.models.base import check_quantize
from fedbiscuit.models.lm import LM, load_lm
from fedbiscuit.models.selector import Selector
from fedbiscuit.rundir import RunDir, machine_differences, machine_manifest, run_path
from fedbiscuit.tracking import Tracking, check_installed, open_tracking
from fedbiscuit.types import Backend, ClientData, ClientId, Comparison, ConfigError, DataError, Weights

__all__ = ["Connect", "Progress", "Session", "open_run", "open_session", "resolved", "silent"]

log = logging.getLogger("fedbiscuit")

Progress = Callable[[str, int, int, str], None]
"""(stage, step, total, note): step ``step`` of ``total`` of a stage is done; steps count from 1."""


Connect = Callable[["Session", FederatedSettings, str], Backend]
"""Clients on other machines, who are to train the adapters of this name (``selectors`` or ``global``) by these settings."""


def silent(stage: str, step: int, total: int, note: str) -> None:
    """Show no progress."""


@dataclass
class Session:
    """One open run: its settings, folder, data and models. Models are loaded when a stage first needs them."""

    cfg: Config
    run: RunDir
    dataset: Dataset
    progress: Progress
    left_out: dict[str, int] = field(default_factory=dict)
    shortened: int = 0
    too_long: list[str] = field(default_factory=list)
    devices: int = 1
    models: dict[tuple[ModelSettings, bool], LM] = field(default_factory=dict)
    tracking: Tracking = field(default_factory=Tracking)
    connect: Connect | None = None
    """How clients on other machines are reached; None: all data is here."""
    for_once: tuple[str, ...] = ()
    """Settings of ``evaluation`` that this command has for itself alone."""

    def lm_of(self, settings: ModelSettings, scores: bool = False) -> LM:
        """The LM of these settings, loaded once; ``scores``: with a head for a reward model."""
        if (settings, scores) not in self.models:
            self.progress("loading", 0, 1, settings.base)
            self.models[settings, scores] = load_lm(settings, scores)
            self.progress("loading", 1, 1, settings.base)
        return self.models[settings, scores]

    @property
    def lm(self) -> LM:
        """The selectors' LM."""
        return self.lm_of(self.cfg.model, self.cfg.selectors.kind == "reward")

    @property
    def policy_lm(self) -> LM:
        """The LM to align: the selectors' own unless the settings name another."""
        return self.lm_of(self.cfg.policy_model or self.cfg.model)

    @cached_property
    def selector(self) -> Selector:
        """The LM with the template and letters of the settings."""
        data = self.cfg.data
        return Selector.of(
            self.lm,
            load_template(data.template),
            data.choice_tokens,
            data.max_tokens,
            round(self.cfg.model.trunk_gigabytes * 1e9),
            self.cfg.selectors.kind,
        )

    @cached_property
    def desk(self) -> Desk:
        """What clients work with here."""
        cfg = self.cfg
        return Desk(
            self.selector,
            cfg.seed,
            cfg.selectors.lora_aggregation == "freeze_a",
            cfg.generation.chat,
            cfg.generation.system,
            cfg.evaluation.batch_size,
            cfg.selectors.grouping_comparisons,
            cfg.selectors.comm_dtype,
        )

    @cached_property
    def clients(self) -> dict[ClientId, ClientData]:
        """Those that take part in the rounds."""
        return {client: data for client, data in self._everyone.items() if client not in self._set_apart}

    @cached_property
    def new_clients(self) -> dict[ClientId, ClientData]:
        """Those that take part in no round, for the evaluation (``data.partition.new_clients``)."""
        return {client: data for client, data in self._everyone.items() if client in self._set_apart}

    @cached_property
    def _set_apart(self) -> set[ClientId]:
        return set_apart(self._everyone, self.cfg.data.partition.new_clients, self.cfg.seed)

    @cached_property
    def _everyone(self) -> dict[ClientId, ClientData]:
        """The comparisons that fit ``max_tokens``, of every client that has some to train on; the rest is in ``left_out``."""
        fitting: dict[ClientId, ClientData] = {}
        if not self.dataset.clients:  # they are on other machines, or another run's selectors label
            return fitting
        for client, data in self.dataset.clients.items():
            parts = [self._fitting(part) for part in (self._short(data.train), data.validation, data.test)]
            fitting[client] = ClientData(*parts)
        if self.too_long:
            self.left_out["comparisons whose two answers do not fit max_tokens"] = len(self.too_long)
            first = ", ".join(self.too_long[:5]) + (", ..." if len(self.too_long) > 5 else "")
            told = f"data.max_tokens={self.cfg.data.max_tokens}: {len(self.too_long)} ({first})"
            log.warning("comparisons left out because their two answers do not fit %s", told)
        if self.shortened:
            total = sum(len(d.train) + len(d.validation) + len(d.test) for d in fitting.values())
            share = f"{self.shortened} of {total} comparisons ({self.shortened / total:.0%})"
            log.warning(
                "%s have a prompt that was shortened to fit data.max_tokens=%d", share, self.cfg.data.max_tokens
            )
        if not any(data.train for data in fitting.values()):
            raise DataError(
                f"no client has a comparison that fits data.max_tokens={self.cfg.data.max_tokens}; raise it"
            )
        idle = sorted(client for client, data in fitting.items() if not data.train)
        if idle:
            log.warning("clients without a comparison to train on take no part: %s", ", ".join(idle[:5]))
            self.left_out["clients without a comparison to train on"] = len(idle)
        return {client: data for client, data in fitting.items() if data.train}

    @cached_property
    def prompts(self) -> tuple[str, ...]:
        """What the policy answers to be trained on."""
        return self.answerable(self.dataset.prompts)

    @cached_property
    def held_out_prompts(self) -> tuple[str, ...]:
        """What it answers to be evaluated on. A baseline that trains the policy on people's own prompts gets the others."""
        prompts = self.answerable(self.dataset.held_out_prompts)
        if self.cfg.selectors.local.objective == "choice":
            return prompts
        trained = {comparison.prompt for data in self.clients.values() for comparison in data.train}
        return tuple(prompt for prompt in prompts if prompt not in trained)

    def lacks(self, names: Sequence[str]) -> bool:
        """Whether there are prompts that the policy answers without these fields, such as a title."""
        prompts, fields = (*self.dataset.prompts, *self.dataset.held_out_prompts), self.dataset.fields
        held = [fields.get(prompt, {}) for prompt in prompts] or [{}]
        return any(name not in one for name in names for one in held)

    def answerable(self, prompts: Sequence[str]) -> tuple[str, ...]:
        """Those that leave the policy room for an answer; the others are counted in ``left_out``."""
        lm, how = self.policy_lm, self.cfg.generation
        room = None if lm.context is None else lm.context - how.max_new_tokens
        fitting = tuple(p for p in prompts if room is None or len(lm.chat_prompt(p, how.system, how.chat)) <= room)
        if len(fitting) < len(prompts):
            reason = "prompts that leave the policy no room for an answer"
            self.left_out[reason] = self.left_out.get(reason, 0) + len(prompts) - len(fitting)
            log.warning(
                "left out: %s: %d (%s reads %s tokens)", reason, len(prompts) - len(fitting), lm.name, lm.context
            )
        return fitting

    def settle(self) -> None:
        """Write the settings down: at a stage's start, when all that it needs is there, so that it can go on; else at its end.

        Those of ``for_once`` stay as they were.
        """
        cfg, path = self.cfg, self.run.path / "config.yaml"
        if self.for_once and path.exists():
            before = load_config(path).evaluation
            kept = {key: getattr(before, key) for key in self.for_once}
            cfg = cfg.model_copy(update={"evaluation": cfg.evaluation.model_copy(update=kept)})
        self.run.write_text("config.yaml", dump_config(cfg))

    def note_left_out(self) -> None:
        """``left_out.json``: how much of the data is not used, by reason."""
        clients = self.clients
        held = {
            "clients": len(clients),
            "new_clients": len(self.new_clients),
            "comparisons": {
                part: sum(len(getattr(data, part)) for data in clients.values())
                for part in ("train", "validation", "test")
            },
            "shortened_prompts": self.shortened,
            "left_out": self.left_out,
        }
        self.run.write_json("left_out.json", held)

    def _short(self, comparisons: Sequence[Comparison]) -> Sequence[Comparison]:
        """Training comparisons of at most ``data.max_train_tokens`` tokens, without the template; the others are counted."""
        limit = self.cfg.data.max_train_tokens
        if not limit:
            return comparisons
        texts = [(c, (c.prompt, c.output_a, c.output_b)) for c in comparisons]
        short = [c for c, three in texts if sum(len(self.lm.encode(text)) for text in three) <= limit]
        if len(short) < len(comparisons):
            reason = "training comparisons longer than max_train_tokens"
            self.left_out[reason] = self.left_out.get(reason, 0) + len(comparisons) - len(short)
        return short

    def _fitting(self, comparisons: Sequence[Comparison]) -> tuple[Comparison, ...]:
        encoded, too_long = self.selector.encode(comparisons)
        self.too_long += [str(comparison.id) for comparison in too_long]
        longer = {id(comparison) for comparison in too_long}
        fitting = tuple(comparison for comparison in comparisons if id(comparison) not in longer)
        if self.cfg.selectors.local.objective == "choice":
            self.shortened += sum(item.cut > 0 for item in encoded)
        else:
            self.shortened += sum(map(self._is_shortened, fitting))
        return fitting

    def _is_shortened(self, one: Comparison) -> bool:
        """Whether clients who train the policy read a part of the prompt only."""
        whole = self.lm.chat_prompt(one.prompt, self.desk.system, self.desk.chat)
        return len(policy_pair(one.prompt, one.output_a, one.output_b, self.desk).prompt) < len(whole)

    @property
    def trains(self) -> bool:
        """Whether this run trains selectors: not where it trains a policy, or takes the selectors of another run."""
        return self.cfg.selectors.local.objective == "choice" and not self.cfg.labels.selectors

    @property
    def num_adapters(self) -> int:
        """How many are trained: with ``population: local`` one for each client."""
        chosen = self.cfg.selectors
        if chosen.population == "local":
            return sum(bool(data.train) for data in self.clients.values())
        return chosen.num_adapters

    def selectors(self, folder: str = "selectors") -> tuple[Weights, ...]:
        """The trained selectors of this run. A missing one is an error: nobody labels with random weights (mistake 10)."""
        num_adapters = 1 if folder == "global" else self.num_adapters
        return tuple(self.run.load_adapter(f"{folder}/u{u}", base=self.lm.digest) for u in range(num_adapters))


@contextlib.contextmanager
def open_session(
    cfg: Config,
    resume: bool,
    progress: Progress,
    devices: int = 1,
    connect: Connect | None = None,
) -> Iterator[Session]:
    """Load the data, lock the run folder, check that it belongs to these settings and data, write both down.

    ``devices``: over how many of this machine the work of training is spread. ``connect``: to clients on other machines.
    """
    check_installed(cfg.trackers)
    for settings in (cfg.model, cfg.policy_model or cfg.model):
        check_quantize(settings)
    dataset = load(cfg.data, cfg.seed)
    if cfg.labels.selectors and dataset.no_others:  # trained selectors should see prompts that are new to them
        raise DataError(dataset.no_others)
    for warning in dataset.warnings:
        log.warning("%s", warning)
    _check_objective(cfg, dataset)
    with RunDir.open(run_path(cfg.runs_dir, cfg.name), resume=resume) as run:
        _check_settings(run, cfg)
        run.check_same("manifest.json", {"data": dataset.digests}, "data files")
        session = Session(cfg, run, dataset, progress, dict(dataset.left_out), devices=devices, connect=connect)
        if run.read_json("manifest.json") is None:
            kept = {
                "data": dataset.digests,
                "model": session.lm.digest,
                "seed": cfg.seed,
                "real_clients": connect is not None,
            }
            run.write_json("manifest.json", machine_manifest(device=str(session.lm.device)) | kept)
        else:
            run.check_same("manifest.json", {"model": session.lm.digest}, "base model")
            now = machine_manifest(device=str(session.lm.device))
            for difference in machine_differences(run.read_json("manifest.json") or {}, now):
                log.warning("%s: %s", run.path, difference)
        if not (run.path / "config.yaml").exists():
            session.settle()
        with open_tracking(cfg.trackers, run, cfg.name) as session.tracking:
            yield session
        session.settle()


def _check_objective(cfg: Config, dataset: Dataset) -> None:
    """Single good answers can be imitated; there is nothing to choose from or to prefer them to."""
    objective = cfg.selectors.local.objective
    held = (comparison for data in dataset.clients.values() for comparison in data.train)
    if objective != "sft" and any(comparison.output_b == "" for comparison in held):
        raise ConfigError(
            f"selectors.local.objective: {objective} needs two answers to a prompt, and this data has single good answers; "
            "set it to sft, or take data with comparisons"
        )


def open_run(cfg: Config, progress: Progress, devices: int = 1) -> contextlib.AbstractContextManager[Session]:
    """A run that is trained, to go on in it with a later stage; seen before a model is loaded."""
    path = run_path(cfg.runs_dir, cfg.name)
    if not (path / "config.yaml").exists():
        train = "train its selectors first: `fedbiscuit train CONFIG`, or " if cfg.selectors.rounds else ""
        raise ConfigError(
            f"{path}: there is no run here; {train}name the run whose selectors label by adding `--selector runs/OTHER`, as to "
            "`fedbiscuit align CONFIG`"
        )
    other = load_config(path / "config.yaml").labels.selectors
    if other and not cfg.labels.selectors:
        raise ConfigError(
            f"{path}: the selectors of {other} label in this run; add `--selector {other}`, or name {path}"
        )
    trained = "selectors" if cfg.selectors.local.objective == "choice" else "policy"
    if not cfg.labels.selectors and not (path / trained).is_dir():
        done = len(RunDir.view(path).read_lines("metrics.jsonl"))
        raise ConfigError(
            f"{path}: not trained yet, {done} of {cfg.selectors.rounds} rounds are done; run `fedbiscuit train {path}` first, "
            "which goes on from there"
        )
    return open_session(cfg, True, progress, devices)


def _check_settings(run: RunDir, cfg: Config) -> None:
    """Stop where a run's settings have changed, but for its place and for what no stage has used yet."""
    path = run.path / "config.yaml"
    if not path.exists():
        return
    free = {"name", "runs_dir", "evaluation", "judge", "trackers"}
    if not (run.path / "completions.jsonl").exists():
        free |= {"generation", "labels"}
    if not (run.path / "state" / "policy").exists():
        free |= {"alignment"}
    saved = load_config(path)
    if "labels" in free and cfg.selectors.rounds > saved.selectors.rounds:  # more of the same rounds
        saved = saved.model_copy(
            update={"selectors": saved.selectors.model_copy(update={"rounds": cfg.selectors.rounds})}
        )
    run.write_text("config.yaml", dump_config(saved))  # settings that are newer than the run have their defaults in it
    run.check_same(
        "config.yaml", dump_config(cfg.model_copy(update={key: getattr(saved, key) for key in free})), "settings"
    )


def resolved(
    settings: FederatedSettings, holders: Sequence[ClientId] | None, clients: Mapping[ClientId, ClientData]
) -> FederatedSettings:
    """The baselines, as the settings that they are: centralized is one pooled client, local only an adapter for each.

    holders: who can be asked; None: they come and go. clients: the data that is here, for groups that the data names.
    """
    if settings.population == "centralized":
        return settings.model_copy(update={"num_adapters": 1, "cohort_size": 1, "warmup_rounds": 0, "min_replies": 1})
    if settings.population == "local" and holders is not None:
        groups = {client: u for u, client in enumerate(holders)}
        update = {
            "num_adapters": len(holders),
            "warmup_rounds": 0,
            "grouping": "fixed",
            "groups": groups,
            "scale": "cohort",
        }
        settings = settings.model_copy(update=update)
    if settings.grouping == "fixed" and settings.num_adapters > 1 and not settings.groups:
        settings = settings.model_copy(update={"groups": _groups_in_data(settings, clients)})
    if holders is not None:
        _check_sizes(settings, holders)
    return settings


def _check_sizes(settings: FederatedSettings, holders: Sequence[ClientId]) -> None:
    for key, size in (("cohort_size", settings.cohort_size), ("warmup_cohort_size", settings.warmup_cohort_size)):
        if size > len(holders):
            raise ConfigError(
                f"selectors.{key}: {size}, but only {len(holders)} clients have comparisons to train on; "
                f"use at most {len(holders)}, or 0 for all"
            )
    if settings.num_adapters > len(holders):
        raise ConfigError(
            f"selectors.num_adapters: {settings.num_adapters} for {len(holders)} clients; use at most one each"
        )
    if settings.grouping_cohort > len(holders):
        raise ConfigError(
            f"selectors.grouping_cohort: {settings.grouping_cohort}, but only {len(holders)} clients take part; use 0 for all"
        )
    if settings.grouping == "fixed" and settings.num_adapters > 1 and settings.groups.keys() != set(holders):
        odd = sorted(settings.groups.keys() ^ set(holders))
        raise ConfigError(f"selectors.groups: must name each client once; {len(odd)} differ, such as {odd[:3]}")


def _groups_in_data(settings: FederatedSettings, clients: Mapping[ClientId, ClientData]) -> dict[ClientId, int]:
    """Groups for an experiment that is told them."""
    groups = named_groups(clients)
    if groups is None:
        raise ConfigError(
            "selectors.groups: empty, and the data does not name one group (meta.group) for each client; "
            "give groups, such as {ann: 0, bo: 1}, or let grouping find them"
        )
    count = len(set(groups.values()))
    if count != settings.num_adapters:
        raise ConfigError(
            f"selectors.num_adapters: {settings.num_adapters}, but the data names {count} groups; set it to {count}"
        )
    return groups
