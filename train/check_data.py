"""What training would see of a folder or of shards: python train/check_data.py FOLDER --config CONFIG"""

from __future__ import annotations

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from core.cli import run
from core.config import TrainConfig
from core.config_files import load
from core.data.buckets import Buckets, cover_size, draw_counts, make_buckets
from core.data.files import Broken, counted, tally
from core.data.folder import NamedBytes, check_broken, decode
from core.data.loader import FolderData
from core.data.shards import Encoded, LeftOut, ShardData, samples
from core.data.sources import Data, open_data
from core.printable import say
from core.resolution import Size


@dataclass(frozen=True)
class Found:
    """A picture that training would see."""

    name: str
    caption: str
    size: Size  # upright, in pixels
    bucket: Size


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("folder", help="a folder of pictures with captions, or tar shards")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration")
    parser.add_argument("--config", default="configs/training/t2i.yaml", help="the training's configuration")
    parser.add_argument(
        "--output", default="outputs/check_data", help="folder for buckets.png and broken.txt"
    )
    parser.add_argument("--decode", action="store_true", help="decode every picture: slow, finds all damage")
    return parser.parse_intermixed_args(arguments)


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
        f"buckets, height x width (thin: fewer pictures than a batch of {batch}, which repeats them):",
    ]
    for (height, width), count in sorted(counts.items()):
        lines.append(f"{height:>8} x {width:<5}{count:>9}{'  thin' if count < batch else ''}")
    return "\n".join(lines)


def write(output: Path, counts: Counter[Size], broken: Sequence[str]) -> None:
    """buckets.png, and broken.txt with a line for each."""
    output.mkdir(parents=True, exist_ok=True)
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


def main() -> int:
    arguments = parse()
    config = load(TrainConfig, arguments.config, arguments.overrides)
    logging.getLogger("core.data").setLevel(logging.ERROR)  # the report names what is broken
    buckets = make_buckets(config.image_size, config.multi_aspect_ratio)
    data = open_data(replace(config, webdataset_path=arguments.folder, scenes=None, max_broken=1))
    entries = list(look(data, buckets, arguments.decode))
    found = [entry for entry in entries if isinstance(entry, Found)]
    broken = sorted((entry.name, entry.reason) for entry in entries if isinstance(entry, Broken))
    lines = [f"{name}: {reason}" for name, reason in broken]
    left_out = sum((Counter(entry.counts) for entry in entries if isinstance(entry, LeftOut)), Counter())
    tell(arguments.folder, found, lines, left_out, max(1, config.batch_size // config.grad_accum_steps))
    write(Path(arguments.output), Counter(entry.bucket for entry in found), lines)
    say(f"written: {Path(arguments.output, 'buckets.png')} and broken.txt", sys.stdout)
    reasons = [reason for _, reason in broken]
    check_broken(arguments.folder, len(broken), len(found) + len(broken), config.max_broken, reasons)
    if not found:
        raise ValueError(f"{arguments.folder}: it holds no picture, but {counted(left_out)}")
    return 0


if __name__ == "__main__":
    run(main)
