"""Quantised weights in files: float8 tensors, and the scales beside them, as ComfyUI and others write them.

A weight is its stored numbers times its scale, which is one number or one for each row.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

FLOAT8 = (
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
)  # fmt: skip
SCALES = ("scale_weight", "weight_scale")  # in place of `weight` at the end of a weight's name, or behind it
PART = 1 << 15  # numbers that are computed at once: few enough to need no second thread
WITHOUT_USE = ("scaled_fp8", "scale_input", "input_scale", "comfy_quant")  # where float8 is not computed in


def split_scales(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a file without what belongs to quantised ones, and the scales, by what they scale."""
    weights, scales = {}, {}
    for name, tensor in tensors.items():
        if (scaled := _scaled_by(name, tensors)) is not None:
            scales[scaled] = tensor
        elif not name.endswith(WITHOUT_USE):
            weights[name] = tensor
    return weights, scales


def _scaled_by(name: str, names: Mapping[str, Tensor]) -> str | None:
    """The weight that a tensor of this name scales."""
    for suffix in SCALES:
        if name.endswith(suffix):
            stem = name.removesuffix(suffix)
            candidates = (f"{stem}weight", stem[:-1], f"{stem}in_proj_weight")
            return next((candidate for candidate in candidates if candidate in names), None)
    return None


def is_quantised(tensor: Tensor, scale: Tensor | None) -> bool:
    """Whether a stored tensor is not the weight itself."""
    return scale is not None or tensor.dtype in FLOAT8


def dequantise(tensor: Tensor, scale: Tensor | None, weight: Tensor) -> None:
    """Fill a weight of the same shape from a stored tensor, in parts, so that little memory is taken.

    ValueError for a scale that is neither one number nor one for each row.
    """
    count = len(tensor) if tensor.dim() else 1
    by_row = scale is not None and scale.numel() > 1
    if by_row and scale.shape != (count,) and scale.shape != (count, *(1 for _ in tensor.shape[1:])):
        raise ValueError(
            f"its scale is of shape {tuple(scale.shape)}, neither one number nor one for each of the rows of "
            f"{tuple(tensor.shape)}"
        )
    if tensor.numel() == 0:
        return
    rows, goal = tensor.reshape(count, -1), weight.view(count, -1)
    factors = None if scale is None else scale.float().reshape(-1, 1)
    table = _table(tensor.dtype) if tensor.dtype in FLOAT8 else None
    step = max(1, PART // rows.shape[1])
    for start in range(0, count, step):
        part = rows[start : start + step]
        part = part.float() if table is None else _looked_up(table, part)
        if factors is not None:
            part = part * (factors[start : start + step] if by_row else factors)
        goal[start : start + step] = part


def _table(dtype: torch.dtype) -> Tensor:
    """What each of the 256 bytes means (256): looked up in there they are faster than torch converts them."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).float()


def _looked_up(table: Tensor, part: Tensor) -> Tensor:
    return table.index_select(0, part.view(torch.uint8).reshape(-1).int()).view(part.shape)
