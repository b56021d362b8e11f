"""What the page needs from a run folder, read while nobody else is disturbed: no lock is taken, nothing is repaired."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fedbiscuit.config import Config, load_config
from fedbiscuit.evaluation.judge import PROTOCOLS
from fedbiscuit.report.style import GROUPS
from fedbiscuit.report.tasks import TABLES
from fedbiscuit.rundir import RunDir
from fedbiscuit.types import ClientId, ConfigError, Grouping

__all__ = ["FILES", "FOLDERS", "Labeler", "RunView", "read_run", "validation_series"]

Row = Mapping[str, Any]

FILES = (
    "config.yaml",
    "manifest.json",
    "metrics.jsonl",
    "global_metrics.jsonl",
    "completions.jsonl",
    "labels.json",
    "alignment.jsonl",
    "timings.jsonl",
    "evaluation.json",
    "left_out.json",
)
"""What the page is made from, with the folders below."""
FOLDERS = ("selectors", "global", "policy")
"""Each appears whole, when its stage is done."""


@dataclass(frozen=True, slots=True)
class Labeler:
    """The run whose selectors labeled for another one: its settings, and the digests of its data."""

    cfg: Config
    data: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunView:
    """What one run has left so far. Rows are those of the files of the same name; rounds count from 0 in them."""

    cfg: Config
    config_text: str
    manifest: Mapping[str, Any] = field(default_factory=dict)
    rounds: Sequence[Row] = ()
    global_rounds: Sequence[Row] = ()
    alignment: Sequence[Row] = ()
    timings: Sequence[Row] = ()
    evaluation: Mapping[str, Any] | None = None
    labels: Mapping[str, Any] | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    """``left_out.json``."""
    num_completions: int = 0
    """Prompts that the policy has written completions for."""
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By name, the evaluations of their own (``evaluations/NAME.json``)."""
    judged: Sequence[Row] = ()
    """What language models said, each with its ``protocol`` (``evaluations/judge-PROTOCOL.json``)."""
    folders: frozenset[str] = frozenset()
    """Which of ``FOLDERS`` are there."""
    labeler: Labeler | None = None
    """Where ``labels.selectors`` names a run that is still there."""

    @property
    def draw(self) -> tuple[int, str]:
        """What tells it from runs with the same settings: its seed, and whose selectors labeled, which have theirs."""
        return self.cfg.seed, self.cfg.labels.selectors

    @property
    def selectors(self) -> Mapping[str, Any]:
        """The selectors' part of ``evaluation.json``; empty where there is none."""
        return (self.evaluation or {}).get("selectors") or {}

    @property
    def policy(self) -> Mapping[str, Any]:
        """The policy's part of ``evaluation.json``; empty where there is none."""
        return (self.evaluation or {}).get("policy") or {}

    @cached_property
    def num_adapters(self) -> int:
        """How many adapters were in use: those of the settings, or, where each client has its own, those seen."""
        seen = {u for row in self.rounds for u in row.get("adapter_of", {}).values()}
        return max(self.cfg.selectors.num_adapters, 1 + max(seen, default=0))

    @property
    def has_groups(self) -> bool:
        """Whether clients share selectors in groups, few enough to give each group a colour."""
        return 1 < self.cfg.selectors.num_adapters <= len(GROUPS)

    @cached_property
    def groupings(self) -> list[tuple[int, Grouping]]:
        """(number of the round, counted from 1; client to adapter) of each regrouping."""
        return [(row["round"] + 1, dict(row["grouping"])) for row in self.rounds if row.get("grouping")]

    @cached_property
    def refused(self) -> dict[ClientId, tuple[int, str]]:
        """Client to the number of rounds in which it should have trained and has not, and the reason of the last time."""
        return _last_reasons(row.get("refused", {}) for row in self.rounds)

    @cached_property
    def kept_seats(self) -> dict[ClientId, tuple[int, str]]:
        """Client to the number of regroupings in which it chose no seat, and the reason of the last time."""
        return _last_reasons(row.get("kept_seats", {}) for row in self.rounds)

    @cached_property
    def away(self) -> dict[str, tuple[int, str]]:
        """Site to the number of rounds in which it took no part, and the reason of the last time."""
        return _last_reasons(row.get("away", {}) for row in self.rounds)

    @cached_property
    def left_out(self) -> dict[str, int]:
        """What was not used, by reason; reasons without a case are not in it."""
        counts: Counter[str] = Counter()
        for reason, count in (self.data.get("left_out") or {}).items():
            counts[reason] += count
        for reason, count in ((self.labels or {}).get("left_out") or {}).items():
            counts[f"pairs of completions: {reason}"] += count
        return {reason: count for reason, count in counts.items() if count}

    def total(self, key: str) -> int:
        """The sum over all rounds of ``bytes_up`` or ``bytes_down``."""
        return sum(row.get(key, 0) for row in self.rounds)


def _last_reasons(rounds: Iterable[Mapping[str, Any]]) -> dict[str, tuple[int, str]]:
    """By name: in how many rounds there was a reason, and the last one."""
    found: dict[str, tuple[int, str]] = {}
    for reasons in rounds:
        for name, reason in reasons.items():
            found[name] = (found.get(name, (0, ""))[0] + 1, str(reason))
    return dict(sorted(found.items()))


def read_run(run_dir: Path) -> RunView:
    """Read a run folder, finished or not; ``ConfigError`` where there is no run."""
    run = RunDir.view(run_dir)
    cfg = load_config(run_dir / "config.yaml")
    return RunView(
        cfg=cfg,
        config_text=(run_dir / "config.yaml").read_text(encoding="utf-8"),
        manifest=run.read_json("manifest.json") or {},
        rounds=run.read_lines("metrics.jsonl"),
        global_rounds=run.read_lines("global_metrics.jsonl"),
        alignment=run.read_lines("alignment.jsonl"),
        timings=run.read_lines("timings.jsonl"),
        evaluation=run.read_json("evaluation.json"),
        labels=run.read_json("labels.json"),
        data=run.read_json("left_out.json") or {},
        num_completions=len(run.read_lines("completions.jsonl")),
        tasks={name: found for name in TABLES if (found := run.read_json(f"evaluations/{name}.json"))},
        judged=[
            {"protocol": protocol, **one}
            for protocol in PROTOCOLS
            for one in (run.read_json(f"evaluations/judge-{protocol}.json") or {}).get("judges", ())
            if "on" in one
        ],
        folders=frozenset(name for name in FOLDERS if (run_dir / name).is_dir()),
        labeler=_labeler(cfg.labels.selectors),
    )


def _labeler(folder: str) -> Labeler | None:
    if not folder or not (Path(folder) / "config.yaml").is_file():
        return None
    try:
        cfg = load_config(Path(folder) / "config.yaml")
    except ConfigError:
        return None  # that run is not the one that was asked about
    manifest = RunDir.view(folder).read_json("manifest.json") or {}
    return Labeler(cfg, tuple(sorted((manifest.get("data") or {}).values())))


def validation_series(rounds: Sequence[Row], key: str) -> list[tuple[int, Any]]:
    """(number of the round, counted from 1; value) of each evaluation on validation comparisons that has the value."""
    return list(_validations(rounds, key))


def _validations(rounds: Sequence[Row], key: str) -> Iterator[tuple[int, Any]]:
    for row in rounds:
        value = (row.get("metrics", {}).get("validation") or {}).get(key)
        if value is not None:
            yield row["round"] + 1, value
