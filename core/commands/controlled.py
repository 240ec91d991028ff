"""Runs under control: from the flags to what steers the pictures, and test_controlnet.py's own run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial

from core.commands.asked import make_asked
from core.commands.flags import MODEL_FLAGS, make_jobs, make_pipeline
from core.commands.pictures import ControlOf
from core.config.given_control import GivenControl
from core.config.schema import ControlConfig
from core.config.settings import Settings
from core.config.sizes import Size
from core.config.yaml import load_control
from core.pictures.images import load_image
from core.pipeline.control import Control, Source, outpainted, read_source
from core.pipeline.networks import load_encoder
from core.pipeline.pipeline import UltraPixelPipeline
from core.pipeline.steering import Steering, with_suffix

# Pictures know the source by its first name, --canny_source_url, so that those of today can be repeated.
CONTROL_FLAGS = (
    "control", "control_file", "control_weight", "control_size", "keep_aspect", "canny_source_url", "mask",
    "control_image", "outpaint",
)  # fmt: skip


def control_config(arguments: argparse.Namespace) -> ControlConfig:
    """The ControlNet that the flags and the configuration name."""
    config = load_control(arguments.config_c)
    if config.controlnet_filter != arguments.control:  # what the configuration says is of another one
        config = ControlConfig(controlnet_filter=arguments.control)
    path, size = arguments.control_file, arguments.control_size
    if path is not None:
        config = replace(config, controlnet_checkpoint_path=path.replace("{control}", arguments.control))
    return config if size is None else replace(config, control_size=size)


def control_source(arguments: argparse.Namespace) -> Source:
    """The picture that controls, or the ready one; where it has a hole, sizes not asked for are its."""
    if arguments.canny_source_url is None:
        return Source(load_image(arguments.control_image))
    mask = arguments.mask or arguments.control_image
    source = read_source(arguments.canny_source_url, mask)
    if arguments.outpaint is not None:
        source = outpainted(source, arguments.outpaint)
    arguments.height = arguments.height or source.picture.height
    arguments.width = arguments.width or source.picture.width
    return source


def make_control(
    arguments: argparse.Namespace, pipeline: UltraPixelPipeline, source: Source, size: int, shape: Size
) -> Control:
    """What steers pictures of `shape` (height, width); `size` as in `core.pipeline.control.edges`."""
    ready = arguments.control_image is not None
    weight, keep_aspect = arguments.control_weight, arguments.keep_aspect
    steering = Steering(arguments.control, source, size, weight, keep_aspect, ready)
    encoder = partial(load_encoder, pipeline.config_c, f"--control {arguments.control}")
    return steering.control(shape, pipeline.config_c.geometry, encoder)


def make_controlled_pictures(arguments: argparse.Namespace, settings: Settings) -> int:
    """Make and save the flags' pictures under their control; return the exit code."""
    source = control_source(arguments)
    jobs = [with_suffix(job) for job in make_jobs(arguments)]
    pipeline = make_pipeline(arguments)
    file = pipeline.set_control(control_config(arguments))
    arguments.control_file, arguments.control_size = file.path, file.control_size
    # As sizes may differ from picture to picture; of each it is made once.
    control = cache(partial(make_control, arguments, pipeline, source, file.control_size))
    control = None if arguments.dry_run else control
    return make_asked(arguments, pipeline, jobs, settings, (*MODEL_FLAGS, *CONTROL_FLAGS), control)


def use_controls(
    arguments: argparse.Namespace, pipeline: UltraPixelPipeline, controls: Sequence[GivenControl]
) -> ControlOf | None:
    """What steers pictures of a size by given controls; where there are none, or no pictures, None.

    The flags get the controls in full, and the size of a picture whose hole is filled if they have none.
    """
    if not controls:
        return None
    pipeline.set_controls(controls)
    arguments.controls = pipeline.controls.flags(alone=False)["controls"]
    arguments.height, arguments.width = pipeline.controls.shape(arguments.height, arguments.width)
    return None if arguments.dry_run else cache(pipeline.controls_for)
