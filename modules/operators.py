"""Which operators the blocks use on a device, where no gradient is asked for."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from functools import lru_cache, partial
from threading import Lock, Thread

import torch
from torch import Tensor, nn

from modules import on_cpu
from modules.blocks import PLAIN, AttnBlock, Operators, ResBlock

HEAD_WIDTH = 64  # of the published networks
TRIED_SIZE, TRIED_TOKENS, TOLERANCE = (32, 33), 85, 0.02  # of the trial of kernels
TRIED_SCALE = 0.01  # of its map: norms undo it, and what blocks add is large beside the map's own rounding
KNOWN: dict[tuple[torch.device, int, torch.dtype], bool] = {}  # what trials found
ONE_TRIAL = Lock()  # a thread that asks meanwhile waits, and compiles nothing twice
FEW_PIXELS = 32**2  # of a map, below which a GPU's own kernels are slower than PyTorch's


def operators_for(x: Tensor, plain: bool = False) -> Operators:
    """Those for a map (B, C, H, W); `PLAIN` where its device has none of its own, or where asked for."""
    if plain:
        return PLAIN
    if x.device.type == "cpu" and x.dtype == torch.float32 and on_cpu.pays():
        return on_cpu.OPERATORS
    large = x.shape[-2] * x.shape[-1] >= FEW_PIXELS
    if of_nvidia(x.device) and x.dtype == torch.bfloat16 and large and triton_found():
        if fused_works(x.device, x.shape[1]):
            from modules import fused  # imports triton

            return fused.OPERATORS
    return PLAIN


def of_nvidia(device: torch.device) -> bool:
    """Whether a device is a card of NVIDIA's: PyTorch calls AMD's `cuda` too."""
    return device.type == "cuda" and torch.version.hip is None


@lru_cache
def triton_found() -> bool:
    """Whether triton is installed."""
    return importlib.util.find_spec("triton") is not None


def try_ahead(device: torch.device, widths: Sequence[int]) -> None:
    """Begin to compile and try the kernels for maps of these widths, beside what else is done."""
    if of_nvidia(device) and triton_found():
        named = torch.empty(0, device=device).device  # with its number, as tensors have it
        Thread(target=lambda: [fused_works(named, c) for c in dict.fromkeys(widths)], daemon=True).start()


def fused_works(device: torch.device, c: int, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether the fused kernels run on a device, for maps of c channels, and agree with the plain operators.

    It is tried once, on small blocks with random weights; a warning says what does not work.
    """
    if (device, c, dtype) not in KNOWN:
        with ONE_TRIAL:
            if (device, c, dtype) not in KNOWN:
                KNOWN[device, c, dtype] = _tried(device, c, dtype)
    return KNOWN[device, c, dtype]


def _tried(device: torch.device, c: int, dtype: torch.dtype) -> bool:
    try:
        from modules import fused

        with torch.no_grad():
            _compare(fused.OPERATORS, device, c, dtype)
    except Exception as error:  # whatever a compiler or a driver raises
        reason = " ".join(str(error).split())[:200]
        warnings.warn(f"the fused kernels are not used, as they fail here ({reason})", stacklevel=2)
        return False
    return True


def _compare(ops: Operators, device: torch.device, c: int, dtype: torch.dtype) -> None:
    """ValueError where blocks with other operators differ from plain ones by more than rounding does."""
    draw = torch.Generator(device).manual_seed(0)  # its own: other threads draw meanwhile
    with torch.device("meta"):
        residual, attention = ResBlock(c), AttnBlock(c, c, max(1, c // HEAD_WIDTH))
    for block in (residual, attention):
        block.to_empty(device=device).to(dtype).eval()
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=draw)
    nn.init.normal_(residual.channelwise[2].gamma, generator=draw)
    drawn = partial(torch.randn, generator=draw, device=device)
    x, tokens = TRIED_SCALE * drawn(2, c, *TRIED_SIZE), drawn(2, TRIED_TOKENS, c)
    x, condition = x.to(dtype), attention.keys_values(tokens.to(dtype))
    for block, other in ((residual, None), (attention, condition)):
        plain, own = (block(x, other, each).float() for each in (PLAIN, ops))
        if not (own - plain).norm() <= TOLERANCE * (plain - x.float()).norm():
            raise ValueError(f"{type(block).__name__} gives other values")
