"""Where records come from: files and folders as their makers publish them, or a set on the Hugging Face Hub.

JSON lines, one JSON array, or parquet; JSON also packed by gzip or xz.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedbiscuit.data.hub import HUB, hub_rows, hub_splits
from fedbiscuit.data.jsonlines import BLOCK_BYTES, check_texts, is_array, iter_array, iter_objects
from fedbiscuit.data.records import SPLITS, LeftOutError
from fedbiscuit.types import DataError, EnvironmentFault

__all__ = ["RECORDS", "Part", "iter_records", "parts_of"]

RECORDS = re.compile(r"(?P<name>.+?)(-\d+-of-\d+)?\.(jsonl?(\.(gz|xz))?|parquet)")
"""Names of files with records. What stands before -00000-of-00001 or the first ending is the name of the part."""
UNREADABLE = "records with characters that are none"


@dataclass(frozen=True, slots=True)
class Part:
    """Records that belong together, for ``iter_records``: a file, or one split of a set on the Hub.

    name: what it is called by its makers, such as train, test_prefs or batch3. folder: the folder or configuration it is in.
    """

    path: str
    name: str
    folder: str

    @property
    def split(self) -> str | None:
        """``train_prefs`` is train; a part that is called otherwise has no split."""
        return SPLITS.get(re.split(r"[_.-]", self.name)[0])


def parts_of(reference: str, key: str, wants: str, known: Container[str] | None = None) -> list[Part]:
    """The parts of a file, a folder with all below it, or ``hub:OWNER/NAME/CONFIG``; ``@A+B`` behind: only those parts.

    Of a folder and of a set on the Hub only parts with a ``known`` name, if given. ``key`` and ``wants`` say in errors which
    setting this is and which files belong there.
    """
    place, splits = reference, ""
    if "@" in reference and not Path(reference).exists():
        place, _, splits = reference.rpartition("@")
    if place.startswith(HUB):
        names = hub_splits(place, f"or put {wants} into a folder and name it in {key}")
        found = [Part(f"{place}@{name}", name, place.rpartition("/")[2]) for name in names]
    elif Path(place).is_dir():
        found = [_part(path) for path in sorted(Path(place).rglob("*")) if _holds_records(path, Path(place))]
    elif Path(place).exists():
        found = [_part(Path(place))]
    else:
        raise DataError(f"{place}: no such file or folder; put there {wants}, or name another in {key}")
    if known is not None and not Path(place).is_file():
        found = [part for part in found if part.name in known]
    if not found:
        raise DataError(f"{place}: nothing in it that is wanted here; put there {wants}")
    wanted = splits.split("+") if splits else [part.name for part in found]
    if missing := sorted(set(wanted) - {part.name for part in found}):
        raise DataError(f"{reference}: no part {missing[0]!r}; there are {', '.join(sorted({p.name for p in found}))}")
    return [part for part in found if part.name in wanted]


def iter_records(path: str | Path, digest: Any = None) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    """The records of a part with their line or row, as ``iter_objects``; ``digest`` is fed with the file or the rows.

    Rows of tables with broken characters come as a ``LeftOutError``: nobody can mend a public table.
    """
    text = str(path)
    if text.startswith(HUB):
        place, _, split = text.rpartition("@")
        yield from _checked(hub_rows(place, split), digest)
    elif text.endswith(".parquet"):
        if digest is not None:
            _feed(digest, Path(path))
        yield from _checked(_parquet_rows(text), None)
    elif is_array(path):
        yield from iter_array(path, digest)
    else:
        yield from iter_objects(path, digest)


def _part(path: Path) -> Part:
    """``train-00000-of-00001.parquet`` is train, and so is ``train/0000.parquet``."""
    found = RECORDS.fullmatch(path.name)
    name = found["name"] if found else path.stem
    if name.isdigit():
        return Part(str(path), path.parent.name, path.parent.parent.name)
    return Part(str(path), name, path.parent.name)


def _holds_records(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return not hidden and path.is_file() and RECORDS.fullmatch(path.name) is not None


def _checked(rows: Iterable[dict[str, Any]], digest: Any) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    for number, row in enumerate(rows, 1):
        if digest is not None:
            line = json.dumps(row, sort_keys=True, ensure_ascii=True, default=str)
            digest.update(line.encode("ascii") + b"\n")
        try:
            check_texts(row)
        except DataError:
            yield number, LeftOutError(UNREADABLE)
        else:
            yield number, row


def _parquet_rows(path: str) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise EnvironmentFault(
            f"{path}: reading parquet needs the package pyarrow; install it: pip install 'fedbiscuit[hub]'"
        ) from None
    try:
        with ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a parquet file that can be read ({error}); copy it again") from None


def _feed(digest: Any, path: Path) -> None:
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
