"""From a run to a folder that others can load: an adapter or a plain model, its card, and what a selector needs to judge."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedbiscuit.config import Config, ModelSettings, load_config
from fedbiscuit.data.encoding import extra_fields, parse_template
from fedbiscuit.models.base import hub_name, quantize_of
from fedbiscuit.models.hub import check_name, upload
from fedbiscuit.models.merging import write_merged
from fedbiscuit.models.selector_file import selector_file_of, write_selector_file
from fedbiscuit.pipeline.modelcards import Facts, policy_card, selector_card
from fedbiscuit.rundir import (
    RunDir,
    base_of,
    new_folder,
    read_adapter,
    read_adapter_config,
    write_adapter_files,
    write_synced,
)
from fedbiscuit.types import ConfigError

__all__ = ["export_run", "push"]


def export_run(
    run_dir: str | Path,
    to: str | Path,
    *,
    selector: int | str | None = None,
    policy: bool = False,
    merge: bool = False,
    base: str = "",
) -> Path:
    """Write a selector of a run (its number, or ``all``) or its policy into a new folder, for others to load.

    A PEFT folder, or with ``merge`` a plain model; a model card; and of selectors ``selector.json``. base: the name under
    which others find the base model, for the card and ``adapter_config.json``. A folder that is not empty is a
    ``ConfigError``; a kill leaves none that looks whole.
    """
    if (selector is None) != policy:
        raise ConfigError("export: say what: --selector NUMBER, --selector all, or --policy")
    run = RunDir.view(run_dir)
    if not (run.path / "config.yaml").is_file():
        raise ConfigError(f"{run.path}: no config.yaml in this folder; name the folder of a run")
    cfg = load_config(run.path / "config.yaml")
    if policy:
        return _export_policy(run, cfg, Path(to), merge, base)
    return _export_selectors(run, cfg, Path(to), str(selector), merge, base)


def push(
    source: str | Path,
    name: str,
    *,
    selector: int | str | None = None,
    policy: bool = False,
    merge: bool = False,
    base: str = "",
    public: bool = False,
) -> str:
    """Upload an exported folder, or export from a run and upload that, to OWNER/NAME on the Hub; its address there.

    A repository that is made for it is private unless ``public``.
    """
    check_name(name)
    source = Path(source)
    if (source / "config.yaml").is_file():
        with tempfile.TemporaryDirectory(prefix="fedbiscuit-") as folder:
            made = export_run(source, Path(folder) / "export", selector=selector, policy=policy, merge=merge, base=base)
            return upload(made, name, public)
    if selector is not None or policy or merge or base:
        raise ConfigError(
            f"{source}: not a run, so nothing can be chosen from it; leave --selector, --policy, --merge, --base out"
        )
    weights = [*source.glob("*.safetensors"), *source.glob("u*/adapter_model.safetensors")]
    if not weights or not (source / "README.md").is_file():
        raise ConfigError(
            f"{source}: neither a run nor an exported folder (README.md and .safetensors); name what `fedbiscuit export` wrote"
        )
    return upload(source, name, public)


def _export_selectors(run: RunDir, cfg: Config, to: Path, which: str, merge: bool, base: str) -> Path:
    if cfg.labels.selectors:
        raise ConfigError(f"{run.path}: this run takes the selectors of {cfg.labels.selectors}; export them from there")
    if cfg.selectors.local.objective != "choice":
        raise ConfigError(f"{run.path}: this run trains a policy and no selectors; use --policy")
    content = selector_file_of(run, cfg)
    numbers = _numbers(which, len(content.adapters), run.path)
    if merge and content.kind == "reward":
        raise ConfigError(
            f"{run.path}: a reward model's head has no place in a plain language model; leave --merge out"
        )
    if merge and len(numbers) > 1:
        raise ConfigError(f"{run.path}: a merged model holds one selector; choose one of 0 to {len(numbers) - 1}")
    places = [run.path / content.adapters[u] for u in numbers]
    names = () if merge else tuple(f"u{u}" for u in numbers) if len(numbers) > 1 else (".",)
    fields = extra_fields(parse_template(content.template, "selector.json"), content.kind)
    card = selector_card(_facts(run, cfg, places[0], merge, base), numbers, content.temperature, fields)
    with new_folder(to) as folder:
        write_selector_file(folder, replace(content, adapters=names))
        _write_weights(places, [folder / name for name in names], cfg.model, folder, card, base)
    return to


def _export_policy(run: RunDir, cfg: Config, to: Path, merge: bool, base: str) -> Path:
    place = run.path / "policy"
    if not place.is_dir():
        command = "align" if cfg.selectors.local.objective == "choice" else "train"
        raise ConfigError(f"{run.path}: no policy in this run yet; `fedbiscuit {command} {run.path}` makes it")
    card = policy_card(_facts(run, cfg, place, merge, base))
    with new_folder(to) as folder:
        _write_weights([place], [] if merge else [folder], cfg.policy_model or cfg.model, folder, card, base)
    return to


def _numbers(which: str, count: int, place: Path) -> list[int]:
    if which == "all":
        return list(range(count))
    if not re.fullmatch(r"u?\d{1,6}", which) or int(which.removeprefix("u")) >= count:
        known = "only 0" if count == 1 else f"0 to {count - 1}, or all"
        raise ConfigError(f"{place}: --selector {which!r:.40}: this run has {known}")
    return [int(which.removeprefix("u"))]


def _write_weights(
    places: Sequence[Path], targets: Sequence[Path], model: ModelSettings, folder: Path, card: str, base: str
) -> None:
    """Adapters from ``places`` to ``targets``, or without targets the first one merged into the base; and the card."""
    if not targets:
        write_merged(model, places[0], folder)
    for place, target in zip(places, targets, strict=False):
        target.mkdir(exist_ok=True)
        config = read_adapter_config(place)
        name = config.get("base_model_name_or_path", "")
        config["base_model_name_or_path"] = base or hub_name(name) or name
        write_adapter_files(target, read_adapter(place), config, base=base_of(place))
    write_synced(folder / "README.md", [card.encode()])


def _facts(run: RunDir, cfg: Config, place: Path, merged: bool, base: str) -> Facts:
    name = read_adapter_config(place).get("base_model_name_or_path", "")
    rows = run.read_lines("metrics.jsonl")
    found: dict[str, Any] = run.read_json("evaluation.json") or {}
    labels: dict[str, Any] = run.read_json("labels.json") or {}
    adapters = {u for row in rows for u in row.get("adapter_of", {}).values()}
    was_real = (run.read_json("manifest.json") or {}).get("real_clients", False)
    return Facts(
        cfg=cfg,
        quantize=quantize_of(base_of(place)),
        base=name,
        known_as=base or hub_name(name),
        merged=merged,
        rounds=len(rows),
        num_selectors=max(cfg.selectors.num_adapters, 1 + max(adapters, default=0)),
        num_bytes=(sum(row["bytes_up"] for row in rows), sum(row["bytes_down"] for row in rows)),
        num_pairs=labels.get("pairs", 0),
        data=run.read_json("left_out.json") or {},
        evaluation=found,
        real_clients=len({client for row in rows for client in row["cohort"]}) if was_real else 0,
    )
