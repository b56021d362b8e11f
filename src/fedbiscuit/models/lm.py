"""A frozen language model with one slot for an adapter.

One LM per device serves all clients and all adapters: switching copies the few LoRA tensors in place. How a base model is found
and loaded stands in ``models/base.py``, how texts become token ids in ``models/chat.py``.
"""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

from fedbiscuit.config import LoraSettings, ModelSettings
from fedbiscuit.models.base import check_quantize, device_and_type, digest_of, load_plain, public_name, resolve_model
from fedbiscuit.models.chat import plain_ids, prompt_ids, start_ids
from fedbiscuit.models.decoding import Cache
from fedbiscuit.models.lora import fuse_lora
from fedbiscuit.models.trees import ATTENTION, SIDE_BY_SIDE, Forest, pack, tree_attention
from fedbiscuit.types import ConfigError, IntegrityError, Weights, seed_for

__all__ = ["LM", "SCORE", "load_lm"]

transformers.AttentionInterface.register(ATTENTION, tree_attention)
transformers.AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)

log = logging.getLogger("fedbiscuit")

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
