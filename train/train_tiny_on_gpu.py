"""Train Stage C and the guidance of the tiny family in minutes: train/train_tiny_on_gpu.py --output FOLDER

Made for a GPU that is rented for minutes, and the same anywhere else: scenes are drawn by all cores while the
training runs on what was drawn so far, at all sizes together. --minutes says how long all trainings take;
the rates fall with the time, so that they end finished. Sheets of pictures and figures follow. Everything is
written as it goes, SIGTERM ends it early with all saved, and the same command goes on.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from core.commands.flags import Parser, home_path, run
from core.config.presets import EMBEDDED, PRESETS

PARTS = ("stage_c", "guidance", "together", "figures")


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    add_file_flags(parser)
    add = parser.add_argument_group("training").add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what is done (default: all, in turn)")
    add("--minutes", type=float, default=8.0, help="of all trainings")
    add("--minutes_c", type=float, help="of Stage C's alone (default: a share of --minutes)")
    add("--minutes_guidance", type=float, help="of the guidance's alone (default: a share of --minutes)")
    add("--max_updates", type=int, help="of each training, for a trial")
    add(
        "--batch", type=float, default=1.0,
        help="times the batches of a large GPU; below 1, the rates are times its root",
    )  # fmt: skip
    add("--pool", type=float, default=1.0, help="times the scenes that are kept on a large GPU")
    add(
        "--scenes", type=int,
        help="drawn in all, where drawing would take the time of the training (default: without end)",
    )  # fmt: skip
    add("--minutes_together", type=float, help="of both together alone (default: a share of --minutes)")
    workers = max(1, (os.cpu_count() or 2) - 2)
    add("--workers", type=int, default=workers, help="processes that draw (default: two less than cores)")
    add("--seed", type=int, default=0, help="of weights, noise and scenes")
    add("--device", help="cpu, cuda or cuda:N (default: the GPU where there is one, else cpu)")
    add(
        "--dtype", choices=("bfloat16", "float32"),
        help="that the training computes in (default: bfloat16 on a GPU, else float32)",
    )  # fmt: skip
    add = parser.add_argument_group("figures").add_argument
    add("--num_image", type=int, default=500, help="held-out pictures of 128 x 128 that are judged")
    add("--num_large", type=int, default=200, help="held-out pictures of 512 x 512 that are judged")
    add("--shown", type=int, default=24, help="pictures on a sheet")
    return parser.parse_args(given)


def add_file_flags(parser: argparse.ArgumentParser) -> None:
    """What is read, and where everything goes."""
    add = parser.add_argument_group("files").add_argument
    add(
        "--output",
        type=home_path,
        required=True,
        help="folder for weights, log, sheets and figures",
    )
    add("--state", type=home_path, help="folder for what a training goes on from (default: OUTPUT/state)")
    add("--start_from", type=home_path, help="folder with weights to begin from, such as an earlier OUTPUT")
    for name, default, text in (
        ("config_c", "configs/tiny/stage_c.yaml", "Stage C's sizes and its encoders"),
        ("config_b", PRESETS[EMBEDDED].config_b, "Stages B and A, for the pictures"),
        ("image_encoder", "models/tiny/image_encoder.safetensors", "of image prompts"),
        ("recogniser", "models/tiny/recogniser.safetensors", "the judge of the figures"),
    ):
        add(f"--{name}", type=home_path, default=default, help=text)


def check(arguments: argparse.Namespace) -> None:
    """Raise what is wrong with the command line, before anything is imported."""
    for name in (
        "minutes",
        "batch",
        "pool",
        "minutes_c",
        "minutes_guidance",
        "minutes_together",
        "workers",
        "scenes",
        "max_updates",
    ):
        if (value := getattr(arguments, name)) is not None and not value > 0:
            raise ValueError(f"--{name} must be above 0, not {value}")
    for name in ("num_image", "num_large", "shown"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(arguments, name)}")
    if arguments.start_from is not None and not Path(arguments.start_from).is_dir():
        raise ValueError(f"--start_from {arguments.start_from} is no folder: name one with weights")


def main(given: Sequence[str] | None = None) -> int:
    arguments = parse(given)
    check(arguments)
    from core.family.on_gpu import train_and_show  # loads torch, once the flags are read

    train_and_show(arguments)
    return 0


if __name__ == "__main__":
    run(main)
