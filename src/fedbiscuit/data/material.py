"""What evaluations read beside a run's own data: labelled pairs, summaries by people, instructions.

Texts are read as strictly as comparisons are; keys that are not needed are passed over, since such files come from
elsewhere and have keys of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fedbiscuit.data.encoding import EXTRA
from fedbiscuit.data.files import RECORDS, iter_records
from fedbiscuit.data.formats import prompt_of
from fedbiscuit.data.jsonlines import shown
from fedbiscuit.data.records import EmptyTextError, comparison_of, required_text
from fedbiscuit.types import Comparison, DataError

__all__ = ["Instruction", "Reference", "labelled_pair", "read_instructions", "read_references"]

REWARD_BENCH = ("subset", "chosen_model", "rejected_model")
"""Keys that only RewardBench's records have."""
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Reference:
    """A post and the summary that a person wrote of it. fields: what a template may show beside the post."""

    prompt: str
    summary: str
    fields: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Instruction:
    """An instruction to answer, and the set that it comes from."""

    text: str
    dataset: str


def read_references(path: str | Path) -> list[Reference]:
    """Records {post, summary} as in TL;DR (title, subreddit are kept) or {prompt, reference}; each prompt once."""
    found = {one.prompt: one for _, one in _read(path, _reference)}
    return list(found.values())


def read_instructions(path: str | Path) -> list[Instruction]:
    """Instructions of a JSON array or JSON lines, under ``instruction`` (AlpacaEval) or ``prompt``; or one a line of a
    text file. Each is taken once. Without a key ``dataset`` the set is called after the file.
    """
    path = Path(path)
    stem = path.name.split(".")[0]
    if RECORDS.fullmatch(path.name):
        found = [one for _, one in _read(path, lambda record: _instruction(record, stem))]
    else:
        found = [Instruction(line.strip(), stem) for line in _text(path).splitlines() if line.strip()]
    if not found:
        raise DataError(f"{path}: no instruction in it; write one a line, or use .json or .jsonl with `instruction`")
    return list({one.text: one for one in found}.values())


def labelled_pair(record: Mapping[str, Any]) -> Comparison:
    """A comparison in our own shapes, or of RewardBench, whose ``subset`` becomes the domain."""
    if not any(key in record for key in REWARD_BENCH):
        return comparison_of(record)
    pair = {key: record[key] for key in ("prompt", "chosen", "rejected") if key in record}
    subset = required_text(record, "subset") if record.get("subset") is not None else None
    rest = {key: value for key, value in record.items() if key not in (*pair, "subset")}
    return comparison_of({**pair, "domain": subset, "meta": rest})


def _reference(record: Mapping[str, Any]) -> Reference:
    is_tldr = "post" in record
    prompt = required_text(record, "post") if is_tldr else prompt_of(record)
    key = "summary" if is_tldr or "reference" not in record else "reference"
    summary = required_text(record, key).strip()
    for name, text in (("post", prompt), (key, summary)):
        if not text.strip():
            raise EmptyTextError(f"{name}: empty; remove the line")
    return Reference(prompt, summary, {name: record[name] for name in EXTRA if isinstance(record.get(name), str)})


def _instruction(record: Any, stem: str) -> Instruction:
    if not isinstance(record, dict):
        raise DataError(f'expected an object {{"instruction": ...}}, got {shown(record)}')
    text = required_text(record, "instruction") if "instruction" in record else prompt_of(record)
    if not text.strip():
        raise EmptyTextError("instruction: empty; remove it")
    dataset = record.get("dataset")
    return Instruction(text, dataset if isinstance(dataset, str) and dataset.strip() else stem)


def _read(path: str | Path, convert: Callable[[Mapping[str, Any]], Item]) -> Iterator[tuple[int, Item]]:
    for number, record in iter_records(path):
        if isinstance(record, DataError):
            raise DataError(f"{path}:{number}: {record}")
        yield number, _located(path, f":{number}", convert, record)


def _located(path: str | Path, place: str, convert: Callable[..., Item], *values: Any) -> Item:
    try:
        return convert(*values)
    except DataError as error:
        raise DataError(f"{path}{place}: {error}") from None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start + 1}: not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
