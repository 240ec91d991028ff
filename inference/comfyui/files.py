"""Weight files in ComfyUI's own model folders, and the configurations that they belong to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import folder_paths

from core.config.presets import PRESETS, of_project
from core.config.schema import StageBConfig, StageCConfig, stage_b_sizes, stage_c_sizes
from core.config.yaml import load_stage_b, load_stage_c
from core.weights.checkpoint import read_shapes

NONE = "none"
# The tensors whose first side, the width of a level, tells the versions apart.
STAGE_C_MARK, STAGE_B_MARK = "down_blocks.0.0.depthwise.weight", "down_blocks.1.0.depthwise.weight"

Config = TypeVar("Config", StageCConfig, StageBConfig)


def names_in(folder: str, none: bool = False) -> list[str]:
    """The names of files in one of ComfyUI's model folders, as its nodes list them; `none` may be chosen."""
    return [*([NONE] if none else []), *folder_paths.get_filename_list(folder)]


def path_in(folder: str, name: str) -> str | None:
    """Where a file of such a list lies; None for `none`. ValueError for one that is not there."""
    if name == NONE:
        return None
    path = folder_paths.get_full_path(folder, name)
    if path is None:
        raise ValueError(f"{name} is not in ComfyUI's models/{folder}: put it there, and refresh the list")
    return path


def stage_c_config(file: str, encoder: str | None, previewer: str | None) -> StageCConfig:
    """The configuration of a file of Stage C, with those of the encoder and the previewer, if any."""
    configs = [load_stage_c(of_project(preset.config_c)) for preset in PRESETS.values()]
    config = _fitting(file, "Stage C", STAGE_C_MARK, configs, _width_c)
    others = {"effnet_checkpoint_path": encoder, "previewer_checkpoint_path": previewer}
    return replace(config, generator_checkpoint_path=file, **others)


def stage_b_config(file: str, stage_a: str) -> StageBConfig:
    """The configuration of a file of Stage B, and one of Stage A."""
    configs = [load_stage_b(of_project(preset.config_b)) for preset in PRESETS.values()]
    config = _fitting(file, "Stage B", STAGE_B_MARK, configs, _width_b)
    return replace(config, generator_checkpoint_path=file, stage_a_checkpoint_path=stage_a)


def _width_c(config: StageCConfig) -> int:
    return stage_c_sizes(config).c_hidden[0]


def _width_b(config: StageBConfig) -> int:
    return stage_b_sizes(config).c_hidden[1]


def _fitting(
    file: str, what: str, mark: str, configs: list[Config], width: Callable[[Config], int]
) -> Config:
    """Those of the presets' configurations whose network is as wide as the file's."""
    found = read_shapes(file).get(mark, (0,))[0]
    known = {width(config): config for config in configs}
    if found not in known:
        names = ", ".join(dict.fromkeys(config.model_version for config in known.values()))
        raise ValueError(f"{file} is no file of {what} in a version that is known here: {names}")
    return known[found]
