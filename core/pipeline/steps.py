"""One step of each pass, as it is run or recorded: networks of a latent at a time, and of what is held."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from core.config.settings import Settings
from core.pipeline import graphs
from core.pipeline.entries import Maps
from core.pipeline.graphs import Outputs, Recordings
from modules.guidance import PreparedGuidance
from modules.stage_b import StageB, StageBConditions
from modules.stage_c import StageC, StageCConditions
from modules.unet import InnerMaps, Times

LatentAtTime = tuple[Tensor, Times]
HighInputs = tuple[StageCConditions, PreparedGuidance | None, Maps | None]


def low_step(stage_c: StageC, step: LatentAtTime, held: tuple[StageCConditions, Maps | None]) -> Outputs:
    """The prediction of a low-resolution step, and the maps of its features."""
    prediction, features = stage_c.predict_with_features(*step, held[0], control=held[1])
    return prediction, *features.maps


def high_step(
    stage_c: StageC, step: LatentAtTime, held: HighInputs, inner: InnerMaps | None = None
) -> Outputs:
    """The prediction of a high-resolution step."""
    conditions, guidance, control = held
    beside = {"guidance": guidance, "inner": inner, "control": control}
    return (stage_c.predict(*step, conditions, **beside, control_guided=True),)


def step_b(stage_b: StageB, step: LatentAtTime, held: StageBConditions) -> Outputs:
    """The prediction of Stage B's step."""
    return (stage_b.predict(*step, held),)


def of_short_steps(
    recordings: Recordings | None,
    pixels: int,
    settings: Settings,
    device: torch.device,
    networks: Sequence[nn.Module],
) -> Recordings | None:
    """The recordings, where a step of so many pixels is short beside its launches, and as it always is."""
    if recordings is None or pixels > graphs.RECORDED_PIXELS or settings.fp8 != "off":
        return None
    return recordings.for_pass(device, *networks)


def predicted(
    recorded: Recordings | None, function: Callable[..., Outputs], step: LatentAtTime, held: Any
) -> Tensor:
    """What the step predicts, by its recording where there are any."""
    if recorded is None:
        return function(step, held)[0]
    return recorded.run(function, step, held)[0].clone()
