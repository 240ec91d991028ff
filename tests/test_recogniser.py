"""The recogniser of scenes: the network, its data, its training, and the trained file."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import Tensor

from core.config.schema import SceneData
from core.scenes.labelled import CLASSES, COLOUR, EXTRA_EVERY, LabelledScenes, blur, degrade
from core.scenes.scene import ATTRIBUTES, EXTRA_SUBJECTS
from core.weights.checkpoint import load_module, read_config
from modules.recogniser import UNLABELLED, Recogniser, accuracies, attribute_losses

SCRIPT = ROOT / "train" / "train_recogniser.py"
CONFIG = ROOT / "configs" / "tiny" / "train_recogniser.yaml"
TRAINED = ROOT / "models" / "tiny" / "recogniser.safetensors"
SIZE = (128, 128)
CHECKED = 60


def load(path: Path) -> Recogniser:
    build = partial(Recogniser, **read_config(path))
    return load_module(build, path, dtype=torch.float32, what="the recogniser")


# --- network --------------------------------------------------------------------------------------


def test_it_gives_logits_of_every_attribute_and_features() -> None:
    torch.manual_seed(0)
    recogniser = Recogniser(CLASSES).eval()
    x = torch.rand(2, 3, *SIZE)
    assert [tuple(row.shape) for row in recogniser(x)] == [(2, count) for count in CLASSES]
    features = recogniser.features(x)
    assert features.shape == (2, 64)
    assert all(a.equal(b) for a, b in zip(recogniser.heads(features), recogniser(x), strict=True))


def test_pictures_of_other_sizes_are_resized_with_antialiasing() -> None:
    torch.manual_seed(0)
    recogniser = Recogniser(CLASSES).eval()
    small = torch.rand(1, 3, *SIZE)
    large = torch.nn.functional.interpolate(small, size=(512, 512), mode="bilinear", align_corners=False)
    reduced = torch.nn.functional.interpolate(large, size=SIZE, mode="bilinear", antialias=True)
    assert recogniser.features(large).allclose(recogniser.features(reduced), atol=1e-5)
    assert recogniser.features(torch.rand(1, 3, 96, 160)).shape == (1, 64)


def test_what_has_no_label_does_not_count() -> None:
    logits = [torch.zeros(2, 4), torch.tensor([[9.0, 0.0], [9.0, 0.0]])]
    labels = torch.tensor([[1, 0], [UNLABELLED, 1]])
    expected = torch.tensor([np.log(4), 9.0], dtype=torch.float32)
    assert attribute_losses(logits, labels).allclose(expected, atol=1e-3)
    assert accuracies(logits, labels) == [0.0, 0.5]


# --- data -----------------------------------------------------------------------------------------


def test_scenes_are_drawn_with_their_labels_and_some_show_the_extra_subject() -> None:
    data = LabelledScenes(SceneData(count=48, scales=(1, 2)), (SIZE,))
    picture = data.read(5, SIZE, (0, 5))
    assert picture.pixels.shape == (3, *SIZE) and picture.pixels.dtype == torch.uint8
    rows = data.labels([picture.name, str(EXTRA_EVERY)])
    assert rows.shape == (2, len(ATTRIBUTES))
    assert all(0 <= label < count for label, count in zip(rows[0].tolist(), CLASSES, strict=True))
    assert data.scene(EXTRA_EVERY).subject == EXTRA_SUBJECTS[0] and rows[1, COLOUR] == UNLABELLED


def test_degraded_pictures_follow_from_their_key() -> None:
    data = LabelledScenes(SceneData(), (SIZE,), degraded=1.0)
    assert data.read(3, SIZE, (0, 3)).pixels.equal(data.read(3, SIZE, (0, 3)).pixels)
    x = torch.rand(1, 3, *SIZE)
    for seed in range(8):
        y = degrade(x, np.random.default_rng(seed))
        assert y.shape == x.shape and 0 <= y.min() and y.max() <= 1


def test_a_blur_keeps_what_is_even_and_spreads_a_point() -> None:
    assert blur(torch.full((2, 3, 20, 30), 0.4), 1.5).allclose(torch.tensor(0.4))
    point = torch.zeros(1, 3, 41, 41)
    point[..., 20, 20] = 1
    spread = blur(point, 1.5)[0, 0]
    places = torch.arange(41.0) - 20
    assert spread.sum().item() == pytest.approx(1, abs=1e-5)
    assert (spread.sum(0) * places**2).sum().sqrt().item() == pytest.approx(1.5, abs=0.05)


# --- training -------------------------------------------------------------------------------------


def test_a_run_writes_a_file_that_loads(tmp_path: Path) -> None:
    export = tmp_path / "recogniser.safetensors"
    overrides = [
        f"checkpoint_path={tmp_path / 'run'}", f"output_path={tmp_path}", f"export_path={export}",
        "updates=2", "batch_size=4", "num_workers=0",
        "recogniser={c_hidden: [8, 8, 8, 8], blocks: [0, 1, 0, 0], c_features: 8}",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(CONFIG), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "held-out pictures, plain: mean" in done.stderr
    assert load(export).features(torch.rand(1, 3, 64, 64)).shape == (1, 8)


# --- the trained file -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> Recogniser:
    if not TRAINED.is_file():
        pytest.skip("models/tiny has no recogniser")
    return load(TRAINED)


@pytest.fixture(scope="module")
def unseen() -> tuple[Tensor, Tensor]:
    """Held-out pictures and their labels."""
    data = LabelledScenes(SceneData(split="held_out"), (SIZE,))
    pixels = [data.read(number, SIZE, (0,)).pixels for number in range(CHECKED)]
    return torch.stack(pixels) / 255, data.labels([str(number) for number in range(CHECKED)])


@pytest.mark.parametrize(("sigma", "least"), [(None, 0.99), (1.5, 0.97)])
def test_held_out_pictures_are_recognised(
    trained: Recogniser, unseen: tuple[Tensor, Tensor], sigma: float | None, least: float
) -> None:
    images, labels = unseen
    shares = accuracies(trained(images if sigma is None else blur(images, sigma)), labels)
    assert sum(shares) / len(shares) >= least, dict(zip(ATTRIBUTES, shares, strict=True))


def test_the_file_is_small() -> None:
    if TRAINED.is_file():
        assert TRAINED.stat().st_size < 0.8e6
