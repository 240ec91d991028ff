"""Pictures that go out from a picture: image to image, a region made anew, image prompts, outpainting."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, random_pipeline
from PIL import Image
from torch import Tensor

from core.family.evaluation import held_out_cases, real_picture
from core.pictures.images import read_image_metadata, to_image
from core.pipeline.control import Source as ControlSource
from core.pipeline.control import hole_control, outpainted
from core.pipeline.going_on import go_on
from core.pipeline.origins import middle, origin
from core.pipeline.pipeline import UltraPixelPipeline
from core.pipeline.region import MARGIN, span_of
from core.pipeline.resolution import MIN_SIDE, latent_size
from modules.guidance import GuidanceFeatures

sys.path.insert(0, str(ROOT / "inference"))
import test_controlnet  # noqa: E402
import test_t2i  # noqa: E402

QUICK = {"steps": 2, "steps_b": 1, "progress": False}
SCENE = held_out_cases(1, 0)[0].scene


@pytest.fixture(scope="module")
def pipeline() -> UltraPixelPipeline:
    return UltraPixelPipeline.from_preset("tiny")


@pytest.fixture(scope="module")
def given() -> Image.Image:
    return to_image(real_picture(SCENE, (96, 128)))


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


# --- image to image -------------------------------------------------------------------------------


def test_more_of_a_picture_stays_with_less_strength(pipeline: UltraPixelPipeline, given: Image.Image) -> None:
    stages: list[str] = []

    def made(**named: object) -> Tensor:
        stages.clear()
        told = {**QUICK, "steps": 10, "observer": lambda progress: stages.append(progress.stage)}
        return pipeline("", 96, 128, seed=1, **told, **named)[0].pixels

    real = torch.from_numpy(levels(given)).permute(2, 0, 1) / 255
    little, much = (made(init_image=given, strength=strength) for strength in (0.1, 0.9))
    assert len(stages) == 9 + 9 + 1 + 1
    assert (little - real).abs().mean() < (much - real).abs().mean()
    assert torch.equal(made(init_image=given, strength=1.0), made())
    assert not torch.equal(made(init_image=given), made())


def test_the_middle_of_a_picture_is_what_counts() -> None:
    pixels = torch.arange(60 * 90).reshape(1, 60, 90)
    assert torch.equal(middle(pixels, (128, 128)), pixels[:, :, 15:75])
    assert torch.equal(middle(pixels, (64, 192)), pixels[:, 15:45])
    assert torch.equal(middle(pixels, (120, 180)), pixels)


# --- a region -------------------------------------------------------------------------------------


@pytest.mark.parametrize("region", [(40, 20, 50, 30), (0, 0, 20, 96), (120, 90, 8, 6), (0, 0, 128, 96)])
def test_outside_a_region_every_pixel_stays(
    pipeline: UltraPixelPipeline, given: Image.Image, region: tuple[int, int, int, int]
) -> None:
    (made,) = pipeline("a pink balloon", init_image=given, region=region, **QUICK)
    assert made.image.size == given.size and (made.job.height, made.job.width) == (96, 128)
    changed = (levels(made.image) != levels(given)).any(-1)
    x, y, width, height = region
    assert changed[y : y + height, x : x + width].any()
    changed[y : y + height, x : x + width] = False
    assert not changed.any()


def test_a_region_keeps_alpha_and_what_cannot_be_seen(
    pipeline: UltraPixelPipeline, given: Image.Image
) -> None:
    hidden = given.convert("RGBA")
    hidden.putalpha(Image.linear_gradient("L").resize(given.size))
    (made,) = pipeline("", init_image=hidden, region=(64, 48, 32, 32), **QUICK)
    before, after = levels(hidden), levels(made.image)
    assert np.array_equal(before[..., 3], after[..., 3])
    assert np.array_equal(before[:40], after[:40])


@pytest.mark.parametrize("unit", [1, 2, 4])
@pytest.mark.parametrize(("side", "cells"), [(512, 48), (129, 13), (64, 6), (4000, 94), (6144, 144)])
def test_a_part_is_of_whole_cells_around_its_region(unit: int, side: int, cells: int) -> None:
    for start, length in ((0, 1), (0, side), (side - 1, 1), (side // 2, 3), (side // 3, side // 2)):
        span = span_of(start, length, side, cells, unit)
        first, last = span.pixels(side, cells)
        assert span.first % unit == 0 and (span.last % unit == 0 or span.last == cells)
        assert 0 <= first <= start < start + length <= last <= side
        assert last - first >= MIN_SIDE
        assert span.first == 0 or span.region[0] - span.first >= MARGIN
        assert span.last == cells or span.last - span.region[1] >= MARGIN


def test_guidance_is_that_of_the_whole_picture(pipeline: UltraPixelPipeline) -> None:
    with pipeline.stage_c.on_device() as stage_c, pipeline.guidance.on_device() as guidance:
        whole = latent_size(256, 256, pipeline.config_c.geometry)
        features = [torch.randn(1, 192, *size) for size in stage_c.site_sizes((12, 12))]
        prepared = guidance.prepare(GuidanceFeatures(tuple(features)), stage_c.site_sizes(whole), 1.0)
        corner, size = (4, 8), (10, 12)
        cut = prepared.cut(stage_c.site_sizes(corner), stage_c.site_sizes(size))
        for site, part, (y, x) in zip(prepared.sites, cut.sites, stage_c.site_sizes(corner), strict=True):
            height, width = part.hidden.shape[1:3]
            assert torch.equal(part.hidden, site.hidden[:, y : y + height, x : x + width])
        assert [tuple(site.hidden.shape[1:3]) for site in cut.sites] == list(stage_c.site_sizes(size))


# --- image prompts --------------------------------------------------------------------------------


def test_image_prompts_add_up(pipeline: UltraPixelPipeline, given: Image.Image, tmp_path: Path) -> None:
    given.save(tmp_path / "a.png")
    place, other = str(tmp_path / "a.png"), given.rotate(180)

    def made(image_prompt: object) -> Tensor:
        return pipeline("", 64, 64, image_prompt=image_prompt, **QUICK)[0].pixels

    alone = made(given)
    assert torch.equal(made(place), alone) and torch.equal(made([place, (given, 1.0)]), alone)
    assert not torch.equal(made([given, other]), alone)
    assert torch.equal(made([f"{place}:0.5", (other, 0.25)]), made([(given, 0.5), (other, 0.25)]))
    assert torch.equal(made((given, 0.0)), made(None))


def test_what_was_no_file_is_not_forgotten_silently(pipeline: UltraPixelPipeline, given: Image.Image) -> None:
    made = [
        pipeline("a house", 64, 64, image_prompt=(given, 0.5), **QUICK)[0],
        pipeline("a house", 64, 64, init_image=given, **QUICK)[0],
        pipeline.upscale(given, factor=1, **QUICK)[0],
    ]
    for one in made:
        with pytest.raises(ValueError, match="was made with"):
            go_on(pipeline, one)
    prompts = made[0].record.metadata(made[0].job)["image_prompt"]
    with pytest.raises(ValueError, match="was no file"):
        pipeline("a house", 64, 64, image_prompt=prompts, **QUICK)


def test_an_image_prompt_needs_its_encoder(family_folder: Path, given: Image.Image, tmp_path: Path) -> None:
    other = random_pipeline(family_folder)
    other.image_encoder = str(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere: the image encoder cannot be found"):
        other("", 64, 64, image_prompt=given, **QUICK)
    other.image_encoder = "models/tiny/recogniser.safetensors"
    with pytest.raises(ValueError, match="is no image encoder"):
        other("", 64, 64, image_prompt=given, **QUICK)
    other.image_encoder = "models/tiny/image_encoder.safetensors"
    with pytest.raises(ValueError, match="gives 16 numbers, but this Stage C takes 32"):
        other("", 64, 64, image_prompt=given, **QUICK)


# --- what is wrong --------------------------------------------------------------------------------


def test_what_cannot_be(given: Image.Image) -> None:
    for strength in (0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="strength must be above 0 and at most 1"):
            origin(given, strength)
    for region in ((-1, 0, 8, 8), (0, 0, 0, 8), (100, 0, 29, 8), (0, 90, 8, 7)):
        with pytest.raises(ValueError, match="does not lie within the picture of 128 x 96"):
            origin(given, None, region)
    with pytest.raises(ValueError, match="weight of an image prompt must be from 0 to 1, not -1"):
        origin(image_prompt=(given, -1))
    with pytest.raises(ValueError, match="four numbers"):
        origin(given, None, (1, 2, 3))
    for named in ({"strength": 0.5}, {"region": (0, 0, 8, 8)}):
        with pytest.raises(ValueError, match="give that as init_image"):
            origin(**named)
    with pytest.raises(ValueError, match="at the picture's own size, 96 x 128"):
        origin(given, None, (0, 0, 8, 8)).size(128, None)
    with pytest.raises(ValueError, match="at least 16 a side"):
        origin(given.resize((15, 40)))
    assert origin() is None


# --- the scripts ----------------------------------------------------------------------------------


@pytest.fixture
def script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipeline: UltraPixelPipeline
) -> Callable[..., Path]:
    """Runs test_t2i in this process, with models that are loaded already; the picture's path."""
    monkeypatch.setattr(test_t2i, "make_pipeline", lambda _: pipeline)
    monkeypatch.setattr(pipeline, "origin", None)
    folder = tmp_path / "out"

    def call(*flags: object) -> Path:
        made = "--preset", "tiny", "--steps", "2", "--steps_b", "1", "--output_dir", folder
        before = {*folder.glob("*")}
        assert test_t2i.main([str(part) for part in (*made, *flags)]) == 0
        (path,) = {*folder.glob("*")} - before
        return path

    return call


def test_a_picture_remembers_what_it_went_out_from(
    script: Callable[..., Path], given: Image.Image, tmp_path: Path
) -> None:
    given.save(tmp_path / "a.png")
    region = "--region", 8, 8, 40, 40
    path = script("--prompt", "", "--init_image", tmp_path / "a.png", *region)
    assert Image.open(path).size == (128, 96)
    stored = read_image_metadata(path)
    assert (stored["strength"], stored["region"], stored["height"]) == (1.0, [8, 8, 40, 40], 96)
    assert np.array_equal(levels(Image.open(path))[48:], levels(given)[48:])  # outside the region
    again = script("--from_image", path)
    assert np.array_equal(levels(Image.open(again)), levels(Image.open(path)))

    prompts = "--image_prompt", tmp_path / "a.png", "--image_prompt", f"{tmp_path / 'a.png'}:0.5"
    path = script("--prompt", "a house", *prompts, "--height", 64, "--width", 64)
    again = script("--from_image", path)
    assert np.array_equal(levels(Image.open(again)), levels(Image.open(path)))
    assert read_image_metadata(path)["image_prompt"] == [str(tmp_path / "a.png"), f"{tmp_path / 'a.png'}:0.5"]


def test_outpainting_is_for_the_room_around_a_picture(given: Image.Image) -> None:
    source = outpainted(ControlSource(given), (10, 0, 20, 30))
    assert source.picture.size == (158, 126)
    assert np.array_equal(levels(source.picture.crop((10, 0, 138, 96))), levels(given))
    hole = levels(source.hole) > 0
    assert not hole[:96, 10:138].any() and hole.sum() == 158 * 126 - 128 * 96
    control = hole_control(source, (126, 158), UltraPixelPipeline.from_preset("tiny").config_c.geometry)
    kept = to_image(control.kept.around(torch.zeros(3, 126, 158)))
    assert np.array_equal(levels(kept.crop((10, 0, 138, 96))), levels(given))
    for sides in ((0, 0, 0, 0), (-1, 0, 0, 5), (1, 2, 3)):
        with pytest.raises(ValueError, match="outpainting needs four numbers"):
            outpainted(ControlSource(given), sides)
    flags = ["--prompt", "a", "--control_source", "a.png", "--outpaint", "1", "1", "1", "1"]
    with pytest.raises(ValueError, match="--outpaint is for inpainting, and canny was asked for"):
        test_controlnet.main(flags)
    with pytest.raises(ValueError, match="has 96 x 100000128 pixels .*: at most 16384 a side can be"):
        outpainted(ControlSource(given), (100_000_000, 0, 0, 0))
