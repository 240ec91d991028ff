"""How much memory was taken, and how much is left."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

import psutil
import torch
from torch import Tensor

try:
    import resource
except ImportError:  # Windows
    resource = None


COMMON = (0, 0)  # of torch's pools of a GPU's memory, the one that all tensors share


def peak_memory(device: torch.device) -> int:
    """The most memory in bytes: a GPU's since the last reset, on the CPU the process's since its start.

    0 where the system does not tell (Windows).
    """
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_host_memory()


def peak_host_memory() -> int:
    """The most memory of this process since its start, in bytes, weights in mapped files included.

    0 where the system does not tell (Windows).
    """
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_memory(device: torch.device) -> int:
    """What this process can still take on a device, in bytes."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    if torch.cuda.get_allocator_backend() != "native":  # such as ComfyUI may choose: it tells no more
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    number = torch.cuda.current_device() if device.index is None else device.index
    kept = sum(  # by torch, for what comes; what it keeps for recorded steps nothing else can take
        segment["total_size"] - segment["allocated_size"]
        for segment in torch.cuda.memory_snapshot()
        if segment["device"] == number and segment.get("segment_pool_id", COMMON) == COMMON
    )
    return torch.cuda.mem_get_info(device)[0] + kept


def host_memory(shape: Sequence[int], dtype: torch.dtype, pinned: bool) -> Tensor:
    """A tensor without content in system memory, *pinned* there if a GPU copies from and to it.

    Systems can limit what may be pinned (Windows with WSL, containers): then it is not, with a warning.
    """
    if pinned:
        try:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            warnings.warn(f"the system pins no more memory, so copies are slower: {reason}", stacklevel=2)
    return torch.empty(shape, dtype=dtype)
