"""Pictures that are given, to be made larger or anew: read with all that stands in them, and written alike.

Colours are sRGB in floating point, so that pictures of 16 bits keep their levels.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from core.pictures.colours import into_srgb, out_of_srgb
from core.pictures.deep import TOP, decode
from core.pictures.files import DEEP, UNPROFILED, Beside, format_of
from core.pictures.images import DAMAGED, NamedBytes, open_image, orientation, upright_parts, written
from core.pictures.metadata import stored_exif, stored_xmp, upright, upright_xmp
from core.pictures.profiles import fits, srgb_profile

MIN_SIDE = 16  # px
Pixels = NDArray[np.float32]


@dataclass(frozen=True)
class GivenPicture:
    """A picture from a file, upright, with what else stood there."""

    colours: Pixels  # (H, W, 3), sRGB in [0, 1]
    alpha: Pixels | None  # (H, W) in [0, 1]; 1 is opaque
    bits: int  # a colour in the file, 8 or 16
    mode: str  # of the colours in the file: L, RGB or CMYK
    profile: bytes | None  # the file's own ICC profile, of that mode; None without a usable one
    exif: bytes  # without the start that some formats want; orientation 1
    xmp: bytes  # orientation 1
    name: str  # of the file

    @property
    def height(self) -> int:
        """Pixels, upright."""
        return self.colours.shape[0]

    @property
    def width(self) -> int:
        """Pixels, upright."""
        return self.colours.shape[1]


# --------------------------------------------------------------------------------------------- reading


def read_given(path: str | Path | NamedBytes) -> GivenPicture:
    """Read a picture of any mode with all that stands in its file, or in a file's content.

    FileNotFoundError, or ValueError of one sentence that names the file, for what is not a picture, is
    damaged, or has fewer than MIN_SIDE pixels a side.
    """
    try:
        content = path if isinstance(path, NamedBytes) else NamedBytes(Path(path).read_bytes(), str(path))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: this picture does not exist") from None
    except OSError as error:
        raise ValueError(f"{path}: the picture cannot be read ({error})") from None
    with open_image(content) as image:
        if min(image.size) < MIN_SIDE:
            raise ValueError(
                f"{path}: the picture has {image.width} x {image.height} pixels, and at least {MIN_SIDE} a "
                "side are needed"
            )
        try:
            return _read(image, content.getvalue(), str(path))
        except DAMAGED as error:
            already = str(error).startswith(f"{path}: ")
            raise ValueError(str(error) if already else f"{path}: the picture is damaged ({error})") from None


def _read(image: Image.Image, content: bytes, name: str) -> GivenPicture:
    # Pillow turns a TIFF when it decodes it, and learns of some PNGs' EXIF only then.
    turned, exif = orientation(image), stored_exif(image) if image.format == "TIFF" else None
    stored = decode(content, image)
    mode = _mode(image) if stored is None else "L" if stored.shape[-1] < 3 else "RGB"
    rgb, alpha = upright_parts(image, name)  # also finds out whether the file is whole
    exif = stored_exif(image) if exif is None else exif
    profile = image.info.get("icc_profile")
    profile = profile if fits(profile, mode) else None
    others = mode, profile, upright(exif), upright_xmp(stored_xmp(image)), name
    if stored is None:
        grey = None if alpha is None else _in_unit(alpha)
        return GivenPicture(_in_unit(rgb), grey, 8, *others)
    turned = turned if image.format == "TIFF" else orientation(image)
    colours, transparency = _parted(np.ascontiguousarray(_turned(stored, turned)))
    return GivenPicture(_converted(colours, profile), transparency, 16, *others)


def _mode(image: Image.Image) -> str:
    return "CMYK" if image.mode == "CMYK" else "L" if Image.getmodebase(image.mode) == "L" else "RGB"


def _in_unit(image: Image.Image) -> Pixels:
    return np.asarray(image).astype(np.float32) / 255


def _parted(pixels: Pixels) -> tuple[Pixels, Pixels | None]:
    """Colours (H, W, 1 or 3) and alpha (H, W), if any."""
    if pixels.shape[-1] in (1, 3):
        return pixels, None
    return pixels[..., :-1], pixels[..., -1]


def _converted(colours: Pixels, profile: bytes | None) -> Pixels:
    """As sRGB (H, W, 3)."""
    if profile is not None:
        return into_srgb(colours, profile)
    return np.broadcast_to(colours, (*colours.shape[:2], 3)).copy()


def _turned(pixels: Pixels, orientation: int) -> Pixels:
    """Pixels (H, W, C) of an EXIF orientation, upright."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels[:, ::-1] if orientation in (2, 3, 6, 7) else pixels


# --------------------------------------------------------------------------------------------- writing


def write_alike(
    path: str | Path,
    colours: Pixels,
    given: GivenPicture,
    alpha: Pixels | None = None,
    *,
    keep_profile: bool = False,
    metadata: Mapping[str, Any] | None = None,
    text: str = "",
    provenance: bool = False,
) -> Path:
    """Write sRGB colours (H, W, 3), clamped to [0, 1], with the bits, EXIF and XMP of a given picture.

    The path's suffix names the format, as in `format_of`; the file is written whole or not at all, and
    replaces an existing one. `alpha` (H, W) is written too. With `keep_profile` the colours are converted to
    the given picture's profile, which is embedded, else that of sRGB; where a format or the profile does not
    allow it, that is a warning. `metadata`, `text` and `provenance` are those of `save_image`. ValueError for
    NaN, alpha in a jpg, and a suffix that is not known.
    """
    path = Path(path)
    bits = given.bits if path.suffix.lower() == ".png" else None
    format = format_of(path, bits)
    if not np.isfinite(colours).all():
        raise ValueError(f"{path}: the picture holds NaN; use bfloat16 or float32")
    if alpha is not None and format == "jpg":
        raise ValueError(f"{path}: a jpg picture has no transparent parts; use png")
    converted, profile = _in_own_profile(colours, given, format) if keep_profile else (colours, None)
    parts = [converted] if alpha is None else [converted, alpha[..., None]]
    picture = _levels(np.concatenate(parts, axis=-1), format)
    settings = json.dumps(dict(metadata)) if metadata else ""
    beside = Beside(settings, text, provenance, given.xmp, given.exif, profile or srgb_profile())
    with written(picture, path.parent, format, beside) as temporary:
        os.replace(temporary, path)
    return path


def _in_own_profile(colours: Pixels, given: GivenPicture, format: str) -> tuple[Pixels, bytes | None]:
    """Colours of a given picture's own profile, and that; unchanged ones, and None, where it has none."""
    if given.profile is None:
        return colours, None
    converted = None
    if given.mode != "CMYK" and format not in UNPROFILED:
        converted = out_of_srgb(colours.clip(0, 1), given.profile, given.mode)
    if converted is None:
        sentence = f"its profile cannot be kept in a {format} picture, which has sRGB's"
        warnings.warn(f"{given.name}: {sentence}", stacklevel=3)
        return colours, None
    return converted, given.profile


def _levels(pixels: Pixels, format: str) -> Image.Image | NDArray[np.uint16]:
    """As the format has them: 16-bit levels (H, W, 1 to 4), or an 8-bit image."""
    if format in DEEP:
        return (pixels.clip(0, 1) * TOP).round().astype(np.uint16)
    levels = (pixels.clip(0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(levels.squeeze(-1) if levels.shape[-1] == 1 else levels)
