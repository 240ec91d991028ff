"""Stage C without guidance, Stage B and Stage A agree with diffusers' networks on the same random weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peers import paella_of, random_stage_a, random_stage_b, random_stage_c, unet_of
from torch import Tensor

BOUND = 5e-6


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("size", [(24, 24), (7, 12)])
@torch.no_grad()
def test_stage_c(size: tuple[int, int]) -> None:
    ours = random_stage_c(c=64, heads=4, blocks=((2, 3), (3, 2)))
    x, r = torch.randn(2, 16, *size), torch.tensor([0.1, 0.9])
    text, pooled, image = torch.randn(2, 77, 48), torch.randn(2, 1, 48), torch.randn(2, 1, 32)
    theirs = unet_of(ours)
    assert relative_error(ours(x, r, text, pooled, image), theirs(x, r, pooled, text, image).sample) < BOUND
    one, sca, crp = [t[:1] for t in (x, r, text, pooled, image)], torch.tensor([0.3]), torch.tensor([0.7])
    x, r, text, pooled, image = one
    with_conditions = theirs(x, r, pooled, text, image, sca=sca, crp=crp).sample
    assert relative_error(ours(x, r, text, pooled, image, sca, crp), with_conditions) < BOUND


@pytest.mark.parametrize("size", [(32, 48), (34, 18)])
@torch.no_grad()
def test_stage_b(size: tuple[int, int]) -> None:
    ours = random_stage_b(widths=(32, 32, 64, 64), blocks=((1, 2, 2, 1), (1, 2, 2, 1)))
    x, r = torch.randn(2, 4, *size), torch.tensor([0.1, 0.9])
    effnet, pooled, pixels = torch.randn(2, 16, 3, 4), torch.randn(2, 1, 48), torch.randn(2, 3, 8, 8)
    theirs = unet_of(ours)
    assert relative_error(ours(x, r, effnet, pooled), theirs(x, r, pooled, effnet=effnet).sample) < BOUND
    with_pixels = theirs(x, r, pooled, effnet=effnet, pixels=pixels).sample
    assert relative_error(ours(x, r, effnet, pooled, pixels), with_pixels) < BOUND


@torch.no_grad()
def test_stage_a() -> None:
    ours = random_stage_a(c=32, blocks=3)
    theirs = paella_of(ours)
    image, latent = torch.rand(2, 3, 40, 24), torch.randn(2, 4, 10, 6)
    pairs: list[tuple[Callable[[], Tensor], Callable[[], Tensor]]] = [
        (lambda: ours.encode(image), lambda: theirs.encode(image).latents / 0.43),
        (lambda: ours.decode(latent), lambda: theirs.decode(latent * 0.43, force_not_quantize=True).sample),
        (
            lambda: ours.decode(ours.quantise(latent)),
            lambda: theirs.decode(latent * 0.43, force_not_quantize=False).sample,
        ),
    ]
    for mine, peer in pairs:
        assert relative_error(mine(), peer()) < BOUND
