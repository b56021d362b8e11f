"""Several run folders side by side: which method agrees with people more, by how much, and what it costs.

Runs that differ by their seed alone are one row. Rows are compared on the same people: differences are taken client by
client and seed by seed, and their intervals come from resampling clients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

from fedbiscuit.config import Config
from fedbiscuit.evaluation.metrics import FEWEST, bootstrap_interval
from fedbiscuit.report.reading import RunView, read_run, validation_series
from fedbiscuit.report.words import best_judge
from fedbiscuit.types import ClientId, ConfigError

__all__ = ["Difference", "Method", "Section", "alignment_curves", "compare", "read_sections"]

WITHOUT_INFLUENCE = (
    "name", "runs_dir", "seed", "evaluation", "model.threads", "model.trunk_gigabytes", "data.path", "selectors.save_every",
    "selectors.keep_every", "selectors.eval_every", "selectors.eval_comparisons", "alignment.save_every",
    "alignment.keep_every", "judge", "trackers",
)  # fmt: skip
"""Settings that make no other result, or only the seed's kind of another one."""

LABELING = "labels.selectors"
OF_A_KIND = (
    "selectors.population", "selectors.num_adapters", "selectors.warmup_", "selectors.regroup_every", "selectors.group",
    "selectors.cohort_sampling", "selectors.kind", "selectors.local.objective", LABELING,
)  # fmt: skip
"""How settings begin that make the kind of a method, or mean something to some kinds only."""

ByClient = Mapping[ClientId, float]


@dataclass(frozen=True)
class Method:
    """Runs that differ by their seed alone. Accuracies are shares; means are over clients first, then over seeds."""

    name: str
    runs: tuple[RunView, ...]

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        """The seed of each run; one may come again where the selectors are those of other runs."""
        return tuple(run.cfg.seed for run in self.runs)

    @cached_property
    def tested(self) -> tuple[RunView, ...]:
        """The runs whose selectors were tested; none where the policy alone is compared."""
        return tuple(run for run in self.runs if run.selectors)

    def by_client(self, key: str = "accuracy") -> dict[int, ByClient]:
        """Seed -> client -> accuracy, of the ``accuracy`` of the client's own selector or of the ``vote``."""
        return {
            run.cfg.seed: {client: one[key] for client, one in run.selectors["clients"].items() if key in one}
            for run in self.tested
        }

    def row(self, key: str, place: int = 0) -> list[Any]:
        """One number of each run: of its first row in ``evaluation.json``, which is the method's own selector."""
        return [run.selectors["rows"][place].get(key) for run in self.tested]

    def each(self, read: Callable[[RunView], float | None]) -> list[float]:
        """One number of each run that has it."""
        return [value for run in self.runs if (value := read(run)) is not None]


@dataclass(frozen=True, slots=True)
class Difference:
    """How much more often one method agrees with people than another, over clients that both have: mean, 95% interval
    (None for fewer than five clients), and for how many clients it is better and worse.
    """

    mean: float
    interval: list[float] | None
    better: int
    worse: int


@dataclass(frozen=True)
class Section:
    """Methods with the same data, and where they have selectors, tested on the same comparisons."""

    title: str
    methods: tuple[Method, ...]

    @property
    def with_selectors(self) -> list[Method]:
        """Those whose selectors were tested. Runs that took another's to label, or learned from single answers, have none."""
        return [method for method in self.methods if method.tested]


def read_sections(run_dirs: Sequence[Path]) -> list[Section]:
    """Evaluated run folders as rows, in the order given, one section for each set of test comparisons.

    Raises ``ConfigError`` for a folder that is no run, or one with neither selectors nor a policy that was judged or measured.
    """
    sections: dict[tuple[Any, ...], list[RunView]] = {}
    for folder in run_dirs:
        run = read_run(folder)
        if not (run.selectors or run.policy or run.judged):
            raise ConfigError(_nothing_to_compare(folder, run))
        sections.setdefault(_tested_on(run), []).append(run)
    return [Section(_title(runs), tuple(_methods(runs))) for runs in sections.values()]


def _nothing_to_compare(folder: Path, run: RunView) -> str:
    if run.evaluation is None:
        return f"{folder}: is not evaluated; run `fedbiscuit evaluate {folder}` first"
    return (
        f"{folder}: its evaluation has neither selectors nor a policy; align it, or set data.prompts where it has no prompt "
        f"that it was not trained on, and run `fedbiscuit evaluate {folder}` again"
    )


def compare(method: Method, other: Method) -> Difference | None:
    """``method`` minus ``other``, paired by seed and client; None where they have no client of one seed in common."""
    mine, theirs = method.by_client(), other.by_client()
    gains: dict[ClientId, list[float]] = {}
    for seed in mine.keys() & theirs.keys():
        for client in mine[seed].keys() & theirs[seed].keys():
            gains.setdefault(client, []).append(mine[seed][client] - theirs[seed][client])
    means = [mean(gains[client]) for client in sorted(gains)]
    if not means:
        return None
    interval = bootstrap_interval(means, ("compare",)) if len(means) >= FEWEST else None
    return Difference(mean(means), interval, sum(gain > 0 for gain in means), sum(gain < 0 for gain in means))


def mean_and_interval(by_seed: Mapping[Any, ByClient]) -> tuple[float, list[float] | None]:
    """The mean over clients, then over seeds, and its interval from resampling clients with their mean over seeds."""
    clients: dict[ClientId, list[float]] = {}
    for accuracies in by_seed.values():
        for client, accuracy in accuracies.items():
            clients.setdefault(client, []).append(accuracy)
    means = [mean(clients[client]) for client in sorted(clients)]
    interval = bootstrap_interval(means, ("compare",)) if len(means) >= FEWEST else None
    return mean(mean(accuracies.values()) for accuracies in by_seed.values()), interval


def curves(method: Method) -> list[tuple[int, float]]:
    """(round, validation accuracy as the mean over seeds) at the rounds that all runs evaluated."""
    series = [dict(validation_series(run.rounds, "accuracy")) for run in method.runs]
    shared = set.intersection(*map(set, series)) if series else set()
    return [(number, mean(found[number] for found in series)) for number in sorted(shared)]


def alignment_curves(method: Method, key: str) -> list[tuple[int, float]]:
    """(step, number as the mean over seeds) of the policies kept on the way, as the judge to trust most has them."""
    series = [dict(_by_step(run, key)) for run in method.runs]
    shared = set.intersection(*map(set, series)) if series else set()
    return [(step, mean(found[step] for found in series)) for step in sorted(shared)]


def _by_step(run: RunView, key: str) -> Iterator[tuple[int, float]]:
    judge = best_judge(run) if run.cfg.selectors.local.objective == "choice" else None  # a baseline's steps are rounds
    for row in run.policy.get("checkpoints") or []:
        if judge is not None and row["name"] == judge["name"] and key in row:
            yield row["step"], row[key]


def _tested_on(run: RunView) -> tuple[Any, ...]:
    digests = tuple(sorted((run.manifest.get("data") or {}).values()))
    return digests, run.cfg.data.partition, run.cfg.data.demo, run.cfg.evaluation.max_comparisons


def _title(runs: Sequence[RunView]) -> str:
    """What they were tested on. Which clients take part, and so how many comparisons, may depend on the seed."""
    sizes = [[one["comparisons"] for one in run.selectors["clients"].values()] for run in runs if run.selectors]
    tested = (
        f"{_range(map(len, sizes))} clients with {_range(map(sum, sizes))} test comparisons" if sizes else "policies"
    )
    data = runs[0].cfg.data
    name = "/".join(Path(data.path[0]).parts[-2:]) if data.path else data.source
    return f"{name}: {tested}"


def _range(counts: Iterable[int]) -> str:
    seen = sorted(set(counts))
    return str(seen[0]) if len(seen) == 1 else f"{seen[0]} to {seen[-1]}"


def _methods(runs: Sequence[RunView]) -> Iterator[Method]:
    groups: dict[tuple[Any, ...], list[RunView]] = {}
    for run in runs:
        groups.setdefault((tuple(sorted(_settings(run).items())), run.labeler and run.labeler.data), []).append(run)
    settings_of_all = [dict(settings) for settings, _ in groups]
    for (settings, _), held in groups.items():
        draws = [run.draw for run in held]
        if twice := [draw for draw in draws if draws.count(draw) > 1]:
            raise ConfigError(
                f"two of the runs have the same settings and the same seed ({twice[0][0]}); give one of them"
            )
        kind = _kind(held[0])
        alike = [dict(others) for (others, _), theirs in groups.items() if _kind(theirs[0]) == kind]
        told = _what_differs(dict(settings), alike, settings_of_all)
        others = held[0].cfg.labels.selectors
        if others and settings_of_all.count(dict(settings)) > 1:  # a row of its own, or trained on other data
            told += f", selectors of {others}"
        yield Method(f"{kind}{told}", tuple(sorted(held, key=lambda run: run.draw)))


def _kind(run: RunView) -> str:
    if run.cfg.labels.selectors and run.labeler is None:
        return f"labeled by {Path(run.cfg.labels.selectors).name}"
    chosen = _labeling(run).selectors
    trained = {"sft": "SFT", "dpo": "DPO", "choice": "RM" if chosen.kind == "reward" else ""}[chosen.local.objective]
    if chosen.population != "federated":
        return " ".join([{"centralized": "centralized", "local": "local only"}[chosen.population], trained]).strip()
    if trained:
        name = "FedAvg-SFT" if trained == "SFT" else f"Fed{trained}"
        return name if chosen.num_adapters == 1 else f"{name}, U = {chosen.num_adapters}"
    if chosen.num_adapters == 1:
        return "FedBis"
    if chosen.grouping == "fixed":
        return f"told the {chosen.num_adapters} groups"
    return f"FedBiscuit, U = {chosen.num_adapters}"


def _labeling(run: RunView) -> Config:
    """The settings of the selectors that labeled: of this run, or of the one that it took them from."""
    return run.labeler.cfg if run.labeler else run.cfg


def _settings(run: RunView) -> dict[str, str]:
    """Every setting that can make another result, by its path; empty where other settings make it idle.

    Whose selectors labeled is told by how they were trained, so that runs whose selectors differ by their seed alone are one row.
    """
    own = _flat(run.cfg) | dict.fromkeys(_idle(run.cfg), "")
    if run.cfg.labels.selectors and run.labeler is None:
        return {key: "" if key.startswith("selectors.") else value for key, value in own.items()}
    labeling = _labeling(run)
    theirs = _flat(labeling) | dict.fromkeys(_idle(labeling), "")
    trained = {key: value for key, value in theirs.items() if key.startswith("selectors.")}
    read = {
        f"{LABELING}.{key}": value
        for key, value in theirs.items()
        if key.startswith(("model.", "data.")) and not key.startswith("data.prompt")
    }
    return own | trained | read | {LABELING: ""}


def _flat(cfg: Config) -> dict[str, str]:
    flat: dict[str, str] = {}

    def walk(value: Any, path: str) -> None:
        if path in WITHOUT_INFLUENCE:
            return
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                walk(inner, f"{path}.{key}" if path else str(key))
        else:
            flat[path] = _told(value)

    walk(cfg.model_dump(), "")
    return flat


def _idle(cfg: Config) -> Iterator[str]:
    """Settings that these other settings make idle."""
    if cfg.selectors.server_optimizer != "momentum":
        yield "selectors.server_momentum"
    if cfg.selectors.server_optimizer != "adam":
        yield from ("selectors.server_betas", "selectors.server_eps")
    if cfg.selectors.population == "centralized":
        yield "selectors.cohort_size"


def _told(value: Any) -> str:
    """A value in words; whole numbers that follow each other as a range."""
    numbers = list(value) if isinstance(value, tuple) and all(type(one) is int for one in value) else []
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[0] + len(numbers))):
        return f"{numbers[0]} to {numbers[-1]}"
    return str(value)


def _unlike(settings: Mapping[str, str], rows: Sequence[Mapping[str, str]]) -> set[str]:
    """Settings that no more than half of the rows share with this one, of those in which rows differ."""
    keys = {key for row in rows for key in row}
    shared = {key: sum(row.get(key) == settings.get(key) for row in rows) for key in keys}
    return {key for key, count in shared.items() if count < len(rows) and 2 * count <= len(rows)}


def _what_differs(
    settings: Mapping[str, str], alike: Sequence[Mapping[str, str]], all_rows: Sequence[Mapping[str, str]]
) -> str:
    """In words: settings unlike those of most rows of the same kind, or of most rows unless they belong to the kind."""
    keys = sorted(
        _unlike(settings, alike) | {key for key in _unlike(settings, all_rows) if not key.startswith(OF_A_KIND)}
    )
    told = {key: settings.get(key, "unset") for key in keys}
    for key in keys:  # a base that selectors and policy share is told once
        if key.startswith(f"{LABELING}.") and told[key] == settings.get(key.removeprefix(f"{LABELING}.")):
            told[key] = ""
    return "".join(f", {key.rsplit('.', 1)[-1]} {value}" for key, value in told.items() if value)
