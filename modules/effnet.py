"""EfficientNet encoder, the semantic compressor: pictures to the latents Stage C learns, 1/32 of the side."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
BACKBONE_WIDTH = 1280
BACKBONE_STEM = 24

StageRow = tuple[str, int, int, int, int]  # kind of block, expansion, stride, width, blocks


def imagenet_normalise(image: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] normalised with the statistics of ImageNet."""
    mean, std = (image.new_tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (image - mean) / std


def efficientnet_features(
    stem: int = BACKBONE_STEM, stages: Sequence[StageRow] | None = None, head: int = BACKBONE_WIDTH
) -> nn.Sequential:
    """EfficientNetV2-S, or one of these stages, without its classifier.

    (B, 3, H, W) -> (B, head, H / stride, W / stride); the stride is the stem's 2 times the stages', 32 for S.
    """
    # Here, as torchvision's models take two seconds to import, and most pictures need none.
    from modules.torchvision_operators import torchvision

    efficientnet = torchvision.models.efficientnet

    if stages is None:
        return efficientnet.efficientnet_v2_s(weights=None).features
    kinds = {"fused": efficientnet.FusedMBConvConfig, "mb": efficientnet.MBConvConfig}
    rows, width = [], stem
    for kind, expand, stride, wider, count in stages:
        if kind not in kinds:
            raise ValueError(f"unknown encoder block {kind!r}: known are {', '.join(kinds)}")
        rows.append(kinds[kind](expand, 3, stride, width, wider, count))
        width = wider
    norm = partial(nn.BatchNorm2d, eps=1e-3)  # as in V2-S
    return efficientnet.EfficientNet(
        rows, dropout=0, stochastic_depth_prob=0, last_channel=head, norm_layer=norm
    ).features


class EfficientNetEncoder(nn.Module):
    """Pictures (B, 3, H, W), ImageNet-normalised, to semantic latents (B, 16, H / 32, W / 32).

    With `stages` given, a smaller encoder of another stride. It starts in evaluation mode.
    """

    def __init__(
        self,
        c_latent: int = 16,
        stem: int = BACKBONE_STEM,
        stages: Sequence[StageRow] | None = None,
        head: int = BACKBONE_WIDTH,
    ) -> None:
        super().__init__()
        self.backbone = efficientnet_features(stem, stages, head)
        self.mapper = nn.Sequential(
            nn.Conv2d(head, c_latent, 1, bias=False), nn.BatchNorm2d(c_latent, affine=False)
        )
        self.eval()

    def forward(self, image: Tensor) -> Tensor:
        return self.mapper(self.backbone(image))
