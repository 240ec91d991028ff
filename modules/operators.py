"""Which operators the blocks use on a device, where no gradient is asked for."""

from __future__ import annotations

import importlib.util
from functools import lru_cache

import torch
from torch import Tensor

from modules import on_cpu
from modules.blocks import PLAIN, Operators

FEW_PIXELS = 32**2  # of a map, below which a GPU's own kernels are slower than PyTorch's


def operators_for(x: Tensor, plain: bool = False) -> Operators:
    """Those for a map (B, C, H, W); `PLAIN` where its device has none of its own, or where asked for."""
    if plain:
        return PLAIN
    if x.device.type == "cpu" and x.dtype == torch.float32 and on_cpu.pays():
        return on_cpu.OPERATORS
    large = x.shape[-2] * x.shape[-1] >= FEW_PIXELS
    if x.device.type == "cuda" and x.dtype == torch.bfloat16 and large and triton_found():
        from modules import fused  # imports triton

        return fused.OPERATORS
    return PLAIN


@lru_cache
def triton_found() -> bool:
    """Whether triton is installed and PyTorch's build is one for NVIDIA's cards."""
    return importlib.util.find_spec("triton") is not None and torch.version.cuda is not None
