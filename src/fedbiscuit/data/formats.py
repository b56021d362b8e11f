"""Data sets as their makers publish them: one record -> one comparison, and one record -> one prompt.

``FORMATS`` and ``PROMPTS`` at the foot are the tables. A record that is no comparison, by the rules of its set, raises
``LeftOutError`` with the reason and is counted; one that is not as its format says is an error with its place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, Literal

from fedbiscuit.config import COLUMNS
from fedbiscuit.data.files import Part
from fedbiscuit.data.jsonlines import shown
from fedbiscuit.data.records import EmptyTextError, LeftOutError, client_of, comparison_of, required_text, text_of
from fedbiscuit.types import Comparison, DataError

__all__ = ["BATCHES", "FORMATS", "Format", "prompt_of"]

BATCHES = frozenset(f"batch{number}" for number in (*range(3, 21), 22))
"""The batches of TL;DR comparisons that the paper uses."""
EMPTY = "empty; leave such comparisons out with data.drop_empty"
NAMED_ONLY = ("id", "split", "domain")
"""Columns that are read only where data.columns names them: what other people call so is often something else."""
SPOKEN = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True, slots=True)
class Format:
    """How one data set is read.

    convert: a record, the part it is in, and data.columns -> a comparison. wants: which files these are, in words. parts:
    the names of files with comparisons in a folder, and of splits on the Hub if ``splits`` is not given; none: all.
    """

    convert: Callable[[Mapping[str, Any], Part, Mapping[str, str]], Comparison]
    wants: str
    parts: frozenset[str] | None = None
    splits: frozenset[str] | None = None


def _tldr(record: Mapping[str, Any], part: Part, columns: Mapping[str, str]) -> Comparison:
    """``choice`` 0: the first summary is preferred. The worker is the client; his batches have their own splits."""
    if record.get("batch") is not None and part.name not in BATCHES and record["batch"] not in BATCHES:
        raise LeftOutError("comparisons of batches that the paper does not use")
    info, summaries = record.get("info"), record.get("summaries")
    if not isinstance(info, dict):
        raise DataError(f"info: expected an object with post, title and subreddit, got {shown(info)}")
    if not isinstance(summaries, list) or len(summaries) != 2 or not all(isinstance(s, dict) for s in summaries):
        raise DataError('summaries: expected two objects {"text": ...}; is this a file of comparisons?')
    fields = {key: required_text(info, key, "info.") for key in ("post", "title", "subreddit")}
    first, second = (required_text(summaries[i], "text", f"summaries[{i}].").strip() for i in (0, 1))
    choice = _zero_or_one(record, "choice")
    split = {"train": "train", "valid1": "validation", "valid2": "test"}.get(required_text(record, "split"))
    if split is None:
        raise DataError(f"split: expected train, valid1 or valid2, got {shown(record['split'])}")
    for key, text in (("info.post", fields["post"]), ("summaries[0].text", first), ("summaries[1].text", second)):
        _not_empty(key, text)
    return Comparison(
        fields["post"],
        first,
        second,
        choice,
        client=client_of(record, "worker"),
        domain=fields["subreddit"],
        split=split,
        meta={"fields": fields, "batch": record.get("batch"), "post_id": info.get("id")},
    )


def _shp(record: Mapping[str, Any], part: Part, columns: Mapping[str, str]) -> Comparison:
    """``labels`` 1: A is preferred."""
    texts = {key: required_text(record, key) for key in ("history", "human_ref_A", "human_ref_B")}
    for key, text in texts.items():
        _not_empty(key, text)
    return Comparison(
        texts["history"],
        texts["human_ref_A"],
        texts["human_ref_B"],
        0 if _zero_or_one(record, "labels") else 1,
        domain=re.sub(r"_(train|validation|test)\Z", "", required_text(record, "domain")),
        split=part.split,
        meta={"post_id": required_text(record, "post_id")},
    )


def _hh(record: Mapping[str, Any], part: Part, columns: Mapping[str, str]) -> Comparison:
    """Two transcripts that differ in what the assistant says last. The domain is the folder, such as harmless-base."""
    chosen, rejected = (_messages_of(record, key) for key in ("chosen", "rejected"))
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise LeftOutError("transcripts that do not end with an answer")
    if chosen[:-1] != rejected[:-1]:
        raise LeftOutError("comparisons whose two answers are to different prompts")
    if chosen[:-1] == []:
        raise LeftOutError("transcripts without a question")
    known = {key: record[key] for key in ("client", "id", "split", "domain") if key in record}
    return comparison_of(
        {"split": part.split, "domain": part.folder or None, **known, "chosen": chosen, "rejected": rejected}
    )


def _ultrafeedback(record: Mapping[str, Any], part: Part, columns: Mapping[str, str]) -> Comparison:
    """Messages with scores of a model; two answers of the same score are no preference."""
    if record.get("score_chosen") is not None and record.get("score_chosen") == record.get("score_rejected"):
        raise LeftOutError("comparisons of two answers with the same score")
    texts = {key: _plain(record[key]) for key in ("prompt", "chosen", "rejected") if key in record}
    return comparison_of(texts | {"split": part.split})


def _alpacafarm(record: Mapping[str, Any], part: Part, columns: Mapping[str, str]) -> Comparison:
    """``preference`` 1 or 2: which output is preferred."""
    preferred = record.get("preference")
    if type(preferred) is not int or preferred not in (1, 2):
        raise DataError(f"preference: expected 1 or 2, the number of the preferred output, got {shown(preferred)}")
    first, second = (required_text(record, key) for key in ("output_1", "output_2"))
    for key, text in (("output_1", first), ("output_2", second)):
        _not_empty(key, text)
    return Comparison(_instruction(record), first, second, 0 if preferred == 1 else 1)


def _trl(record: Mapping[str, Any], part: Part, columns: Mapping[str, str]) -> Comparison:
    """TRL's preference and prompt-completion formats: plain or chat messages, the prompt in its own column or not.

    A record with ``completion`` is one good answer and nothing to compare it with: what objective sft trains on.
    """
    found: dict[str, Any] = {}
    for key in COLUMNS:
        column = columns.get(key, "" if key in NAMED_ONLY else key)
        if key in columns and column not in record:
            raise DataError(f"no column {column!r} (data.columns.{key}); there are {', '.join(record)}")
        if record.get(column) is not None:
            found[key] = _plain(record[column]) if key not in (*NAMED_ONLY, "client", "choice") else record[column]
    for key in ("client", "domain", "id"):
        if type(found.get(key)) is int:
            found[key] = str(found[key])
    found.setdefault("split", part.split)
    if "completion" in found:
        return _demonstration(found)
    if not {"chosen", "rejected"} <= found.keys() and not {"output_a", "output_b", "choice"} <= found.keys():
        raise DataError(
            f"no columns chosen and rejected; there are {', '.join(record)}; say which is which in data.columns, as "
            "data.columns={chosen: BETTER, rejected: WORSE, prompt: ASKED}"
        )
    if "prompt" not in found and isinstance(found.get("chosen"), str) and isinstance(found.get("rejected"), str):
        if all(SPOKEN.match(found[key]) for key in ("chosen", "rejected")):
            return _hh(found, part, columns)
        found |= _without_prompt(found["chosen"], found["rejected"])
    return comparison_of(found)


def _demonstration(found: Mapping[str, Any]) -> Comparison:
    """A prompt and one good answer, which stands as A against nothing."""
    answer = found["completion"]
    if isinstance(answer, list) and len(answer) == 1 and isinstance(answer[0], dict):
        answer = answer[0].get("content")
    known = {key: found[key] for key in ("client", "id", "split", "domain") if key in found}
    shown_against = {"prompt": text_of(found, "prompt"), "output_a": answer, "output_b": "nothing", "choice": 0}
    return replace(comparison_of(known | shown_against), output_b="")


def _plain(value: Any) -> Any:
    """Messages with their role and content only: tables fill in other keys, mostly with nothing."""
    if not isinstance(value, list) or not all(
        isinstance(one, dict) and {"role", "content"} <= one.keys() for one in value
    ):
        return value
    return [{"role": one["role"], "content": one["content"]} for one in value]


def _without_prompt(chosen: str, rejected: str) -> dict[str, str]:
    """What two texts begin with alike is the prompt, up to the last white space in it; the rest are the answers."""
    alike = takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False))
    shared = "".join(one for one, _ in alike)
    end = max((found.end() for found in re.finditer(r"\s", shared)), default=0)
    if not shared[:end].strip():
        raise LeftOutError("comparisons without a prompt that both answers begin with")
    return {"prompt": shared[:end].strip(), "chosen": chosen[end:], "rejected": rejected[end:]}


def _messages_of(record: Mapping[str, Any], key: str) -> list[dict[str, str]]:
    """``\\n\\nHuman: ...\\n\\nAssistant: ...`` as chat messages."""
    before, *spoken = SPOKEN.split("\n\n" + required_text(record, key).lstrip("\n"))
    if before or not spoken:
        raise DataError(f"{key}: expected a transcript that starts with 'Human:', got {shown(record[key])}")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": text.strip()} for who, text in zip(spoken[::2], spoken[1::2], strict=True)]


def _instruction(record: Mapping[str, Any]) -> str:
    """An instruction and, below it, what it is about."""
    parts = [required_text(record, "instruction"), record.get("input") or ""]
    if not isinstance(parts[1], str):
        raise DataError(f"input: expected text, got {shown(parts[1])}")
    text = "\n\n".join(part for part in parts if part.strip())
    _not_empty("instruction", text)
    return text


def _zero_or_one(record: Mapping[str, Any], key: str) -> Literal[0, 1]:
    value = record.get(key)
    if type(value) is not int or value not in (0, 1):
        raise DataError(f"{key}: expected the integer 0 or 1, got {shown(value)}")
    return 1 if value else 0


def _not_empty(key: str, text: str) -> None:
    if not text.strip():
        raise EmptyTextError(f"{key}: {EMPTY}")


def _asked(record: Mapping[str, Any]) -> str:
    """What a transcript or a chat asks: all of it before the last answer."""
    turns = _plain(record["chosen"]) if isinstance(record["chosen"], list) else _messages_of(record, "chosen")
    answered = bool(turns) and isinstance(turns[-1], dict) and turns[-1].get("role") == "assistant"
    return text_of({"chosen": turns[:-1] if answered else turns}, "chosen")


def prompt_of(record: Mapping[str, Any], column: str = "") -> str:
    """The prompt in a record of any set that we know, or in ``column``, which may hold chat messages.

    Raises ``EmptyTextError`` for one without visible text.
    """
    if column and column not in record:
        raise DataError(f"no column {column!r} (data.prompt_column); there are {', '.join(record)}")
    known = next((key for key in PROMPTS if key in record), "prompt")
    text = text_of({column: _plain(record[column])}, column) if column else PROMPTS[known](record)
    if not text.strip():
        raise EmptyTextError(f"{column or known}: empty; write a prompt, or remove the line")
    return text


PROMPTS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "prompt": lambda record: text_of({key: _plain(value) for key, value in record.items()}, "prompt"),
    "instruction": _instruction,
    "history": lambda record: required_text(record, "history"),
    "post": lambda record: required_text(record, "post"),
    "chosen": _asked,
}
"""Key that tells a kind of record -> its prompt; the first one that a record has decides."""

FORMATS: dict[str, Format] = {
    "tldr": Format(
        _tldr,
        "the files batch3.json to batch20.json and batch22.json of OpenAI's summarize-from-feedback comparisons",
        BATCHES,
        frozenset({"train", "validation"}),
    ),
    "shp": Format(
        _shp,
        "the Stanford Human Preferences as they come: SUBREDDIT/train.json, validation.json, test.json",
        frozenset({"train", "validation", "test"}),
    ),
    "hh": Format(
        _hh,
        "Anthropic's HH-RLHF as it comes: harmless-base/train.jsonl.gz, test.jsonl.gz, and the same of helpful-base",
        frozenset({"train", "test"}),
    ),
    "ultrafeedback": Format(
        _ultrafeedback,
        "the files train_prefs-00000-of-00001.parquet and test_prefs-00000-of-00001.parquet of ultrafeedback_binarized",
        frozenset({"train_prefs", "test_prefs"}),
    ),
    "alpacafarm": Format(
        _alpacafarm,
        "the file alpaca_human_preference.json of AlpacaFarm",
        frozenset({"alpaca_human_preference", "preference"}),
        frozenset({"preference", "train"}),
    ),
    "trl": Format(_trl, "files (.jsonl, .json, .parquet) with the columns prompt, chosen and rejected"),
}
