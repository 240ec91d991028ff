"""The pipeline on a family of random weights: what a picture depends on, and what it does not."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import random_pipeline
from random_family import Family
from torch import Tensor

from core.config.settings import Job, Settings
from core.pipeline.offload import Offloaded, Placement
from core.pipeline.passes import NoiseSource, needs_unconditional, tensor_float32
from core.pipeline.pipeline import UltraPixelPipeline
from core.pipeline.progress import Progress
from core.pipeline.resolution import plan_for
from core.weights.checkpoint import config_metadata, read_tensors, save_tensors
from gdf.names import SAMPLER_NAMES
from modules.guidance import Guidance

QUICK = Settings(steps=2, steps_b=2)


@pytest.fixture(scope="module")
def pipeline(family_folder: Path) -> UltraPixelPipeline:
    return random_pipeline(family_folder)


def make(pipeline: UltraPixelPipeline, job: Job, settings: Settings = QUICK) -> Tensor:
    (picture,) = pipeline.run([job], settings)
    return picture.pixels


JOB = Job("a red boat", 192, 256, seed=7)


@pytest.mark.parametrize("size", [(192, 256), (129, 201), (64, 300)])
def test_the_size_is_exactly_what_was_asked(pipeline: UltraPixelPipeline, size: tuple[int, int]) -> None:
    pixels = make(pipeline, Job("a boat", *size, seed=1))
    assert pixels.shape == (3, *size)
    assert pixels.dtype == torch.float32
    assert 0 <= float(pixels.min()) <= float(pixels.max()) <= 1
    assert float(pixels.std()) > 0.01


def test_a_seed_repeats_its_picture_whatever_else_is_made(pipeline: UltraPixelPipeline) -> None:
    alone = make(pipeline, replace(JOB, seed=8))
    pictures = pipeline("a red boat", 192, 256, seed=7, num_images=2, settings=QUICK)
    assert [p.job.seed for p in pictures] == [7, 8]
    assert torch.equal(pictures[1].pixels, alone)
    assert not torch.equal(pictures[0].pixels, alone)


@pytest.mark.parametrize(
    "change", [{"prompt": "a blue boat"}, {"negative_prompt": "fog"}, {"seed": 9}, {"width": 260}]
)
def test_what_a_picture_depends_on(pipeline: UltraPixelPipeline, change: dict) -> None:
    other = make(pipeline, replace(JOB, **change))[:, :192, :256]
    assert not torch.equal(make(pipeline, JOB), other)


def test_guidance_and_its_noise_condition_change_the_picture(family_folder: Path) -> None:
    guided, unguided = random_pipeline(family_folder), random_pipeline(family_folder, guided=False)
    plain = make(guided, JOB)
    assert not torch.equal(plain, make(unguided, JOB))
    assert not torch.equal(plain, make(guided, JOB, replace(QUICK, guidance_r="last_step")))
    assert torch.equal(plain, make(guided, JOB, replace(QUICK, guidance_r=0.05)))
    assert not torch.equal(plain, make(guided, JOB, replace(QUICK, guidance_unconditional=0.0)))
    idle = [replace(QUICK, cfg=1.0, guidance_unconditional=share) for share in (1.0, -2.0)]
    assert torch.equal(*(make(guided, JOB, settings) for settings in idle))


def write_bilinear(family_folder: Path, path: Path, upsampling: str = "bilinear") -> None:
    """Random guidance that upsamples bilinearly; its metadata says `upsampling`."""
    torch.manual_seed(0)
    sizes = replace(Family().guidance, upsampling="bilinear")
    guidance = Guidance(**asdict(sizes))
    guidance.init_weights()
    metadata = config_metadata({**asdict(sizes), "upsampling": upsampling})
    save_tensors(path, guidance.state_dict(), metadata)


def test_how_the_guidance_upsamples_is_told_by_its_file(family_folder: Path, tmp_path: Path) -> None:
    write_bilinear(family_folder, tmp_path / "guidance.safetensors")
    configs = family_folder / "stage_c.yaml", family_folder / "stage_b.yaml"
    bilinear = UltraPixelPipeline.from_config(*configs, tmp_path / "guidance.safetensors")
    assert bilinear.guidance_sizes.upsampling == "bilinear"
    assert not torch.equal(make(bilinear, JOB), make(random_pipeline(family_folder), JOB))


def test_the_scales_that_a_training_showed_are_told_by_its_file(family_folder: Path, tmp_path: Path) -> None:
    guided = random_pipeline(family_folder)
    sizes, path = guided.guidance_sizes, tmp_path / "guidance.safetensors"
    tensors = read_tensors(family_folder / "ultrapixel_t2i.safetensors")
    assert sizes.scale_sides == ()
    square = replace(JOB, width=JOB.height)
    side = plan_for(guided.config_c, JOB.height, JOB.height).hr_latent[0]
    configs = family_folder / "stage_c.yaml", family_folder / "stage_b.yaml"
    pictures = []
    for sides in ([side, 2 * side], [side + 1, 2 * side]):
        save_tensors(path, tensors, config_metadata({**asdict(sizes), "scale_sides": sides}))
        pipeline = UltraPixelPipeline.from_config(*configs, path)
        assert pipeline.guidance_sizes.scale_sides == tuple(sides)
        pictures.append(make(pipeline, square))
    assert torch.equal(pictures[0], make(guided, square))
    save_tensors(path, tensors, config_metadata({**asdict(sizes), "scale_sides": "12"}))
    with pytest.raises(ValueError, match=r"guidance.safetensors: its 'scale_sides' must be a list"):
        _ = UltraPixelPipeline.from_config(*configs, path).guidance_sizes
    assert not torch.equal(pictures[1], pictures[0])


def test_an_upsampling_of_another_program_is_named(family_folder: Path, tmp_path: Path) -> None:
    write_bilinear(family_folder, tmp_path / "guidance.safetensors", upsampling="cubic")
    configs = family_folder / "stage_c.yaml", family_folder / "stage_b.yaml"
    pipeline = UltraPixelPipeline.from_config(*configs, tmp_path / "guidance.safetensors")
    with pytest.raises(ValueError, match="upsamples by 'cubic', which is not known here: implicit, bilinear"):
        make(pipeline, JOB)


@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
def test_every_sampler_makes_a_picture(pipeline: UltraPixelPipeline, sampler: str) -> None:
    pixels = make(pipeline, JOB, replace(QUICK, sampler=sampler, sampler_b=sampler))
    assert torch.isfinite(pixels).all()


def test_tiles_do_not_show(pipeline: UltraPixelPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make(pipeline, JOB)
    monkeypatch.setattr("modules.stage_a.MAX_TILE", 24)
    monkeypatch.setattr("core.pipeline.passes.MAX_TILE", 24)
    torch.testing.assert_close(make(pipeline, JOB), whole, atol=1e-4, rtol=0)


def test_the_unconditional_half_is_computed_only_where_it_counts(
    pipeline: UltraPixelPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    stage_c = pipeline.stage_c.module
    predict = stage_c.predict

    def counted(x: Tensor, *rest: object, **named: object) -> Tensor:
        sizes.append(len(x))
        return predict(x, *rest, **named)

    monkeypatch.setattr(stage_c, "predict", counted)
    make(pipeline, JOB, replace(QUICK, cfg=1.0))
    assert set(sizes) == {1}
    sizes.clear()
    make(pipeline, JOB, replace(QUICK, cfg_interval=(0.0, 0.6)))
    assert sizes == [1, 2, 1, 2]
    assert needs_unconditional(replace(QUICK, cfg=1.0, cfg_b=1.0)) == (False, False)


def test_stages_are_loaded_once_and_only_when_needed(family_folder: Path) -> None:
    pipeline = random_pipeline(family_folder)
    pipeline.encode_text([JOB])
    assert pipeline.stage_c._module is None
    make(pipeline, JOB)
    first = pipeline.stage_c.module
    make(pipeline, JOB)
    assert pipeline.stage_c.module is first


def test_the_observer_sees_every_step_of_every_stage(pipeline: UltraPixelPipeline) -> None:
    seen: list[Progress] = []
    pipeline.run([JOB], Settings(steps=3, steps_b=2), seen.append)
    counts = {p.stage: sum(q.stage == p.stage for q in seen) for p in seen}
    assert counts == {"stage C, low resolution": 3, "stage C, high resolution": 3, "stage B": 2, "stage A": 1}
    assert [use.name for use in pipeline.uses.values()] == ["text", "stage C", "stage B", "stage A"]


def test_noise_is_a_function_of_seed_and_pass_alone() -> None:
    cpu = torch.device("cpu")
    draws = [NoiseSource.of(seed, stream, cpu).draw(64) for seed in (0, 1, -1, 2**63) for stream in (0, 1, 2)]
    assert all(not torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])
    assert torch.equal(draws[4], NoiseSource.of(1, 1, cpu).draw(64))
    expected = torch.tensor(
        [NoiseSource.of(5, 0, cpu).draw(1000).mean(), NoiseSource.of(5, 0, cpu).draw(1000).std()]
    )
    torch.testing.assert_close(expected, torch.tensor([0.0, 1.0]), atol=0.12, rtol=0)


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"steps_b": -1}, "steps_b must be"),
        ({"shift": 0.0}, "shift must be above 0"),
        ({"guidance_r": 1.5}, "guidance_r must lie"),
        ({"guidance_r": "first"}, "'first'"),
        ({"guidance_unconditional": math.inf}, "guidance_unconditional must be a number, not inf"),
        ({"sampler": "unheard of"}, "'unheard of'.*ddpm"),
        ({"cfg_interval": (0.8, 0.2)}, "interval"),
    ],
)
def test_settings_out_of_range_are_named(values: dict, part: str) -> None:
    with pytest.raises(ValueError, match=part):
        Settings(**values)


def test_the_guidance_takes_the_last_step_only_at_twenty() -> None:
    assert Settings().extra_guidance_r is None
    assert Settings(steps=12).extra_guidance_r == 0.05
    assert Settings(steps=12, guidance_r="last_step").extra_guidance_r is None
    assert Settings(guidance_r=0.2).extra_guidance_r == 0.2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_makes_the_same_picture_and_is_empty_afterwards(family_folder: Path) -> None:
    on_gpu = random_pipeline(family_folder, device="cuda")
    pixels = make(on_gpu, JOB)
    torch.testing.assert_close(pixels, make(random_pipeline(family_folder), JOB), atol=0.02, rtol=0)
    assert all(p.device.type == "cpu" for p in on_gpu.stage_c.module.parameters())


def test_offloading_gives_the_weights_their_place_back() -> None:
    linear = torch.nn.Linear(3, 3)
    places = [p.data_ptr() for p in linear.parameters()]
    offloaded = Offloaded(lambda *_: linear, Placement(torch.device("meta")))
    with pytest.raises(RuntimeError, match="stop"), offloaded.on_device() as module:
        assert all(p.is_meta for p in module.parameters())
        raise RuntimeError("stop")
    assert [p.data_ptr() for p in linear.parameters()] == places


def test_tf32_is_allowed_within_a_block_alone() -> None:
    kinds = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [kind.fp32_precision for kind in kinds]
    with pytest.raises(RuntimeError, match="in between"), tensor_float32(True):
        assert [kind.fp32_precision for kind in kinds] == ["tf32", "tf32"]
        raise RuntimeError("in between")
    assert [kind.fp32_precision for kind in kinds] == before
    with tensor_float32(False):
        assert [kind.fp32_precision for kind in kinds] == before
