"""A linear layer with its LoRA update as one operation: the same numbers as PEFT's modules, with fewer passes over memory.

PEFT computes ``base(x) + lora_B(lora_A(dropout(x))) * scaling`` one operation at a time, so tensors as wide as the layer are
written and read some ten times for an update of rank 8. Here the update is added into the layer's output in place, and the
backward pass likewise. PEFT keeps the parameters, the names and the files.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor

__all__ = ["fuse_lora"]


def fuse_lora(model: torch.nn.Module, adapter: str = "default") -> int:
    """Let PEFT's plain LoRA layers of one adapter compute in one operation where that is possible; how many there are.

    Layers of another kind (DoRA, a quantized base) keep PEFT's own way. A float32 adapter of a bfloat16 layer is computed in
    bfloat16, as autocast does it: PEFT would write the layer's input as float32 first.
    """
    fused = 0
    for module in model.modules():
        if type(module) is Linear and _is_plain(module, adapter):
            module.forward = _Fused(module, adapter)  # type: ignore[method-assign]
            fused += 1
    return fused


def _is_plain(module: Linear, adapter: str) -> bool:
    base = module.get_base_layer()
    return (
        type(base) is torch.nn.Linear
        and adapter in module.lora_A
        and adapter not in module.lora_variant
        and not module.lora_bias[adapter]
        and not module.fan_in_fan_out
    )


class _Fused:
    """Stands in for the ``forward`` of one LoRA layer."""

    def __init__(self, module: Linear, adapter: str):
        self._module = module
        self._peft = module.forward
        self._adapter = adapter

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        module, name = self._module, self._adapter
        base = module.get_base_layer()
        a, b = module.lora_A[name].weight, module.lora_B[name].weight
        plain = not (args or kwargs or module.disable_adapters or module.merged) and module.active_adapters == [name]
        if not plain or x.dtype != base.weight.dtype:
            return self._peft(x, *args, **kwargs)
        a, b = a.to(x.dtype), b.to(x.dtype)
        dropout = module.lora_dropout[name]
        drops = module.training and getattr(dropout, "p", 0.0) > 0
        read = dropout(x) if drops else None
        out: Tensor = _LoraLinear.apply(x, read, base.weight, base.bias, a, b, module.scaling[name])  # type: ignore[no-untyped-call]
        return out


class _LoraLinear(torch.autograd.Function):
    """y = x W' + bias + scaling (r A') B', where r is x, or x after dropout; W is frozen. Shapes: x (..., in), A (r, in),
    B (out, r).
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
        out = torch.nn.functional.linear(rows, weight, bias)
        out.addmm_(low, b.t(), alpha=scaling)
        ctx.save_for_backward(seen, low, weight, a, b)
        ctx.scaling, ctx.shape = scaling, x.shape
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        seen, low, weight, a, b = ctx.saved_tensors
        for_x, for_read, _, _, for_a, for_b, _ = ctx.needs_input_grad
        grad = gradients[0].reshape(-1, weight.shape[0])
        into_low = (grad @ b).mul_(ctx.scaling)
        grad_a = into_low.t() @ seen if for_a else None
        grad_b = (grad.t() @ low).mul_(ctx.scaling) if for_b else None
        grad_read = (into_low @ a).view(ctx.shape) if for_read else None
        grad_x = None
        if for_x:
            grad_x = grad @ weight
            if not for_read:  # no dropout: both ways lead to x
                grad_x.addmm_(into_low, a)
            grad_x = grad_x.view(ctx.shape)
        return grad_x, grad_read, None, None, grad_a, grad_b, None
