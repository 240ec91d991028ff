"""Formats of picture files, and a picture with what stands beside its pixels written into one of them."""

from __future__ import annotations

import difflib
import warnings
import zlib
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, PngImagePlugin, features

from core.pictures.metadata import EXIF_START, with_comment, xmp_packet
from core.pictures.profiles import srgb_profile

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SUFFIXES = {
    "png": "png", "png16": "png", "jpg": "jpg", "webp": "webp", "webp_lossless": "webp", "tiff": "tiff",
    "avif": "avif", "jxl": "jxl",
}  # fmt: skip
FORMATS = tuple(SUFFIXES)
UNPROFILED = ("jxl",)  # whose plugin writes sRGB alone, by name
DEEP = ("png16", "tiff")  # 16 bits a colour; the others have 8
OTHER_SUFFIXES = {"jpeg": "jpg", "tif": "tiff"}
PILLOW_NAMES = {
    "png": "PNG", "jpg": "JPEG", "webp": "WEBP", "webp_lossless": "WEBP", "avif": "AVIF", "jxl": "JXL",
}  # fmt: skip
MAX_SIDES = {  # px; libjpeg stops 35 short of what the format allows
    "jpg": 65500, "webp": 16383, "webp_lossless": 16383, "avif": 32768,
}  # fmt: skip
SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "png": {"compress_level": 1},  # a third of the default's time, files a sixth larger
    "jpg": {"quality": 95, "subsampling": 0},  # 0: 4:4:4
    "webp": {"quality": 95},
    "webp_lossless": {"lossless": True, "exact": True, "quality": 50, "method": 2},  # quality: of packing
    # Tiles depend on the threads: with as many everywhere, files are the same on all machines.
    "avif": {"quality": 90, "speed": 8, "subsampling": "4:4:4", "max_threads": 4},
    "jxl": {"quality": 95, "effort": 5, "lossless_jpeg": False, "use_container": True},
}
JPEG_LIMITS = {"exif": 65533, "xmp": 65504}  # bytes of a JPEG's segment, that of XMP less its name
METADATA_KEY = "ultrapixel"  # of the settings: a PNG's text chunk
TEXT_KEY = "parameters"  # of what other programs read: a PNG's text chunk
XMP_CHUNK = "XML:com.adobe.xmp"  # of XMP: a PNG's text chunk
PNG_START, PNG_DEPTH = b"\x89PNG\r\n\x1a\n", 24  # where a PNG tells its bits a colour
PROFILE_NAME = b"ICC Profile\0\0"  # and how it is packed


@dataclass(frozen=True)
class Beside:
    """What stands in a file beside the pixels; each format has its own places for it."""

    settings: str = ""  # JSON in ASCII, of the text chunk or the XMP
    text: str = ""  # what other programs read
    provenance: bool = False  # whether the XMP says that a model made the picture
    xmp: bytes = b""  # a packet from elsewhere
    exif: bytes = b""  # likewise
    profile: bytes = field(default_factory=srgb_profile)


# --------------------------------------------------------------------------------------------- formats


def check_format(format: str, height: int, width: int) -> None:
    """ValueError if the format is not known or lacks its package, or cannot hold height x width pixels."""
    if format not in FORMATS:
        near = difflib.get_close_matches(format.lower(), FORMATS, n=1)
        hint = f"the nearest of {', '.join(FORMATS)} is {near[0]}" if near else f"use {', '.join(FORMATS)}"
        raise ValueError(f"the picture format {format!r} is not known; {hint}")
    if format == "jxl" and find_spec("pillow_jxl") is None:
        raise ValueError("jxl pictures need a package that is missing: pip install pillow-jxl-plugin")
    if format == "avif" and not features.check("avif"):
        raise ValueError("this Pillow writes no avif pictures: pip install --upgrade pillow, or use png")
    limit = MAX_SIDES.get(format)
    if limit and max(height, width) > limit:
        raise ValueError(
            f"a {format} picture has at most {limit} pixels a side, not {height} x {width}; use png"
        )


def format_of(path: Path, bits: int | None = None, lossless: bool = False) -> str:
    """The format that a file's suffix asks for, of so many bits a colour; ValueError if there is none.

    Without `bits` a TIFF has 16, all others 8. `lossless` is for WebP, which else loses a little.
    """
    suffix = path.suffix.lower().removeprefix(".")
    suffix = OTHER_SUFFIXES.get(suffix, suffix)
    formats = [format for format in FORMATS if SUFFIXES[format] == suffix]
    if not formats:
        endings = ", ".join(f".{name}" for name in dict.fromkeys(SUFFIXES.values()))
        raise ValueError(f"{path}: a picture is saved under a name that ends in one of {endings}")
    if lossless and suffix in ("jpg", "avif", "jxl"):
        raise ValueError(f"{path}: a {suffix} picture is not saved without loss; use png, webp or tiff")
    deep = [format for format in formats if format in DEEP]
    plain = [format for format in formats if format not in DEEP]
    if bits not in (None, 8, 16) or not (found := deep if bits == 16 else plain if bits == 8 else formats):
        having = " or ".join(str(n) for n, some in ((8, plain), (16, deep)) if some)
        raise ValueError(f"{path}: a {suffix} picture has {having} bits a colour, not {bits}")
    return found[-1] if lossless and suffix == "webp" else found[0]


def format_of_file(path: Path) -> str:
    """The format that a picture file has, so that one like it can be written; png where there is none."""
    with path.open("rb") as file:
        head = file.read(4096)  # its start, with a profile
    deep = head.startswith(PNG_START) and head[PNG_DEPTH] == 16
    try:
        return format_of(path, 16 if deep else None, lossless=b"VP8L" in head)
    except ValueError:
        return FORMATS[0]


def learn_formats() -> None:
    """Let Pillow know all formats that it can read here, JPEG XL too where its plugin is installed."""
    Image.init()
    with suppress(ImportError):
        import pillow_jxl  # noqa: F401


# --------------------------------------------------------------------------------------------- writing


def write_file(path: Path, picture: Image.Image | NDArray[np.uint16], format: str, beside: Beside) -> None:
    """Write a picture, or its levels of 16 bits (H, W, 1 to 4), as one format, with its bits a colour."""
    if format in DEEP:
        path.write_bytes(_deep_file(picture, format, beside))
        return
    learn_formats()
    image = picture if isinstance(picture, Image.Image) else _in_8_bits(picture)
    xmp, exif = _tags(format, beside)
    options: dict[str, Any] = {"exif": EXIF_START + exif} if exif else {}
    if format == "png":
        options["pnginfo"] = _texts(beside, xmp)
    elif xmp:
        options["xmp"] = xmp
    options = _fitting_jpeg(options) if format == "jpg" else options
    image.save(path, PILLOW_NAMES[format], icc_profile=beside.profile, **SAVE_OPTIONS[format], **options)


def _deep_file(picture: Image.Image | NDArray[np.uint16], format: str, beside: Beside) -> bytes:
    from core.pictures.deep import png_file, tiff_file  # loads OpenCV

    xmp, exif = _tags(format, beside)
    if format == "tiff":
        return tiff_file(_in_16_bits(picture), beside.profile, xmp, exif)
    chunks = [(b"iCCP", PROFILE_NAME + zlib.compress(beside.profile))]
    chunks += [(b"eXIf", exif)] if exif else []
    chunks += [(chunk[0], chunk[1]) for chunk in _texts(beside, xmp).chunks]
    return png_file(_in_16_bits(picture), chunks)


def _tags(format: str, beside: Beside) -> tuple[bytes, bytes]:
    """XMP and EXIF; a PNG has settings and text in chunks of their own."""
    if SUFFIXES[format] == "png":
        return xmp_packet("", beside.provenance, beside.xmp), beside.exif
    exif = with_comment(beside.exif, beside.text) if beside.text else beside.exif
    return xmp_packet(beside.settings, beside.provenance, beside.xmp), exif


def _in_16_bits(picture: Image.Image | NDArray[np.uint16]) -> NDArray[np.uint16]:
    import numpy as np

    if not isinstance(picture, Image.Image):
        return picture
    levels = np.asarray(picture).astype(np.uint16) * np.uint16(257)
    return levels[..., None] if levels.ndim == 2 else levels


def _in_8_bits(levels: NDArray[np.uint16]) -> Image.Image:
    import numpy as np

    eight_bit = (levels / np.float32(257)).round().astype(np.uint8)
    return Image.fromarray(eight_bit.squeeze(-1) if eight_bit.shape[-1] == 1 else eight_bit)


def _fitting_jpeg(options: dict[str, bytes]) -> dict[str, bytes]:
    lost = {name for name, limit in JPEG_LIMITS.items() if len(options.get(name, b"")) > limit}
    for name in sorted(lost):
        what = {"xmp": "settings of --from_image", "exif": "parameters that other programs read"}[name]
        warnings.warn(f"the {what} are too long for a jpg picture and are left out; use png", stacklevel=6)
    return {name: content for name, content in options.items() if name not in lost}


def _texts(beside: Beside, xmp: bytes) -> PngImagePlugin.PngInfo:
    """The text chunks of a PNG."""
    chunks = PngImagePlugin.PngInfo()
    if beside.settings:
        chunks.add_itxt(METADATA_KEY, beside.settings)
    if beside.text:
        chunks.add_text(TEXT_KEY, beside.text)
    if xmp:
        chunks.add_itxt(XMP_CHUNK, xmp.decode(errors="replace"))
    return chunks
