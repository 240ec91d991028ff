"""Which operators the blocks use on a device, where no gradient is asked for."""

from __future__ import annotations

import importlib.util
from functools import lru_cache

import torch

from modules import on_cpu
from modules.blocks import PLAIN, Operators


def operators_for(device: str, dtype: torch.dtype, plain: bool = False) -> Operators:
    """Those for maps of a dtype on a kind of device; `PLAIN` where it has none of its own, or is asked for."""
    if plain:
        return PLAIN
    if device == "cpu" and dtype == torch.float32 and on_cpu.pays():
        return on_cpu.OPERATORS
    if device == "cuda" and dtype == torch.bfloat16 and triton_found():
        from modules import fused  # imports triton

        return fused.OPERATORS
    return PLAIN


@lru_cache
def triton_found() -> bool:
    """Whether triton is installed and PyTorch's build is one for NVIDIA's cards."""
    return importlib.util.find_spec("triton") is not None and torch.version.cuda is not None
