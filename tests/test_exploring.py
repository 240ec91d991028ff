"""Small pictures first, then large ones from their latents: the same as in one go, bit for bit."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, random_pipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from core.commands.flags import parse_with_preset, picture_parser, run, settings_of
from core.config.schema import stage_c_sizes
from core.config.settings import Job, Settings
from core.pictures.images import read_image_metadata
from core.pipeline import decode, go_on
from core.pipeline.control import Control
from core.pipeline.controls import SetControls
from core.pipeline.going_on import earlier_of
from core.pipeline.latents import Earlier
from core.pipeline.offload import Offloaded
from core.pipeline.passes import Start
from core.pipeline.pipeline import UltraPixelPipeline
from core.pipeline.progress import Progress
from core.pipeline.resolution import plan, same_aspect
from core.pipeline.sources import Source
from core.weights.checkpoint import read_metadata
from modules.controlnet import ControlNet

sys.path.insert(0, str(ROOT / "inference"))
import test_t2i  # noqa: E402

QUICK = Settings(steps=3, steps_b=2)
JOB = Job("a red house", 64, 96, 1)
SMALL = {"height": 64, "width": 96, "steps": 2, "steps_b": 1}


@pytest.fixture(scope="module")
def pipeline(family_folder: Path) -> UltraPixelPipeline:
    return random_pipeline(family_folder)


Run = Callable[..., list[Path]]


@pytest.fixture
def script(family_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the script in this process, and returns the new files; without `config_c` flags are added."""
    folder = tmp_path / "out"

    def made(*flags: object, **named: object) -> list[Path]:
        before = {*folder.glob("*")}
        values = {**named, "output_dir": folder}
        if not any("--from" in str(flag) for flag in flags):
            files = {"config_c": "stage_c.yaml", "config_b": "stage_b.yaml"}
            guidance = family_folder / "ultrapixel_t2i.safetensors"
            paths = {name: family_folder / file for name, file in files.items()}
            values = {**paths, "pretrained_path": guidance, "prompt": "a fox", **SMALL, **values}
        parts = [part for name, value in values.items() for part in (f"--{name}", value)]
        assert test_t2i.main([str(part) for part in (*parts, *flags)]) == 0
        return sorted({*folder.glob("*")} - before)

    return made


def refused(capsys: pytest.CaptureFixture[str], main: Callable[[], object]) -> str:
    with pytest.raises(SystemExit, match="^2$"):
        run(main)
    return capsys.readouterr().err.strip().splitlines()[-1]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


# --- in Python ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"guidance_r": "last_step"},
        {"guidance_r": "last_step", "cfg": 1.0},
        {"guidance_r": "last_step", "sampler": "heun", "times": "karras", "steps_lr": 2, "cfg_lr": 3.0},
        {"guidance_r": "last_step", "cfg_interval": (0.4, 1.0)},
    ],
)
def test_going_on_is_as_one_go(pipeline: UltraPixelPipeline, tmp_path: Path, changes: dict) -> None:
    settings = replace(QUICK, **changes)
    (low,) = pipeline.run([JOB], replace(settings, lr_only=True))
    path = low.save_latents(tmp_path / "low.safetensors")
    (large,) = pipeline.run([replace(JOB, height=128, width=192)], settings)
    for earlier in (path, low):
        (on,) = go_on(pipeline, earlier, 128, 192, progress=False)
        assert torch.equal(on.pixels, large.pixels)
        assert torch.equal(on.latents.high, large.latents.high)
    assert not torch.equal(go_on(pipeline, path, seed=5, progress=False)[0].pixels, large.pixels[:, :64, :96])


def test_a_control_and_a_start_are_gone_on_from_too(
    pipeline: UltraPixelPipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network = ControlNet(c_in=1, c_proj=stage_c_sizes(pipeline.config_c).c_hidden[0], proj_blocks=(0, 1))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    held = Offloaded(lambda *_: network.eval(), pipeline._placement)
    monkeypatch.setattr(pipeline, "controls", SetControls(networks=(held,)))
    control = [Control(torch.randn(1, 1, 64, 64), torch.zeros(1, 64, 64), 1.0)]
    settings = replace(QUICK, guidance_r="last_step")
    start = Source(low=Start(torch.randn(1, 16, 10, 15), 0.6))
    (whole,) = pipeline.run([JOB], settings, controls=control, sources=[start])
    source = Earlier.of_file(whole.save_latents(tmp_path / "a.safetensors"), pipeline.config_c).going_on()
    (on,) = pipeline.run([JOB], settings, controls=control, sources=[source])
    assert torch.equal(on.pixels, whole.pixels)
    (without,) = pipeline.run([JOB], settings, sources=[source])
    assert not torch.equal(without.pixels, whole.pixels)


def test_what_a_run_goes_out_from_stays_when_it_goes_on(pipeline: UltraPixelPipeline) -> None:
    (alone,) = pipeline.run([JOB], QUICK)
    high = Start(torch.randn(1, 16, 6, 9), 0.6)
    pipeline.origin, pipeline._sources = object(), {(JOB.height, JOB.width): Source(high=high)}
    try:
        (begun,) = pipeline.run([JOB], QUICK)
        on = Earlier.of_latents(begun.latents, JOB, QUICK, pipeline.config_c)
        (again,) = pipeline.run([JOB], QUICK, sources=[on.going_on(pipeline.own_sources([JOB])[0])])
    finally:
        pipeline.set_origin(None)
    assert not torch.equal(begun.pixels, alone.pixels)
    assert torch.equal(again.pixels, begun.pixels)


def test_decoding_anew_runs_stages_b_and_a_alone(pipeline: UltraPixelPipeline, tmp_path: Path) -> None:
    (picture,) = pipeline.run([JOB], QUICK)
    path = picture.save_latents(tmp_path / "a.safetensors")
    seen: list[str] = []

    def observe(progress: Progress) -> None:
        seen.append(progress.stage)

    again = decode(pipeline, path, observe, progress=False)
    assert {*seen} == {"stage B", "stage A"}
    assert torch.equal(again.pixels, picture.pixels)
    other = decode(pipeline, path, progress=False, steps_b=3)
    (whole,) = pipeline.run([JOB], replace(QUICK, steps_b=3))
    assert torch.equal(other.pixels, whole.pixels)
    assert torch.equal(other.latents.low.x0, picture.latents.low.x0)  # kept, to go on from it too


def test_the_low_resolution_latent_is_decoded_at_its_own_size(pipeline: UltraPixelPipeline) -> None:
    sizes = plan(JOB.height, JOB.width, pipeline.config_c.geometry)
    (low,), (whole,) = (pipeline.run([JOB], replace(QUICK, lr_only=only)) for only in (True, False))
    assert low.pixels.shape[1:] == (sizes.lr_height, sizes.lr_width)
    assert torch.equal(low.latents.low.x0, whole.latents.low.x0)
    assert low.latents.high is None
    assert torch.equal(decode(pipeline, low, progress=False).pixels, low.pixels)


@pytest.mark.parametrize(
    ("size", "other", "same"),
    [
        ((2048, 2048), (512, 512), True), ((2048, 2090), (2048, 2048), True),
        ((2048, 2200), (2048, 2048), False), ((512, 768), (512, 512), False),
        ((3000, 2000), (1500, 1001), True), ((2000, 3000), (3000, 2000), False),
    ],
)  # fmt: skip
def test_one_aspect_is_that_but_for_a_cell(
    size: tuple[int, int], other: tuple[int, int], same: bool, pipeline: UltraPixelPipeline
) -> None:
    geometry = replace(pipeline.config_c.geometry, compression=42.67)
    assert same_aspect(size, other, geometry) == same


def test_what_cannot_be_gone_on_from_is_told(pipeline: UltraPixelPipeline, tmp_path: Path) -> None:
    (picture,) = pipeline.run([JOB], replace(QUICK, steps=1, lr_only=True))
    path = picture.save_latents(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"128 x 128 .* cannot go on from .* 64 x 96.* such as 128 x 192"):
        go_on(pipeline, path, 128, 128)
    with pytest.raises(ValueError, match="no latent 'hr' in it: go on"):
        decode(pipeline, path, lr_only=False)
    with pytest.raises(TypeError, match="is gone on from, not 7"):
        earlier_of(7, pipeline)
    with pytest.raises(ValueError, match="without its latents"):
        earlier_of(replace(picture, latents=None), pipeline)
    tensors, texts = load_file(path), read_metadata(path)
    save_file({**tensors, "lr": tensors["lr"][:, :, 1:].contiguous()}, path, texts)
    with pytest.raises(ValueError, match="the latent 'lr' is of 16 x 9 x 15, but should be of 16 x 10 x 15"):
        go_on(pipeline, path)
    tiny = UltraPixelPipeline.from_preset("tiny", device="cpu")
    with pytest.raises(ValueError, match="of another family, that of"):
        go_on(tiny, path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="no file of latents.*damaged"):
        go_on(pipeline, path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        go_on(pipeline, tmp_path / "nothing.safetensors")


# --- by the script --------------------------------------------------------------------------------


def test_the_script_explores_and_renders(script: Run, tmp_path: Path) -> None:
    found = script(
        "--lr_only", "--save_latents", num_image=3, seed=5
    )  # in a batch it would be rounded otherwise
    names = [path.name for path in found]
    assert [name for name in names if name.endswith("_lr.png")] == [
        f"a_fox_64x96_{s}_lr.png" for s in (5, 6, 7)
    ]
    assert sum(name.endswith("_lr.safetensors") for name in names) == 3 and "contact_sheet.png" in names
    sheet = Image.open(tmp_path / "out" / "contact_sheet.png")
    assert sheet.width > 2 * Image.open(found[0]).width
    small = tmp_path / "out" / "a_fox_64x96_5_lr.png"
    large = {"height": 128, "width": 192}
    (whole,) = script(**large, seed=5)
    (on,) = script("--from_lr", small.with_suffix(".safetensors"), **large)
    (again,) = script("--from_image", small, **large)
    assert np.array_equal(pixels(on), pixels(whole)) and np.array_equal(pixels(again), pixels(whole))
    stored = read_image_metadata(on)
    assert stored["from_lr"].endswith("_5_lr.safetensors") and stored["lr_size"] == [64, 96]
    (repeated,) = script("--from_image", on)
    assert np.array_equal(pixels(repeated), pixels(whole))
    same = next(path for path in script("--from_image", small) if "_lr" in path.name)
    assert np.array_equal(pixels(same), pixels(small))


def test_the_script_decodes_anew(script: Run) -> None:
    latents, picture = sorted(script("--save_latents"), key=lambda path: path.suffix == ".png")
    (more,) = script("--from_latents", latents, steps_b=3)
    (whole,) = script(steps_b=3)
    assert np.array_equal(pixels(more), pixels(whole)) and not np.array_equal(pixels(more), pixels(picture))
    assert read_image_metadata(more)["from_latents"] == str(latents)


def test_another_aspect_from_a_picture_is_told(script: Run, capsys: pytest.CaptureFixture[str]) -> None:
    (picture,) = script()
    (other,) = script("--from_image", picture, width=64)
    assert "another aspect ratio" in capsys.readouterr().err
    assert Image.open(other).size == (64, 64) and read_image_metadata(other)["lr_size"] is None


def test_bad_input_is_one_sentence(script: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    latents, picture = sorted(script("--save_latents"), key=lambda path: path.suffix == ".png")
    (tmp_path / "page.safetensors").write_text("<html>")
    for flags, part in (
        (["--from_lr", latents, "--height", 128], "aspect ratio"),
        (["--from_latents", latents, "--height", 128, "--width", 192], "leave the size out"),
        (["--from_lr", tmp_path / "page.safetensors"], "no file of latents"),
        (["--from_lr", picture], "no file of latents"),
        (["--from_lr", tmp_path / "none.safetensors"], "does not exist"),
        (["--from_lr", latents, "--preset", "tiny"], "another family"),
        (["--from_lr", latents, "--from_image", picture], "do not go together"),
        (["--from_lr", latents, "--lr_size", 96, 64], "aspect ratio"),
        (["--from_lr", latents, "--control", f"canny:{picture}"], "add --control_hr"),
        (["--from_latents", latents, "--control", f"canny:{picture}"], "no control steers"),
        (["--from_lr", ""], "the path is empty"),
        (["--prompt", "a", "--preset", "tiny", "--batch", 0], "batch must be at least 1"),
        (["--prompt", "a", "--preset", "tiny", "--cfg_lr", -1], "cfg_lr must be"),
        (["--prompt", "a", "--preset", "tiny", "--times", "log"], "karras"),
    ):
        last = refused(capsys, partial(test_t2i.main, [*map(str, flags)]))
        assert "error:" in last and part in last, last


def test_sampling_flags_are_settings() -> None:
    given = [
        "--times",
        "karras",
        "--sampler",
        "heun",
        "--cfg_lr",
        "3",
        "--cfg_hr",
        "2",
        "--lr_size",
        "64",
        "96",
    ]
    assert settings_of(parse_with_preset(picture_parser(""), given)) == Settings(
        times="karras", sampler="heun", cfg_lr=3.0, cfg_hr=2.0, lr_size=(64, 96)
    )
