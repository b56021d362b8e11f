"""A linear layer with its LoRA update as one operation: the same numbers as PEFT's modules, with fewer passes over memory.

PEFT computes ``base(x) + lora_B(lora_A(dropout(x))) * scaling`` one operation at a time, so tensors as wide as the layer are
written and read some ten times for an update of rank 8. Here the update is added into the layer's output in place, and the
backward pass likewise. PEFT keeps the parameters, the names and the files.

Layers whose weight is packed in 4 bits (``model.quantize``) are computed here too, with an adapter or without: the weight is
unpacked for each product and forgotten after it. bitsandbytes would choose among kernels by the number of rows, the mode and
the processor, which give other last bits (on some processors a weight rounded to bfloat16); here one place has one result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor

__all__ = ["fuse_lora", "unpacked"]


def fuse_lora(model: torch.nn.Module, adapter: str = "default") -> int:
    """Let PEFT's plain LoRA layers of one adapter compute in one operation where that is possible; how many there are.

    Layers of another kind (DoRA) keep PEFT's own way. A float32 adapter of a bfloat16 layer is computed in bfloat16, as
    autocast does it: PEFT would write the layer's input as float32 first. Layers packed in 4 bits are unpacked here, see above.
    """
    fused = 0
    for module in model.modules():
        if isinstance(module, LoraLayer) and _is_plain(module, adapter):
            module.forward = _Fused(module, adapter)
            fused += 1
        elif _is_packed(module):
            module.forward = _Packed(module)
    return fused


def unpacked(weight: Tensor) -> Tensor:
    """(out, in) the weight of a linear layer: itself, or what its 4 bits stand for, in the type in which it was packed."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    dense: Tensor = dequantize_4bit(weight.data, state)
    return dense


def _is_packed(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) and getattr(module.weight, "quant_state", None) is not None


def _type_of(weight: Tensor) -> torch.dtype:
    """The type that ``unpacked`` gives."""
    found: torch.dtype = getattr(weight, "quant_state", weight).dtype
    return found


def _is_plain(module: Any, adapter: str) -> bool:
    base = module.get_base_layer()
    return (
        ((type(module) is Linear and type(base) is torch.nn.Linear) or _is_packed(base))
        and adapter in module.lora_A
        and adapter not in module.lora_variant
        and not module.lora_bias[adapter]
        and not module.fan_in_fan_out
    )


class _Packed:
    """Stands in for the ``forward`` of a layer in 4 bits: one without an adapter, or with its adapter off."""

    def __init__(self, module: Any):
        self._module = module

    def __call__(self, x: Tensor) -> Tensor:
        weight: Tensor = self._module.weight
        if x.dtype != _type_of(weight):
            raise TypeError(f"a layer packed from {_type_of(weight)} was given {x.dtype}")
        out: Tensor = _PackedLinear.apply(x, weight, self._module.bias)  # type: ignore[no-untyped-call]
        return out


class _Fused:
    """Stands in for the ``forward`` of one LoRA layer."""

    def __init__(self, module: Any, adapter: str):
        self._module = module
        self._peft: Callable[..., Tensor] = module.forward
        self._adapter = adapter

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        module, name = self._module, self._adapter
        base = module.get_base_layer()
        a, b = module.lora_A[name].weight, module.lora_B[name].weight
        plain = not (args or kwargs or module.disable_adapters or module.merged) and module.active_adapters == [name]
        if not plain or x.dtype != _type_of(base.weight):
            return self._peft(x, *args, **kwargs)
        a, b = a.to(x.dtype), b.to(x.dtype)
        dropout = module.lora_dropout[name]
        drops = module.training and getattr(dropout, "p", 0.0) > 0
        read = dropout(x) if drops else None
        out: Tensor = _LoraLinear.apply(x, read, base.weight, base.bias, a, b, module.scaling[name])  # type: ignore[no-untyped-call]
        return out


class _LoraLinear(torch.autograd.Function):
    """y = x W' + bias + scaling (r A') B', where r is x, or x after dropout; W is frozen, and may be packed in 4 bits. Shapes:
    x (..., in), A (r, in), B (out, r).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        read: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        seen = rows if read is None else read.reshape(rows.shape)
        low = seen @ a.t()
        out = torch.nn.functional.linear(rows, unpacked(weight), bias)
        out.addmm_(low, b.t(), alpha=scaling)
        ctx.save_for_backward(seen, low, a, b)
        ctx.weight, ctx.scaling, ctx.shape = weight, scaling, x.shape  # saved otherwise a packed weight loses its state
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        seen, low, a, b = ctx.saved_tensors
        for_x, for_read, _, _, for_a, for_b, _ = ctx.needs_input_grad
        grad = gradients[0].reshape(-1, b.shape[0])
        into_low = (grad @ b).mul_(ctx.scaling)
        grad_a = into_low.t() @ seen if for_a else None
        grad_b = (grad.t() @ low).mul_(ctx.scaling) if for_b else None
        grad_read = (into_low @ a).view(ctx.shape) if for_read else None
        grad_x = None
        if for_x:
            grad_x = grad @ unpacked(ctx.weight)
            if not for_read:  # no dropout: both ways lead to x
                grad_x.addmm_(into_low, a)
            grad_x = grad_x.view(ctx.shape)
        return grad_x, grad_read, None, None, grad_a, grad_b, None


class _PackedLinear(torch.autograd.Function):
    """y = x W' + bias for a frozen W packed in 4 bits, which is unpacked again in the backward pass instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return torch.nn.functional.linear(x, unpacked(weight), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0] @ unpacked(ctx.weight) if ctx.needs_input_grad[0] else None, None, None
