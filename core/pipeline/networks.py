"""The networks that lie beside the stages, from the files that a configuration names."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from core.config.schema import StageCConfig, effnet_sizes, guidance_sizes, previewer_sizes
from core.config.sizes import GuidanceSizes
from core.weights.checkpoint import load_module, read_config
from core.weights.layouts import guidance_names
from modules.effnet import EfficientNetEncoder
from modules.guidance import UPSAMPLINGS, Guidance
from modules.previewer import Previewer

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def load_encoder(config: StageCConfig, what_for: str) -> EfficientNetEncoder:
    """The encoder of Stage C's latents, on the CPU; ValueError (`what_for` needs it) where none is named."""
    if config.effnet_checkpoint_path is None:
        raise ValueError(f"{what_for} needs 'effnet_checkpoint_path' in the Stage C configuration")
    build = partial(EfficientNetEncoder, **asdict(effnet_sizes(config)))
    path = config.effnet_checkpoint_path
    return load_module(build, path, dtype=torch.float32, what="EfficientNet encoder")


def sizes_of_guidance(config: StageCConfig, path: str | Path) -> GuidanceSizes:
    """The sizes of a guidance file for a Stage C configuration.

    How it upsamples, and between which scales it is interpolated, its metadata tells. ValueError for what
    is unknown or no sides. A file that is not there yet is taken for one as configured.
    """
    sizes = guidance_sizes(config)
    stored = (read_config(path) or {}) if Path(path).exists() else {}
    upsampling = stored.get("upsampling", sizes.upsampling)
    if upsampling not in UPSAMPLINGS:
        raise ValueError(
            f"{path}: its guidance upsamples by {upsampling!r}, which is not known here: "
            f"{', '.join(UPSAMPLINGS)} are"
        )
    sides = stored.get("scale_sides", sizes.scale_sides)
    if not isinstance(sides, list | tuple) or not all(type(side) is int for side in sides):
        raise ValueError(f"{path}: its 'scale_sides' must be a list of whole numbers, not {sides!r}")
    return replace(sizes, upsampling=upsampling, scale_sides=tuple(sides))


def load_guidance(
    config: StageCConfig, path: str | Path, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Guidance:
    """The guidance of a file, for a Stage C configuration."""
    build = partial(Guidance, **asdict(sizes_of_guidance(config, path)))
    return load_module(build, path, dtype=dtype, device=device, what="guidance", translate=guidance_names)


def load_previewer(config: StageCConfig, device: torch.device | str) -> Previewer:
    """The previewer of a Stage C configuration; ValueError where it names none."""
    if config.previewer_checkpoint_path is None:
        raise ValueError("a preview needs 'previewer_checkpoint_path' in the Stage C configuration")
    build = partial(Previewer, **asdict(previewer_sizes(config)))
    return load_module(
        build, config.previewer_checkpoint_path, dtype=torch.float32, device=device, what="previewer"
    )
