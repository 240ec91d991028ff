"""Pictures: tensors to files and back, file names that are safe everywhere, and the settings in a picture."""

from __future__ import annotations

import difflib
import json
import os
import unicodedata
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

MAX_PIXELS = 16384 * 16384  # the largest picture that is read; the largest that is made
FORMATS = ("png", "jpg", "webp")
PILLOW_NAMES = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}
MAX_SIDES = {"jpg": 65500, "webp": 16383}  # px; libjpeg stops 35 short of what the format allows
SAVE_OPTIONS: dict[str, dict[str, int]] = {
    "png": {"compress_level": 1},  # a third of the default's time, files a sixth larger
    "jpg": {"quality": 95, "subsampling": 0},  # 0: 4:4:4
    "webp": {"quality": 95},
}
METADATA_KEY = "ultrapixel"
EXIF_ASCII = b"ASCII\0\0\0"  # how the Exif standard begins a UserComment in ASCII
EXIF_LIMIT = 65533  # bytes of a JPEG segment
RESERVED_NAMES = {"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(10))}

# Pillow's own limit is smaller than this project's largest picture.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS


# --------------------------------------------------------------------------------------------- pictures


def to_image(pixels: Tensor) -> Image.Image:
    """A picture from pixels (3, H, W), clamped to [0, 1] and rounded to 8 bits; ValueError if any is NaN."""
    if pixels.isnan().any():
        raise ValueError("the decoded picture holds NaN; check the weight files and use bfloat16 or float32")
    eight_bit = (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(eight_bit.permute(1, 2, 0).cpu().contiguous().numpy())


def load_image(path: str | Path) -> Image.Image:
    """Read a picture as RGB, upright, its transparent parts white.

    FileNotFoundError, or ValueError for what is not a picture, is damaged or has more than MAX_PIXELS.
    """
    with open_image(path) as image:
        try:
            return as_rgb(ImageOps.exif_transpose(image))
        except (OSError, ValueError, SyntaxError) as error:
            raise ValueError(f"{path}: the picture is damaged ({error})") from None


def as_rgb(image: Image.Image) -> Image.Image:
    """The picture as RGB: transparent parts white, 16-bit grey scaled to 8."""
    if image.mode.startswith("I;16"):  # Pillow's own conversion would clip all above 255 to white
        image = image.point(lambda value: value * (1 / 257) + 0.5).convert("L")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def open_image(path: str | Path) -> Image.Image:
    """Open a picture without decoding it; errors as in `load_image`, and the caller closes it."""
    too_large = f"{path}: the picture has more than {MAX_PIXELS} pixels, the most that is read"
    try:
        image = Image.open(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: this picture does not exist") from None
    except UnidentifiedImageError:
        raise ValueError(f"{path}: this file is not a picture in a known format") from None
    except Image.DecompressionBombError:
        raise ValueError(too_large) from None
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{path}: the picture cannot be read ({error})") from None
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise ValueError(too_large)
    return image


# ------------------------------------------------------------------------------------------- file names


def safe_stem(prompt: str, limit: int = 60) -> str:
    """A file name of about `limit` bytes, without suffix, from any prompt: its words, joined by _."""
    kept = (c if unicodedata.category(c)[0] in "LMN" else " " for c in unicodedata.normalize("NFKC", prompt))
    words = [word for word in "".join(kept).split() if any(map(str.isalnum, word))]
    stem = "_".join(words).encode()[:limit].decode(errors="ignore").strip("_")
    return f"image_{stem}".rstrip("_") if stem.lower() in RESERVED_NAMES | {""} else stem


def output_path(folder: str | Path, prompt: str, height: int, width: int, seed: int, format: str) -> Path:
    """The first free one of <prompt>_<height>x<width>_<seed>.<format>, the same with _2, with _3 …"""
    name = f"{safe_stem(prompt)}_{height}x{width}_{seed}"
    path, number = Path(folder, f"{name}.{format}"), 1
    while path.exists():
        number += 1
        path = Path(folder, f"{name}_{number}.{format}")
    return path


# ----------------------------------------------------------------------------------- files with metadata


def check_format(format: str, height: int, width: int) -> None:
    """ValueError if the format is not known, or cannot hold a picture of height x width pixels."""
    if format not in FORMATS:
        near = difflib.get_close_matches(format.lower(), FORMATS, n=1)
        hint = f"the nearest of {', '.join(FORMATS)} is {near[0]}" if near else f"use {', '.join(FORMATS)}"
        raise ValueError(f"the picture format {format!r} is not known; {hint}")
    limit = MAX_SIDES.get(format)
    if limit and max(height, width) > limit:
        raise ValueError(
            f"a {format} picture has at most {limit} pixels a side, not {height} x {width}; use png"
        )


def save_image(image: Image.Image, path: str | Path, format: str, metadata: Mapping[str, Any]) -> Path:
    """Write a picture with its settings inside, whole or not at all, and return its path.

    `metadata` must be JSON: a PNG carries it as text chunks ("ultrapixel" as JSON, "parameters" to read),
    JPEG and WebP as the UserComment of their EXIF. An existing file is replaced (`output_path` gives a free
    name). ValueError as in `check_format`.
    """
    check_format(format, image.height, image.width)
    path = Path(path)
    options = {**SAVE_OPTIONS[format], **_metadata_options(format, metadata)}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        image.save(temporary, PILLOW_NAMES[format], **options)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_image_metadata(path: str | Path) -> dict[str, Any]:
    """The settings that `save_image` wrote into a picture; ValueError or FileNotFoundError if none."""
    with open_image(path) as image:
        try:
            metadata = json.loads(image.info.get(METADATA_KEY) or _user_comment(image))
        except (OSError, ValueError, SyntaxError):
            metadata = None
    if not isinstance(metadata, dict):
        raise ValueError(
            f"{path}: the picture carries no settings (other programs often remove them when they save it)"
        )
    return metadata


def _metadata_options(format: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    text = json.dumps(dict(metadata))  # ASCII: any prompt survives, even half a surrogate pair
    if format == "png":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_itxt(METADATA_KEY, text)
        lines = "\n".join(f"{key}: {value}" for key, value in metadata.items())
        chunks.add_itxt("parameters", lines.encode(errors="replace").decode())
        return {"pnginfo": chunks}
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = EXIF_ASCII + text.encode()
    if format == "jpg" and len(exif.tobytes()) > EXIF_LIMIT:
        warnings.warn("the settings are too long for a jpg picture and are left out; use png", stacklevel=3)
        return {}
    return {"exif": exif}


def _user_comment(image: Image.Image) -> str:
    comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment, b"")
    return comment.removeprefix(EXIF_ASCII).decode(errors="replace") if isinstance(comment, bytes) else ""
