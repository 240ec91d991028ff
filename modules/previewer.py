"""Previewer: a fast look at a Stage C latent."""

from __future__ import annotations

from torch import Tensor, nn


class Previewer(nn.Module):
    """Stage C latents (B, c_in, H, W) to small pictures (B, 3, 8·H, 8·W), about [0, 1]."""

    def __init__(self, c_in: int = 16, c_hidden: int = 512, c_out: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []

        def add(layer: nn.Module, width: int) -> None:
            layers.extend([layer, nn.GELU(), nn.BatchNorm2d(width)])

        add(nn.Conv2d(c_in, c_hidden, 1), c_hidden)
        add(nn.Conv2d(c_hidden, c_hidden, 3, padding=1), c_hidden)
        width = c_hidden
        for narrower in (c_hidden // 2, c_hidden // 4, c_hidden // 4):
            add(nn.ConvTranspose2d(width, narrower, 2, stride=2), narrower)
            add(nn.Conv2d(narrower, narrower, 3, padding=1), narrower)
            width = narrower
        self.blocks = nn.Sequential(*layers, nn.Conv2d(width, c_out, 1))

    def forward(self, latent: Tensor) -> Tensor:
        return self.blocks(latent)
