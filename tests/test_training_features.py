"""What trainings do beside the loop: learn, shard weights, keep caches, and tell what is wrong in time."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from conftest import ROOT
from PIL import Image, ImageChops
from random_family import Family
from safetensors.torch import load_file
from training_lesson import (
    CAPTIONS,
    STAGE_C,
    calibrated_encoder,
    distance,
    exit_code,
    figures,
    load_encoder,
    losses,
    pictures_of,
    recorded,
    save_encoder,
    save_previewer,
    state,
    torchrun,
    train,
)

sys.path.insert(0, str(ROOT / "train"))
import train_stage_c  # noqa: E402
import train_t2i  # noqa: E402

from core.config.schema import StageCTrainConfig  # noqa: E402
from core.config.settings import Settings  # noqa: E402
from core.config.yaml import load  # noqa: E402
from core.data.cache import Cache, cached_batches, fill  # noqa: E402
from core.data.loader import LoaderSettings  # noqa: E402
from core.data.sources import open_data, stream  # noqa: E402
from core.pipeline.passes import NoiseSource, low_resolution_pass  # noqa: E402
from core.pipeline.pipeline import UltraPixelPipeline  # noqa: E402
from core.training import guidance as guidance_training
from core.training import log as training_log  # noqa: E402
from core.training import stage_c as stage_c_training
from core.training.encoders import Encoders  # noqa: E402
from core.weights.checkpoint import load_module, read_tensors  # noqa: E402
from core.weights.layouts import guidance_names  # noqa: E402
from modules.guidance import Guidance  # noqa: E402
from modules.stage_c import StageC  # noqa: E402

STAGE_C_SCRIPT = str(ROOT / "train" / "train_stage_c.py")
EXPORT_C, EXPORT_T2I = "stage_c.safetensors", "ultrapixel_t2i.safetensors"
LEARNT = 0.6  # relative error of a sampled latent, measured 0.31 at most; to another picture it is over 1.3


def cache_files(folder: Path) -> list[Path]:
    """Samples in the cache of a test."""
    return sorted((folder / "cache").rglob("*.safetensors"))


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line of standard error."""
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def stage_c_run(lesson: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of Stage C."""
    return train(train_stage_c.main, lesson / "c.yaml", tmp_path_factory.mktemp("stage_c"))


@pytest.fixture(scope="module")
def t2i_run(lesson: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the guidance."""
    return train(train_t2i.main, lesson / "t2i.yaml", tmp_path_factory.mktemp("t2i"))


# --- Stage C --------------------------------------------------------------------------------------


def test_stage_c_resumes_bit_for_bit(lesson: Path, stage_c_run: Path, tmp_path: Path) -> None:
    for updates in (3, 4):
        folder = train(train_stage_c.main, lesson / "c.yaml", tmp_path, f"updates={updates}")
    assert losses(folder) == losses(stage_c_run)
    parts, whole = state(folder, 4), state(stage_c_run, 4)
    assert all(torch.equal(parts[name], value) for name, value in whole.items())


def test_stage_c_exports_what_inference_takes(lesson: Path, stage_c_run: Path, tmp_path: Path) -> None:
    path = stage_c_run / EXPORT_C
    stage_c = load_module(partial(StageC, **asdict(STAGE_C)), path, dtype=torch.float32, what="Stage C")
    trained = state(stage_c_run, 4)
    assert all(torch.equal(value, trained[name]) for name, value in stage_c.state_dict().items())
    config = yaml.safe_load((lesson / "stage_c.yaml").read_text()) | {"generator_checkpoint_path": str(path)}
    (tmp_path / "stage_c.yaml").write_text(yaml.safe_dump(config))
    pipeline = UltraPixelPipeline.from_config(tmp_path / "stage_c.yaml", lesson / "stage_b.yaml", None, "cpu")
    (picture,) = pipeline("one", 64, 64, seed=0, num_images=1, settings=Settings(steps=1, steps_b=1))
    assert picture.pixels.shape == (3, 64, 64)


def test_samples_are_drawn_without_dropout(lesson: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((lesson / "c.yaml").read_text())
    config["stage_c"]["dropout"] = [0.5, 0.5]
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    passes: list = []
    with recorded(stage_c_training, "low_resolution_pass", passes):
        train(train_stage_c.main, tmp_path / "c.yaml", tmp_path, "updates=2", "save_every=1")
    (stage_c, held, *others), (sampled, _) = passes[-1]
    stage_c.eval()
    others[-1] = NoiseSource.of(1, 0, torch.device("cpu"))  # the second of the two on the sheet
    with torch.no_grad():
        again, _ = low_resolution_pass(stage_c, held, *others)
    assert torch.equal(again.x0, sampled.x0)


def test_a_tiny_stage_c_learns_four_pictures(lesson: Path, tmp_path: Path) -> None:
    """Each caption's sample is its own picture: relative error below LEARNT, far from the other three."""
    encoder = load_encoder(lesson / "effnet.safetensors")
    pictures = pictures_of(lesson / "pictures")
    previewer = save_previewer(tmp_path / "previewer.safetensors", encoder, pictures)
    rows: list = []
    with recorded(stage_c_training, "preview_row", rows):
        train(
            train_stage_c.main, lesson / "c.yaml", tmp_path, f"previewer_checkpoint_path={previewer}",
            f"cache_path={tmp_path / 'cache'}", "updates=400", "save_every=400", "batch_size=32",
            "grad_accum_steps=1", "lr=5e-3", "lr_end=1e-5", "warmup_updates=20", "adaptive_loss_weight=false",
            "gradient_checkpointing=false",
        )  # fmt: skip
    pairs = [inputs[2] for inputs, _ in rows[: len(CAPTIONS)]]  # a batch repeats the four pictures in turn
    real, sampled = (torch.cat(column).flatten(1) for column in zip(*pairs, strict=True))
    apart = torch.cdist(sampled, real) / real.norm(dim=1)  # (sample, picture)
    assert apart.diag().max() < LEARNT, apart
    others = apart + torch.diag(torch.full((len(CAPTIONS),), torch.inf))
    assert (apart.diag() < others.min(dim=1).values / 2).all(), apart


# --- weights sharded over processes ---------------------------------------------------------------


def test_sharded_training_equals_one_process(lesson: Path, tmp_path: Path) -> None:
    """Also sampling, running means, and resuming, by as many processes or by one."""
    settings = ("ema=0.5", "save_every=1", "lr=1e-2", "keep=9")
    sharded = (STAGE_C_SCRIPT, str(lesson / "c.yaml"), *settings, "use_fsdp=true")

    def in_two(folder: Path, updates: int) -> Path:
        paths = (f"checkpoint_path={folder / 'checkpoints'}", f"output_path={folder / 'samples'}")
        done = torchrun(*sharded, *paths, f"updates={updates}")
        assert done.returncode == 0, done.stderr[-3000:]
        return folder / "checkpoints" / "run"

    one = train(train_stage_c.main, lesson / "c.yaml", tmp_path / "one", *settings)
    two = in_two(tmp_path / "two", 3)
    assert losses(two) == pytest.approx(losses(one)[:3], rel=1e-4)
    norms = ([line["grad_norm"] for line in figures(folder)[:3]] for folder in (two, one))
    assert next(norms) == pytest.approx(next(norms), rel=1e-3)
    assert distance(state(two, 3), state(one, 3)) < 1e-4
    sheets = [
        Image.open(tmp_path / name / "samples" / "run" / "step_00000003.jpg") for name in ("one", "two")
    ]
    assert max(high for _, high in ImageChops.difference(*sheets).getextrema()) <= 16
    shutil.copytree(tmp_path / "two", tmp_path / "three")
    train(train_stage_c.main, lesson / "c.yaml", tmp_path / "three", *settings)
    in_two(tmp_path / "two", 4)
    for name in ("two", "three"):
        folder = tmp_path / name / "checkpoints" / "run"
        assert losses(folder) == pytest.approx(losses(one), rel=1e-4)
        assert distance(state(folder, 4), state(one, 4)) < 1e-4
        assert distance(read_tensors(folder / EXPORT_C), read_tensors(one / EXPORT_C)) < 1e-4


# --- the cache of latents -------------------------------------------------------------------------


def test_a_cache_gives_the_same_training(lesson: Path, t2i_run: Path, tmp_path: Path) -> None:
    encoded: list = []
    with recorded(Encoders, "encode", encoded):
        cached = f"cache_path={tmp_path / 'cache'}"
        folder = train(train_t2i.main, lesson / "t2i.yaml", tmp_path, cached)
    seen = sum(len(inputs[1].captions) for inputs, _ in encoded)
    assert seen == guidance_training.PREVIEWED + len(CAPTIONS)  # in 16 samples, once each, and the sheet's
    assert losses(folder) == pytest.approx(losses(t2i_run), rel=1e-5)
    assert len(cache_files(tmp_path)) == len(CAPTIONS)


def test_a_filled_cache_is_read_instead_of_pictures(lesson: Path, tmp_path: Path) -> None:
    pictures = shutil.copytree(lesson / "pictures", tmp_path / "pictures")
    config = load(StageCTrainConfig, str(lesson / "c.yaml"), [f"webdataset_path={pictures}"])
    data, settings = open_data(config), LoaderSettings(batch_size=2, num_workers=0)
    cache = Cache(tmp_path / "cache", "encoder", seed=0)
    expected = [batch.images.mean((1, 2, 3)) for batch, _ in islice(stream(data, settings), 6)]
    left = list(fill(data, cache, settings, lambda batch: {"z": batch.images.mean((1, 2, 3))}))
    assert (left[0], left[-1]) == (4, 0)
    for path in pictures.glob("*.png"):
        times = path.stat().st_atime_ns, path.stat().st_mtime_ns
        path.write_bytes(bytes(path.stat().st_size))
        os.utime(path, ns=times)
    assert list(fill(data, cache, settings, pytest.fail)) == [0]
    batches = [batch["z"] for batch, _ in islice(cached_batches(data, cache, settings), 6)]
    assert all(torch.equal(a, b) for a, b in zip(batches, expected, strict=True))


def test_another_encoder_has_its_own_cache_files(lesson: Path, tmp_path: Path) -> None:
    save_encoder(tmp_path / "other.safetensors", calibrated_encoder(pictures_of(lesson / "pictures"), seed=1))
    cached = f"cache_path={tmp_path / 'cache'}"
    for name, encoder in (("a", lesson / "effnet.safetensors"), ("b", tmp_path / "other.safetensors")):
        named = f"effnet_checkpoint_path={encoder}"
        train(train_t2i.main, lesson / "t2i.yaml", tmp_path / name, cached, named, "updates=1")
    assert len(cache_files(tmp_path)) == 2 * len(CAPTIONS)


def test_broken_pictures_are_left_out_of_a_cache(
    lesson: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pictures = shutil.copytree(lesson / "pictures", tmp_path / "pictures")
    whole = (pictures / "0.png").read_bytes()
    (pictures / "cut.png").write_bytes(whole[: len(whole) // 2])
    (pictures / "cut.txt").write_text("cut off")
    data = (f"webdataset_path={pictures}", f"cache_path={tmp_path / 'cache'}")
    folder = train(train_t2i.main, lesson / "t2i.yaml", tmp_path, *data, "max_broken=0.5")
    assert len(cache_files(tmp_path)) == len(CAPTIONS) and len(losses(folder)) == 4
    assert "skipped cut.png" in caplog.text
    assert exit_code(train_t2i.main, lesson / "t2i.yaml", tmp_path / "strict", *data, "max_broken=0.1") == 2


def test_a_cache_that_is_no_folder_is_told_before_anything_loads(
    lesson: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cached = f"cache_path={lesson / 't2i.yaml'}"
    assert exit_code(train_t2i.main, lesson / "t2i.yaml", tmp_path, cached, "updates=1") == 2
    (told,) = capsys.readouterr().err.strip().splitlines()
    assert told == f"error: {lesson / 't2i.yaml'} cannot be the output folder: a file is in its place"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_cache_file_is_told_in_one_sentence(
    lesson: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    overrides = (f"cache_path={tmp_path / 'cache'}", f"num_workers={workers}")
    train(train_t2i.main, lesson / "t2i.yaml", tmp_path, *overrides, "updates=1")
    for path in cache_files(tmp_path):
        path.write_bytes(path.read_bytes()[:-9])
    assert exit_code(train_t2i.main, lesson / "t2i.yaml", tmp_path, *overrides) == 2
    message = last_line(capsys)
    assert message.startswith(f"error: {tmp_path / 'cache'}") and "damaged" in message


# --- the exported layout --------------------------------------------------------------------------


def test_the_published_layout_is_what_inference_takes(lesson: Path, t2i_run: Path, tmp_path: Path) -> None:
    folder = train(train_t2i.main, lesson / "t2i.yaml", tmp_path, "export_layout=published")
    published, own = load_file(folder / EXPORT_T2I), load_file(t2i_run / EXPORT_T2I)
    first = sum(map(sum, STAGE_C.blocks))
    assert {name[: len("module.4.")] for name in published} == {f"module.{first}.", f"module.{first + 1}."}
    unused = [name for name in published if "hr_norm.alpha" in name or "hr_norm.gamma" in name]
    blocks = {name.rsplit(".", 3)[0] for name in unused}
    assert len(unused) == 4 * len(blocks) and all(not published[name].any() for name in unused)
    build = partial(Guidance, **asdict(Family().guidance))
    loaded = load_module(
        build, folder / EXPORT_T2I, dtype=torch.float32, what="guidance", translate=guidance_names
    )
    assert own.keys() == loaded.state_dict().keys()
    assert all(torch.equal(own[name], value) for name, value in loaded.state_dict().items())


# --- the log --------------------------------------------------------------------------------------


def test_the_log_has_a_line_per_update_after_a_kill(lesson: Path, t2i_run: Path, tmp_path: Path) -> None:
    folder = train(train_t2i.main, lesson / "t2i.yaml", tmp_path, "updates=2")
    with (folder / "log.jsonl").open("a") as stream:  # what a run logs beyond its last checkpoint
        stream.write('{"loss": 7.0, "step": 3}\n{"loss": 8.0, "step": 4}\n{"loss": 9.0, "st')
    train(train_t2i.main, lesson / "t2i.yaml", tmp_path)
    assert [line["step"] for line in figures(folder)] == [1, 2, 3, 4]
    assert losses(folder) == losses(t2i_run)


def test_the_loss_by_noise_level_is_a_picture(t2i_run: Path) -> None:
    with Image.open(t2i_run / training_log.CURVE) as picture:
        assert picture.convert("L").getextrema() != (255, 255) and picture.size == (700, 400)


# --- trackers and optimisers ----------------------------------------------------------------------


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_told(
    lesson: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tracker: str
) -> None:
    with mock.patch.object(training_log, "find_spec", return_value=None):
        assert exit_code(train_t2i.main, lesson / "t2i.yaml", tmp_path, f"tracker={tracker}") == 2
        assert last_line(capsys) == f"error: tracker {tracker} needs a package: pip install {tracker}"
        train(train_t2i.main, lesson / "t2i.yaml", tmp_path, "tracker=auto", "updates=1")


def test_the_fused_optimiser_trains_alike(lesson: Path, t2i_run: Path, tmp_path: Path) -> None:
    folder = train(train_t2i.main, lesson / "t2i.yaml", tmp_path, "optimizer=adamw_fused")
    assert torch.load(folder / "step_00000004.pt")["optimizer"]["param_groups"][0]["fused"]
    assert losses(folder) == pytest.approx(losses(t2i_run), rel=1e-4)
    assert distance(state(folder, 4), state(t2i_run, 4)) < 1e-4


def test_the_8_bit_optimiser_names_its_package(
    lesson: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with mock.patch.dict(sys.modules, {"bitsandbytes": None, "bitsandbytes.optim": None}):
        assert exit_code(train_t2i.main, lesson / "t2i.yaml", tmp_path, "optimizer=adamw_8bit") == 2
    assert last_line(capsys) == "error: optimizer adamw_8bit needs a package: pip install bitsandbytes"


# --- another network, another folder --------------------------------------------------------------


@pytest.mark.parametrize(
    "override", ["guidance={ind: 64, ch: 64, n_head: 4, head_dim: 16, n_groups: 8, f_dim: 32}", "target=v"]
)
def test_a_folder_of_another_network_is_refused_before_models_load(
    lesson: Path, t2i_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str
) -> None:
    folder = shutil.copytree(t2i_run, tmp_path / "checkpoints" / "run")
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with mock.patch.object(guidance_training, "build", side_effect=AssertionError("models load")):
        assert exit_code(train_t2i.main, lesson / "t2i.yaml", tmp_path, override) == 2
    message = last_line(capsys)
    assert str(folder) in message and f"another '{override.split('=')[0]}'" in message
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_a_run_of_the_guidance_goes_on_when_its_file_names_tokens_of_loras(
    lesson: Path, t2i_run: Path, tmp_path: Path
) -> None:
    shutil.copytree(t2i_run, tmp_path / "checkpoints" / "run")
    folder = train(
        train_t2i.main, lesson / "t2i.yaml", tmp_path, "train_tokens=[['[x]', '^a</w>']]", "updates=5"
    )
    assert len(losses(folder)) == 5


@pytest.mark.parametrize("before", [True, False], ids=["of an earlier version", "of this one"])
def test_a_run_goes_on_with_other_scale_sides(
    lesson: Path, t2i_run: Path, tmp_path: Path, before: bool
) -> None:
    own = shutil.copytree(t2i_run, tmp_path / "checkpoints" / "run") / "config.yaml"
    values = yaml.safe_load(own.read_text("utf-8"))
    assert values["guidance"].pop("scale_sides") == []
    if before:
        own.write_text(yaml.safe_dump(values, sort_keys=False), "utf-8")
    folder = train(train_t2i.main, lesson / "t2i.yaml", tmp_path, "guidance.scale_sides=[2,4]", "updates=5")
    assert len(losses(folder)) == 5


def test_a_folder_that_cannot_be_written_to_is_one_sentence(
    lesson: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("not a folder")
    with mock.patch.object(guidance_training, "build", side_effect=AssertionError("models load")):
        assert exit_code(train_t2i.main, lesson / "t2i.yaml", tmp_path / "file") == 2
    message = last_line(capsys)
    assert message.startswith("error: ") and str(tmp_path / "file") in message
