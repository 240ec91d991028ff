"""train/train_personalized.py: LoRA and new tokens from a few photographs, and what it leaves."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from itertools import islice, repeat
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from PIL import Image
from skimage import data as photographs
from training_lesson import (
    STAGE_C,
    distance,
    exit_code,
    figures,
    losses,
    recorded,
    state,
    torchrun,
    train,
    write_lesson,
)

sys.path[:0] = [str(ROOT / "train"), str(ROOT / "figures"), str(ROOT / "benchmarks")]
import draw_examples  # noqa: E402
import train_personalized  # noqa: E402
from training_memory import Job, allocator_growth, estimate, prepare  # noqa: E402

from core.config.schema import LatentGeometry, PersonalizedTrainConfig  # noqa: E402
from core.config.sizes import EffnetSizes, GuidanceSizes, StageCSizes  # noqa: E402
from core.config.yaml import load, load_stage_c  # noqa: E402
from core.data.folder import FolderIndex, Sample, index_folder  # noqa: E402
from core.pipeline.conditioning import Conditions  # noqa: E402
from core.training import lora as lora_training  # noqa: E402
from core.training import personalization  # noqa: E402
from core.training.guidance import GuidedStageC, NoisyLatents, SampleNoise, draw_noise, noise_latents  # noqa: E402
from core.training.lora import Networks, load_networks  # noqa: E402
from core.training.personalization import at_every_size  # noqa: E402
from core.training.trainer import StepLoss  # noqa: E402
from core.weights.checkpoint import load_module  # noqa: E402
from core.weights.clip import TextEncoder  # noqa: E402
from core.weights.lora.files import LoraFile  # noqa: E402
from core.weights.lora.names import published_orders  # noqa: E402
from core.weights.lora.reading import read_lora  # noqa: E402
from core.weights.lora.tokens import MergedTokens, matching_rows  # noqa: E402
from gdf.targets import EPSILON  # noqa: E402
from modules.lora import MergedLora  # noqa: E402
from modules.stage_c import StageC  # noqa: E402

SCRIPT = str(ROOT / "train" / "train_personalized.py")
TOKEN, START = "[mycat]", "^[cat]</w>"  # the family's vocabulary has single letters
PROMPT = f"a photo of {TOKEN}"
NO_SHEETS = "previewer_checkpoint_path="
CPU = torch.device("cpu")
main = train_personalized.main


@pytest.fixture(scope="module")
def lesson(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small networks, three photographs in a flat folder without captions, and a configuration."""
    folder = tmp_path_factory.mktemp("personalized")
    write_lesson(folder)
    (folder / "photos").mkdir()
    for name in ("chelsea", "coffee", "rocket"):  # their files are in scikit-image's wheel
        Image.fromarray(getattr(photographs, name)()).save(folder / "photos" / f"{name}.jpg")
    config = yaml.safe_load((folder / "t2i.yaml").read_text())
    config |= {
        "ultrapixel_path": str(folder / "ultrapixel_t2i.safetensors"), "tmp_prompt": PROMPT,
        "webdataset_path": str(folder / "photos"), "train_tokens": [[TOKEN, START]], "lora_rank": 2,
        "multi_aspect_ratio": ["1/1", "2/3"], "image_size_schedule": [[0, [48]], [2, [96, 128]]], "lr": 1e-2,
    }  # fmt: skip
    (folder / "p.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def whole(lesson: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    return train(main, lesson / "p.yaml", tmp_path_factory.mktemp("whole"))


@pytest.fixture
def networks(lesson: Path) -> Networks:
    """Freshly loaded networks, with a LoRA and offsets that are not zero."""
    networks = load_networks(load(PersonalizedTrainConfig, lesson / "p.yaml"), CPU)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in networks.module.parameters():
            parameter.copy_(0.1 * torch.randn_like(parameter))
    return networks


def example(size: int = 4, batch: int = 2) -> tuple[NoisyLatents, torch.Tensor, SampleNoise]:
    """Noisy latents of size x size above those of 2 x 2, no image embeddings, noise that drops nothing."""
    keys = [(0, 0, i) for i in range(batch)]
    noise = draw_noise(keys, (16, size, size), (16, 2, 2))
    noise = replace(noise, drop_text=torch.zeros(batch, dtype=torch.bool))
    torch.manual_seed(1)
    z, z_lr = torch.randn(batch, 16, size, size), torch.randn(batch, 16, 2, 2)
    return noise_latents(z, z_lr, noise, EPSILON), torch.zeros(batch, 1, 16), noise


# --- a run ----------------------------------------------------------------------------------------


def test_photographs_leave_log_checkpoints_sheets_and_a_lora(whole: Path) -> None:
    assert len(losses(whole)) == 4 and all(np.isfinite(losses(whole)))
    names = {path.name for path in whole.iterdir() if path.is_file()}
    kept = {"step_00000002.pt", "step_00000004.pt", "config.yaml", "log.jsonl", "loss_by_logsnr.png"}
    assert names == kept | {"lora.safetensors", ".lock"}
    sheet = Image.open(whole.parents[1] / "samples" / "run" / "step_00000004.jpg")
    assert sheet.size == (4 * 256, 2 * 256)


def test_only_lora_and_offsets_are_trained_and_kept(whole: Path) -> None:
    attention = published_orders(STAGE_C)[0]
    wanted = {f"lora.{name.replace('.', '/')}.{part}" for name in attention for part in ("down", "up")}
    trained = state(whole, 4)
    assert trained.keys() == wanted | {"tokens.offsets"}
    assert all(value.abs().max() > 0 for value in trained.values())


def test_the_file_holds_lora_and_tokens(lesson: Path, whole: Path) -> None:
    lora, trained = read_lora(whole / "lora.safetensors", STAGE_C), state(whole, 4)
    assert set(lora.updates) == set(published_orders(STAGE_C)[0])
    for name, update in lora.updates.items():
        assert update.alpha == 1 and update.rank == 2
        assert torch.equal(update.up, trained[f"lora.{name.replace('.', '/')}.up"])
    tokens = lora.tokens
    encoder = TextEncoder.load(str(lesson), torch.float32)
    assert (tokens.names, tokens.initialise_from) == ((TOKEN,), (START,))
    assert tokens.indices == (len(encoder.tokenizer),) and not tokens.absolute
    assert torch.equal(tokens.values, trained["tokens.offsets"])


def test_run_again_it_continues_as_the_same_training(lesson: Path, whole: Path, tmp_path: Path) -> None:
    """Also from the update at which the sizes change, and within what follows it."""
    for updates in (2, 3, 4):
        folder = train(main, lesson / "p.yaml", tmp_path, f"updates={updates}", NO_SHEETS)
    assert losses(folder) == losses(whole)
    parts, all_at_once = state(folder, 4), state(whole, 4)
    assert all(torch.equal(parts[name], value) for name, value in all_at_once.items())


def test_a_schedule_goes_on_by_updates_in_however_many_parts() -> None:
    """As of a run that goes on with another number of processes."""
    config = SimpleNamespace(image_size_schedule=((0, (48,)), (2, (96,))), grad_accum_steps=4)

    def sizes(_run: object, sizes: tuple[int], _start: object = None) -> Iterator[tuple[int, None]]:
        yield from repeat((sizes[0], None))

    with mock.patch.object(personalization, "phase_batches", sizes):
        position = {"count": 2, "inner": None, "steps": 2}  # after one update of two parts
        seen = islice(personalization.scheduled_batches(SimpleNamespace(config=config), position), 6)
        assert [size for size, _ in seen] == [48] * 4 + [96] * 2


def test_two_processes_train_like_one(lesson: Path, tmp_path: Path) -> None:
    """With prior preservation, and fewer pictures than a batch."""
    prior = (f"prior_path={lesson / 'pictures'}", "prior_weight=0.5", "updates=3", NO_SHEETS)
    paths = (f"checkpoint_path={tmp_path / 'checkpoints'}", f"output_path={tmp_path / 'samples'}")
    done = torchrun(SCRIPT, str(lesson / "p.yaml"), *paths, *prior)
    assert done.returncode == 0, done.stderr[-3000:]
    two = tmp_path / "checkpoints" / "run"
    one = train(main, lesson / "p.yaml", tmp_path / "one", *prior)
    for name in ("loss", "grad_norm"):
        numbers = ([line[name] for line in figures(folder)] for folder in (two, one))
        assert next(numbers) == pytest.approx(next(numbers), rel=1e-3)
    assert distance(state(two, 3), state(one, 3)) < 1e-4


def test_bfloat16_trains_in_float32(lesson: Path, tmp_path: Path) -> None:
    folder = train(main, lesson / "p.yaml", tmp_path, "dtype=bfloat16", "updates=3", "ema=0.9")
    trained = state(folder, 3)
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in trained.values())
    assert trained["tokens.offsets"].any()


def test_the_loss_falls(lesson: Path, tmp_path: Path) -> None:
    sizes = "image_size_schedule=[[0, [48]]]"
    folder = train(
        main, lesson / "p.yaml", tmp_path, sizes, "updates=90", "save_every=90", "lora_rank=4",
        "adaptive_loss_weight=false", NO_SHEETS, "grad_accum_steps=1",
    )  # fmt: skip
    seen = losses(folder)
    assert np.mean(seen[-15:]) < 0.85 * np.mean(seen[:15])


def test_a_lora_goes_on_from_a_file(lesson: Path, whole: Path, tmp_path: Path) -> None:
    start = f"pretrained_path={whole / 'lora.safetensors'}"
    folder = train(main, lesson / "p.yaml", tmp_path, start, NO_SHEETS, "updates=1", "lr=1e-9")
    assert distance(state(folder, 1), state(whole, 4)) < 1e-6
    assert exit_code(main, lesson / "p.yaml", tmp_path / "other", start, "lora_rank=3") == 2


# --- what a step computes -------------------------------------------------------------------------


def merged(lesson: Path, networks: Networks, lora: LoraFile) -> tuple[GuidedStageC, Conditions]:
    """Stage C and the conditions of two prompts as inference has them, with the LoRA merged."""
    build = partial(StageC, **asdict(STAGE_C))
    stage_c = load_module(build, lesson / "stage_c.safetensors", dtype=torch.float32, what="Stage C")
    MergedLora(stage_c, lora.updates)
    encoder = TextEncoder.load(str(lesson), torch.float32)
    MergedTokens(encoder, lora.tokens)
    texts = [encoder.encode([prompt], CPU)[prompt] for prompt in (PROMPT, "a cat")]
    tokens, pooled = torch.cat([t.tokens for t in texts]), torch.cat([t.pooled for t in texts])
    return GuidedStageC(stage_c, networks.module.guidance), Conditions(tokens, pooled, torch.zeros(2, 1, 16))


def test_inference_with_the_file_predicts_what_training_saw(
    lesson: Path, networks: Networks, tmp_path: Path
) -> None:
    """Low-resolution features and prediction, with the LoRA in both passes and the token in the prompt."""
    config = load(PersonalizedTrainConfig, lesson / "p.yaml")
    tensors = networks.module.state_dict()
    lora = lora_training.lora_file(tensors, config, networks.rows)
    lora_training.write_trained(tmp_path / "l.safetensors", lora, "own", networks.encoders.text)
    latents, clip_img, noise = example()
    with torch.no_grad():
        trained = networks.module(latents, [PROMPT, "a cat"], clip_img, noise)
        inference, conditions = merged(lesson, networks, read_lora(tmp_path / "l.safetensors", STAGE_C))
        torch.testing.assert_close(inference(latents, conditions), trained, rtol=1e-4, atol=1e-5)
        plain = load_networks(config, CPU).module(latents, [PROMPT, "a cat"], clip_img, noise)
    assert (plain - trained).norm() > 0.01 * trained.norm()


def gradients(networks: Networks, size: int = 4) -> dict[str, torch.Tensor]:
    latents, clip_img, noise = example(size)
    networks.module.zero_grad()
    networks.module(latents, [PROMPT, "a cat"], clip_img, noise).square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in networks.module.named_parameters()}


def test_checkpointing_gives_the_same_gradients_and_frozen_weights_none(networks: Networks) -> None:
    assert networks.module.stage_c.gradient_checkpointing
    checkpointed = gradients(networks)
    networks.module.stage_c.gradient_checkpointing = False
    for name, gradient in gradients(networks).items():
        assert gradient.any(), name
        torch.testing.assert_close(checkpointed[name], gradient)
    others = (networks.module.stage_c, networks.module.guidance, networks.encoders.text.model)
    trained = {id(parameter) for parameter in networks.module.parameters()}
    assert all(p.grad is None for m in others for p in m.parameters() if id(p) not in trained)


def test_gradients_are_those_of_small_differences(networks: Networks) -> None:
    """Without guidance, whose features carry no gradient."""
    latents, clip_img, noise = example(2)
    offsets, step = networks.module.tokens.offsets, 1e-2
    direction = gradients(networks, 2)["tokens.offsets"]
    expected = direction.norm()
    direction = direction / expected

    def value(distance: float) -> float:
        with torch.no_grad():
            before = offsets.clone()
            offsets.add_(distance * direction)
            result = networks.module(latents, [PROMPT, "a cat"], clip_img, noise).square().mean().double()
            offsets.copy_(before)
        return float(result)

    assert (value(step) - value(-step)) / (2 * step) == pytest.approx(float(expected), rel=0.05)


def test_text_without_new_tokens_is_as_before_bit_for_bit(lesson: Path, networks: Networks) -> None:
    encoder = TextEncoder.load(str(lesson), torch.float32)
    prompts = ["a cat", "", "mycat"]
    with torch.no_grad():
        before = encoder.embed(prompts, CPU)
        after = networks.module.conditions(prompts, torch.zeros(3, 1, 16))
        with_token = networks.module.conditions([PROMPT], torch.zeros(1, 1, 16))
    assert torch.equal(before[0], after.clip_text) and torch.equal(before[1], after.clip_text_pooled)
    assert not torch.allclose(with_token.clip_text_pooled, after.clip_text_pooled[:1])


def test_a_token_starts_from_the_mean_of_what_matches(lesson: Path) -> None:
    networks = load_networks(load(PersonalizedTrainConfig, lesson / "p.yaml"), CPU)
    text = networks.encoders.text
    rows = matching_rows(text.tokenizer, START)
    assert len(rows) == 3
    embedding = text.model.get_input_embeddings()
    (looked_up,) = embedding(torch.tensor(networks.rows))
    torch.testing.assert_close(looked_up, embedding.weight[rows].mean(0))


def test_small_latents_are_not_guided(networks: Networks) -> None:
    calls: list = []
    for size, guided in ((2, 0), (4, 1)):
        latents, clip_img, noise = example(size)
        with recorded(networks.module.guidance, "prepare", calls):
            networks.module(latents, [PROMPT, "a cat"], clip_img, noise)
        assert len(calls) == guided


def test_without_guidance_the_base_alone_is_trained(lesson: Path, tmp_path: Path) -> None:
    folder = train(main, lesson / "p.yaml", tmp_path, "ultrapixel_path=", "updates=3")
    assert len(losses(folder)) == 3


def test_prior_pictures_count_by_their_weight(lesson: Path, tmp_path: Path) -> None:
    """Drawn scenes keep their own captions and have their own noise."""
    made: list[tuple[tuple, StepLoss]] = []
    with recorded(lora_training, "StepLoss", made):
        prior = ("prior_scenes={count: 20}", "prior_weight=0.25", "updates=1", NO_SHEETS)
        train(main, lesson / "p.yaml", tmp_path, *prior)
    counts = [result.counts.tolist() for _, result in made]
    assert counts == [[1.0, 1.0, 0.25, 0.25]] * 2  # micro-batches
    logsnr = made[0][1].logsnr
    assert len(logsnr.unique()) == len(logsnr)


# --- data -----------------------------------------------------------------------------------------


def test_pictures_are_shown_at_every_size_that_does_not_enlarge_them(tmp_path: Path) -> None:
    samples = (Sample("small", "x", 50, 60), Sample("large", "x", 128, 128))
    found = at_every_size(FolderIndex(tmp_path, samples, ()), (64, 96, 160), ("1/1",))
    members = {size: numbers.tolist() for size, numbers in found.members.items()}
    assert members == {(64, 64): [0, 1], (96, 96): [1]}


def test_captions_may_lie_beside_the_pictures(lesson: Path, tmp_path: Path) -> None:
    pictures = shutil.copytree(lesson / "photos", tmp_path / "photos")
    for number, path in enumerate(sorted(pictures.glob("*.jpg"))):
        path.with_suffix(".txt").write_text(f"{PROMPT}, {number}")
    captions = [sample.caption for sample in index_folder(pictures).samples]
    assert captions == [f"{PROMPT}, {number}" for number in range(3)]
    data = (f"webdataset_path={pictures}", "tmp_prompt=", "updates=1", "batch_size=1", "grad_accum_steps=1")
    assert len(losses(train(main, lesson / "p.yaml", tmp_path, *data, NO_SHEETS))) == 1


# --- layouts and errors ---------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["published", "kohya", "peft"])
def test_other_layouts_hold_the_same(lesson: Path, whole: Path, tmp_path: Path, layout: str) -> None:
    tokens = ("train_tokens=[]", "tmp_prompt=a cat") if layout == "peft" else ()
    folder = train(
        main, lesson / "p.yaml", tmp_path, f"lora_layout={layout}", "updates=2", NO_SHEETS, *tokens
    )
    lora = read_lora(folder / ("lora" if layout == "peft" else "lora.safetensors"), STAGE_C)
    trained = state(folder, 2)
    for name, update in lora.updates.items():
        own = f"lora.{name.replace('.', '/')}"
        delta = trained[f"{own}.up"] @ trained[f"{own}.down"] / 2
        torch.testing.assert_close(update.delta(delta.shape), delta)
    if layout == "published":
        assert torch.equal(lora.tokens.values, trained["tokens.offsets"])
    if layout == "kohya":
        encoder = TextEncoder.load(str(lesson), torch.float32)
        mean = encoder.model.get_input_embeddings().weight[matching_rows(encoder.tokenizer, START)].mean(0)
        assert lora.tokens.absolute and lora.tokens.names == (TOKEN,)
        torch.testing.assert_close(lora.tokens.values, mean + trained["tokens.offsets"])


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["train_tokens=[['[mycat]', '^kitten</w>']]"], "'^kitten</w>'"),
        (["tmp_prompt=a cat"], "'[mycat]' of 'train_tokens' is not in 'tmp_prompt'"),
        (["tmp_prompt="], "photos"),
        (["lora_layout=peft"], "'lora_layout' cannot be peft"),
        (["lora_layout=published", "module_filters=[clf]"], "'lora_layout' cannot be published"),
        (["module_filters=[.attention_]"], "'module_filters'"),
        (["use_fsdp=true"], "'use_fsdp'"),
        (["webdataset_path=pictures-{000..001}.tar"], "'webdataset_path'"),
        (["ultrapixel_path=nowhere.safetensors"], "nowhere.safetensors"),
        (["image_size_schedule=[[5, [64]]]"], "'image_size_schedule'"),
        (["prior_path=x", "prior_scenes={count: 2}"], "'prior_scenes'"),
        (["prior_prompt=a cat"], "'prior_prompt'"),
        (["prior_path=nowhere"], "nowhere"),
        (["train_tokens=[['', '^red</w>']]"], "''"),
        (["lora_rank=0"], "'lora_rank'"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    lesson: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], part: str
) -> None:
    assert exit_code(main, lesson / "p.yaml", tmp_path, *overrides) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ") and part in message
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize(
    ("key", "place", "part"),
    [
        ("prior_path", "photos", "(of prior pictures prior_prompt=...) gives all one caption"),
        ("checkpoint_path", "p.yaml", "cannot be the output folder: a file is in its place"),
        ("webdataset_path", "p.yaml", "is no folder of training pictures"),
    ],
)
def test_a_wrong_place_is_told_with_the_way_out(
    lesson: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, place: str, part: str
) -> None:
    assert exit_code(main, lesson / "p.yaml", tmp_path, f"{key}={lesson / place}") == 2
    assert part in capsys.readouterr().err.strip().splitlines()[-1]


def test_another_rank_does_not_continue_the_folder(
    lesson: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, tmp_path / "checkpoints" / "run")
    assert exit_code(main, lesson / "p.yaml", tmp_path, "lora_rank=5") == 2
    assert "another 'lora_rank'" in capsys.readouterr().err


# --- configurations, examples, memory -------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "configs/training/lora_personalization.yaml",
        "configs/tiny/train_personalized.yaml",
    ],
)
def test_shipped_configurations_load_for_training_and_for_inference(path: str) -> None:
    config = load(PersonalizedTrainConfig, ROOT / path)
    lora_training.check_layout(config)
    assert load_stage_c(ROOT / path).generator_checkpoint_path == config.generator_checkpoint_path


def test_the_example_pictures_are_those_that_are_drawn(tmp_path: Path) -> None:
    draw_examples.main(tmp_path)
    folder = ROOT / "figures" / "example_personalized"
    assert {path.name for path in folder.iterdir()} == {path.name for path in tmp_path.iterdir()}
    for path in sorted(folder.glob("*.jpg")):
        pair = (np.asarray(Image.open(p), float) for p in (path, tmp_path / path.name))
        assert abs(next(pair) - next(pair)).mean() < 2
        caption = json.loads(path.with_suffix(".json").read_text())["caption"]
        assert "[stripes] balloon" in caption
        assert caption == json.loads((tmp_path / path.name).with_suffix(".json").read_text())["caption"]
    draw_examples.draw_boat(tmp_path)
    for name in ("boat.png", "mask.png"):
        pair = (np.asarray(Image.open(p / name), float) for p in (folder.parent / "example_given", tmp_path))
        assert abs(next(pair) - next(pair)).mean() < 1


MEMORY_JOB = Job(
    side=192, personalized=True,
    stage_c=StageCSizes(
        c_cond=64, c_hidden=(64, 64), nhead=(2, 2), blocks=((1, 1), (1, 1)), c_clip_text=64,
        c_clip_text_pooled=64,
    ),
    guidance=GuidanceSizes(ind=64, ch=32, n_head=2, head_dim=16, n_groups=4, f_dim=32),
    effnet=EffnetSizes(stem=8, stages=(("fused", 1, 2, 16, 1), ("fused", 2, 2, 16, 1)), head=32),
    geometry=LatentGeometry(stride=8, lr_train_cells=4), text_layers=2, text_vocabulary=100,
)  # fmt: skip


def test_the_memory_of_a_real_step_is_what_was_counted() -> None:
    counted = estimate(MEMORY_JOB, granule=1)
    assert counted.growth == pytest.approx(allocator_growth(MEMORY_JOB), rel=0.03)
    trained = sum(parameter.numel() for parameter in prepare(MEMORY_JOB, "cpu").module.parameters())
    assert counted.gradients == 4 * trained
