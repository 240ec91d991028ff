"""The guidance's training step against a plain float64 rewrite, finite differences and its own promises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass, replace

import plain_guidance as plain
import pytest
import torch
from peers import random_stage_c, randomised
from torch import Tensor
from torch.nn import functional as F

from core.config.schema import LatentGeometry
from core.pipeline.conditioning import Conditions
from core.training.encoders import at_low_resolution, encode_latent
from core.training.guidance import (
    GuidedStageC,
    SampleNoise,
    draw_noise,
    drop_conditions,
    noise_latents,
)
from gdf.targets import EPSILON, target_named
from modules.effnet import IMAGENET_MEAN, IMAGENET_STD
from modules.guidance import Guidance

BATCH = 3
SIZES = plain.Sizes(blocks=((1, 2), (2, 1)), heads=4, guidance_heads=2)
TIMES = torch.tensor([0.02, 0.6, 1.0])  # at 1 the schedule is clamped
TOLERANCE = 1e-4  # relative to a tensor's norm: the networks run in float32, the rewrite in float64


@dataclass(frozen=True)
class Case:
    """A network, a batch and the loss weights of its samples, float32."""

    module: GuidedStageC
    z: Tensor
    z_lr: Tensor
    noise: SampleNoise
    conditions: Conditions
    weight: Tensor

    def loss(self) -> Tensor:
        """What the project makes of it."""
        latents = noise_latents(self.z, self.z_lr, self.noise, EPSILON)
        prediction = self.module(latents, self.conditions)
        return (self.weight * (prediction - latents.target).square().flatten(1).mean(1)).mean()

    def plain_loss(self, added: plain.Weights) -> Tensor:
        """What the rewrite makes of it, with these weights of the guidance."""
        base = float64(self.module.stage_c.state_dict())
        return plain.guided_loss(base, added, SIZES, self.batch(), self.weight.double())

    def batch(self) -> plain.Batch:
        noise, held = self.noise, self.conditions
        wide = (v.double() for v in (self.z, self.z_lr, noise.epsilon, noise.epsilon_lr))
        return plain.Batch(*wide, noise.t, *(v.double() for v in astuple(held)))


def float64(weights: plain.Weights) -> dict[str, Tensor]:
    return {name: value.detach().double() for name, value in weights.items()}


def random_guidance() -> Guidance:
    return randomised(Guidance(ind=32, ch=16, n_head=2, head_dim=8, n_groups=4, f_dim=16), 0.3)


def random_conditions(batch: int) -> Conditions:
    return Conditions(torch.randn(batch, 9, 48), torch.randn(batch, 1, 48), torch.randn(batch, 1, 32))


def make_case(size: tuple[int, int]) -> Case:
    torch.manual_seed(0)
    base = randomised(random_stage_c(c=32, heads=SIZES.heads, blocks=SIZES.blocks), 0.15)
    z, z_lr = torch.randn(BATCH, 16, *size), torch.randn(BATCH, 16, 3, 4)
    noise = draw_noise([(7, 0, i) for i in range(BATCH)], z.shape[1:], z_lr.shape[1:])
    return Case(
        module=GuidedStageC(base, random_guidance()).train(),
        z=z,
        z_lr=z_lr,
        noise=replace(noise, t=TIMES),
        conditions=random_conditions(BATCH),
        weight=torch.tensor([0.3, 1.0, 2.5]),
    )


@pytest.fixture(scope="module", params=[(6, 8), (5, 7)], ids=["6x8", "5x7"])
def case(request: pytest.FixtureRequest) -> Case:
    """With its gradients computed."""
    case = make_case(request.param)
    case.loss().backward()
    return case


def relative_error(ours: Tensor, expected: Tensor) -> float:
    return float((ours.detach().double() - expected).norm() / expected.norm())


# --- against the rewrite --------------------------------------------------------------------------


def test_loss_and_every_gradient_agree_with_the_rewrite(case: Case) -> None:
    added = {k: v.requires_grad_() for k, v in float64(case.module.guidance.state_dict()).items()}
    expected = case.plain_loss(added)
    expected.backward()
    assert relative_error(case.loss(), expected.detach()) < TOLERANCE
    ours = {name: p.grad for name, p in case.module.guidance.named_parameters()}
    assert ours.keys() == added.keys() and all(value.grad.norm() > 0 for value in added.values())
    errors = {name: relative_error(gradient, added[name].grad) for name, gradient in ours.items()}
    assert max(errors.values()) < TOLERANCE, max(errors.items(), key=lambda item: item[1])


DIFFERENTIATED = (
    "down.0.input_layer.weight",
    "down.0.tokenizer.posemb",
    "down.0.wtokens",
    "down.1.base_params.wb0",
    "down.1.hr_norm.mapping.mapper.weight",
    "up.0.transformer_encoder.layers.0.0.fn.to_kv.1.weight",
    "up.0.base_params.wb1",
    "up.0.mapp_t.mapper.weight",
    "up.1.wtoken_postfc.wb0.0.weight",
    "up.1.toout.0.weight",
)


@torch.no_grad()
def test_gradients_agree_with_finite_differences_of_the_rewrite() -> None:
    case, step = make_case((6, 8)), 1e-5
    with torch.enable_grad():
        case.loss().backward()
    gradients = {name: p.grad for name, p in case.module.guidance.named_parameters()}
    for name in DIFFERENTIATED:
        gradient = gradients[name].flatten()
        for entry in gradient.abs().topk(2).indices.tolist():
            around = []
            for offset in (-step, step):
                added = float64(case.module.guidance.state_dict())
                added[name].view(-1)[entry] += offset
                around.append(case.plain_loss(added))
            slope = float(around[1] - around[0]) / (2 * step)
            assert float(gradient[entry]) == pytest.approx(slope, rel=1e-3), name


def test_one_block_agrees_with_the_rewrite_in_float64() -> None:
    torch.manual_seed(1)
    block, r = random_guidance().up[1].double(), torch.tensor([0.05, 0.8])
    x, g, direction = torch.randn(2, 5, 7, 32), torch.randn(2, 3, 4, 32), torch.randn(2, 5, 7, 32)
    x, g, direction = (v.double().requires_grad_() for v in (x, g, direction))
    nchw = (v.permute(0, 3, 1, 2) for v in (x, g))
    ours = block(*nchw, plain.timestep_embedding(r)).permute(0, 2, 3, 1)
    expected = plain.guidance(dict(block.named_parameters()), x, g, r, SIZES.guidance_heads)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    inputs = (x, g, *block.parameters())
    gradients = (torch.autograd.grad((y * direction).sum(), inputs) for y in (ours, expected))
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("kind", ["epsilon", "x0", "v", "rectified_flow"])
def test_noisy_latents_agree_with_the_rewrite(kind: str) -> None:
    case = make_case((6, 8))
    batch = case.batch()
    ours = noise_latents(case.z, case.z_lr, case.noise, target_named(kind))
    x, r = plain.noisy(batch.z, batch.epsilon, batch.t)
    x_lr, r_lr = plain.noisy(batch.z_lr, batch.epsilon_lr, torch.full((BATCH,), 0.05))
    expected = {"x": x, "x_lr": x_lr, "target": plain.target(kind, batch.z, batch.epsilon, batch.t)}
    for name, value in expected.items():
        torch.testing.assert_close(getattr(ours, name).double(), value, rtol=1e-6, atol=1e-6)
    assert torch.equal(ours.r, r) and torch.equal(ours.r_lr, r_lr)  # the networks see 10000 r
    assert torch.equal(ours.logsnr, plain.cosine_logsnr(batch.t))
    assert ours.r_lr.tolist() == pytest.approx([0.05] * BATCH, abs=1e-5)


# --- the frozen base ------------------------------------------------------------------------------


def test_nothing_of_stage_c_is_trained(case: Case) -> None:
    base = list(case.module.stage_c.parameters())
    assert all(p.grad is None and not p.requires_grad for p in base)
    trained = [*case.module.parameters()]
    assert {id(p) for p in trained} == {id(p) for p in case.module.guidance.parameters()}
    assert all(p.requires_grad for p in trained)
    assert all(name.startswith("guidance.") for name in case.module.state_dict())


def test_training_mode_leaves_stage_c_without_dropout(case: Case) -> None:
    case.module.train()
    assert not any(part.training for part in case.module.stage_c.modules())
    assert torch.equal(case.loss(), case.loss())


def test_a_sample_is_predicted_alone_as_in_its_batch(case: Case) -> None:
    latents = noise_latents(case.z, case.z_lr, case.noise, EPSILON)
    alone = replace(latents, **{name: value[1:2] for name, value in vars(latents).items()})
    with torch.no_grad():
        together = case.module(latents, case.conditions)[1:2]
        single = case.module(alone, Conditions(*(v[1:2] for v in astuple(case.conditions))))
    torch.testing.assert_close(single, together, rtol=1e-4, atol=1e-5)


# --- random numbers -------------------------------------------------------------------------------


def test_a_samples_numbers_do_not_depend_on_its_batch_mates() -> None:
    keys, size, size_lr = [(3, update, i) for update in range(2) for i in range(4)], (16, 6, 8), (16, 3, 4)
    together = draw_noise(keys, size, size_lr)
    backwards = draw_noise(keys[::-1], size, size_lr)
    for i, key in enumerate(keys):
        alone = draw_noise([key], size, size_lr)
        for name, values in vars(together).items():
            assert torch.equal(getattr(alone, name)[0], values[i])
            assert torch.equal(getattr(backwards, name)[-1 - i], values[i])
    assert len(set(together.t.tolist())) == len(keys)
    assert len(set(together.epsilon[:, 0, 0, 0].tolist())) == len(keys)


def test_random_numbers_have_their_distributions() -> None:
    noise = draw_noise([(0, i // 4, i % 4) for i in range(4000)], (2, 1, 2), (1, 1, 2))
    assert noise.t.min() >= 0.001 and noise.t.max() <= 1
    quartiles = noise.t.quantile(torch.tensor([0.25, 0.5, 0.75]))
    torch.testing.assert_close(quartiles, torch.tensor([0.25, 0.5, 0.75]), rtol=0, atol=0.03)
    assert noise.drop_text.float().mean() == pytest.approx(0.05, abs=0.012)
    half = draw_noise([(0, 0, i) for i in range(1000)], (1, 1, 1), text_dropout=0.5)
    assert half.drop_text.float().mean() == pytest.approx(0.5, abs=0.06)
    assert noise.use_image.float().mean() == pytest.approx(0.1, abs=0.016)
    numbers = torch.cat([noise.epsilon.flatten(1), noise.epsilon_lr.flatten(1)], dim=1)
    torch.testing.assert_close(torch.cov(numbers.T), torch.eye(6), rtol=0, atol=0.1)
    columns = [noise.t, noise.drop_text, noise.use_image, *numbers.T]
    correlations = torch.corrcoef(torch.stack([column.float() for column in columns]))
    assert (correlations - torch.eye(len(columns))).abs().max() < 0.08


# --- conditions and latents -----------------------------------------------------------------------


def test_dropping_replaces_tokens_and_pooled_text_together() -> None:
    torch.manual_seed(2)
    full, empty = random_conditions(4), random_conditions(1)
    drop, use = torch.tensor([True, False, True, False]), torch.tensor([True, True, False, False])
    noise = replace(draw_noise([(0, 0, i) for i in range(4)], (1, 1, 1), (1, 1, 1)), drop_text=drop)
    held = drop_conditions(full, empty, replace(noise, use_image=use))
    for i in range(4):
        text = (empty.clip_text[0], empty.clip_text_pooled[0]) if drop[i] else None
        tokens, pooled = text or (full.clip_text[i], full.clip_text_pooled[i])
        assert torch.equal(held.clip_text[i], tokens) and torch.equal(held.clip_text_pooled[i], pooled)
        image = full.clip_img[i] if use[i] else torch.zeros_like(full.clip_img[i])
        assert torch.equal(held.clip_img[i], image)


def averaging(stride: int) -> Callable[[Tensor], Tensor]:
    """A stand-in for the encoder: the mean of each cell, in another number format than float32."""
    return lambda image: F.avg_pool2d(image.double(), stride)


def encode_both(stride: int, picture: Tensor, geometry: LatentGeometry) -> tuple[Tensor, Tensor]:
    encoder = averaging(stride)
    return encode_latent(encoder, picture), encode_latent(encoder, at_low_resolution(picture, geometry))


@pytest.mark.parametrize(
    ("height", "width", "latent", "latent_lr"),
    [
        (1024, 1024, (32, 32), (24, 24)),
        (768, 1344, (24, 42), (18, 31)),
        (1536, 640, (48, 20), (37, 15)),
        (512, 512, (16, 16), (24, 24)),
    ],
)
def test_latents_have_the_sizes_of_the_picture_and_of_its_copy(
    height: int, width: int, latent: tuple[int, int], latent_lr: tuple[int, int]
) -> None:
    geometry = LatentGeometry()
    z, z_lr = encode_both(geometry.stride, torch.rand(1, 3, height, width), geometry)
    assert z.shape == (1, 3, *latent) and z_lr.shape == (1, 3, *latent_lr)
    assert z.dtype == z_lr.dtype == torch.float32


def test_both_latents_show_the_normalised_picture() -> None:
    geometry = LatentGeometry(stride=4, lr_train_cells=6)
    rows, columns = torch.linspace(0, 1, 40), torch.linspace(0, 1, 80)
    picture = torch.stack([rows[:, None].expand(40, 80), columns.expand(40, 80), torch.full((40, 80), 0.5)])
    picture = picture[None].requires_grad_()
    mean, std = (torch.tensor(v)[None, :, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    for latent, size in zip(encode_both(4, picture, geometry), [(10, 20), (4, 8)], strict=True):
        expected = F.interpolate(picture.detach(), size=size, mode="area")
        torch.testing.assert_close(latent * std + mean, expected, rtol=0, atol=0.02)
        assert not latent.requires_grad
