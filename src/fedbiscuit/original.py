"""The settings of the original FedBiscuit, translated: an old YAML file means here what it meant there.

``KEYS`` is the table: every key that its published experiments use, with the original's default. What an old file does (train
selectors, a baseline, or align a policy) its ``data.type`` says.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from fedbiscuit.schema import shown
from fedbiscuit.strict_yaml import KeyPath
from fedbiscuit.types import ConfigError

__all__ = ["KEYS", "Key", "Translation", "is_original", "translate"]

Old = Mapping[str, Any]
"""Old dotted key -> value, defaults filled in; ``job`` and ``source`` stand in it too, as ``DATA`` says."""


@dataclass(frozen=True, slots=True)
class Key:
    """One old key. train, align: our key in files that train and in files that align. Without a default it may be missing."""

    kind: type
    default: Any
    train: str = ""
    align: str = ""
    convert: Callable[[Any, Old], Any] = lambda value, old: value
    why: str = ""
    """Why it has no effect of its own; empty where it has one, or is read together with another key."""
    idle: Callable[[Old], str] = lambda old: ""
    """Why it has none in this file; empty where it has one."""


@dataclass(frozen=True, slots=True)
class Translation:
    """Our settings as a tree; from which old key each comes; and what the user should know, a line each."""

    values: dict[str, Any]
    sources: dict[KeyPath, KeyPath]
    notes: tuple[str, ...]


DATA = {
    "reddit-tldr-comparison-choice": ("choice", "tldr"),
    "reddit-tldr-comparison": ("dpo", "tldr"),
    "reddit-tldr-best": ("sft", "tldr"),
    "reddit-tldr-finetuning": ("sft", "tldr_sft"),
    "reddit-tldr-rlhf": ("align", "tldr"),
    "shp-comparison": ("choice", "shp"),
    "shp-comparison-pairs": ("dpo", "shp"),
    "shp-best": ("sft", "shp"),
    "shp-rlhf": ("align", "jsonl"),
    "shp-safe": ("align", "jsonl"),
}
"""Value of ``data.type`` before the @ -> what the file does, and our source (jsonl: prompts alone, as ``ASKED`` says)."""
ASKED = {
    "shp-rlhf": ("{root}@validation+test", "the questions of SHP that no selector is trained on, as there"),
    "shp-safe": ("hub:PKU-Alignment/PKU-SafeRLHF-prompt", "as there; without a network name a folder with its files"),
}
"""Value of ``data.type`` -> our ``data.prompts``, and what to know about it."""
TEMPLATES = {"tldr_sft": "tldr", "jsonl": "shp"}
"""Our source -> template, where it is not called like the source."""

TRAINERS = {
    "llmrewardchoicetrainer": ("choice",),
    "llmdporewardtrainer": ("dpo",),
    "llmrewardtrainer": ("dpo",),
    "llmtrainer": ("sft",),
}

SPLITTERS = {"meta": "annotator", "lda": "dirichlet", "iid": "iid", "": "iid"}
SUMMARIZE = "Summarize the forum post below in one or two sentences."


def is_original(values: Any) -> bool:
    """Whether a config file has the original's keys: one of its sections that ours does not have."""
    own = {key.partition(".")[0] for key in KEYS} - {"data", "model"}
    return isinstance(values, dict) and not own.isdisjoint(values)


def translate(values: Mapping[str, Any], places: Mapping[KeyPath, str], name: str, fill: str = "") -> Translation:
    """An old file in our keys. ``places``: key path -> FILE:LINE or "command line". ``fill``: for placeholders in names.

    Raises ``ConfigError`` with a line for each unknown key, value that was never one, and placeholder left in.
    """

    def place(key: str) -> str:
        path = tuple(key.split("."))
        above = (path[:end] for end in range(len(path), 0, -1))
        return next((places[part] for part in above if part in places), name)

    found = dict(_leaves(values))
    if fill:
        found |= {key: PLACEHOLDER.sub(fill, found[key]) for key in NAMES if isinstance(found.get(key), str)}
    problems = [f"{place(key)}: {key}: {told}" for key, value in found.items() for told in _wrong(key, value)]
    problems += [f"{name}: {key}: missing; {NEEDED[key]}" for key in NEEDED if key not in found]
    if problems:
        raise ConfigError("\n".join(problems))
    old = {key: known.default for key, known in KEYS.items()} | found
    job, source = DATA[_before_at(old["data.type"])]
    old |= {"job": job, "source": source}
    for key, told in _contradictions(old):
        raise ConfigError(f"{place(key)}: {key}: {told}")
    ours: dict[str, Any] = {}
    sources: dict[KeyPath, KeyPath] = {}
    notes = []
    for key, known in KEYS.items():
        target = known.align if job == "align" else known.train
        if idle := known.idle(old):
            notes += [f"{key}: no effect here: {idle}"] if key in found else []
        elif target and old[key] is not None:
            ours[target] = known.convert(old[key], old)
            sources[tuple(target.split("."))] = tuple(key.split("."))
        elif key in found and (known.why or known.train):
            files = "in files that align" if job == "align" else "here"
            notes.append(f"{key}: no effect {files if known.train else 'here'}{': ' if known.why else ''}{known.why}")
        if key in NAMES and key in found and (left := PLACEHOLDER.search(found[key])):
            notes.append(f"{key}: {left[0]} is a placeholder that was left in; the name goes without it")
    for key, value, why in _implied(old):
        ours[key] = value
        notes.append(f"{key}: {shown(value)}: {why}")
    return Translation(_tree(ours), sources, tuple(notes))


def _implied(old: Old) -> Iterator[tuple[str, Any, str]]:
    """Our settings that no single old key gives: key, value, why."""
    job, training = old["job"], "alignment" if old["job"] == "align" else LOCAL
    kind, source = _before_at(old["data.type"]), old["source"]
    yield (
        "data.template",
        TEMPLATES.get(source, source),
        "our own words; a file with the original's wording can stand there",
    )
    for part in (LOCAL, "alignment") if job == "choice" else (training,):
        yield f"{part}.max_grad_norm", 0.0, "the original does not clip gradients"
    if old["train.optimizer.type"].lower() == "adamw" and old["train.optimizer.weight_decay"] is None:
        yield f"{training}.weight_decay", 0.01, "what torch's AdamW takes where a file is silent"
    if kind in ASKED:
        yield "data.prompts", ASKED[kind][0].format(root=old["data.root"]), ASKED[kind][1]
    if kind == "shp-rlhf":
        yield "data.prompt_column", "history", "SHP's questions alone; a file of another set is an error"
    if source == "shp":
        yield "data.max_train_tokens", 512, "as there: longer training comparisons are left out"
    if job in ("sft", "dpo"):
        yield f"{LOCAL}.objective", job, "by data.type"
    if job == "align":
        yield "selectors.rounds", 0, "by data.type; the selectors are those of another run, named with --selector"
    yield "generation.chat", False, "the original writes to plain prompts"
    if source in ("tldr", "tldr_sft"):
        yield "generation.system", SUMMARIZE, "so that the policy knows what to do with a post; in our own words"
    if job in ("align", "choice"):
        yield (
            "labels.vote",
            "majority",
            "as there, but a tie is decided by the mean; mean is our own default (also in evaluations and exports)",
        )
    if job == "choice" and old["llm.adapter.count"] > 1:
        yield (
            "selectors.scale",
            "population",
            "as there: after the warm-up, clients that were not drawn count as no change",
        )
        yield "selectors.grouping", "greedy", "as there; prices finds better groups, and no client reports a loss"


def _contradictions(old: Old) -> Iterator[tuple[str, str]]:
    job, trainer = old["job"], old["trainer.type"]
    if trainer and job != "align" and job not in TRAINERS[trainer]:
        fitting = " or ".join(name for name, jobs in TRAINERS.items() if job in jobs)
        yield "trainer.type", f"{trainer} does not fit data.type {_before_at(old['data.type'])}, which is for {fitting}"
    if old["data.splitter"] == "meta" and old["source"] in ("shp", "tldr_sft"):
        yield "data.splitter", f"meta is by annotator, and {_before_at(old['data.type'])} names none; take lda or iid"
    if not old["llm.adapter.use"]:
        yield "llm.adapter.use", "without it the whole model is trained, which we do not do; set it to True"
    if job == "choice" and old["llm.adapter.count"] > 1 and not old["llm.adapter.grouping.use"]:
        yield "llm.adapter.grouping.use", "several adapters need groups (without, the original crashes); set it to True"


def _leaves(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values; a section whose lines are all commented out has none."""
    for key, value in values.items():
        here = f"{above}.{key}" if above else key
        if isinstance(value, Mapping):
            yield from _leaves(value, here)
        elif value is not None or here in KEYS or not any(known.startswith(f"{here}.") for known in KEYS):
            yield here, value


def _tree(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *above, last = key.split(".")
        section = tree
        for part in above:
            section = section.setdefault(part, {})
        if value is not None:
            section[last] = value
    return tree


# What an old value may be


def _wrong(key: str, value: Any) -> Iterator[str]:
    """What is wrong with one old key and its value, if anything."""
    if key not in KEYS:
        same_end = [known for known in KEYS if known.rpartition(".")[2] == key.rpartition(".")[2]]
        nearest = difflib.get_close_matches(key, same_end or KEYS, 1, 0.0)[0]
        yield f"not a key of the original that we know; the nearest is {nearest}"
    elif not _is(value, KEYS[key].kind):
        yield f"{shown(value)} is not permitted; it must be {KINDS[KEYS[key].kind]}"
    elif isinstance(value, str) and PLACEHOLDER.search(value) and key not in NAMES:
        yield f"{shown(value)} has a placeholder left in it; write what it stands for"
    elif key in CHECKS:
        yield from CHECKS[key](value)


def _is(value: Any, kind: type) -> bool:
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)


def _one_of(*permitted: str) -> Callable[[str], Iterator[str]]:
    def check(value: str) -> Iterator[str]:
        if value not in permitted:
            close = difflib.get_close_matches(value, permitted, 1)
            told = f"; did you mean {close[0]}?" if close else ""
            yield f"{shown(value)} is not permitted; it must be {' or '.join(word or 'empty' for word in permitted)}{told}"

    return check


def _at_least_one(value: int) -> Iterator[str]:
    if value < 1:
        yield f"{shown(value)} is not permitted; it must be at least 1"


def _only(permitted: Any, why: str) -> Callable[[Any], Iterator[str]]:
    def check(value: Any) -> Iterator[str]:
        if value != permitted:
            yield f"{shown(value)} is not permitted: {why}"

    return check


def _data_type(value: str) -> Iterator[str]:
    yield from _one_of(*DATA)(_before_at(value))


def _adapter(value: list[Any]) -> Iterator[str]:
    if len(value) != 1 or not isinstance(value[0], dict):
        yield f"{shown(value)}: expected a list of one adapter, such as [{{adapter_method: lora, r: 8}}]"
        return
    for key, wanted in (("adapter_package", "peft"), ("adapter_method", "lora")):
        if value[0].get(key, wanted) != wanted:
            yield f"{key} {shown(value[0][key])} is not permitted; it must be {wanted}{SUPPORTED}"
    known = ("adapter_package", "adapter_method", *LORA)
    if odd := sorted(value[0].keys() - set(known)):
        yield f"{odd[0]} is not a setting of the adapter that we know; there are {', '.join(known)}"


def _choices(value: list[Any]) -> Iterator[str]:
    if len(value) != 2 or not all(isinstance(letter, str) and letter for letter in value):
        yield f"{shown(value)}: expected two letters, such as ['A', 'B']"


def _betas(value: str) -> Iterator[str]:
    if len(_numbers(value)) != 2:
        yield f"{shown(value)}: expected two numbers, such as (0.9, 0.95)"


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.strip("()[] ").split(",")]
    except ValueError:
        return []


SUPPORTED = (
    ". Supported are LoRA, rsLoRA (use_rslora: True), FFA-LoRA (selectors.lora_aggregation: freeze_a) and QLoRA "
    "(model.quantize: nf4); docs/concepts.md says why no others"
)
PLACEHOLDER = re.compile(r"<[^<>]*>")
NAMES = ("federate.save_to", "expname")
NEEDED = {
    "data.type": f"it says what to do; one of {', '.join(DATA)}",
    "model.type": "name the model, such as google/gemma-2b@huggingface_llm",
}
KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a text", list: "a list"}
PICKLED = "checkpoints of the original are pickles, which we do not open; name a folder with the model in model.type"
CHECKS: dict[str, Callable[[Any], Iterator[str]]] = {
    "federate.mode": _one_of("standalone"),
    "federate.total_round_num": _at_least_one,
    "federate.online_aggr": _only(
        False, "with several adapters it could not be there, and here sums are always streamed"
    ),
    "data.type": _data_type,
    "data.splitter": _one_of(*SPLITTERS),
    "llm.adapter.args": _adapter,
    "model.load_from_local_pretrained_fs_config": _only("", PICKLED),
    "model.load_from_local_pretrained_model_path": _only("", PICKLED),
    "train.local_update_steps": _at_least_one,
    "train.batch_or_epoch": _only("batch", "steps are counted in batches; work out how many steps the epochs are"),
    "train.optimizer.type": lambda value: _one_of("AdamW", "SGD", "RMSprop")(value),
    "train.optimizer.betas": _betas,
    "trainer.type": _one_of(*TRAINERS),
    "trainer.choices": _choices,
}

# What an old value becomes


def _before_at(value: str) -> str:
    """``NAME@llm`` -> NAME."""
    return value.partition("@")[0]


def _run_name(path: str, old: Old) -> str | None:
    """``checkpoints/x.ckpt`` -> x; without it the last part of ``expname``."""
    last = PurePosixPath(PLACEHOLDER.sub("", path or old["expname"])).name.removesuffix(".ckpt")
    return re.sub(r"[^a-z0-9._-]+", "-", last.lower()).strip("._-")[:64] or None


def _device(use_gpu: bool, old: Old) -> str:
    return "cpu" if not use_gpu else f"cuda:{old['device']}" if old["device"] > 0 else "auto"


def _one_adapter(old: Old) -> str:
    """Why settings of warm-up and groups are idle, where they are."""
    if old["job"] == "align":
        return "a file that aligns trains no selectors"
    return "" if old["llm.adapter.count"] > 1 else "there is one adapter"


def _rounds(value: int, old: Old) -> int:
    """Rounds; in an alignment steps, of which each of its rounds has as many as a client's visit."""
    return max(value, 0) * (old["train.local_update_steps"] if old["job"] == "align" else 1)


def _lora(args: list[Any], old: Old) -> dict[str, Any]:
    """With PEFT's defaults where the file is silent."""
    return {ours: args[0].get(key, default) for key, (ours, default) in LORA.items()}


LORA = {
    "r": ("r", 8),
    "lora_alpha": ("alpha", 8),
    "lora_dropout": ("dropout", 0.0),
    "target_modules": ("target_modules", ["q_proj", "v_proj"]),
    "use_rslora": ("use_rslora", False),
}
"""Old setting of the adapter -> ours, and PEFT's default for the models that the experiments use."""

LOCAL = "selectors.local"

KEYS: dict[str, Key] = {
    "use_gpu": Key(bool, False, "model.device", "model.device", _device),
    "device": Key(int, -1, idle=lambda old: "" if old["use_gpu"] else "use_gpu is False"),
    "early_stop.patience": Key(int, 5, "selectors.patience"),
    "federate.mode": Key(str, "standalone", why="one process is what there is without Flower"),
    "federate.client_num": Key(int, 0, "data.partition.num_clients"),
    "federate.sample_client_num": Key(int, -1, "selectors.cohort_size", convert=lambda value, old: max(value, 0)),
    "federate.total_round_num": Key(int, 50, "selectors.rounds", "alignment.steps", _rounds),
    "federate.save_to": Key(str, "", "name", "name", _run_name),
    "federate.ignore_weight": Key(
        bool, False, "selectors.weights", convert=lambda value, old: "equal" if value else "examples"
    ),
    "federate.save_freq": Key(int, -1, "selectors.keep_every", "alignment.keep_every", _rounds),
    "federate.share_local_model": Key(bool, False, why="one model always serves all clients"),
    "federate.online_aggr": Key(bool, False, why="sums are always streamed"),
    "data.root": Key(
        str,
        "data",
        "data.path",
        "data.path",
        lambda value, old: None if old["source"] == "jsonl" else value,
        idle=lambda old: (
            "data.prompts says where the prompts are" if _before_at(old["data.type"]) == "shp-safe" else ""
        ),
    ),
    "data.type": Key(str, None, "data.source", "data.source", lambda value, old: old["source"]),
    "data.splits": Key(list, None, why="these data sets come in parts, which the original keeps too"),
    "data.splitter": Key(str, "", "data.partition.by", convert=lambda value, old: SPLITTERS[value]),
    "llm.rlhf": Key(bool, False, why="data.type says what is trained"),
    "llm.tok_len": Key(int, 128, "data.max_tokens"),
    "llm.max_new_token": Key(int, 60, "generation.max_new_tokens", "generation.max_new_tokens"),
    "llm.num_completions": Key(int, 2, "generation.num_completions", "generation.num_completions"),
    "llm.accelerator.use": Key(bool, False, why="model.device and model.dtype say where and how to compute"),
    "llm.chat.max_len": Key(int, 100, why="no command of the experiments reads it"),
    "llm.adapter.use": Key(bool, False),
    "llm.adapter.args": Key(list, None, "model.lora", "model.lora", _lora),
    "llm.adapter.count": Key(int, 1, "selectors.num_adapters"),
    "llm.adapter.warmup.use": Key(
        bool, False, "selectors.warmup_rounds", convert=lambda value, old: None if value else 0, idle=_one_adapter
    ),
    "llm.adapter.warmup.round": Key(
        int,
        10,
        "selectors.warmup_rounds",
        idle=lambda old: _one_adapter(old) or ("" if old["llm.adapter.warmup.use"] else "warmup.use is False"),
    ),
    "llm.adapter.grouping.use": Key(bool, False, idle=_one_adapter),
    "llm.adapter.grouping.round": Key(int, 50, "selectors.regroup_every", idle=_one_adapter),
    "llm.reward_coeff": Key(
        float,
        0.1,
        f"{LOCAL}.dpo_beta",
        "alignment.beta",
        idle=lambda old: "it is the beta of DPO" if old["job"] in ("choice", "sft") else "",
    ),
    "llm.grad_accum_step": Key(int, 1, f"{LOCAL}.grad_accum", "alignment.grad_accum"),
    "dataloader.batch_size": Key(int, 64, f"{LOCAL}.batch_size", "alignment.batch_size"),
    "model.type": Key(str, None, "model.base", "model.base", lambda value, old: _before_at(value)),
    "model.load_from_local_pretrained_fs_config": Key(str, "", why="empty"),
    "model.load_from_local_pretrained_model_path": Key(str, "", why="empty"),
    "train.local_update_steps": Key(
        int,
        1,
        f"{LOCAL}.steps",
        "alignment.steps",
        lambda value, old: value * (old["federate.total_round_num"] if old["job"] == "align" else 1),
    ),
    "train.batch_or_epoch": Key(str, "batch", why="steps are always counted in batches"),
    "train.optimizer.type": Key(
        str, "SGD", f"{LOCAL}.optimizer", "alignment.optimizer", lambda value, old: value.lower()
    ),
    "train.optimizer.lr": Key(float, 0.1, f"{LOCAL}.lr", "alignment.lr"),
    "train.optimizer.betas": Key(
        str,
        "(0.9, 0.999)",
        f"{LOCAL}.betas",
        "alignment.betas",
        lambda value, old: _numbers(value),
        idle=lambda old: "" if old["train.optimizer.type"] == "AdamW" else "only AdamW has betas",
    ),
    "train.optimizer.weight_decay": Key(float, None, f"{LOCAL}.weight_decay", "alignment.weight_decay"),
    "train.is_enable_half": Key(
        bool, False, "model.dtype", "model.dtype", lambda value, old: "bfloat16" if value else "float32"
    ),
    "criterion.type": Key(str, "MSELoss", why="each kind of training has its one loss"),
    "trainer.type": Key(str, "", idle=lambda old: "there is one way to align" if old["job"] == "align" else ""),
    "trainer.choices": Key(
        list,
        None,
        "data.choice_tokens",
        convert=lambda value, old: [f" {one}" for one in value],
        idle=lambda old: "only selectors answer by a letter" if old["job"] in ("sft", "dpo") else "",
    ),
    "eval.freq": Key(int, 1, "selectors.eval_every", convert=lambda value, old: max(value, 0)),
    "eval.metrics": Key(list, None, why="loss and accuracy are always reported"),
    "eval.best_res_update_round_wise_key": Key(
        str, "val_loss", why="the best round is that of least validation loss, never by test"
    ),
    "eval.count_flops": Key(bool, True, why="benchmarks/ counts operations"),
    "expname": Key(str, "", idle=lambda old: "federate.save_to names the run" if old["federate.save_to"] else ""),
}
