"""Formats of picture files: bits, settings, profile and provenance in each, and the same bytes each time."""

import json
import sys
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
import tifffile
import torch
from conftest import ROOT, random_pipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageCms, features

from core.commands.flags import parse_with_preset, picture_parser
from core.commands.pictures import Gallery
from core.config.settings import Job, Settings
from core.pictures import files as picture_files
from core.pictures.deep import tiff_file
from core.pictures.files import FORMATS, SUFFIXES, check_format
from core.pictures.images import load_image, read_image_metadata, save_image, to_levels
from core.pictures.metadata import stored_xmp
from core.pictures.profiles import srgb_profile, srgb_transform
from core.pipeline.made import Picture, Record, WeightHashes
from core.pipeline.pipeline import UltraPixelPipeline

sys.path.insert(0, str(ROOT / "inference"))
import test_t2i as script  # noqa: E402

SOURCE_TYPE = b"http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
DIGITAL_SOURCE_TYPE = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"
RAMP = torch.linspace(0, 1, 3 * 48 * 500).view(3, 500, 48)  # more levels than 8 bits have
formats = pytest.mark.parametrize("format", FORMATS)


@pytest.fixture(autouse=True)
def only_what_is_installed(request: pytest.FixtureRequest) -> None:
    if "format" in request.fixturenames and request.getfixturevalue("format") == "jxl":
        pytest.importorskip("pillow_jxl")


def picture(pixels: torch.Tensor = RAMP) -> Picture:
    record = Record(Settings(steps=3), {}, "stage_c", WeightHashes({}))
    return Picture(Job("a fox, 狐\ud800", *pixels.shape[1:], 7), pixels, record)


def save(folder: Path, format: str, **options) -> Path:
    bits = 16 if format == "png16" else None
    path = folder / f"a.{SUFFIXES[format]}"
    return picture().save(path, bits, lossless=format == "webp_lossless", **options)


def stored(path: Path) -> np.ndarray:
    return cv2.imread(str(path), cv2.IMREAD_UNCHANGED)[..., ::-1]


@formats
def test_every_format_holds_the_picture_its_settings_and_the_profile(tmp_path: Path, format: str) -> None:
    path = save(tmp_path, format)
    stored = read_image_metadata(path)
    assert stored["prompt"] == "a fox, 狐\ud800" and (stored["seed"], stored["steps"]) == (7, 3)
    seen = torch.from_numpy(np.array(load_image(path))).permute(2, 0, 1) / 255
    assert (seen - RAMP).abs().mean() < 0.01
    with Image.open(path) as image:
        profile = image.info["icc_profile"]
        assert profile == srgb_profile() or (format == "jxl" and srgb_transform(profile, "RGB") is None)
        assert SOURCE_TYPE not in path.read_bytes()
        if format.startswith("png"):
            assert image.text["parameters"].startswith("a fox, 狐?\nSteps: 3")
            assert json.loads(image.text["ultrapixel"])["seed"] == 7
        else:
            comment = image.getexif().get_ifd(0x8769)[0x9286]
            assert comment.removeprefix(b"UNICODE\0").decode("utf-16-be").startswith("a fox, 狐?\nSteps: 3")


@formats
def test_every_format_says_that_a_model_made_the_picture_if_that_is_wished(
    tmp_path: Path, format: str
) -> None:
    path = save(tmp_path, format, provenance=True)
    assert SOURCE_TYPE in path.read_bytes()
    assert read_image_metadata(path)["seed"] == 7
    with Image.open(path) as image:
        elements = ElementTree.fromstring(stored_xmp(image)).iter()
    assert [each.text for each in elements if each.tag == DIGITAL_SOURCE_TYPE] == [SOURCE_TYPE.decode()]


@formats
def test_settings_are_the_defaults_of_from_image_again(tmp_path: Path, format: str) -> None:
    path = save(tmp_path, format)
    parsed = parse_with_preset(picture_parser("x"), ["--from_image", str(path), "--steps_b", "4"])
    assert (parsed.seed, parsed.steps, parsed.steps_b, parsed.width) == (7, 3, 4, 48)
    assert parsed.format == format


@pytest.fixture(scope="module")
def made_twice(family_folder: Path) -> list[Picture]:
    """One seed's picture, with its record, made by two pipelines."""
    quick, jobs = Settings(steps=1, steps_b=1, cfg=1.0), [Job("x", 64, 96, 123)]
    pipelines = [random_pipeline(family_folder) for _ in range(2)]
    return [
        replace(picture, record=pipeline.record(quick, {}))
        for pipeline in pipelines
        for picture in pipeline.pictures(jobs, quick)
    ]


@formats
def test_the_same_seed_gives_the_same_bytes(made_twice: list[Picture], tmp_path: Path, format: str) -> None:
    one, two = (
        Gallery(str(tmp_path / name), format, made.record, provenance=True).add(made)
        for name, made in zip(("one", "two"), made_twice, strict=True)
    )
    assert one.name == two.name == f"x_64x96_123.{SUFFIXES[format]}"
    assert one.read_bytes() == two.read_bytes() and SOURCE_TYPE in one.read_bytes()


def test_the_flags_reach_the_file(
    made_twice: list[Picture], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(UltraPixelPipeline, "pictures", lambda *_: iter(made_twice[:1]))
    flags = ["--preset", "tiny", "--prompt", "x", "--format", "png16", "--provenance", "--device", "cpu"]
    script.main([*flags, "--output_dir", str(tmp_path)])
    (path,) = tmp_path.glob("*.png")
    assert stored(path).dtype == np.uint16 and SOURCE_TYPE in path.read_bytes()


def test_the_profile_tells_no_time_and_is_that_of_srgb() -> None:
    profile = ImageCms.ImageCmsProfile(BytesIO(srgb_profile()))
    assert profile.profile.creation_date.year == 1999 and "sRGB" in profile.profile.profile_description


@pytest.mark.parametrize("suffix", ["png", "tiff", "tif"])
@settings(max_examples=20, deadline=None)
@given(values=arrays(np.float32, (3, 9, 7), elements=st.floats(-0.5, 1.5, width=32)))
def test_16_bits_are_stage_as_floats_rounded(tmp_path_factory, suffix: str, values: np.ndarray) -> None:
    path = picture(torch.from_numpy(values)).save(tmp_path_factory.mktemp("a") / f"a.{suffix}", bits=16)
    wanted = (values.astype(np.float64).clip(0, 1) * 65535).transpose(1, 2, 0)
    assert stored(path).dtype == np.uint16 and abs(stored(path) - wanted).max() <= 0.51


@pytest.mark.parametrize("shape", [(3, 1, 1), (3, 1, 500), (3, 700, 333), (3, 2100, 3)])
def test_large_and_small_pictures_of_16_bits(tmp_path: Path, shape: tuple[int, ...]) -> None:
    pixels = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    for suffix in ("png", "tiff"):
        path = picture(pixels).save(tmp_path / f"a.{suffix}", bits=16)
        assert (stored(path) == to_levels(pixels)).all()
        with Image.open(path) as image:
            image.load()
    assert (tifffile.imread(path) == to_levels(pixels)).all()


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_tiffs_are_read_by_another_reader(channels: int) -> None:
    levels = np.random.default_rng(0).integers(0, 65536, (600, 500, channels)).astype(np.uint16)
    with tifffile.TiffFile(BytesIO(tiff_file(levels, srgb_profile(), b"<x/>", b""))) as file:
        page = file.pages[0]
        assert (page.asarray().reshape(levels.shape) == levels).all()
        assert page.tags["InterColorProfile"].value == srgb_profile() and page.tags[700].value == b"<x/>"


def test_lossless_webp_is_exact_also_where_nothing_is_seen(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 30, 4)).astype(np.uint8)
    path = save_image(Image.fromarray(noise), tmp_path / "a.webp", "webp_lossless", {})
    with Image.open(path) as image:
        assert (np.asarray(image) == noise).all()


def test_bits_and_loss_are_what_the_suffix_can_have(tmp_path: Path) -> None:
    for name, bits in (("a.png", 8), ("a.tiff", 16), ("a.TIF", 16)):
        assert stored(picture().save(tmp_path / name)).dtype == f"uint{bits}"
    for name, options, sentence in (
        ("a.jpg", {"bits": 16}, "a jpg picture has 8 bits a colour, not 16"),
        ("a.tiff", {"bits": 8}, "a tiff picture has 16 bits a colour, not 8"),
        ("a.png", {"bits": 12}, "a png picture has 8 or 16 bits a colour, not 12"),
        ("a.avif", {"lossless": True}, "a avif picture is not saved without loss; use png, webp or tiff"),
    ):
        with pytest.raises(ValueError, match=sentence):
            picture().save(tmp_path / name, **options)


def test_a_picture_of_16_bits_may_end_up_in_8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> bytes:
        raise OSError("No space left on device")

    monkeypatch.setattr("core.pictures.deep.tiff_file", broken)
    gallery = Gallery(str(tmp_path), "tiff", picture().record)
    with pytest.warns(UserWarning, match="picture_500x48_7.png: the picture lies here .*No space left"):
        path = gallery.add(picture())
    assert abs(np.array(load_image(path)).astype(int) - np.array(picture().image)).max() <= 1
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_8_bits_and_16_are_written_by_either_kind_of_format(tmp_path: Path) -> None:
    eight_bit = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    path = save_image(Image.fromarray(eight_bit), tmp_path / "a.png", "png16", {})
    assert (stored(path) == eight_bit.astype(np.uint16) * 257).all()
    path = save_image(stored(path), tmp_path / "b.png", "png", {})
    assert (np.asarray(load_image(path)) == eight_bit).all()


def test_what_is_not_installed_is_told_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(picture_files, "find_spec", lambda _: None)
    monkeypatch.setattr(features, "check", lambda _: False)
    with pytest.raises(ValueError, match="pip install pillow-jxl-plugin$"):
        check_format("jxl", 8, 8)
    with pytest.raises(ValueError, match="this Pillow writes no avif pictures"):
        check_format("avif", 8, 8)
    monkeypatch.setattr(script, "make_pipeline", lambda _: pytest.fail("something was loaded"))
    flags = ["--prompt", "x", "--format", "jxl", "--output_dir", str(tmp_path)]
    with pytest.raises(ValueError, match="pillow-jxl-plugin"):
        script.main(flags)
