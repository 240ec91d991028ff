"""Measure a family on held-out scenes: python inference/evaluate.py --preset tiny --num_image 100"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from core.commands.flags import (
    Parser,
    add_model_flags,
    add_settings_flags,
    home_path,
    parse_with_preset,
    run,
    settings_of,
)
from core.config.presets import EMBEDDED
from core.config.sizes import Size
from core.printable import say

RECOGNISER = "models/tiny/recogniser.safetensors"
SIZES = ((128, 128), (512, 512))  # at which the embedded family is measured


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; a size that is not given is None, whatever the preset says."""
    parser = Parser(__doc__)
    group = parser.add_argument_group("evaluation")
    group.add_argument("--num_image", type=int, default=500, help="held-out scenes, with one picture each")
    for side in ("height", "width"):
        group.add_argument(
            f"--{side}", dest=f"asked_{side}", type=int, metavar="PIXELS",
            help="of the pictures (default: both of 128 and 512 with --preset tiny, else the preset's)",
        )  # fmt: skip
    group.add_argument("--seed", type=int, default=0, help="of the first scene and picture; -1 draws one")
    group.add_argument("--round_trip", action="store_true", help="also encode and decode real pictures")
    group.add_argument("--compare", action="store_true", help="also enlarged small pictures, and no guidance")
    group.add_argument("--recogniser", type=home_path, default=RECOGNISER, help="its weights")
    group.add_argument(
        "--output_dir", type=home_path, default="outputs/evaluate", help="folder for figures and sheets"
    )
    add_settings_flags(parser)
    add_model_flags(parser)
    parser.set_defaults(preset=EMBEDDED)
    return parse_with_preset(parser, arguments)


def asked_sizes(arguments: argparse.Namespace) -> list[Size]:
    """The sizes to measure at: the one asked for, else the embedded family's, else the preset's."""
    asked = arguments.asked_height, arguments.asked_width
    if asked == (None, None):
        return list(SIZES) if arguments.preset == EMBEDDED else [(arguments.height, arguments.width)]
    if None in asked:
        raise ValueError("--height and --width belong together: give both, or neither")
    return [asked]


def main(given: Sequence[str] | None = None) -> int:
    arguments = parse(given)
    if (count := arguments.num_image) < 1:
        raise ValueError(f"--num_image must be at least 1, not {count}")
    settings, sizes = settings_of(arguments), asked_sizes(arguments)
    from core.family.evaluation_run import evaluate  # loads torch, once the flags are read

    say(evaluate(arguments, settings, sizes), sys.stdout)
    return 0


if __name__ == "__main__":
    run(main)
