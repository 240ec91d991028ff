"""The run of train/train_tiny_on_gpu.py: Stage C and the guidance on scenes that are drawn meanwhile.

At the end both are trained together, guided where Stage C runs at high resolution, which the paper does not
do: so small a Stage C has not the capacity to draw outlines without its guidance, and need not.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import signal
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from PIL import ImageOps
from torch import Tensor, nn

from core.config.presets import EMBEDDED, PRESETS
from core.config.schema import guidance_sizes, stage_c_sizes
from core.config.settings import Settings
from core.config.sizes import GuidanceSizes, StageCSizes
from core.config.yaml import load_stage_b, load_stage_c
from core.devices import device_named
from core.family.batched import in_batches, measured
from core.family.evaluation import Judge, View, held_out_cases
from core.family.pool import Drawers, Encoders, Kind, Pool, Pools, Samples
from core.family.timed import Budget, Part, Weights
from core.paths import located
from core.pictures.images import prepare_folder, save_image, to_image
from core.pictures.sheets import contact_sheet
from core.pipeline.conditioning import Conditions, conditions
from core.pipeline.networks import DTYPES, load_encoder
from core.pipeline.pipeline import UltraPixelPipeline
from core.training.guidance import (
    GuidedStageC,
    NoisyLatents,
    SampleNoise,
    drop_conditions,
    guided_prediction,
    guiding_features,
    noise_latents,
)
from core.training.noising import noised, shifted
from core.training.run import hold, in_dtype, trained_module
from core.weights.checkpoint import check_file, config_metadata, load_module, read_config, save_tensors
from core.weights.clip import TextEncoder
from core.weights.layouts import guidance_names
from gdf.diffusion import sample_losses
from gdf.loss_weights import loss_weight_named
from gdf.targets import target_named
from modules.guidance import Guidance
from modules.recogniser import Recogniser
from modules.stage_c import StageC

log = logging.getLogger(__name__)

PRESET = PRESETS[EMBEDDED]
TRAININGS = {"stage_c", "guidance", "together"}  # of --parts
STAGE_C, GUIDANCE = "stage_c.safetensors", "ultrapixel_t2i.safetensors"
PART_OF = {STAGE_C: "stage_c", GUIDANCE: "guidance"}
LATER = {"stage_c": ("together", "guidance"), "guidance": ("together",), "together": ()}  # go on from it
SHARES = {"stage_c": 0.45, "guidance": 0.15, "together": 0.4}  # of --minutes
LR = {"stage_c": 1e-3, "guidance": 1e-3, "together": 7e-4}
EMA = {"stage_c": 0.998, "guidance": 0.995, "together": 0.998}
TEXT_DROPOUT = {"stage_c": 0.1, "guidance": 0.5, "together": 0.3}
GUIDED = 0.85  # share of the updates above the low resolution, where both are trained together
IMAGE_SHARE = 0.1
LOSS_WEIGHT = loss_weight_named("p2", 0.37)
ABSORBED = 3  # chunks an update, at most
FIRST_SCENES = 3000  # drawn before the training begins
SCENES_A_SECOND = 50_000  # more than are ever drawn: a resumed training goes on with others
HALVING = 0.7  # of the batches, where memory was too little
LARGE, LARGE_SHOWN = 1024, 4  # pixels and number of the largest pictures on the sheets
CELL = 512  # pixels of a picture on a sheet


@dataclass(frozen=True)
class Row:
    """One size of training pictures: how they are drawn, kept and used."""

    kind: Kind
    capacity: int  # of the pool
    batch: int
    often: Mapping[str, float]  # share of the updates of each training


def _often(stage_c: float, guidance: float, together: float) -> dict[str, float]:
    return {"stage_c": stage_c, "guidance": guidance, "together": together}


ROWS = (
    Row(Kind(96, 0.08, 256), 100_000, 1024, _often(0.20, 0.10, 0.20)),  # latents of 12 x 12
    Row(Kind(192, 0.24, 128), 150_000, 384, _often(0.15, 0.20, 0.10)),
    Row(Kind(288, 0.20, 96), 120_000, 192, _often(0.15, 0.20, 0.10)),
    Row(Kind(384, 0.465, 64), 250_000, 96, _often(0.45, 0.45, 0.55)),
    Row(Kind(768, 0.015, 16), 6_000, 16, _often(0.05, 0.05, 0.05)),
)
LOW = ROWS[0].kind.side


def minutes_of(arguments: argparse.Namespace, part: str) -> float:
    """How long a training takes."""
    own = {
        "stage_c": arguments.minutes_c,
        "guidance": arguments.minutes_guidance,
        "together": arguments.minutes_together,
    }[part]
    return arguments.minutes * SHARES[part] if own is None else own


# --- the run ----------------------------------------------------------------------------------------


class Run:
    """What all parts share: command line, configuration, device, log, and whether to stop."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.output = Path(arguments.output)
        self.state = Path(arguments.state or self.output / "state")
        prepare_folder(self.output)
        prepare_folder(self.state)
        self._held = [hold(folder) for folder in {self.output, self.state}]
        self.config = load_stage_c(arguments.config_c)
        self.device = device_named(arguments.device)
        on_gpu = self.device.type == "cuda"
        self.dtype = DTYPES[arguments.dtype or ("bfloat16" if on_gpu else "float32")]
        self.batch = arguments.batch  # times the rows' batches; less where memory was too little
        self.began, self._stopped = time.monotonic(), False
        self._handlers = {n: signal.signal(n, self._stop) for n in (signal.SIGTERM, signal.SIGINT)}

    def _stop(self, *_: object) -> None:
        self._stopped = True

    def __enter__(self) -> Run:
        return self

    def __exit__(self, error: type | None, *_: object) -> None:
        """The end of the log; signals and the folder again as before."""
        self.write({"event": "failed" if error else "stopped" if self._stopped else "finished"})
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        for held in self._held:
            if held is not None:
                held.close()

    def stopped(self) -> bool:
        """Whether the run was asked to end."""
        return self._stopped

    def smaller(self) -> None:
        """Make the batches smaller."""
        self.batch *= HALVING
        if self.batch < 0.01:
            raise ValueError("the device's memory is too little for any batch: use --pool 0.2")
        torch.cuda.empty_cache()
        self.write({"event": "memory was too little", "batch": round(self.batch, 3)})

    def write(self, line: Mapping[str, object]) -> None:
        """A line of the log, also shown."""
        text = json.dumps({"seconds": round(time.monotonic() - self.began, 1), **line})
        with (self.output / "log.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(text + "\n")
        log.info("%s", text)

    def path(self, name: str) -> Path:
        """Where weights are read: those of this run, else those it starts from, else the family's."""
        start = self.arguments.start_from
        own = {STAGE_C: self.config.generator_checkpoint_path, GUIDANCE: located(PRESET.pretrained_path)}[
            name
        ]
        made = [self.output / name, *([Path(start) / name] if start else [])]
        part = "together" if self.begun("together") else PART_OF[name]
        again = part == "together" and part in self.arguments.parts  # its state holds the weights, too
        if not made[0].exists() and self.begun(part) and not again:
            raise ValueError(
                f"{made[0]} is missing, though it was trained: with {part} among --parts it is written again"
            )
        return next((path for path in made if path.exists()), Path(own))

    def begun(self, part: str) -> bool:
        """Whether a training has a state."""
        return Part.seconds_in(self.state / f"{part}.safetensors") > 0

    def start_path(self, name: str) -> str | None:
        """What a training begins from; None: from nothing."""
        start = self.arguments.start_from
        return None if start is None else str(Path(start) / name)


def first_scene(arguments: argparse.Namespace) -> int:
    """The number of the first scene to draw: beyond those of earlier runs that the state is of."""
    state = Path(arguments.state or Path(arguments.output) / "state")
    seconds = sum(Part.seconds_in(state / f"{name}.safetensors") for name in TRAININGS)
    return round(seconds) * SCENES_A_SECOND + arguments.seed


def open_pools(drawers: Drawers, run: Run) -> Pools:
    """Empty pools of all sizes, and the encoders on the device."""
    device, sizes = run.device, read_config(run.arguments.image_encoder)
    image = load_module(
        partial(Recogniser, **(sizes or {})), run.arguments.image_encoder, dtype=torch.float32, device=device,
        what="image encoder",
    )  # fmt: skip
    width = stage_c_sizes(run.config).c_clip_img
    if sizes is None or sizes.get("c_embedding") != width:
        raise ValueError(f"{run.arguments.image_encoder} is no image encoder of {width} numbers")
    effnet = load_encoder(run.config, "the training").to(device)
    text = TextEncoder.load(run.config.clip_text_path, torch.float32)
    encoders = Encoders(effnet, text.to(device), image)
    pools = {row.kind.side: Pool(max(1, round(row.capacity * run.arguments.pool))) for row in ROWS}
    return Pools(drawers, encoders, pools, device, run.arguments.scenes)


def fill(pools: Pools, run: Run) -> None:
    """Wait for the first scenes."""
    enough = min(FIRST_SCENES * run.arguments.pool, pools.scenes or math.inf)
    pools.drawers.start(pools.encoders.text, run.device.type == "cuda")
    while pools.seen < max(1, enough) and not run.stopped():
        pools.absorb(1, block=True)
    run.write({"event": "training can begin", "scenes": pools.counts()})


# --- what is trained --------------------------------------------------------------------------------


class Loss:
    """The loss of a batch of one size, drawn by its share of the updates from what the pools hold."""

    def __init__(self, run: Run, pools: Pools, part: str, step: int) -> None:
        self.run, self.pools, self.part = run, pools, part
        self._choose = random.Random(f"{run.arguments.seed}/{part}/{step}")
        self._generator = torch.Generator(run.device).manual_seed(self._choose.getrandbits(40))
        text = pools.encoders.text.encode([""], run.device)[""]
        empty = conditions(text, None, stage_c_sizes(run.config).c_clip_img)
        self._empty = empty.to(run.device, run.dtype)
        self.target = target_named(run.config.target)

    def draw(self) -> tuple[Row, Samples, SampleNoise, Conditions]:
        """A row with samples, their noise and their conditions, some of which are left out."""
        self.pools.absorb(ABSORBED)
        ready = [row for row in ROWS if self.pools.by_side[row.kind.side].count]
        row = self._choose.choices(ready, [row.often[self.part] for row in ready])[0]
        pool = self.pools.by_side[row.kind.side]
        if row.kind.side == LOW:  # every scene was drawn at low resolution
            counts = [self.pools.by_side[r.kind.side].count for r in ready]
            pool = self.pools.by_side[self._choose.choices(ready, counts)[0].kind.side]
        samples = pool.draw(max(1, round(self.run.batch * row.batch)), self._generator).to(self.run.dtype)
        if row.kind.side == LOW:
            samples = replace(samples, z=samples.z_lr)
        noise = self._noise(samples, row.kind.side / LOW)
        return row, samples, noise, drop_conditions(samples.conditions, self._empty, noise)

    def _noise(self, samples: Samples, scale: float) -> SampleNoise:
        count, draw = len(samples.z), partial(torch.rand, generator=self._generator, device=self.run.device)
        normal = partial(torch.randn, generator=self._generator, device=self.run.device)
        # Evenly over all times, so that batches differ less than if each time was drawn for itself.
        t = (torch.arange(count, device=self.run.device) + draw(count)) / count
        t = shifted(t, 1 + (scale - 1) * draw(count))
        return SampleNoise(
            t, normal(samples.z.shape), normal(samples.z_lr.shape),
            draw(count) < TEXT_DROPOUT[self.part], draw(count) < IMAGE_SHARE,
        )  # fmt: skip

    def result(self, row: Row, prediction: Tensor, target: Tensor, logsnr: Tensor) -> tuple[str, Tensor]:
        """The name and the weighted mean of the samples' losses."""
        losses = sample_losses(prediction, target) * LOSS_WEIGHT(logsnr)
        return str(row.kind.side), losses.mean()


class StageCLoss(Loss):
    """Of Stage C alone."""

    def __init__(self, run: Run, pools: Pools, stage_c: StageC, step: int) -> None:
        super().__init__(run, pools, "stage_c", step)
        self._stage_c = stage_c

    def __call__(self) -> tuple[str, Tensor]:
        row, samples, noise, held = self.draw()
        latents = noised(samples.z, noise.t, noise.epsilon, self.target)
        x = latents.x.to(self.run.dtype)
        prediction = self._stage_c(x, latents.r, held.clip_text, held.clip_text_pooled, held.clip_img)
        return self.result(row, prediction, latents.target, latents.logsnr)


class GuidanceLoss(Loss):
    """Of the guidance in a frozen Stage C (paper eq. 5)."""

    def __init__(self, run: Run, pools: Pools, guided: GuidedStageC, step: int) -> None:
        super().__init__(run, pools, "guidance", step)
        self._guided = guided

    def __call__(self) -> tuple[str, Tensor]:
        row, samples, noise, held = self.draw()
        latents = noise_latents(samples.z, samples.z_lr, noise, self.target)
        prediction = self._guided(latents, held)
        return self.result(row, prediction, latents.target, latents.logsnr)


class Together(nn.Module):
    """Stage C and the guidance, both of whose weights are trained."""

    def __init__(self, stage_c: StageC, guidance: Guidance) -> None:
        super().__init__()
        self.stage_c, self.guidance = stage_c, guidance

    def forward(self, latents: NoisyLatents, held: Conditions) -> Tensor:
        """The guided prediction (B, 16, H, W); the guiding features, too, are trained by it."""
        prepared, features = guiding_features(self.stage_c, latents, held)
        return guided_prediction(self.stage_c, self.guidance, latents, prepared, features)


class TogetherLoss(Loss):
    """Of Stage C alone at the low resolution and at times above it, else with its guidance."""

    def __init__(self, run: Run, pools: Pools, together: Together, step: int) -> None:
        super().__init__(run, pools, "together", step)
        self._together = together

    def __call__(self) -> tuple[str, Tensor]:
        row, samples, noise, held = self.draw()
        latents = noise_latents(samples.z, samples.z_lr, noise, self.target)
        if row.kind.side != LOW and self._choose.random() < GUIDED:
            prediction = self._together(latents, held)
            name, loss = self.result(row, prediction, latents.target, latents.logsnr)
            return f"{name}_guided", loss
        x = latents.x.to(self.run.dtype)
        prediction = self._together.stage_c(
            x, latents.r, held.clip_text, held.clip_text_pooled, held.clip_img
        )
        return self.result(row, prediction, latents.target, latents.logsnr)


@dataclass(frozen=True)
class Exported:
    """A file of the family, and the sizes of its network."""

    name: str
    sizes: StageCSizes | GuidanceSizes


def part_of(run: Run, name: str, module: nn.Module) -> Part:
    """A training of a module in float32, as far as it was got before."""
    arguments = run.arguments
    lr = LR[name] * min(1.0, arguments.batch) ** 0.5  # small batches' gradients are noisier
    budget = Budget(minutes_of(arguments, name), lr, ema=EMA[name], max_updates=arguments.max_updates)
    weights = Weights(module, run.dtype, budget.ema)
    part = Part(name, weights, budget, run.state / f"{name}.safetensors")
    resumed = part.resume()
    count = sum(p.numel() for p in weights.master)
    run.write({"event": f"{name} begins", "parameters": count, "step": weights.step, "resumed": resumed})
    return part


def train_part(run: Run, pools: Pools, part: Part, loss: Loss, exported: Mapping[str, Exported]) -> None:
    """Train, with the running means exported as the family's files: by a prefix of the weights' names."""

    def save(prefix: str, file: Exported, tensors: Mapping[str, Tensor], _step: int) -> None:
        named = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        save_tensors(run.output / file.name, named, config_metadata(asdict(file.sizes)))

    def on_log(line: dict[str, object]) -> None:
        memory = torch.cuda.max_memory_reserved() / 2**30 if run.device.type == "cuda" else 0.0
        run.write({**line, "scenes": pools.counts(), "memory_gib": round(memory, 1)})

    def on_save() -> None:
        for prefix, file in exported.items():
            write = in_dtype(partial(save, prefix, file), torch.float16)
            write(part.weights.averaged(), part.weights.step)

    later = next((name for name in LATER[part.name] if run.begun(name)), None)
    if later is not None:  # what is trained anew here would not be in it
        run.write({"event": f"{part.name} stays as it is: {later} has begun"})
    elif part.share < 1:
        part.run(loss, on_log, on_save, run.stopped, run.smaller)
        return
    if later != "together" and not all((run.output / file.name).exists() for file in exported.values()):
        on_save()


def build_stage_c(run: Run, start: str | Path | None) -> StageC:
    """Stage C with the weights of a file; None: from nothing."""
    torch.manual_seed(run.arguments.seed)
    build = partial(StageC, **asdict(stage_c_sizes(run.config)))
    return trained_module(build, start, run.device, "Stage C")


def build_guidance(run: Run, start: str | Path | None) -> Guidance:
    """The guidance, likewise."""
    torch.manual_seed(run.arguments.seed)
    build = partial(Guidance, **asdict(guidance_sizes(run.config)))
    return trained_module(build, start, run.device, "guidance", guidance_names)


def train_stage_c(run: Run, pools: Pools) -> None:
    """Stage C, from nothing or from earlier weights."""
    stage_c = build_stage_c(run, run.start_path(STAGE_C))
    part = part_of(run, "stage_c", stage_c)
    exported = {"": Exported(STAGE_C, stage_c_sizes(run.config))}
    train_part(run, pools, part, StageCLoss(run, pools, stage_c, part.weights.step), exported)


def train_guidance(run: Run, pools: Pools) -> None:
    """The guidance, on the running means of Stage C."""
    guidance = build_guidance(run, run.start_path(GUIDANCE))
    stage_c = load_module(
        partial(StageC, **asdict(stage_c_sizes(run.config))), run.path(STAGE_C), dtype=run.dtype,
        device=run.device, what="Stage C",
    )  # fmt: skip
    guided = GuidedStageC(stage_c, guidance)
    part = part_of(run, "guidance", guided)
    exported = {"guidance.": Exported(GUIDANCE, guidance_sizes(run.config))}
    train_part(run, pools, part, GuidanceLoss(run, pools, guided, part.weights.step), exported)


def train_together(run: Run, pools: Pools) -> None:
    """Both, from the running means of each."""
    together = Together(build_stage_c(run, run.path(STAGE_C)), build_guidance(run, run.path(GUIDANCE)))
    part = part_of(run, "together", together)
    exported = {
        "stage_c.": Exported(STAGE_C, stage_c_sizes(run.config)),
        "guidance.": Exported(GUIDANCE, guidance_sizes(run.config)),
    }
    train_part(run, pools, part, TogetherLoss(run, pools, together, part.weights.step), exported)


# --- what comes of it -------------------------------------------------------------------------------


def open_pipeline(run: Run) -> UltraPixelPipeline:
    """The family with the trained weights, in float32 as it is shipped."""
    config = replace(run.config, generator_checkpoint_path=str(run.path(STAGE_C)), dtype="float32")
    config_b = load_stage_b(run.arguments.config_b)
    return UltraPixelPipeline(config, config_b, run.path(GUIDANCE), run.device, resident=True)


def make_sheets(run: Run, pipeline: UltraPixelPipeline, settings: Settings) -> None:
    """The same prompts at 128 x 128 and 512 x 512, and some of them at 1024 x 1024."""
    cases = held_out_cases(run.arguments.shown, run.arguments.seed)
    for side, count, batch in (
        (128, len(cases), 128),
        (PRESET.height, len(cases), 24),
        (LARGE, LARGE_SHOWN, 4),
    ):
        made = in_batches(pipeline, cases[:count], side, batch, settings)
        shown = (max(CELL, side), max(CELL, side))
        cells = [(ImageOps.contain(to_image(pixels), shown), case.prompt) for case, pixels in made]
        path = run.output / f"sheet_{side}.jpg"
        save_image(contact_sheet(cells), path, "jpg", {"prompts": [prompt for _, prompt in cells]})
        run.write({"event": f"wrote {path.name}"})
        if run.stopped():
            return


def write_figures(run: Run, pipeline: UltraPixelPipeline, settings: Settings) -> None:
    """The recogniser's figures of held-out scenes, at 512 x 512 also of the enlarged 128 x 128 pictures."""
    arguments, large = run.arguments, (PRESET.height, PRESET.width)
    sizes = read_config(arguments.recogniser)
    recogniser = load_module(
        partial(Recogniser, **(sizes or {})), arguments.recogniser, dtype=torch.float32, device=run.device,
        what="recogniser",
    )  # fmt: skip
    judge, figures = Judge(recogniser, run.device), []
    small = View("128", (128, 128))
    enlarged = View(f"128 enlarged to {large[0]}", large, baseline=True)
    for side, count, views, batch in (
        (large[0], arguments.num_large, [View(str(large[0]), large)], 40),
        (128, arguments.num_large, [enlarged], 200),
        (128, arguments.num_image, [small], 250),
    ):
        cases = held_out_cases(count, arguments.seed)
        figures += [asdict(m) for m in measured(pipeline, judge, cases, side, views, batch, settings)]
        (run.output / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", "utf-8")
        last = figures[-1]
        short = {key: round(last[key], 3) for key in ("frechet", "patch_frechet")}
        accuracy = {key: round(share, 3) for key, share in last["accuracy"]["each"].items()}
        run.write({"event": last["view"]["name"], **accuracy, **short})
        if run.stopped():
            return


def show(run: Run) -> None:
    """Sheets and figures of the weights as they are now."""
    set_up(run.device)
    settings = PRESET.settings
    pipeline = open_pipeline(run)
    make_sheets(run, pipeline, settings)
    if not run.stopped():
        write_figures(run, pipeline, settings)


def set_up(device: torch.device) -> None:
    """What float32 and attention run as on a GPU."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True  # a few sizes, over and over
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every shape


def train(run: Run, drawers: Drawers) -> None:
    """The trainings that were asked for."""
    set_up(run.device)
    pools = open_pools(drawers, run)
    fill(pools, run)
    parts = {"stage_c": train_stage_c, "guidance": train_guidance, "together": train_together}
    for name, part in parts.items():
        if name in run.arguments.parts and not run.stopped():
            part(run, pools)


def train_and_show(arguments: argparse.Namespace) -> None:
    """Do the parts that the flags name; ValueError or OSError if a file of theirs cannot be used."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ("image_encoder", "recogniser"):
        setattr(arguments, name, located(getattr(arguments, name)))
        check_file(getattr(arguments, name))
    for name, file in (("stage_c", STAGE_C), ("guidance", GUIDANCE)):
        if arguments.start_from is not None and name in arguments.parts:
            check_file(Path(arguments.start_from, file))
    load_stage_b(arguments.config_b)  # tells now what is wrong with it
    drawers = None
    if TRAININGS & set(arguments.parts):  # before CUDA is used
        drawers = Drawers([row.kind for row in ROWS], LOW, arguments.workers, first_scene(arguments))
    with Run(arguments) as own:
        if drawers is not None:
            with closing(drawers):
                train(own, drawers)
        if "figures" in arguments.parts and not own.stopped():
            show(own)
