"""What pictures go out from besides their prompt, as users name it: a picture, its region, image prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from core.config.arguments import number, whole_number
from core.config.sizes import Size
from core.pipeline.given import Given, Original, original, shown
from core.pipeline.passes import Start, check_strength
from core.pipeline.region import Region, region_source
from core.pipeline.resolution import Plan
from core.pipeline.sources import Encode, Source
from core.weights.image_encoder import PictureEncoder
from core.weights.lora.merging import split_weight

STRENGTH = 0.6  # of image to image; a region is made wholly anew


@dataclass(frozen=True)
class Origin:
    """A picture to go out from, how much of it is made anew and where, and pictures beside the prompt."""

    picture: Original | None
    strength: float
    region: Region | None
    prompts: tuple[tuple[Image.Image, float], ...]  # with their weights
    flags: dict[str, Any]  # of inference/test_t2i.py, for the same

    def source(self, sizes: Plan, encode: Encode, unit: int) -> Source:
        """What the passes of a picture go out from, without its image prompts.

        `unit`: cells of Stage C's latent that belong together, where its levels halve it.
        """
        if self.picture is None:
            return Source()
        if self.region is not None:
            return region_source(self.picture, self.region, encode, sizes, unit, self.strength)
        pixels = middle(self.picture.pixels, (sizes.height, sizes.width))
        low, high = (encode(pixels, size) for size in (sizes.lr_latent, sizes.hr_latent))
        return Source(low=Start(low, self.strength), high=Start(high, self.strength))

    def size(self, height: int | None, width: int | None) -> tuple[int | None, int | None]:
        """The asked size; where a region is mended, the picture's own. ValueError for another one."""
        return (height, width) if self.region is None else mended_size(self.picture.size, height, width)


def mended_size(own: Size, height: int | None, width: int | None) -> Size:
    """That of a picture of which a region is mended, its own; ValueError where another one is asked for."""
    if (height or own[0], width or own[1]) != own:
        raise ValueError(
            f"a region is mended at the picture's own size, {own[0]} x {own[1]} (height x width): "
            "ask for no other"
        )
    return own


def origin(
    init_image: Given | None = None,
    strength: float | None = None,
    region: Sequence[int] | None = None,
    image_prompt: object = None,
) -> Origin | None:
    """What a user named; None where that is nothing. ValueError, TypeError or OSError for what is wrong.

    An image prompt is a picture, "FILE:WEIGHT", a pair of a picture and its weight, or a list of these.
    """
    if init_image is None and (strength is not None or region is not None):
        raise ValueError("a strength or a region is of a picture: give that as init_image")
    prompts = [] if image_prompt is None else _prompts(image_prompt)
    if init_image is None and not prompts:
        return None
    if strength is None:
        strength = STRENGTH if region is None else 1.0
    check_strength(number("strength", strength))
    picture = None if init_image is None else original("init_image", init_image)
    found = None
    if region is not None:
        if len(region) != 4:
            raise ValueError(f"a region has four numbers, x, y, width and height, not {list(region)}")
        found = Region(*(whole_number("region", value) for value in region))
        found.check(picture.size)
    for _, weight in prompts:
        if not 0 <= weight <= 1:
            raise ValueError(f"the weight of an image prompt must be from 0 to 1, not {weight:g}")
    flags = {
        "init_image": str(init_image) if isinstance(init_image, str | Path) else None,
        "strength": None if init_image is None else strength,
        "region": None if region is None else list(region),
        "image_prompt": [
            f"{given}:{weight:g}" if isinstance(given, str | Path) else None for given, weight in prompts
        ],
    }
    seen = tuple((shown("image_prompt", given), weight) for given, weight in prompts)
    return Origin(picture, strength, found, seen, flags)


def _prompts(given: object) -> list[tuple[Given, float]]:
    """Image prompts with their weights."""
    if given is None:
        raise ValueError("an image prompt was no file, so that its picture is not known: give it again")
    if isinstance(given, str | Path):
        return [split_weight(str(given))]
    if isinstance(given, Image.Image):
        return [(given, 1.0)]
    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], int | float):
        return [(given[0], number("the weight of an image prompt", given[1]))]
    if not isinstance(given, list | tuple):
        raise TypeError(f"image_prompt must be a picture, with its weight, or a list of them, not {given!r}")
    return [pair for one in given for pair in _prompts(one)]


def embedding(
    prompts: Sequence[tuple[Image.Image, float]], encoder: PictureEncoder, width: int, device: torch.device
) -> Tensor:
    """The mean (1, 1, width) of the pictures' embeddings, each times its weight, on the CPU.

    ValueError where the encoder's embeddings have another width than Stage C's.
    """
    embedded = torch.cat([weight * encoder.encode(image, device).float() for image, weight in prompts])
    if embedded.shape[-1] != width:
        raise ValueError(
            f"the image encoder gives {embedded.shape[-1]} numbers, but this Stage C takes {width}: name the "
            "encoder of its family"
        )
    return embedded.mean(dim=0, keepdim=True).cpu()


def middle(pixels: Tensor, shape: Size) -> Tensor:
    """The largest middle part of pixels (C, H, W) in the shape of `shape`, but for less than a pixel."""
    scale = min(side / asked for side, asked in zip(pixels.shape[-2:], shape, strict=True))
    height, width = (max(1, round(scale * side)) for side in shape)
    top, left = (pixels.shape[-2] - height) // 2, (pixels.shape[-1] - width) // 2
    return pixels[:, top : top + height, left : left + width]
