"""Which operators the blocks use on a device, where no gradient is asked for."""

from __future__ import annotations

import importlib.util
import warnings
from functools import lru_cache

import torch
from torch import Tensor, nn

from modules import on_cpu
from modules.blocks import PLAIN, AttnBlock, Operators, ResBlock

HEAD_WIDTH = 64  # of the published networks
TRIED_SIZE, TRIED_TOKENS, TOLERANCE = (32, 33), 85, 0.02  # of the trial of kernels
TRIED_SCALE = 0.01  # of its map: norms undo it, and what blocks add is large beside the map's own rounding
FEW_PIXELS = 32**2  # of a map, below which a GPU's own kernels are slower than PyTorch's


def operators_for(x: Tensor, plain: bool = False) -> Operators:
    """Those for a map (B, C, H, W); `PLAIN` where its device has none of its own, or where asked for."""
    if plain:
        return PLAIN
    if x.device.type == "cpu" and x.dtype == torch.float32 and on_cpu.pays():
        return on_cpu.OPERATORS
    large = x.shape[-2] * x.shape[-1] >= FEW_PIXELS
    if x.device.type == "cuda" and x.dtype == torch.bfloat16 and large and triton_found():
        if fused_works(x.device, x.shape[1]):
            from modules import fused  # imports triton

            return fused.OPERATORS
    return PLAIN


@lru_cache
def triton_found() -> bool:
    """Whether triton is installed and PyTorch's build is one for NVIDIA's cards."""
    return importlib.util.find_spec("triton") is not None and torch.version.cuda is not None


@lru_cache
def fused_works(device: torch.device, c: int, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether the fused kernels run on a device, for maps of c channels, and agree with the plain operators.

    It is tried once, on small blocks with random weights; a warning says what does not work.
    """
    try:
        from modules import fused

        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            torch.manual_seed(0)
            _compare(fused.OPERATORS, device, c, dtype)
    except Exception as error:  # whatever a compiler or a driver raises
        reason = " ".join(str(error).split())[:200]
        warnings.warn(f"the fused kernels are not used, as they fail here ({reason})", stacklevel=2)
        return False
    return True


def _compare(ops: Operators, device: torch.device, c: int, dtype: torch.dtype) -> None:
    """ValueError where blocks with other operators differ from plain ones by more than rounding does."""
    residual, attention = ResBlock(c), AttnBlock(c, c, max(1, c // HEAD_WIDTH))
    for block in (residual, attention):
        block.to(device, dtype).eval()
    nn.init.normal_(residual.channelwise[2].gamma)
    x = (TRIED_SCALE * torch.randn(2, c, *TRIED_SIZE)).to(device, dtype)
    condition = attention.keys_values(torch.randn(2, TRIED_TOKENS, c).to(device, dtype))
    for block, other in ((residual, None), (attention, condition)):
        plain, own = (block(x, other, each).float() for each in (PLAIN, ops))
        if not (own - plain).norm() <= TOLERANCE * (plain - x.float()).norm():
            raise ValueError(f"{type(block).__name__} gives other values")
