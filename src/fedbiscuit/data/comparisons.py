"""People's comparisons from JSON lines: strict, streaming, and nothing left out without a count.

``jsonlines.py`` knows bytes, ``records.py`` knows keys; this file knows what must hold between the records of a set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedbiscuit.data.check import CheckReport, describe
from fedbiscuit.data.jsonlines import iter_objects, shown
from fedbiscuit.data.records import EmptyTextError, LeftOutError, comparison_of, pair_of
from fedbiscuit.types import Comparison, DataError

__all__ = [
    "COMPARISONS",
    "STATION",
    "CheckReport",
    "Place",
    "ReadReport",
    "check_files",
    "iter_comparisons",
    "read_comparisons",
]

COMPARISONS = "comparisons.jsonl"
"""A folder with a file of this name stands for it: the folder of a preference station."""
STATION = "station.sqlite"
"""What the station itself keeps there."""
Place = tuple[str, int]
"""File and line (from 1)."""
Located = tuple[Place, Comparison]
Converter = Callable[[Mapping[str, Any], str], Comparison]
"""(record, path it is from) -> comparison."""
Reader = Callable[[str | Path, Any], Iterator[tuple[int, dict[str, Any] | DataError]]]
"""(path, digest to feed) -> line and record, or what is wrong with it, as ``iter_objects``."""


def _own(record: Mapping[str, Any], path: str) -> Comparison:
    return comparison_of(record)


@dataclass(frozen=True, slots=True)
class ReadReport:
    """What was read: sha256 by file, records kept, counts of what was left out by reason, and what looks wrong."""

    files: dict[str, str]
    num_read: int
    left_out: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Contents:
    """All lines of all files, sorted by what became of them."""

    files: dict[str, str] = field(default_factory=dict)
    kept: list[Located] = field(default_factory=list)
    identical: list[Place] = field(default_factory=list)
    empty: list[Place] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    errors: list[DataError] = field(default_factory=list)


def iter_comparisons(path: str | Path) -> Iterator[Comparison]:
    """The comparisons of one file (.jsonl or .jsonl.gz), one line in memory at a time, in the order of the file.

    Raises ``DataError("FILE:LINE: KEY: problem; what to do")`` at the first broken line. What only shows between
    records (duplicates, leakage) is for ``read_comparisons``; identical answers come as they are.
    """
    for place, item in _numbered(path, _own):
        if isinstance(item, DataError):
            raise _at(place, item)
        yield item


def read_comparisons(
    paths: str | Path | Iterable[str | Path],
    *,
    drop_empty: bool = False,
    strict: bool = False,
    convert: Converter = _own,
    separate_splits: bool = True,
    read: Reader = iter_objects,
) -> tuple[list[Comparison], ReadReport]:
    """All comparisons of the files, in order, and what there is to say about them.

    ``drop_empty`` leaves out comparisons with an empty text, counted, instead of stopping. ``strict`` makes identical
    answers and contradictions errors. ``read`` gives the records of a path, ``convert`` turns one into a comparison or
    says by ``LeftOutError`` why it is none, which is counted. ``separate_splits=False`` leaves pairs that are in two splits
    of one client to ``divide``, which takes them out of train and counts them.

    Raises ``DataError`` at the first broken line, duplicate id, or pair that is in two splits of one client.
    """
    contents = _Contents()
    for path in _as_paths(paths):
        _read_file(path, contents, convert, drop_empty, read)
        if contents.errors:
            raise contents.errors[0]
    errors = _duplicate_ids(contents.kept) + (_leaks(contents.kept) if separate_splits else [])
    warnings = _identical(contents.identical) + _contradictions(contents.kept)
    if strict:
        errors += warnings
    if errors:
        raise DataError(errors[0])
    if not contents.kept:
        told = warnings + [f"{count} left out: {reason}" for reason, count in contents.left_out.items()]
        raise DataError(f"{', '.join(contents.files)}: no comparison is left; {'; '.join(told) or 'add some'}")
    warnings += _repeats(contents.kept) + _shared_pairs(contents.kept) + _partly_split(contents.kept)
    warnings += [f"left out: {reason}: {count}" for reason, count in contents.left_out.items()]
    left_out = {"empty text": len(contents.empty), "identical answers": len(contents.identical)} | contents.left_out
    report = ReadReport(
        contents.files, len(contents.kept), {reason: count for reason, count in left_out.items() if count}, warnings
    )
    return [comparison for _, comparison in contents.kept], report


def check_files(
    paths: str | Path | Iterable[str | Path], count_tokens: Callable[[str], int] | None = None
) -> CheckReport:
    """Everything that is wrong or worth knowing, for ``fedbiscuit data check``; never stops at the first broken line.

    ``count_tokens`` gives lengths in tokens; without it they are in words.
    """
    contents = _Contents()
    for path in _as_paths(paths):
        try:
            _read_file(path, contents, _own, drop_empty=False)
        except DataError as error:
            contents.errors.append(error)
    kept = contents.kept
    return describe(
        kept,
        contents.files,
        errors=[str(error) for error in contents.errors] + _duplicate_ids(kept) + _leaks(kept),
        warnings=[
            *_identical(contents.identical),
            *_contradictions(kept),
            *_repeats(kept),
            *_shared_pairs(kept),
            *_partly_split(kept),
        ],
        count_tokens=count_tokens,
    )


def _as_paths(paths: str | Path | Iterable[str | Path]) -> list[str | Path]:
    listed = [_file_of(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    if not listed:
        raise DataError("no files given; name at least one .jsonl or .jsonl.gz file")
    twice = [path for i, path in enumerate(listed) if Path(path) in {Path(other) for other in listed[:i]}]
    if twice:
        raise DataError(f"{twice[0]}: this file is named twice; name it once")
    return listed


def _file_of(path: str | Path) -> str | Path:
    inside = Path(path) / COMPARISONS
    if not inside.is_file() and (Path(path) / STATION).is_file():
        raise DataError(
            f"{path}: nothing that can be trained on has been judged at this station yet; judge some pairs first: "
            f"fedbiscuit station --folder {path}"
        )
    return inside if inside.is_file() else path


def _read_file(
    path: str | Path, contents: _Contents, convert: Converter, drop_empty: bool, read: Reader = iter_objects
) -> None:
    digest = hashlib.sha256()
    for place, item in _numbered(path, convert, digest, read):
        if isinstance(item, LeftOutError):
            contents.left_out[str(item)] = contents.left_out.get(str(item), 0) + 1
        elif isinstance(item, EmptyTextError) and drop_empty:
            contents.empty.append(place)
        elif isinstance(item, DataError):
            contents.errors.append(_at(place, item))
        elif item.output_a.strip() == item.output_b.strip():
            contents.identical.append(place)
        else:
            contents.kept.append((place, item))
    contents.files[str(path)] = digest.hexdigest()


def _numbered(
    path: str | Path, convert: Converter, digest: Any = None, read: Reader = iter_objects
) -> Iterator[tuple[Place, Comparison | DataError]]:
    for line, record in read(path, digest):
        item: Comparison | DataError
        try:
            item = record if isinstance(record, DataError) else convert(record, str(path))
        except DataError as error:
            item = error
        yield (str(path), line), item


def _at(place: Place, error: DataError) -> DataError:
    return type(error)(f"{place[0]}:{place[1]}: {error}")


def _also(here: Place, other: Place) -> str:
    """How to name another line: without the file where it is the same one."""
    return f"line {other[1]}" if here[0] == other[0] else f"{other[0]}:{other[1]}"


# What must hold between records. Each function reads all of them and returns messages, errors first come first.


def _duplicate_ids(kept: list[Located]) -> list[str]:
    first: dict[str, Place] = {}
    messages = []
    for place, comparison in kept:
        if comparison.id is None:
            continue
        other = first.setdefault(comparison.id, place)
        if other is not place:
            messages.append(
                f"{place[0]}:{place[1]}: id: {shown(comparison.id)} is also the id of {_also(place, other)}; "
                "give each comparison its own, or none"
            )
    return messages


def _leaks(kept: list[Located]) -> list[str]:
    """The same pair in two splits of one client. A comparison without a split counts as train."""
    first: dict[tuple[object, ...], tuple[str, Place]] = {}
    messages = []
    for place, comparison in kept:
        split = comparison.split or "train"
        other_split, other = first.setdefault((comparison.client, *pair_of(comparison)), (split, place))
        if other_split != split:
            messages.append(
                f"{place[0]}:{place[1]}: split: this pair is in {split}, but in {other_split} in {_also(place, other)} "
                f"({_whose(comparison)}); keep a pair of one client in one split"
            )
    return messages


def _whose(comparison: Comparison) -> str:
    return "no client named" if comparison.client is None else f"client {shown(comparison.client)}"


def _identical(places: list[Place]) -> list[str]:
    if not places:
        return []
    return [
        f"{places[0][0]}:{places[0][1]}: output_b: the same text as output_a; "
        f"{len(places)} such comparisons are left out, this is the first"
    ]


def _contradictions(kept: list[Located]) -> list[str]:
    first: dict[tuple[object, ...], tuple[str, Place]] = {}
    found: list[tuple[Place, Place]] = []
    for place, comparison in kept:
        chosen, other = first.setdefault((comparison.client, *pair_of(comparison)), (comparison.chosen, place))
        if chosen != comparison.chosen:
            found.append((other, place))
    if not found:
        return []
    other, place = found[0]
    return [
        f"{place[0]}:{place[1]}: choice: contradicts {_also(place, other)}: one client chose both ways between the "
        f"same answers; {len(found)} such comparisons, all are kept, this is the first"
    ]


def _repeats(kept: list[Located]) -> list[str]:
    first: dict[tuple[object, ...], Place] = {}
    found: list[tuple[Place, Place]] = []
    for place, comparison in kept:
        other = first.setdefault((comparison.client, comparison.chosen, *pair_of(comparison)), place)
        if other is not place:
            found.append((other, place))
    if not found:
        return []
    other, place = found[0]
    return [
        f"{place[0]}:{place[1]}: repeats {_also(place, other)}: same client, same answers, same choice; "
        f"{len(found)} such comparisons, all are kept, this is the first"
    ]


def _shared_pairs(kept: list[Located]) -> list[str]:
    """Pairs that one client trains on and another is tested on: allowed, since each client is its own person."""
    trained: set[tuple[str, str, str]] = set()
    held_out: set[tuple[str, str, str]] = set()
    for _, comparison in kept:
        (trained if comparison.split in (None, "train") else held_out).add(pair_of(comparison))
    if not any(comparison.split for _, comparison in kept) or not trained & held_out:
        return []
    return [
        f"{len(trained & held_out)} pairs of answers are in train of one client and in validation or test of another; "
        "fine if each client's own judgement is what is predicted"
    ]


def _partly_split(kept: list[Located]) -> list[str]:
    missing = [place for place, comparison in kept if comparison.split is None]
    if not missing or len(missing) == len(kept):
        return []
    return [
        f"{missing[0][0]}:{missing[0][1]}: split: missing here and in {len(missing) - 1} other comparisons, while "
        "others have one; they count as train"
    ]
