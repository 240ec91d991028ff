"""EfficientNet encoder, the semantic compressor: pictures to the latents Stage C learns, 1/32 of the side."""

from __future__ import annotations

from torch import Tensor, nn

import modules.torchvision_operators  # noqa: F401  before torchvision

from torchvision.models import efficientnet_v2_s  # isort: skip

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
BACKBONE_WIDTH = 1280


def imagenet_normalise(image: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] normalised with the statistics of ImageNet."""
    mean, std = (image.new_tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (image - mean) / std


def efficientnet_features() -> nn.Sequential:
    """EfficientNetV2-S without its classifier: (B, 3, H, W) -> (B, 1280, H / 32, W / 32)."""
    return efficientnet_v2_s(weights=None).features


class EfficientNetEncoder(nn.Module):
    """Pictures (B, 3, H, W), ImageNet-normalised, to semantic latents (B, 16, H / 32, W / 32)."""

    def __init__(self, c_latent: int = 16) -> None:
        super().__init__()
        self.backbone = efficientnet_features()
        self.mapper = nn.Sequential(
            nn.Conv2d(BACKBONE_WIDTH, c_latent, 1, bias=False), nn.BatchNorm2d(c_latent, affine=False)
        )
        self.eval()

    def forward(self, image: Tensor) -> Tensor:
        return self.mapper(self.backbone(image))
