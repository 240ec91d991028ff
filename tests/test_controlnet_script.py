"""inference/test_controlnet.py: its files, its sizes, its errors, and the embedded family under control."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from PIL import Image
from random_family import randomise

from core.config.control_types import CONTROL_TYPES, picture_flags
from core.config.sizes import TINY, ControlNetSizes
from core.family.evaluation import held_out_cases, real_picture
from core.family.outlines import FAR
from core.pictures.images import read_image_metadata
from core.scenes.captions import PLACES
from core.scenes.captions import SIZES as SCENE_SIZES
from core.weights.checkpoint import config_metadata, save_tensors
from modules.controlnet import ControlNet

SCRIPT = ROOT / "inference" / "test_controlnet.py"
EXAMPLE = ROOT / "figures" / "example_control" / "lighthouse.png"
PROMPT = "a big blue lighthouse on an island in the sea, in the centre, on an overcast day with heavy clouds"

sys.path[:0] = [str(SCRIPT.parent), str(ROOT / "benchmarks")]
import test_controlnet as script  # noqa: E402
import tiny_control as benchmark  # noqa: E402

Run = Callable[..., Path]
READY = {"control": "depth", "control_image": "picture.png", "canny_source_url": None}


def write_controlnet(path: Path, sizes: ControlNetSizes) -> None:
    torch.manual_seed(1)
    network = ControlNet(**asdict(sizes))
    randomise(network)
    metadata = config_metadata(asdict(sizes)) | config_metadata({"control_size": 96}, "control")
    save_tensors(path, network.state_dict(), metadata)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ControlNets with random weights for the random family, and pictures."""
    folder = tmp_path_factory.mktemp("control")
    for name, c_in in (("canny", 1), ("inpainting", 4), ("super_resolution", 16), ("depth", 3), ("tile", 3)):
        sizes = ControlNetSizes(c_in, c_proj=64, proj_blocks=(0, 2, 5), bottleneck_mode="simple")
        write_controlnet(folder / f"{name}.safetensors", sizes)
    picture = Image.open(EXAMPLE).convert("RGB").resize((150, 120))
    picture.save(folder / "picture.png")
    mask = np.zeros((120, 150), np.uint8)
    mask[30:90, 40:100] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    Image.fromarray(mask).resize((75, 60)).save(folder / "small_mask.png")
    (folder / "text.png").write_text("hello")
    return folder


@pytest.fixture
def run(family_folder: Path, weights: Path, tmp_path: Path) -> Run:
    """Runs the script on the random family; keywords add or replace flags, None removes one."""

    def called(*flags: object, **named: object) -> Path:
        values = {
            "config_c": family_folder / "stage_c.yaml", "config_b": family_folder / "stage_b.yaml",
            "pretrained_path": family_folder / "ultrapixel_t2i.safetensors", "prompt": "a fox",
            "steps": 2, "steps_b": 2, "output_dir": tmp_path, "canny_source_url": weights / "picture.png",
            "control_file": weights / "{control}.safetensors", "height": 96, "width": 128, **named,
        }  # fmt: skip
        parts = [part for name, value in values.items() if value is not None for part in (f"--{name}", value)]
        assert script.main([str(part) for part in (*parts, *flags)]) == 0
        return tmp_path

    return called


def pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.png") if not path.stem.endswith("_control"))


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_edges_control_and_are_saved(run: Run) -> None:
    folder = run(num_image=2, control_weight=0.5)
    made = pictures(folder)
    assert [path.name for path in made] == [f"a_fox_high_quality_96x128_{seed}.png" for seed in (123, 124)]
    for path in made:
        shown = Image.open(path.with_name(f"{path.stem}_control.png"))
        assert shown.size == (128, 96) and np.asarray(shown).std() > 10
    stored = read_image_metadata(made[0])
    assert (stored["cfg"], stored["shift"], stored["steps"]) == (1.0, 2.0, 2)
    assert (stored["control"], stored["control_weight"], stored["control_size"]) == ("canny", 0.5, 96)
    assert len(stored["weights"]) == 6


def test_a_picture_is_repeated_with_its_control(run: Run, tmp_path: Path) -> None:
    (first,) = pictures(run(seed=11, control_size=48))
    assert script.main(["--from_image", str(first), "--output_dir", str(tmp_path / "again")]) == 0
    (again,) = pictures(tmp_path / "again")
    assert np.array_equal(pixels(first), pixels(again)) and first.name == again.name
    shown = [path.with_name(f"{path.stem}_control.png") for path in (first, again)]
    assert np.array_equal(*map(pixels, shown))


@pytest.mark.parametrize("flag", ["mask", "control_image"])
def test_around_a_hole_the_picture_stays_at_its_own_size(run: Run, weights: Path, flag: str) -> None:
    flags = {flag: weights / "mask.png", "height": None, "width": None}
    (path,) = pictures(run(control="inpainting", **flags))
    before, after = pixels(weights / "picture.png"), pixels(path)
    hole = pixels(weights / "mask.png") > 0
    assert after.shape == before.shape
    assert np.array_equal(after[~hole], before[~hole])
    assert (after[hole] != before[hole]).mean() > 0.5


def test_ready_edges_and_a_weight_of_zero(run: Run, weights: Path, tmp_path: Path) -> None:
    given = {"canny_source_url": None, "control_image": weights / "mask.png"}
    for weight in (0.0, 5.0):
        run(output_dir=tmp_path / str(weight), control_weight=weight, **given)
    (free,), (steered,) = (pictures(tmp_path / name) for name in ("0.0", "5.0"))
    assert not np.array_equal(pixels(free), pixels(steered))


@pytest.mark.parametrize("kind", CONTROL_TYPES)
def test_the_command_that_a_training_ends_with_fits_its_type(kind: str) -> None:
    command = ["--prompt", "x", "--control", kind, "--control_file", "FILE", *picture_flags(kind)]
    script.check_flags(script.parse(command))  # raises what does not fit


@pytest.mark.parametrize("kind", ["depth", "tile"])
def test_a_ready_picture_controls(run: Run, weights: Path, tmp_path: Path, kind: str) -> None:
    given = {"control": kind, "canny_source_url": None, "control_image": weights / "picture.png"}
    for weight in (0.0, 5.0):
        run(output_dir=tmp_path / str(weight), control_weight=weight, **given)
    (free,), (steered,) = (pictures(tmp_path / name) for name in ("0.0", "5.0"))
    assert not np.array_equal(pixels(free), pixels(steered))
    assert Image.open(steered.with_name(f"{steered.stem}_control.png")).mode == "RGB"
    assert read_image_metadata(steered)["control"] == kind


def test_a_small_picture_is_enlarged(run: Run, family_folder: Path, tmp_path: Path) -> None:
    stored = yaml.safe_load((family_folder / "stage_c.yaml").read_text("utf-8"))
    encoder = {"effnet_checkpoint_path": str(ROOT / "models/tiny/effnet_encoder.safetensors")}
    config = tmp_path / "with_encoder.yaml"
    config.write_text(yaml.safe_dump({**stored, **encoder, "effnet": asdict(TINY.effnet)}), "utf-8")
    for weight in (0.0, 5.0):
        run(control="super_resolution", config_c=config, control_weight=weight,
            output_dir=tmp_path / str(weight))  # fmt: skip
    (free,), (steered,) = (pictures(tmp_path / name) for name in ("0.0", "5.0"))
    assert Image.open(steered).size == (128, 96)
    assert Image.open(steered.with_name(f"{steered.stem}_control.png")).mode == "RGB"
    assert not np.array_equal(pixels(free), pixels(steered))


@pytest.mark.parametrize(
    ("named", "parts"),
    [
        ({"canny_source_url": "nowhere.png"}, ["nowhere.png", "does not exist"]),
        ({"canny_source_url": "text.png"}, ["text.png", "not a picture"]),
        ({"canny_source_url": "http://127.0.0.1:1/x.png"}, ["http://127.0.0.1:1/x.png", "cannot be fetched"]),
        ({"canny_source_url": None}, ["--control_source", "--control_image"]),
        ({"control": "inpainting", "mask": "small_mask.png"}, ["60 x 75", "120 x 150"]),
        ({"control": "inpainting"}, ["needs a hole"]),
        ({"control": "super_resolution"}, ["effnet_checkpoint_path"]),
        ({"mask": "mask.png"}, ["--mask is for inpainting"]),
        ({"control": "depth"}, ["depth takes a ready picture: --control_image FILE"]),
        ({**READY, "control_image": None}, ["depth needs a ready picture: --control_image"]),
        ({**READY, "control_file": None}, ["no ControlNet for depth is shipped", "--control_file FILE"]),
        ({**READY, "control_file": None, "preset": "tiny", "config_c": None, "config_b": None},
         ["controlnet_depth.safetensors does not exist", "no ControlNet for depth is shipped"]),
        ({**READY, "mask": "mask.png"}, ["--mask is for inpainting"]),
        ({**READY, "control_file": "canny.safetensors"}, ["is the canny ControlNet, but the depth"]),
        ({"control_image": "mask.png"}, ["--control_image is for edges instead"]),
        ({"control_size": 4}, ["control_size", "from 16 to 4096"]),
        ({"control_file": "inpainting.safetensors"}, ["is the inpainting ControlNet, but the canny"]),
        ({"control_file": "nowhere.safetensors"}, ["nowhere.safetensors", "does not exist"]),
        ({"preset": "tiny", "config_c": None, "config_b": None}, ["width 64", "has 192"]),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(
    run: Run, weights: Path, monkeypatch: pytest.MonkeyPatch, named: dict, parts: list[str]
) -> None:
    monkeypatch.chdir(ROOT)
    files = {path.name: path for path in weights.iterdir()}
    named = {name: files.get(value, value) for name, value in named.items()}
    with pytest.raises((ValueError, OSError)) as error:
        run(**named)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=240)


def test_the_published_command_line_is_read_and_ends_with_one_sentence() -> None:
    done = call("--prompt", "a house", "--height", 2048, "--width", 4096, "--seed", 1, "--dtype", "bf16",
                "--config_c", "configs/training/cfg_control_lr.yaml", "--config_b",
                "configs/inference/stage_b_1b.yaml", "--num_image", 2, "--output_dir", "outputs",
                "--stage_a_tiled", "--pretrained_path", "models/ultrapixel_t2i.safetensors",
                "--control_weight", 0.7, "--canny_source_url", EXAMPLE)  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "models/" in done.stderr.strip().splitlines()[-1]


def test_a_dry_run_names_the_controlnet(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    assert script.main(["--prompt", "x", "--canny_source_url", str(EXAMPLE), "--dry_run"]) == 0
    assert "ControlNet: models/controlnet/canny.safetensors" in capsys.readouterr().out


def test_the_embedded_family_runs_under_control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    write_controlnet(tmp_path / "canny.safetensors", TINY.controlnet)
    flags = {
        "preset": "tiny", "control_file": tmp_path / "{control}.safetensors", "canny_source_url": EXAMPLE,
        "height": 128, "width": 128, "prompt": PROMPT, "output_dir": tmp_path / "out",
    }  # fmt: skip
    assert script.main([str(part) for name, value in flags.items() for part in (f"--{name}", value)]) == 0
    (path,) = pictures(tmp_path / "out")
    assert read_image_metadata(path)["cfg"] == 1.0  # the script's, not the preset's
    assert Image.open(path).size == (128, 128)
    assert Image.open(path.with_name(f"{path.stem}_control.png")).size == (96, 96)


# --- the benchmark's measure ----------------------------------------------------------------------


def test_agreement_of_outlines_tells_right_from_wrong_and_chance() -> None:
    cases = held_out_cases(6, 0)
    real = [benchmark.outlines(real_picture(case.scene, (128, 128))) for case in cases]
    large = [benchmark.outlines(real_picture(case.scene, (256, 256))) for case in cases]
    assert benchmark.agreement(real, real) == benchmark.Agreement(1.0, 1.0, 0.0)
    others = benchmark.agreement(real, real[1:] + real[:1])
    shifted = benchmark.agreement(real, [np.roll(lines, 4, axis=1) for lines in real])
    assert abs(others.above_chance) < 0.4 and others.distance > 3
    assert benchmark.agreement(real, large).above_chance > 0.9
    assert others.above_chance < shifted.above_chance < 0.9 and 0 < shifted.distance < others.distance
    nothing = np.zeros((128, 128), dtype=bool)
    assert benchmark.compare(real[0], nothing) == (0.0, FAR)
    assert benchmark.compare(nothing, nothing) == (1.0, 0.0)


def test_open_prompts_say_neither_place_nor_size() -> None:
    words = {
        w for values in (*PLACES.values(), *SCENE_SIZES.values()) for value in values for w in value.split()
    }
    for case in held_out_cases(40, 0):
        prompt = benchmark.open_prompt(case.scene)
        assert case.scene.colour in prompt
        assert not words & set(prompt.split()) - {"on", "the", "in", "to", "at"}


def test_titles_stand_above_the_columns_of_a_sheet() -> None:
    sheet = Image.new("RGB", (400, 100), "navy")
    titled = benchmark.titled(sheet, ("Drawing", "Edges"))
    assert titled.size == (400, 100 + benchmark.TITLE)
    assert titled.crop((0, benchmark.TITLE, 400, titled.height)).tobytes() == sheet.tobytes()
    halves = [
        titled.crop((left, 0, left + 200, benchmark.TITLE)).convert("L").getextrema() for left in (0, 200)
    ]
    assert all(darkest < 64 and lightest == 255 for darkest, lightest in halves)
