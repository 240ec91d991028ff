"""ICC profiles: sRGB's own, whether others can be used, and the way from them to sRGB in 8 bits."""

from __future__ import annotations

import itertools
import struct
from functools import cache, lru_cache
from io import BytesIO

from PIL import Image, ImageChops, ImageCms

SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}  # of profiles, by the mode of the picture
DATE = struct.pack(">6H", 1999, 10, 18, 0, 0, 0)  # of sRGB's standard, instead of now
DAMAGED = (ImageCms.PyCMSError, OSError, ValueError, TypeError)


@cache
def srgb_profile() -> bytes:
    """The ICC profile of sRGB, which is embedded; always the same bytes."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile[:24] + DATE + profile[36:]


def fits(profile: bytes | None, mode: str) -> bool:
    """Whether a profile is whole, and of pictures of this mode: L, RGB or CMYK."""
    try:
        found = ImageCms.ImageCmsProfile(BytesIO(profile or b"")).profile.xcolor_space.strip()
    except DAMAGED:
        return False
    return found == SPACES[mode]


@lru_cache(maxsize=16)
def srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The way from an ICC profile to sRGB; None for a profile that is damaged, of another mode, or sRGB."""
    srgb = ImageCms.createProfile("sRGB")
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        transform = ImageCms.buildTransform(source, srgb, mode, "RGB")
    except DAMAGED:
        return None
    levels = bytes(itertools.chain.from_iterable(itertools.product(range(0, 256, 51), repeat=len(mode))))
    colours = Image.frombytes(mode, (len(levels) // len(mode), 1), levels)
    changed = ImageChops.difference(ImageCms.applyTransform(colours, transform), colours.convert("RGB"))
    return transform if max(high for _, high in changed.getextrema()) > 1 else None
