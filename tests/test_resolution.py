"""Sizes: against the reference table, and what every plan must fulfil."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.config.schema import LatentGeometry, StageCConfig
from core.pipeline.resolution import (
    MAX_SIDE,
    MIN_SIDE,
    guidance_strength,
    latent_size,
    lr_training_size,
    plan,
    plan_for,
)

CASES = json.loads((Path(__file__).parent / "reference" / "latent_sizes.json").read_text())
PUBLISHED = LatentGeometry()
SMALL = LatentGeometry(compression=10.67, stride=8, lr_cells=16, lr_train_cells=16)  # 128² guides 512²
sides = st.integers(MIN_SIDE, MAX_SIDE)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['height']}x{case['width']}")
def test_reference_sizes(case):
    sizes = plan(case["height"], case["width"], PUBLISHED)
    assert sizes.hr_latent == tuple(case["stage_c"])
    assert (sizes.lr_height, sizes.lr_width) == (case["lr_height"], case["lr_width"])
    assert sizes.lr_latent == tuple(case["lr_stage_c"])
    assert sizes.stage_b_latent == tuple(side + side % 2 for side in case["stage_b"])
    assert lr_training_size(case["height"], case["width"], PUBLISHED) == tuple(case["train_lr"])


def test_small_family_has_the_published_latents():
    sizes = plan(512, 512, SMALL)
    assert (sizes.lr_height, sizes.lr_width) == (128, 128)
    assert sizes.lr_latent == (12, 12)
    assert sizes.hr_latent == (48, 48)
    assert lr_training_size(512, 512, SMALL) == (128, 128)


@given(height=sides, width=sides)
def test_plan_covers_the_picture(height, width):
    sizes = plan(height, width, PUBLISHED)
    for asked, decoded, latent in (
        (height, sizes.decoded_height, sizes.stage_b_latent[0]),
        (width, sizes.decoded_width, sizes.stage_b_latent[1]),
    ):
        assert latent % 2 == 0 and decoded == 4 * latent
        assert asked <= decoded < asked + 8
    for asked, latent in zip((height, width), sizes.hr_latent, strict=True):
        assert (latent - 1) * 42.67 < asked <= latent * 42.67 + 1e-6
    assert sizes.lr_height % 32 == 0 and sizes.lr_width % 32 == 0
    assert 1 <= math.prod(sizes.lr_latent) <= 1024
    assert sizes.lr_height * sizes.lr_width <= 1024 * 1024


@given(height=sides, width=sides)
def test_plan_is_symmetric(height, width):
    one, other = plan(height, width, PUBLISHED), plan(width, height, PUBLISHED)
    assert one.hr_latent == other.hr_latent[::-1]
    assert one.stage_b_latent == other.stage_b_latent[::-1]


@pytest.mark.parametrize("side", [-1, 0, MIN_SIDE - 1, MAX_SIDE + 1])
def test_refused_sides_are_named_with_the_range(side):
    with pytest.raises(ValueError, match=f"height must be from 64 to 16384 pixels, not {side}"):
        plan(side, 1024, PUBLISHED)
    with pytest.raises(ValueError, match=f"width must be from 64 to 16384 pixels, not {side}"):
        plan(1024, side, PUBLISHED)


def test_too_many_tokens_for_the_guidance():
    with pytest.raises(ValueError, match="36 x 36, more than the 1024 pixels .* lr_cells below 48"):
        plan(2048, 2048, LatentGeometry(lr_cells=48))


def test_too_narrow_for_the_cells():
    assert plan(64, 8192, LatentGeometry(lr_cells=12)).lr_height == 32
    with pytest.raises(ValueError, match="64 x 16384 .* too narrow: .* 144 times"):
        plan(64, 16384, LatentGeometry(lr_cells=12))


def test_a_stage_c_that_halves_its_latents_needs_two_pixels_a_side():
    tiny = StageCConfig("tiny", "", geometry=LatentGeometry(10.67, 8, 16, 12))
    assert plan_for(tiny, 64, 4096) == plan(64, 4096, tiny.geometry)
    for size in ((64, 6144), (100, 16384)):
        with pytest.raises(ValueError, match="too narrow for this Stage C.* be 1 x "):
            plan_for(tiny, *size)
    assert plan_for(StageCConfig("3.6B", ""), 64, 16384).lr_latent[0] == 2


def test_latent_size_rounds_up():
    assert latent_size(1024, 1025, PUBLISHED) == (24, 25)


@pytest.mark.parametrize(
    "latent, strength",
    [((96, 96), 0.7), ((95, 97), 0.5), ((72, 72), 0.5), ((71, 73), 0.3), ((48, 48), 0.3), ((1, 9216), 0.7)],
)
def test_guidance_strength_starts_at_its_threshold(latent, strength):
    table = StageCConfig(model_version="3.6B", generator_checkpoint_path="").guidance_strength
    assert guidance_strength(latent, table) == strength
