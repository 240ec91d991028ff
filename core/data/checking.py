"""What training would see of a folder or of shards: the report of train/check_data.py."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core.config.sizes import Size
from core.data.buckets import Buckets, cover_size, draw_counts
from core.data.files import Broken, counted, tally
from core.data.folder import decode
from core.data.loader import FolderData
from core.data.shards import Encoded, LeftOut, ShardData, samples
from core.data.sources import Data
from core.pictures.images import NamedBytes
from core.printable import say


@dataclass(frozen=True)
class Found:
    """A picture that training would see."""

    name: str
    caption: str
    size: Size  # upright, in pixels
    bucket: Size


# --- looking --------------------------------------------------------------------------------------


def look(data: Data, buckets: Buckets, decoding: bool) -> Iterator[Found | Broken | LeftOut]:
    """Every picture of a folder or of shards, and whatever is broken or left out in it."""
    yield LeftOut(data.left_out)
    for source, entry in (_in_shards if isinstance(data, ShardData) else _in_folder)(data, buckets):
        try:
            if decoding and isinstance(entry, Found):
                decode(source, entry.bucket, np.random.default_rng())
            yield entry
        except (OSError, ValueError) as error:
            yield Broken(entry.name, str(error).removeprefix(f"{source}: "))


def _in_folder(data: FolderData, buckets: Buckets) -> Iterator[tuple[Path, Found | Broken]]:
    index = data.index
    for broken in index.broken:
        yield index.folder / broken.name, broken
    for sample in index.samples:
        size = (sample.height, sample.width)
        yield index.folder / sample.name, Found(sample.name, sample.caption, size, buckets.nearest(*size))


def _in_shards(data: ShardData, _: Buckets) -> Iterator[tuple[NamedBytes | None, Found | Broken | LeftOut]]:
    for entry in samples(data, epoch=0, seed=0, part=0, parts=1):
        if isinstance(entry, Encoded):
            found = Found(entry.name, entry.caption, entry.size, entry.bucket)
            yield NamedBytes(entry.content, entry.name), found
        else:
            yield None, entry


# --- telling --------------------------------------------------------------------------------------


def describe(found: Sequence[Found], batch: int) -> str:
    """Sizes, captions and buckets as text; `batch` is what a bucket must fill, over all processes."""
    counts = Counter(entry.bucket for entry in found)
    by_area = sorted((entry.size for entry in found), key=lambda size: size[0] * size[1])
    sizes = {"smallest": by_area[0], "median": by_area[len(by_area) // 2], "largest": by_area[-1]}
    enlarged = sum(cover_size(*entry.size, entry.bucket)[0] > entry.size[0] for entry in found)
    lines = [
        f"formats: {counted(tally(entry.name for entry in found))}",
        "height x width: " + ", ".join(f"{name} {h} x {w}" for name, (h, w) in sizes.items()),
        f"enlarged to fill their bucket: {enlarged}",
        f"captions that are empty: {sum(not entry.caption.strip() for entry in found)}",
        f"buckets, height x width (thin: fewer pictures than the {batch} that go through the network "
        "at once, so they are repeated):",
    ]
    for (height, width), count in sorted(counts.items()):
        lines.append(f"{height:>8} x {width:<5}{count:>9}{'  thin' if count < batch else ''}")
    return "\n".join(lines)


def write(output: Path, counts: Counter[Size], broken: Sequence[str]) -> None:
    """buckets.png, and broken.txt with a line for each, into a folder."""
    draw_counts(counts).save(output / "buckets.png")
    text = "".join(line + "\n" for line in broken)
    (output / "broken.txt").write_text(text, "utf-8", "backslashreplace")  # names may be in any encoding


def tell(
    folder: str, found: Sequence[Found], broken: Sequence[str], left_out: Counter[str], batch: int
) -> None:
    """The report on standard output, whatever letters that takes."""
    say(f"{folder}: {len(found)} pictures, {len(broken)} broken", sys.stdout)
    if left_out:
        say(f"left out, neither pictures nor captions of pictures: {counted(left_out)}", sys.stdout)
    if found:
        say(describe(found, batch), sys.stdout)
    for line in broken:
        say(f"broken: {line}", sys.stdout)
