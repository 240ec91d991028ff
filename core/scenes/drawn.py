"""Drawn scenes as training pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from core.config.schema import SceneData
from core.config.sizes import Size
from core.data.files import Broken
from core.data.loader import Picture
from core.scenes.captions import caption
from core.scenes.drawing import render
from core.scenes.scene import SAMPLED, sample_scene


@dataclass(frozen=True)
class DrawnScenes:
    """Scenes of the procedural world as pictures of these sizes (height, width), numbered by their seeds."""

    settings: SceneData
    sizes: tuple[Size, ...]
    broken: int = 0

    def __post_init__(self) -> None:
        if not self._subjects or not set(self._subjects) <= set(SAMPLED):
            raise ValueError(
                f"'subjects' of scenes are some of {', '.join(SAMPLED)}, not {list(self._subjects)}"
            )

    @property
    def _subjects(self) -> tuple[str, ...]:
        return SAMPLED if self.settings.subjects is None else self.settings.subjects

    @property
    def source(self) -> str:
        """What it is, for messages."""
        return f"{self.settings.count} drawn scenes"

    @cached_property
    def members(self) -> dict[Size, np.ndarray]:
        """All seeds, in turn in the sizes' buckets."""
        count, step = self.settings.count, len(self.sizes)
        seeds = (np.arange(first, count, step) for first in range(step))
        return {size: mine for size, mine in zip(self.sizes, seeds, strict=True) if len(mine)}

    def read(self, number: int, bucket: Size, key: Sequence[int]) -> Picture | Broken:
        """A scene, drawn at one of the scales and cut out, with one of its captions."""
        rng = np.random.default_rng(key)
        scene = sample_scene(number, self.settings.split, self._subjects)
        scale = int(rng.choice(self.settings.scales))
        height, width = bucket
        top, left = (int(rng.integers((scale - 1) * side + 1)) for side in bucket)
        drawn = render(scene, scale * height, scale * width, (top, left, height, width))
        pixels = np.ascontiguousarray(drawn.transpose(2, 0, 1))
        words = caption(scene, int(rng.integers(2**31)), rng.random() >= self.settings.without_colour)
        return Picture(torch.from_numpy(pixels), words, f"{self.settings.split} scene {number}")

    def identity(self, number: int) -> str:
        """The scene, how it is cut out, and its captions."""
        settings = self.settings
        return f"{settings.split} {number} {self._subjects} {settings.scales} {settings.without_colour}"
