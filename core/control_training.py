"""Training of a ControlNet on a frozen Stage C: what it sees of a batch, and what a step predicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from core.conditioning import Conditions
from core.config import ControlFilter
from core.control import CONTROL_SIZE, Encoder, edges, half_size_latents, with_hole
from core.noising import Noised
from core.random_keys import generator_of
from modules.controlnet import ControlNet
from modules.stage_c import StageC

HOLE_SIDES = (0.2, 0.7)  # of the picture's, of the ellipses and rectangles that are holes
INVERTED_SHARE = 0.4  # of the holes, which are turned inside out, so that what is around is filled

Seen = Callable[[Tensor, Sequence[Sequence[int]]], tuple[Tensor, Tensor]]


class ControlledStageC(nn.Module):
    """A ControlNet with a frozen Stage C around it: only the ControlNet's parameters belong to this module.

    Without `train_encoder` its backbone stays as it is, normalisation statistics too.
    """

    def __init__(self, stage_c: StageC, control: ControlNet, train_encoder: bool = True) -> None:
        super().__init__()
        self.control, self._train_encoder = control, train_encoder
        self._frozen = (stage_c.requires_grad_(False).eval(),)  # in a tuple: not a submodule, not a parameter
        control.backbone.requires_grad_(train_encoder)
        self.train()

    @property
    def stage_c(self) -> StageC:
        """The frozen base."""
        return self._frozen[0]

    def train(self, mode: bool = True) -> ControlledStageC:
        """Training or evaluation mode, but for a backbone that is not trained."""
        super().train(mode)
        self.control.backbone.train(mode and self._train_encoder)
        return self

    def forward(self, latents: Noised, conditions: Conditions, seen: Tensor) -> Tensor:
        """The prediction (B, 16, H, W) under what the ControlNet sees, (B, c_in, h, w).

        Run it under autocast where Stage C is in bfloat16: the ControlNet stays in float32.
        """
        dtype = self.stage_c.clf[1].weight.dtype
        with torch.no_grad():
            held = self.stage_c.prepare(
                conditions.clip_text, conditions.clip_text_pooled, conditions.clip_img
            )
        control = self.control(seen)
        return self.stage_c.predict(latents.x.to(dtype), latents.r, held, control=control)


def what_is_seen(kind: ControlFilter, control_size: int | None, encoder: Encoder) -> Seen:
    """The filter of a training, a function of pictures (B, 3, H, W) and of the samples' keys.

    It gives the ControlNet's input (B, c_in, H, W), and the same to look at (B, 3, H, W).
    """

    def see(images: Tensor, keys: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        if kind == "canny":
            found = edges(images, control_size or CONTROL_SIZE)
            return found, found.expand_as(images)
        if kind == "inpainting":
            seen = with_hole(images, random_holes(keys, images.shape[-2], images.shape[-1]).to(images))
            return seen, seen[:, :3]
        return half_size_latents(images, encoder)

    return see


def random_holes(keys: Sequence[Sequence[int]], height: int, width: int) -> Tensor:
    """Holes (B, 1, height, width), 0 or 1, of samples with these keys: ellipses, rectangles, or all else."""
    rows = ((torch.arange(height) + 0.5) / height)[:, None]
    columns = ((torch.arange(width) + 0.5) / width)[None]
    holes = []
    for key in keys:
        y, x, high, wide, shape, inverted = torch.rand(6, generator=generator_of((*key, 1))).tolist()
        sides = (HOLE_SIDES[0] + (HOLE_SIDES[1] - HOLE_SIDES[0]) * share for share in (high, wide))
        down, across = (2 * (place - middle).abs() / side for place, middle, side in
                        zip((rows, columns), (y, x), sides, strict=True))  # fmt: skip
        hole = torch.hypot(down, across) < 1 if shape < 0.5 else torch.maximum(down, across) < 1
        holes.append(hole != (inverted < INVERTED_SHARE))
    return torch.stack(holes)[:, None].float()
