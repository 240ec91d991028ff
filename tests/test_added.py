"""LoRAs with ControlNets, and several ControlNets at once: how entries add up, from Python and by flags."""

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
from peers import random_stage_c
from PIL import Image
from test_control import GEOMETRY, SIZES, noise_picture, write_controlnet
from test_graphs import Recorder, inputs
from test_loras import make_lora, new_token

from core.commands.flags import run as run_script
from core.config.given_control import GivenControl, read_control
from core.config.settings import Job, Settings
from core.pictures.images import read_image_metadata
from core.pipeline.control import Control, edge_control
from core.pipeline.control import Source as Given
from core.pipeline.entries import Entries, PassEntries
from core.pipeline.graphs import Recordings
from core.pipeline.pipeline import UltraPixelPipeline
from core.pipeline.resolution import plan
from core.pipeline.sources import Part, Source
from core.pipeline.split import Share
from core.pipeline.steps import low_step
from core.weights.lora.files import write_lora

sys.path.insert(0, str(ROOT / "inference"))
import test_controlnet  # noqa: E402
import test_t2i  # noqa: E402

JOB = Job("a red boat", 96, 128, seed=7)
QUICK = Settings(steps=4, steps_b=1, cfg=1.0, shift=2.0, guidance_r=0.1)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ControlNets with random weights for the random family, pictures, and a LoRA."""
    folder = tmp_path_factory.mktemp("added")
    for name, channels in (("canny", 1), ("inpainting", 4), ("depth", 3)):
        told = {"filter": name, "control_size": 96}
        write_controlnet(folder / f"{name}.safetensors", replace(SIZES, c_in=channels), told)
    for seed in (0, 1):
        noise_picture(96, 128, seed).save(folder / f"{seed}.png")
    mask = np.zeros((96, 128), np.uint8)
    mask[24:72, 40:100] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    write_lora(folder / "lora.safetensors", make_lora(1, new_token()), "own")
    return folder


# --- entries --------------------------------------------------------------------------------------


def test_entries_act_from_their_start_down_to_their_end() -> None:
    first, second = Entries((), 1.0, 0.5), Entries((), 0.5, 0.0)
    for step in range(20):
        t = float(torch.linspace(1, 0, 21)[step])
        assert first.act_at(t) != second.act_at(t)  # one follows the other
        assert first.act_at(t) == (step < 10)
        assert Entries(()).act_at(t)


@torch.no_grad()
def test_entries_add_up_at_the_sizes_of_their_maps() -> None:
    stage_c = random_stage_c(c=32, heads=2, blocks=((1, 1), (1, 1)))
    small, large = torch.randn(1, 32, 2, 2), torch.randn(1, 32, 6, 6)
    controls = [Entries([small, None, small]), Entries([large, large], end=0.5)]
    both, one = (PassEntries.of(controls, stage_c, (4, 4)).at(t) for t in (0.9, 0.3))
    assert [None if e is None else tuple(e.shape[-2:]) for e in both] == [(4, 4)] * 3
    x, held = inputs(stage_c, 2)
    r = torch.full((2,), 0.5)
    alone = stage_c.predict(x, r, held, control=[small, None, small])
    assert torch.equal(stage_c.predict(x, r, held, control=one), alone)
    assert not torch.equal(stage_c.predict(x, r, held, control=both), alone)
    swapped = PassEntries.of(controls[::-1], stage_c, (4, 4)).at(0.9)
    assert all(torch.equal(a, b) for a, b in zip(both, swapped, strict=True))
    assert PassEntries.of(controls[1:], stage_c, (4, 4)).at(0.3) is None
    assert PassEntries.of([], stage_c, (4, 4)) is None


@torch.no_grad()
def test_recordings_take_other_entries_within_a_picture() -> None:
    stage_c, recorder = random_stage_c(c=32, heads=2, blocks=((1, 1), (1, 1))), Recorder()
    kept, times = Recordings(9, recorder), stage_c.pass_times(torch.tensor([0.9, 0.5, 0.1]))
    x, held = inputs(stage_c, 1)
    for entry in torch.randn(3, 1, 32, 4, 4):
        made = kept.run(partial(low_step, stage_c), (x, times.at(0)), (held, [entry]))[0]
        assert torch.equal(made, stage_c.predict(x, times.at(0), held, control=[entry]))
    assert recorder.recorded == 1


def test_rows_of_the_high_resolution_pass_get_their_rows_of_entries() -> None:
    entries = PassEntries([Entries([None, torch.randn(1, 8, 6, 6)], hr=True)])
    share = Share(None, (0, 2, 6), 1, None)
    part = entries.of_rows(share.map_rows(1)).at(0.5)
    assert part[0] is None and torch.equal(part[1], entries.at(0.5)[1][:, :, 2:])


# --- the pipeline ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline(family_folder: Path, files: Path) -> UltraPixelPipeline:
    made = random_pipeline(family_folder)
    canny = GivenControl("canny", files / "0.png", file=files / "canny.safetensors")
    made.set_controls([canny, canny])
    assert made.controls.networks[0] is made.controls.networks[1]  # a file is loaded once
    return made


def made_by(pipeline: UltraPixelPipeline, *controls: Control, settings: Settings = QUICK) -> torch.Tensor:
    return pipeline.run([JOB], settings, None, [controls])[0].pixels


def test_controls_add_up_within_their_times(pipeline: UltraPixelPipeline) -> None:
    first, second = (edge_control(Given(noise_picture(96, 128, s)), (96, 128), GEOMETRY, 96) for s in (0, 1))
    off = replace(second, weight=0.0)
    alone, both = made_by(pipeline, first, off), made_by(pipeline, first, second)
    assert not torch.equal(alone, both)
    torch.testing.assert_close(made_by(pipeline, second, first), both, rtol=0, atol=1e-4)
    half = replace(first, weight=first.weight / 2)
    torch.testing.assert_close(made_by(pipeline, half, half), alone, rtol=0, atol=1e-4)
    early, late = replace(first, end=0.5), replace(first, start=0.5)
    assert torch.equal(made_by(pipeline, early, late), alone)  # one after the other is one all the time
    assert not torch.equal(made_by(pipeline, early, off), alone)
    unseen = replace(first, start=0.05)  # below every step, and the time of the guiding features
    assert torch.equal(made_by(pipeline, unseen, unseen), made_by(pipeline, off, off))


def test_control_of_the_high_resolution_pass_is_an_option(pipeline: UltraPixelPipeline) -> None:
    control = edge_control(Given(noise_picture(96, 128)), (96, 128), GEOMETRY, 96)
    off, late = replace(control, weight=0.0), replace(control, end=0.9, hr=True)
    low, high = made_by(pipeline, control, off), made_by(pipeline, replace(control, hr=True), off)
    assert not torch.equal(low, high)
    assert torch.equal(made_by(pipeline, replace(late, start=0.95), off), made_by(pipeline, off, off))
    sizes = plan(96, 128, GEOMETRY)
    part = Source(part=Part(sizes, sizes, (0, 0)))
    with pytest.raises(ValueError, match="for whole pictures: leave out the region"):
        pipeline.run([JOB], QUICK, None, [(late, off)], [part])
    with pytest.raises(ValueError, match="reuse 2 .* use reuse 1"):
        made_by(pipeline, late, off, settings=replace(QUICK, reuse=2))
    made_by(pipeline, replace(late, hr=False), off, settings=replace(QUICK, reuse=2))


def test_controls_and_controlnets_are_as_many(pipeline: UltraPixelPipeline) -> None:
    control = edge_control(Given(noise_picture(96, 128)), (96, 128), GEOMETRY, 96)
    with pytest.raises(ValueError, match="1 controls were given, but ControlNets for 2: name one for each"):
        made_by(pipeline, control)


@pytest.mark.parametrize(
    ("controls", "kind", "words"),
    [
        (["canny"], ValueError, "a control is KIND:PICTURE.*not 'canny'"),
        (["cany:0.png"], ValueError, "'cany' is not one of canny, inpainting"),
        (["canny:0.png:strong"], ValueError, "the number 'strong' .* is no number"),
        (["canny:0.png:1:0.5"], ValueError, "a control is KIND:PICTURE"),
        (["canny:0.png:1:0:0.5"], ValueError, "from START down to END, .* not from 0 to 0.5"),
        (["canny:0.png:1:2:0.5"], ValueError, "between 1 .noise. and 0 .the picture."),
        (["canny:nowhere.png"], FileNotFoundError, "nowhere.png"),
        ([5], TypeError, "a control is GivenControl.*, not 5"),
        ([GivenControl("canny")], ValueError, "canny needs a picture"),
        ([GivenControl("canny", "0.png", weight="1")], TypeError, "weight must be a number"),
        ([GivenControl("canny", "0.png", mask="mask.png")], ValueError, "a mask is for the control"),
        ([GivenControl("inpainting", "0.png", "mask.png")] * 2, ValueError, "one control can fill a hole"),
    ],
)  # fmt: skip
def test_controls_that_cannot_be_are_told_and_change_nothing(
    pipeline: UltraPixelPipeline,
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    controls: list,
    kind,
    words: str,
) -> None:
    monkeypatch.chdir(files)
    before, named = pipeline.controls, {"file": files / "canny.safetensors"}
    controls = [replace(c, **named) if isinstance(c, GivenControl) else c for c in controls]
    with pytest.raises(kind, match=words):
        pipeline.set_controls(controls)
    assert pipeline.controls is before


@pytest.mark.parametrize(
    ("text", "place", "numbers"),
    [
        ("canny:a.png", "a.png", (None, 1, 0)), ("canny:a.png:0.8", "a.png", (0.8, 1, 0)),
        ("canny:a.png:.8:0.9:0.2", "a.png", (0.8, 0.9, 0.2)), ("canny:a.png:-1", "a.png", (-1, 1, 0)),
        (r"canny:C:\a.png:0.5", r"C:\a.png", (0.5, 1, 0)), ("canny:C:/a.png", "C:/a.png", (None, 1, 0)),
        ("canny:http://x:80/a.png:0.5", "http://x:80/a.png", (0.5, 1, 0)),
        ("canny:https://x/a.png", "https://x/a.png", (None, 1, 0)),
    ],
)  # fmt: skip
def test_a_control_is_a_kind_a_picture_and_numbers(text: str, place: str, numbers: tuple) -> None:
    given = read_control(text)
    assert (given.control, given.picture) == ("canny", place)
    assert (given.weight, given.start, given.end) == numbers


# --- the script -----------------------------------------------------------------------------------

Run = Callable[..., Path]


@pytest.fixture
def run(family_folder: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs test_t2i, or another script, on the random family; the picture, of which there is one."""
    monkeypatch.chdir(files)

    def called(
        *flags: object,
        script=test_t2i,
        out: str = "out",
        repeats: Path | None = None,
        way: str = "from_image",
    ) -> Path:
        values = {"prompt": "a fox", "steps": 2, "steps_b": 1, "seed": 3, "height": 96, "width": 128,
                  "config_c": family_folder / "stage_c.yaml", "config_b": family_folder / "stage_b.yaml",
                  "pretrained_path": family_folder / "ultrapixel_t2i.safetensors",
                  "control_file": files / "{control}.safetensors"}  # fmt: skip
        if repeats is not None:
            values = {way: repeats}
        elif not {"--control", "--control_image", "--control_source"} & {*flags}:
            del values["control_file"]
        named = [part for name, value in values.items() for part in (f"--{name}", value)]
        folder = tmp_path / out
        assert script.main([str(part) for part in (*named, "--output_dir", folder, *flags)]) == 0
        (path,) = (path for path in folder.glob("*.png") if "_control" not in path.stem)
        return path

    return called


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_one_control_is_that_of_the_published_script(run: Run) -> None:
    ours = run("--control", "canny:0.png:0.9")
    published = run("--control_source", "0.png", "--control_weight", 0.9, script=test_controlnet, out="other")
    assert np.array_equal(pixels(ours), pixels(published)) and ours.name == published.name
    assert np.array_equal(*(pixels(p.with_name(f"{p.stem}_control.png")) for p in (ours, published)))


def test_loras_and_controls_go_together_and_are_repeated(run: Run, files: Path) -> None:
    flags = ["--lora", "lora.safetensors:0.5", "--control", "canny:0.png:2:1:0.3", "--control_image",
             "depth:1.png:3", "--control_hr", "--prompt", "a [x] fox"]  # fmt: skip
    first = run(*flags)
    told = read_image_metadata(first)
    assert told["lora"] == ["lora.safetensors:0.5"] and (told["cfg"], told["shift"]) == (1.0, 2.0)
    edges, depth = told["controls"]
    assert (edges["weight"], edges["start"], edges["end"], edges["size"]) == (2, 1, 0.3, 96)
    assert (depth["control"], depth["picture"], depth["ready"], depth["hr"]) == ("depth", "1.png", True, True)
    assert {str(files / f"{name}.safetensors") for name in ("canny", "depth")} <= told["weights"].keys()
    assert first.with_name(f"{first.stem}_control_2.png").exists()
    again = run(out="again", repeats=first)
    assert np.array_equal(pixels(again), pixels(first)) and read_image_metadata(again) == told
    canny = "--control", "canny:0.png:2:1:0.3", "--control_file", files / "canny.safetensors"
    without = run(*canny, out="without", repeats=first)
    assert not np.array_equal(pixels(without), pixels(first))
    assert [one["control"] for one in read_image_metadata(without)["controls"]] == ["canny"]
    with pytest.raises(ValueError, match="was made with --controls"):
        run(script=test_controlnet, repeats=first)


def test_a_hole_is_filled_beside_other_controls_at_its_pictures_size(run: Run) -> None:
    path = run("--control", "inpainting:0.png", "--mask", "mask.png", "--control", "canny:1.png")
    before, after, hole = pixels(Path("0.png")), pixels(path), pixels(Path("mask.png")) > 0
    assert np.array_equal(after[~hole], before[~hole]) and (after[hole] != before[hole]).mean() > 0.5
    parsed = test_t2i.parse(["--control", "inpainting:0.png", "--preset", "tiny"])
    assert (parsed.height, parsed.width, parsed.cfg) == (None, None, 1.0)


def test_a_picture_with_several_controls_from_python_is_repeated(
    run: Run, family_folder: Path, files: Path, tmp_path: Path
) -> None:
    pipeline = random_pipeline(family_folder)
    pipeline.set_loras(str(files / "lora.safetensors"))
    file = files / "canny.safetensors"
    pipeline.set_controls([GivenControl("canny", files / f"{i}.png", file=file, end=i / 4) for i in (0, 1)])
    with pytest.warns(UserWarning, match="lacks"):
        picture = pipeline("a fox", 96, 128, seed=3, steps=2, steps_b=1, progress=False)[0]
    assert picture.job.prompt == "a fox high quality" and picture.record.settings.shift == 2.0
    again = run(repeats=picture.save(tmp_path / "x.png"))
    assert np.array_equal(pixels(again), np.asarray(picture.image))
    pipeline.set_controls([])
    assert pipeline.controls_for((96, 128)) == ()


def test_latents_that_were_controlled_are_gone_on_from(run: Run) -> None:
    first = run("--control", "canny:0.png:2", "--save_latents")
    for way in ("from_lr", "from_latents"):
        again = run(out=way, repeats=first.with_suffix(".safetensors"), way=way)
        assert np.array_equal(pixels(again), pixels(first))


def test_a_preset_turns_no_lora_on() -> None:
    plain = test_t2i.parse(["--preset", "tiny"])
    assert (plain.lora, plain.controls, plain.cfg) == ((), (), 2.0)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--mask", "mask.png"], "--mask needs a control: add --control inpainting:PICTURE"),
        (["--control_hr"], "--control_hr needs a control"),
        (["--control_size", "64"], "--control_size needs a control"),
        (["--control", "canny:0.png", "--mask", "mask.png"], "--mask needs a control: add --control inpaint"),
        (["--control", "canny:0.png", "--control_hr", "--reuse", "2"], "use reuse 1"),
        (["--control", "canny:0.png", "--control_hr", "--fast"], "use reuse 1"),
        (["--control", "canny:0.png", "--control_file", "no.safetensors"], "no.safetensors"),
        (["--control", "canny:nowhere.png"], "nowhere.png"),
        (["--control", "depth:0.png"], "depth takes a ready picture: --control_image depth:FILE"),
        (["--control_image", "inpainting:0.png"], "not ready: --control inpainting:FILE"),
        (["--control", "canny:0.png:x"], "the number 'x'"),
    ],
)
def test_bad_flags_end_with_a_sentence(
    run: Run,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    words: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["test_t2i.py"])
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: run(*flags) and 0)
    assert ended.value.code == 2 and words in " ".join(capsys.readouterr().err.split())
