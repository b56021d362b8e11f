"""What evaluations read beside a run's own data: labelled pairs, summaries by people, instructions.

Texts are read as strictly as comparisons are; keys that are not needed are passed over, since such files come from
elsewhere and have keys of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fedbiscuit.data.encoding import EXTRA
from fedbiscuit.data.files import RECORDS, iter_records, parts_of
from fedbiscuit.data.formats import prompt_of
from fedbiscuit.data.jsonlines import shown
from fedbiscuit.data.records import EmptyTextError, comparison_of, required_text
from fedbiscuit.types import Comparison, DataError

__all__ = ["Instruction", "Reference", "labelled_pair", "read_instructions", "read_references"]

REWARD_BENCH = ("subset", "chosen_model", "rejected_model")
"""Keys that only RewardBench's records have."""
REFERENCES = "records with `post` and `summary`, or `prompt` and `reference` (.jsonl, .json or .parquet)"
INSTRUCTIONS = "records with `instruction` or `prompt` (.json, .jsonl or .parquet), or a .txt with one a line"
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


def read_references(place: str) -> list[Reference]:
    """Records {post, summary} as in TL;DR (title, subreddit are kept) or {prompt, reference}; each prompt once.

    ``place``: a file, a folder or a set on the Hub, as ``parts_of`` has it; so are those of instructions.
    """
    found = {one.prompt: one for one in _read(place, "evaluation.references", REFERENCES, _reference)}
    return list(found.values())


def read_instructions(place: str) -> list[Instruction]:
    """Records with ``instruction`` (AlpacaEval) or ``prompt``, or the lines of a text file. Each is taken once.

    Without a key ``dataset`` the set is called after the file or the set on the Hub.
    """
    path = Path(place)
    stem = path.name.split("@")[0].split(".")[0]
    if path.is_file() and not RECORDS.fullmatch(path.name):
        found = [Instruction(line.strip(), stem) for line in _text(path).splitlines() if line.strip()]
    else:
        found = _read(place, "evaluation.instructions", INSTRUCTIONS, lambda record: _instruction(record, stem))
    if not found:
        raise DataError(f"{place}: no instruction in it; write one a line, or use .json or .jsonl with `instruction`")
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


def _read(place: str, key: str, wants: str, convert: Callable[[Mapping[str, Any]], Item]) -> list[Item]:
    found = []
    for part in parts_of(place, key, wants):
        for number, record in iter_records(part.path):
            try:
                if isinstance(record, DataError):
                    raise record
                found.append(convert(record))
            except DataError as error:
                raise DataError(f"{part.path}:{number}: {error}") from None
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start + 1}: not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
