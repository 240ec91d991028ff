"""Flags of what pictures go out from besides their prompt: a picture, its region, image prompts."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from core.commands.flags import home_path
from core.commands.parsing import Gather

if TYPE_CHECKING:
    from core.pipeline.origins import Origin

ORIGIN_FLAGS = ("init_image", "strength", "region", "image_prompt", "image_encoder")


def add_origin_flags(parser: argparse.ArgumentParser) -> None:
    """What pictures go out from."""
    group = parser.add_argument_group("given pictures")
    group.add_argument("--init_image", type=home_path, metavar="FILE", help="a picture to go out from")
    group.add_argument(
        "--strength", type=float,
        help="above 0 to 1: how much of it is made anew (default: 0.6, with --region 1)",
    )  # fmt: skip
    group.add_argument(
        "--region", type=int, nargs=4, metavar=("X", "Y", "WIDTH", "HEIGHT"),
        help="make only these pixels of it anew; all others stay",
    )  # fmt: skip
    group.add_argument(
        "--image_prompt", type=home_path, action=Gather, default=(), metavar="FILE[:WEIGHT]",
        help="a picture that says what to show, beside the prompt; once for each of several (default: none)",
    )  # fmt: skip
    group.add_argument(
        "--image_encoder", type=home_path, metavar="FOLDER_OR_ID",
        help="CLIP's, of image prompts (default: the configuration's, else openai/clip-vit-large-patch14)",
    )  # fmt: skip


def read_origin(arguments: argparse.Namespace) -> Origin | None:
    """What the flags name, None where that is nothing; of a region, the picture's size becomes theirs."""
    if all(getattr(arguments, name) in (None, (), []) for name in ORIGIN_FLAGS):
        return None
    from core.pipeline.origins import origin  # loads torch, once the flags are read

    begun = origin(arguments.init_image, arguments.strength, arguments.region, list(arguments.image_prompt))
    if begun is not None:
        arguments.height, arguments.width = begun.size(arguments.height, arguments.width)
        arguments.strength = begun.flags["strength"]
    return begun
