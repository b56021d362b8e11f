"""What type tensors have while they travel (``comm_dtype``): rounded once by whoever sends, float32 again where they arrive.

Every step is a single operation of IEEE arithmetic on each value, so all machines get the same bits; and what was rounded
before is not rounded again: ``decoded(coded(x))`` is a fixed point.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedbiscuit.types import FederationError, Weights

__all__ = ["SCALES", "coded", "decoded", "scales_fault"]

SCALES = "scales"
"""int8: the tensor that holds all scales of an adapter, one for each of its rank's directions, in the order of names."""
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
MOST = 127
TINY = 2.0**-100
"""Smaller scales are zero: near the end of its range a float has too few bits to be one."""


def coded(weights: Weights, comm_dtype: str) -> Weights:
    """Weights as they travel. int8: times a scale, the largest value of each direction is 127.

    A value that is not finite is none in ``decoded`` either.
    """
    if comm_dtype == "float32":
        return dict(weights)
    if comm_dtype == "bfloat16":
        return {name: tensor.detach().to(torch.bfloat16) for name, tensor in weights.items()}
    found = {name: _scale(weights[name].detach()) for name in sorted(weights)}
    whole = {name: _whole(weights[name].detach(), scale) for name, scale in found.items()}
    return {**whole, SCALES: torch.cat([scale.flatten() for scale in found.values()])}


def decoded(weights: Weights, comm_dtype: str) -> Weights:
    """Weights that have travelled, in float32; ``FederationError`` where they are not coded as ``comm_dtype`` says."""
    tensors = {name: tensor for name, tensor in weights.items() if comm_dtype != "int8" or name != SCALES}
    for name, tensor in tensors.items():
        if tensor.dtype != TYPES[comm_dtype]:
            raise FederationError(f"{name!r:.80}: dtype {tensor.dtype} where {TYPES[comm_dtype]} is needed")
    if comm_dtype != "int8":
        return {name: tensor.to(torch.float32) for name, tensor in tensors.items()}
    if fault := scales_fault(weights):
        raise FederationError(fault)
    shapes = {name: _scale_shape(tensors[name].shape) for name in sorted(tensors)}
    cut = torch.split(weights[SCALES], [math.prod(shape) for shape in shapes.values()])
    return {
        name: tensors[name].to(torch.float32) * cut[i].view(shape) for i, (name, shape) in enumerate(shapes.items())
    }


def scales_fault(weights: Weights) -> str | None:
    """int8: what is wrong with the scales of an adapter, or None."""
    scales = weights.get(SCALES)
    needed = sum(math.prod(_scale_shape(tensor.shape)) for name, tensor in weights.items() if name != SCALES)
    if scales is None or scales.dtype != torch.float32 or scales.shape != (needed,):
        return f"{SCALES}: {needed} numbers of torch.float32 are needed"
    bad = (~(torch.isfinite(scales) & (scales >= 0))).nonzero()
    return f"{SCALES}: {len(bad)} negative or non-finite values, first at {int(bad[0])}" if len(bad) else None


def _scale_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """A matrix has a scale for each place along its shorter side, which in LoRA is the rank; a vector has one."""
    kept = min(range(len(shape)), key=lambda axis: shape[axis]) if len(shape) > 1 else -1
    return tuple(size if axis == kept else 1 for axis, size in enumerate(shape))


def _scale(tensor: Tensor) -> Tensor:
    """A 127th of the largest value; zero where all are zero, not finite where one is not.

    Of 127 times that number a 127th is the same float, whatever the number: so decoded values have the same scale again.
    """
    shared = [axis for axis, size in enumerate(_scale_shape(tensor.shape)) if size == 1]
    largest = tensor.to(torch.float32).abs().amax(shared, keepdim=True) / MOST
    return torch.where(largest < TINY, 0.0, largest)


def _whole(tensor: Tensor, scale: Tensor) -> Tensor:
    """The values in steps of ``scale``, the nearest one, half to even."""
    steps = torch.where(scale > 0, tensor.to(torch.float32) / scale, 0.0)
    return torch.round(torch.nan_to_num(steps, 0.0, 0.0, 0.0)).to(torch.int8)
