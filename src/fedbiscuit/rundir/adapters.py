"""PEFT folders: ``adapter_config.json``, ``adapter_model.safetensors`` and a card, as PEFT, vLLM and TRL read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedbiscuit.rundir.disk import read_regular, sha256_of, write_synced
from fedbiscuit.rundir.folders import whole_folder
from fedbiscuit.rundir.tensors import Expected, read_metadata, read_weights, write_tensor_file
from fedbiscuit.rundir.values import dump_json, load_json, plain
from fedbiscuit.types import IntegrityError, Weights

__all__ = [
    "base_of",
    "check_adapter_config",
    "read_adapter",
    "read_adapter_config",
    "write_adapter",
    "write_adapter_files",
]

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
BASE, CONFIG = "fedbiscuit.base", "fedbiscuit.config"


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _truth(value: Any) -> bool:
    return isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _modules(value: Any) -> bool:
    return _text(value) or (isinstance(value, list) and all(map(_text, value)))


ALLOWED: dict[str, Callable[[Any], bool]] = {
    "peft_type": lambda value: value == "LORA",
    "task_type": lambda value: value == "CAUSAL_LM",
    "base_model_name_or_path": _text,
    "peft_version": _text,
    "inference_mode": _truth,
    "r": lambda value: type(value) is int and value > 0,
    "lora_alpha": _number,
    "lora_dropout": _number,
    "target_modules": _modules,
    "layers_to_transform": lambda value: isinstance(value, list) and all(type(n) is int and n >= 0 for n in value),
    "use_rslora": _truth,
    "bias": lambda value: value == "none",
    "init_lora_weights": _truth,
    "fan_in_fan_out": lambda value: value is False,
}
"""The fields of a plain LoRA, with what they may hold. All others must be empty: ``auto_mapping`` would run code of
others, ``revision`` would fetch another base, and so on (docs/faults.md row 60)."""
HARMLESS = {"megatron_core": "megatron.core", "qalora_group_size": 16}


def check_adapter_config(place: Path, config: object) -> dict[str, Any]:
    """The fields of a plain LoRA in an adapter's config; a field that means more is an ``IntegrityError``."""
    if not isinstance(config, dict):
        raise IntegrityError(f"{place}: not a table of settings; write the adapter again")
    kept: dict[str, Any] = {}
    for key, value in config.items():
        if value is None or value is False or value in ({}, []) or HARMLESS.get(key) == value:
            kept |= {key: value} if key in ALLOWED and value is not None else {}
        elif key not in ALLOWED:
            raise IntegrityError(
                f"{place}: {key}: {value!r:.80} is not read; only plain LoRA adapters are, without this field"
            )
        elif not ALLOWED[key](value):
            raise IntegrityError(
                f"{place}: {key}: {value!r:.80} is not allowed here; only plain LoRA adapters are read"
            )
        else:
            kept[key] = value
    for key in ("peft_type", "r", "target_modules"):
        if key not in kept:
            raise IntegrityError(f"{place}: {key}: missing; this is not the config of a LoRA adapter")
    return kept


def write_adapter(
    target: Path, weights: Weights, adapter_config: Mapping[str, Any], card: str, base: str | None = None
) -> None:
    """Write a PEFT folder, whole or not at all, in place of one that is there. ``base``: digest of the base model."""
    config = check_adapter_config(target / CONFIG_FILE, plain(adapter_config))
    with whole_folder(target) as folder:
        write_adapter_files(folder, weights, config, card, base, place=target)


def write_adapter_files(
    folder: Path,
    weights: Weights,
    adapter_config: Mapping[str, Any],
    card: str = "",
    base: str | None = None,
    place: Path | None = None,
) -> None:
    """The files of a PEFT folder, straight into ``folder``: a temporary one. ``place`` is what messages name."""
    place = place or folder
    config = check_adapter_config(place / CONFIG_FILE, plain(adapter_config))
    text = dump_json(config, indent=2) + "\n"
    notes = {CONFIG: write_synced(folder / CONFIG_FILE, [text.encode()])}
    notes |= {BASE: base} if base is not None else {}
    write_tensor_file(folder / WEIGHTS_FILE, weights, notes, place=place / WEIGHTS_FILE)
    if card:
        write_synced(folder / "README.md", [card.encode()])


def read_adapter(folder: Path, expect: Expected | None = None, base: str | None = None) -> Weights:
    """The weights of a folder that ``write_adapter`` wrote, checked against its digests, ``expect`` and ``base``."""
    path, config = folder / WEIGHTS_FILE, folder / CONFIG_FILE
    if not path.exists():
        pickled = (folder / "adapter_model.bin").exists()
        why = (
            "it holds only adapter_model.bin, a pickle, which is not opened" if pickled else "there is no adapter here"
        )
        raise IntegrityError(f"{folder}: {why}; run the stage that writes it again with --resume")
    notes = read_metadata(path)
    if base is not None and notes.get(BASE) != base:
        was = notes.get(BASE, "unknown")
        raise IntegrityError(
            f"{path}: trained on base model {was:.16}, this one is {base:.16}; use that model, or train again"
        )
    weights = read_weights(path, expect, sealed=True)
    if not weights:
        raise IntegrityError(f"{path}: holds no tensors; run the stage that writes it again with --resume")
    if sha256_of(config) != notes.get(CONFIG):
        raise IntegrityError(f"{config}: was changed after it was written; take it from a backup or write it again")
    check_adapter_config(config, load_json(config, read_regular(config)))
    return weights


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The fields of a plain LoRA in a folder's ``adapter_config.json``."""
    path = folder / CONFIG_FILE
    return check_adapter_config(path, load_json(path, read_regular(path)))


def base_of(folder: Path) -> str:
    """The digest of the base model that an adapter was trained on."""
    path = folder / WEIGHTS_FILE
    found = read_metadata(path).get(BASE)
    if found is None:
        raise IntegrityError(f"{path}: does not say what base model it was trained on; train it again")
    return found
