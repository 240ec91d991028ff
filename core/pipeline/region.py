"""A region of a picture that is made anew, with a margin around it that stays, guided by the whole picture.

The low-resolution pass sees the whole picture. Its features are prepared for the whole's size and cut to the
part that is made: the region and its margin, whole cells of the high-resolution latent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from core.config.sizes import Size
from core.pipeline.control import blend
from core.pipeline.given import Original, planes
from core.pipeline.passes import Start
from core.pipeline.resolution import MIN_SIDE, Plan, guidance_strength, part_of
from core.pipeline.sources import Encode, Part, Source
from modules.guidance import Guidance, GuidanceFeatures, PreparedGuidance
from modules.stage_c import StageC

MARGIN = 4  # cells of the high-resolution latent around a region


@dataclass(frozen=True)
class Region:
    """A rectangle in a picture, in pixels from its upper left corner."""

    x: int
    y: int
    width: int
    height: int

    def check(self, size: Size) -> None:
        """ValueError where it is empty, or not within a picture of `size` (height, width)."""
        fits = 0 <= self.x <= size[1] - self.width and 0 <= self.y <= size[0] - self.height
        if min(self.width, self.height) < 1 or not fits:
            raise ValueError(
                f"the region {self.x} {self.y} {self.width} {self.height} (x y width height) does not lie "
                f"within the picture of {size[1]} x {size[0]} (width x height)"
            )


@dataclass(frozen=True)
class Span:
    """Rows or columns of a latent: those of the part that is made, and of the region in it."""

    first: int
    last: int  # not among them
    region: tuple[int, int]

    @property
    def count(self) -> int:
        """How many are made."""
        return self.last - self.first

    def pixels(self, side: int, cells: int) -> tuple[int, int]:
        """The part's pixels, of a picture's side that the latent's cells lie over."""
        return round(self.first * side / cells), round(self.last * side / cells)


def touched(start: int, length: int, side: int, cells: int) -> tuple[int, int]:
    """The cells that pixels from `start` on touch, of `cells` over a side of pixels."""
    return start * cells // side, -(-(start + length) * cells // side)


def span_of(start: int, length: int, side: int, cells: int, unit: int) -> Span:
    """The cells of a part around pixels, from a multiple of `unit` on, where levels halve the latent."""
    region = touched(start, length, side, cells)
    least = -(-math.ceil(MIN_SIDE * cells / side + 1) // unit) * unit
    first = max(0, min(region[0] - MARGIN, cells - least)) // unit * unit
    last = min(cells, max(-(-(region[1] + MARGIN) // unit) * unit, first + least))
    return Span(first, last, region)


def region_source(
    picture: Original, region: Region, encode: Encode, whole: Plan, unit: int, strength: float
) -> Source:
    """What the passes go out from that make a region of a picture anew; `whole` is the picture's plan."""
    pixels = picture.pixels
    sides = ((region.y, region.height, whole.height, 0), (region.x, region.width, whole.width, 1))
    rows, columns = (span_of(*side[:3], whole.hr_latent[side[3]], unit) for side in sides)
    top, bottom = rows.pixels(whole.height, whole.hr_latent[0])
    left, right = columns.pixels(whole.width, whole.hr_latent[1])
    box = (slice(None), slice(top, bottom), slice(left, right))
    sizes = part_of(whole, (rows.count, columns.count), bottom - top, right - left)
    low = [touched(*side[:3], whole.lr_latent[side[3]]) for side in sides]
    high = [(span.region[0] - span.first, span.region[1] - span.first) for span in (rows, columns)]
    return Source(
        low=Start(encode(pixels, whole.lr_latent), strength, _inside(whole.lr_latent, low)),
        high=Start(encode(pixels[box], sizes.hr_latent), strength, _inside(sizes.hr_latent, high)),
        part=Part(whole, sizes, (rows.first, columns.first)),
        after=partial(put_back, picture, region, box),
    )


def _inside(size: Size, cells: Sequence[tuple[int, int]]) -> Tensor:
    """1 (1, 1, *size) in the cells from and to, of rows and columns."""
    inside = torch.zeros(1, 1, *size)
    (top, bottom), (left, right) = cells
    inside[..., top:bottom, left:right] = 1
    return inside


def put_back(picture: Original, region: Region, box: tuple[slice, ...], made: Tensor) -> Tensor:
    """A picture (3, H, W), or (4, H, W) with alpha, with the made part (box) in its region, blended inside.

    Outside the region all pixels are those of the file, also where they cannot be seen.
    """
    pixels = planes(picture.file.colours)
    hole = torch.zeros(1, *picture.size)
    hole[:, region.y : region.y + region.height, region.x : region.x + region.width] = 1
    pixels[box] = torch.lerp(pixels[box], made.to(pixels), blend(hole[box]))
    return pixels if picture.alpha is None else torch.cat([pixels, picture.alpha])


def prepare_guidance(
    guidance: Guidance,
    features: GuidanceFeatures,
    stage_c: StageC,
    sizes: Plan,
    part: Part | None,
    strengths: Sequence[tuple[int, float]],
) -> PreparedGuidance:
    """The guidance of a high-resolution pass: of a picture, or of a part of one."""
    whole = sizes.hr_latent if part is None else part.whole.hr_latent
    strength = guidance_strength(whole, strengths)
    prepared = guidance.prepare(features, stage_c.site_sizes(whole), strength)
    if part is None:
        return prepared
    return prepared.cut(stage_c.site_sizes(part.corner), stage_c.site_sizes(sizes.hr_latent))
