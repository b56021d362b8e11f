"""The fused LoRA layer against PEFT's own, values and gradients; and finite differences."""

from __future__ import annotations

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer

from fedbiscuit.models.lora import _LoraLinear, fuse_lora


def layer(bias: bool, dropout: float, sizes: tuple[int, int], rank: int, seed: int = 0) -> torch.nn.Module:
    """One linear layer with an adapter that does something, wrapped by PEFT."""
    torch.manual_seed(seed)
    module = torch.nn.Sequential(torch.nn.Linear(*sizes, bias=bias)).requires_grad_(False)
    config = peft.LoraConfig(
        r=rank, lora_alpha=3.0, lora_dropout=dropout, target_modules=["0"], init_lora_weights=False
    )
    return peft.get_peft_model(module, config)


def run(model: torch.nn.Module, x: torch.Tensor, freeze_a: bool) -> list[torch.Tensor]:
    """Output and gradients of x, A and B."""
    x = x.clone().requires_grad_()
    a, b = (p for n, p in sorted(model.named_parameters()) if "lora_" in n)
    a.requires_grad_(not freeze_a)
    a.grad = b.grad = None
    torch.manual_seed(1)
    out = model(x)
    (out * torch.linspace(-1, 2, out.numel()).view_as(out)).sum().backward()
    return [out.detach(), x.grad, b.grad, *([] if freeze_a else [a.grad])]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.tuples(st.integers(1, 3), st.integers(1, 5)),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    rank=st.integers(1, 4),
    bias=st.booleans(),
    freeze_a=st.booleans(),
    dropout=st.sampled_from([0.0, 0.4]),
    training=st.booleans(),
)
def test_a_fused_layer_equals_pefts(rows, sizes, rank, bias, freeze_a, dropout, training):
    model = layer(bias, dropout, sizes, rank).train(training)
    model.double()
    x = torch.randn(*rows, sizes[0], dtype=torch.double)
    expected = run(model, x, freeze_a)
    assert fuse_lora(model) == 1
    for ours, theirs in zip(run(model, x, freeze_a), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dropped", [False, True])
def test_its_gradients_are_those_of_finite_differences(dropped):
    torch.manual_seed(0)
    x, weight, a, b = (torch.randn(size, dtype=torch.double) for size in ((3, 5), (4, 5), (2, 5), (4, 2)))
    free = [tensor.requires_grad_() for tensor in (x, a, b)]
    read = torch.randn(3, 5, dtype=torch.double).requires_grad_() if dropped else None

    def call(x, a, b, read=read):
        return _LoraLinear.apply(x, read, weight, None, a, b, 0.7)

    assert torch.autograd.gradcheck(call, (*free, read) if dropped else free)


def test_the_adapter_can_still_be_switched_off_and_the_lowest_layer_needs_no_gradient_of_its_input():
    model = layer(True, 0.0, (4, 3), 2)
    x = torch.randn(2, 4)
    with model.disable_adapter():
        plain = model(x)
    fuse_lora(model)
    with model.disable_adapter():
        assert torch.equal(model(x), plain)
    out = model(x)
    assert not torch.allclose(out, plain)
    out.sum().backward()
    assert x.grad is None
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)


def test_a_float32_adapter_of_a_bfloat16_layer_is_computed_in_bfloat16_and_its_gradients_stay_float32():
    model = layer(False, 0.0, (4, 3), 2)
    model.base_model.model[0].base_layer.to(torch.bfloat16)
    x = torch.randn(2, 4, dtype=torch.bfloat16)
    expected = model(x)
    expected.float().sum().backward()
    theirs = {n: p.grad.clone() for n, p in model.named_parameters() if "lora_" in n}
    model.zero_grad()
    fuse_lora(model)
    out = model(x)
    assert out.dtype == torch.bfloat16
    assert torch.allclose(out, expected, rtol=0.02, atol=0.02)
    out.float().sum().backward()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert parameter.grad.dtype == torch.float32
            assert torch.allclose(parameter.grad, theirs[name], rtol=0.03, atol=0.03)


def test_layers_of_another_kind_are_left_alone():
    module = torch.nn.Sequential(torch.nn.Linear(4, 3))
    model = peft.get_peft_model(module, peft.LoraConfig(r=2, target_modules=["0"], use_dora=True))
    assert fuse_lora(model) == 0


def test_peft_scales_a_rank_stabilized_adapter_as_we_do(load_tiny, tiny_model, tmp_path):
    """rsLoRA: alpha / sqrt(r), 8 / 2, instead of alpha / r."""
    from transformers import AutoModelForCausalLM

    from fedbiscuit.rundir.adapters import write_adapter

    lm = load_tiny(lora={"r": 4, "alpha": 8.0, "use_rslora": True})
    generator = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(w.shape, generator=generator) * 0.1 for n, w in lm.new_adapter("rs").items()}
    lm.put_adapter(weights)
    write_adapter(tmp_path / "adapter", weights, lm.adapter_config(), "card", base=lm.digest)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert {m.scaling["default"] for m in theirs.modules() if isinstance(m, LoraLayer)} == {4.0}
    ids = [1, 2, 3, 200]
    with torch.no_grad():
        ours = lm.logits(lm.hidden(lm.pack([ids])))
        torch.testing.assert_close(ours, theirs(torch.tensor([ids])).logits[0], atol=1e-5, rtol=1e-5)
