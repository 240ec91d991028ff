"""Pictures of more than 8 bits a colour, which Pillow reads and writes as grey alone.

They are written here, as PNG and TIFF, with all that Pillow writes beside the pixels. OpenCV reads them.
"""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, TiffImagePlugin

from core.pictures.metadata import inner_tags, upright

TOP = 65535  # the highest level of 16 bits
COMPRESSION = 1  # of zlib; a third of the default's time, as for 8 bits
PNG_KINDS = {1: 0, 2: 4, 3: 2, 4: 6}  # PNG's names of grey, grey and alpha, RGB, RGBA
STRIP = 1 << 20  # bytes of a TIFF that are packed together
WHITE_IS_ZERO, BLACK_IS_ZERO, IS_RGB = 0, 1, 2  # TIFF's PhotometricInterpretation
UNSIGNED = 1  # TIFF's SampleFormat
PREMULTIPLIED = 1  # TIFF's ExtraSamples: colours are multiplied by alpha
Levels = NDArray[np.uint16]


# -------------------------------------------------------------------------------------------- writing


def png_file(levels: Levels, chunks: Sequence[tuple[bytes, bytes]]) -> bytes:
    """A PNG file of levels (H, W, 1 to 4), with chunks before the pixels."""
    height, width, channels = levels.shape
    rows = levels.astype(">u2").reshape(height, -1).view(np.uint8)
    filtered = np.ones((height, rows.shape[1] + 1), np.uint8)  # 1: each byte less that of the pixel before
    filtered[:, 1:] = rows
    filtered[:, 1 + 2 * channels :] -= rows[:, : -2 * channels]
    header = struct.pack(">2I5B", width, height, 16, PNG_KINDS[channels], 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(filtered, COMPRESSION)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, content) for name, content in parts)


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def tiff_file(levels: Levels, profile: bytes, xmp: bytes, exif: bytes) -> bytes:
    """A TIFF file of levels (H, W, 1 to 4), packed in strips."""
    height, width, channels = levels.shape
    rows = max(1, STRIP // (2 * channels * width))
    strips = [_strip(levels[start : start + rows]) for start in range(0, height, rows)]
    tags = _described(exif)
    name = ExifTags.Base
    tags[name.ImageWidth], tags[name.ImageLength] = width, height
    tags[name.BitsPerSample], tags[name.SamplesPerPixel] = (16,) * channels, channels
    tags[name.Compression], tags[name.Predictor], tags[name.PlanarConfiguration] = 8, 2, 1
    tags[name.PhotometricInterpretation] = IS_RGB if channels > 2 else BLACK_IS_ZERO
    tags[name.RowsPerStrip], tags[name.StripByteCounts] = rows, tuple(map(len, strips))
    tags[name.StripOffsets] = tuple(itertools.accumulate(map(len, strips[:-1]), initial=0))  # behind the tags
    tags[name.InterColorProfile] = profile
    if xmp:
        tags[name.XMLPacket] = xmp
    if channels in (2, 4):
        tags[name.ExtraSamples] = 2  # alpha, by which colours are not multiplied
    start = struct.pack("<2sHI", b"II", 42, 8)
    return b"".join([start, tags.tobytes(len(start)), *strips])


def _described(exif: bytes) -> TiffImagePlugin.ImageFileDirectory_v2:
    """EXIF as the first tags of a TIFF."""
    source, tags = Image.Exif(), TiffImagePlugin.ImageFileDirectory_v2(b"II*\0\0\0\0\0")
    if exif:
        source.load(exif)
    for tag, value in {**source, **inner_tags(source)}.items():
        tags[tag] = value
    return tags


def _strip(levels: Levels) -> bytes:
    """Rows of pixels, each less the one before it in its row."""
    differences = levels.astype("<u2", order="C")
    differences[:, 1:] -= levels[:, :-1]
    return zlib.compress(differences, COMPRESSION)


# -------------------------------------------------------------------------------------------- reading


def decode(content: bytes, image: Image.Image) -> NDArray[np.float32] | None:
    """The pixels (H, W, 1 to 4) in [0, 1] of a file of more than 8 bits a channel, as they are stored.

    `image` is the file as Pillow opened it. Alpha is the last channel of 2 or 4. None for a file of 8 bits,
    and of kinds that are read with 8.
    """
    top = _top_level(content, image)
    if top is None or top < 256:
        return None
    stored = upright(content) if image.format == "TIFF" else content  # OpenCV would turn these alone
    levels = cv2.imdecode(np.frombuffer(stored, np.uint8), cv2.IMREAD_UNCHANGED)
    if levels is None or levels.dtype != np.uint16:
        return None
    levels = levels[..., None] if levels.ndim == 2 else levels
    if levels.shape[-1] > 2:
        grey = image.format == "PNG" and PNG_KINDS[2] == content[25]
        levels = levels[..., [0, 3] if grey else [2, 1, 0, 3][: levels.shape[-1]]]  # from BGR
    return _with_alpha(levels, image, top)


def _with_alpha(levels: Levels, image: Image.Image, top: int) -> NDArray[np.float32]:
    """Levels as numbers in [0, 1]; one transparent colour becomes alpha, and colours are parted from it."""
    tags = getattr(image, "tag_v2", {})
    pixels = (levels / np.float32(top)).clip(0, 1)
    if tags.get(ExifTags.Base.PhotometricInterpretation) == WHITE_IS_ZERO:
        pixels = 1 - pixels
    colour = image.info.get("transparency") if image.format == "PNG" else None
    if colour is not None:
        colours = levels[..., : len(colour) if isinstance(colour, tuple) else 1]
        alpha = (colours != np.array(colour)).any(-1, keepdims=True)
        pixels = np.concatenate([pixels[..., : colours.shape[-1]], alpha], axis=-1, dtype=np.float32)
    if PREMULTIPLIED in np.atleast_1d(tags.get(ExifTags.Base.ExtraSamples, ())) and pixels.shape[-1] == 4:
        alpha = pixels[..., 3:]
        pixels[..., :3] = np.divide(pixels[..., :3], alpha, out=pixels[..., :3], where=alpha > 0).clip(0, 1)
    return pixels


def _top_level(content: bytes, image: Image.Image) -> int | None:
    """The highest level that a file's channels can have; None where OpenCV does not read it as it is."""
    match image.format:
        case "PNG":
            return (1 << content[24]) - 1
        case "TIFF":
            return _top_level_of_tiff(image)
        case "PPM":
            return image.tile[0].args[-1] if image.tile and image.tile[0].codec_name == "ppm" else None
        case "AVIF":
            return _top_level_of_avif(content)
        case "JPEG2000":
            return _top_level_of_jpeg2000(content)
    return None


def _top_level_of_tiff(image: Image.Image) -> int | None:
    tags, name = image.tag_v2, ExifTags.Base  # type: ignore[attr-defined]
    plain = tags.get(name.PhotometricInterpretation) in (WHITE_IS_ZERO, BLACK_IS_ZERO, IS_RGB)
    if tags.get(name.PlanarConfiguration, 1) != 1 and max(tags.get(name.BitsPerSample, (8,))) > 8:
        raise ValueError(
            "its colours lie one after the other in 16 bits, which is not read: save it as a png"
        )
    unsigned = {*np.atleast_1d(tags.get(name.SampleFormat, UNSIGNED))} == {UNSIGNED}
    return TOP if plain and unsigned and {*tags.get(name.BitsPerSample, ())} == {16} else None


def _top_level_of_avif(content: bytes) -> int | None:
    at = content.find(b"av1C")
    if at < 0 or at + 6 >= len(content):
        return None
    high, twelve = content[at + 6] & 0x40, content[at + 6] & 0x20
    return (4095 if twelve else 1023) if high else 255


def _top_level_of_jpeg2000(content: bytes) -> int | None:
    at = content.find(b"\xff\x51")  # the marker of sizes; the first channel's bits stand behind 40 bytes
    return (1 << (content[at + 40] & 0x7F) + 1) - 1 if 0 <= at < len(content) - 40 else None
