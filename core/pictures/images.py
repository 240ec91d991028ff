"""Pictures: tensors to files and back, file names that are safe everywhere, and the settings in a picture."""

from __future__ import annotations

import itertools
import json
import os
import struct
import unicodedata
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from io import BytesIO
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from PIL import ExifTags, Image, ImageCms, PngImagePlugin, UnidentifiedImageError

from core.pictures.files import METADATA_KEY, SUFFIXES, Beside, check_format, learn_formats, write_file
from core.pictures.metadata import EXIF_ASCII, settings_in_xmp, stored_xmp
from core.pictures.profiles import srgb_transform

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    Levels = NDArray[np.uint16]

MAX_PIXELS = 16384 * 16384  # the largest picture that is read; the largest that is made
PROBE_BYTES = 4096  # that a folder must take
RESERVED_NAMES = {"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(10))}
NOT_DRAWN = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # Pillow knows them, but needs other programs
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange height and width
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # what makes a picture of an EXIF orientation upright
# What Pillow raises for damaged files, beyond OSError and ValueError.
DAMAGED = (
    OSError, ValueError, SyntaxError, EOFError, TypeError, LookupError, ArithmeticError, AttributeError,
    RuntimeError, SystemError, struct.error, zlib.error,
)  # fmt: skip

# Pillow's own limits are smaller than this project's largest picture, and than texts that tools write.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `open_image` refuses them itself
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = MAX_PIXELS  # bytes


# --------------------------------------------------------------------------------------------- pictures


def to_image(pixels: Tensor) -> Image.Image:
    """A picture from pixels (3, H, W), or (4, H, W) with alpha, clamped to [0, 1] and rounded to 8 bits.

    ValueError if any is NaN.
    """
    _refuse_nan(pixels)
    eight_bit = (pixels.float().clamp(0, 1) * 255).round().byte()
    return Image.fromarray(eight_bit.permute(1, 2, 0).cpu().contiguous().numpy())


class NamedBytes(BytesIO):
    """A file's content in memory, which error messages call by a name."""

    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(content)
        self._name = name

    def __str__(self) -> str:
        return self._name

    def __format__(self, spec: str) -> str:
        return format(self._name, spec)


@cache
def picture_suffixes() -> frozenset[str]:
    """The suffixes, in lower case, of the picture formats that this installation's Pillow reads."""
    learn_formats()
    suffixes = Image.registered_extensions()
    known = {*Image.OPEN, "MPO"} - NOT_DRAWN  # MPO: opened as the JPEG that it begins with
    return frozenset(suffix for suffix, format in suffixes.items() if format in known)


def to_levels(pixels: Tensor) -> Levels:
    """Levels of 16 bits (H, W, 3) from pixels (3, H, W), as `to_image` makes those of 8."""
    _refuse_nan(pixels)
    sixteen_bit = (pixels.float().clamp(0, 1) * 65535).round().int().permute(1, 2, 0)
    return sixteen_bit.cpu().contiguous().numpy().astype("uint16")


def _refuse_nan(pixels: Tensor) -> None:
    if pixels.isnan().any():
        raise ValueError(
            "the decoded picture holds NaN; check the weight files, use bfloat16 or float32, and weights of "
            "prompts, LoRAs and controls, and a cfg, of a usual size"
        )


def load_image(path: str | Path, ground: str = "white") -> Image.Image:
    """Read a picture as RGB, upright, its colours sRGB, of the colour `ground` where it is transparent.

    FileNotFoundError, or ValueError for what is not a picture, is damaged or has more than MAX_PIXELS.
    """
    with open_image(path) as image:
        return upright_rgb(image, path, ground)


def upright_rgb(image: Image.Image, name: object, ground: str = "white") -> Image.Image:
    """The pixels of a picture that was just opened, as `load_image` gives them.

    ValueError, which calls the picture by its name, if it is damaged.
    """
    rgb, alpha = upright_parts(image, name)
    return rgb if alpha is None else Image.composite(rgb, Image.new("RGB", rgb.size, ground), alpha)


def upright_parts(image: Image.Image, name: object) -> tuple[Image.Image, Image.Image | None]:
    """The colours of a picture that was just opened, also where they cannot be seen, and its alpha, if any.

    8-bit sRGB, its profile obeyed, and grey, both upright, without metadata. ValueError as in `upright_rgb`.
    """
    try:
        image.load()
        turn = TURNS.get(orientation(image))
        image = _in_eight_bits(image if turn is None else image.transpose(turn))
        rgb = _in_srgb(image)
        rgb.info = {}  # a profile left in it would be written into files and obeyed once more
        return rgb, image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    except DAMAGED as error:
        raise ValueError(f"{name}: the picture is damaged ({error})") from None


def orientation(image: Image.Image) -> int:
    """How the stored picture is turned, as in EXIF; 1, upright, where its metadata are damaged."""
    try:
        return Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)  # PNG's own would read the pixels
    except DAMAGED:
        return 1


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey, and floats to 1, scaled to 8 bits: Pillow's own conversion would clip them."""
    colour = image.info.get("transparency")  # one that is transparent
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
        if isinstance(colour, int):
            image.info["transparency"] = round(colour / 257)
    elif image.mode == "F" and image.getextrema()[1] <= 1:
        image = image.point(lambda value: value * 255 + 0.5).convert("L")
    elif isinstance(colour, tuple) and max(colour) > 255:
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in colour)
    elif image.mode == "P" and colour is not None:
        image = image.convert("RGBA")
    return image


def _in_srgb(image: Image.Image) -> Image.Image:
    """The colours alone, as RGB."""
    grey, mode = Image.getmodebase(image.mode) == "L", image.mode
    plain = image.convert("L" if grey else mode if mode == "CMYK" else "RGB")
    profile = image.info.get("icc_profile")
    transform = srgb_transform(profile, plain.mode) if profile else None
    return ImageCms.applyTransform(plain, transform) if transform else plain.convert("RGB")


def open_image(path: str | Path) -> Image.Image:
    """Open a picture without decoding it; errors as in `load_image`, and the caller closes it."""
    too_large = f"{path}: the picture has more than {MAX_PIXELS} pixels, the most that is read"
    picture_suffixes()  # Pillow learns all its formats
    named = isinstance(path, str | Path) and os.path.exists(path)
    if named and not (os.path.isfile(path) or os.path.isdir(path)):  # it may wait forever for a writer
        raise ValueError(f"{path}: this is a pipe or a device: save the picture in a file first")
    try:
        image = Image.open(path, formats=[format for format in Image.OPEN if format not in NOT_DRAWN])
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: this picture does not exist") from None
    except UnidentifiedImageError:
        raise ValueError(f"{path}: this file is not a picture in a known format") from None
    except Image.DecompressionBombError:
        raise ValueError(too_large) from None
    except DAMAGED as error:
        raise ValueError(f"{path}: the picture cannot be read ({error})") from None
    if not 0 < image.width * image.height <= MAX_PIXELS:
        image.close()
        raise ValueError(too_large if image.width * image.height else f"{path}: the picture has no pixels")
    return image


# ------------------------------------------------------------------------------------------- file names


def safe_stem(prompt: str, limit: int = 60) -> str:
    """A file name of about `limit` bytes, without suffix, from any prompt: its words, joined by _."""
    kept = (c if unicodedata.category(c)[0] in "LMN" else " " for c in unicodedata.normalize("NFKC", prompt))
    words = [word for word in "".join(kept).split() if any(map(str.isalnum, word))]
    stem = "_".join(words).encode()[:limit].decode(errors="ignore").strip("_")
    return f"image_{stem}".rstrip("_") if stem.lower() in RESERVED_NAMES | {""} else stem


def picture_stem(prompt: str, height: int, width: int, seed: int) -> str:
    """The file name of a picture, without suffix: <prompt>_<height>x<width>_<seed>."""
    return f"{safe_stem(prompt)}_{height}x{width}_{seed}"


def numbered_paths(folder: str | Path, stem: str, format: str) -> Iterator[Path]:
    """<stem>.<suffix>, <stem>_2.<suffix> … without end, with the suffix of a format."""
    suffix = SUFFIXES.get(format, format)
    for number in itertools.count(1):
        yield Path(folder, f"{stem}.{suffix}" if number == 1 else f"{stem}_{number}.{suffix}")


def take_path(folder: str | Path, stem: str, format: str) -> Path:
    """The first free one of `numbered_paths`, which an empty file takes at once."""
    for path in numbered_paths(folder, stem, format):
        with suppress(FileExistsError):
            path.touch(exist_ok=False)
            return path


def prepare_folder(folder: str | Path) -> None:
    """Make a folder if need be, and try to write in it; ValueError says what is in the way."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=folder) as probe:
            probe.write(bytes(PROBE_BYTES))
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"{folder} cannot be the output folder: a file is in its place") from None
    except (OSError, ValueError) as error:  # ValueError: a name that no system takes
        raise ValueError(f"{folder}: nothing can be written to this output folder ({error})") from None


# ----------------------------------------------------------------------------------- files with metadata


def save_image(
    image: Image.Image | Levels,
    path: str | Path,
    format: str,
    metadata: Mapping[str, Any],
    text: str = "",
    provenance: bool = False,
) -> Path:
    """Write a picture with its settings inside, whole or not at all, and return its path.

    Instead of an 8-bit image its levels of 16 bits (H, W, 3) may come; a format keeps what it can.
    `metadata` must be JSON: a PNG carries it as the text chunk "ultrapixel", the others in their XMP. `text`
    is what other programs read: a PNG's text chunk "parameters", else the UserComment of the EXIF.
    `provenance` says in the XMP that a model made the picture. An existing file is replaced
    (`save_new_image` does not). ValueError as in `check_format`.
    """
    path = Path(path)
    with written(image, path.parent, format, _beside(metadata, text, provenance)) as temporary:
        os.replace(temporary, path)
    return path


def save_new_image(
    image: Image.Image | Levels,
    folder: str | Path,
    stem: str,
    format: str,
    metadata: Mapping[str, Any],
    text: str = "",
    provenance: bool = False,
) -> Path:
    """As `save_image`, under the name of `take_path`: no file is replaced."""
    with written(image, Path(folder), format, _beside(metadata, text, provenance)) as temporary:
        path = _link_anew(temporary, folder, stem, format)
        if path is not None:
            return path
        path = take_path(folder, stem, format)
        try:
            os.replace(temporary, path)
        except OSError:
            path.unlink(missing_ok=True)
            raise
    return path


def _beside(metadata: Mapping[str, Any], text: str, provenance: bool) -> Beside:
    settings = json.dumps(dict(metadata))  # ASCII: any prompt survives, even half a surrogate pair
    return Beside(settings, text.replace("\0", "").encode(errors="replace").decode(), provenance)


def _link_anew(file: Path, folder: str | Path, stem: str, format: str) -> Path | None:
    """The first free one of `numbered_paths`, now a name of the file too; None where files have one name.

    Unlike a name that is taken first and filled afterwards, it is never seen empty.
    """
    for path in numbered_paths(folder, stem, format):
        try:
            os.link(file, path)
        except FileExistsError:
            continue
        except OSError:  # of file systems without links, and of names that cannot be
            return None
        return path


@contextmanager
def written(image: Image.Image | Levels, folder: Path, format: str, beside: Beside) -> Iterator[Path]:
    """A file in a folder with the picture in it, which is gone afterwards unless it was given a name."""
    size = (image.height, image.width) if isinstance(image, Image.Image) else image.shape[:2]
    check_format(format, *size)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{uuid4().hex}"
    try:
        write_file(temporary, image, format, beside)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def read_image_metadata(path: str | Path) -> dict[str, Any]:
    """The settings that `save_image` wrote into a picture; ValueError or FileNotFoundError if none."""
    with open_image(path) as image:
        try:
            stored = (
                image.info.get(METADATA_KEY) or settings_in_xmp(stored_xmp(image)) or _user_comment(image)
            )
            metadata = json.loads(stored)
        except (OSError, ValueError, SyntaxError, RecursionError):
            metadata = None
    if not isinstance(metadata, dict):
        raise ValueError(
            f"{path}: the picture carries no settings (other programs often remove them when they save it)"
        )
    return metadata


def _user_comment(image: Image.Image) -> str:
    """The settings where the first pictures of JPEG and WebP had them."""
    comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment, b"")
    return comment.removeprefix(EXIF_ASCII).decode(errors="replace") if isinstance(comment, bytes) else ""
