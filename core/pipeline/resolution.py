"""Sizes: from the picture that was asked for to the latents of every stage (paper sections 3.1 and 3.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from core.config.schema import LatentGeometry, StageCConfig, stage_c_sizes
from core.config.sizes import Size

STAGE_A_COMPRESSION = 4  # pixels per side of one Stage B latent pixel
STAGE_B_PATCH = 2  # Stage B's latent sides must divide by this
MIN_SIDE = 64  # px; Stage B halves its patches three times, and less would leave it nothing
MAX_SIDE = 16384  # px
MAX_LR_TOKENS = 1024  # positions that the guidance knows


@dataclass(frozen=True)
class Plan:
    """All sizes on the way to one picture, as (height, width) unless named otherwise."""

    height: int  # pixels, as asked
    width: int
    lr_height: int  # pixels of the low-resolution pass
    lr_width: int
    lr_latent: Size  # Stage C, low-resolution pass
    hr_latent: Size  # Stage C, high-resolution pass
    stage_b_latent: Size  # rounded up to whole patches
    decoded_height: int  # pixels that Stage A decodes, cropped to height and width
    decoded_width: int


def plan(height: int, width: int, geometry: LatentGeometry) -> Plan:
    """Plan the sizes of a picture of height x width pixels; ValueError where one of them cannot be."""
    _check_size(height, width)
    lr_height, lr_width = _lr_size(height, width, geometry.lr_cells, geometry.stride)
    lr_latent = latent_size(lr_height, lr_width, geometry)
    if lr_latent[0] * lr_latent[1] > MAX_LR_TOKENS:
        raise ValueError(
            f"a picture of {height} x {width} (height x width) would be guided by a latent of "
            f"{lr_latent[0]} x {lr_latent[1]}, more than the {MAX_LR_TOKENS} pixels that the guidance knows; "
            f"choose sides that are closer to each other, or lr_cells below {geometry.lr_cells}"
        )
    stage_b = _stage_b_size(height, width)
    return Plan(
        height=height,
        width=width,
        lr_height=lr_height,
        lr_width=lr_width,
        lr_latent=lr_latent,
        hr_latent=latent_size(height, width, geometry),
        stage_b_latent=stage_b,
        decoded_height=stage_b[0] * STAGE_A_COMPRESSION,
        decoded_width=stage_b[1] * STAGE_A_COMPRESSION,
    )


def with_low_of(sizes: Plan, of: Size, geometry: LatentGeometry) -> Plan:
    """The plan with the low-resolution pass of another picture (height, width) of the same aspect ratio.

    ValueError where the ratios differ by more than one pixel of Stage C's latent makes up.
    """
    if not same_aspect((sizes.height, sizes.width), of, geometry):
        raise ValueError(
            f"a picture of {sizes.height} x {sizes.width} (height x width) cannot go on from the "
            f"low-resolution pass of one of {of[0]} x {of[1]}: ask for a size of the same aspect ratio, such "
            f"as {sizes.height} x {round(sizes.height * of[1] / of[0])}"
        )
    low = plan(*of, geometry)
    return replace(sizes, lr_height=low.lr_height, lr_width=low.lr_width, lr_latent=low.lr_latent)


def same_aspect(size: Size, other: Size, geometry: LatentGeometry) -> bool:
    """Whether sizes (height, width) in pixels have one aspect ratio, but for a pixel of Stage C's latent."""
    excess = abs(size[0] * other[1] - size[1] * other[0])
    return excess <= geometry.compression * max(other)


def low_picture(sizes: Plan, geometry: LatentGeometry) -> Plan:
    """The plan of decoding the low-resolution latent at its own size; ValueError for less than MIN_SIDE."""
    return plan(sizes.lr_height, sizes.lr_width, geometry)


def plan_for(config: StageCConfig, height: int, width: int, lr_size: Size | None = None) -> Plan:
    """The plan of a picture by a Stage C, which may halve its latents; ValueError for too small ones.

    Its low-resolution pass is that of a picture of `lr_size`, if given, as in `with_low_of`.
    """
    sizes = plan(height, width, config.geometry)
    if lr_size is not None:
        sizes = with_low_of(sizes, lr_size, config.geometry)
    least = 2 ** sum(stage_c_sizes(config).switch_level)
    if min(*sizes.lr_latent, *sizes.hr_latent) < least:
        low = f"{sizes.lr_latent[0]} x {sizes.lr_latent[1]}"
        raise ValueError(
            f"a picture of {height} x {width} (height x width) is too narrow for this Stage C, which halves "
            f"its latents, of which one would be {low}: choose sides that are closer to each other"
        )
    return sizes


def part_of(whole: Plan, hr_latent: Size, height: int, width: int) -> Plan:
    """The plan of a part of a picture, which the whole's low-resolution pass guides."""
    stage_b = _stage_b_size(height, width)
    decoded = {
        "decoded_height": stage_b[0] * STAGE_A_COMPRESSION,
        "decoded_width": stage_b[1] * STAGE_A_COMPRESSION,
    }
    return replace(whole, height=height, width=width, hr_latent=hr_latent, stage_b_latent=stage_b, **decoded)


def latent_size(height: int, width: int, geometry: LatentGeometry) -> Size:
    """Stage C's latent (height, width) of a picture in pixels."""
    return math.ceil(height / geometry.compression), math.ceil(width / geometry.compression)


def lr_training_size(height: int, width: int, geometry: LatentGeometry) -> Size:
    """The low-resolution (height, width) in pixels that training pairs with a picture of height x width."""
    return _lr_size(height, width, geometry.lr_train_cells, geometry.stride)


def guidance_strength(latent: Size, table: Sequence[tuple[int, float]]) -> float:
    """The guidance's strength on the up path for an HR latent (height, width).

    `table` has (from this many latent pixels on, strength), large to small, the last from 0.
    """
    pixels = latent[0] * latent[1]
    return next(strength for start, strength in table if pixels >= start)


def _check_size(height: int, width: int) -> None:
    for name, side in (("height", height), ("width", width)):
        if not MIN_SIDE <= side <= MAX_SIDE:
            raise ValueError(f"the {name} must be from {MIN_SIDE} to {MAX_SIDE} pixels, not {side}")


def _lr_size(height: int, width: int, cells: int, stride: int) -> Size:
    """About cells² cells of the same aspect ratio, in pixels (in floats, as the published sizes were)."""
    root = math.sqrt(height / width)
    lr = math.floor(cells * root) * stride, math.floor(cells / root) * stride
    if 0 in lr:
        raise ValueError(
            f"a picture of {height} x {width} (height x width) is too narrow: "
            f"one side may be {cells * cells} times the other at most"
        )
    return lr


def _stage_b_size(height: int, width: int) -> Size:
    patch = STAGE_A_COMPRESSION * STAGE_B_PATCH
    return math.ceil(height / patch) * STAGE_B_PATCH, math.ceil(width / patch) * STAGE_B_PATCH
