"""Controlled pictures: python inference/test_controlnet.py --prompt "..." --canny_source_url FILE_OR_URL

A ControlNet steers the low-resolution pass by a picture's edges, by what lies around a hole in it, or by a
small picture that is to be made large; the guidance carries that to the high resolution.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import get_args

from core.cli import MODEL_FLAGS, make_pipeline, parse_with_preset, run, settings_of
from core.config import ControlConfig, ControlFilter, LatentGeometry
from core.config_files import load_control
from core.control import (
    CONTROL_WEIGHT,
    Control,
    Source,
    edge_control,
    half_size_control,
    hole_control,
    read_source,
    ready_edge_control,
)
from core.images import load_image
from core.pictures import make_jobs, make_pictures, picture_parser
from core.pipeline import Job, UltraPixelPipeline, load_encoder

SUFFIX = " high quality"  # to every prompt, as published
CONFIG_C = "configs/training/cfg_control_lr.yaml"
CONTROL_FLAGS = (
    "control", "control_file", "control_weight", "control_size", "keep_aspect", "canny_source_url", "mask",
    "control_image",
)  # fmt: skip


# --- the command line -----------------------------------------------------------------------------


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; of what it leaves open, the configuration tells what controls, and from which file.

    A size that is not given is None where a hole is filled, whatever the preset says.
    """
    parser = picture_parser(__doc__)
    parser.set_defaults(config_c=CONFIG_C, cfg=1.0, shift=2.0)
    group = parser.add_argument_group("control")
    group.add_argument("--control", choices=get_args(ControlFilter), help="by what; else the configuration's")
    group.add_argument("--canny_source_url", help="the picture that controls: a file, or an http(s) URL")
    group.add_argument("--control_weight", type=float, default=CONTROL_WEIGHT)
    group.add_argument("--control_file", help="weights of the ControlNet; {control} stands for --control")
    group.add_argument(
        "--control_size", type=int, help="px per side at which edges are found; more are finer"
    )
    group.add_argument("--keep_aspect", action="store_true", help="find edges without squeezing to a square")
    group.add_argument("--mask", help="inpainting: a picture of its size, white where it is filled")
    group.add_argument("--control_image", help="edges, or a mask, as a picture that is ready")
    parsed = parse_with_preset(parser, arguments, own=("cfg",))
    stored = load_control(parsed.config_c)
    parsed.control = parsed.control or stored.controlnet_filter
    if parsed.control == "inpainting" and parsed.from_image is None:
        parser.set_defaults(height=None, width=None)
        asked = parser.parse_args(arguments)
        parsed.height, parsed.width = asked.height, asked.width
    return parsed


def control_config(arguments: argparse.Namespace) -> ControlConfig:
    """The ControlNet that the flags and the configuration name."""
    config = load_control(arguments.config_c)
    if config.controlnet_filter != arguments.control:  # what the configuration says is of another one
        config = ControlConfig(controlnet_filter=arguments.control)
    path, size = arguments.control_file, arguments.control_size
    if path is not None:
        config = replace(config, controlnet_checkpoint_path=path.replace("{control}", arguments.control))
    return config if size is None else replace(config, control_size=size)


# --- the control ----------------------------------------------------------------------------------


def check_flags(arguments: argparse.Namespace) -> None:
    """ValueError for flags that are missing, or do not go with what controls."""
    kind, source, ready = arguments.control, arguments.canny_source_url, arguments.control_image
    if source is None and not (kind == "canny" and ready):
        ways = ", or its edges: --control_image FILE" if kind == "canny" else ""
        raise ValueError(f"{kind} needs a picture: --canny_source_url FILE_OR_URL{ways}")
    if arguments.mask and kind != "inpainting":
        raise ValueError(f"--mask is for inpainting, and {kind} was asked for: add --control inpainting")
    if ready and (kind == "super_resolution" or arguments.mask or (kind == "canny" and source)):
        raise ValueError(
            "--control_image is for edges instead of --canny_source_url, or for inpainting instead of --mask"
        )


def control_source(arguments: argparse.Namespace) -> Source:
    """The picture that controls, or its edges; where it has a hole, sizes that were not asked for are its."""
    if arguments.canny_source_url is None:
        return Source(load_image(arguments.control_image))
    mask = arguments.mask or arguments.control_image
    source = read_source(arguments.canny_source_url, mask)
    arguments.height = arguments.height or source.picture.height
    arguments.width = arguments.width or source.picture.width
    return source


def make_control(
    arguments: argparse.Namespace, pipeline: UltraPixelPipeline, source: Source, size: int
) -> Control:
    """What steers the pictures; `size` as in `core.control.edges`."""
    geometry: LatentGeometry = pipeline.config_c.geometry
    shape = (arguments.height, arguments.width)
    if arguments.control == "inpainting":
        control = hole_control(source, shape, geometry)
    elif arguments.control == "super_resolution":
        encoder = load_encoder(pipeline.config_c, "--control super_resolution")
        control = half_size_control(source, shape, geometry, encoder)
    elif arguments.control_image:
        control = ready_edge_control(source.picture, shape, geometry)
    else:
        control = edge_control(source, shape, geometry, size, arguments.keep_aspect)
    return replace(control, weight=arguments.control_weight)


def with_suffix(job: Job) -> Job:
    """The job with the suffix on its prompt, once."""
    return replace(job, prompt=job.prompt.removesuffix(SUFFIX) + SUFFIX)


def main(given: list[str] | None = None) -> int:
    arguments = parse(given)
    check_flags(arguments)
    source = control_source(arguments)
    jobs, settings = [with_suffix(job) for job in make_jobs(arguments)], settings_of(arguments)
    pipeline = make_pipeline(arguments)
    file = pipeline.set_control(control_config(arguments))
    arguments.control_file, arguments.control_size = file.path, file.control_size
    control = None if arguments.dry_run else make_control(arguments, pipeline, source, file.control_size)
    return make_pictures(arguments, pipeline, jobs, settings, (*MODEL_FLAGS, *CONTROL_FLAGS), control)


if __name__ == "__main__":
    run(main)
