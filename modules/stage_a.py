"""Stage A: a VQGAN between pictures and 4-channel latents at a quarter of the side."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.blocks import LAYER_NORM_EPS, channels_first, pixels_last, xavier_linears

COMPRESSION = 4  # picture pixels per latent pixel and side
LATENT_SCALE = 0.43
MAX_TILE = 256  # latent pixels a side that are decoded at once


class StageAResBlock(nn.Module):
    """Depthwise convolution and per-pixel MLP, each behind a modulated norm and scaled by `gammas`."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.depthwise = nn.Sequential(nn.ReplicationPad2d(1), nn.Conv2d(c, c, 3, groups=c))
        self.channelwise = nn.Sequential(nn.Linear(c, 4 * c), nn.GELU(), nn.Linear(4 * c, c))
        self.gammas = nn.Parameter(torch.zeros(6))

    def _norm(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        c = x.shape[1]
        normed = F.layer_norm(
            pixels_last(x), (c,), (1 + scale).expand(c), shift.expand(c), eps=LAYER_NORM_EPS
        )
        return channels_first(normed)

    def forward(self, x: Tensor) -> Tensor:
        m = self.gammas
        x = x + m[2] * self.depthwise(self._norm(x, m[0], m[1]))
        y = channels_first(self.channelwise(pixels_last(self._norm(x, m[3], m[4]))))
        return x + m[5] * y


class VectorQuantizer(nn.Module):
    """Nearest codebook entry of every latent pixel, with a straight-through gradient."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.codebook = nn.Embedding(size, dim)

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, C, H, W) -> quantised latent, indices (B, H, W), squared distances to the entries (B, H, W)."""
        flat = pixels_last(latent).float()
        distances = torch.cdist(flat.flatten(0, 2), self.codebook.weight.float())
        indices = distances.argmin(dim=1).view(flat.shape[:3])
        entries = channels_first(self.codebook(indices)).to(latent.dtype)
        squared = (entries - latent).square().sum(dim=1)
        return latent + (entries - latent).detach(), indices, squared


class StageA(nn.Module):
    """Stage A: pictures (B, 3, 4·H, 4·W) in [0, 1] to latents (B, 4, H, W), scaled by 0.43, and back."""

    def __init__(
        self, c_hidden: int = 384, c_latent: int = 4, bottleneck_blocks: int = 12, codebook_size: int = 8192
    ):
        super().__init__()
        self.bottleneck_blocks = bottleneck_blocks
        wide, narrow = c_hidden, c_hidden // 2
        self.in_block = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, narrow, 1))
        self.down_blocks = nn.Sequential(
            StageAResBlock(narrow),
            nn.Conv2d(narrow, wide, 4, stride=2, padding=1),
            StageAResBlock(wide),
            nn.Sequential(nn.Conv2d(wide, c_latent, 1, bias=False), nn.BatchNorm2d(c_latent)),
        )
        self.vquantizer = VectorQuantizer(codebook_size, c_latent)
        self.up_blocks = nn.Sequential(
            nn.Sequential(nn.Conv2d(c_latent, wide, 1)),
            *(StageAResBlock(wide) for _ in range(bottleneck_blocks)),
            nn.ConvTranspose2d(wide, narrow, 4, stride=2, padding=1),
            StageAResBlock(narrow),
        )
        self.out_block = nn.Sequential(nn.Conv2d(narrow, 12, 1), nn.PixelShuffle(2))

    def init_weights(self) -> None:
        """Initial values for training from nothing: blocks start idle, scaled latents at variance 1."""
        xavier_linears(self)
        for module in self.modules():
            if isinstance(module, StageAResBlock):
                nn.init.zeros_(module.gammas)
        nn.init.constant_(self.down_blocks[3][1].weight, LATENT_SCALE)
        nn.init.uniform_(self.vquantizer.codebook.weight, -2 * LATENT_SCALE, 2 * LATENT_SCALE)

    def encode_unscaled(self, image: Tensor) -> Tensor:
        """The unquantised latent before the division by 0.43 (training the codebook needs it)."""
        return self.down_blocks(self.in_block(image.contiguous(memory_format=torch.channels_last)))

    def encode(self, image: Tensor) -> Tensor:
        """Picture (B, 3, 4·H, 4·W) in [0, 1] -> latent (B, 4, H, W), not quantised."""
        return self.encode_unscaled(image) / LATENT_SCALE

    def quantise(self, latent: Tensor) -> Tensor:
        """The latent (B, 4, H, W) with every pixel moved to its nearest codebook entry."""
        return self.vquantizer(latent * LATENT_SCALE)[0] / LATENT_SCALE

    def decode_unscaled(self, latent: Tensor) -> Tensor:
        """Picture from a latent that is multiplied by 0.43 already."""
        return self.out_block(self.up_blocks(latent.contiguous(memory_format=torch.channels_last)))

    def decode(self, latent: Tensor) -> Tensor:
        """Latent (B, 4, H, W) -> picture (B, 3, 4·H, 4·W), about [0, 1]; not clamped."""
        return self.decode_unscaled(latent * LATENT_SCALE)

    @property
    def halo(self) -> int:
        """Latent pixels around a tile that reach its picture: one per bottleneck block, two for the rest."""
        return self.bottleneck_blocks + 2

    def picture_shape(self, latent: Tensor) -> tuple[int, ...]:
        """The shape (B, 3, 4·H, 4·W) of a latent's picture."""
        batch, _, height, width = latent.shape
        return batch, 3, COMPRESSION * height, COMPRESSION * width

    def decode_tiled(self, latent: Tensor, max_tile: int = MAX_TILE, out: Tensor | None = None) -> Tensor:
        """`decode` in tiles of at most `max_tile` latent pixels a side: the same picture, in bounded memory.

        Nothing in Stage A looks further than `halo` pixels, so a tile decoded with that margin is exact.
        `out` is memory for it, on any device; then it is clamped to [0, 1], and complete on return.
        """
        picture = latent.new_empty(self.picture_shape(latent)) if out is None else out
        for top, bottom in _spans(latent.shape[2], max_tile):
            rows = picture[:, :, COMPRESSION * top : COMPRESSION * bottom]
            band = rows if picture.device == latent.device else torch.empty_like(rows, device=latent.device)
            self._decode_band(latent, top, bottom, max_tile, band)
            if out is not None:
                band.clamp_(0, 1)
            if band is not rows:
                _copy_planes(band, rows)
        if latent.is_cuda and picture.device != latent.device:
            torch.cuda.current_stream(latent.device).synchronize()
        return picture

    def _decode_band(self, latent: Tensor, top: int, bottom: int, max_tile: int, band: Tensor) -> None:
        """Decode the rows top to bottom of the latent into the picture's (B, 3, 4·(bottom - top), 4·W)."""
        y = max(0, top - self.halo)
        inner_rows = slice(COMPRESSION * (top - y), COMPRESSION * (bottom - y))
        for left, right in _spans(latent.shape[3], max_tile):
            x = max(0, left - self.halo)
            tile = self.decode(latent[:, :, y : bottom + self.halo, x : right + self.halo])
            inner = slice(COMPRESSION * (left - x), COMPRESSION * (right - x))
            band[..., COMPRESSION * left : COMPRESSION * right] = tile[:, :, inner_rows, inner]

    def forward(self, latent: Tensor) -> Tensor:
        return self.decode(latent)


def _spans(length: int, max_tile: int) -> list[tuple[int, int]]:
    """Even spans of at most `max_tile` that cover range(length)."""
    count = math.ceil(length / max_tile)
    edges = [round(i * length / count) for i in range(count + 1)]
    return list(zip(edges[:-1], edges[1:], strict=True))


def _copy_planes(source: Tensor, target: Tensor) -> None:
    """Copy (B, C, H, W) into rows of a picture on another device, plane by plane: each is one piece there."""
    for sample, wanted in zip(source, target, strict=True):
        for plane, place in zip(sample, wanted, strict=True):
            place.copy_(plane, non_blocking=plane.is_cuda)  # Apple's GPU would not be waited for
