"""A folder of pictures and captions: what is usable in it, and pictures decoded to their bucket's size."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from core.config.sizes import Size
from core.data.buckets import cover_size
from core.data.captions import WITHOUT, first_caption
from core.data.files import UNSORTED, Broken, counted, sort_out, suffix_of, walk
from core.data.listings import read_listings
from core.pictures.images import DAMAGED, SIDEWAYS, NamedBytes, open_image, orientation, upright_rgb

log = logging.getLogger(__name__)

INDEX_THREADS = 8
INDEX_CHUNK = 256  # pictures that a thread takes at a time
NOWHERE = "no .json, .txt or .caption beside it, no line in a metadata.jsonl or metadata.csv"
DRAFT_MARGIN = 1.5  # a JPEG is read at reduced scale if at least this many times the resized picture remains


@dataclass(frozen=True)
class Sample:
    """A picture that can be used, by its name in the folder, upright."""

    name: str
    caption: str
    height: int  # pixels
    width: int


@dataclass(frozen=True)
class FolderIndex:
    """What a folder holds, in the order of the names."""

    folder: Path
    samples: tuple[Sample, ...]
    broken: tuple[Broken, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)  # other files, by suffix


# --- the index ------------------------------------------------------------------------------------


def index_folder(
    folder: str | Path, max_broken: float = 0.1, caption: str | None = None, empty_captions: bool = False
) -> FolderIndex:
    """Search a folder through for pictures with captions, reading the pictures' headers only.

    A caption stands beside its picture as .json ({"caption": ...}), .txt or .caption, or in a metadata.jsonl
    or metadata.csv, unless `caption` is that of all. Pictures without one are broken, unless
    `empty_captions`. What is broken is logged by name, what is left out by number; ValueError where broken
    is more than the share `max_broken`, or nothing is found.
    """
    folder = Path(folder)
    if not folder.is_dir():
        wrong = "is no folder of training pictures" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"{folder} {wrong}: name a folder, or shards")
    captions, listings, left_out = _survey(folder)
    if not captions:
        found = f"; it holds {counted(left_out)}" if left_out else ""
        raise ValueError(f"{folder}: the folder holds no picture in a format that is read{found}")
    listed, broken = read_listings(folder, listings, captions) if caption is None else ({}, [])

    def caption_of(name: str) -> str:
        if caption is not None:
            return caption
        contents = ((suffix_of(file), (folder / file).read_bytes()) for file in captions[name])
        return first_caption(chain(contents, listed.get(name, ())), empty_captions, NOWHERE)

    entries = _read_samples(folder, sorted(captions), caption_of)
    samples = tuple(entry for entry in entries if isinstance(entry, Sample))
    broken += [entry for entry in entries if isinstance(entry, Broken)]
    _tell(str(folder), broken, left_out)
    reasons = [entry.reason for entry in broken]
    check_broken(str(folder), len(broken), len(samples) + len(broken), max_broken, reasons)
    return FolderIndex(folder, samples, tuple(broken), left_out)


def _tell(source: str, broken: Iterable[Broken], left_out: Mapping[str, int]) -> None:
    for entry in broken:
        log.warning("skipped %s: %s", entry.name, entry.reason)
    warn_of_left_out(source, left_out)


def _survey(folder: Path) -> tuple[dict[str, list[str]], list[str], Counter[str]]:
    """The pictures below a folder with their caption files, the listings, and what else it has."""
    captions, listings, left_out = {}, [], Counter()
    for prefix, files in walk(folder):
        beside = sort_out(files)
        for name, own in beside.captions.items():
            captions[prefix + name] = [prefix + caption for caption in own]
        listings += [prefix + name for name in beside.listings]
        left_out += beside.left_out
    return captions, listings, left_out


def check_broken(
    source: str, broken: int, total: int, max_broken: float, reasons: Collection[str] = ()
) -> None:
    """ValueError, with the counts and the way out, where more than the share `max_broken` is broken."""
    if broken > max_broken * total:
        bare = any(reason.startswith(WITHOUT) for reason in reasons)
        one = "tmp_prompt=... (of prior pictures prior_prompt=...) gives all one caption"
        way = f"{one}, empty_captions=true trains without" if bare else ""
        way = next((reason for reason in reasons if reason.startswith(UNSORTED)), way)
        raise ValueError(
            f"{source}: {broken} of {total} pictures cannot be used, more than the share of {max_broken:g} "
            f"that max_broken allows; the log names each with its reason{way and '; ' + way}"
        )


def warn_of_left_out(source: str, left_out: Mapping[str, int]) -> None:
    """Tell how many files are neither pictures nor captions of pictures."""
    if left_out:
        log.warning("%s: left out: %s", source, counted(left_out))


def _read_samples(
    folder: Path, names: Sequence[str], caption_of: Callable[[str], str]
) -> list[Sample | Broken]:
    """These pictures' samples, or why there are none, read by several threads."""

    def read(name: str) -> Sample | Broken:
        path = folder / name
        try:
            return Sample(name, caption_of(name), *header_size(path))
        except (OSError, ValueError) as error:
            return Broken(name, str(error).removeprefix(f"{path}: "))

    chunks = [names[start : start + INDEX_CHUNK] for start in range(0, len(names), INDEX_CHUNK)]
    with ThreadPoolExecutor(INDEX_THREADS) as pool:
        return list(chain.from_iterable(pool.map(lambda chunk: list(map(read, chunk)), chunks)))


# --- pictures -------------------------------------------------------------------------------------


def header_size(source: str | Path | NamedBytes) -> Size:
    """The upright (height, width) of a picture, from its header; ValueError or OSError as for `decode`."""
    with open_image(source) as image:
        try:
            return _upright_size(image)
        except DAMAGED as error:
            raise ValueError(f"{source}: the picture's header is damaged ({error})") from None


def _upright_size(image: Image.Image) -> Size:
    width, height = image.size
    if image.format == "TIFF":  # as it is stored: some versions of Pillow tell the upright size, others not
        width, height = (image.tag_v2[tag] for tag in (ExifTags.Base.ImageWidth, ExifTags.Base.ImageLength))
    return (width, height) if orientation(image) in SIDEWAYS else (height, width)


def decode(source: str | Path | NamedBytes, bucket: Size, rng: np.random.Generator) -> Tensor:
    """A picture's pixels (3, H, W) as uint8 sRGB: upright, resized to cover the bucket, cropped at random.

    Large JPEGs are read at reduced scale. OSError, or ValueError for what is damaged, no picture or larger
    than `core.pictures.images.MAX_PIXELS`.
    """
    with open_image(source) as image:
        if image.format in ("JPEG", "MPO"):
            _reduce(image, bucket)
        upright = upright_rgb(image, source)
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
    """Let the JPEG decoder scale by 1/2, 1/4 or 1/8 where enough pixels remain."""
    height, width = _upright_size(image)
    cover = cover_size(height, width, bucket)
    needed = tuple(int(DRAFT_MARGIN * side) for side in cover)
    image.draft(None, needed if (height, width) != (image.height, image.width) else needed[::-1])
