"""Forward passes against diffusers' networks with the same weights: python benchmarks/against_diffusers.py

Prints seconds of ours and theirs (fastest of several runs in turn), their ratio and the outputs' distance.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from timing import compare

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from peers import paella_of, random_stage_a, random_stage_b, random_stage_c, unet_of


def stage_c(width: int, heads: int, blocks: tuple, side: int, runs: int) -> None:
    ours = random_stage_c(width, heads, blocks)
    theirs = unet_of(ours)
    x, r = torch.randn(2, 16, side, side), torch.full((2,), 0.5)
    text, pooled, image = torch.randn(2, 77, 48), torch.randn(2, 1, 48), torch.randn(2, 1, 32)
    name = f"Stage C, width {width}, latent {side} x {side}"
    print(compare(name, lambda: ours(x, r, text, pooled, image),
                  lambda: theirs(x, r, pooled, text, image).sample, runs), flush=True)  # fmt: skip


def stage_b(widths: tuple, side: int, runs: int) -> None:
    ours = random_stage_b(widths, ((1, 2, 2, 1), (1, 2, 2, 1)))
    theirs = unet_of(ours)
    x, r = torch.randn(2, 4, side, side), torch.full((2,), 0.5)
    effnet, pooled = torch.randn(2, 16, side // 10, side // 10), torch.randn(2, 1, 48)
    name = f"Stage B, widths {widths[0]} to {widths[-1]}, latent {side} x {side}"
    print(compare(name, lambda: ours(x, r, effnet, pooled),
                  lambda: theirs(x, r, pooled, effnet=effnet).sample, runs), flush=True)  # fmt: skip


def stage_a(width: int, blocks: int, side: int, runs: int) -> None:
    ours = random_stage_a(width, blocks)
    theirs = paella_of(ours)
    latent, image = torch.randn(1, 4, side, side), torch.rand(1, 3, 4 * side, 4 * side)
    print(compare(f"Stage A decode, width {width}, latent {side} x {side}", lambda: ours.decode(latent),
                  lambda: theirs.decode(latent * 0.43).sample, runs), flush=True)  # fmt: skip
    print(compare(f"Stage A encode, width {width}, {4 * side} x {4 * side} px", lambda: ours.encode(image),
                  lambda: theirs.encode(image).latents / 0.43, runs), flush=True)  # fmt: skip


@torch.no_grad()
def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.manual_seed(0)
    print(f"{'':<44}{'ours':>11}{'diffusers':>11}")
    stage_c(64, 4, ((2, 4), (4, 2)), 24, 15)
    stage_c(512, 16, ((1, 3), (3, 1)), 24, 5)
    stage_c(512, 16, ((1, 3), (3, 1)), 48, 3)
    stage_b((32, 64, 64, 64), 64, 15)
    stage_b((160, 320, 320, 320), 128, 5)
    stage_a(64, 4, 64, 15)
    stage_a(384, 12, 48, 5)


if __name__ == "__main__":
    main()
