"""A run at a site: from the terms that the server sends to what the site's worker works with, its own data and model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedbiscuit.backends.inprocess import InProcessBackend
from fedbiscuit.backends.worker import TakingPart, told_outside
from fedbiscuit.config import Config, FederatedSettings, ModelSettings, dump_config, parse_config
from fedbiscuit.data.encoding import TEMPLATES
from fedbiscuit.data.sources import load
from fedbiscuit.evaluation.selectors import judge_by_group
from fedbiscuit.federated.algorithm import num_warmup_rounds
from fedbiscuit.federated.coding import decoded
from fedbiscuit.models.lm import LM
from fedbiscuit.pipeline.scoring import scores_of
from fedbiscuit.pipeline.session import Session, silent
from fedbiscuit.rundir import RunDir
from fedbiscuit.types import ClientId, ConfigError, FederationError, Weights

__all__ = ["Site", "asked_as", "terms_of"]

NOT_FOR_SITES = ("judge", "labels", "alignment", "trackers", "policy_model", "runs_dir")
"""What a site needs not know of a run."""


def terms_of(cfg: Config, model: str) -> str:
    """What a site must know of a run to train for it: its settings without places and the server's own affairs, and the digest
    of the base model.
    """
    if cfg.data.template not in TEMPLATES:
        raise ConfigError(
            f"data.template: {cfg.data.template} is a file of this machine; real clients have {', '.join(sorted(TEMPLATES))}"
        )
    if cfg.data.partition.by != "annotator" or cfg.data.partition.num_clients or cfg.data.partition.new_clients:
        raise ConfigError(
            "data.partition: clients on other machines are who they are; leave `by`, counts and shares out"
        )
    if cfg.selectors.population != "federated":
        raise ConfigError(
            f"selectors.population: {cfg.selectors.population} needs all data in one place; use federated"
        )
    plain = Config()
    data = cfg.data.model_copy(update={"source": "jsonl", "path": (), "prompts": "", "demo": plain.data.demo})
    evaluation = plain.evaluation.model_copy(update={"batch_size": cfg.evaluation.batch_size})
    update: dict[str, Any] = {key: getattr(plain, key) for key in NOT_FOR_SITES}
    kept = cfg.model_copy(update={**update, "data": data, "evaluation": evaluation})
    return json.dumps({"config": dump_config(kept), "model": model}, sort_keys=True)


def asked_as(session: Session, settings: FederatedSettings, name: str) -> tuple[str, str]:
    """The name of the run and the terms with which sites are asked to train the adapters ``name`` by these settings.

    The one selector for all that is trained beside the groups has a name of its own, RUN/global: what a site writes down of it is
    nothing of the groups.
    """
    cfg = session.cfg.model_copy(update={"selectors": settings})
    return cfg.name if name == "selectors" else f"{cfg.name}/{name}", terms_of(cfg, session.lm.digest)


@dataclass
class Site:
    """What a site gives to every run: files of comparisons, device and threads, folders of models by the server's names.

    held_out: on how many comparisons that no training reads selectors are judged for ``learned.jsonl``, for each client.
    """

    data: tuple[str, ...]
    device: str = "auto"
    threads: int = 0
    models: dict[str, str] = field(default_factory=dict)
    held_out: int = 0
    _loaded: dict[tuple[ModelSettings, bool], LM] = field(default_factory=dict)

    def open_run(self, terms: str) -> TakingPart:
        """The clients and the LM of a run. ``FederationError`` tells the server why this site cannot take part; other errors
        are for the site's own eyes.
        """
        try:
            found = json.loads(terms)
            text, digest = found["config"], found["model"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise FederationError("the terms of this run cannot be read; do both sides run the same version?") from None
        try:
            cfg = parse_config(text, (), "the server's settings")
        except ConfigError as error:
            raise FederationError(f"{error}; do both sides run the same version?") from None
        if cfg.data.template not in TEMPLATES:
            raise FederationError(f"data.template: {cfg.data.template!r:.80} is none that this site has")
        named = cfg.model.base
        base = self.models.get(named, named)
        model = cfg.model.model_copy(update={"base": base, "device": self.device, "threads": self.threads})
        data = cfg.data.model_copy(update={"source": "jsonl", "path": self.data, "prompts": ""})
        cfg = cfg.model_copy(update={"model": model, "data": data})
        if (model, cfg.selectors.kind == "reward") not in self._loaded:
            self._loaded.clear()  # one base model at a time
        session = Session(cfg, RunDir(Path(), None), load(cfg.data, cfg.seed), silent, models=self._loaded)
        if session.lm.digest != digest:
            raise FederationError(
                f"the base model {named} here is another one than the server's ({session.lm.digest[:16]}, not {digest[:16]}); "
                "get the same files, or name their folder in site.yaml (models)"
            )
        held = {client: len(one.train) for client, one in session.clients.items()}
        backend = InProcessBackend(session.desk, session.clients, told_outside)
        return TakingPart(backend, held, session.lm.digest, _looking(session, self.held_out) if self.held_out else None)


def _looking(session: Session, limit: int) -> Callable[[ClientId, Weights], Mapping[str, float]]:
    """How a selector, as it came, agrees with at most ``limit`` comparisons of a client, test first, then validation."""
    held = {client: (*one.test, *one.validation) for client, one in session.clients.items()}
    held = {client: tuple(c for c in found if c.output_b)[:limit] for client, found in held.items()}

    def look(client: ClientId, adapter: Weights) -> Mapping[str, float]:
        if not held[client]:
            return {}
        weights = decoded(adapter, session.cfg.selectors.comm_dtype)
        one = judge_by_group(scores_of(session, [weights], {client: held[client]}, {client: 0}), {client: 0})[client]
        chosen = session.cfg.selectors
        schedule = {"num_adapters": chosen.num_adapters, "num_warmup_rounds": num_warmup_rounds(chosen)}
        return {**schedule, "accuracy": round(one.accuracy, 6), "comparisons": len(one.choice)}

    return look
