"""``selector.json``: what a selector needs to judge beside its weights, so that who gets a folder needs nothing else."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from fedbiscuit.config import Config
from fedbiscuit.data.encoding import load_template, parse_template
from fedbiscuit.models.selector import VOTES
from fedbiscuit.rundir import RunDir, base_of, dump_json, load_json, read_adapter_config, read_regular, write_synced
from fedbiscuit.types import ConfigError, IntegrityError

__all__ = ["SELECTOR_FILE", "SelectorFile", "read_selector_file", "selector_file_of", "write_selector_file"]

SELECTOR_FILE = "selector.json"
FORMAT = 1
MAX_BYTES = 256 * 1024
BASE_NAME = re.compile(r"package:\w+(/[^/\\]+)+|[^./~\\][^/\\]*(/[^./~\\][^/\\]*)?")
"""A package's file, a Hub name or a plain name; never a path on the reader's disk."""


@dataclass(frozen=True, slots=True)
class SelectorFile:
    """How one selector or several read a comparison, and what they are adapters of.

    adapters: the folders of the adapters beside the file, ``.`` for its own; none where they are merged into the model.
    base_sha256: of the base model, as ``digest_of`` has it. temperature: margins are divided by it.
    """

    template: str
    choice_tokens: tuple[str, str]
    max_tokens: int
    temperature: float
    vote: str
    base: str
    base_sha256: str
    adapters: tuple[str, ...]
    kind: Literal["choice", "reward"] = "choice"


def selector_file_of(run: RunDir, cfg: Config) -> SelectorFile:
    """The same of a run with trained selectors. The temperature is the one that the evaluation has fitted to validation
    comparisons, or before an evaluation that of ``labels.temperature``.
    """
    found = [path.name for path in (run.path / "selectors").glob("u*") if re.fullmatch(r"u\d+", path.name)]
    names = sorted(found, key=lambda name: int(name[1:]))
    if not names:
        raise ConfigError(f"{run.path}: no trained selectors in this run; `fedbiscuit train {run.path}` trains them")
    folders = [run.path / "selectors" / name for name in names]
    evaluation = run.read_json("evaluation.json") or {}
    fitted = (evaluation.get("selectors") or {}).get("temperature")
    return SelectorFile(
        template=load_template(cfg.data.template).text,
        choice_tokens=cfg.data.choice_tokens,
        max_tokens=cfg.data.max_tokens,
        temperature=float(fitted or cfg.labels.temperature),
        vote=cfg.labels.vote,
        base=read_adapter_config(folders[0]).get("base_model_name_or_path", ""),
        base_sha256=base_of(folders[0]),
        adapters=tuple(f"selectors/{name}" for name in names),
        kind=cfg.selectors.kind,
    )


def write_selector_file(folder: Path, content: SelectorFile) -> None:
    """Write ``selector.json`` into a temporary folder."""
    text = dump_json({"format": FORMAT, **asdict(content)}, indent=2)
    write_synced(folder / SELECTOR_FILE, [text.encode(), b"\n"])


def read_selector_file(folder: Path) -> SelectorFile:
    """What ``selector.json`` says, trusted in nothing; every fault is an ``IntegrityError`` that names the key."""
    path = folder / SELECTOR_FILE
    table = load_json(path, read_regular(path, MAX_BYTES))
    if not isinstance(table, dict):
        raise IntegrityError(f"{path}: not a table; export the selector again")
    number = table.pop("format", None)
    if number != FORMAT:
        raise IntegrityError(f"{path}: format: {number!r:.40}, this fedbiscuit reads {FORMAT}; use a newer one")
    known = [one.name for one in fields(SelectorFile)]
    for key in [*known, *table]:
        if key not in table:
            raise IntegrityError(f"{path}: {key}: missing; export the selector again")
        if key not in known:
            raise IntegrityError(f"{path}: {key!r:.80}: unknown key; remove it, or export the selector again")
        if not CHECKS[key](table[key]):
            raise IntegrityError(f"{path}: {key}: {table[key]!r:.80} is not permitted; export the selector again")
    try:
        parse_template(table["template"], SELECTOR_FILE)
    except ConfigError as error:
        raise IntegrityError(f"{path}: {error}") from error
    values: dict[str, Any] = {key: tuple(one) if isinstance(one, list) else one for key, one in table.items()}
    return SelectorFile(**values)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) and one for one in value)


CHECKS: dict[str, Callable[[Any], bool]] = {
    "template": lambda value: isinstance(value, str),
    "choice_tokens": lambda value: _texts(value) and len(value) == 2,
    "max_tokens": lambda value: type(value) is int and 16 <= value <= 10**6,
    "temperature": lambda value: type(value) in (int, float) and math.isfinite(value) and value > 0,
    "vote": lambda value: isinstance(value, str) and value in VOTES,
    "base": lambda value: isinstance(value, str) and ".." not in value and bool(BASE_NAME.fullmatch(value)),
    "base_sha256": lambda value: isinstance(value, str) and bool(re.fullmatch(r"(nf4:)?[0-9a-f]{64}", value)),
    "adapters": lambda value: (
        value == ["."] or (_texts(value) and all(re.fullmatch(r"u\d{1,6}", one) for one in value))
    ),
    "kind": lambda value: value in ("choice", "reward"),
}
