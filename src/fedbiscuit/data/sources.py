"""Where comparisons come from: a name in the settings to clients, prompts and their truth, if it is known.

To add a data set, write one function (settings, seed) -> Dataset and put it into the dict at the foot.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedbiscuit.config import DataSettings
from fedbiscuit.data.comparisons import ReadReport, read_comparisons
from fedbiscuit.data.jsonlines import iter_lines, iter_objects, shown
from fedbiscuit.data.partition import divide
from fedbiscuit.data.records import SPLITS, EmptyTextError, client_of, prompt_of, required_text
from fedbiscuit.types import ClientData, ClientId, Comparison, ConfigError, DataError, seed_for

if TYPE_CHECKING:
    from fedbiscuit.data.synthetic import Truth

__all__ = ["SOURCES", "Dataset", "load", "split_prompts"]

HELD_OUT_PROMPTS = 0.2
UNLABELED_SHARE = 0.4
"""TL;DR: of the posts in no comparison the last 40% are prompts, as in the paper (docs/algorithm.md section 7)."""


@dataclass(frozen=True)
class Dataset:
    """All that a run needs of people's data.

    ``prompts`` are for training the policy, ``held_out_prompts`` for evaluating it. ``left_out`` counts by reason, with
    the unit in the reason. ``digests`` is sha256 by file. ``fields`` has what a template may show of a prompt beside its text,
    by prompt. ``truth`` is known for the demo only.
    """

    clients: dict[ClientId, ClientData]
    prompts: tuple[str, ...]
    held_out_prompts: tuple[str, ...]
    left_out: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    fields: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    truth: Truth | None = None


def load(settings: DataSettings, seed: int) -> Dataset:
    """The data set that the settings name, shared out to clients, with prompts for the alignment.

    Raises ``ConfigError`` for settings that cannot be and ``DataError`` for files that are wrong.
    """
    dataset = SOURCES[settings.source](settings, seed)
    if not settings.prompts:
        return dataset
    prompts, digests = _read_prompts(settings.prompts)
    return _with_prompts(replace(dataset, digests=dataset.digests | digests), prompts, seed)


def split_prompts(prompts: Iterable[str], seed: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Distinct prompts for training and, about a fifth, held out; each decided by a hash of its own text.

    So a prompt stays on its side when others come or go. Each side has at least one; a single prompt is on both.
    """
    distinct = list(dict.fromkeys(prompts))
    if len(distinct) < 2:
        return tuple(distinct), tuple(distinct)
    draw = {prompt: seed_for(seed, "held-out prompts", prompt) / 2**63 for prompt in distinct}
    ranked = sorted(distinct, key=draw.__getitem__)
    num_held_out = min(max(1, sum(number < HELD_OUT_PROMPTS for number in draw.values())), len(distinct) - 1)
    held_out = set(ranked[:num_held_out])
    return (
        tuple(prompt for prompt in distinct if prompt not in held_out),
        tuple(prompt for prompt in distinct if prompt in held_out),
    )


# Sources


def _demo(settings: DataSettings, seed: int) -> Dataset:
    from fedbiscuit.data.synthetic import demo_world

    if settings.path:
        raise ConfigError(
            "data.path: the demo world is built in and reads no files; set data.source to jsonl, or drop the path"
        )
    if settings.partition.by != "annotator" or settings.partition.num_clients:
        raise ConfigError("data.partition: the demo world has its clients already; set data.demo.num_clients instead")
    world = demo_world(settings.demo, seed)
    return Dataset(world.clients, tuple(world.prompts), tuple(world.held_out_prompts), truth=world.truth)


def _jsonl(settings: DataSettings, seed: int) -> Dataset:
    if not settings.path and settings.prompts:  # nobody to learn from: other selectors label (labels.selectors)
        return Dataset({}, (), ())
    if not settings.path:
        raise ConfigError("data.path: empty; name the files with the comparisons, such as data.path=[mine.jsonl]")
    comparisons, report = read_comparisons(settings.path, drop_empty=settings.drop_empty, strict=settings.strict)
    return _shared_out(comparisons, report, settings, seed)


def _tldr(settings: DataSettings, seed: int) -> Dataset:
    """Comparisons of OpenAI's summarize-from-feedback: batches 3 to 20 and 22."""
    folder = _folder(
        settings,
        "the files batch3.json to batch20.json and batch22.json of OpenAI's summarize-from-feedback comparisons; for "
        "prompts also train.jsonl, valid.jsonl, test.jsonl of its tldr_3_filtered, if you have them",
    )
    numbers = [*range(3, 21), 22]
    files = [path for number in numbers if (path := _either(folder, f"batch{number}")) is not None]
    if not files:
        raise DataError(f"{folder}: no file batch3.json to batch20.json or batch22.json; put the comparisons there")
    comparisons, report = read_comparisons(
        files, drop_empty=settings.drop_empty, strict=settings.strict, convert=_tldr_comparison, separate_splits=False
    )
    missing = [number for number in numbers if _either(folder, f"batch{number}") is None]
    if missing:
        report.warnings.append(
            f"{folder}: batches not there: {', '.join(map(str, missing))}; the paper uses all of 3 to 20 and 22"
        )
    dataset = _shared_out(comparisons, report, settings, seed)
    posts, digests = _unlabeled_posts(folder, {comparison.prompt for comparison in comparisons})
    dataset = replace(dataset, digests=dataset.digests | digests, fields={**dataset.fields, **posts})
    return _with_prompts(dataset, posts, seed) if posts else dataset


def _shp(settings: DataSettings, seed: int) -> Dataset:
    """The Stanford Human Preferences: train, validation and test files, flat or one folder a subreddit."""
    folder = _folder(
        settings, "the Stanford Human Preferences as they come: SUBREDDIT/train.json, validation.json, test.json"
    )
    pattern = re.compile(r"(train|validation|test)\.jsonl?(\.gz)?")
    files = sorted(path for path in folder.rglob("*") if pattern.fullmatch(path.name))
    if not files:
        raise DataError(
            f"{folder}: no train.json, validation.json or test.json (or .jsonl, .gz), here or in folders below"
        )
    comparisons: list[Comparison] = []
    total = ReadReport({}, 0)
    for path in files:
        split = path.name.split(".")[0]
        some, report = read_comparisons(
            path,
            drop_empty=settings.drop_empty,
            strict=settings.strict,
            convert=lambda record, split=split: _shp_comparison(record, split),  # type: ignore[misc]
        )
        comparisons += some
        total = _merged(total, report)
    return _shared_out(comparisons, total, settings, seed)


def _tldr_comparison(record: Mapping[str, Any]) -> Comparison:
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
        if not text.strip():
            raise EmptyTextError(f"{key}: empty; leave such comparisons out with data.drop_empty")
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


def _shp_comparison(record: Mapping[str, Any], split: str) -> Comparison:
    texts = {key: required_text(record, key) for key in ("history", "human_ref_A", "human_ref_B")}
    for key, text in texts.items():
        if not text.strip():
            raise EmptyTextError(f"{key}: empty; leave such comparisons out with data.drop_empty")
    a_is_better = _zero_or_one(record, "labels")
    return Comparison(
        texts["history"],
        texts["human_ref_A"],
        texts["human_ref_B"],
        0 if a_is_better else 1,
        domain=re.sub(r"_(train|validation|test)\Z", "", required_text(record, "domain")),
        split=SPLITS[split],
        meta={"post_id": required_text(record, "post_id")},
    )


def _zero_or_one(record: Mapping[str, Any], key: str) -> Literal[0, 1]:
    value = record.get(key)
    if type(value) is not int or value not in (0, 1):
        raise DataError(f"{key}: expected the integer 0 or 1, got {shown(value)}")
    return 1 if value else 0


# Helpers


def _shared_out(comparisons: Sequence[Comparison], report: ReadReport, settings: DataSettings, seed: int) -> Dataset:
    division = divide(comparisons, settings.partition, seed, settings.val_fraction)
    dataset = Dataset(
        division.clients,
        (),
        (),
        report.left_out | division.left_out,
        report.warnings + division.warnings,
        report.files,
        {comparison.prompt: comparison.meta["fields"] for comparison in comparisons if "fields" in comparison.meta},
    )
    return _with_prompts(dataset, [comparison.prompt for comparison in comparisons], seed)


def _with_prompts(dataset: Dataset, prompts: Iterable[str], seed: int) -> Dataset:
    train, held_out = split_prompts(prompts, seed)
    warnings = [message for message in dataset.warnings if message != _ONE_PROMPT]
    if len(train) == len(held_out) == 1 and train == held_out:
        warnings.append(_ONE_PROMPT)
    return replace(dataset, prompts=train, held_out_prompts=held_out, warnings=warnings)


_ONE_PROMPT = (
    "there is only one prompt, so the policy is evaluated on the prompt that it was trained on; set data.prompts"
)


def _read_prompts(path: str) -> tuple[list[str], dict[str, str]]:
    """Prompts of a .jsonl (`prompt`) or, one a line, a text file; and its sha256."""
    digest = hashlib.sha256()
    prompts = []
    if re.search(r"\.jsonl(\.gz)?\Z", path):
        for number, record in iter_objects(path, digest):
            try:
                if isinstance(record, DataError):
                    raise record
                prompts.append(prompt_of(record))
            except DataError as error:
                raise DataError(f"{path}:{number}: {error}") from None
    else:
        for number, line in iter_lines(path, digest):
            if isinstance(line, DataError):
                raise DataError(f"{path}:{number}: {line}")
            try:
                text = line.decode("utf-8").strip()
            except UnicodeDecodeError as error:
                raise DataError(f"{path}:{number}: byte {error.start + 1}: not UTF-8; save the file as UTF-8") from None
            if "\x00" in text:
                raise DataError(f"{path}:{number}: NUL character; remove it, one prompt a line")
            prompts += [text] if text else []
    if not prompts:
        raise DataError(f"{path}: no prompt in it; write one a line, or use .jsonl with `prompt`")
    return prompts, {path: digest.hexdigest()}


def _unlabeled_posts(folder: Path, seen: Container[str]) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Posts of the filtered TL;DR data that are in no comparison, the last part of them, with the fields of each; none
    without its files.
    """
    posts: dict[str, dict[str, str]] = {}
    digests: dict[str, str] = {}
    for name in ("train", "valid", "test"):
        path = _either(folder, name) or _either(folder / "tldr_3_filtered", name)
        if path is None:
            continue
        digest = hashlib.sha256()
        for number, record in iter_objects(path, digest):
            try:
                if isinstance(record, DataError):
                    raise record
                fields = {key: required_text(record, key) for key in ("post", "title", "subreddit")}
            except DataError as error:
                raise DataError(f"{path}:{number}: {error}") from None
            if fields["post"] not in seen and fields["post"].strip():
                posts.setdefault(fields["post"], fields)
        digests[str(path)] = digest.hexdigest()
    first = int(len(posts) * (1 - UNLABELED_SHARE))
    return dict(islice(posts.items(), first, None)), digests


def _folder(settings: DataSettings, content: str) -> Path:
    if len(settings.path) != 1:
        raise ConfigError(
            f"data.path: {len(settings.path)} paths; {settings.source} wants one, a folder with {content}"
        )
    folder = Path(settings.path[0])
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; put there {content}")
    return folder


def _either(folder: Path, stem: str) -> Path | None:
    """The file of this name, as .json or .jsonl, plain or compressed."""
    names = (f"{stem}{suffix}" for suffix in (".json", ".jsonl", ".json.gz", ".jsonl.gz"))
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _merged(first: ReadReport, second: ReadReport) -> ReadReport:
    reasons = first.left_out | second.left_out
    return ReadReport(
        first.files | second.files,
        first.num_read + second.num_read,
        {reason: first.left_out.get(reason, 0) + second.left_out.get(reason, 0) for reason in reasons},
        first.warnings + second.warnings,
    )


SOURCES: dict[str, Callable[[DataSettings, int], Dataset]] = {
    "demo": _demo,
    "jsonl": _jsonl,
    "tldr": _tldr,
    "shp": _shp,
}
