"""The pipeline of one preset at a time, and what can be said of the others without loading them."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from core.commands.pictures import Previewing
from core.config.control_types import CONTROL_TYPES
from core.config.presets import DEFAULT, EMBEDDED, PRESETS, of_project
from core.config.schema import LatentGeometry
from core.config.settings import Settings
from core.paths import located
from core.pipeline.estimate import GIB
from core.pipeline.pipeline import UltraPixelPipeline
from core.pipeline.resolution import plan_for

LORA_FILES = "lora_*.safetensors"  # beside a preset's weights


@dataclass
class Models:
    """Presets by name; `options` are arguments of `UltraPixelPipeline.from_preset`.

    `lora_folder` holds LoRAs besides those that lie beside a preset's weights.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    lora_folder: Path | None = None
    _described: dict[str, UltraPixelPipeline] = field(default_factory=dict)
    _held: tuple[str, UltraPixelPipeline] | None = None
    _previewing: Previewing | None = None  # of the one that is held
    _seconds: dict[str, float] = field(default_factory=dict)  # of a unit of work, by preset

    def described(self, preset: str) -> UltraPixelPipeline:
        """A pipeline that nothing is loaded for, to ask."""
        if preset not in self._described:
            self._described[preset] = UltraPixelPipeline.from_preset(preset, **self.options)
        return self._described[preset]

    def geometry(self, preset: str) -> LatentGeometry:
        """How pixels relate to its latents."""
        return self.described(preset).config_c.geometry

    def available(self) -> list[str]:
        """The presets whose weights are there."""
        return [name for name in PRESETS if self.lacking(name) is None]

    def lacking(self, preset: str) -> str | None:
        """What is wrong with a preset's weights, in a sentence; None where all is right."""
        try:
            self.described(preset).check_files()
        except (ValueError, OSError) as error:
            return str(error)
        return None

    def first(self) -> str:
        """The preset to begin with: the default one, else any whose weights are there."""
        names = self.available()
        default = next(name for name, preset in PRESETS.items() if preset is DEFAULT)
        return default if default in names else names[0] if names else EMBEDDED

    def held(self) -> str | None:
        """The preset whose pipeline is held now."""
        return self._held and self._held[0]

    def pipeline(self, preset: str) -> UltraPixelPipeline:
        """The preset's pipeline, which stays until another preset's is asked for. For the worker alone."""
        if self.held() != preset:
            self._held = self._previewing = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._held = preset, UltraPixelPipeline.from_preset(preset, **self.options)
        return self._held[1]

    def previews(self, preset: str) -> Previewing | None:
        """What shows its latents; None where its configuration cannot. For the worker alone."""
        pipeline = self.pipeline(preset)
        if self._previewing is None and pipeline.config_c.previewer_checkpoint_path is not None:
            self._previewing = Previewing(pipeline)
        return self._previewing

    def loras(self, preset: str) -> dict[str, Path]:
        """The LoRAs that can be asked for, by name."""
        weights = Path(self.described(preset).config_c.generator_checkpoint_path)
        beside = Path(of_project(str(weights))).parent.glob(LORA_FILES)
        own = () if self.lora_folder is None else self.lora_folder.glob("*.safetensors")
        return {path.stem: path for path in sorted([*beside, *own], key=lambda path: path.stem)}

    def controls(self, preset: str) -> list[str]:
        """The types of control whose weights are there."""
        place = self.described(preset).preset.control_file
        return [name for name in CONTROL_TYPES if Path(located(place.format(control=name))).exists()]

    # --- what a picture takes -------------------------------------------------------------------------

    def memory(self, preset: str, size: tuple[int, int], settings: Settings) -> float:
        """GiB on the device, for one stage at a time; ValueError for a size that cannot be."""
        pipeline = self.described(preset)
        return max(s.total for s in pipeline.estimate(plan_for(pipeline.config_c, *size), settings)) / GIB

    def learn(self, preset: str, size: tuple[int, int], settings: Settings, seconds: float) -> None:
        """Remember how long a picture took."""
        self._seconds[preset] = seconds / _work(size, settings)

    def seconds(self, preset: str, size: tuple[int, int], settings: Settings) -> float | None:
        """How long a picture will take, by the last one; None before the first."""
        each = self._seconds.get(preset)
        return None if each is None else each * _work(size, settings)


def _work(size: tuple[int, int], settings: Settings) -> float:
    """Roughly what a picture's time grows with: its pixels, times the steps at their resolution."""
    return size[0] * size[1] * (settings.steps + settings.steps_b + 5) + 2**20 * settings.steps_low
