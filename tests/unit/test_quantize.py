"""``model.quantize: nf4``: against bitsandbytes' own dequantization, PEFT's layers and plain models of the same weights."""

from __future__ import annotations

import importlib.util
import tomllib
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor

from fedbiscuit.config import ModelSettings
from fedbiscuit.models import base as base_file
from fedbiscuit.models.base import digest_of, quantize_of, resolve_model
from fedbiscuit.models.lm import LM, load_lm
from fedbiscuit.models.lora import _LoraLinear, fuse_lora, unpacked
from fedbiscuit.models.merging import write_merged
from fedbiscuit.rundir.adapters import write_adapter
from fedbiscuit.types import EnvironmentFault, IntegrityError

ROOT = Path(__file__).resolve().parents[2]

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="SKIPPED: bitsandbytes is not installed, so model.quantize is not tested (make test installs it)",
)


def packed_layer(bias: bool = False, lora: bool = True, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A linear layer of 64 inputs and 48 outputs in 4 bits, with an adapter that does something or alone."""
    import bitsandbytes

    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear4bit(64, 48, bias=bias, quant_type="nf4", compute_dtype=dtype).to(dtype).to("cpu")
    model = torch.nn.Sequential(layer).requires_grad_(False)
    if not lora:
        return model
    model.is_loaded_in_4bit = True
    return peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=["0"], init_lora_weights=False))


def output_and_gradients(model: torch.nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    model.zero_grad()
    out = model(x)
    (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return [out.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def tensors_of(model: torch.nn.Module) -> list[Tensor]:
    """The frozen tensors of a model, those that belong to 4-bit weights too."""
    found = [p for name, p in model.named_parameters() if ".lora_" not in name]
    for state in [p.quant_state for p in found if hasattr(p, "quant_state")]:
        found += [state.absmax, state.state2.absmax]
    return found


def with_adapter(lm: LM) -> LM:
    """Put in an adapter that does something."""
    generator = torch.Generator().manual_seed(0)
    shapes = lm.new_adapter("quantize")
    lm.put_adapter({n: torch.randn(w.shape, generator=generator) * 0.1 for n, w in shapes.items()})
    return lm


def loss_and_gradients(lm: LM) -> list[Tensor]:
    forest = lm.pack([[1, 2, 3, 4], [1, 2, 7, 8, 9]])
    lm.model.train()
    lm.model.zero_grad()
    loss = lm.logits(lm.hidden_at(forest, forest.last)).logsumexp(-1).sum()
    loss.backward()
    lm.model.eval()
    return [loss.detach(), *(p.grad.clone() for p in lm.trainable().values())]


def next_logits(lm: LM) -> Tensor:
    forest = lm.pack([[1, 2, 3, 4, 200, 100]])
    with torch.no_grad():
        return lm.logits(lm.hidden(forest))


# One layer


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_layer_is_the_product_with_the_dequantized_weight_to_the_bit(dtype, bias):
    from bitsandbytes.functional import dequantize_4bit

    model = packed_layer(bias, lora=False, dtype=dtype).eval()
    weight = dequantize_4bit(model[0].weight.data, model[0].weight.quant_state)
    assert weight.dtype == dtype
    fuse_lora(model)
    for rows in (1, 5):
        x = torch.randn(rows, 64, dtype=dtype)
        expected = torch.nn.functional.linear(x, weight, model[0].bias)
        out, grad = output_and_gradients(model, x)
        assert torch.equal(out, expected)
        direction = torch.linspace(-1, 2, out.numel(), dtype=dtype).view_as(out)
        assert torch.equal(grad, direction @ weight)
        with torch.no_grad():
            assert torch.equal(model(x), expected)


@needs_bitsandbytes
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_layer_with_its_adapter_is_the_fused_layer_of_the_dequantized_weight_and_agrees_with_peft(bias):
    model = packed_layer(bias)
    x = torch.randn(2, 3, 64)
    theirs = output_and_gradients(model, x)
    assert fuse_lora(model) == 1
    ours = output_and_gradients(model, x)
    for mine, pefts in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, pefts, rtol=1e-4, atol=1e-4)
    module = model.base_model.model[0]
    base, (a, b) = module.get_base_layer(), (module.lora_A["default"].weight, module.lora_B["default"].weight)
    out = _LoraLinear.apply(x, None, unpacked(base.weight), base.bias, a, b, module.scaling["default"])
    assert torch.equal(ours[0], out)
    with model.disable_adapter():
        assert torch.equal(model(x), torch.nn.functional.linear(x, unpacked(base.weight), base.bias))


@needs_bitsandbytes
def test_the_unpacked_weight_is_not_kept_for_the_backward_pass():
    model = packed_layer()
    fuse_lora(model)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        model(torch.randn(1, 64, requires_grad=True))
    assert kept
    assert max(kept) < 64 * 48


# A model


@needs_bitsandbytes
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_what_is_packed_are_the_linear_layers_and_not_head_embeddings_and_norms(load_tiny, family):
    lm = load_tiny(family, quantize="nf4")
    layers = [m for m in lm._causal.modules() if isinstance(m, torch.nn.Linear) and hasattr(m.weight, "quant_state")]
    assert len(layers) == 2 * 7
    state = layers[0].weight.quant_state
    assert (state.quant_type, state.nested, state.blocksize) == ("nf4", True, 64)
    packed = {id(layer.weight) for layer in layers}
    rest = [p for n, p in lm._causal.named_parameters() if ".lora_" not in n and id(p) not in packed]
    assert len(rest) == (6 if family == "llama" else 14)  # the embedding, which is the head too, and the norms
    assert all(p.dtype == torch.float32 for p in rest)
    held = sum(layer.weight.nbytes for layer in layers)
    assert held == sum(layer.in_features * layer.out_features for layer in layers) / 2


@needs_bitsandbytes
def test_a_head_of_its_own_stays_in_full_too(tmp_path, tiny_model):
    import shutil

    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(tiny_model, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny_model / name, tmp_path)
    lm = load_lm(ModelSettings(base=str(tmp_path), device="cpu", quantize="nf4"))
    assert type(lm._causal.get_output_embeddings()) is torch.nn.Linear
    assert lm._causal.lm_head.weight.dtype == torch.float32


@needs_bitsandbytes
@pytest.mark.parametrize("layers", [(), (1,)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_the_adapter_learns_and_checkpointing_changes_no_gradient(load_tiny, dtype, layers):
    lora = {"layers_to_transform": layers}
    plain = with_adapter(load_tiny(quantize="nf4", dtype=dtype, lora=lora))
    less = with_adapter(load_tiny(quantize="nf4", dtype=dtype, lora=lora, gradient_checkpointing=True))
    before = [tensor.clone() for tensor in tensors_of(plain._causal)]
    ours, again = loss_and_gradients(plain), loss_and_gradients(less)
    for one, two in zip(ours, again, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4 if dtype == "float32" else 0.05, atol=1e-3)
    assert all(float(gradient.abs().sum()) > 0 for gradient in ours[1:])
    assert [n for n, p in plain.model.named_parameters() if p.grad is not None and ".lora_" not in n] == []
    next_logits(plain)
    assert all(map(torch.equal, tensors_of(plain._causal), before))  # nothing was packed anew for another kernel


@needs_bitsandbytes
def test_the_merged_model_is_what_was_trained_and_not_the_sum_with_the_original_weights(
    load_tiny, tiny_model, tmp_path
):
    from transformers import AutoConfig, AutoModelForCausalLM

    lm = with_adapter(load_tiny(quantize="nf4"))
    write_adapter(tmp_path / "adapter", lm.adapter(), lm.adapter_config(), "card", base=lm.digest)
    folder = tmp_path / "merged"
    folder.mkdir()
    write_merged(ModelSettings(base=str(tiny_model), quantize="nf4"), tmp_path / "adapter", folder)
    assert getattr(AutoConfig.from_pretrained(folder), "quantization_config", None) is None
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(folder).eval()(torch.tensor([[1, 2, 3, 4, 200, 100]])).logits[0]
    ours, full = next_logits(lm), next_logits(with_adapter(load_tiny()))
    torch.testing.assert_close(merged, ours, rtol=1e-4, atol=1e-4)
    assert float((full - ours).abs().max()) > 0.05


@needs_bitsandbytes
def test_the_four_bits_are_the_same_for_every_type_that_is_computed_in(load_tiny):
    """So an adapter trained in bfloat16 is merged into the weights that it was trained on, but for rounding."""
    packed = {}
    for dtype in ("float32", "bfloat16"):
        lm = load_tiny(quantize="nf4", dtype=dtype)
        found = {name: p for name, p in lm.model.named_parameters() if getattr(p, "quant_state", None) is not None}
        assert found
        assert {str(p.quant_state.dtype) for p in found.values()} == {f"torch.{dtype}"}
        assert lm.model.get_input_embeddings().weight.dtype == getattr(torch, dtype)
        packed[dtype] = {name: (p.data, p.quant_state.absmax) for name, p in found.items()}
    for name, (bits, scale) in packed["float32"].items():
        assert torch.equal(bits, packed["bfloat16"][name][0])
        assert torch.equal(scale, packed["bfloat16"][name][1])


# What belongs together


@needs_bitsandbytes
def test_an_adapter_of_the_base_in_4_bits_is_none_of_the_same_base_in_full(load_tiny, tiny_model, tmp_path):
    quantized, full = load_tiny(quantize="nf4"), load_tiny()
    sha256 = resolve_model(str(tiny_model))[1]
    assert (quantized.digest, full.digest) == (f"nf4:{sha256}", sha256)
    for number, (mine, other) in enumerate([("none", "nf4"), ("nf4", "none")]):
        lm, place = (full, quantized)[number], tmp_path / mine
        write_adapter(place, lm.adapter(), lm.adapter_config(), "card", base=lm.digest)
        with pytest.raises(IntegrityError, match=r"trained on base model (nf4:)?\w{12}"):
            write_merged(ModelSettings(base=str(tiny_model), quantize=other), place, tmp_path)


def test_a_digest_says_how_the_base_was_held():
    for quantize in ("none", "nf4"):
        assert quantize_of(digest_of("a" * 64, quantize)) == quantize


def test_without_bitsandbytes_the_key_and_the_command_are_named(tiny_model, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(
        base_file.importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "bitsandbytes" else there(name, *rest),
    )
    with pytest.raises(EnvironmentFault, match=r'model\.quantize: nf4 needs bitsandbytes.*pip install "bitsandbytes>='):
        load_lm(ModelSettings(base=str(tiny_model), device="cpu", quantize="nf4"))


def test_what_the_message_says_to_install_is_what_the_extra_brings_and_what_is_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["optional-dependencies"]["qlora"] == [base_file.QUANTIZER]
    assert base_file.QUANTIZER in project["dependency-groups"]["dev"]
