"""Guidance prepared once against prepared at every step: python benchmarks/prepared_guidance.py

Prints seconds of a high-resolution pass, the ratio and the outputs' distance, at an eighth of the published
width, with few blocks, for latents 2 x 2 and 4 x 4 times the low-resolution one.
"""

from __future__ import annotations

import argparse

import torch
from timing import compare
from torch import Tensor, nn

from gdf.noise_conditions import cosine_t
from gdf.samplers import steps
from gdf.schedules import cosine
from modules.guidance import Guidance, GuidanceFeatures, PreparedGuidance
from modules.stage_c import StageC

WIDTH, TOKENS, STEPS = 256, 128, 4


def networks() -> tuple[StageC, Guidance]:
    sizes = dict(c_cond=WIDTH, c_hidden=(WIDTH, WIDTH), nhead=(8, 8), blocks=((1, 2), (2, 1)))
    stage_c = StageC(**sizes)
    guidance = Guidance(ind=WIDTH, ch=TOKENS, n_head=4, head_dim=32, n_groups=16, f_dim=TOKENS)
    guidance.init_weights()
    for parameter in stage_c.parameters():
        nn.init.normal_(parameter, std=0.02)
    return stage_c.eval(), guidance.eval()


@torch.no_grad()
def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.manual_seed(0)
    stage_c, guidance = networks()
    conditions = stage_c.prepare(torch.randn(2, 77, 1280), torch.randn(2, 1, 1280), torch.randn(2, 1, 768))
    features = GuidanceFeatures(tuple(torch.randn(1, WIDTH, 12, 12) for _ in range(4)))
    both = GuidanceFeatures(tuple(torch.cat([g, g]) for g in features.maps))
    times = steps(cosine, STEPS)

    def run(x: Tensor, prepared: PreparedGuidance | None) -> Tensor:
        for step in times:
            bound = prepared or guidance.prepare(both, stage_c.site_sizes((x.shape[-2], x.shape[-1])), 0.7)
            r = cosine_t(step.logsnr).expand(2)
            x = x - 0.1 * stage_c.predict(torch.cat([x, x]), r, conditions, guidance=bound)[:1]
        return x

    for side in (24, 48):
        x, sites = torch.randn(1, 16, side, side), stage_c.site_sizes((side, side))
        print(compare(f"prepared against every step, latent {side} x {side}",
                      lambda x=x, sites=sites: run(x, guidance.prepare(features, sites, 0.7)),
                      lambda x=x: run(x, None), runs=2), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
