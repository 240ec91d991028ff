"""The evaluation on held-out scenes: its distances, its crops, its judge, and the script."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, random_pipeline
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from core.commands.flags import run
from core.config.settings import Settings
from core.config.sizes import EffnetSizes
from core.family.evaluation import (
    CROPS,
    WINDOWS,
    Case,
    Evaluation,
    Judge,
    View,
    crops,
    detail,
    enlarge,
    frechet_between,
    frechet_distance,
    held_out_cases,
    psnr,
    real_picture,
    shares,
    stage_a_round_trip,
)
from core.family.evaluation_run import make_series
from core.pictures.images import read_image_metadata
from core.pipeline.resolution import plan
from core.scenes.labelled import blur
from core.scenes.scene import ATTRIBUTES, is_held_out
from core.weights.checkpoint import load_module, read_config, save_tensors
from modules.effnet import EfficientNetEncoder
from modules.recogniser import Recogniser

SCRIPT = ROOT / "inference" / "evaluate.py"
TRAINED = ROOT / "models" / "tiny" / "recogniser.safetensors"
CPU = torch.device("cpu")
SIZE = (128, 128)


def samples(seed: int, count: int = 40, width: int = 6) -> Tensor:
    """Features with correlations, around a mean of their own."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, width, generator=generator) @ torch.randn(width, width, generator=generator)
    return mixed + torch.randn(width, generator=generator)


# --- distances ------------------------------------------------------------------------------------


def test_the_distance_of_diagonal_gaussians_has_a_closed_form() -> None:
    mean_a, mean_b = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 2.0, 5.0])
    a, b = torch.tensor([4.0, 0.25, 0.0]), torch.tensor([1.0, 9.0, 2.0])
    expected = (mean_a - mean_b).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    found = frechet_between(mean_a, a.diag(), mean_b, b.diag())
    assert found == pytest.approx(expected.item(), rel=1e-6)


def test_the_distance_is_that_of_the_samples_moments() -> None:
    a, b = samples(0), samples(1)
    covariances = a.double().T.cov(), b.double().T.cov()
    root = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp(min=0).sqrt().sum()
    apart = (a.double().mean(0) - b.double().mean(0)).square().sum()
    expected = apart + covariances[0].trace() + covariances[1].trace() - 2 * root
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("count", [1, 2, 4, 40])  # fewer than features: singular covariances
def test_the_distance_is_symmetric_and_zero_only_between_equals(count: int) -> None:
    for seed in range(5):
        a, b = samples(2 * seed, count), samples(2 * seed + 1, count)
        there, back = frechet_distance(a, b), frechet_distance(b, a)
        assert there > 0 and there == pytest.approx(back, rel=1e-6)
        assert 0 <= frechet_distance(a, a) < 1e-5
        assert 0 <= frechet_distance(a, a.flip(0)) < 1e-5


def test_a_common_shift_and_rotation_leave_the_distance() -> None:
    a, b = samples(0).double(), samples(1).double()
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator())).Q
    moved = [x @ rotation + 7 for x in (a, b)]
    assert frechet_distance(*moved) == pytest.approx(frechet_distance(a, b), rel=1e-9)


def test_psnr_in_decibels() -> None:
    picture = torch.full((3, 4, 4), 0.5)
    assert psnr(picture, picture + 0.1) == pytest.approx(20, abs=1e-4)


def test_shares_name_the_worst_attribute() -> None:
    truth = torch.zeros(4, len(ATTRIBUTES), dtype=torch.long)
    answers = truth.clone()
    answers[0, 1] = answers[:2, 3] = 1
    found = shares(answers, truth)
    assert found.worst == "subject" and found.each["subject"] == 0.5 and found.each["light"] == 0.75
    assert found.mean == pytest.approx((5 + 0.5 + 0.75) / 7)


# --- cases and crops ------------------------------------------------------------------------------


def test_cases_are_held_out_and_follow_from_their_seeds() -> None:
    cases = held_out_cases(6, 10)
    assert [case.seed for case in cases] == list(range(10, 16))
    assert all(is_held_out(case.scene) for case in cases)
    assert cases[2:] == held_out_cases(4, 12)


@pytest.mark.parametrize(
    ("size", "side"), [((512, 384), 128), ((256, 300), 128), ((255, 300), 127), ((64, 96), 32)]
)
def test_crops_lie_at_the_same_places_in_every_picture(size: tuple[int, int], side: int) -> None:
    rows, columns = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    places = torch.stack([rows, columns, rows]).float()
    found = crops(places, 3)
    assert found.shape == (CROPS, 3, side, side)
    assert found.equal(crops(places, 3)) and (crops(places + 1, 3) - 1).equal(found)
    assert not found.equal(crops(places, 4))
    assert ((found[:, :, -1, -1] - found[:, :, 0, 0]) == side - 1).all()
    assert len(set(map(tuple, found[:, :2, 0, 0].tolist()))) > 1


# --- judging --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judge() -> Judge:
    if not TRAINED.is_file():
        pytest.skip("models/tiny has no recogniser")
    build = partial(Recogniser, **read_config(TRAINED))
    return Judge(load_module(build, TRAINED, dtype=torch.float32, what="recogniser"), CPU)


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return held_out_cases(12, 100)


def test_real_renderings_are_right_and_at_no_distance(judge: Judge, cases: list[Case]) -> None:
    seen = [judge.look(real_picture(case.scene, SIZE), case.seed) for case in cases]
    found = judge.measure(View("real", SIZE), cases, seen, 18.0)
    assert found.accuracy.mean > 0.97
    assert found.frechet < 1e-4 and found.patch_frechet < 1e-4
    assert (found.count, found.seconds, found.few_pictures) == (12, 1.5, True)


def test_pictures_of_other_scenes_are_wrong_and_blurred_ones_are_far(judge: Judge, cases: list[Case]) -> None:
    view = View("worse", SIZE)
    pictures = [real_picture(case.scene, SIZE) for case in cases]
    others = [judge.look(picture, case.seed) for picture, case in zip(pictures, cases[::-1], strict=True)]
    assert judge.measure(view, cases, others[::-1], 0).accuracy.mean < 0.8
    distances = []
    for sigma in (1.0, 3.0):
        blurred = [blur(picture[None], sigma)[0] for picture in pictures]
        seen = [judge.look(picture, case.seed) for picture, case in zip(blurred, cases, strict=True)]
        distances.append(judge.measure(view, cases, seen, 0).patch_frechet)
    assert 0.01 < distances[0] < distances[1]


def test_detail_tells_sharp_pictures_from_enlarged_ones(cases: list[Case]) -> None:
    sharp = torch.stack([real_picture(case.scene, (256, 256))[:, 64:192, 64:192] for case in cases])
    small = [real_picture(case.scene, (64, 64)) for case in cases]
    dull = torch.stack([enlarge(picture, (256, 256))[:, 64:192, 64:192] for picture in small])
    same = frechet_distance(detail(sharp[::2]), detail(sharp[1::2]))
    assert frechet_distance(detail(sharp), detail(dull)) > 2 * same


def torn(picture: Tensor, seed: int) -> Tensor:
    """A picture whose strong edges are displaced by up to a few pixels, another way every eight."""
    height, width = picture.shape[-2:]
    noise = torch.randn(1, 2, height // 8, width // 8, generator=torch.Generator().manual_seed(seed))
    shift = 4 * F.interpolate(noise, size=(height, width), mode="bicubic")[0]
    change = (picture - F.avg_pool2d(picture, 3, 1, 1)).abs().sum(dim=0) > 0.15
    shift = shift * F.max_pool2d(change[None].float(), 9, 1, 4)
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    grid = torch.stack([2 * (x + shift[0]) / width - 1, 2 * (y + shift[1]) / height - 1], dim=-1)
    return F.grid_sample(picture[None], grid[None], padding_mode="border", align_corners=False)[0]


def test_the_patches_distance_sees_torn_outlines(judge: Judge) -> None:
    real = [real_picture(case.scene, (256, 256)) for case in held_out_cases(24, 0)]
    whole = torch.cat([judge.look(x, i).crops for i, x in enumerate(real)])
    shreds = torch.cat([judge.look(torn(x, i), i).crops for i, x in enumerate(real)])
    others = slice(-len(WINDOWS))  # the other features hardly mind
    assert frechet_distance(shreds, whole) > 3 * frechet_distance(shreds[:, others], whole[:, others])
    assert (shreds - whole).mean(dim=0)[-len(WINDOWS) :].min() > 0.3


def test_a_picture_of_nan_is_refused(judge: Judge) -> None:
    with pytest.raises(ValueError, match="seed 4 holds NaN"):
        judge.look(torch.full((3, 64, 64), float("nan")), 4)


def test_pictures_are_enlarged_only_where_the_size_differs() -> None:
    picture = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0)).round()
    assert enlarge(picture, (20, 30)) is picture
    larger = enlarge(picture, (80, 120))
    assert larger.shape == (3, 80, 120) and 0 <= larger.min() and larger.max() <= 1


def test_stage_a_takes_pictures_of_any_size(family_folder: Path) -> None:
    pipeline = random_pipeline(family_folder)
    sizes = plan(67, 101, pipeline.config_c.geometry)
    again = stage_a_round_trip(pipeline.stage_a.module, torch.rand(3, 67, 101), sizes)
    assert again.shape == (3, 67, 101)


def test_a_picture_does_not_depend_on_its_group(judge: Judge, family_folder: Path) -> None:
    """The scene of a seed gives the same picture whichever others are measured with it."""
    settings, made = Settings(steps=1, steps_b=1), {}

    def keep(view: View, case: Case, pixels: Tensor) -> None:
        made.setdefault(case.seed, []).append(pixels)

    for cases in (held_out_cases(2, 5), held_out_cases(1, 6)):
        evaluation = Evaluation(random_pipeline(family_folder), judge, cases, settings)
        (found,) = evaluation.pictures((64, 64), [View("made", (64, 64))], None, keep)
        assert found.seconds > 0 and found.count == len(cases)
    assert made[6][0].equal(made[6][1]) and not made[5][0].equal(made[6][0])


# --- the script -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_encoder(family_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random family's configuration of Stage C with an encoder."""
    folder = tmp_path_factory.mktemp("encoder")
    sizes = EffnetSizes(stem=8, stages=(("fused", 2, 2, 8, 1), ("fused", 2, 2, 8, 1)), head=16)
    save_tensors(folder / "effnet.safetensors", EfficientNetEncoder(**asdict(sizes)).state_dict(), {})
    config = yaml.safe_load((family_folder / "stage_c.yaml").read_text("utf-8"))
    config["effnet_checkpoint_path"] = str(folder / "effnet.safetensors")
    config["effnet"] = json.loads(json.dumps(asdict(sizes)))
    (folder / "stage_c.yaml").write_text(yaml.safe_dump(config), "utf-8")
    return folder / "stage_c.yaml"


def flags(family: Path, **named: object) -> list[str]:
    """The script's flags for the random family; a True is a flag without a value, None leaves one out."""
    values = {
        "config_c": family / "stage_c.yaml", "config_b": family / "stage_b.yaml",
        "pretrained_path": family / "ultrapixel_t2i.safetensors", "height": 64, "width": 96, "num_image": 2,
        "steps": 1, "steps_b": 1, **named,
    }  # fmt: skip
    return [
        part
        for name, value in values.items()
        if value is not None
        for part in ([f"--{name}"] if value is True else [f"--{name}", str(value)])
    ]


def test_the_script_writes_a_table_figures_and_sheets(
    judge: Judge, family_folder: Path, with_encoder: Path, tmp_path: Path
) -> None:
    named = {"config_c": with_encoder, "height": 136, "width": 144, "seed": 7, "output_dir": tmp_path}
    command = [sys.executable, str(SCRIPT), *flags(family_folder, round_trip=True, compare=True, **named)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "136 x 144, round trip: 100%" in done.stderr
    names = ["136 x 144", "128 x 136, enlarged to 136 x 144", "136 x 144, without guidance"]
    for text in (*names, "accuracy", "subject", "round trip of real pictures", "few pictures", "world"):
        assert text in done.stdout
    figures = json.loads((tmp_path / "figures.json").read_text("utf-8"))
    assert [row["view"]["name"] for row in figures["pictures"]] == names
    main, *baselines = figures["pictures"]
    assert main["few_pictures"] and main["patch_ratio"] is None and 0 < main["seconds"]
    for row in baselines:
        assert row["patch_ratio"] == pytest.approx(row["patch_frechet"] / main["patch_frechet"])
    assert main["patch_frechet"] != baselines[1]["patch_frechet"]  # guidance acts
    assert figures["run"]["settings"]["steps"] == 1 and figures["run"]["seed"] == 7
    assert len(figures["run"]["weights"]) == 6
    (trip,) = figures["round_trips"]
    assert trip["size"] == [136, 144] and 0 < trip["psnr"] < 60 and 0 <= trip["kept"]["mean"] <= 1
    sheets = {path.name for path in tmp_path.glob("*.png")}
    assert sheets == {
        "136_x_144.png",
        "128_x_136_enlarged_to_136_x_144.png",
        "136_x_144_without_guidance.png",
    }
    prompts = [case.prompt for case in held_out_cases(2, 7)]
    assert read_image_metadata(tmp_path / "136_x_144.png")["prompts"] == prompts
    assert Image.open(tmp_path / "136_x_144.png").width > 2 * 384


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable]:
    """What the script defines."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.chdir(ROOT)
    return runpy.run_path(str(SCRIPT))


@pytest.mark.parametrize(
    ("named", "parts"),
    [
        ({"recogniser": "no/judge.safetensors"}, ["no/judge.safetensors", "does not exist", "--recogniser"]),
        ({"recogniser": "models/tiny/stage_a.safetensors"}, ["stage_a.safetensors", "no recogniser"]),
        ({"height": 7}, ["height", "7"]),
        ({"width": None}, ["--height", "--width", "both"]),
        ({"num_image": 0}, ["--num_image", "0"]),
        ({"steps": 0}, ["steps", "0"]),
        ({"compare": True}, ["--compare", "64 x 96"]),
        ({"round_trip": True}, ["--round_trip", "effnet_checkpoint_path"]),
        ({"pretrained_path": "nowhere.safetensors"}, ["nowhere.safetensors", "does not exist"]),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    judge: Judge,
    script: dict[str, Callable],
    family_folder: Path,
    capsys: pytest.CaptureFixture[str],
    named: dict[str, object],
    parts: list[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(lambda: script["main"](flags(family_folder, **named)))
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error:") and all(part in line for part in parts)


def test_the_embedded_family_is_measured_at_both_sizes_and_others_at_their_own(
    script: dict[str, Callable],
) -> None:
    sizes = {name: script["asked_sizes"](script["parse"](["--preset", name])) for name in ("tiny", "lite")}
    assert sizes == {"tiny": [(128, 128), (512, 512)], "lite": [(2048, 2048)]}
    series = make_series(sizes["tiny"], compare=True, guided=True)
    assert [(s.size, s.guided, len(s.views)) for s in series] == [
        ((128, 128), True, 2), ((512, 512), True, 1), ((512, 512), False, 1),
    ]  # fmt: skip
    assert len(make_series(sizes["tiny"], compare=True, guided=False)) == 2
