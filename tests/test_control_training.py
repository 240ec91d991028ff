"""Training of a ControlNet: by its script on drawn scenes, and what a step sees."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT
from PIL import Image

from core.config.control_types import CONTROL_TYPES
from core.config.schema import ControlConfig, ControlTrainConfig
from core.config.sizes import TINY, ControlNetSizes, StageCSizes
from core.config.yaml import load
from core.pipeline.conditioning import Conditions
from core.pipeline.control import blurred, edges, open_controlnet
from core.training.control import ControlledStageC, check, random_holes, what_is_seen
from core.training.guidance import draw_noise
from core.training.noising import noised
from core.training.run import check_run
from core.weights.checkpoint import load_module, read_tensors
from gdf.targets import V
from modules.controlnet import ControlNet
from modules.stage_c import StageC

SIZES = ControlNetSizes(
    c_in=1, c_proj=192, proj_blocks=(0, 4, 9), stem=8, head=32,
    stages=(("fused", 1, 2, 16, 1), ("fused", 2, 2, 16, 1)),
)  # fmt: skip
SCRIPT = str(ROOT / "train" / "train_ultrapixel_control.py")


def run(folder: Path, name: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    """The script on the embedded family, with a smaller ControlNet."""
    values = yaml.safe_load((ROOT / "configs" / "tiny" / "train_control_canny.yaml").read_text())
    values |= {
        "experiment_id": name, "checkpoint_path": str(folder), "output_path": str(folder / "samples"),
        "scenes": {"count": 8}, "image_size": 64, "control_size": 64, "num_workers": 0, "batch_size": 4,
        "grad_accum_steps": 2, "updates": 3, "save_every": 3, "warmup_updates": 1, "tracker": "none",
        "ema": 0.5, "controlnet": json.loads(json.dumps(asdict(SIZES))), "export_path": None,
        "export_dtype": "float32",
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, SCRIPT, str(path), *overrides]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=240)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three updates."""
    folder = tmp_path_factory.mktemp("control")
    done = run(folder, "control")
    assert done.returncode == 0, done.stderr[-3000:]
    few = "the encoder's norms are over the pictures at once, and 2 are few: use pictures_at_once=4 or more"
    assert done.stderr.count(few) == 1
    return folder


def test_a_run_leaves_a_controlnet_that_tells_its_sizes(trained: Path) -> None:
    path = trained / "control" / "canny.safetensors"
    assert len((trained / "control" / "log.jsonl").read_text().splitlines()) == 3
    file = open_controlnet(ControlConfig(controlnet_checkpoint_path=str(path)), TINY.stage_c)
    assert (file.filter, file.control_size) == ("canny", 64)
    network = load_module(partial(ControlNet, **asdict(file.sizes)), path, dtype=torch.float32, what="c")
    entries = network(torch.rand(1, 1, 64, 64))
    assert [i for i, entry in enumerate(entries) if entry is not None] == [0, 4, 9]
    assert all(entries[i].abs().max() > 0 for i in (0, 4, 9))  # they started from zero
    sheet = Image.open(trained / "samples" / "control" / "step_00000003.jpg")
    assert sheet.size == (4 * 256, 2 * 256)


def test_the_projections_can_be_trained_alone(trained: Path) -> None:
    before = trained / "control" / "canny.safetensors"
    done = run(trained, "projections", f"pretrained_path={before}", "train_encoder=false", "updates=2")
    assert done.returncode == 0 and "are few" not in done.stderr, done.stderr[-3000:]
    old, new = (read_tensors(trained / name / "canny.safetensors") for name in ("control", "projections"))
    for name in old:
        assert torch.equal(old[name], new[name]) == name.startswith("backbone"), name


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("train_encoder=false", "needs 'pretrained_path'"),
        ("effnet_checkpoint_path=", "needs 'effnet_checkpoint_path'"),
        ("use_fsdp=true", "'use_fsdp' is for"),
    ],
)
def test_what_cannot_be_trained_is_told(override: str, part: str) -> None:
    config = load(ControlTrainConfig, ROOT / "configs" / "tiny" / "train_control_canny.yaml", [override])
    with pytest.raises((ValueError, OSError), match=part):
        check(config)


def test_a_controlnet_for_latents_has_no_encoder_of_pictures() -> None:
    published = ROOT / "configs" / "training" / "cfg_control_lr.yaml"
    overrides = ["controlnet_filter=super_resolution", "controlnet.c_in=16", "webdataset_path=pictures"]
    with pytest.raises(ValueError, match="latents, which are too small for 'bottleneck_mode: effnet': use l"):
        check(load(ControlTrainConfig, published, overrides))


def test_a_text_encoder_that_is_not_there_is_told() -> None:
    path = ROOT / "configs" / "tiny" / "train_control_canny.yaml"
    with pytest.raises((ValueError, OSError), match="nowhere"):
        check_run(load(ControlTrainConfig, path, ["clip_text_path=nowhere"]), [])


# --- a step ---------------------------------------------------------------------------------------


KEYS = [(0, 0, i) for i in range(4)]


def test_a_new_controlnet_predicts_as_the_base_and_learns_alone() -> None:
    torch.manual_seed(0)
    sizes = StageCSizes(
        c_cond=32, c_hidden=(32, 32), nhead=(2, 2), blocks=((1, 1), (1, 1)), c_clip_text=16,
        c_clip_text_pooled=16, c_clip_img=16, dropout=(0.0, 0.0),
    )  # fmt: skip
    stage_c = StageC(**asdict(sizes))
    control = ControlNet(**asdict(replace(SIZES, c_proj=32, proj_blocks=(0, 3))))
    control.init_weights()
    controlled = ControlledStageC(stage_c, control)
    noise = draw_noise(KEYS, (16, 8, 8))
    latents = noised(torch.randn(4, 16, 8, 8), noise.t, noise.epsilon, V)
    held = Conditions(torch.randn(4, 5, 16), torch.randn(4, 1, 16), torch.zeros(4, 1, 16))
    seen = torch.rand(4, 1, 64, 64)
    prediction = controlled(latents, held, seen)
    plain = stage_c(latents.x, latents.r, held.clip_text, held.clip_text_pooled, held.clip_img)
    assert torch.equal(prediction, plain)
    (prediction - latents.target).square().mean().backward()
    assert all(p.grad is None for p in stage_c.parameters())
    assert all(projection[-1].weight.grad.any() for projection in control.projections)
    assert {n.split(".")[0] for n, _ in controlled.named_parameters()} == {"control"}


def test_a_backbone_that_is_not_trained_keeps_its_statistics() -> None:
    control = ControlNet(**asdict(SIZES))
    controlled = ControlledStageC(StageC(**asdict(TINY.stage_c)), control, train_encoder=False)
    before = {name: tensor.clone() for name, tensor in control.backbone.state_dict().items()}
    controlled.train()
    control(torch.rand(2, 1, 64, 64))
    assert all(torch.equal(tensor, before[name]) for name, tensor in control.backbone.state_dict().items())
    assert not any(p.requires_grad for p in control.backbone.parameters())
    assert control.projections.training and all(p.requires_grad for p in control.projections.parameters())


def test_holes_depend_on_the_samples_keys_alone() -> None:
    holes = random_holes([(0, 0, i) for i in range(64)], 48, 64)
    assert holes.shape == (64, 1, 48, 64) and set(holes.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(random_holes([(0, 0, 5)], 48, 64)[0], holes[5])
    shares = holes.mean(dim=(1, 2, 3))
    assert (shares > 0).all() and (shares < 1).all()
    assert shares.std() > 0.1
    assert 0.2 < (shares > 0.5).float().mean() < 0.7  # those that are inverted


def test_each_filter_gives_what_its_controlnet_sees() -> None:
    images = torch.rand(4, 3, 64, 96)
    shapes = {}
    for kind in (name for name, known in CONTROL_TYPES.items() if known.training):
        seen, shown = what_is_seen(kind, 64, lambda x: x.mean(1, keepdim=True).expand(-1, 16, -1, -1))(
            images, KEYS
        )
        shapes[kind] = seen.shape[1]
        assert shown.shape == images.shape
        if kind == "canny":
            assert torch.equal(seen, edges(images, 64))
        if kind == "tile":
            assert torch.equal(seen, blurred(images)) and torch.equal(seen, shown)
    assert shapes == {"canny": 1, "inpainting": 4, "super_resolution": 16, "tile": 3}


def test_what_cannot_be_made_of_pictures_is_not_trained() -> None:
    with pytest.raises(ValueError, match="a ControlNet for depth cannot be trained here"):
        what_is_seen("depth", None, lambda x: x)
