"""The paper's ablations of the guidance (section 4.3, tables 2 and 3) on the embedded family.

python benchmarks/ablation.py: trains every variant of the guidance alike, from the same start on the same
pictures, and measures what each makes of the same held-out scenes. Run again it continues where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from core.commands.flags import run
from core.config.presets import EMBEDDED, PRESETS
from core.config.schema import TrainConfig, guidance_sizes
from core.config.settings import TRAINING_R, Job, Settings
from core.config.sizes import GuidanceSizes
from core.config.yaml import as_yaml, load
from core.data.loader import Batch
from core.devices import device_named
from core.family.evaluation import Evaluation, Judge, Measured, View, held_out_cases
from core.family.evaluation_run import FEW, TINY, Sheets, load_recogniser
from core.pipeline.batches import noise_of
from core.pipeline.entries import Entries
from core.pipeline.networks import DTYPES
from core.pipeline.offload import Offloaded, Placement
from core.pipeline.passes import C_LATENT, LowEnd, in_halves, needs_unconditional, prepare_stage_c
from core.pipeline.pipeline import UltraPixelPipeline
from core.pipeline.progress import Observer, counting
from core.pipeline.resolution import Plan, guidance_strength, plan
from core.pipeline.sources import Source
from core.training.encoders import fingerprint
from core.training.guidance import (
    GuidedStageC,
    check,
    draw_noise,
    drop_conditions,
    load_networks,
    noise_latents,
)
from core.training.run import Run, run_folder, train
from core.training.trainer import CHECKPOINT, Recipe, StepLoss
from core.weights.checkpoint import check_file
from core.weights.clip import TextCondition
from gdf.diffusion import sample_losses
from gdf.samplers import Step, denoiser, sample, sampler_named, steps
from gdf.schedules import cosine
from gdf.targets import target_named
from modules.guidance import Guidance, GuidanceFeatures
from modules.stage_c import StageC, StageCConditions

RECOGNISER = TINY / "recogniser.safetensors"
SAVE_EVERY = 50  # updates
SHOWN = 8  # pictures on a sheet
STAMP = 10  # letters of a file's name that stand for all settings
FIGURES = {"accuracy": "attributes right ↑", "frechet": "Fréchet ↓", "patch_frechet": "Fréchet of patches ↓"}
DRAWN = ("accuracy", "patch_frechet")
COLOURS = {"full": "#c44e1c", "none": "#808080"}  # of two variants; the others are blue
BLUE = "#4472a8"


# --- the variants ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """The guidance with one of its parts replaced."""

    name: str  # of its files
    label: str
    guided: bool = True
    lr_time: float | None = TRAINING_R  # of the low-resolution features; None: that of the guided step
    upsampling: str = "implicit"  # one of modules.guidance.UPSAMPLINGS
    scale_aware: bool = True

    @property
    def settings(self) -> Settings:
        """The family's, which take the features at the last step, t = 0.05, or those at the variant's."""
        lr_time = None if self.lr_time in (None, TRAINING_R) else self.lr_time
        return Settings(cfg=PRESETS[EMBEDDED].cfg, guidance_r=lr_time)


VARIANTS = (
    Variant("none", "no guidance", guided=False),
    Variant("own_t", "features at the step's own t", lr_time=None),
    Variant("t_05", "features at t = 0.5", lr_time=0.5),
    Variant("full", "full: t = 0.05, implicit, scale-aware"),
    Variant("bilinear", "bilinear + convolution", upsampling="bilinear", scale_aware=False),
    Variant("bilinear_scale", "bilinear + convolution, scale-aware", upsampling="bilinear"),
    Variant("implicit", "implicit, not scale-aware", scale_aware=False),
)


class ConstantScale(nn.Module):
    """In place of scale-aware normalisation: 2 x for every size, what that is on average before training."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.full((1, 1, 1, 1), 2.0))
        self.register_buffer("shift", torch.zeros(1, 1, 1, 1))

    def affine(self, _height: int, _width: int) -> tuple[Tensor, Tensor]:
        """Scale and shift (1, 1, 1, 1)."""
        return self.scale, self.shift


def make_guidance(variant: Variant, sizes: GuidanceSizes) -> Guidance:
    """A variant's guidance, without weights."""
    guidance = Guidance(**asdict(replace(sizes, upsampling=variant.upsampling)))
    if not variant.scale_aware:
        for block in (*guidance.down, *guidance.up):
            block.hr_norm = ConstantScale()
    return guidance


def start(variant: Variant, full: Guidance, sizes: GuidanceSizes) -> Guidance:
    """A variant's guidance with the initial values of the full one, wherever it has the same parameter."""
    guidance = make_guidance(variant, sizes)
    guidance.init_weights()
    shared = set(guidance.state_dict()) & set(full.state_dict())
    guidance.load_state_dict({name: full.state_dict()[name] for name in shared}, strict=False)
    return guidance


# --- training -------------------------------------------------------------------------------------


def make_recipe(variant: Variant, run: Run) -> Recipe:
    """The recipe of train/train_t2i.py for a variant, without samples and exports."""
    networks, dtype = load_networks(run.config, run.device), DTYPES[run.config.dtype]
    target, empty = target_named(run.config.target), networks.encoders.empty()

    def loss(module: nn.Module, batch: Batch, keys: list[tuple[int, ...]]) -> StepLoss:
        encoded = networks.encoders.encode(batch)
        noise = draw_noise(keys, encoded.z.shape[1:], encoded.z_lr.shape[1:])
        t_lr = noise.t if variant.lr_time is None else variant.lr_time
        latents = noise_latents(encoded.z, encoded.z_lr, noise, target, t_lr)
        held = drop_conditions(encoded.conditions, empty, noise).to(run.device, dtype)
        return StepLoss(sample_losses(module(latents, held), latents.target), latents.logsnr)

    guidance = start(variant, networks.guidance, guidance_sizes(run.config)).to(run.device)
    return Recipe(GuidedStageC(networks.stage_c, guidance), run.batches, loss)


def weights_of(config: TrainConfig) -> list[str]:
    """The files that a training reads."""
    return [config.generator_checkpoint_path, config.effnet_checkpoint_path]


def trained(variant: Variant, config: TrainConfig) -> Guidance:
    """A variant's guidance after its last update; trains what is missing up to there."""
    last = run_folder(config) / CHECKPOINT.format(config.updates)
    if not last.exists():
        print(f"training: {variant.label}, seed {config.seed}", file=sys.stderr)
        mixed = config.dtype == "bfloat16"
        train(config, weights_of(config), partial(make_recipe, variant), mixed_precision=mixed)
    if not last.exists():
        raise KeyboardInterrupt  # the trainer saved and left its loop
    state = torch.load(last, map_location="cpu", weights_only=True)
    tensors = {**state["parameters"], **state["buffers"], **state["ema"]}
    guidance = make_guidance(variant, guidance_sizes(config))
    guidance.load_state_dict({name.removeprefix("guidance."): value for name, value in tensors.items()})
    return guidance.eval()


# --- sampling and measuring -----------------------------------------------------------------------


class OwnTimePipeline(UltraPixelPipeline):
    """Guides each step of the high-resolution pass by the same step of the low-resolution pass."""

    def run_stage_c(
        self,
        jobs: Sequence[Job],
        plans: Sequence[Plan],
        texts: dict[str, TextCondition],
        settings: Settings,
        _observer: Observer | None = None,
        _entries: Sequence[Sequence[Entries]] = (),
        _sources: Sequence[Source] = (),
        ends: list[LowEnd | None] | None = None,
    ) -> list[Tensor]:
        """Both passes of Stage C for every job: latents (1, 16, h, w) on the CPU."""
        both = needs_unconditional(settings)[0]
        with self.stage_c.on_device() as stage_c, self._guidance_on_device() as guidance:
            latents = []
            for job, sizes in zip(jobs, plans, strict=True):
                held = prepare_stage_c(stage_c, self._conditions(job, texts, both))
                latents.append(self._latent(stage_c, guidance, held, job, sizes, settings).cpu())
        if ends is not None:
            ends += [None] * len(latents)
        return latents

    def _latent(self, stage_c: StageC, guidance: Guidance, held: StageCConditions, job: Job, sizes: Plan,
                settings: Settings) -> Tensor:  # fmt: skip
        features: list[GuidanceFeatures] = []  # of the conditional half, by step
        sites = stage_c.site_sizes(sizes.hr_latent)
        strength = guidance_strength(sizes.hr_latent, self.config_c.guidance_strength)

        def low(x: Tensor, r: Tensor, held: StageCConditions, _: Step) -> Tensor:
            prediction, found = stage_c.predict_with_features(x, r, held)
            features.append(found.first(1))
            return prediction

        def high(x: Tensor, r: Tensor, held: StageCConditions, step: Step) -> Tensor:
            prepared = guidance.prepare(features[step.index], sites, strength)
            return stage_c.predict(x, r, held, guidance=prepared)

        target, times = target_named(self.config_c.target), steps(cosine, settings.steps, settings.shift)
        for predict, size, stream in ((low, sizes.lr_latent, "lr"), (high, sizes.hr_latent, "hr")):
            noise = noise_of([job], stream, self.device)
            halves = in_halves(predict, held, stage_c, times, noise.device)
            denoise = denoiser(halves, target, settings.cfg_low if stream == "lr" else settings.cfg_high)
            x = noise.draw(1, C_LATENT, *size)
            sampled = sample(denoise, x, times, sampler_named(settings.sampler), noise.like)
        return sampled.x0


def make_pipeline(
    variant: Variant, arguments: argparse.Namespace, guidance: Guidance | None = None
) -> UltraPixelPipeline:
    """The pipeline that samples a variant."""
    kind = OwnTimePipeline if variant.lr_time is None else UltraPixelPipeline
    pipeline = kind.from_config(arguments.config_c, arguments.config_b, None, device_named(None))
    if guidance is not None:
        dtype = DTYPES[pipeline.config_c.dtype]
        pipeline.guidance = Offloaded(lambda *_: guidance.to(dtype), Placement(pipeline.device))
    return pipeline


def measure(
    variant: Variant, pipeline: UltraPixelPipeline, judge: Judge, arguments: argparse.Namespace, name: str
) -> Measured:
    """Measures a variant's pictures, and writes a sheet of the first of them under a name."""
    cases, size = held_out_cases(arguments.num_image, 0), (arguments.side, arguments.side)
    evaluation = Evaluation(pipeline, judge, cases, variant.settings)
    sheets = Sheets(Path(arguments.folder), min(SHOWN, len(cases)))
    with tqdm(total=len(cases), desc=variant.label, unit="picture") as bar:
        (measured,) = evaluation.pictures(size, [View(name, size)], counting(bar, "stage A"), sheets)
    return measured


def names(variant: Variant, config: TrainConfig, arguments: argparse.Namespace) -> tuple[str, str]:
    """Names of a variant's training and of its result, which differ wherever settings or weights do."""
    pipeline, name = make_pipeline(variant, arguments), variant.name
    parts = [asdict(replace(variant, label=""))]
    if variant.guided:
        name, parts = f"{variant.name}_{config.seed}", [*parts, as_yaml(config)]
    training = fingerprint(config, weights_of(config), *parts)
    parts += [as_yaml(pipeline.config_c), as_yaml(pipeline.config_b), asdict(variant.settings)]
    files = [*weights_of(config), str(RECOGNISER), *pipeline.files().values()]
    result = fingerprint(config, files, *parts, arguments.num_image, arguments.side)
    return f"{name}_{training[:STAMP]}", f"{name}_{result[:STAMP]}"


def result(
    variant: Variant, config: TrainConfig, judge: Judge, arguments: argparse.Namespace
) -> dict[str, Any]:
    """A variant's figures, made where its file is not there yet."""
    folder, (training, name) = Path(arguments.folder), names(variant, config, arguments)
    path = folder / f"{name}.json"
    if not path.exists():
        places = {"checkpoint_path": str(folder / "training"), "output_path": str(folder)}
        own = replace(config, experiment_id=training, **places)
        guidance = trained(variant, own) if variant.guided else None
        measured = measure(variant, make_pipeline(variant, arguments, guidance), judge, arguments, name)
        count = sum(p.numel() for p in guidance.parameters()) if guidance else 0
        found = {**asdict(variant), "seed": config.seed, "parameters": count, **asdict(measured)}
        temporary = path.with_suffix(".part")
        temporary.write_text(json.dumps(found, indent=2) + "\n", "utf-8")
        os.replace(temporary, path)
    found = json.loads(path.read_text("utf-8"))
    return {**found, "accuracy": found["accuracy"]["mean"]}


# --- the report -----------------------------------------------------------------------------------

Results = dict[Variant, list[dict[str, Any]]]  # of each seed


def with_deviation(values: Sequence[float]) -> str:
    """The mean and, of several, the standard deviation."""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def table(results: Results) -> str:
    """All figures in Markdown."""
    rows = [("variant", "parameters", *FIGURES.values()), ("---", *["---:"] * (1 + len(FIGURES)))]
    for variant, found in results.items():
        figures = [with_deviation([one[key] for one in found]) for key in FIGURES]
        rows.append((variant.label, f"{found[0]['parameters']:,}", *figures))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def draw(results: Results, path: Path, title: str) -> None:
    """A dot for each variant's mean, with the deviation between seeds where there are several."""
    figure = Figure(figsize=(10, 0.9 + 0.42 * len(results)), layout="constrained")
    figure.suptitle(title, fontsize=10)
    panels = figure.subplots(1, len(DRAWN), sharey=True)
    for axes, key in zip(panels, DRAWN, strict=True):
        for row, (variant, found) in enumerate(results.items()):
            values, colour = [one[key] for one in found], COLOURS.get(variant.name, BLUE)
            spread = stdev(values) if len(values) > 1 else None
            axes.errorbar(mean(values), row, xerr=spread, fmt="o", color=colour, capsize=3)
            axes.annotate(f"{mean(values):.3f}", (mean(values), row), (0, 6), textcoords="offset points",
                          ha="center", fontsize=8, color=colour)  # fmt: skip
        axes.set(xlabel=FIGURES[key], yticks=range(len(results)), yticklabels=[v.label for v in results])
        axes.set_ylim(len(results) - 0.5, -0.7)
        axes.margins(x=0.12)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


# --- the script -----------------------------------------------------------------------------------


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--updates", type=int, default=400, help="of each training")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--train_side", type=int, nargs="+", default=[384], help="pixels, one or several")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the trainings")
    parser.add_argument("--num_image", type=int, default=48, help="held-out scenes, with one picture each")
    parser.add_argument("--side", type=int, default=512, help="pixels of these pictures")
    parser.add_argument("--config", default="configs/tiny/train_t2i.yaml", help="of the trainings")
    parser.add_argument("--config_c", default="configs/tiny/stage_c.yaml", help="of Stage C")
    parser.add_argument("--config_b", default="configs/tiny/stage_b.yaml", help="of Stages B and A")
    parser.add_argument("--folder", default="runs/ablation", help="for checkpoints, results and sheets")
    parser.add_argument("--figure", help="where the plot goes (default: ablation.png in --folder)")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    arguments = parse(given)
    if arguments.num_image < 1:
        raise ValueError(f"--num_image must be at least 1, not {arguments.num_image}")
    overrides = {
        "image_size": arguments.train_side, "updates": arguments.updates, "batch_size": arguments.batch_size,
        "save_every": SAVE_EVERY, "tracker": "none", "cache_path": "null",
    }  # fmt: skip
    config = load(TrainConfig, arguments.config, [f"{key}={value}" for key, value in overrides.items()])
    check(config)
    plan(arguments.side, arguments.side, config.geometry)  # raises what is wrong with the size
    make_pipeline(VARIANTS[0], arguments).check_files()
    for path in weights_of(config):
        check_file(path)
    judge = Judge(load_recogniser(str(RECOGNISER), device_named(None)), device_named(None))
    results: Results = {variant: [] for variant in VARIANTS}
    for seed in arguments.seeds:
        for variant in VARIANTS:
            if variant.guided or not results[variant]:
                results[variant].append(result(variant, replace(config, seed=seed), judge, arguments))
    sides, seeds = (", ".join(map(str, values)) for values in (arguments.train_side, arguments.seeds))
    noun = "seeds" if len(arguments.seeds) > 1 else "seed"
    setting = (
        f"{arguments.num_image} pictures at {arguments.side} pixels; trainings of "
        f"{arguments.updates} updates of {arguments.batch_size} pictures at {sides} pixels, {noun} {seeds}"
    )
    few = results[VARIANTS[0]][0]["few_pictures"]
    report = "\n\n".join([table(results), setting, *([FEW.removeprefix("* ")] if few else [])])
    (Path(arguments.folder) / "table.md").write_text(report + "\n", "utf-8")
    draw(results, Path(arguments.figure or Path(arguments.folder, "ablation.png")), setting)
    print(report)
    return 0


if __name__ == "__main__":
    run(main)
