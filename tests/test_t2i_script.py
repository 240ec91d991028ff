"""inference/test_t2i.py as its users run it: a subprocess, its files, its errors."""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from core.commands.flags import add_model_flags, add_picture_flags, parse_with_preset, run
from core.config.presets import PRESETS
from core.pictures.images import read_image_metadata

sys.path.insert(0, str(ROOT / "inference"))
import test_t2i  # noqa: E402

Run = Callable[..., subprocess.CompletedProcess[str]]


def call(arguments: Sequence[object]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "inference" / "test_t2i.py"), *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=240)


@pytest.fixture
def command_line(family_folder: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Flags for the random family; keywords add or replace them, None removes one."""

    def flags_of(*flags: object, **named: object) -> list[str]:
        values = {
            "config_c": family_folder / "stage_c.yaml", "config_b": family_folder / "stage_b.yaml",
            "pretrained_path": family_folder / "ultrapixel_t2i.safetensors", "prompt": "a fox", "height": 128,
            "width": 160, "steps": 2, "steps_b": 2, "output_dir": tmp_path / "out", **named,
        }  # fmt: skip
        parts = [part for name, value in values.items() if value is not None for part in (f"--{name}", value)]
        return [str(part) for part in (*parts, *flags)]

    return flags_of


@pytest.fixture
def script(command_line: Callable[..., list[str]]) -> Run:
    """Runs the script with these flags in a process of its own."""
    return lambda *flags, **named: call(command_line(*flags, **named))


def pictures(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "out").iterdir() if "preview" not in path.name)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_a_prompt_file_becomes_pictures_with_settings_inside(script: Run, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a lake / at dawn\nand mist\n\n\nein Löwe 🦁\n", "utf-8")
    done = script("--preview", prompt=None, prompt_file=prompts, num_image=2, seed=5, format="webp")
    assert done.returncode == 0, done.stderr
    made = pictures(tmp_path)
    assert len(made) == 4
    for path in made:
        assert f": {path}" in done.stdout
        assert Image.open(path).size == (160, 128)
    stored = [read_image_metadata(path) for path in made]
    assert sorted((s["seed"], s["prompt"]) for s in stored) == [
        (5, "a lake / at dawn and mist"), (6, "a lake / at dawn and mist"),
        (7, "ein Löwe 🦁"), (8, "ein Löwe 🦁"),
    ]  # fmt: skip
    assert all(len(digest) == 64 for digest in stored[0]["weights"].values())
    assert len(stored[0]["weights"]) == 5
    assert {"torch", "ultrapixel"} <= stored[0]["versions"].keys()
    for text in ("stage C, low resolution", "stage C, high resolution", "stage B", "stage A", "peak memory"):
        assert text in done.stderr
    previews = sorted(path.name for path in (tmp_path / "out").glob("*preview*"))
    assert len(previews) == 8
    assert Image.open(tmp_path / "out" / previews[0]).size == (15 * 8, 12 * 8)


def test_a_picture_is_repeated_from_its_own_settings(script: Run, tmp_path: Path) -> None:
    assert script("--stage_a_tiled", seed=11, cfg=2.5, sampler="ddim", negative_prompt="fog").returncode == 0
    (first,) = pictures(tmp_path)
    again = call(["--from_image", first, "--output_dir", tmp_path / "out"])
    assert again.returncode == 0, again.stderr
    second = next(path for path in pictures(tmp_path) if path != first)
    assert np.array_equal(pixels(first), pixels(second))
    changed = call(["--from_image", first, "--output_dir", tmp_path / "out", "--seed", 12])
    assert changed.returncode == 0, changed.stderr
    assert {read_image_metadata(path)["seed"] for path in pictures(tmp_path)} == {11, 12}


def test_a_dry_run_tells_the_plan_and_makes_nothing(script: Run, tmp_path: Path) -> None:
    done = script("--dry_run", height=512, width=512, num_image=3)
    assert done.returncode == 0, done.stderr
    for part in ("model_version: random", "low resolution: latent 12 x 12", "seeds: 123 to 125", "GiB",
                 "high resolution: latent 48 x 48", "Stage B: latent 128 x 128",
                 "stage_c.safetensors, 2."):  # fmt: skip
        assert part in done.stdout
    assert not (tmp_path / "out").exists()


def test_ctrl_c_between_pictures_tells_how_to_go_on(
    command_line: Callable[..., list[str]], tmp_path: Path
) -> None:
    flags = command_line(num_image=50)
    command = [sys.executable, str(ROOT / "inference" / "test_t2i.py"), *flags]
    heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # as in a terminal, however tests run
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, preexec_fn=heeding)
    made = tmp_path / "out"
    while len(list(made.glob("*.png"))) < 2 and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in said
    assert said.endswith("interrupted: the same command with --skip_existing makes what is missing\n")
    before = {path.name: path.stat().st_mtime_ns for path in made.iterdir()}
    again = call(command_line("--skip_existing", num_image=len(before) + 1))
    after = {path.name: path.stat().st_mtime_ns for path in made.iterdir()}
    assert again.returncode == 0 and len(after) == len(before) + 1 and after.items() >= before.items()


def test_a_dry_run_of_the_published_configuration_needs_no_weights() -> None:
    done = call(["--prompt", "x", "--height", 4096, "--width", 4096, "--dry_run"])
    assert done.returncode == 0, done.stderr
    assert "latent 96 x 96" in done.stdout
    assert "not there" in done.stdout


def test_a_dry_run_counts_each_way_to_offload_and_pictures_at_once() -> None:
    flags = ["--prompt", "x", "--height", 4096, "--width", 4096, "--dry_run", "--num_image", 3]
    said, counted = [], []
    for more in (("--offload", "block"), ("--batch", 2)):
        said.append(call([*flags, *more]).stdout)
        (line,) = (line for line in said[-1].splitlines() if line.startswith("by --offload: "))
        assert line.endswith(", without the text encoder, which is not there")
        counted.append([float(number) for number in re.findall(r"([\d.]+) GiB", line)])
    assert "(estimate)" in said[0] and "(estimate, 2 pictures at once)" in said[1]
    none, stage, block = counted[0]
    assert none > stage > block
    assert all(two > one for one, two in zip(*counted, strict=True))


@pytest.mark.parametrize(
    ("named", "parts"),
    [
        ({"prompt": None}, ["no prompt was given", "--prompt"]),
        ({"prompt": None, "prompt_file": "no/such.txt"}, ["no/such.txt"]),
        ({"height": 7}, ["height", "7"]),
        ({"num_image": 0}, ["--num_image", "0"]),
        ({"steps": 0}, ["steps", "0"]),
        ({"dtype": "fp16"}, ["float16", "black", "bf16"]),
        ({"dtype": "int8"}, ["int8", "bf16"]),
        ({"device": "tpu"}, ["tpu", "cpu"]),
        ({"device": "cuda:7"}, ["cuda:7", "cpu"]),
        ({"sampler": "unheard_of"}, ["unheard_of", "ddpm"]),
        ({"config_c": "nowhere.yaml"}, ["nowhere.yaml", "does not exist"]),
        ({"pretrained_path": "nowhere.safetensors"}, ["nowhere.safetensors", "does not exist"]),
        ({"from_image": "nowhere.png"}, ["nowhere.png", "does not exist"]),
        ({"format": "webp", "width": 16384}, ["16383", "png"]),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    command_line: Callable[..., list[str]], capsys: pytest.CaptureFixture[str], named: dict, parts: list[str]
) -> None:
    with pytest.raises(SystemExit, match="^2$"):
        run(partial(test_t2i.main, command_line(**named)))
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error:" in last
    for part in parts:
        assert part in last


def test_a_wrong_file_is_told_before_loading(script: Run, family_folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "guidance.safetensors"
    page.write_text("<!DOCTYPE html><html></html>")
    done = script(pretrained_path=page)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "HTML page" in done.stderr
    done = script(pretrained_path=family_folder / "stage_b.safetensors")
    assert done.returncode == 2
    assert "Stage B" in done.stderr.strip().splitlines()[-1]


def test_a_preset_sets_what_belongs_together_and_flags_win() -> None:
    parser = argparse.ArgumentParser()
    add_picture_flags(parser)
    add_model_flags(parser)
    for name, preset in PRESETS.items():
        found = vars(parse_with_preset(parser, ["--preset", name]))
        assert {key: found[key] for key in asdict(preset)} == asdict(preset)
        assert all((ROOT / path).is_file() for path in (preset.config_c, preset.config_b))
    found = parse_with_preset(parser, ["--preset", "big-big", "--height", "512", "--pretrained_path", "none"])
    assert (found.height, found.width, found.pretrained_path) == (512, 2048, "none")


def test_a_picture_imports_nothing_heavy_that_it_does_not_need(family_folder: Path, tmp_path: Path) -> None:
    heavy = ("torchvision", "torch._dynamo", "sympy", "scipy", "accelerate", "transformers.modeling_utils")
    flags = ["--config_c", family_folder / "stage_c.yaml", "--config_b", family_folder / "stage_b.yaml"]
    flags += ["--pretrained_path", family_folder / "ultrapixel_t2i.safetensors", "--prompt", "a fox"]
    flags += ["--height", 64, "--width", 64, "--steps", 1, "--steps_b", 1, "--output_dir", tmp_path]
    code = "import sys\nfrom test_t2i import main\nmain(sys.argv[1:])\n"
    code += f"print([name for name in {heavy} if name in sys.modules])"
    command = [sys.executable, "-c", code, *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "inference", timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--offload", "block"], "block"),
        (["--resident"], "none"),
        (["--offload", "stage", "--int8"], "stage"),
    ],
)
def test_where_weights_rest_is_told_in_a_line(
    command_line: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    told: str,
) -> None:
    assert test_t2i.main(command_line(*flags, height=64, width=64, steps=1, steps_b=1)) == 0
    assert f"offload: {told} (on the CPU" in capsys.readouterr().err
    (path,) = pictures(tmp_path)
    assert read_image_metadata(path)["int8"] == ("--int8" in flags)
