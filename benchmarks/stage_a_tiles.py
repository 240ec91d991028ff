"""Tiled decoding of a 1024 x 1024 picture: python benchmarks/stage_a_tiles.py [WIDTH]

Compares exact tiles with the untiled decode, and with the rival that averages overlapping windows of 256
latent pixels at a stride of 24. WIDTH is Stage A's: 64 by default, 384 the published one, half an hour.
"""

from __future__ import annotations

import argparse

import torch
from timing import seconds
from torch import Tensor

from modules.stage_a import StageA

LATENT = 256  # a side; four times that in pixels
TILE = 128  # two by two tiles, so that the picture is tiled at all
WINDOW, STRIDE = 256, 24


def overlapping_windows(stage_a: StageA, latent: Tensor) -> Tensor:
    """The mean over windows at every stride, cut at the picture's edge."""
    height, width = latent.shape[-2:]
    total = latent.new_zeros(1, 3, 4 * height, 4 * width)
    count = torch.zeros_like(total)
    for y in range(0, height, STRIDE):
        for x in range(0, width, STRIDE):
            window = stage_a.decode(latent[:, :, y : y + WINDOW, x : x + WINDOW])
            place = (..., slice(4 * y, 4 * y + window.shape[-2]), slice(4 * x, 4 * x + window.shape[-1]))
            total[place] += window
            count[place] += 1
    return total / count


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "width", metavar="WIDTH", nargs="?", type=int, default=64, help="(default: %(default)s)"
    )
    width = parser.parse_args().width
    torch.manual_seed(0)
    stage_a = StageA(c_hidden=width).eval()
    for parameter in stage_a.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    latent = torch.randn(1, 4, LATENT, LATENT)
    whole, tiles = stage_a.decode(latent), stage_a.decode_tiled(latent, TILE)
    runs = [(seconds(lambda: stage_a.decode(latent)), seconds(lambda: stage_a.decode_tiled(latent, TILE)))
            for _ in range(3)]  # fmt: skip
    untiled, tiled = (min(times) for times in zip(*runs, strict=True))
    apart = float((tiles - whole).abs().max() / (whole.max() - whole.min()))
    print(f"untiled {untiled:.2f} s, tiled {tiled:.2f} s: ratio {tiled / untiled:.2f}, apart {apart:.1e}")
    windows = seconds(lambda: overlapping_windows(stage_a, latent))
    print(f"overlapping windows {windows:.2f} s: {windows / tiled:.1f} times the tiles")


if __name__ == "__main__":
    main()
