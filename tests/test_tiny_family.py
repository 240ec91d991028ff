"""The embedded family: what a newcomer gets without any download."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from core.config.presets import EMBEDDED, PRESETS
from core.config.schema import ControlConfig
from core.config.settings import Settings
from core.config.yaml import load_stage_c
from core.family.evaluation import Case, Evaluation, Judge, View, held_out_cases
from core.pipeline.pipeline import UltraPixelPipeline
from core.scenes.captions import caption
from core.scenes.scene import EXTRA_SUBJECTS, sample_scene
from core.weights.checkpoint import load_module, read_config, read_tensors
from core.weights.lora.merging import load_loras
from modules.effnet import EfficientNetEncoder
from modules.recogniser import Recogniser

sys.path[:0] = [str(ROOT / "benchmarks")]
import tiny_control  # noqa: E402

FOLDER = ROOT / "models" / "tiny"
TINY = PRESETS[EMBEDDED]
CPU = torch.device("cpu")
SETTINGS = TINY.settings
CONTROLLED = Settings(cfg=1.0, shift=2.0)  # as inference/test_controlnet.py samples


@pytest.fixture(scope="module", autouse=True)
def at_root():
    """The preset's paths are relative to the repository."""
    before = Path.cwd()
    os.chdir(ROOT)
    yield
    os.chdir(before)


@pytest.fixture(scope="module")
def pipeline() -> UltraPixelPipeline:
    return UltraPixelPipeline.from_config(TINY.config_c, TINY.config_b, TINY.pretrained_path, CPU)


@pytest.fixture(scope="module")
def judge() -> Judge:
    path = FOLDER / "recogniser.safetensors"
    build = partial(Recogniser, **read_config(path))
    return Judge(load_module(build, path, dtype=torch.float32, what="recogniser"), CPU)


def test_all_files_together_are_small_and_hold_no_nan() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 36e6
    for path in FOLDER.rglob("*.safetensors"):
        assert all(t.isfinite().all() for t in read_tensors(path).values() if t.is_floating_point())


def test_pictures_show_what_was_asked_for_at_both_sizes(pipeline: UltraPixelPipeline, judge: Judge) -> None:
    for side, count in ((128, 8), (256, 2)):
        evaluation = Evaluation(pipeline, judge, held_out_cases(count, 2000), SETTINGS)
        view = View(str(side), (side, side))
        (measured,) = evaluation.pictures(view.size, [view], None, lambda *_: None)
        assert measured.accuracy.mean > 0.9


def test_real_pictures_survive_encoder_stage_b_and_stage_a(
    pipeline: UltraPixelPipeline, judge: Judge
) -> None:
    path = Path(load_stage_c(TINY.config_c).effnet_checkpoint_path)
    build = partial(EfficientNetEncoder, **read_config(path))
    encoder = load_module(build, path, dtype=torch.float32, what="encoder")
    evaluation = Evaluation(pipeline, judge, held_out_cases(12, 3000), SETTINGS)
    trip = evaluation.round_trip(encoder, (128, 128), None)
    assert trip.psnr > 28 and trip.kept.mean > 0.85


def test_the_guided_picture_resembles_its_small_version(pipeline: UltraPixelPipeline) -> None:
    prompt = caption(sample_scene(5, "held_out"), 5)
    small, large = (pipeline(prompt, side, side, seed=3, settings=SETTINGS)[0].pixels for side in (128, 512))
    reduced = torch.nn.functional.avg_pool2d(large[None], 4)[0]
    other = pipeline(caption(sample_scene(8, "held_out"), 8), 128, 128, seed=4, settings=SETTINGS)[0].pixels
    near, far = ((x - reduced).square().mean() for x in (small, other))
    assert near < 0.5 * far


def test_the_lora_draws_striped_balloons_where_its_token_is(judge: Judge) -> None:
    assert (ROOT / TINY.lora[0].partition(":")[0]).stat().st_size <= 1.5e6
    pipeline = UltraPixelPipeline.from_config(TINY.config_c, TINY.config_b, None, CPU)
    loras = load_loras(TINY.lora, pipeline.config_c)
    assert loras[0].tokens == ["[stripes]"]
    pipeline.set_loras(loras)

    def found(words: str) -> float:
        cases = []
        for case in held_out_cases(4, 5000):
            scene = replace(case.scene, subject=EXTRA_SUBJECTS[0], size="large")
            prompt = re.sub("striped (hot air )?balloon", words, caption(scene, case.seed))
            cases.append(Case(scene, prompt, case.seed))
        evaluation, view = Evaluation(pipeline, judge, cases, SETTINGS), View("128", (128, 128))
        return evaluation.pictures(view.size, [view], None, lambda *_: None)[0].accuracy.each["subject"]

    assert found("[stripes] balloon") >= 0.75 and found("balloon") == 0


def test_pictures_under_control_keep_given_outlines(pipeline: UltraPixelPipeline) -> None:
    path = TINY.control_file.format(control="canny")
    assert (ROOT / path).stat().st_size <= 2e6
    file = pipeline.set_control(ControlConfig(controlnet_checkpoint_path=path))
    assert (file.filter, file.control_size) == ("canny", 96)
    cases = [replace(case, prompt="") for case in held_out_cases(4, 5000)]
    row, _ = tiny_control.measure(pipeline, cases, (128, 128), CONTROLLED, TINY.control_weight)
    assert row.controlled.f1 > 0.6 and row.controlled.f1 > 2 * row.free.f1


def run(cwd: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "inference" / "test_t2i.py"), *flags]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=240)


def test_the_first_command_of_the_readme_makes_a_picture(tmp_path: Path) -> None:
    done = run(ROOT, "--preset", "tiny", "--prompt", "a red house", "--output_dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.png")
    picture = np.asarray(Image.open(path))
    assert picture.shape == (512, 512, 3) and picture.std() > 10


def test_without_weights_the_way_out_is_named(tmp_path: Path) -> None:
    for name in ("configs", "models/tiny"):
        shutil.copytree(ROOT / name, tmp_path / name)
    done = run(tmp_path, "--prompt", "a red house")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "models/stage_c_bf16.safetensors" in done.stderr and "models/download.py" in done.stderr
    assert "--preset tiny runs now" in done.stderr
