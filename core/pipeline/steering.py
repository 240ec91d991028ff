"""A picture that controls others, whatever their size: how a user names it, and the control it becomes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from core.config.control_types import control_type
from core.config.schema import LatentGeometry
from core.config.settings import Job, Settings
from core.config.sizes import Size
from core.pipeline.control import (
    Control,
    ControlNetFile,
    Encoder,
    Source,
    edge_control,
    half_size_control,
    hole_control,
    outpainted,
    read_source,
    ready_control,
)
from core.pipeline.given import Given, readable

SUFFIX = " high quality"  # to every prompt under control, as published
CONTROLLED = Settings(cfg=1.0, shift=2.0)  # as published


@dataclass(frozen=True)
class Steering:
    """A picture that controls, and how."""

    kind: str
    source: Source
    size: int  # as in `core.pipeline.control.edges`
    weight: float
    keep_aspect: bool = False  # as there
    ready: bool = False  # the picture shows the edges
    start: float = 1.0  # as in `Control`
    end: float = 0.0
    hr: bool = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise ValueError(f"the weight of a control must be a finite number, not {self.weight}")

    def control(self, shape: Size, geometry: LatentGeometry, encoder: Callable[[], Encoder]) -> Control:
        """What steers pictures of `shape` (height, width); the encoder is loaded where it is needed."""
        kind = control_type(self.kind)
        match kind.inference:
            case "hole":
                control = hole_control(self.source, shape, geometry)
            case "latents":
                control = half_size_control(self.source, shape, geometry, encoder())
            case "edges" if not self.ready:
                control = edge_control(self.source, shape, geometry, self.size, self.keep_aspect)
            case "edges" | "ready":
                control = ready_control(self.source.picture, shape, geometry, kind.sizes.c_in)
            case way:
                raise ValueError(f"{self.kind}: inference has no way {way!r} to make what is seen")
        return replace(control, weight=self.weight, start=self.start, end=self.end, hr=self.hr)

    def shape(self, height: int | None, width: int | None) -> tuple[int | None, int | None]:
        """The asked sides; where a hole is filled, those that were not asked for are the picture's own."""
        if control_type(self.kind).inference != "hole":
            return height, width
        own = self.source.picture
        return own.height if height is None else height, own.width if width is None else width


def with_suffix(job: Job) -> Job:
    """The job with the suffix on its prompt, once."""
    return replace(job, prompt=job.prompt.removesuffix(SUFFIX) + SUFFIX)


def given_source(
    kind: str, picture: Given | None, mask: Given | None, ready: bool, outpaint: Sequence[int] | None = None
) -> Source:
    """The picture that controls, with its hole, from what a user gave; ValueError for what does not fit."""
    if picture is None:
        raise ValueError(f"the control {kind} needs a picture: a file, an http(s) URL, or a PIL picture")
    way = control_type(kind).inference
    for what, value in (("a mask", mask), ("outpainting", outpaint)):
        if value is not None and way != "hole":
            raise ValueError(f"{what} is for the control inpainting, not for {kind}")
    if ready and way not in ("edges", "ready"):
        raise ValueError(f"ready=True is for a picture that {kind} does not see: leave it out")
    source = read_source(readable("picture", picture), None if mask is None else readable("mask", mask))
    return source if outpaint is None else outpainted(source, outpaint)


def steering_flags(
    steering: Steering,
    file: ControlNetFile,
    picture: Given,
    mask: Given | None,
    outpaint: Sequence[int] | None = None,
) -> dict[str, Any]:
    """What inference/test_controlnet.py needs to control as this; None for a picture that is no file."""
    place, hole = (str(given) if isinstance(given, str | Path) else None for given in (picture, mask))
    given_ready = steering.ready or control_type(steering.kind).inference == "ready"
    return {
        "control": steering.kind,
        "control_file": file.path,
        "control_weight": steering.weight,
        "control_size": file.control_size,
        "keep_aspect": steering.keep_aspect,
        "canny_source_url": None if given_ready else place,
        "mask": hole,
        "outpaint": None if outpaint is None else list(outpaint),
        "control_image": place if given_ready else None,
    }
