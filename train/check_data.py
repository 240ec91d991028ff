"""What training would see of a folder or of shards: python train/check_data.py FOLDER --config CONFIG"""

from __future__ import annotations

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from core.commands.flags import Parser, home_path, run
from core.config.batch_size import fit_batch
from core.config.yaml import load_run
from core.pictures.images import prepare_folder
from core.printable import say


@contextmanager
def unlogged(name: str) -> Iterator[None]:
    """Within it, what a package warns of is not logged."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    group = parser.add_argument_group("data")
    group.add_argument("folder", type=home_path, help="a folder of pictures with captions, or tar shards")
    group.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="of the configuration")
    group.add_argument(
        "--config", type=home_path, default="configs/training/t2i.yaml", help="the training's configuration"
    )
    group.add_argument(
        "--output", type=home_path, default="outputs/check_data", help="folder for buckets.png and broken.txt"
    )
    group.add_argument("--processes", type=int, default=1, help="that will train, for thin buckets")
    group.add_argument("--decode", action="store_true", help="decode every picture: slow, finds all damage")
    return parser.parse_intermixed_args(arguments)


def main() -> int:
    arguments = parse()
    if arguments.processes < 1:
        raise ValueError(f"--processes must be at least 1, not {arguments.processes}")
    config = load_run(arguments.config, arguments.overrides)
    # These load torch, once the flags are read.
    from core.data.buckets import make_buckets
    from core.data.checking import Found, look, tell, write
    from core.data.files import Broken, counted
    from core.data.folder import check_broken
    from core.data.shards import LeftOut
    from core.data.sources import open_data

    buckets = make_buckets(config.image_size, config.multi_aspect_ratio)
    with unlogged("core.data"):  # the report names what is broken
        data = open_data(replace(config, webdataset_path=arguments.folder, scenes=None, max_broken=1))
        prepare_folder(arguments.output)
        entries = list(look(data, buckets, arguments.decode))
    found = [entry for entry in entries if isinstance(entry, Found)]
    broken = sorted((entry.name, entry.reason) for entry in entries if isinstance(entry, Broken))
    lines = [f"{name}: {reason}" for name, reason in broken]
    left_out = sum((Counter(entry.counts) for entry in entries if isinstance(entry, LeftOut)), Counter())
    fitted, _ = fit_batch(config, arguments.processes)
    tell(arguments.folder, found, lines, left_out, arguments.processes * fitted.pictures_at_once)
    write(Path(arguments.output), Counter(entry.bucket for entry in found), lines)
    say(f"written: {Path(arguments.output, 'buckets.png')} and broken.txt", sys.stdout)
    reasons = [reason for _, reason in broken]
    check_broken(arguments.folder, len(broken), len(found) + len(broken), config.max_broken, reasons)
    if not found:
        besides = f", and holds {counted(left_out)}" if left_out else ""
        raise ValueError(f"{arguments.folder}: it holds no picture that can be used{besides}")
    return 0


if __name__ == "__main__":
    run(main)
