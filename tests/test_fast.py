"""The fast mode: inner maps that steps share, products in float8, and the flags for both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import random_pipeline
from PIL import Image
from torch import nn

from core.commands.flags import parse_with_preset, picture_parser, settings_of
from core.config.settings import FAST, Job, Settings
from core.pictures.images import save_image
from core.pipeline.passes import needs_unconditional
from core.pipeline.pipeline import UltraPixelPipeline
from core.pipeline.resolution import plan
from modules import fp8
from modules.blocks import ResBlock
from modules.fp8 import Fp8Linear, products_in_fp8, to_fp8
from modules.unet import InnerMaps

SIZE = 256
QUICK = Settings(steps=4, steps_b=1)


def latent(pipeline: UltraPixelPipeline, settings: Settings) -> torch.Tensor:
    """Stage C's latent of a picture."""
    jobs = [Job("a house", SIZE, SIZE, 1)]
    sizes = [plan(SIZE, SIZE, pipeline.config_c.geometry)]
    return pipeline.run_stage_c(jobs, sizes, pipeline.encode_text(jobs), settings)[0]


def test_inner_maps_are_made_anew_after_so_many_steps_and_for_more_samples() -> None:
    inner, made = InnerMaps(3), []
    for step, samples in enumerate([2, 2, 2, 2, 1, 2, 1, 2]):
        if (kept := inner.of(samples)) is None:
            made.append(step)
            inner.keep(torch.full((samples, 1), float(step)))
        else:
            assert len(kept) == samples and kept[0, 0] == made[-1]
    assert made == [0, 3, 6, 7]  # step 6 keeps one sample, step 7 needs two


def test_steps_share_the_inner_levels(family_folder: Path) -> None:
    pipeline = random_pipeline(family_folder)
    stage_c = pipeline.stage_c.module
    calls: list[str] = []
    for name, block in (("inner", stage_c.up_blocks[0][0]), ("outer", stage_c.down_blocks[0][0])):
        block.register_forward_hook(lambda *_, name=name: calls.append(name))
    alone = latent(pipeline, QUICK)
    assert (calls.count("inner"), calls.count("outer")) == (9, 9)  # 4 + 4 steps, and the guidance's own
    calls.clear()
    shared = latent(pipeline, replace(QUICK, reuse=2))
    assert (calls.count("inner"), calls.count("outer")) == (7, 9)
    assert not torch.equal(alone, shared)
    assert torch.equal(latent(pipeline, replace(QUICK, reuse=1)), alone)


def test_the_low_resolution_pass_has_its_own_number_of_steps(family_folder: Path) -> None:
    pipeline = random_pipeline(family_folder)
    assert Settings(steps=4).steps_low == 4 and Settings(steps=4, steps_lr=20).extra_guidance_r is None
    calls: list[int] = []
    pipeline.stage_c.module.down_blocks[0][0].register_forward_hook(lambda *_: calls.append(1))
    latent(pipeline, replace(QUICK, steps_lr=2))
    assert len(calls) == 2 + 1 + 4


def test_float8_is_exact_up_to_its_rounding() -> None:
    rows = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 5)[:, None]
    rows[2] = 0
    rounded, scales = to_fp8(rows)
    smallest = rows.abs().amax(1, keepdim=True) / 2**16
    assert ((rounded.float() * scales - rows).abs() <= rows.abs() / 16 + smallest).all()
    layer = nn.Linear(32, 16)
    x = torch.randn(2, 3, 32)
    exact, found = layer(x), Fp8Linear(layer)(x)
    assert found.shape == exact.shape and 0 < (found - exact).norm() < 0.06 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_gpus_product_gets_only_what_it_takes(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    def scaled_mm(a, b, scale_a, scale_b, *, bias, out_dtype):
        """The rules of the product whose every row has a scale."""
        assert a.dtype == b.dtype == fp8.FLOAT8 and out_dtype == torch.bfloat16
        assert a.is_contiguous() and b.t().is_contiguous()
        assert bias is None or bias.dtype == torch.bfloat16
        y = (a.float() * scale_a) @ (b.float() * scale_b)
        return (y if bias is None else y + bias.float()).to(out_dtype)

    def missing(dtype: torch.dtype) -> None:
        raise NotImplementedError(f"no kernel for {dtype}")

    torch.manual_seed(0)
    layer, x = nn.Linear(32, 16).to(dtype), torch.randn(5, 7, 32, dtype=dtype)
    rounded = Fp8Linear(layer)
    simulated = rounded(x)
    monkeypatch.setattr(torch, "_scaled_mm", lambda *_, **named: missing(named["out_dtype"]))
    fp8._tried.cache_clear()
    assert not fp8._tried(torch.device("cpu"))
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    fp8._tried.cache_clear()
    assert fp8._tried(torch.device("cpu"))
    monkeypatch.setattr(fp8, "CHUNK", 100)  # three rows at a time
    rounded.computes = True
    found = rounded(x)
    assert found.dtype == dtype and found.shape == simulated.shape
    assert (found - simulated).float().norm() < 0.01 * simulated.float().norm()


def test_layers_are_what_they_were_after_a_pass_in_float8(family_folder: Path) -> None:
    stage_c = random_pipeline(family_folder).stage_c.module
    blocks = [block.channelwise for block in stage_c.modules() if isinstance(block, ResBlock)]
    before = [list(layers) for layers in blocks]
    with pytest.raises(RuntimeError, match="in between"), products_in_fp8(stage_c, "on"):
        assert any(isinstance(layer, Fp8Linear) for layers in blocks for layer in layers)
        raise RuntimeError("in between")
    assert [list(layers) for layers in blocks] == before
    with products_in_fp8(stage_c, "auto"):  # a CPU has no such products
        assert [list(layers) for layers in blocks] == before


def test_float8_changes_a_picture_a_little(family_folder: Path) -> None:
    pipeline = random_pipeline(family_folder)
    exact, rounded = (latent(pipeline, replace(QUICK, fp8=fp8)) for fp8 in ("off", "on"))
    assert 0 < (exact - rounded).std() < 0.3 * exact.std()


def test_fast_gives_the_flags_that_are_not_given() -> None:
    def settings(*given: str) -> Settings:
        return settings_of(parse_with_preset(picture_parser(None), ["--prompt", "a", *given]))

    assert settings("--fast") == Settings(**FAST)
    slower = settings("--fast", "--steps", "30", "--fp8", "off")
    assert slower == Settings(**{**FAST, "steps": 30, "fp8": "off"})
    assert settings() == Settings()
    assert needs_unconditional(Settings(**FAST)) == (True, False)


def test_fast_counts_beside_the_settings_of_a_picture(tmp_path: Path) -> None:
    stored = {"prompt": "a", "steps": 7, "cfg": 3.0}
    path = save_image(Image.new("RGB", (64, 64)), tmp_path / "a.png", "png", stored)
    known = parse_with_preset(picture_parser(None), ["--from_image", str(path), "--fast"])
    assert settings_of(known) == Settings(**FAST, cfg=3.0)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [({"reuse": 0}, "reuse must be at least 1, not 0"), ({"steps_lr": 0}, "steps_lr must be at least 1"),
     ({"fp8": "yes"}, "'yes'.*off, auto, on"), ({"reuse": 1.5}, "reuse")],
)  # fmt: skip
def test_wrong_values_are_told(wrong: dict, sentence: str) -> None:
    with pytest.raises((ValueError, TypeError), match=sentence):
        Settings(**wrong)
