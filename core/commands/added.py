"""Flags for what pictures are made with besides a prompt: LoRAs, and controls; it loads no torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from core.commands.flags import home_path, parse_with_preset
from core.commands.parsing import Gather, leave_size_open
from core.config.control_types import CONTROL_TYPES, HOLE, control_type
from core.config.given_control import FORM, GivenControl, check_hr, read_control
from core.config.presets import DEFAULT, PRESETS
from core.launch import told_once

SHARED, HOLE_FLAGS = ("control_file", "control_size", "keep_aspect", "control_hr"), ("mask", "outpaint")
OWN = ("lora", "control_file", "control_weight")  # which a preset does not turn on, or each control has


def add_lora_flag(parser: argparse.ArgumentParser, default: str) -> None:
    """--lora, under both of its names; `default` tells which there are without it."""
    parser.add_argument_group("LoRA").add_argument(
        "--lora", "--pretrained_path_lora", type=home_path, action=Gather, default=(),
        metavar="FILE[:WEIGHT]",
        help=f"a LoRA and how much of it, once for each of several (default: {default})",
    )  # fmt: skip


def add_edge_flags(group: argparse._ArgumentGroup) -> None:
    """How edges are found."""
    group.add_argument(
        "--control_size", type=int,
        help="px per side at which edges are found; more are finer (default: the configuration's, else the "
        "file's, else 224)",
    )  # fmt: skip
    group.add_argument("--keep_aspect", action="store_true", help="find edges without squeezing to a square")


def add_hole_flags(group: argparse._ArgumentGroup) -> None:
    """Where a picture has a hole, or gets one around it."""
    group.add_argument(
        "--mask", type=home_path,
        help="inpainting: a picture of its size, white where it is filled (default: what is transparent)",
    )  # fmt: skip
    group.add_argument(
        "--outpaint", type=int, nargs=4, metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"),
        help="inpainting: pixels to fill around the picture",
    )  # fmt: skip


def add_control_flags(parser: argparse.ArgumentParser) -> None:
    """Controls, as many as there are, and what they share."""
    group = parser.add_argument_group(
        "control",
        "What several ControlNets add to Stage C adds up. With control cfg is 1, shift is 2 and ' high "
        "quality' is added to the prompt, as published. START and END are times of a pass, from 1 (noise) "
        "to 0 (the picture). Where a hole is filled, the default size is that of the picture with the hole.",
    )
    group.add_argument(
        "--control", "--controls", dest="controls", type=_typed(False), action=Gather, default=(),
        metavar=FORM,
        help=f"a picture that controls, by {', '.join(CONTROL_TYPES)}; once for each of several (default: "
        "none; its weight: the preset's, else 0.7; its times: 1 to 0)",
    )  # fmt: skip
    group.add_argument(
        "--control_image", dest="controls", type=_typed(True), action=Gather, default=(), metavar=FORM,
        help="the same with a ready picture: edges, white on black, or, for depth and tile, always (default: "
        "none)",
    )  # fmt: skip
    group.add_argument(
        "--control_file", type=home_path,
        help="weights of the ControlNets; {control} stands for the kind (default: the preset's)",
    )  # fmt: skip
    add_edge_flags(group)
    add_hole_flags(group)
    group.add_argument(
        "--control_hr", action="store_true", help="let controls act in the high-resolution pass too"
    )


def _typed(ready: bool) -> Callable[[str], GivenControl]:
    def control(text: str) -> GivenControl:
        try:
            return check_ready(read_control(text, ready))
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return control


def check_ready(given: GivenControl) -> GivenControl:
    """The control; ValueError where it takes a ready picture and has none, or the other way round."""
    name, way = given.control, control_type(given.control).inference
    if way == "ready" and not given.ready:
        raise ValueError(f"{name} takes a ready picture: --control_image {name}:FILE instead of --control")
    if given.ready and way not in ("edges", "ready"):
        raise ValueError(f"{name} takes a picture that is not ready: --control {name}:FILE")
    return given


def parse_with_added(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags as `parse_with_preset` has them, with the defaults that controls bring along."""
    with told_once():
        controlled = bool(parser.parse_args(arguments).controls)
    if controlled:
        parser.set_defaults(cfg=1.0, shift=2.0)
    own = (*OWN, "cfg") if controlled else OWN
    parsed = parse_with_preset(parser, arguments, own)
    given = [one for one in parsed.controls if isinstance(one, GivenControl)]  # not a repeated picture's
    if any(one.control == HOLE for one in given):
        leave_size_open(parser, arguments, parsed)
    return parsed


def given_controls(arguments: argparse.Namespace) -> list[GivenControl]:
    """The controls that the flags name, or a picture's; ValueError for flags that do not go with them."""
    controls = [_from_picture(c) if isinstance(c, Mapping) else c for c in arguments.controls]
    for flag, kind in (*((name, "KIND") for name in SHARED), *((name, HOLE) for name in HOLE_FLAGS)):
        there = [given for given in controls if kind in ("KIND", given.control)]
        if getattr(arguments, flag) and not there:
            raise ValueError(f"--{flag} needs a control: add --control {kind}:PICTURE")
    controls = [_with_flags(given, arguments) for given in controls]
    _check_heard(arguments)
    check_hr(controls, arguments.reuse, arguments.region is not None)
    return controls


def _check_heard(arguments: argparse.Namespace) -> None:
    """ValueError for controls of passes that are not made, but for those with which the others were made."""
    asked = any(isinstance(given, GivenControl) for given in arguments.controls)
    if asked and arguments.from_latents is not None:
        raise ValueError("--from_latents runs Stages B and A alone, which no control steers: leave it out")
    if asked and arguments.from_lr is not None and not arguments.control_hr:
        raise ValueError(
            "--from_lr leaves out the pass that controls steer: add --control_hr, or leave it out"
        )


def _from_picture(stored: Mapping[str, Any]) -> GivenControl:
    try:
        return GivenControl(**stored)
    except TypeError as error:
        raise ValueError(f"the picture's control {dict(stored)} is not understood ({error})") from None


def _with_flags(given: GivenControl, arguments: argparse.Namespace) -> GivenControl:
    """The control with what flags say of all controls, and with its weights and weight."""
    preset = PRESETS.get(arguments.preset, DEFAULT)
    file = arguments.control_file or given.file or preset.control_file
    if given.control == HOLE:
        mask, outpaint = arguments.mask or given.mask, arguments.outpaint or given.outpaint
        given = replace(given, mask=mask, outpaint=outpaint)
    return replace(
        given,
        file=file.replace("{control}", given.control),
        weight=preset.control_weight if given.weight is None else given.weight,
        size=arguments.control_size or given.size,
        keep_aspect=arguments.keep_aspect or given.keep_aspect,
        hr=arguments.control_hr or given.hr,
    )
