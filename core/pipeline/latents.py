"""The latents of a picture, kept to go on from: as a file beside it, with the settings that made them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from core.config.latents import METADATA_KEY, read_stored
from core.config.schema import StageCConfig, stage_c_sizes
from core.config.settings import Job, Settings, settings_from
from core.config.sizes import Size
from core.pipeline.passes import C_LATENT, LowEnd
from core.pipeline.resolution import Plan, plan_for
from core.pipeline.sources import NOISE_ALONE, Source
from core.weights.checkpoint import read_tensors, save_tensors

PASS_KEY = "low_resolution_pass"  # of the metadata: how it was made
FAMILY_KEY = "family"
LOW = {"x0": "lr", "epsilon": "lr_noise", "noised": "lr_last_step"}  # a `LowEnd`'s tensors in the file
HIGH, STAGE_B = "hr", "stage_b"


@dataclass(frozen=True)
class Latents:
    """What the stages made on the way to a picture, on the CPU."""

    stage_b: Tensor  # (1, 4, h, w)
    high: Tensor | None = None  # of Stage C's high-resolution pass (1, 16, h, w)
    low: LowEnd | None = None  # of its low-resolution pass
    family: Mapping[str, Any] | None = None  # as in `family_of`

    def save(self, path: str | Path, metadata: Mapping[str, Any]) -> None:
        """Write them as safetensors, with the settings of their picture; an existing file is replaced."""
        tensors = {STAGE_B: self.stage_b}
        texts = {METADATA_KEY: json.dumps(dict(metadata)), FAMILY_KEY: json.dumps(self.family)}
        if self.high is not None:
            tensors[HIGH] = self.high
        if self.low is not None:
            tensors |= {file: getattr(self.low, name) for name, file in LOW.items()}
            made = {"settings": asdict(self.low.settings), "strength": self.low.strength}
            texts[PASS_KEY] = json.dumps(made)
        save_tensors(path, tensors, texts)


def family_of(config: StageCConfig) -> dict[str, Any]:
    """What latents of one family have in common: how pixels relate to them, and the text's width."""
    return {"geometry": asdict(config.geometry), "c_clip_text": stage_c_sizes(config).c_clip_text}


@dataclass(frozen=True)
class Earlier:
    """A picture that was made before, to go on from: of a file of latents, or of this process."""

    name: str | None  # of its file
    job: Job
    settings: Settings
    high: Tensor | None
    low: LowEnd | None

    @classmethod
    def of_file(cls, path: str | Path, config: StageCConfig) -> Earlier:
        """That of a file which `Latents.save` wrote.

        FileNotFoundError, or ValueError for what is no such file, is damaged, or of another family or size.
        """
        stored = read_stored(path)
        if stored.texts.get(FAMILY_KEY) != json.loads(json.dumps(family_of(config))):
            made = stored.settings.get("config_c", "another Stage C")
            raise ValueError(f"{path}: these latents are of another family, that of {made}: use its models")
        tensors = read_tensors(path)
        try:
            own = {field.name for field in fields(Job)} - {"settings"}
            job = Job(**{name: value for name, value in stored.settings.items() if name in own})
            settings, low = settings_from(stored.settings), _low_end(tensors, stored.texts.get(PASS_KEY))
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: the file of latents is damaged ({error})") from None
        earlier = cls(str(path), job, settings, tensors.get(HIGH), low)
        earlier.check(plan_for(config, *earlier.size, settings.lr_size))
        return earlier

    @classmethod
    def of_latents(
        cls, latents: Latents | None, job: Job, settings: Settings | None, config: StageCConfig
    ) -> Earlier:
        """That of a picture of this process; ValueError for one without latents, or of another family."""
        if latents is None or settings is None:
            raise ValueError("this picture comes without its latents: save them with it, and name that file")
        if latents.family != family_of(config):
            raise ValueError("the picture's latents are of another family than this pipeline's")
        return cls(None, job, settings, latents.high, latents.low)

    @property
    def size(self) -> Size:
        """The picture's (height, width) in pixels."""
        return self.job.height, self.job.width

    @property
    def _called(self) -> str:
        return self.name or "the picture"

    @property
    def lr_size(self) -> Size:
        """That of the picture whose low-resolution pass was made."""
        return self.settings.lr_size or self.size

    def check(self, sizes: Plan) -> None:
        """ValueError for latents that do not have the sizes that the settings give them."""
        low = {} if self.low is None else {file: getattr(self.low, name) for name, file in LOW.items()}
        for name, tensor in low.items():
            if tensor.shape != (1, C_LATENT, *sizes.lr_latent):
                found, right = (_by(shape) for shape in (tensor.shape[1:], (C_LATENT, *sizes.lr_latent)))
                raise ValueError(
                    f"{self._called}: the latent {name!r} is of {found}, but should be of {right}"
                )

    def going_on(self, source: Source = NOISE_ALONE) -> Source:
        """The source, but of a high-resolution pass after the low one; ValueError where that is not there."""
        if self.low is None:
            raise ValueError(f"{self._called}: there is no low-resolution pass in it to go on from")
        return replace(source, ended=self.low)

    def decoding(self, size: Size, lr_only: bool, source: Source = NOISE_ALONE) -> Source:
        """The source, but of Stages B and A alone, for a picture of this size (height, width).

        ValueError where there is no latent for it.
        """
        if size != self.size:
            own, asked = (f"{height} x {width}" for height, width in (self.size, size))
            raise ValueError(
                f"{self._called}: its latents are of {own} (height x width), not of {asked}: leave the size "
                "out, or go on from its low-resolution pass"
            )
        latent = self.high if not lr_only else None if self.low is None else self.low.x0
        if latent is None:
            what = LOW["x0"] if lr_only else HIGH
            way = "" if self.low is None else ": go on from its low-resolution pass instead"
            raise ValueError(f"{self._called}: there is no latent {what!r} in it{way}")
        return replace(source, latent=latent, ended=self.low)


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _low_end(tensors: Mapping[str, Tensor], made: Mapping[str, Any] | None) -> LowEnd | None:
    if made is None or LOW["x0"] not in tensors:
        return None
    parts = {name: tensors[file] for name, file in LOW.items()}
    return LowEnd(**parts, settings=settings_from(made["settings"]), strength=float(made["strength"]))
