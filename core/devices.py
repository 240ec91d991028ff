"""The device that a run is asked to use, or that there is."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from core import launch

if TYPE_CHECKING:
    import torch

KINDS = "cpu, cuda, cuda:N or mps"  # cuda is also what PyTorch calls AMD's cards


def device_named(device: torch.device | str | None) -> torch.device:
    """The asked device, or the GPU where there is one; ValueError for one that is not there.

    Apple's GPU, mps, is used where it is asked for.
    """
    if isinstance(device, str) and not re.fullmatch(r"[a-z]+(:\d+)?", device):
        raise ValueError(f"unknown device {device!r}: use {KINDS}")
    import torch  # late: flags are read without it

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    text = str(device)
    try:
        found = torch.device(text)
    except RuntimeError:
        raise ValueError(f"unknown device {text!r}: use {KINDS}") from None
    if found.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"the device {text!r} is not supported: use {KINDS}")
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"the device {text!r} is not there (PyTorch finds no GPU of Apple's): use cpu")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(f"the device {text!r} is not there ({count} CUDA devices found): use the device cpu")
    return found


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def own_device(device: str | None) -> torch.device:
    """As `device_named`, but that several processes of a machine take a GPU each.

    ValueError where there are fewer GPUs than processes.
    """
    import torch  # late, as above

    found, (number, processes) = device_named(device), launch.place()
    if found.type != "cuda" or found.index is not None or processes == 1:
        return found
    count = torch.cuda.device_count()
    if processes > count:
        raise ValueError(
            f"{processes} processes were started on a machine with {count} GPUs: start {count} of them"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)
