"""What a picture takes, before anything is loaded: bytes of each stage's weights and of its largest maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from core.pipeline.resolution import Plan
from core.weights.checkpoint import build_empty
from modules.stage_a import MAX_TILE

# Maps of a ResBlock's width that live at its peak: input, normed, and the hidden layer (4 times as wide)
# before and
# after GELU and normalisation; a level's skip and the guidance are counted with them.
MAPS_AT_PEAK = 16
STAGE_A_MAPS = 12  # without skips


@dataclass(frozen=True)
class StageEstimate:
    """Device memory of one stage, in bytes."""

    name: str
    weights: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.activations


def parameter_count(build: Callable[[], nn.Module]) -> int:
    """Number of parameters of a module, built on the meta device."""
    return sum(p.numel() for p in build_empty(build).parameters())


def stage_c_activations(plan: Plan, width: int, halves: int, element: int) -> int:
    """Bytes of Stage C's maps in the high-resolution pass, `element` bytes each."""
    return plan.hr_latent[0] * plan.hr_latent[1] * width * halves * element * MAPS_AT_PEAK


def stage_b_activations(plan: Plan, width: int, halves: int, element: int) -> int:
    """Bytes of Stage B's maps at its first level, whose patches are 2 latent pixels wide."""
    pixels = plan.stage_b_latent[0] * plan.stage_b_latent[1] // 4
    return pixels * width * halves * element * MAPS_AT_PEAK


def stage_a_activations(plan: Plan, width: int, halo: int) -> int:
    """Bytes of Stage A's maps for its largest tile, float32, and of the picture itself."""
    rows, columns = (min(side, MAX_TILE + 2 * halo) for side in plan.stage_b_latent)
    return rows * columns * width * 4 * STAGE_A_MAPS + 3 * 4 * plan.decoded_height * plan.decoded_width
