"""Existing pictures made large: inference/upscale.py and `UltraPixelPipeline.upscale`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import ExifTags, Image

from core.config.settings import Settings
from core.pictures.images import read_image_metadata
from core.pictures.profiles import srgb_profile
from core.pipeline.pipeline import UltraPixelPipeline
from core.pipeline.upscaling import Upscaling, with_colours_of

sys.path.insert(0, str(ROOT / "inference"))
import upscale  # noqa: E402

QUICK = {"steps": 2, "steps_b": 1}
SMALL = Image.new("RGB", (64, 48), (200, 40, 40))
SMALL.paste((30, 60, 200), (0, 0, 64, 24))


@pytest.fixture(scope="module")
def pipeline() -> UltraPixelPipeline:
    return UltraPixelPipeline.from_preset("tiny")


@pytest.fixture
def script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipeline: UltraPixelPipeline
) -> Callable[..., int]:
    """Runs the script in this process, with models that are loaded already."""
    monkeypatch.setattr("core.commands.upscaling.make_pipeline", lambda _: pipeline)

    def call(place: Path, *flags: object) -> int:
        made = "--preset", "tiny", "--steps", "1", "--steps_b", "1", "--output_dir", tmp_path / "out"
        return upscale.main([str(part) for part in (place, *made, *flags)])

    return call


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# --- the script -----------------------------------------------------------------------------------


def test_a_folder_becomes_a_folder(
    script: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "in"
    (place / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/b.jpg", "twin.png", "twin.bmp", ".hidden.png"):
        SMALL.save(place / name)
    (place / "a.txt").write_text("a red\nhouse\n", "utf-8")
    (place / "broken.png").write_text("nothing")
    content = (place / "a.png").read_bytes()
    (place / "cut.png").write_bytes(content[: len(content) // 2])  # its header is whole
    Image.new("RGB", (64, 15)).save(place / "low.png")
    wanted = ["a_96x72.png", "sub/b_96x72.png", "twin.bmp_96x72.png", "twin.png_96x72.png"]
    assert script(place, "--factor", 1.5, "--seed", 5) == 1
    assert files(tmp_path / "out") == wanted
    told = capsys.readouterr().err
    for name in ("broken.png", "cut.png", "low.png: the picture has 64 x 15 pixels"):
        assert told.count(f"error: {place / name}") == 1, told
    assert Image.open(tmp_path / "out" / "a_96x72.png").size == (96, 72)
    stored = read_image_metadata(tmp_path / "out" / "a_96x72.png")
    assert (stored["prompt"], stored["seed"], stored["picture"]) == ("a red house", 5, "a.png")
    seed = read_image_metadata(tmp_path / "out" / "sub/b_96x72.png")["seed"]

    (tmp_path / "out" / "sub/b_96x72.png").unlink()
    before = (tmp_path / "out" / "a_96x72.png").stat().st_mtime_ns
    assert script(place, "--factor", 1.5, "--seed", 5) == 1
    assert files(tmp_path / "out") == wanted
    assert (tmp_path / "out" / "a_96x72.png").stat().st_mtime_ns == before
    assert read_image_metadata(tmp_path / "out" / "sub/b_96x72.png")["seed"] == seed
    assert "3 of 7 pictures are there already" in capsys.readouterr().err


def test_one_picture_and_what_is_wrong_with_it(script: Callable[..., int], tmp_path: Path) -> None:
    SMALL.save(tmp_path / "a.png")
    assert script(tmp_path / "a.png", "--width", 128, "--prompt", "a flag") == 0
    assert files(tmp_path / "out") == ["a_128x96.png"]
    written = (tmp_path / "out" / "a_128x96.png").read_bytes()
    (tmp_path / "other").mkdir()
    SMALL.rotate(180).save(tmp_path / "other" / "a.png")
    with pytest.raises(ValueError, match="a_128x96.png is there already, and not made from it"):
        script(tmp_path / "other" / "a.png", "--width", 128)
    assert (tmp_path / "out" / "a_128x96.png").read_bytes() == written
    (tmp_path / "out" / "a_96x72.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match="a_96x72.png is there already"):
        script(tmp_path / "a.png", "--width", 96)
    (tmp_path / "out" / "a_96x72.png").unlink()
    with pytest.raises(SystemExit, match="^2$"):
        script("")
    with pytest.raises(ValueError, match="http://there/a.png: fetch the picture first"):
        script("http://there/a.png")
    with pytest.raises(FileNotFoundError, match="absent.png: this picture or folder does not exist"):
        script(tmp_path / "absent.png")
    Image.new("RGB", (15, 64)).save(tmp_path / "low.png")
    with pytest.raises(ValueError, match="low.png: the picture has 15 x 64 pixels, and at least 16"):
        script(tmp_path / "low.png")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="none: this folder holds no pictures"):
        script(tmp_path / "none")
    with pytest.raises(ValueError, match="holds the given pictures: name another folder"):
        script(tmp_path, "--output_dir", tmp_path)
    for strength in (0, 1.5, "nan"):
        with pytest.raises(ValueError, match="strength must be above 0 and at most 1"):
            script(tmp_path / "a.png", "--strength", strength)
    assert files(tmp_path / "out") == ["a_128x96.png"]


def test_what_stands_beside_the_pixels_stays(script: Callable[..., int], tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation], exif[ExifTags.Base.Artist] = 6, "A. Painter"
    SMALL.save(
        tmp_path / "a.jpg",
        exif=exif,
        xmp=b"<x:xmpmeta xmlns:x='adobe:ns:meta/'/>",
        icc_profile=srgb_profile(),
    )
    assert script(tmp_path / "a.jpg", "--factor", 2) == 0
    made = Image.open(tmp_path / "out" / "a_96x128.png")
    assert made.size == (96, 128) and made.info["icc_profile"]
    assert made.getexif()[ExifTags.Base.Artist] == "A. Painter"
    assert made.getexif().get(ExifTags.Base.Orientation, 1) == 1
    assert b"xmpmeta" in made.info["xmp"]
    levels = np.arange(64 * 80 * 3, dtype=np.uint16).reshape(64, 80, 3) * 4
    assert cv2.imwrite(str(tmp_path / "deep.png"), levels)
    assert script(tmp_path / "deep.png", "--factor", 1) == 0
    assert cv2.imread(str(tmp_path / "out" / "deep_80x64.png"), cv2.IMREAD_UNCHANGED).dtype == np.uint16


# --- sizes and colours ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "size"),
    [
        ({}, (768, 1024)), ({"factor": 1}, (300, 400)), ({"factor": 2.5}, (750, 1000)),
        ({"height": 600}, (600, 800)), ({"width": 600}, (450, 600)),
        ({"height": 600, "width": 2000}, (600, 800)), ({"height": 2000, "width": 800}, (600, 800)),
    ],
)  # fmt: skip
def test_a_picture_keeps_its_shape(asked: dict, size: tuple[int, int]) -> None:
    assert Upscaling((1024, 1024), **asked).size((300, 400)) == size


def test_sizes_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="a factor and a height or width do not go together"):
        Upscaling((64, 64), height=64, factor=2)
    for factor in (0, 0.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="factor must be a number from 1 up"):
            Upscaling((64, 64), factor=factor)
    with pytest.raises(ValueError, match="300 x 400 pixels .*, more than was asked for"):
        Upscaling((64, 64)).size((300, 400))


def test_colours_are_those_of_what_is_seen() -> None:
    generator = torch.Generator().manual_seed(0)
    picture, made = (torch.rand(3, *size, generator=generator) for size in ((20, 30), (40, 60)))
    picture, made = 0.3 + 0.4 * picture, 0.5 * made
    matched = with_colours_of(picture, None, made)
    for kind in (torch.mean, torch.std):
        assert torch.allclose(kind(matched, (1, 2)), kind(picture, (1, 2)), atol=1e-3)
    alpha = torch.zeros(1, 20, 30)
    alpha[:, :, :15] = 1
    half = with_colours_of(picture, alpha, made)
    assert torch.allclose(half[..., :29].mean((1, 2)), picture[..., :15].mean((1, 2)), atol=1e-2)
    flat = with_colours_of(torch.full((3, 4, 4), 0.25), None, made)
    assert torch.allclose(flat, torch.full_like(flat, 0.25))


# --- Python ---------------------------------------------------------------------------------------


def test_pictures_are_guided_by_the_given_one(pipeline: UltraPixelPipeline, tmp_path: Path) -> None:
    SMALL.save(tmp_path / "a.png")
    made, other = pipeline.upscale([tmp_path / "a.png", SMALL.rotate(180)], factor=2, seed=3, **QUICK)
    assert made.image.size == (128, 96) and (made.seed, other.seed) == (3, 4)
    assert not torch.equal(made.pixels, other.pixels)
    (again,) = pipeline.upscale(SMALL, height=96, seed=3, settings=Settings(cfg=2.0, **QUICK))
    assert torch.equal(again.pixels, made.pixels)
    means = torch.tensor(list(SMALL.resize((1, 1), Image.Resampling.BOX).getdata())[0]) / 255
    assert torch.allclose(made.pixels.mean((1, 2)), means, atol=2 / 255)
    for change in ({"strength": 0.3}, {"guidance_unconditional": 0.0}):  # without a prompt, too
        (changed,) = pipeline.upscale(SMALL, factor=2, seed=3, **change, **QUICK)
        assert not torch.equal(changed.pixels, made.pixels)


def test_alpha_is_enlarged_and_kept(pipeline: UltraPixelPipeline, tmp_path: Path) -> None:
    given = SMALL.convert("RGBA")
    hole = Image.new("RGBA", (32, 48), (0, 255, 0, 0))  # a green that nobody sees
    given.paste(hole, (0, 0))
    (made,) = pipeline.upscale(given, factor=2, **QUICK)
    assert made.image.mode == "RGBA" and made.image.size == (128, 96)
    alpha = made.image.getchannel("A")
    assert alpha.crop((0, 0, 60, 96)).getextrema() == (0, 0)
    assert alpha.crop((68, 0, 128, 96)).getextrema() == (255, 255)
    seen = SMALL.crop((32, 0, 64, 48)).resize((1, 1), Image.Resampling.BOX).getdata()[0]
    means = made.pixels[:3, :, 64:].mean((1, 2))
    assert torch.allclose(means, torch.tensor(seen) / 255, atol=2 / 255)
    assert made.pixels[1].mean() < 0.5
    assert Image.open(made.save(tmp_path / "a.png")).mode == "RGBA"


def test_without_guidance_nothing_is_made_large() -> None:
    unguided = UltraPixelPipeline.from_config("configs/tiny/stage_c.yaml", "configs/tiny/stage_b.yaml", None)
    with pytest.raises(ValueError, match="made large by guidance"):
        unguided.upscale(SMALL, factor=2)
