"""Controlled pictures: python inference/test_controlnet.py --prompt "..." --control_source FILE_OR_URL

A ControlNet steers the low-resolution pass by a picture's edges, by what lies around a hole in it, by a small
picture that is to be made large, or by a ready picture (depth, tile); the guidance carries that to the high
resolution.
"""

from __future__ import annotations

import argparse

from core.commands.added import add_edge_flags, add_hole_flags
from core.commands.flags import home_path, parse_with_preset, picture_parser, run, settings_of
from core.commands.parsing import leave_size_open
from core.commands.prompts import lines_of
from core.config.control_types import CONTROL_TYPES, control_type, no_weights
from core.config.presets import DEFAULT
from core.config.yaml import load_control

CONFIG_C = "configs/training/cfg_control_lr.yaml"
OWN = ("cfg",)  # defaults that are this script's, whatever the preset


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; of what it leaves open, the configuration tells what controls, and from which file.

    A size that is not given is None where a hole is filled, whatever the preset says.
    """
    parser = picture_parser(__doc__, OWN)
    parser.set_defaults(config_c=CONFIG_C, cfg=1.0, shift=2.0)
    group = parser.add_argument_group(
        "control", "Where a hole is filled, the default size is that of the picture with the hole."
    )
    group.add_argument(
        "--control",
        choices=tuple(CONTROL_TYPES),
        help="by what (default: the configuration's, else canny)",
    )
    group.add_argument(
        "--control_source", "--canny_source_url", dest="canny_source_url", type=home_path,
        metavar="FILE_OR_URL", help="the picture that controls: a file, or an http(s) URL",
    )  # fmt: skip
    group.add_argument(
        "--control_weight", type=float, default=DEFAULT.control_weight,
        help="how strongly it controls (default: the preset's, else %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--control_file", type=home_path,
        help="weights of the ControlNet; {control} stands for --control (default: the preset's, else the "
        "configuration's)",
    )  # fmt: skip
    add_edge_flags(group)
    add_hole_flags(group)
    group.add_argument(
        "--control_image", type=home_path,
        help="what is seen, as a picture that is ready: edges, a mask, or, for depth and tile, always",
    )  # fmt: skip
    parsed = parse_with_preset(parser, arguments, OWN)
    stored = load_control(parsed.config_c)
    parsed.control = parsed.control or stored.controlnet_filter
    if control_type(parsed.control).inference == "hole":
        leave_size_open(parser, arguments, parsed)
    return parsed


def check_flags(arguments: argparse.Namespace) -> None:
    """ValueError for flags that are missing, or do not go with what controls."""
    lines_of(arguments)  # raises if there is none
    name, source, ready = arguments.control, arguments.canny_source_url, arguments.control_image
    way = control_type(name).inference
    if way == "ready":
        check_ready(arguments)
    elif source is None and not (way == "edges" and ready):
        ways = ", or its edges: --control_image FILE" if way == "edges" else ""
        raise ValueError(f"{name} needs a picture: --control_source FILE_OR_URL{ways}")
    for flag in ("mask", "outpaint"):
        if getattr(arguments, flag) and way != "hole":
            raise ValueError(
                f"--{flag} is for inpainting, and {name} was asked for: add --control inpainting"
            )
    if ready and (way == "latents" or arguments.mask or (way == "edges" and source)):
        raise ValueError(
            "--control_image is for edges instead of --control_source, or for inpainting instead of --mask"
        )


def check_ready(arguments: argparse.Namespace) -> None:
    """ValueError where a type of control that takes a ready picture has none, or another one."""
    name, own_file = arguments.control, arguments.control_file
    if arguments.canny_source_url is not None:
        raise ValueError(f"{name} takes a ready picture: --control_image FILE instead of --control_source")
    if arguments.control_image is None:
        unnamed = control_type(name).file is None and (own_file is None or "{control}" in own_file)
        also = f"; and {no_weights(name)}" if unnamed else ""
        raise ValueError(f"{name} needs a ready picture: --control_image FILE{also}")


def main(given: list[str] | None = None) -> int:
    arguments = parse(given)
    check_flags(arguments)
    settings = settings_of(arguments)
    from core.commands.controlled import make_controlled_pictures  # loads torch, once the flags are read

    return make_controlled_pictures(arguments, settings)


if __name__ == "__main__":
    run(main)
