"""Colours in floating point: between ICC profiles and sRGB, so that pictures of 16 bits keep their levels.

Pillow's Little CMS converts 8 bits a colour. Profiles made of curves and a matrix, as those of screens and
cameras are, are therefore computed here.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from core.pictures.profiles import DAMAGED, srgb_profile, srgb_transform

CURVE_POINTS = 65536  # every level of 16 bits
WHITE = (0.9642, 1.0, 0.8249)  # XYZ of D50, which profiles are relative to
BAND = 1 << 20  # pixels that are converted at once


def into_srgb(colours: NDArray[np.float32], profile: bytes) -> NDArray[np.float32]:
    """Colours (H, W, 1 or 3) in [0, 1] of a profile that `fits`, as sRGB (H, W, 3)."""
    mode = "L" if colours.shape[-1] == 1 else "RGB"
    transform = srgb_transform(profile, mode)
    if transform is None:
        return colours.repeat(3 if mode == "L" else 1, axis=-1)
    source = _Profile.read(profile)
    if source is None:
        return _by_levels(colours, lambda image: ImageCms.applyTransform(image, transform))
    return _in_bands(colours, lambda band: _srgb().encoded(source.to_xyz(band)))


def out_of_srgb(colours: NDArray[np.float32], profile: bytes, mode: str) -> NDArray[np.float32] | None:
    """sRGB colours (H, W, 3) in [0, 1] as those of a profile that `fits` the mode, L or RGB: (H, W, 1 or 3).

    None if the profile only tells the way to its colours' looks, not back.
    """
    if srgb_transform(profile, mode) is None and mode == "RGB":
        return colours
    target = _Profile.read(profile)
    if target is not None:
        return _in_bands(colours, lambda band: target.encoded(_srgb().to_xyz(band)))
    try:
        to = ImageCms.ImageCmsProfile(BytesIO(profile))
        transform = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), to, "RGB", mode)
    except DAMAGED:
        return None
    return _by_levels(colours, lambda image: ImageCms.applyTransform(image, transform))


def _in_bands(
    colours: NDArray[np.float32], way: Callable[[NDArray[np.float32]], NDArray[np.float64]]
) -> NDArray[np.float32]:
    """A conversion of one band of rows after the other, as its sums need much memory."""
    rows = max(1, BAND // colours.shape[1])
    bands = (colours[start : start + rows] for start in range(0, len(colours), rows))
    return np.concatenate([way(band).astype(np.float32) for band in bands])


def _by_levels(
    colours: NDArray[np.float32], way: Callable[[Image.Image], Image.Image]
) -> NDArray[np.float32]:
    """A conversion that exists in 8 bits only; what lies between two levels goes over as it is."""
    levels = (colours * 255).round().astype(np.uint8)
    converted = np.asarray(way(Image.fromarray(levels.squeeze(-1) if levels.shape[-1] == 1 else levels)))
    between = colours - levels.astype(np.float32) / 255
    if converted.ndim == 2:
        converted, between = converted[..., None], between.mean(-1, keepdims=True)
    return (converted.astype(np.float32) / 255 + between).clip(0, 1)


@cache
def _srgb() -> _Profile:
    profile = _Profile.read(srgb_profile())
    assert profile is not None
    return profile


@dataclass(frozen=True)
class _Profile:
    """Curves from encoded to linear values, one a channel, and the matrix (3, C) from these to XYZ."""

    curves: tuple[NDArray[np.float64], ...]
    matrix: NDArray[np.float64]

    @classmethod
    @lru_cache(maxsize=16)
    def read(cls, profile: bytes) -> _Profile | None:
        """None for a profile that needs more than curves and a matrix, or is damaged."""
        try:
            tags = _tags(profile)
            if profile[20:24] != b"XYZ " or b"A2B0" in tags:
                return None
            if profile[16:20] == b"GRAY":
                return cls((_curve(tags[b"kTRC"]),), np.array(WHITE)[:, None])
            curves = tuple(_curve(tags[name]) for name in (b"rTRC", b"gTRC", b"bTRC"))
            columns = [_fixed(tags[name][8:20]) for name in (b"rXYZ", b"gXYZ", b"bXYZ")]
            np.linalg.inv(np.array(columns))
        except (struct.error, LookupError, ValueError):  # numpy's LinAlgError is a ValueError
            return None
        return cls(curves, np.array(columns).T)

    def to_xyz(self, colours: NDArray[np.float32]) -> NDArray[np.float64]:
        """Encoded colours (..., C) as XYZ."""
        grid = np.linspace(0, 1, CURVE_POINTS)
        linear = [np.interp(colours[..., i], grid, curve) for i, curve in enumerate(self.curves)]
        return np.stack(linear, -1) @ self.matrix.T

    def encoded(self, xyz: NDArray[np.float64]) -> NDArray[np.float64]:
        """XYZ as encoded colours (..., C), clipped to those that the profile has."""
        grid = np.linspace(0, 1, CURVE_POINTS)
        back = np.array([[0.0, 1.0, 0.0]]) if len(self.curves) == 1 else np.linalg.inv(self.matrix)
        linear = xyz @ back.T
        return np.stack([np.interp(linear[..., i], curve, grid) for i, curve in enumerate(self.curves)], -1)


def _tags(profile: bytes) -> dict[bytes, bytes]:
    (count,) = struct.unpack_from(">I", profile, 128)
    entries = (struct.unpack_from(">4sII", profile, 132 + 12 * i) for i in range(min(count, 100)))
    return {name: profile[start : start + size] for name, start, size in entries}


def _fixed(content: bytes) -> list[float]:
    """Numbers of 16 bits before the point and 16 after."""
    return [value / 65536 for (value,) in struct.iter_unpack(">i", content)]


def _curve(tag: bytes) -> NDArray[np.float64]:
    """Linear values at CURVE_POINTS encoded values, never falling, in [0, 1]; see the ICC's specification."""
    x = np.linspace(0, 1, CURVE_POINTS)
    if tag[:4] == b"curv":
        (count,) = struct.unpack_from(">I", tag, 8)
        points = np.frombuffer(tag, ">u2", count, 12)
        if count == 1:
            return x ** (points[0] / 256)
        y = np.interp(x, np.linspace(0, 1, count), points / 65535) if count else x
    elif tag[:4] == b"para":
        y = _parametric(x, *struct.unpack_from(">H", tag, 8), _fixed(tag[12 : 12 + len(tag[12:]) // 4 * 4]))
    else:
        raise ValueError("a curve of an unknown kind")
    return np.maximum.accumulate(y.clip(0, 1))


def _parametric(x: NDArray[np.float64], kind: int, values: list[float]) -> NDArray[np.float64]:
    """(a x + b)^g + e from x = d on, below it c x + f."""
    g, a, b, c, d, e, f = [*values, *[0.0] * 7][:7]
    match kind:
        case 0:
            a, b, c, d, e, f = 1, 0, 0, 0, 0, 0
        case 1:
            c, d, e, f = 0, -b / a, 0, 0
        case 2:
            c, d, e, f = 0, -b / a, c, c
        case 3:
            e = f = 0
        case 4:
            pass
        case _:
            raise ValueError(f"a parametric curve of kind {kind}")
    return np.where(x >= d, np.maximum(a * x + b, 0) ** g + e, c * x + f)
