"""The interface of scripts and notebooks: presets, pictures, arguments, observers, LoRAs, controls."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import pytest
import torch
from conftest import ROOT, random_pipeline
from PIL import Image, ImageChops

from core.config.presets import PRESETS
from core.config.settings import Job, Settings
from core.pictures.images import read_image_metadata
from core.pipeline.made import Picture, Pictures
from core.pipeline.pipeline import UltraPixelPipeline
from core.pipeline.progress import Progress
from core.weights.lora.merging import load_loras

SIDE = 64
QUICK = Settings(steps=1, steps_b=1, cfg=1.0)
LORA = ROOT / PRESETS["tiny"].lora[0].partition(":")[0]
LIGHTHOUSE = ROOT / "figures/example_control/lighthouse.png"
CUDA = torch.cuda.is_available()


@pytest.fixture(scope="module")
def tiny() -> UltraPixelPipeline:
    return UltraPixelPipeline.from_preset("tiny", "cpu")


@pytest.fixture(scope="module")
def family(family_folder: Path) -> UltraPixelPipeline:
    return random_pipeline(family_folder)


@pytest.fixture
def plain(tiny: UltraPixelPipeline):
    """The tiny pipeline, without LoRA and control before and after."""
    yield tiny
    tiny.set_loras([])
    tiny.set_control(None)


def quick(pipeline: UltraPixelPipeline, prompt="a red boat", height=SIDE, width=SIDE, **more) -> Pictures:
    return pipeline(prompt, height, width, **{"settings": QUICK, "progress": False, **more})


def same(a: Picture, b: Picture) -> bool:
    return torch.equal(a.pixels, b.pixels)


# --- presets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_found_from_everywhere_and_loads_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()  # of another project
    monkeypatch.chdir(tmp_path)
    pipeline = UltraPixelPipeline.from_preset(name)
    assert pipeline.device.type == ("cuda" if CUDA else "cpu")
    assert (pipeline.guidance is None) == (name == "lite")
    assert pipeline.files()["text encoder"].startswith(str(ROOT / "models"))


def test_a_preset_gives_the_defaults(tiny: UltraPixelPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def pictures(_, jobs, settings, *more):
        asked.append((jobs, settings))
        return []

    monkeypatch.setattr(UltraPixelPipeline, "pictures", pictures)
    tiny("a boat", progress=False)
    tiny("a boat", steps=3, width=256, progress=False)
    (first, settings), (second, changed) = asked
    assert first == [Job("a boat", 512, 512, 0)] and settings == Settings(cfg=2.0)
    assert second == [Job("a boat", 512, 256, 0)] and changed == Settings(cfg=2.0, steps=3)


def test_weights_lie_in_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.symlink(ROOT / "models" / "tiny", tmp_path / "tiny")
    pipeline = UltraPixelPipeline.from_preset("tiny", models=".")
    monkeypatch.chdir("/")
    assert {Path(path).is_relative_to(tmp_path) for path in pipeline.files().values()} == {True}
    pipeline.check_files()
    big = UltraPixelPipeline.from_preset("small-big", models=tmp_path)
    assert big.files()["Stage C"] == str(tmp_path / "stage_c_bf16.safetensors")
    assert big.files()["text encoder"] == str(tmp_path)
    with pytest.raises((ValueError, OSError), match="stage_c_bf16.safetensors"):
        quick(big)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "tiniest"}, "'tiniest' is not one of small-big, big-big, lite, tiny"),
        ({"name": 3}, "3 is not one of"),
        ({"name": "tiny", "models": "/nowhere"}, "models: /nowhere is not a folder"),
        ({"name": "tiny", "device": "gpu"}, "'gpu'"),
    ],
)
def test_what_is_no_preset_is_told(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        UltraPixelPipeline.from_preset(**arguments)


# --- pictures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["num_images", "num_image"])
def test_a_call_returns_pictures(tiny: UltraPixelPipeline, name: str) -> None:
    made = quick(tiny, seed=5, **{name: 2})
    assert isinstance(made, list) and [picture.seed for picture in made] == [5, 6]
    assert [image.size for image in made.images] == [(SIDE, SIDE)] * 2
    assert not ImageChops.difference(made.images[0], made[0].image).getbbox()


def test_what_is_shown_of_pictures_and_pipelines(tiny: UltraPixelPipeline) -> None:
    made = quick(tiny)
    assert repr(made) == f"[Picture(seed=0, {SIDE} x {SIDE}, 'a red boat')]"
    assert Image.open(BytesIO(made[0]._repr_png_())).size == (SIDE, SIDE)
    assert repr(tiny).endswith(f"preset tiny, on {tiny.device})")


def test_number_formats_have_the_names_that_the_scripts_take() -> None:
    assert UltraPixelPipeline.from_preset("tiny", dtype="bf16").config_c.dtype == "bfloat16"
    with pytest.raises(ValueError, match="float16 gives black pictures"):
        UltraPixelPipeline.from_preset("tiny", dtype="fp16")


def test_files_of_the_project_are_found_from_everywhere(
    plain: UltraPixelPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert plain.set_control("canny", "figures/example_control/lighthouse.png") is not None
    plain.set_loras("models/tiny/lora_striped_balloon.safetensors")
    plain.set_loras(None)


@pytest.mark.parametrize("suffix", ["png", "jpg", "JPEG", "webp"])
def test_a_saved_picture_tells_how_it_was_made(tiny: UltraPixelPipeline, tmp_path: Path, suffix: str) -> None:
    picture = quick(tiny, negative_prompt="fog", settings=Settings(steps=1, steps_b=1, cfg=2.0))[0]
    path = picture.save(tmp_path / "new" / f"boat.{suffix}")
    metadata = read_image_metadata(path)
    assert metadata["prompt"] == "a red boat" and metadata["negative_prompt"] == "fog"
    assert metadata["steps"] == 1 and metadata["config_c"] == PRESETS["tiny"].config_c
    assert metadata["pretrained_path"] == PRESETS["tiny"].pretrained_path
    assert len(metadata["weights"]) == 5 and "torch" in metadata["versions"]
    assert Image.open(path).format == {"JPEG": "JPEG", "jpg": "JPEG"}.get(suffix, suffix.upper())


@pytest.mark.parametrize("name", ["boat", "boat.gif", "boat.bmp"])
def test_a_picture_is_saved_in_a_known_format(name: str, tmp_path: Path) -> None:
    picture = Picture(Job("x", 8, 8, 1), torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match=rf"{name}: .* ends in one of \.png, \.jpg, \.webp"):
        picture.save(tmp_path / name)


def test_the_script_repeats_a_saved_picture(tiny: UltraPixelPipeline, tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "inference"))
    import test_t2i

    picture = quick(tiny, seed=4)[0]
    path = picture.save(tmp_path / "boat.png")
    out = tmp_path / "again"
    test_t2i.main(["--from_image", str(path), "--output_dir", str(out), "--device", "cpu"])
    with Image.open(next(out.glob("*.png"))) as again:
        assert not ImageChops.difference(again, picture.image).getbbox()


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "kind", "words"),
    [
        ({"height": 128.0}, TypeError, r"height must be a whole number, not 128\.0 \(float\): write 128"),
        ({"width": "128"}, TypeError, r"width must be a whole number, not '128'"),
        ({"height": True}, TypeError, "height must be a whole number, not True"),
        ({"height": -64}, ValueError, "height must be from 64 to 16384 pixels, not -64"),
        ({"width": 0}, ValueError, "width must be from 64 to 16384 pixels, not 0"),
        ({"seed": True}, TypeError, "seed must be a whole number, not True"),
        ({"seed": 1.5}, TypeError, r"seed must be a whole number, not 1\.5"),
        ({"seed": None}, TypeError, "seed must be a whole number, not None: -1 draws one"),
        ({"prompt": 5}, TypeError, r"prompt must be text, or a list of texts, not 5"),
        ({"prompt": None}, TypeError, "prompt must be text, or a list of texts, not None"),
        ({"prompt": b"boat"}, TypeError, "prompt must be text"),
        ({"prompt": ["a", 5]}, TypeError, r"prompt\[1\] must be text, not 5"),
        ({"prompt": []}, ValueError, "prompt is an empty list"),
        ({"negative_prompt": ["fog", "rain"]}, TypeError, "negative_prompt must be .*write 'fog, rain'"),
        ({"negative_prompt": None}, TypeError, "negative_prompt must be text, not None"),
        ({"num_images": 0}, ValueError, "num_images must be at least 1, not 0"),
        ({"num_image": -1}, ValueError, "num_image must be at least 1, not -1"),
        ({"num_images": 2.0}, TypeError, r"num_images must be a whole number, not 2\.0 \(float\): write 2"),
        ({"num_images": 2, "num_image": 3}, ValueError, "num_images is 2 and num_image 3"),
        ({"settings": {"steps": 3}}, TypeError, "settings must be core.config.settings.Settings"),
        ({"observer": 5}, TypeError, "observer must be a function of the progress, not 5"),
        ({"step": 5}, TypeError, "no argument 'step': did you mean steps"),
        ({"hight": 5}, TypeError, "did you mean height"),
        ({"negativ_prompt": "x"}, TypeError, "did you mean negative_prompt"),
        ({"guidance_scale": 5}, TypeError, "did you mean cfg"),
        ({"num_inference_steps": 5}, TypeError, "did you mean steps"),
        ({"control_weight": 1}, TypeError, "did you mean set_control"),
        ({"banana": 5}, TypeError, "it takes prompt, height, .*, steps"),
        ({"steps": 2.5}, TypeError, r"steps must be a whole number, not 2\.5"),
        ({"steps": 0}, ValueError, "steps must be at least 1, not 0"),
        ({"cfg": "4"}, TypeError, "cfg must be a number, not '4'"),
        ({"cfg_interval": 0.5}, TypeError, "cfg_interval must be two numbers"),
        ({"sampler": 3}, TypeError, "sampler must be text, not 3"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_named_before_anything_is_loaded(
    wrong: dict, kind: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(UltraPixelPipeline, "pictures", None)  # not reached
    with pytest.raises(kind, match=words) as caught:
        UltraPixelPipeline.from_preset("tiny", "cpu")(**{"prompt": "a boat", "progress": False, **wrong})
    assert "\n" not in str(caught.value)


def test_numbers_of_other_libraries_are_numbers(tiny: UltraPixelPipeline, tmp_path: Path) -> None:
    import numpy as np

    made = quick(tiny, "a boat", np.int64(SIDE), SIDE, seed=np.int32(3), num_images=np.int8(1))
    assert json.dumps(read_image_metadata(made[0].save(tmp_path / "x.png")))


def test_a_seed_can_be_drawn(family: UltraPixelPipeline) -> None:
    drawn = quick(family, seed=-1, num_images=2)
    assert drawn[0].seed >= 0 and drawn[1].seed == drawn[0].seed + 1
    assert same(drawn[0], quick(family, seed=drawn[0].seed)[0])


# --- bars and observers ---------------------------------------------------------------------------


def test_a_bar_is_shown_unless_it_is_turned_off(
    family: UltraPixelPipeline, capsys: pytest.CaptureFixture
) -> None:
    quick(family)
    assert capsys.readouterr().err == ""
    quick(family, progress=True)
    shown = capsys.readouterr().err
    assert "stage C, low resolution" in shown and "1/1" in shown


STAGES = ["stage C, low resolution", "stage C, high resolution", "stage B", "stage A"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("group", [1, 8])
def test_an_observer_ends_the_run_and_what_is_done_is_kept(
    family: UltraPixelPipeline, monkeypatch: pytest.MonkeyPatch, stage: str, group: int
) -> None:
    monkeypatch.setattr(UltraPixelPipeline, "group", group)
    calls: list[tuple[str, int]] = []

    def watch(progress: Progress) -> bool:
        calls.append((progress.stage, progress.job.seed))
        return calls[-1] == (stage, 1)

    whole = quick(family, num_images=3)
    made = quick(family, num_images=3, observer=watch)
    assert calls[-1] == (stage, 1)
    number = {"stage A": 2, "stage B": 1}.get(stage, 1 if group == 1 else 0)
    assert len(made) == number and all(same(*pair) for pair in zip(made, whole, strict=False))
    assert len(quick(family, num_images=1)) == 1  # and the pipeline works as before


@pytest.mark.parametrize("answer", [None, 1, "yes", False])
def test_only_true_ends_a_run(family: UltraPixelPipeline, answer: object) -> None:
    assert len(quick(family, num_images=2, observer=lambda _: answer)) == 2


def test_an_observer_that_fails_costs_a_warning(family: UltraPixelPipeline) -> None:
    with pytest.warns(UserWarning, match="failed .*the run goes on"):
        assert len(quick(family, observer=lambda _: 1 / 0)) == 1


def test_pictures_that_are_done_outlive_an_error(
    family: UltraPixelPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage_b, seeds = UltraPixelPipeline.run_stage_b, []

    def breaks(pipeline, jobs, *more):
        seeds.append(jobs[0].seed)
        if len(seeds) == 2:
            raise KeyboardInterrupt
        return stage_b(pipeline, jobs, *more)

    monkeypatch.setattr(UltraPixelPipeline, "group", 1)
    monkeypatch.setattr(UltraPixelPipeline, "run_stage_b", breaks)
    with pytest.raises(KeyboardInterrupt):
        quick(family, num_images=3)
    assert [picture.seed for picture in family.rescued] == [0]
    quick(family)
    assert family.rescued == []


# --- LoRAs and controls ---------------------------------------------------------------------------


def test_a_lora_is_set_by_its_path(plain: UltraPixelPipeline, tmp_path: Path) -> None:
    prompt = "a large [stripes] balloon"
    bare = quick(plain, prompt)[0]
    plain.set_loras(load_loras([f"{LORA}:0.8"], plain.config_c))
    wanted = quick(plain, prompt)[0]
    made = []
    for given in ([f"{LORA}:0.8"], f"{LORA}:0.8"):
        plain.set_loras(given)
        made += quick(plain, prompt)
    assert same(made[0], wanted) and same(made[1], wanted) and not same(bare, wanted)
    assert read_image_metadata(made[0].save(tmp_path / "x.png"))["lora"] == [f"{LORA}:0.8"]
    plain.set_loras(LORA)
    with pytest.warns(UserWarning, match="the prompt lacks"):
        quick(plain, "a balloon")
    plain.set_loras([])
    assert same(bare, quick(plain, prompt)[0])
    with pytest.raises(TypeError, match="a LoRA is named by its file, .* not by 5"):
        plain.set_loras([5])


def test_a_control_is_one_call(plain: UltraPixelPipeline, tmp_path: Path) -> None:
    bare = quick(plain)[0]
    plain.set_control("canny", LIGHTHOUSE)
    by_file = quick(plain)[0]
    plain.set_control("canny", Image.open(LIGHTHOUSE))
    by_picture = plain("a red boat", SIDE, SIDE, steps=1, steps_b=1, progress=False)[0]
    assert not same(by_file, bare)
    metadata = read_image_metadata(by_file.save(tmp_path / "x.png"))
    assert metadata["control"] == "canny" and metadata["canny_source_url"] == str(LIGHTHOUSE)
    assert metadata["control_weight"] == PRESETS["tiny"].control_weight
    metadata = read_image_metadata(by_picture.save(tmp_path / "x.png"))
    assert metadata["canny_source_url"] is None and (metadata["cfg"], metadata["shift"]) == (1.0, 2.0)
    plain.set_control(None)
    assert same(bare, quick(plain)[0])


def test_the_script_repeats_a_controlled_picture(plain: UltraPixelPipeline, tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "inference"))
    import test_controlnet

    plain.set_control("canny", LIGHTHOUSE, weight=0.9)
    picture = quick(plain)[0]
    path, out = picture.save(tmp_path / "boat.png"), tmp_path / "again"
    test_controlnet.main(["--from_image", str(path), "--output_dir", str(out), "--device", "cpu"])
    again = next(file for file in out.glob("*.png") if not file.stem.endswith("_control"))
    with Image.open(again) as repeated:
        assert not ImageChops.difference(repeated, picture.image).getbbox()


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        (("cany", LIGHTHOUSE), ValueError, "'cany' is not one of canny, inpainting, super_resolution"),
        (("canny",), ValueError, "canny needs a picture"),
        (("canny", 5), TypeError, "picture must be a file, .* not 5"),
        (("canny", LIGHTHOUSE, LIGHTHOUSE), ValueError, "a mask is for the control inpainting"),
        (("canny", LIGHTHOUSE, None, "1"), TypeError, "weight must be a number, not '1'"),
        (("canny", LIGHTHOUSE, None, float("nan")), ValueError, "weight of a control .* not nan"),
        (("canny", "nowhere.png"), FileNotFoundError, "nowhere.png"),
    ],
)
def test_a_control_that_cannot_be_is_told(
    plain: UltraPixelPipeline, arguments: tuple, kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        plain.set_control(*arguments)
    assert same(quick(plain)[0], quick(plain)[0])  # without control


# --- packaging and the notebook -------------------------------------------------------------------


def test_every_package_says_that_it_is_typed() -> None:
    for package in ("core", "gdf", "modules"):
        assert (ROOT / package / "py.typed").is_file()
    assert "py.typed" in (ROOT / "pyproject.toml").read_text("utf-8")


def test_the_quickstart_runs_as_it_is_written(tmp_path: Path) -> None:
    notebook = json.loads((ROOT / "docs/quickstart.ipynb").read_text("utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell.get("outputs") for cell in notebook["cells"])
    script = tmp_path / "cells.py"
    script.write_text("\n".join(cells), "utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.glob("*.png")} >= {"windmill_1.png"}


def test_calls_of_several_threads_take_turns(tiny: UltraPixelPipeline) -> None:
    prompts = ["a red boat", "a blue boat", "a pink house"]
    alone = [quick(tiny, prompt)[0] for prompt in prompts]
    pipeline = UltraPixelPipeline.from_preset("tiny", offload="block")
    with ThreadPoolExecutor(3) as pool:
        together = [made[0] for made in pool.map(lambda prompt: quick(pipeline, prompt), prompts)]
    assert all(same(a, b) for a, b in zip(alone, together, strict=True))


def test_a_picture_can_be_pickled(tiny: UltraPixelPipeline, tmp_path: Path) -> None:
    made = quick(tiny)[0]
    again = pickle.loads(pickle.dumps(made))
    paths = again.save(tmp_path / "a.png"), made.save(tmp_path / "b.png")
    assert same(made, again) and read_image_metadata(paths[0]) == read_image_metadata(paths[1])
