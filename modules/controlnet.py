"""ControlNet: feature maps from edges, masks or latents that are added before chosen ResBlocks of Stage C."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from modules.blocks import channels_first, pixels_last
from modules.effnet import BACKBONE_STEM, BACKBONE_WIDTH, StageRow, efficientnet_features

PUBLISHED_BLOCKS = (0, 4, 8, 12, 51, 55, 59, 63)
LEAKY_SLOPE = 0.2


class _AffineNorm(nn.LayerNorm):
    """LayerNorm over the channels of a feature map, with learned scale and shift."""

    def forward(self, x: Tensor) -> Tensor:
        return channels_first(super().forward(pixels_last(x)))


class _ConvResidual(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            _AffineNorm(c),
            nn.GELU(),
            nn.Conv2d(c, c, 3, padding=1),
            _AffineNorm(c),
            nn.GELU(),
            nn.Conv2d(c, c, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.blocks(x)


def _simple_backbone(c_in: int) -> tuple[nn.Sequential, int]:
    first, last = nn.Conv2d(c_in, 4 * c_in, 3, padding=1), nn.Conv2d(4 * c_in, c_in, 3, padding=1)
    return nn.Sequential(first, nn.LeakyReLU(LEAKY_SLOPE), last), c_in


def _large_backbone(c_in: int) -> tuple[nn.Sequential, int]:
    wide, width = 16 * 1024, 1024
    return nn.Sequential(
        nn.Conv2d(c_in, wide, 1),
        nn.LeakyReLU(LEAKY_SLOPE),
        nn.Conv2d(wide, width, 1),
        *(_ConvResidual(width) for _ in range(8)),
        nn.Conv2d(width, BACKBONE_WIDTH, 1),
    ), BACKBONE_WIDTH


def _effnet_backbone(
    c_in: int, stem: int, stages: Sequence[StageRow] | None, head: int
) -> tuple[nn.Sequential, int]:
    backbone = efficientnet_features(stem, stages, head)
    if c_in != 3:
        backbone[0][0] = nn.Conv2d(c_in, stem, 3, stride=2, bias=False)  # without padding, as published
    return backbone, head


BACKBONES = ("simple", "large", "effnet")


def _make_backbone(
    mode: str, c_in: int, stem: int, stages: Sequence[StageRow] | None, head: int
) -> tuple[nn.Sequential, int]:
    """The backbone of a mode, and its width."""
    if mode == "simple":
        return _simple_backbone(c_in)
    if mode == "large":
        return _large_backbone(c_in)
    if mode == "effnet":
        return _effnet_backbone(c_in, stem, stages, head)
    raise ValueError(f"unknown ControlNet backbone {mode!r}: known are {', '.join(BACKBONES)}")


class ControlNet(nn.Module):
    """Control entries for Stage C from a control picture or latent (B, c_in, H, W).

    `forward` returns an entry per ResBlock up to the last of `proj_blocks`: a map (B, c_proj, h, w), or None.
    `stem`, `stages` and `head` are sizes of the "effnet" backbone, as in `modules.effnet`.
    """

    def __init__(
        self,
        c_in: int = 3,
        c_proj: int = 2048,
        proj_blocks: Sequence[int] = PUBLISHED_BLOCKS,
        bottleneck_mode: str = "effnet",
        stem: int = BACKBONE_STEM,
        stages: Sequence[StageRow] | None = None,
        head: int = BACKBONE_WIDTH,
    ) -> None:
        super().__init__()
        self.backbone, width = _make_backbone(bottleneck_mode, c_in, stem, stages, head)
        self.proj_blocks = tuple(proj_blocks)
        self.projections = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 1, bias=False),
                nn.LeakyReLU(LEAKY_SLOPE),
                nn.Conv2d(width, c_proj, 1, bias=False),
            )
            for _ in self.proj_blocks
        )

    def init_weights(self) -> None:
        """Projections that add nothing at first, for training from nothing."""
        for projection in self.projections:
            nn.init.zeros_(projection[-1].weight)

    def forward(self, x: Tensor) -> list[Tensor | None]:
        feature = self.backbone(x)
        entries: list[Tensor | None] = [None] * (max(self.proj_blocks) + 1)
        for index, projection in zip(self.proj_blocks, self.projections, strict=True):
            entries[index] = projection(feature)
        return entries
