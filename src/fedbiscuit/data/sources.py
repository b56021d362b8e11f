"""Where comparisons come from: a name in the settings to clients, prompts and their truth, if it is known.

To add a data set of comparisons, add a line to ``FORMATS`` in ``formats.py`` and one to the dict at the foot here. One that
needs more than that is a function (settings, seed) -> Dataset of its own.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedbiscuit.config import DataSettings
from fedbiscuit.data.comparisons import ReadReport, read_comparisons
from fedbiscuit.data.files import RECORDS, Part, iter_records, parts_of
from fedbiscuit.data.formats import BATCHES, FORMATS, prompt_of
from fedbiscuit.data.hub import HUB
from fedbiscuit.data.jsonlines import iter_lines
from fedbiscuit.data.partition import divide
from fedbiscuit.data.records import EmptyTextError, LeftOutError, required_text
from fedbiscuit.types import ClientData, ClientId, Comparison, ConfigError, DataError, seed_for

if TYPE_CHECKING:
    from fedbiscuit.data.synthetic import Truth

__all__ = ["SOURCES", "Dataset", "filtered_tldr", "load", "read_prompts", "split_prompts"]

HELD_OUT_PROMPTS = 0.2
UNLABELED_SHARE = 0.4
"""TL;DR: of the posts in no comparison the last 40% are prompts, as in the paper (docs/algorithm.md section 7)."""
TLDR_FIELDS = ("post", "title", "subreddit")
TLDR_FILES = ("train", "valid", "test")


@dataclass(frozen=True)
class Dataset:
    """All that a run needs of people's data.

    ``prompts`` are for training the policy, ``held_out_prompts`` for evaluating it. ``left_out`` counts by reason, with
    the unit in the reason. ``digests`` is sha256 by file. ``fields`` has what a template may show of a prompt beside its text,
    by prompt. ``truth`` is known for the demo only. ``no_others`` says why the prompts are those of the comparisons where they
    should be others; empty where all is as it should be.
    """

    clients: dict[ClientId, ClientData]
    prompts: tuple[str, ...]
    held_out_prompts: tuple[str, ...]
    left_out: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    fields: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    truth: Truth | None = None
    no_others: str = ""


def load(settings: DataSettings, seed: int) -> Dataset:
    """The data set that the settings name, shared out to clients, with prompts for the alignment.

    Raises ``ConfigError`` for settings that cannot be and ``DataError`` for files that are wrong.
    """
    dataset = SOURCES[settings.source](settings, seed)
    if not settings.prompts:
        return dataset
    prompts, digests, left_out = read_prompts(settings)
    dataset = replace(dataset, digests=dataset.digests | digests, left_out=dataset.left_out | left_out)
    trained = {comparison.prompt for data in dataset.clients.values() for comparison in data.train}
    if shared := len(trained.intersection(prompts)):
        dataset.warnings.append(f"{shared} of the prompts in {settings.prompts} are in training comparisons too")
    return _with_prompts(dataset, prompts, seed)


def split_prompts(
    prompts: Iterable[str], seed: int, share: float = HELD_OUT_PROMPTS
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Distinct prompts for training and, about a ``share``, held out; each decided by a hash of its own text.

    So a prompt stays on its side when others come or go. Each side has at least one; a single prompt is on both.
    """
    distinct = list(dict.fromkeys(prompts))
    if len(distinct) < 2:
        return tuple(distinct), tuple(distinct)
    draw = {prompt: seed_for(seed, "held-out prompts", prompt) / 2**63 for prompt in distinct}
    ranked = sorted(distinct, key=draw.__getitem__)
    num_held_out = min(max(1, sum(number < share for number in draw.values())), len(distinct) - 1)
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
    if any(path.startswith(HUB) for path in settings.path):
        raise ConfigError(
            f"data.path: jsonl reads files; for {HUB}... set data.source to trl, or to the name of the set"
        )
    comparisons, report = read_comparisons(settings.path, drop_empty=settings.drop_empty, strict=settings.strict)
    return _shared_out(comparisons, report, settings, seed)


def _published(settings: DataSettings, seed: int) -> Dataset:
    """A data set of ``FORMATS``, from its files or from the Hub."""
    comparisons, report = _read_published(settings)
    return _shared_out(comparisons, report, settings, seed)


def _tldr(settings: DataSettings, seed: int) -> Dataset:
    """Comparisons of OpenAI's summarize-from-feedback: batches 3 to 20 and 22. Posts that nobody compared are prompts."""
    compared: set[str] = set()
    comparisons, report = _read_published(settings, compared)
    dataset = _shared_out(comparisons, report, settings, seed)
    posts, digests, lacking = _filtered_posts(settings, compared)
    later = dict(islice(posts.items(), _first_unlabeled(posts), None))
    fields = {post: {key: known[key] for key in TLDR_FIELDS} for post, known in later.items()}
    dataset = replace(
        dataset,
        digests=dataset.digests | digests,
        fields={**dataset.fields, **fields},
        warnings=[*dataset.warnings, *lacking],
    )
    if later:
        return _with_prompts(dataset, later, seed)
    if settings.prompts:
        return dataset
    told = (
        f"data.path: {', '.join(settings.path)}: no post that is in no comparison, so the prompts are the compared posts, on "
        "which selectors are trained; put train.jsonl, valid.jsonl and test.jsonl of tldr_3_filtered into a folder, and name "
        "it in data.path too"
    )
    return replace(dataset, warnings=[*dataset.warnings, told], no_others=told)


def _tldr_sft(settings: DataSettings, seed: int) -> Dataset:
    """TL;DR's own summaries, for supervised fine-tuning: of the posts in no comparison the first 60%; the others are prompts.

    A summary stands as A, preferred, against nothing: what objective sft reads of a comparison is the preferred answer.
    """
    wants = "the files train.jsonl, valid.jsonl, test.jsonl of tldr_3_filtered, and batch3.json to batch22.json"
    folders = [path for path in settings.path if not path.startswith(HUB)]
    if not folders:
        raise ConfigError(
            f"data.path: tldr_sft wants a folder with {wants}; the batches may come from the Hub beside it, as "
            "[hub:OWNER/NAME/comparisons, FOLDER]"
        )
    there = {part.name for folder in folders for part in parts_of(folder, "data.path", wants)}
    report = ReadReport({}, 0)
    compared: set[str] = set()
    if len(folders) == len(settings.path) and BATCHES.isdisjoint(there):
        report.warnings.append(
            f"{', '.join(folders)}: no comparisons there, so posts that people compared are not left out"
        )
    else:
        _, report = _read_published(settings.model_copy(update={"source": "tldr"}), compared)
    posts, digests, lacking = _filtered_posts(settings, compared)
    if not posts:
        raise DataError(f"{', '.join(folders)}: no post that is in no comparison; put there {wants}")
    first = _first_unlabeled(posts)
    texts = {post: {key: known[key] for key in TLDR_FIELDS} for post, known in posts.items()}
    summaries = [
        Comparison(post, known["summary"].strip(), "", 0, domain=known["subreddit"], meta={"fields": texts[post]})
        for post, known in islice(posts.items(), first)
        if known["summary"].strip()
    ]
    left_out = {"posts with an empty summary": first - len(summaries)} if len(summaries) < first else {}
    report = ReadReport(report.files | digests, len(summaries), left_out, [*report.warnings, *lacking])
    dataset = replace(_shared_out(summaries, report, settings, seed), fields=texts)
    return _with_prompts(dataset, islice(posts, first, None), seed)


# Helpers


def _read_published(settings: DataSettings, compared: set[str] | None = None) -> tuple[list[Comparison], ReadReport]:
    """The comparisons of a data set of ``FORMATS``, all its parts together.

    ``compared`` gets the posts of TL;DR's records, also of those that are left out: people saw them all the same.
    """
    form = FORMATS[settings.source]
    if not settings.path:
        raise ConfigError(
            f"data.path: empty; {settings.source} wants a folder with {form.wants}, or a set on the Hub, as hub:OWNER/NAME"
        )
    parts: dict[str, Part] = {}
    for reference in _with_comparisons(settings):
        splits = form.splits if reference.startswith(HUB) and form.splits else form.parts
        parts |= {part.path: part for part in parts_of(reference, "data.path", form.wants, splits)}

    def convert(record: Mapping[str, Any], path: str) -> Comparison:
        info = record.get("info")
        if compared is not None and isinstance(info, dict) and isinstance(info.get("post"), str):
            compared.add(info["post"])
        return form.convert(record, parts[path], settings.columns)

    comparisons, report = read_comparisons(
        parts,
        drop_empty=settings.drop_empty,
        strict=settings.strict,
        convert=convert,
        separate_splits=False,
        read=iter_records,
    )
    missing = sorted((form.parts or frozenset()) - {part.name for part in parts.values()}, key=_number_in)
    if settings.source == "tldr" and missing and not any(path.startswith(HUB) for path in settings.path):
        report.warnings.append(
            f"{', '.join(settings.path)}: batches not there: {', '.join(str(_number_in(name)) for name in missing)}; the "
            "paper uses all of 3 to 20 and 22"
        )
    return comparisons, report


def _with_comparisons(settings: DataSettings) -> Sequence[str]:
    """The places of ``data.path``, of TL;DR without the folders that have its filtered posts and no batch."""
    if settings.source != "tldr":
        return settings.path
    alone = [path for path in settings.path if filtered_tldr([path]) and BATCHES.isdisjoint(_names_in(path))]
    return [path for path in settings.path if path not in alone] or settings.path


def _names_in(folder: str) -> set[str]:
    return {part.name for part in parts_of(folder, "data.path", FORMATS["tldr"].wants)}


def _number_in(name: str) -> int:
    found = re.search(r"\d+", name)
    return int(found[0]) if found else 0


def _first_unlabeled(posts: Sized) -> int:
    return int(len(posts) * (1 - UNLABELED_SHARE))


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


def read_prompts(settings: DataSettings) -> tuple[list[str], dict[str, str], dict[str, int]]:
    """Prompts of ``data.prompts``; sha256 by file; and how many were left out, by reason.

    Of a folder or a set on the Hub the training part, unless the setting says which.
    """
    place = settings.prompts
    if Path(place).is_file() and RECORDS.fullmatch(Path(place).name) is None:
        return *_prompt_lines(place), {}
    parts = parts_of(
        place, "data.prompts", "a file of prompts: .txt, one a line, or .jsonl, .json, .parquet with `prompt`"
    )
    if "@" not in place or Path(place).exists():
        parts = [part for part in parts if part.split == "train"] or parts
    prompts: list[str] = []
    digests: dict[str, str] = {}
    left_out: dict[str, int] = {}
    for part in parts:
        digest = hashlib.sha256()
        for number, record in iter_records(part.path, digest):
            try:
                if isinstance(record, DataError):
                    raise record
                prompts.append(prompt_of(record, settings.prompt_column))
            except LeftOutError as reason:
                left_out[str(reason)] = left_out.get(str(reason), 0) + 1
            except DataError as error:
                if not (isinstance(error, EmptyTextError) and settings.drop_empty):
                    raise DataError(f"{part.path}:{number}: {error}") from None
                left_out["prompts that are empty"] = left_out.get("prompts that are empty", 0) + 1
        digests[part.path] = digest.hexdigest()
    if not prompts:
        raise DataError(f"{place}: no prompt in it; write one a line, or use .jsonl with `prompt`")
    return prompts, digests, left_out


def _prompt_lines(path: str) -> tuple[list[str], dict[str, str]]:
    """The lines of a text file that are not blank, and its sha256."""
    digest = hashlib.sha256()
    prompts = []
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


def filtered_tldr(paths: Iterable[str]) -> list[Part]:
    """train, valid and test of OpenAI's filtered TL;DR, which has summaries by people, in these folders or below them."""
    folders = [path for path in paths if Path(path).is_dir()]
    wants = FORMATS["tldr"].wants
    named = [part for folder in folders for part in parts_of(folder, "data.path", wants) if part.name in TLDR_FILES]
    # A train.json is another set's, such as SHP's.
    found = [part for part in named if ".json" not in Path(part.path).suffixes]
    return sorted(found, key=lambda part: TLDR_FILES.index(part.name))


def _filtered_posts(
    settings: DataSettings, seen: Container[str]
) -> tuple[dict[str, dict[str, str]], dict[str, str], list[str]]:
    """Posts of the filtered TL;DR data that are not ``seen``, in their order, with all their texts; none without its files.

    Also the files' digests, and a warning where some of its files are there and others are not.
    """
    posts: dict[str, dict[str, str]] = {}
    digests: dict[str, str] = {}
    found = filtered_tldr(settings.path)
    for part in found:
        digest = hashlib.sha256()
        for number, record in iter_records(part.path, digest):
            try:
                if isinstance(record, DataError):
                    raise record
                texts = {key: required_text(record, key) for key in (*TLDR_FIELDS, "summary")}
            except DataError as error:
                raise DataError(f"{part.path}:{number}: {error}") from None
            if texts["post"] not in seen and texts["post"].strip():
                posts.setdefault(texts["post"], texts)
        digests[part.path] = digest.hexdigest()
    there = {part.name for part in found}
    lacking = [f"{name}.jsonl" for name in TLDR_FILES if found and name not in there]
    told = f"{', '.join(settings.path)}: {', '.join(lacking)} of tldr_3_filtered not there; the paper uses the posts of all three"
    return posts, digests, [told] if lacking else []


SOURCES: dict[str, Callable[[DataSettings, int], Dataset]] = {
    "demo": _demo,
    "jsonl": _jsonl,
    "tldr": _tldr,
    "shp": _published,
    "tldr_sft": _tldr_sft,
    "hh": _published,
    "ultrafeedback": _published,
    "alpacafarm": _published,
    "trl": _published,
}
