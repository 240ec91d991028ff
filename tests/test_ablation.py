"""benchmarks/ablation.py: its variants of the guidance, and the script on a family of random weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, random_pipeline
from PIL import Image
from torch import Tensor

from core.commands.flags import run
from core.config.settings import Job, Settings
from core.config.sizes import EffnetSizes, GuidanceSizes
from core.training.guidance import draw_noise, noise_latents
from core.weights.checkpoint import save_tensors
from gdf.targets import V
from modules.effnet import EfficientNetEncoder
from modules.guidance import Guidance, GuidanceFeatures

SCRIPT = ROOT / "benchmarks" / "ablation.py"
sys.path.insert(0, str(SCRIPT.parent))
from ablation import RECOGNISER, Row, main, make_row, parse, trained, training_of  # noqa: E402
from ablation_report import MISSING, Found, table  # noqa: E402
from guidance_variants import VARIANTS, OwnTimePipeline, Variant, start  # noqa: E402

GUIDED = {variant.name: variant for variant in VARIANTS if variant.guided}
SIZES = GuidanceSizes(ind=32, ch=16, n_head=2, head_dim=8, n_groups=4, f_dim=16, scale_sides=(3, 12))
SIDE, PICTURES = 64, 2
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


def make(variant: Variant) -> Guidance:
    torch.manual_seed(0)
    guidance = Guidance(**asdict(SIZES))
    guidance.init_weights()
    return start(variant, guidance, SIZES)


def guide(guidance: Guidance, size: tuple[int, int]) -> Tensor:
    """What the guidance adds at the first site to random maps of a size."""
    generator = torch.Generator().manual_seed(0)
    features = GuidanceFeatures(tuple(torch.randn(2, 32, 3, 4, generator=generator) for _ in range(4)))
    prepared = guidance.prepare(features, [size] * 4)
    x, r_embed = torch.randn(2, 32, *size, generator=generator), torch.randn(2, 64, generator=generator)
    return torch.stack([prepared.fuse(site, x, r_embed) - x for site in range(4)])


# --- the variants ---------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", GUIDED.values(), ids=GUIDED)
def test_a_variant_trains_all_its_parameters_from_the_common_start(variant: Variant) -> None:
    guidance, full = make(variant), dict(make(GUIDED["full"]).named_parameters())
    own = {n for n, p in guidance.named_parameters() if n not in full or full[n].shape != p.shape}
    assert all(torch.equal(p, full[n]) for n, p in guidance.named_parameters() if n not in own)
    assert all("convolution" in name for name in own) and bool(own) == (variant.upsampling == "bilinear")
    guide(guidance, (6, 8)).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in guidance.parameters())
    names = " ".join(name for name, _ in guidance.named_parameters())
    assert ("wtokens" in names) == (variant.upsampling == "implicit") == ("convolution" not in names)
    assert ("hr_norm" in names) == variant.scale_aware


def test_variants_differ_in_what_they_add_but_hardly_in_how_much() -> None:
    added = {name: guide(make(variant), (6, 8)).detach() for name, variant in GUIDED.items()}
    assert added["own_t"].equal(added["full"]) and added["t_05"].equal(added["full"])
    assert not any(block.max_frequency == 1024 for block in make(GUIDED["low_frequencies"]).down)
    rest = [value for name, value in added.items() if name not in ("own_t", "t_05")]
    assert all(not a.allclose(b) for i, a in enumerate(rest) for b in rest[:i])
    assert all(value.std() == pytest.approx(float(added["full"].std()), rel=0.15) for value in rest)


def test_the_low_resolution_is_noised_at_the_asked_time() -> None:
    noise = draw_noise([(0, 0, i) for i in range(3)], (16, 6, 8), (16, 6, 8))
    z, target = torch.randn(3, 16, 6, 8), V
    own = noise_latents(z, z, replace(noise, epsilon_lr=noise.epsilon), target, noise.t)
    assert own.x_lr.equal(own.x) and own.r_lr.equal(own.r)
    half, default = noise_latents(z, z, noise, target, 0.5), noise_latents(z, z, noise, target)
    assert half.r_lr.tolist() == pytest.approx([0.5] * 3, abs=1e-5)
    assert half.x.equal(default.x) and not half.x_lr.allclose(default.x_lr)
    assert default.r_lr.tolist() == pytest.approx([0.05] * 3, abs=1e-5)


def test_guided_at_its_own_time_a_single_step_is_the_ordinary_one(family_folder: Path) -> None:
    ordinary = random_pipeline(family_folder)
    files = (family_folder / name for name in ("stage_c.yaml", "stage_b.yaml", "ultrapixel_t2i.safetensors"))
    own, jobs = OwnTimePipeline.from_config(*files), [Job("x", SIDE, 96, 3)]
    for steps, alike in ((1, True), (2, False)):
        settings = Settings(steps=steps, steps_b=1, guidance_r="last_step")
        (a,), (b,) = (pipeline.run(jobs, settings) for pipeline in (ordinary, own))
        assert a.pixels.allclose(b.pixels, atol=1e-5) == alike


# --- the script -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flags(family_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """For one update and two small pictures of the random family."""
    if not (ROOT / RECOGNISER).is_file():
        pytest.skip("models/tiny has no recogniser")
    folder = tmp_path_factory.mktemp("ablation")
    sizes = EffnetSizes(stem=8, stages=(("fused", 2, 2, 8, 1), ("fused", 2, 2, 8, 1)), head=16)
    save_tensors(folder / "effnet.safetensors", EfficientNetEncoder(**asdict(sizes)).state_dict(), {})
    config = yaml.safe_load((family_folder / "stage_c.yaml").read_text("utf-8"))
    config |= {
        "effnet_checkpoint_path": str(folder / "effnet.safetensors"),
        "effnet": json.loads(json.dumps(asdict(sizes))), "scenes": {"count": 8}, "num_workers": 0,
        "experiment_id": "t2i", "checkpoint_path": "checkpoints", "output_path": "samples",
        "grad_accum_steps": 1, "warmup_updates": 0, "ema": 0.9,
        "guidance": {**(config["guidance"] or {}), "scale_sides": [1, 50]},
    }  # fmt: skip
    (folder / "t2i.yaml").write_text(yaml.safe_dump(config), "utf-8")
    named = {
        "config": folder / "t2i.yaml", "config_c": family_folder / "stage_c.yaml",
        "config_b": family_folder / "stage_b.yaml", "folder": folder / "run", "figure": folder / "a.png",
        "updates": 1, "batch_size": 2, "num_image": PICTURES, "num_loss": 3, "side": SIDE, "train_side": SIDE,
        "seeds": 0,
    }  # fmt: skip
    return [part for name, value in named.items() for part in (f"--{name}", str(value))]


def folder_of(flags: list[str]) -> Path:
    return Path(flags[flags.index("--folder") + 1])


def row_of(flags: list[str], name: str = "full", seed: int = 0, **changes: object) -> Row:
    config = replace(training_of(parse(flags)), seed=seed, **changes)
    return make_row(GUIDED[name] if name in GUIDED else VARIANTS[0], config, parse(flags))


def test_the_script_compares_all_variants_and_keeps_what_it_has(
    flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(flags)
    command, environment = [sys.executable, str(SCRIPT), *flags], {**os.environ, **ENVIRONMENT}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(f"| {variant.label} |" in done.stdout for variant in VARIANTS)
    assert done.stdout == (folder / "table.md").read_text("utf-8") and MISSING not in done.stdout
    found = {path.parent.name.rsplit("_", 1)[0]: path for path in folder.glob("*/pictures_*.json")}
    assert found.keys() == {"none", *(f"{name}_0" for name in GUIDED)}
    assert all(path.with_suffix(".png").is_file() for path in found.values())
    figures = {name: json.loads(path.read_text("utf-8")) for name, path in found.items()}
    assert all(one["count"] == PICTURES and 0 <= one["accuracy"]["mean"] <= 1 for one in figures.values())
    assert len({one["patch_frechet"] for one in figures.values()}) == len(VARIANTS)
    curves = {name: json.loads((path.parent / "curve.json").read_text()) for name, path in found.items()}
    assert all(list(curve) == ["1" if name != "none" else "0"] for name, curve in curves.items())
    losses = [tuple(point[str(SIDE)]) for curve in curves.values() for point in curve.values()]
    assert len(set(losses)) == len(VARIANTS) and all(len(one) == 3 and min(one) > 0 for one in losses)
    assert Image.open(flags[flags.index("--figure") + 1]).width > 1000

    found["full_0"].write_text(json.dumps({**figures["full_0"], "frechet": 123.456}), "utf-8")
    found["implicit_0"].unlink()
    monkeypatch.chdir(ROOT)
    assert main([*flags, "--seeds", "0", "0"]) == 0  # as one
    again = capsys.readouterr()
    assert "123.46" in again.out and "123.46 ±" not in again.out and "training:" not in again.err
    repeated = json.loads(found["implicit_0"].read_text("utf-8"))
    assert repeated["patch_frechet"] == pytest.approx(figures["implicit_0"]["patch_frechet"], rel=1e-3)

    for name in ("curve.json", "step_00000001.pt"):
        path = found["full_0"].with_name(name)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=f"{name} is damaged .*: remove it"):
            main([*flags, "--variants", "full"])
        path.write_bytes(whole)

    assert main([*flags, "--max_hours", "0", "--updates", "2", "--variants", "full"]) == 0  # nothing is begun
    assert f"| 0 of 1 | {MISSING} |" in capsys.readouterr().out
    assert main([*flags, "--updates", "2", "--variants", "full", "--num_image", "0"]) == 0
    assert list(row_of(flags).curve) == [1, 2]
    with pytest.raises(ValueError, match="for 2 updates already"):
        main([*flags, "--variants", "full"])


def test_a_folder_is_named_after_everything_but_the_number_of_updates(
    flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    base = row_of(flags).folder
    assert row_of([*flags, "--num_image", "9"]).folder == base
    assert row_of(flags, updates=7).folder == base
    relabelled = replace(GUIDED["full"], label="other")
    assert make_row(relabelled, training_of(parse(flags)), parse(flags)).folder == base
    others = [row_of(flags, seed=1), row_of(flags, "implicit"), row_of(flags, lr=1.0)]
    assert len({base, *(row.folder for row in others)}) == 4
    assert row_of(flags, "none").folder == row_of(flags, "none", seed=1).folder


@pytest.mark.parametrize("max_hours", [0.0, float("inf")], ids=["time is over", "stopped by hand"])
def test_a_training_without_its_last_checkpoint_is_no_result(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_hours: float
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("ablation.train", lambda *_, **__: 0)  # leaves without it
    row = row_of([*flags, "--folder", str(tmp_path)])
    if max_hours == 0:
        assert trained(row, lambda _: None, until=0.0) is None
    else:
        with pytest.raises(KeyboardInterrupt):
            trained(row, lambda _: None, until=max_hours)


def test_a_table_names_what_is_missing() -> None:
    whole = Found("a", "A", 2, [{1: 0.5}], {64: [0.5, 0.7]}, {64: {"accuracy": [0.9, 0.9]}})
    none = {"accuracy": [], "frechet": [], "patch_frechet": []}
    part = Found("b", "B", 2, [{}], {64: [0.25]}, {64: none})
    _, _, first, second = table([whole, part], [64], with_pictures=False).splitlines()
    assert first == "| A | 2 | 60.0% ± 14.1% |" and second == "| B | 1 of 2 | 25.0% |"
    assert table([part], [64], with_pictures=True).splitlines()[2].count(MISSING) == 3


def test_bad_input_is_one_sentence_and_exit_code_2(
    flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    wrongs = (
        (["--side", "7"], "64 to 16384"),
        (["--num_image", "-1"], "--num_image"),
        (["--seeds", "0", "x"], "--seeds"),
    )
    for wrong, part in wrongs:
        with pytest.raises(SystemExit) as ended:
            run(lambda wrong=wrong: main([*flags, *wrong]))
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert ended.value.code == 2 and line.startswith("error:") and part in line
