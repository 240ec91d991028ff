"""The paper's ablations of the guidance (section 4.3, tables 2 and 3) on the embedded family.

python benchmarks/ablation.py: trains every variant of the guidance alike, from the same start on the same
pictures, and measures what each makes of the same held-out scenes: first the error of its predictions at
times above 0.5, as a share of the error without guidance, then whole pictures. Run again it continues where
it was, and with more --updates it trains on; --max_hours ends it in time, with what is missing named as such.
--variants shares the rows out over several processes.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean

import torch
from ablation_report import FIGURES, Found, draw, table
from guidance_variants import VARIANTS, OwnTimePipeline, Variant, make_guidance, start
from torch import Tensor, nn
from tqdm import tqdm

from core.commands.flags import Parser, home_path, hours, plot_path, run
from core.config.schema import TrainConfig, guidance_sizes
from core.config.yaml import as_yaml, load
from core.data.loader import Batch
from core.devices import device_named
from core.family.evaluation import Evaluation, Judge, View, held_out_cases, real_picture
from core.family.evaluation_run import FEW, TINY, Sheets, load_recogniser
from core.pictures.images import prepare_folder
from core.pipeline.conditioning import Conditions
from core.pipeline.networks import DTYPES
from core.pipeline.offload import Offloaded, Placement
from core.pipeline.pipeline import UltraPixelPipeline
from core.pipeline.progress import counting
from core.pipeline.resolution import plan
from core.random_keys import generator_of
from core.training.encoders import EncodedBatch, Encoders, fingerprint, frozen_stage_c
from core.training.guidance import (
    GuidedStageC,
    SampleNoise,
    check,
    draw_noise,
    drop_conditions,
    load_networks,
    noise_latents,
)
from core.training.noising import shifted
from core.training.run import Run, run_folder, train
from core.training.trainer import CHECKPOINT, Recipe, StepLoss, checkpoints, read_state
from core.weights.checkpoint import CheckpointError, check_file, read_json, save_text
from gdf.diffusion import sample_losses
from gdf.schedules import TIME_MIN
from gdf.targets import Target, target_named
from modules.guidance import Guidance
from modules.stage_c import StageC

RECOGNISER = TINY / "recogniser.safetensors"
SAVE_EVERY = 100  # updates between two points of the curves
WARMUP = 20  # updates
SHOWN = 8  # pictures on a sheet
STAMP = 10  # letters of a file's name that stand for all settings
SHIFTS = 1  # what tells the random numbers of the times' shifts from those of a sample's noise
AT_ONCE = 4  # held-out scenes
MANY = 65  # pictures, from which on distances can be trusted
BASE = VARIANTS[0]  # without guidance, whose error is 100 %

Point = dict[str, list[float]]  # the losses of the held-out scenes, by the side of their pictures


# --- what is predicted of held-out scenes ---------------------------------------------------------


@dataclass(frozen=True)
class HeldOut:
    """Held-out scenes with fixed noise at times from 0 to 1, of which each variant predicts the same."""

    side: int  # pixels of the pictures
    encoded: EncodedBatch
    noise: SampleNoise
    target: Target

    @classmethod
    def drawn(cls, side: int, count: int, encoders: Encoders, config: TrainConfig) -> HeldOut:
        """The first scenes, with captions, at the latents' size of pictures of a side."""
        size, cases = plan(side, side, config.geometry), held_out_cases(count, 0)
        height, width = (n * config.geometry.stride for n in size.hr_latent)
        encoded = []
        for first in range(0, count, AT_ONCE):
            few = cases[first : first + AT_ONCE]
            pictures = torch.stack([real_picture(case.scene, (height, width)) for case in few])
            names = [str(case.seed) for case in few]
            encoded.append(encoders.encode(Batch(pictures, [case.prompt for case in few], names)).named())
        joined = {name: torch.cat([one[name] for one in encoded]) for name in encoded[0]}
        whole = EncodedBatch.of(joined, encoders.device)
        keys = [(case.seed, side) for case in cases]
        noise = draw_noise(keys, whole.z.shape[1:], whole.z_lr.shape[1:], text_dropout=0.0)
        times = ((torch.arange(count) + 0.5) / count).clamp(min=TIME_MIN)
        noise = replace(noise, t=times, use_image=torch.zeros(count, dtype=torch.bool))
        return cls(side, whole, noise, target_named(config.target))

    @torch.no_grad()
    def losses(
        self, variant: Variant, guided: GuidedStageC, empty: Conditions, dtype: torch.dtype
    ) -> list[float]:
        """The loss of each scene, with a variant's guidance in a Stage C, or without."""
        found = []
        for first in range(0, len(self.noise.t), AT_ONCE):
            few = slice(first, first + AT_ONCE)
            noise = SampleNoise(**{name: value[few] for name, value in vars(self.noise).items()})
            latents = noise_latents(
                self.encoded.z[few], self.encoded.z_lr[few], noise, self.target, low_time(variant, noise)
            )
            conditions = Conditions(**{n: v[few] for n, v in vars(self.encoded.conditions).items()})
            held = drop_conditions(conditions, empty, noise).to(latents.x.device, dtype)
            if variant.guided:
                prediction = guided(latents, held)
            else:
                x = latents.x.to(dtype)
                prediction = guided.stage_c(
                    x, latents.r, held.clip_text, held.clip_text_pooled, held.clip_img
                )
            found += sample_losses(prediction.float(), latents.target).tolist()
        return found


def low_time(variant: Variant, noise: SampleNoise) -> float | Tensor:
    """The time of the low-resolution features of samples."""
    return noise.t if variant.lr_time is None else variant.lr_time


def curve_of(path: Path) -> dict[int, Point]:
    """The points of a curve, by the number of updates; none where there is no file."""
    points = read_json(path) if path.exists() else {}
    return {int(step): point for step, point in points.items()}


def add_point(path: Path, step: int, point: Point) -> None:
    """Add to a curve's file, in the order of updates, what was measured after `step` of them."""
    points = curve_of(path)
    points[step] = {**points.get(step, {}), **point}
    save_text(path, json.dumps(dict(sorted(points.items()))) + "\n")


# --- training -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A variant that is trained with a seed; its files are in a folder of its own."""

    variant: Variant
    config: TrainConfig  # of its training
    folder: Path

    @property
    def curve(self) -> dict[int, Point]:
        """What is measured of it."""
        return curve_of(self.folder / "curve.json")

    def missing(self, side: int) -> bool:
        """Whether its held-out loss at a side is still to be measured, after the last update."""
        return str(side) not in self.curve.get(self.updates, {})

    @property
    def updates(self) -> int:
        """Of its training; without guidance there are none."""
        return self.config.updates if self.variant.guided else 0


class Losses:
    """Measures the held-out losses of rows; the scenes are encoded once."""

    def __init__(self, config: TrainConfig, count: int) -> None:
        self._config, self._count = config, count
        self._held_out: dict[int, HeldOut] = {}
        self._encoders: Encoders | None = None
        self._stage_c: StageC | None = None

    def measure(self, row: Row, side: int, guidance: Guidance | None, step: int) -> None:
        """Add a point to a row's curve."""
        device, dtype = device_named(None), DTYPES[self._config.dtype]
        if self._encoders is None or self._stage_c is None:
            self._encoders = Encoders.load(self._config, device)
            self._stage_c = frozen_stage_c(self._config, device)
        if side not in self._held_out:
            self._held_out[side] = HeldOut.drawn(side, self._count, self._encoders, self._config)
        guided = GuidedStageC(self._stage_c, guidance or nn.Identity())
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            losses = self._held_out[side].losses(row.variant, guided, self._encoders.empty(), dtype)
        row.folder.mkdir(parents=True, exist_ok=True)
        add_point(row.folder / "curve.json", step, {str(side): losses})


def make_recipe(row: Row, losses: Losses, side: int, until: float, run: Run) -> Recipe:
    """The recipe of train/train_t2i.py for a variant, with a point of its curve instead of samples."""
    networks, dtype = load_networks(run.config, run.device), DTYPES[run.config.dtype]
    target, empty = target_named(run.config.target), networks.encoders.empty()

    def loss(module: nn.Module, batch: Batch, keys: list[tuple[int, ...]]) -> StepLoss:
        encoded = networks.encoders.encode(batch)
        noise = draw_noise(keys, encoded.z.shape[1:], encoded.z_lr.shape[1:])
        scale = encoded.z.shape[-1] / encoded.z_lr.shape[-1]
        shift = torch.tensor([1 + (scale - 1) * chance(key) for key in keys])
        noise = replace(noise, t=shifted(noise.t, shift))
        latents = noise_latents(encoded.z, encoded.z_lr, noise, target, low_time(row.variant, noise))
        held = drop_conditions(encoded.conditions, empty, noise).to(run.device, dtype)
        return StepLoss(sample_losses(module(latents, held), latents.target), latents.logsnr)

    guidance = start(row.variant, networks.guidance, guidance_sizes(run.config)).to(run.device)

    def measure(step: int) -> None:
        losses.measure(row, side, guidance, step)
        if time.monotonic() > until:
            signal.raise_signal(signal.SIGTERM)  # the trainer saves and leaves its loop

    return Recipe(GuidedStageC(networks.stage_c, guidance), run.batches, loss, measure)


def chance(key: tuple[int, ...]) -> float:
    """A number from 0 to 1 that belongs to a sample."""
    return torch.rand((), generator=generator_of((*key, SHIFTS))).item()


def weights_of(config: TrainConfig) -> list[str]:
    """The files that a training reads."""
    return [config.generator_checkpoint_path, config.effnet_checkpoint_path]


def trained(row: Row, make: Callable[[Run], Recipe], until: float) -> Guidance | None:
    """A variant's guidance after its last update; trains what is missing up to there. None: time is over."""
    folder, last = run_folder(row.config), CHECKPOINT.format(row.config.updates)
    if (done := checkpoints(folder)) and done[-1].name > last:
        reached = int(done[-1].stem.removeprefix("step_"))
        raise ValueError(
            f"{folder} is trained for {reached} updates already: give as many with --updates, or more"
        )
    if not (folder / last).exists():
        print(f"training: {row.variant.label}, seed {row.config.seed}", file=sys.stderr)
        mixed = row.config.dtype == "bfloat16"
        train(row.config, weights_of(row.config), make, mixed_precision=mixed)
    if not (folder / last).exists():
        if time.monotonic() > until:
            return None
        raise KeyboardInterrupt  # the trainer saved and left its loop
    try:
        state = read_state(folder / last)
    except CheckpointError as error:
        raise ValueError(f"{folder / last} is damaged ({error}): remove it, and it is trained anew") from None
    tensors = {**state["parameters"], **state["buffers"], **state["ema"]}
    guidance = make_guidance(row.variant, guidance_sizes(row.config))
    guidance.load_state_dict({name.removeprefix("guidance."): value for name, value in tensors.items()})
    return guidance.eval()


def train_row(row: Row, losses: Losses, sides: Sequence[int], until: float) -> Guidance | None:
    """Train a row and measure its last losses at all sides; its guidance, if it has one by now."""
    guidance = None
    if row.variant.guided:
        guidance = trained(row, partial(make_recipe, row, losses, sides[0], until), until)
    if guidance is not None or not row.variant.guided:
        for side in filter(row.missing, sides):
            losses.measure(row, side, guidance, row.updates)
    return guidance


# --- pictures -------------------------------------------------------------------------------------


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


def pictures_path(row: Row, side: int, arguments: argparse.Namespace) -> Path:
    """Where the figures of a row's pictures are, whose name differs wherever settings or weights do."""
    pipeline = make_pipeline(row.variant, arguments)
    parts = [as_yaml(pipeline.config_c), as_yaml(pipeline.config_b), asdict(row.variant.settings)]
    files = [*weights_of(row.config), str(RECOGNISER), *pipeline.files().values()]
    stamp = fingerprint(row.config, files, *parts, arguments.num_image)
    return row.folder / f"pictures_{side}_{row.updates}_{stamp[:STAMP]}.json"


def measure_pictures(
    row: Row, side: int, guidance: Guidance | None, judge: Judge, arguments: argparse.Namespace
) -> None:
    """Measure a row's pictures of a side, and write a sheet of the first of them beside the figures."""
    path, size = pictures_path(row, side, arguments), (side, side)
    if path.exists():
        return
    cases, pipeline = held_out_cases(arguments.num_image, 0), make_pipeline(row.variant, arguments, guidance)
    evaluation = Evaluation(pipeline, judge, cases, row.variant.settings)
    row.folder.mkdir(parents=True, exist_ok=True)
    sheets = Sheets(row.folder, min(SHOWN, len(cases)))
    with tqdm(total=len(cases), desc=f"{row.variant.label}, {side}", unit="picture") as bar:
        (found,) = evaluation.pictures(size, [View(path.stem, size)], counting(bar, "stage A"), sheets)
    save_text(path, json.dumps(asdict(found), indent=2) + "\n")


# --- what is known --------------------------------------------------------------------------------


def share(point: Point, base: Point, side: int) -> float | None:
    """A held-out loss at the later half of the times, where pictures take shape, over that without guidance.

    None where either is not measured.
    """
    if str(side) not in point or str(side) not in base:
        return None
    own, unguided = (losses[len(losses) // 2 :] for losses in (point[str(side)], base[str(side)]))
    return mean(own) / mean(unguided)


def known(values: Iterable[float | None]) -> list[float]:
    """Those that are there."""
    return [value for value in values if value is not None]


def pictures_of(rows: Sequence[Row], side: int, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """The figures of a variant's pictures, as far as they are there."""
    paths = [pictures_path(row, side, arguments) for row in rows]
    found = [read_json(path) for path in paths if path.exists()]
    figures = [{**one, "accuracy": one["accuracy"]["mean"]} for one in found]
    return {key: [one[key] for one in figures] for key in FIGURES}


def found(variant: Variant, rows: Sequence[Row], base: Point, arguments: argparse.Namespace) -> Found:
    """What is known of a variant's rows."""
    sides = arguments.side
    curves = [{step: share(p, base, sides[0]) for step, p in row.curve.items() if step} for row in rows]
    ends = [row.curve.get(row.updates, {}) for row in rows]
    return Found(
        variant.name, variant.label, len(rows),
        [{step: value for step, value in curve.items() if value is not None} for curve in curves],
        {side: known(share(end, base, side) for end in ends) for side in sides},
        {side: pictures_of(rows, side, arguments) for side in sides},
    )  # fmt: skip


# --- the script -----------------------------------------------------------------------------------


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    names = [variant.name for variant in VARIANTS]
    add = parser.add_argument
    add("--variants", nargs="+", choices=names, default=names, metavar="NAME", help=f"of {', '.join(names)}")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2],
        help="of the trainings; the first for all variants, others for the main four")  # fmt: skip
    add("--updates", type=int, default=400, help="of each training")
    add("--batch_size", type=int, default=4)
    add("--lr", type=float, default=3e-3, help="learning rate")
    add("--train_side", type=int, nargs="+", default=[192, 288, 384], help="pixels, one or several")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="that trainings compute in")
    add("--side", type=int, nargs="+", default=[512, 640], help="pixels of the pictures that are measured")
    add("--num_loss", type=int, default=64, help="held-out scenes whose error is measured")
    add("--num_image", type=int, default=48, help="held-out scenes that pictures are made of; 0: none")
    add("--max_hours", type=hours, default=float("inf"), help="after which nothing is begun")
    add("--config", default="configs/tiny/train_t2i.yaml", help="of the trainings")
    add("--config_c", default="configs/tiny/stage_c.yaml", help="of Stage C")
    add("--config_b", default="configs/tiny/stage_b.yaml", help="of Stages B and A")
    add("--folder", type=home_path, default="runs/ablation", help="for checkpoints, results and sheets")
    add("--figure", type=plot_path, help="where the plot goes (default: ablation.png in --folder)")
    parsed = parser.parse_args(given)
    for name in ("variants", "seeds", "side"):  # each once
        setattr(parsed, name, list(dict.fromkeys(getattr(parsed, name))))
    return parsed


def training_of(arguments: argparse.Namespace) -> TrainConfig:
    """The configuration of all trainings but for names and seeds; the rate stays, so that they can go on."""
    overrides = {
        "image_size": arguments.train_side, "updates": arguments.updates, "batch_size": arguments.batch_size,
        "lr": arguments.lr, "lr_end": "null", "warmup_updates": WARMUP, "save_every": SAVE_EVERY,
        "tracker": "none", "cache_path": "null", "dtype": arguments.dtype,
    }  # fmt: skip
    return load(TrainConfig, arguments.config, [f"{key}={value}" for key, value in overrides.items()])


def make_row(variant: Variant, config: TrainConfig, arguments: argparse.Namespace) -> Row:
    """A row, in a folder whose name differs wherever settings or weights do, but not with `updates`."""
    parts = [variant.changes, arguments.num_loss]
    name = variant.name
    if variant.guided:
        name, parts = f"{variant.name}_{config.seed}", [*parts, as_yaml(replace(config, updates=1))]
    name = f"{name}_{fingerprint(config, weights_of(config), *parts)[:STAMP]}"
    places = {"checkpoint_path": arguments.folder, "output_path": arguments.folder}
    folder = Path(arguments.folder, name)
    return Row(variant, replace(config, experiment_id=name, **places), folder)


def check_all(config: TrainConfig, arguments: argparse.Namespace) -> None:
    """Raise what is wrong with flags or files, before anything is trained."""
    for name, least in (("num_image", 0), ("num_loss", 1)):
        if getattr(arguments, name) < least:
            raise ValueError(f"--{name} must be at least {least}, not {getattr(arguments, name)}")
    check(config)
    for side in arguments.side:
        plan(side, side, config.geometry)  # raises what is wrong with the size
    make_pipeline(BASE, arguments).check_files()
    for path in weights_of(config):
        check_file(path)
    prepare_folder(arguments.folder)


def make_all(rows: Sequence[Row], config: TrainConfig, arguments: argparse.Namespace) -> None:
    """Everything that is missing: first all trainings, then pictures, as long as there is time."""
    until = time.monotonic() + 3600 * arguments.max_hours
    losses, guidances = Losses(config, arguments.num_loss), {}
    for row in rows:
        if time.monotonic() > until:
            return
        guidances[row.folder] = train_row(row, losses, arguments.side, until)
    if not arguments.num_image:
        return
    judge = Judge(load_recogniser(str(RECOGNISER), device_named(None)), device_named(None))
    for side in arguments.side:
        for row in rows:
            if time.monotonic() > until:
                return
            if guidances[row.folder] is not None or not row.variant.guided:
                measure_pictures(row, side, guidances[row.folder], judge, arguments)


def main(given: Sequence[str] | None = None) -> int:
    arguments = parse(given)
    config = training_of(arguments)
    check_all(config, arguments)
    chosen = [variant for variant in VARIANTS if variant is BASE or variant.name in arguments.variants]
    rows: dict[Variant, list[Row]] = {variant: [] for variant in chosen}
    for number, seed in enumerate(arguments.seeds):
        for variant in chosen:
            if number == 0 or variant.every_seed:
                rows[variant].append(make_row(variant, replace(config, seed=seed), arguments))
    first = arguments.seeds[0]
    ordered = sorted(
        (row for group in rows.values() for row in group), key=lambda row: row.config.seed != first
    )
    make_all(ordered, config, arguments)
    base = rows[BASE][0].curve.get(0, {})
    sizes = ", ".join(map(str, arguments.train_side))
    title = (
        f"{arguments.updates} updates of {arguments.batch_size} pictures at {sizes} pixels; "
        f"errors of {arguments.num_loss} held-out scenes"
    )
    if arguments.num_image:
        title += f", {arguments.num_image} pictures"
    variants = [found(variant, group, base, arguments) for variant, group in rows.items()]
    report = "\n\n".join([title, table(variants, arguments.side, arguments.num_image > 0)])
    if 0 < arguments.num_image < MANY:
        report += f"\n\n{FEW.removeprefix('* ')}"
    save_text(Path(arguments.folder, "table.md"), report + "\n")
    draw(variants, arguments.side, Path(arguments.figure or Path(arguments.folder, "ablation.png")), title)
    print(report)
    return 0


if __name__ == "__main__":
    run(main)
