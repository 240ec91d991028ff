"""Products in float8 (e4m3) of the ResBlocks' linear layers; where a device has none, their rounding alone.

Every row of a weight and of an input has a scale of its own, so that its largest value becomes float8's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modules.blocks import ResBlock
from modules.operators import of_nvidia

Fp8 = Literal["off", "auto", "on"]  # auto: where the device computes in float8; on: elsewhere its rounding

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
CAPABILITY = (8, 9)  # of NVIDIA's first cards that compute in float8
MULTIPLE = 16  # which both sides of a matrix must divide by
CHUNK = 1 << 26  # numbers of an input that are rounded at a time, in float32


def computes_in_fp8(device: torch.device) -> bool:
    """Whether a device has products in float8."""
    return of_nvidia(device) and torch.cuda.get_device_capability(device) >= CAPABILITY and _tried(device)


@cache
def _tried(device: torch.device) -> bool:
    """Whether a small product works there: PyTorch is built without them for some systems."""
    rows, scales = to_fp8(torch.ones(MULTIPLE, MULTIPLE, device=device))
    try:
        product(rows, scales, rows, scales, torch.ones(MULTIPLE, device=device))
    except RuntimeError:
        return False
    return True


def to_fp8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (N, K) in float8, and the scales (N, 1), in float32, that make them what they were."""
    rows = rows.float()
    scales = rows.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / LARGEST
    return (rows / scales).to(FLOAT8), scales


def product(rows: Tensor, scales: Tensor, weight: Tensor, own: Tensor, bias: Tensor | None) -> Tensor:
    """Rows (N, K) times a weight (out, K), transposed, + bias (out): (N, out), rounded to bfloat16.

    Both are in float8, with scales (N, 1) and (out, 1). The product in float8 takes no other result, and no
    other bias.
    """
    inside = bias if bias is not None and bias.dtype == torch.bfloat16 else None
    y = torch._scaled_mm(rows, weight.t(), scales, own.t(), bias=inside, out_dtype=torch.bfloat16)
    return y if bias is inside else y + bias


class Fp8Linear(nn.Module):
    """A linear layer whose weight (out, in) and inputs (…, in) are rounded to float8; the bias is not."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = to_fp8(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = linear.bias
        self.computes = computes_in_fp8(weight.device)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        count = max(1, CHUNK // rows.shape[1])
        y = rows.new_empty(len(rows), len(self.weight))
        for start in range(0, len(rows), count):
            y[start : start + count] = self._product(rows[start : start + count])
        return y.unflatten(0, x.shape[:-1])

    def _product(self, x: Tensor) -> Tensor:
        rows, scales = to_fp8(x)
        if self.computes:
            return product(rows, scales, self.weight, self.scale, self.bias)
        rows, weight = (a.float() * scale for a, scale in ((rows, scales), (self.weight, self.scale)))
        return F.linear(rows.to(x.dtype), weight.to(x.dtype), self.bias)


@contextmanager
def products_in_fp8(network: nn.Module, fp8: Fp8) -> Iterator[None]:
    """Within it, the linear layers of a network's ResBlocks multiply in float8; after it, as before."""
    replaced = replaced_layers(network) if uses_fp8(next(network.parameters()).device, fp8) else []
    try:
        for layers, i, layer in replaced:
            layers[i] = Fp8Linear(layer)
        yield
    finally:
        for layers, i, layer in replaced:
            layers[i] = layer


def uses_fp8(device: torch.device, fp8: Fp8) -> bool:
    """Whether products of a device are in float8, or rounded so."""
    return fp8 == "on" or (fp8 == "auto" and computes_in_fp8(device))


def replaced_layers(network: nn.Module) -> list[tuple[nn.Sequential, int, nn.Linear]]:
    """The layers of a network that products in float8 take the place of, each with where it is."""
    return [
        (block.channelwise, i, layer)
        for block in network.modules()
        if isinstance(block, ResBlock)
        for i, layer in enumerate(block.channelwise)
        if isinstance(layer, nn.Linear) and not any(side % MULTIPLE for side in layer.weight.shape)
    ]
