"""Existing pictures made large, each as a whole: python inference/upscale.py PICTURE_OR_FOLDER --factor 4

The picture at low resolution guides the high-resolution pass. A folder is gone through with all its
sub-folders; what the output folder has already is left out.
"""

from __future__ import annotations

import argparse

from core.commands.flags import (
    Parser,
    add_model_flags,
    add_settings_flags,
    home_path,
    parse_with_preset,
    run,
    settings_of,
)
from core.config.presets import DEFAULT


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; `height` and `width` are the preset's, those that are asked for `asked_…`."""
    parser = Parser(__doc__)
    parser.add_argument("picture", type=home_path, metavar="PICTURE_OR_FOLDER", help="what is made large")
    group = parser.add_argument_group("pictures")
    for side in ("height", "width"):
        group.add_argument(
            f"--{side}", dest=f"asked_{side}", type=int, metavar="PX",
            help="pixels; a picture keeps its shape, and lies within both (default: the preset's)",
        )  # fmt: skip
    group.add_argument("--factor", type=float, help="so many times as high and wide, instead of a size")
    group.add_argument("--prompt", help="what the pictures show (default: a .txt file beside each, if any)")
    group.add_argument("--negative_prompt", default="", help="what they should not show (default: nothing)")
    group.add_argument(
        "--strength", dest="upscale_strength", type=float, default=DEFAULT.upscale_strength,
        help="above 0 to 1: how much is made anew; below 1 the high-resolution pass begins at the picture "
        "(default: the preset's, else %(default)s)",
    )  # fmt: skip
    group.add_argument("--no_colour_match", action="store_true", help="leave the colours as they are made")
    group.add_argument(
        "--keep_profile", action="store_true", help="convert back to the picture's own colour profile"
    )
    group.add_argument(
        "--seed", type=int, default=123, help="of the first picture, the i-th has seed + i; -1 draws one"
    )
    group.add_argument("--output_dir", type=home_path, default="outputs/upscaled", help="for the pictures")
    add_settings_flags(parser)
    add_model_flags(parser)
    parser.set_defaults(height=DEFAULT.height, width=DEFAULT.width)
    parsed = parse_with_preset(parser, arguments)
    parsed.strength = parsed.upscale_strength
    return parsed


def main(given: list[str] | None = None) -> int:
    arguments = parse(given)
    settings = settings_of(arguments)
    from core.commands.upscaling import upscale_all  # loads torch, once the flags are read

    return upscale_all(arguments, settings)


if __name__ == "__main__":
    run(main)
