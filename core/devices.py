"""The device that a run is asked to use, or that there is."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def device_named(device: torch.device | str | None) -> torch.device:
    """The asked device, or the GPU where there is one; ValueError for one that is not there."""
    if isinstance(device, str) and not re.fullmatch(r"[a-z]+(:\d+)?", device):
        raise ValueError(f"unknown device {device!r}: use cpu, cuda or cuda:N")
    import torch  # late: flags are read without it

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    text = str(device)
    try:
        found = torch.device(text)
    except RuntimeError:
        raise ValueError(f"unknown device {text!r}: use cpu, cuda or cuda:N") from None
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"the device {text!r} is not supported: use cpu, cuda or cuda:N")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(f"the device {text!r} is not there ({count} CUDA devices found): use the device cpu")
    return found
