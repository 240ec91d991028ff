"""The controls that hold for a pipeline's calls: pictures, ControlNets, and what metadata tell of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from core.config.arguments import number, whole_number
from core.config.given_control import GivenControl, read_control
from core.config.presets import Preset
from core.config.schema import ControlConfig, LatentGeometry
from core.config.sizes import Size, StageCSizes
from core.paths import at_home
from core.pipeline.control import Control, ControlNetFile, Encoder, open_controlnet
from core.pipeline.offload import Offloaded, Placement
from core.pipeline.steering import Steering, given_source, steering_flags
from core.weights.checkpoint import load_module
from modules.controlnet import ControlNet

Controls = Control | Sequence[Control]  # of one picture, one for each ControlNet


@dataclass(frozen=True)
class SetControls:
    """ControlNets, and the pictures that steer by them, one for each; or none, where jobs bring controls."""

    files: tuple[ControlNetFile, ...] = ()
    networks: tuple[Offloaded[ControlNet], ...] = ()
    steerings: tuple[Steering, ...] = ()
    given: tuple[GivenControl, ...] = ()  # what the steerings were made of, in full

    def shape(self, height: int | None, width: int | None) -> tuple[int | None, int | None]:
        """The asked sides; where a hole is filled, those that were not asked for are its picture's."""
        for steering in self.steerings:
            height, width = steering.shape(height, width)
        return height, width

    def controls(
        self, size: Size, geometry: LatentGeometry, encoder: Callable[[], Encoder]
    ) -> tuple[Control, ...]:
        """What steers pictures of a size (height, width); the encoder is loaded where it is needed."""
        return tuple(steering.control(size, geometry, encoder) for steering in self.steerings)

    def flags(self, alone: bool) -> dict[str, Any]:
        """What repeats them: flags of inference/test_controlnet.py where one is `alone`, else of test_t2i.py.

        A picture that is no file is None.
        """
        if not self.given:
            return {}
        plain = {"start": 1.0, "end": 0.0, "hr": False}
        if alone and len(self.given) == 1 and self.given[0] == replace(self.given[0], **plain):
            (given,), (steering,), (file,) = self.given, self.steerings, self.files
            return steering_flags(steering, file, given.picture, given.mask, given.outpaint)
        return {"controls": [stored(given) for given in self.given]}

    def named_files(self) -> dict[str, str]:
        """Their weight files, by what they hold."""
        numbers = [""] if len(self.files) == 1 else [f" {i + 1}" for i in range(len(self.files))]
        return {f"ControlNet{n}": file.path for n, file in zip(numbers, self.files, strict=True)}


def stored(given: GivenControl) -> dict[str, Any]:
    """A control as pictures' metadata tell it; None for a picture that is no file."""
    places = {
        name: str(value) if isinstance(value, str | Path) else None
        for name, value in (("picture", given.picture), ("mask", given.mask), ("file", given.file))
    }
    sides = None if given.outpaint is None else list(given.outpaint)
    told = {name: getattr(given, name) for name in GivenControl.__dataclass_fields__}
    return {**told, **places, "outpaint": sides}


def several(control: Controls) -> tuple[Control, ...]:
    """The controls of a picture, of which it may have one alone."""
    return (control,) if isinstance(control, Control) else tuple(control)


def set_nets(
    configs: Sequence[ControlConfig], sizes: StageCSizes, dtype: torch.dtype, placement: Placement
) -> SetControls:
    """ControlNets for jobs that bring their controls, a file loaded once; errors as in `open_controlnet`."""
    files = tuple(open_controlnet(config, sizes) for config in configs)
    networks = {file.path: _network(file, dtype, placement) for file in files}
    return SetControls(files, tuple(networks[file.path] for file in files))


def _network(file: ControlNetFile, dtype: torch.dtype, placement: Placement) -> Offloaded[ControlNet]:
    build = partial(ControlNet, **asdict(file.sizes))
    return Offloaded(
        lambda home, _: load_module(build, file.path, dtype=dtype, device=home, what=file.name), placement
    )


def set_given(
    wanted: Sequence[GivenControl | str],
    preset: Preset,
    sizes: StageCSizes,
    dtype: torch.dtype,
    placement: Placement,
) -> SetControls:
    """Controls by pictures; what they leave open is the preset's, or their files' own.

    TypeError or ValueError for what does not fit, OSError for what cannot be read.
    """
    given = [_control(one) for one in wanted]
    if [one.control for one in given].count("inpainting") > 1:
        raise ValueError("one control can fill a hole, not several: put all holes into one mask")
    sources = [given_source(one.control, one.picture, one.mask, one.ready, one.outpaint) for one in given]
    nets = set_nets([_config(one, preset) for one in given], sizes, dtype, placement)
    given = [_in_full(one, file, preset) for one, file in zip(given, nets.files, strict=True)]
    steerings = [
        Steering(g.control, source, g.size, g.weight, g.keep_aspect, g.ready, g.start, g.end, g.hr)
        for g, source in zip(given, sources, strict=True)
    ]
    return replace(nets, steerings=tuple(steerings), given=tuple(given))


def _control(given: GivenControl | str) -> GivenControl:
    if isinstance(given, str):
        return read_control(given)
    if not isinstance(given, GivenControl):
        raise TypeError(f"a control is GivenControl(...), or text like 'canny:house.png:0.8', not {given!r}")
    return given


def _config(given: GivenControl, preset: Preset) -> ControlConfig:
    kind, file = given.control, given.file
    place = preset.control_file.format(control=kind) if file is None else at_home(str(file))
    size = None if given.size is None else whole_number("size", given.size)
    return ControlConfig(controlnet_filter=kind, controlnet_checkpoint_path=place, control_size=size)


def _in_full(given: GivenControl, file: ControlNetFile, preset: Preset) -> GivenControl:
    """The control with what it left open."""
    weight = preset.control_weight if given.weight is None else number("weight", given.weight)
    return replace(given, weight=weight, file=file.path, size=file.control_size)
