"""Pictures that a user gives to go out from: files, URLs or PIL pictures, and their pixels."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from core.config.sizes import Size
from core.paths import located
from core.pictures.alike import MIN_SIDE, GivenPicture, read_given
from core.pictures.images import SIDEWAYS, NamedBytes, load_image, open_image, orientation
from core.pipeline.control import fetch, filled

PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")

Given = str | Path | Image.Image  # a picture: a file, an http(s) URL, or the picture itself


def readable(what: str, given: Given) -> str | NamedBytes:
    """The path or URL, or a PIL picture's content, which errors call `what`."""
    if isinstance(given, str | Path):
        return str(given) if "://" in str(given) else located(str(given))
    if not isinstance(given, Image.Image):
        raise TypeError(f"{what} must be a file, an http(s) URL or a PIL picture, not {given!r}")
    upright = ImageOps.exif_transpose(given)
    content = BytesIO()
    (upright if upright.mode in PNG_MODES else upright.convert("RGB")).save(content, "PNG")
    return NamedBytes(content.getvalue(), f"the {what}")


@dataclass(frozen=True)
class Original:
    """A picture that others go out from."""

    file: GivenPicture
    pixels: Tensor  # (3, H, W), sRGB in [0, 1]; what cannot be seen has the colour of the nearest that can
    alpha: Tensor | None  # (1, H, W)

    @property
    def size(self) -> Size:
        """Height and width."""
        return self.file.height, self.file.width


def original(what: str, given: Given) -> Original:
    """The picture that a user gave as `what`; OSError or ValueError, of one sentence, where it is none."""
    file = read_given(_content(what, given))
    if file.alpha is None:
        return Original(file, planes(file.colours), None)
    return Original(file, planes(filled(file.colours, file.alpha == 0)), planes(file.alpha[..., None]))


def shown(what: str, given: Given) -> Image.Image:
    """The picture that a user gave as `what`, as RGB, white where it is transparent; errors likewise."""
    return load_image(_content(what, given))


def _content(what: str, given: Given) -> str | NamedBytes:
    place = readable(what, given)
    return fetch(place) if isinstance(place, str) and "://" in place else place


def size_of(path: str | Path) -> Size:
    """The (height, width) of a picture file, upright, from its header; errors as in `original`."""
    with open_image(path) as image:
        size = image.size if orientation(image) in SIDEWAYS else image.size[::-1]
    if min(size) < MIN_SIDE:
        read_given(path)  # raises what is wrong
    return size


def planes(pixels: np.ndarray) -> Tensor:
    """Pixels (H, W, C) as (C, H, W), a copy."""
    return torch.from_numpy(pixels).permute(2, 0, 1).clone(memory_format=torch.contiguous_format)
