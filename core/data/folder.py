"""A folder of pictures and captions: what is usable in it, and pictures decoded to their bucket's size."""

from __future__ import annotations

import json
import logging
import os
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from core.data.buckets import cover_size
from core.images import as_rgb, open_image
from core.resolution import Size

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
METADATA = "metadata.jsonl"  # imagefolder: lines with file_name and one of CAPTION_KEYS
CAPTION_KEYS = ("caption", "text")
NO_CAPTION = " "  # what a null caption means to the published trainer
INDEX_THREADS = 8
INDEX_CHUNK = 256  # pictures that a thread takes at a time
DRAFT_MARGIN = 1.5  # a JPEG is read at reduced scale if at least this many times the resized picture remains
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange height and width
# What Pillow raises for damaged files, beyond OSError and ValueError.
DAMAGED = (OSError, ValueError, SyntaxError, EOFError, TypeError, LookupError, ArithmeticError, struct.error)


@dataclass(frozen=True)
class Sample:
    """A picture that can be used, by its name in the folder, upright."""

    name: str
    caption: str
    height: int  # pixels
    width: int


@dataclass(frozen=True)
class Broken:
    """Something that is skipped, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class FolderIndex:
    """What a folder holds, in the order of the names."""

    folder: Path
    samples: tuple[Sample, ...]
    broken: tuple[Broken, ...]


# --- the index ------------------------------------------------------------------------------------


def index_folder(folder: str | Path, max_broken: float = 0.1, caption: str | None = None) -> FolderIndex:
    """Search a folder through for pictures with captions, reading the pictures' headers only.

    A caption stands beside its picture as .json ({"caption": ...}) or .txt, or in a metadata.jsonl, unless
    `caption` is that of all. What is broken is logged by name; ValueError where that is more than the share
    `max_broken`, or nothing is found.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: this folder of training pictures does not exist")
    files = set(_files(folder))
    pictures = sorted(name for name in files if name.lower().endswith(IMAGE_SUFFIXES))
    if not pictures:
        raise ValueError(f"{folder}: the folder holds no picture ({', '.join(IMAGE_SUFFIXES)})")
    listed, broken = _read_metadata(folder, files) if caption is None else ({}, [])

    def read(names: Sequence[str]) -> list[Sample | Broken]:
        return [_read_sample(folder, name, files, listed, caption) for name in names]

    chunks = [pictures[start : start + INDEX_CHUNK] for start in range(0, len(pictures), INDEX_CHUNK)]
    with ThreadPoolExecutor(INDEX_THREADS) as pool:
        entries = list(chain.from_iterable(pool.map(read, chunks)))
    samples = tuple(entry for entry in entries if isinstance(entry, Sample))
    broken += [entry for entry in entries if isinstance(entry, Broken)]
    for entry in broken:
        log.warning("skipped %s: %s", entry.name, entry.reason)
    check_broken(str(folder), len(broken), len(samples) + len(broken), max_broken)
    return FolderIndex(folder, samples, tuple(broken))


def check_broken(source: str, broken: int, total: int, max_broken: float) -> None:
    """ValueError, with the counts, where more than the share `max_broken` of all pictures is broken."""
    if broken > max_broken * total:
        raise ValueError(
            f"{source}: {broken} of {total} pictures cannot be used, more than the share of {max_broken:g} "
            "that max_broken allows; the log names each with its reason"
        )


def _files(folder: Path) -> Iterator[str]:
    """Names of all files below the folder, relative to it, with /, less hidden ones and loops of links."""
    visited = set()
    for parent, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = [] if real in visited else sorted(name for name in folders if not name.startswith("."))
        if real not in visited:
            prefix = Path(parent).relative_to(folder).as_posix() + "/"
            yield from (prefix.removeprefix("./") + name for name in files if not name.startswith("."))
        visited.add(real)


def _raise(error: OSError) -> None:
    raise error


def _read_metadata(folder: Path, files: set[str]) -> tuple[dict[str, dict[str, Any]], list[Broken]]:
    """The entries by picture of all metadata.jsonl, and the lines that belong to no picture."""
    entries, broken = {}, []
    for listing in sorted(name for name in files if Path(name).name == METADATA):
        for number, line in enumerate((folder / listing).read_bytes().splitlines(), 1):
            if not line.strip():
                continue
            try:
                entry = _parse_object(line)
                if not isinstance(entry.get("file_name"), str):
                    raise ValueError("the line has no file_name")
                picture = Path(os.path.normpath(Path(listing).parent / entry["file_name"])).as_posix()
                if picture not in files:
                    raise ValueError(f"{picture} does not exist")
                entries[picture] = entry
            except ValueError as error:
                broken.append(Broken(f"{listing}:{number}", str(error)))
    return entries, broken


def _read_sample(
    folder: Path, name: str, files: set[str], listed: dict[str, dict[str, Any]], caption: str | None
) -> Sample | Broken:
    path = folder / name
    try:
        caption = _own_caption(path, name, files, listed) if caption is None else caption
        return Sample(name, caption, *header_size(path))
    except (OSError, ValueError) as error:
        return Broken(name, str(error).removeprefix(f"{path}: "))


def _own_caption(path: Path, name: str, files: set[str], listed: dict[str, dict[str, Any]]) -> str:
    stem = os.path.splitext(name)[0]
    if stem + ".json" in files:
        return caption_of_json(path.with_suffix(".json").read_bytes())
    if stem + ".txt" in files:
        return caption_of_text(path.with_suffix(".txt").read_bytes())
    if name in listed:
        return _caption_of(listed[name])
    raise ValueError(f"it has no caption: no .json or .txt beside it, no line in a {METADATA}")


# --- captions -------------------------------------------------------------------------------------


def caption_of_json(content: bytes) -> str:
    """The caption of a JSON object; " " if it is null or not there; ValueError if it is malformed."""
    return _caption_of(_parse_object(content))


def caption_of_text(content: bytes) -> str:
    """The caption of a text file, " " if it is blank; ValueError if it is not UTF-8."""
    try:
        return content.decode("utf-8-sig").strip() or NO_CAPTION
    except UnicodeDecodeError:
        raise ValueError("the caption is not UTF-8 text") from None


def _parse_object(content: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        raise ValueError("the caption is not JSON") from None
    if not isinstance(parsed, dict):
        raise ValueError("the caption's JSON is not an object")
    return parsed


def _caption_of(entry: dict[str, Any]) -> str:
    caption = next((entry[key] for key in CAPTION_KEYS if entry.get(key) is not None), NO_CAPTION)
    if not isinstance(caption, str):
        raise ValueError(f"the caption is not text but {caption!r:.40}")
    return caption


# --- pictures -------------------------------------------------------------------------------------


class NamedBytes(BytesIO):
    """A file's content in memory, which error messages call by a name."""

    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(content)
        self._name = name

    def __str__(self) -> str:
        return self._name

    def __format__(self, spec: str) -> str:
        return format(self._name, spec)


def header_size(source: str | Path | NamedBytes) -> Size:
    """The upright (height, width) of a picture, from its header; ValueError or OSError as for `decode`."""
    with open_image(source) as image:
        try:
            return _upright_size(image)
        except DAMAGED as error:
            raise ValueError(f"{source}: the picture's header is damaged ({error})") from None


def _upright_size(image: Image.Image) -> Size:
    if image.format == "PNG" and "exif" not in image.info:
        return image.height, image.width  # its EXIF could only follow the pixels, which stay unread here
    sideways = image.getexif().get(ExifTags.Base.Orientation) in SIDEWAYS
    return (image.width, image.height) if sideways else (image.height, image.width)


def decode(source: str | Path | NamedBytes, bucket: Size, rng: np.random.Generator) -> Tensor:
    """A picture's pixels (3, H, W) as uint8 RGB: upright, resized to cover the bucket, cropped at random.

    Large JPEGs are read at reduced scale. OSError, or ValueError for what is damaged, no picture or larger
    than `core.images.MAX_PIXELS`.
    """
    with open_image(source) as image:
        try:
            _reduce(image, bucket)
            upright = as_rgb(ImageOps.exif_transpose(image))
        except DAMAGED as error:
            raise ValueError(f"{source}: the picture is damaged ({error})") from None
    cover = cover_size(upright.height, upright.width, bucket)
    top, left = (int(rng.integers(room + 1)) for room in (cover[0] - bucket[0], cover[1] - bucket[1]))
    x, y = upright.width / cover[1], upright.height / cover[0]  # source pixels per pixel
    box = (
        left * x,
        top * y,
        min((left + bucket[1]) * x, upright.width),
        min((top + bucket[0]) * y, upright.height),
    )
    cropped = upright.resize(
        bucket[::-1], Image.Resampling.BILINEAR, box
    )  # antialiased; as resized whole, then cut
    return torch.from_numpy(np.array(cropped)).permute(2, 0, 1).contiguous()


def _reduce(image: Image.Image, bucket: Size) -> None:
    """Let the JPEG decoder scale by 1/2, 1/4 or 1/8 where enough pixels remain; other formats: nothing."""
    height, width = _upright_size(image)
    cover = cover_size(height, width, bucket)
    needed = tuple(int(DRAFT_MARGIN * side) for side in cover)
    image.draft(None, needed if (height, width) != (image.height, image.width) else needed[::-1])
