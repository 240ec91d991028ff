"""What holds of the networks beyond the reference numbers: preparation, tiling, control, LoRA, gradients."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import random_stage_a, random_stage_b, random_stage_c, randomised
from torch import Tensor

from core.config.sizes import GuidanceSizes
from modules.blocks import GlobalResponseNorm
from modules.controlnet import ControlNet
from modules.guidance import Guidance, GuidanceFeatures, ScaleAwareNorm, coordinate_encoding, scale_of
from modules.lora import LoraUpdate, MergedLora
from modules.stage_a import StageA, VectorQuantizer
from modules.stage_c import StageC


def text_inputs(batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(batch, 9, 48), torch.randn(batch, 1, 48), torch.randn(batch, 1, 32)


@pytest.fixture
def stage_c() -> StageC:
    torch.manual_seed(0)
    return random_stage_c(c=32, heads=4, blocks=((1, 2), (2, 1)))


@pytest.fixture
def guidance() -> Guidance:
    torch.manual_seed(1)
    return randomised(Guidance(ind=32, ch=16, n_head=2, head_dim=8, n_groups=4, f_dim=16), 0.3)


# --- guidance -------------------------------------------------------------------------------------


@torch.no_grad()
def test_prepared_guidance_equals_the_plain_formula(guidance: Guidance) -> None:
    block = guidance.down[0]
    x, g, r_embed = torch.randn(2, 32, 10, 12), torch.randn(2, 32, 4, 5), torch.randn(2, 64)
    site = block.prepare(g, (10, 12))
    u = block.upsample(g, (10, 12)).permute(0, 2, 3, 1)
    y = block.toout(torch.cat([u, x.permute(0, 2, 3, 1)], dim=-1)).permute(0, 3, 1, 2)
    plain = block.hr_norm(block.norm(block.mapp_t(y, r_embed)))
    torch.testing.assert_close(block.fuse(x, r_embed, site), plain, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_one_preparation_serves_every_step_and_both_halves(stage_c: StageC, guidance: Guidance) -> None:
    inputs = text_inputs()
    _, features = stage_c.forward_lr(torch.randn(1, 16, 4, 5), torch.tensor([0.05]), *inputs)
    bound = guidance.prepare(features, stage_c.site_sizes((9, 8)), 0.5)
    x = torch.randn(1, 16, 9, 8)
    for r in (0.9, 0.2):
        single = stage_c(x, torch.tensor([r]), *inputs, guidance=bound)
        doubled = [torch.cat([t, t]) for t in inputs]
        double = stage_c(torch.cat([x, x]), torch.tensor([r, r]), *doubled, guidance=bound)
        torch.testing.assert_close(double, torch.cat([single, single]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("pictures", [1, 2])
def test_the_second_half_gets_a_share_of_what_is_added(guidance: Guidance, pictures: int) -> None:
    features = GuidanceFeatures(tuple(torch.randn(pictures, 32, 3, 4) for _ in range(4)))
    bound = guidance.prepare(features, [(6, 8)] * 4, 0.5)
    x, r_embed = torch.randn(2 * pictures, 32, 6, 8), torch.randn(2 * pictures, 64)
    first, second, every = slice(pictures), slice(pictures, None), slice(None)
    for share in (1.0, 0.0, -2.0):
        both = bound.for_both_halves(share)
        for site in range(4):
            alone = [bound.fuse(site, x[half], r_embed[half]) - x[half] for half in (first, second)]
            wanted = x + torch.cat([alone[0], share * alone[1]])
            torch.testing.assert_close(both.fuse(site, x, r_embed), wanted, atol=1e-5, rtol=1e-5)
            for half in (first, second):
                part = both.part(half, every).fuse(site, x[half], r_embed[half])
                torch.testing.assert_close(part, wanted[half], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_strength_zero_everywhere_is_no_guidance(stage_c: StageC, guidance: Guidance) -> None:
    inputs = text_inputs()
    x, r = torch.randn(1, 16, 6, 6), torch.tensor([0.5])
    _, features = stage_c.forward_lr(torch.randn(1, 16, 3, 3), torch.tensor([0.05]), *inputs)
    bound = guidance.prepare(features, stage_c.site_sizes((6, 6)), 0.0)
    silent = type(bound)(bound.blocks, bound.sites, (0.0,) * 4)
    torch.testing.assert_close(stage_c(x, r, *inputs, guidance=silent), stage_c(x, r, *inputs))
    assert not torch.allclose(stage_c(x, r, *inputs, guidance=bound), stage_c(x, r, *inputs))


@torch.no_grad()
def test_scales_between_known_sides_are_interpolated() -> None:
    norm = ScaleAwareNorm(8)
    torch.nn.init.normal_(norm.mapping.mapper.weight)
    plain = {size: norm.affine(*size) for size in ((12, 12), (24, 24), (48, 48), (96, 96))}
    own = norm.affine(30, 40)
    norm.sides = (24, 48)
    assert all(torch.equal(a, b) for a, b in zip(norm.affine(24, 24), plain[24, 24], strict=True))
    for size, nearest in (((12, 12), 24), ((48, 48), 48), ((96, 96), 48), ((32, 72), 48)):
        for found, known in zip(norm.affine(*size), plain[nearest, nearest], strict=True):
            torch.testing.assert_close(found, known, rtol=1e-5, atol=1e-5)
    scale, shift = norm.affine(30, 40)
    low, high = plain[24, 24], plain[48, 48]
    shares = torch.cat([(scale - low[0]) / (high[0] - low[0]), (shift - low[1]) / (high[1] - low[1])])
    wanted = (scale_of(30, 40) - scale_of(24, 24)) / (scale_of(48, 48) - scale_of(24, 24))
    assert 0.1 < wanted < 0.9
    torch.testing.assert_close(shares, torch.full_like(shares, wanted), rtol=1e-3, atol=1e-3)
    assert not scale.allclose(own[0], atol=1e-2)


@pytest.mark.parametrize("sides", [(0, 12), (24, 12), (12, 12)])
def test_sides_that_do_not_increase_are_named(sides: tuple[int, ...]) -> None:
    sizes = GuidanceSizes(ind=32, ch=16, n_head=2, head_dim=8, n_groups=4, f_dim=16, scale_sides=sides)
    with pytest.raises(ValueError, match="scale_sides"):
        Guidance(**asdict(sizes))


def test_too_many_guiding_tokens_are_refused(guidance: Guidance) -> None:
    with pytest.raises(ValueError, match="40×30"):
        guidance.down[0].prepare(torch.zeros(1, 32, 40, 30), (80, 60))


def test_the_coordinate_encoding_is_symmetric_about_the_centre() -> None:
    encoding = coordinate_encoding(6, 4)
    assert encoding.shape == (6, 4, 256)
    cosines, sines = encoding.chunk(2, dim=-1)
    torch.testing.assert_close(cosines, cosines.flip(0, 1), atol=2e-3, rtol=0)
    torch.testing.assert_close(sines, -sines.flip(0, 1), atol=2e-3, rtol=0)


# --- Stage A --------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(height=st.integers(1, 41), width=st.integers(1, 41), tile=st.integers(3, 24))
@torch.no_grad()
def test_tiles_decode_like_the_whole(height: int, width: int, tile: int) -> None:
    torch.manual_seed(height * 100 + width)
    stage_a = random_stage_a(c=16, blocks=3)
    latent = torch.randn(1, 4, height, width)
    whole = stage_a.decode(latent)
    worst = float((stage_a.decode_tiled(latent, tile) - whole).abs().max())
    assert worst <= 1e-4 * float(whole.max() - whole.min())


@torch.no_grad()
def test_tiles_go_straight_into_memory_for_the_picture() -> None:
    torch.manual_seed(0)
    stage_a, latent = random_stage_a(8, 2), 3 * torch.randn(1, 4, 9, 14)
    memory = torch.empty(stage_a.picture_shape(latent))
    assert stage_a.decode_tiled(latent, 5, memory) is memory
    torch.testing.assert_close(memory, stage_a.decode(latent).clamp(0, 1), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_what_depends_on_time_alone_is_computed_once_for_a_pass(stage_c: StageC) -> None:
    inputs, r = text_inputs(2), torch.tensor([0.9, 0.2])
    held, times = stage_c.prepare(*inputs), stage_c.pass_times(r)
    mappers = [block.mapper for level in stage_c.down_blocks for block in level if hasattr(block, "mapper")]
    calls: list[int] = []
    for mapper in mappers:
        mapper.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 16, 5, 4)
    found = [stage_c.predict(x, times.at(i), held) for i in range(2)]
    assert mappers and not calls
    for one, value in zip(found, r, strict=True):
        torch.testing.assert_close(one, stage_c.predict(x, value.expand(2), held), rtol=1e-5, atol=1e-5)


def decoded_pixels(stage_a: StageA, latent: Tensor, max_tile: int) -> int:
    """Latent pixels that pass through the decoder."""
    counted: list[int] = []
    handle = stage_a.up_blocks.register_forward_pre_hook(lambda _, x: counted.append(x[0][0, 0].numel()))
    stage_a.decode_tiled(latent, max_tile)
    handle.remove()
    return sum(counted)


@pytest.mark.parametrize("size", [(1024, 1024), (540, 960), (257, 257), (1536, 1536)])
def test_tiling_costs_little_more_than_the_whole(size: tuple[int, int]) -> None:
    with torch.device("meta"):
        stage_a = StageA()
    work = decoded_pixels(stage_a, torch.empty(1, 4, *size, device="meta"), 256)
    assert work <= 1.35 * size[0] * size[1]


def test_the_quantiser_takes_the_nearest_entry_and_passes_gradients() -> None:
    torch.manual_seed(0)
    quantiser = VectorQuantizer(7, 4)
    latent = torch.randn(2, 4, 3, 5, requires_grad=True)
    quantised, indices, squared = quantiser(latent)
    entries = quantiser.codebook.weight.detach()
    nearest = (latent.detach().permute(0, 2, 3, 1)[..., None, :] - entries).square().sum(-1)
    assert torch.equal(indices, nearest.argmin(-1))
    torch.testing.assert_close(squared, nearest.min(-1).values)
    quantised.sum().backward()
    assert torch.equal(latent.grad, torch.ones_like(latent))


# --- control, LoRA, blocks ------------------------------------------------------------------------


@torch.no_grad()
def test_a_new_controlnet_changes_nothing_and_a_trained_one_does(stage_c: StageC) -> None:
    torch.manual_seed(2)
    controlnet = ControlNet(c_in=3, c_proj=32, proj_blocks=(0, 3, 5), bottleneck_mode="simple")
    x, r, inputs = torch.randn(1, 16, 6, 6), torch.tensor([0.5]), text_inputs()
    plain = stage_c(x, r, *inputs)
    picture = torch.rand(1, 3, 4, 4)
    assert not torch.equal(stage_c(x, r, *inputs, control=controlnet(picture)), plain)
    controlnet.init_weights()
    assert torch.equal(stage_c(x, r, *inputs, control=controlnet(picture)), plain)


def test_an_unknown_backbone_is_named() -> None:
    with pytest.raises(ValueError, match="'resnet'.*simple, large, effnet"):
        ControlNet(bottleneck_mode="resnet")


def lora_update(shape: tuple[int, ...], rank: int = 3) -> LoraUpdate:
    return LoraUpdate(torch.randn(rank, shape[1]), torch.randn(shape[0], rank), alpha=2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_lora_merges_and_is_undone_exactly(stage_c: StageC, dtype: torch.dtype) -> None:
    stage_c.to(dtype)
    before = {name: p.clone() for name, p in stage_c.named_parameters()}
    name = "down_blocks.0.2.attention.attn.in_proj_weight"
    update = lora_update((96, 32))
    merged = MergedLora(stage_c, {name: update, "embedding.1.weight": lora_update((32, 16))}, weight=0.5)
    expected = before[name].float() + 0.5 * (update.up @ update.down) * 2 / 3
    torch.testing.assert_close(stage_c.get_parameter(name), expected.to(dtype))
    merged.undo()
    assert all(torch.equal(p, before[n]) for n, p in stage_c.named_parameters())


def test_lora_of_another_model_is_refused_and_changes_nothing(stage_c: StageC) -> None:
    good, bad = (
        "down_blocks.0.2.attention.attn.in_proj_weight",
        "down_blocks.0.2.attention.attn.out_proj.weight",
    )
    before = stage_c.get_parameter(good).clone()
    with pytest.raises(ValueError, match="another model size"):
        MergedLora(stage_c, {good: lora_update((96, 32)), bad: lora_update((64, 64))})
    with pytest.raises(ValueError, match="does not have"):
        MergedLora(stage_c, {good: lora_update((96, 32)), "down_blocks.9.weight": lora_update((4, 4))})
    assert torch.equal(stage_c.get_parameter(good), before)


def test_global_response_norm_has_a_finite_gradient_at_zero() -> None:
    norm = GlobalResponseNorm(4)
    x = torch.zeros(1, 2, 2, 4, requires_grad=True)
    norm(x).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in norm.parameters())


@torch.no_grad()
def test_half_precision_stays_close() -> None:
    torch.manual_seed(0)
    stage_b = random_stage_b((32, 32, 64, 64), ((1, 1, 1, 1), (1, 1, 1, 1)))
    x, r = torch.randn(1, 4, 16, 16), torch.tensor([0.5])
    effnet, clip = torch.randn(1, 16, 3, 3), torch.randn(1, 1, 48)
    full = stage_b(x, r, effnet, clip)
    low = stage_b.to(torch.bfloat16)(x.bfloat16(), r, effnet.bfloat16(), clip.bfloat16())
    assert low.dtype == torch.bfloat16
    assert float((low.float() - full).norm() / full.norm()) < 0.05


def test_odd_stage_b_latents_are_refused() -> None:
    stage_b = random_stage_b((32, 32, 64, 64), ((1, 1, 1, 1), (1, 1, 1, 1)))
    with pytest.raises(ValueError, match="divide by 2"):
        stage_b(torch.zeros(1, 4, 15, 16), torch.zeros(1), torch.zeros(1, 16, 2, 2), torch.zeros(1, 1, 48))


@pytest.mark.parametrize("build", ["c", "b"])
def test_initial_weights_predict_zero_and_learn(build: str) -> None:
    torch.manual_seed(0)
    if build == "c":
        network = random_stage_c(c=32, heads=4, blocks=((1, 1), (1, 1)))
        arguments = (torch.randn(1, 16, 4, 4), torch.tensor([0.5]), *text_inputs())
    else:
        network = random_stage_b((32, 32, 32, 32), ((1, 1, 1, 1), (1, 1, 1, 1)))
        arguments = (
            torch.randn(1, 4, 16, 16),
            torch.tensor([0.5]),
            torch.randn(1, 16, 2, 2),
            torch.randn(1, 1, 48),
        )
    network.clf[1].bias.data.zero_()
    network.init_weights()
    prediction = network(*arguments)
    assert not prediction.any()
    prediction.sub(1).square().mean().backward()
    assert network.clf[1].weight.grad.abs().sum() > 0


def test_gradient_checkpointing_keeps_outputs_and_gradients(stage_c: StageC, guidance: Guidance) -> None:
    inputs, x, r = text_inputs(), torch.randn(1, 16, 6, 6), torch.tensor([0.5])
    with torch.no_grad():
        _, features = stage_c.forward_lr(torch.randn(1, 16, 3, 3), torch.tensor([0.05]), *inputs)
    gradients = []
    for checkpointing in (False, True):
        stage_c.gradient_checkpointing = checkpointing
        guidance.zero_grad()
        stage_c(
            x, r, *inputs, guidance=guidance.prepare(features, stage_c.site_sizes((6, 6)))
        ).square().mean().backward()
        gradients.append([p.grad.clone() for p in guidance.parameters()])
    assert all(torch.equal(kept, again) for kept, again in zip(*gradients, strict=True))


@torch.no_grad()
def test_float64_runs_and_agrees(stage_c: StageC) -> None:
    inputs, x, r = text_inputs(), torch.randn(1, 16, 6, 6), torch.tensor([0.5])
    single = stage_c(x, r, *inputs)
    double = stage_c.double()(x.double(), r, *(t.double() for t in inputs))
    torch.testing.assert_close(double.float(), single, rtol=1e-4, atol=1e-5)
