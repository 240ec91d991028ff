"""The types of control, one entry each; no torch is loaded, so that flags and configurations read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from core.config.sizes import ControlNetSizes
from gdf.names import check_name


@dataclass(frozen=True)
class ControlType:
    """What a ControlNet of this type sees, and where that comes from.

    `inference` makes it of what a user gives: "edges" of a picture, or ready ones; a picture with a "hole";
    "latents" of a small picture; or the picture itself, where it is "ready". `training` makes it of a
    training picture: "edges", random "holes", "latents", or the picture "reduced" and enlarged again.
    """

    sizes: ControlNetSizes  # of the published network, else of a new one; c_in is what it sees, in channels
    inference: Literal["edges", "hole", "latents", "ready"]
    training: Literal["edges", "holes", "latents", "reduced"] | None  # None: it cannot be made of a picture
    file: str | None  # of the published weights; None: there are none


HOLE = "inpainting"  # the control that fills one
CONTROL_TYPES: dict[str, ControlType] = {  # by name, as flags, configurations and weight files spell it
    "canny": ControlType(ControlNetSizes(c_in=1), "edges", "edges", "models/controlnet/canny.safetensors"),
    "inpainting": ControlType(
        ControlNetSizes(c_in=4), "hole", "holes", "models/controlnet/inpainting.safetensors"
    ),
    "super_resolution": ControlType(
        ControlNetSizes(c_in=16, bottleneck_mode="large"), "latents", "latents",
        "models/controlnet/super_resolution.safetensors",
    ),
    "depth": ControlType(ControlNetSizes(c_in=3), "ready", None, None),
    "tile": ControlType(ControlNetSizes(c_in=3), "ready", "reduced", None),
}  # fmt: skip


def control_type(name: str) -> ControlType:
    """The type of this name; ValueError, with the known ones, if there is none."""
    check_name("the control", name, tuple(CONTROL_TYPES))
    return CONTROL_TYPES[name]


def training_of(name: str) -> str:
    """How training makes what is seen; ValueError for a type whose input cannot be made of a picture."""
    if (way := control_type(name).training) is None:
        raise ValueError(
            f"a ControlNet for {name} cannot be trained here: what it sees cannot be made of training "
            "pictures, and ready ones are not read"
        )
    return way


def picture_flags(name: str) -> tuple[str, ...]:
    """How the picture, and what else this type needs, is given to inference/test_controlnet.py."""
    if (way := control_type(name).inference) == "ready":
        return ("--control_image", "PICTURE")
    return ("--control_source", "PICTURE", *(("--mask", "MASK") if way == "hole" else ()))


def no_weights(name: str) -> str:
    """That there are no weights of a type, and the way out, as a part of a sentence."""
    trained = ", or train them with train/train_ultrapixel_control.py" if control_type(name).training else ""
    return (
        f"no ControlNet for {name} is shipped: name weights of your own with --control_file FILE "
        f"('controlnet_checkpoint_path' in a configuration){trained}"
    )


def controlnet_name(name: str) -> str:
    """The ControlNet of a type, as errors and `core.weights.layouts.identify` call it."""
    return f"the {name.replace('_', ' ')} ControlNet"
