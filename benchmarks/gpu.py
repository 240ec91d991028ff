"""Times and memory of all passes on a GPU, beside what its arithmetic allows: python benchmarks/gpu.py

It needs no weights, no network, and nothing beyond requirements.txt: networks of the published sizes get
random weights on the device, which take the same time. Each figure is written to --out as soon as it is
known; what the --minutes do not suffice for is left out, and named. `--plot FILE` draws what --out holds, and
measures nothing. `--small` runs all of it with tiny networks, on a CPU too, to see that it runs.

A floor is the products of a step, counted by PyTorch on tensors without data, over the products a second that
one large matrix product reached on the same device (bfloat16; float32 on a CPU).
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import date, datetime
from functools import cached_property, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import modules.torchvision_operators  # noqa: F401  before diffusers
from core.config.schema import LatentGeometry
from core.config.settings import Settings
from core.config.sizes import STAGE_B_VERSIONS, GuidanceSizes, StageASizes, StageBSizes, StageCSizes
from core.pipeline.graphs import Outputs, PassRecordings, Recordings
from core.pipeline.passes import (
    NoiseSource,
    decode_picture,
    high_resolution_pass,
    low_resolution_pass,
    stage_b_pass,
)
from core.pipeline.resolution import MIN_SIDE, Plan, plan
from core.pipeline.steps import high_step, low_step, of_short_steps, step_b
from gdf.targets import EPSILON
from modules import blocks
from modules.guidance import Guidance
from modules.operators import operators_for
from modules.stage_a import StageA
from modules.stage_b import StageB
from modules.stage_c import StageC

for folder in ("models", "tests"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))
from random_family import Family

RUNS, WARM_UPS = 3, 2  # of a step
GIB = 2**30
TEXT_TOKENS = 77
SIDES = (4096, 2048, 1024, 3072, 6144)  # of the pictures, the first two also whole; by importance
SMALL_SIDES = (128, 96)
NO_TIME = "no time was left"
STAGES = ("Stage C, low", "Stage C, high", "Stage B", "Stage A")
OURS, PLAIN, DIFFUSERS = "ours", "plain", "diffusers"


# --- figures --------------------------------------------------------------------------------------


@dataclass
class Figures:
    """What is known so far, in a file that is whole at any time."""

    path: Path
    known: dict[str, Any] = field(default_factory=dict)

    def set(self, name: str, value: Any) -> None:
        """Write one part's figure."""
        self.known[name] = value
        self._write()

    def add(self, part: str, **values: Any) -> None:
        """Add a line to one part's figures, write them, and tell them."""
        self.known.setdefault(part, []).append(values)
        self._write()
        shown = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in values.values())
        print(f"{part}: {', '.join(f'{k} {v}' for k, v in zip(values, shown, strict=True))}", flush=True)

    def _write(self) -> None:
        temporary = self.path.with_suffix(".part")
        temporary.write_text(json.dumps(self.known, indent=2) + "\n", "utf-8")
        os.replace(temporary, self.path)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call."""
    synchronise(device)
    start = time.perf_counter()
    function()
    synchronise(device)
    return time.perf_counter() - start


def timed(function: Callable[[], object], device: torch.device) -> float:
    """The median of several calls' seconds, after those that warm up and record."""
    for _ in range(WARM_UPS):
        function()
    return statistics.median(seconds(function, device) for _ in range(RUNS))


@contextmanager
def peak(device: torch.device, others: int) -> Iterator[dict[str, float]]:
    """The most memory within it in GiB, less the bytes of weights that need not be there; none on a CPU."""
    found: dict[str, float] = {}
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    yield found
    if device.type == "cuda":
        found["peak_gib"] = (torch.cuda.max_memory_allocated(device) - others) / GIB


# --- networks -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """Of all networks; the defaults are the published ones."""

    stage_c: StageCSizes = StageCSizes()
    guidance: GuidanceSizes = GuidanceSizes()
    stage_b: StageBSizes = STAGE_B_VERSIONS["700M"]
    stage_a: StageASizes = StageASizes()
    geometry: LatentGeometry = LatentGeometry()


def small_sizes() -> Sizes:
    family = Family()
    return Sizes(family.stage_c, family.guidance, family.stage_b, family.stage_a, family.geometry)


@dataclass(frozen=True)
class Networks:
    """All networks with random weights on a device, made at their first use."""

    sizes: Sizes
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """Of Stages C and B."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def _made(self, kind: type[nn.Module], sizes: Any, dtype: torch.dtype) -> nn.Module:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with self.device:
                module = kind(**asdict(sizes)).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(before)
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.02)
        return module

    @cached_property
    def stage_c(self) -> StageC:
        return self._made(StageC, self.sizes.stage_c, self.dtype)

    @cached_property
    def guidance(self) -> Guidance:
        return self._made(Guidance, self.sizes.guidance, self.dtype)

    @cached_property
    def stage_b(self) -> StageB:
        return self._made(StageB, self.sizes.stage_b, self.dtype)

    @cached_property
    def stage_a(self) -> StageA:
        return self._made(StageA, self.sizes.stage_a, torch.float32)

    def bytes_beside(self, *used: nn.Module) -> int:
        """Bytes of the networks that are there and not used."""
        there = [m for m in vars(self).values() if isinstance(m, nn.Module) and m not in used]
        return sum(p.nbytes for m in there for p in m.parameters())

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype or self.dtype)

    def text(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, pooled text and image of both halves."""
        c = self.sizes.stage_c
        shapes = (TEXT_TOKENS, c.c_clip_text), (1, c.c_clip_text_pooled), (1, c.c_clip_img)
        return tuple(self.normal(2, *shape) for shape in shapes)


Step = Callable[[], object]


def recordings_on(device: torch.device) -> PassRecordings:
    """New recordings, of which there are none on a CPU."""
    return PassRecordings.of_all() if device.type == "cuda" else PassRecordings()


def step_of(recordings: Recordings | None, function: Callable[..., Outputs], *inputs: object) -> Step:
    """The function of the inputs, by its recording where there are any."""
    return partial(function, *inputs) if recordings is None else partial(recordings.run, function, *inputs)


def our_steps(networks: Networks, side: int, plain: bool = False) -> Iterator[tuple[str, Step, tuple]]:
    """A step of each stage for a picture of this side, with the networks that it uses."""
    sizes = plan(side, side, networks.sizes.geometry)
    r = torch.full((1,), 0.5, device=networks.device)
    stage_c, guidance = networks.stage_c, networks.guidance
    stage_c.plain = plain
    held, time_c = stage_c.prepare(*networks.text()), stage_c.pass_times(r).at(0)
    low = networks.normal(2, 16, *sizes.lr_latent)
    features = stage_c.predict_with_features(low, time_c, held)[1].first(1)
    used, kept = (stage_c, guidance), PassRecordings() if plain else recordings_on(networks.device)

    yield STAGES[0], step_of(kept.low, partial(low_step, stage_c), (low, time_c), (held, None)), used
    prepared = guidance.prepare(features, stage_c.site_sizes(sizes.hr_latent))
    high = networks.normal(2, 16, *sizes.hr_latent)
    own = of_short_steps(kept.high, side**2, Settings(), networks.device, used)
    yield STAGES[1], step_of(own, partial(high_step, stage_c), (high, time_c), (held, prepared, None)), used
    stage_b = networks.stage_b
    stage_b.plain = plain
    effnet, pooled = (
        networks.normal(2, 16, *sizes.hr_latent),
        networks.normal(2, 1, networks.sizes.stage_b.c_clip),
    )
    held_b, time_b = stage_b.prepare(sizes.stage_b_latent, effnet, pooled), stage_b.pass_times(r).at(0)
    noisy = networks.normal(2, 4, *sizes.stage_b_latent)
    own = of_short_steps(kept.stage_b, side**2, Settings(), networks.device, (stage_b,))
    yield STAGES[2], step_of(own, partial(step_b, stage_b), (noisy, time_b), held_b), (stage_b,)
    latent = networks.normal(1, 4, *sizes.stage_b_latent, dtype=torch.float32)
    yield STAGES[3], lambda: _decoded(networks, latent, sizes, plain), (networks.stage_a,)


def _decoded(networks: Networks, latent: Tensor, sizes: Plan, plain: bool) -> Tensor:
    if isinstance(latent, FakeTensor):  # whole: tiles would count twice where they overlap
        return networks.stage_a.decode(latent)
    return decode_picture(networks.stage_a, latent, sizes, False, tf32=not plain)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Within it, parameters are made in this dtype."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        yield
    finally:
        torch.set_default_dtype(before)


def peer_steps(networks: Networks, side: int) -> Iterator[tuple[str, Step, tuple]]:
    """The same of diffusers' networks with the same weights; without guidance, which they lack."""
    try:
        from peers import unet_of
    except ImportError:
        raise ImportError("diffusers is not installed") from None

    sizes = plan(side, side, networks.sizes.geometry)
    r = torch.full((2,), 0.5, device=networks.device, dtype=networks.dtype)
    for stage in ("stage_c", "stage_b"):
        ours = getattr(networks, stage)
        with default_dtype(networks.dtype), networks.device:
            theirs = unet_of(ours).requires_grad_(False)
        if stage == "stage_c":
            text, pooled, image = networks.text()
            for name, latent in zip(STAGES[:2], (sizes.lr_latent, sizes.hr_latent), strict=True):
                x = networks.normal(2, 16, *latent)
                yield name, partial(theirs, x, r, pooled, text, image), (theirs,)
        else:
            effnet = networks.normal(2, 16, *sizes.hr_latent)
            pooled = networks.normal(2, 1, networks.sizes.stage_b.c_clip)
            x = networks.normal(2, 4, *sizes.stage_b_latent)
            yield STAGES[2], partial(theirs, x, r, pooled, effnet=effnet), (theirs,)
        del theirs


def counted(sizes: Sizes, side: int) -> dict[str, float]:
    """Floating-point operations of a step of each stage, two for each multiplication with addition."""
    found = {}
    # On tensors without data. Attention by plain products, as the counter does not know all kernels, and
    # blocks as in a training: those without gradients count what they compute twice.
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        for name, step, _ in our_steps(Networks(sizes, torch.device("cpu")), side, plain=True):
            with FlopCounterMode(display=False) as counter:
                step()
            found[name] = float(counter.get_total_flops())
    return found


# --- parts ----------------------------------------------------------------------------------------


@dataclass
class Run:
    """What the parts share."""

    networks: Networks
    figures: Figures
    settings: Settings
    counts: Mapping[int, Future[dict[str, float]]]  # by the picture's side; another process counts meanwhile

    @property
    def device(self) -> torch.device:
        return self.networks.device

    def floor(self, side: int, stage: str) -> tuple[float, float]:
        """Floating-point operations of a step, and the seconds that they take at least."""
        flops = self.counts[side].result()[stage]
        return flops, flops / self.figures.known["ceiling"]["flops"]


def measure_ceiling(run: Run) -> None:
    """Products and copied bytes a second."""
    gpu = run.device.type == "cuda"
    n = 8192 if gpu else 512
    a, b = run.networks.normal(n, n), run.networks.normal(n, n)
    big = torch.empty(2**30 if gpu else 2**24, dtype=torch.uint8, device=run.device)
    other = torch.empty_like(big)
    flops = 2 * n**3 / timed(lambda: a @ b, run.device)
    copied = 2 * len(big) / timed(lambda: other.copy_(big), run.device)
    run.figures.set("ceiling", {"flops": flops, "bytes": copied})
    print(f"ceiling: {flops / 1e12:.3g} TFLOP/s, {copied / 1e9:.3g} GB/s", flush=True)


def measure_steps(run: Run, side: int, way: str) -> None:
    """A step of each stage, times the steps of a picture."""
    networks, settings = run.networks, run.settings
    counts = dict(zip(STAGES, (settings.steps, settings.steps, settings.steps_b, 1), strict=True))
    steps = peer_steps(networks, side) if way == DIFFUSERS else our_steps(networks, side, way == PLAIN)
    for stage, step, used in steps:
        with peak(run.device, networks.bytes_beside(*used)) as memory:
            took = timed(step, run.device)
        flops, floor = run.floor(side, stage)
        run.figures.add(
            "steps", side=side, way=way, stage=stage, steps=counts[stage], seconds=took,
            of_picture=took * counts[stage], tflops=flops / took / 1e12, times_floor=took / floor,
            floor=floor * counts[stage], **memory,
        )  # fmt: skip


def measure_picture(run: Run, side: int) -> None:
    """All passes of one picture, the second of two; its stages, and their memory."""
    networks = run.networks
    recordings = recordings_on(run.device)
    for last in (False, True):
        for stage, took, memory in picture_stages(networks, side, run.settings, recordings):
            if last:
                run.figures.add("pictures", side=side, stage=stage, seconds=took, **memory)


def picture_stages(
    networks: Networks, side: int, settings: Settings, kept: PassRecordings
) -> Iterator[tuple[str, float, dict[str, float]]]:
    """Name, seconds and memory of each stage of a picture, as each is done."""
    device, sizes = networks.device, plan(side, side, networks.sizes.geometry)
    stage_c, guidance, stage_b = networks.stage_c, networks.guidance, networks.stage_b
    stage_c.plain = stage_b.plain = False
    text, made = networks.text(), {}

    def low() -> None:
        made["held"] = stage_c.prepare(*text)
        noise = NoiseSource.of(0, 0, device)
        made["features"] = low_resolution_pass(
            stage_c, made["held"], EPSILON, sizes, settings, noise, recordings=kept.low
        )[1]

    def high() -> None:
        prepared = guidance.prepare(made["features"], stage_c.site_sizes(sizes.hr_latent))
        noise = NoiseSource.of(0, 1, device)
        found = high_resolution_pass(
            stage_c, made["held"], prepared, EPSILON, sizes, settings, noise, recordings=kept.high
        )
        made["latent"] = found.x0

    def b() -> None:
        pooled, noise = networks.normal(2, 1, networks.sizes.stage_b.c_clip), NoiseSource.of(0, 2, device)
        found = stage_b_pass(
            stage_b, made["latent"], pooled, EPSILON, sizes, settings, noise, recordings=kept.stage_b
        )
        made["latent"] = found.x0

    def a() -> None:
        decode_picture(networks.stage_a, made["latent"].float(), sizes, False)

    used = ((stage_c, guidance), (stage_c, guidance), (stage_b,), (networks.stage_a,))
    for name, work, modules_used in zip(STAGES, (low, high, b, a), used, strict=True):
        with peak(device, networks.bytes_beside(*modules_used)) as memory:
            took = seconds(work, device)
        yield name, took, memory


def measure_operators(run: Run) -> None:
    """Each kernel of modules/fused.py at the sizes of a step at 4096 x 4096, with its floor and its error."""
    gpu = run.device.type == "cuda"
    c, side = (2048, 96) if gpu else (64, 8)
    x = run.networks.normal(2, side, side, c)
    fused = operators_for(blocks.channels_first(x))
    for name, inputs, moved in operator_inputs(run.networks, x, c):
        own, plain = getattr(fused, name), getattr(blocks.PLAIN, name)
        exact = _first(plain(*_as(inputs, torch.float32)))
        errors = [_distance(_first(made(*_as(inputs, x.dtype))), exact) for made in (own, plain)]
        took = [timed(partial(made, *_as(inputs, x.dtype)), run.device) for made in (own, plain)]
        run.figures.add(
            "operators", name=name, fused=own is not plain, seconds=took[0], plain=took[1],
            floor=moved / run.figures.known["ceiling"]["bytes"], error=errors[0], plain_error=errors[1],
        )  # fmt: skip


def operator_inputs(networks: Networks, x: Tensor, c: int) -> Iterator[tuple[str, tuple, int]]:
    """Inputs of each of the operators that only move memory, and the bytes that they must move."""
    normal = networks.normal
    tokens, hidden = x.flatten(1, 2), 4 * c
    with networks.device:
        convolution = nn.Conv2d(c, c, 3, padding=1, groups=c, dtype=x.dtype).requires_grad_(False)
        layer = nn.Linear(c, hidden, dtype=x.dtype).requires_grad_(False)
    modulation = (1 + 0.1 * normal(1, c), 0.1 * normal(1, c))
    yield "depthwise_norm", (x, convolution, normal(c)), 3 * x.nbytes
    yield "modulated_norm", (x, modulation, normal(c)), 3 * x.nbytes
    yield "hidden", (tokens, layer), tokens.nbytes + layer.weight.nbytes + 4 * tokens.nbytes
    squares = normal(2, hidden, dtype=torch.float32).square()
    weight = normal(c, hidden)
    yield "grn_weight", (weight, squares, normal(1, 1, 1, hidden)), 3 * weight.nbytes
    heads = c // 64 or 1
    q, k, v = (normal(2, tokens.shape[1], heads, c // heads).transpose(1, 2) for _ in "qkv")
    condition = tuple(normal(2, 85, heads, c // heads).transpose(1, 2) for _ in "kv")
    yield "attention", (q, k, v, condition), 4 * tokens.nbytes


def _first(made: Tensor | tuple[Tensor, ...]) -> Tensor:
    return made if isinstance(made, Tensor) else made[0]


def _distance(a: Tensor, exact: Tensor) -> float:
    return float((a.float() - exact).norm() / exact.norm())


def _as(inputs: Any, dtype: torch.dtype) -> Any:
    """A copy of the inputs, as operators may write into them, whose 16-bit tensors have this dtype."""
    if isinstance(inputs, tuple):
        return tuple(_as(each, dtype) for each in inputs)
    if isinstance(inputs, nn.Module):
        return copy.deepcopy(inputs).to(dtype)
    return inputs.to(dtype) if inputs.element_size() == 2 and dtype != inputs.dtype else inputs.clone()


Part = tuple[str, Callable[[Run], None]]


def parts(sides: tuple[int, ...]) -> list[Part]:
    """All that is measured, the most important first."""

    def steps(side: int, way: str) -> Part:
        return f"steps at {side}, {way}", partial(measure_steps, side=side, way=way)

    first, rest = sides[:2], sides[2:]
    return [
        *(steps(side, OURS) for side in first),
        *((f"picture of {side}", partial(measure_picture, side=side)) for side in first),
        ("operators", measure_operators),
        *(steps(side, PLAIN) for side in first),
        *(steps(side, OURS) for side in rest),
        *(steps(side, DIFFUSERS) for side in first),
        *(steps(side, PLAIN) for side in rest),
        *(steps(side, DIFFUSERS) for side in rest),
    ]


def measure(run: Run, sides: tuple[int, ...], minutes: float) -> None:
    """All parts that there is time for; what does not fit, or cannot be, is noted."""
    end, longest = time.monotonic() + 60 * minutes, 0.0
    measure_ceiling(run)
    for name, part in parts(sides):
        start = time.monotonic()
        if start + longest > end:
            run.figures.add("left_out", what=name, why=NO_TIME)
            continue
        try:
            part(run)
        except Exception as error:  # whatever a driver or a compiler raises: the other parts may work
            reason = next(iter(str(error).splitlines()), "")
            run.figures.add("left_out", what=name, why=f"{type(error).__name__}: {reason}")
        longest = max(longest, time.monotonic() - start)


# --- the plot -------------------------------------------------------------------------------------


def known_figures(path: Path) -> dict[str, Any]:
    """The figures in a file; ValueError where it has none of this script's."""
    try:
        known = json.loads(path.read_text("utf-8"))
    except ValueError:
        known = None
    steps = known.get("steps", []) if isinstance(known, dict) and "about" in known else None
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise ValueError(f"{path} holds no figures of this script: measure again")
    if not steps:
        raise ValueError(f"{path} has no step's figures to draw: measure with more --minutes")
    return known


def draw(known: dict[str, Any], path: Path) -> None:
    """Seconds and memory of a picture by its side, stacked by stage, and the floor as a line."""
    from matplotlib.figure import Figure

    steps = [step for step in known.get("steps", ()) if step["way"] == OURS]
    sides = sorted({step["side"] for step in steps})
    figure = Figure(figsize=(10, 4), layout="constrained")
    about = known["about"]
    figure.suptitle(f"{about['device']}, torch {about['torch']}, {about['date']}, {about['networks']}")
    shown = {"of_picture": "seconds"} | ({"peak_gib": "GiB"} if any(s.get("peak_gib") for s in steps) else {})
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for panel, (key, label) in zip(panels, shown.items(), strict=True):
        values = {(s["stage"], s["side"]): s.get(key, 0.0) for s in steps}
        places, below = [str(side) for side in sides], [0.0] * len(sides)
        for number, stage in enumerate(STAGES):
            heights = [values.get((stage, side), 0.0) for side in sides]
            if key == "peak_gib":  # one stage at a time is on the device
                panel.bar([n + 0.2 * (number - 1.5) for n in range(len(sides))], heights, 0.2, label=stage)
            else:
                panel.bar(range(len(sides)), heights, 0.6, bottom=below, label=stage)
                below = [a + b for a, b in zip(below, heights, strict=True)]
        panel.set_xticks(range(len(sides)), places)
        panel.set(xlabel="side of the picture, px", ylabel=label)
    floors = [sum(s["floor"] for s in steps if s["side"] == side) for side in sides]
    panels[0].plot(range(len(sides)), floors, "k_-", label="floor")
    for panel in panels:
        panel.legend(fontsize=8)
    figure.savefig(path, dpi=150)


# --- the command ----------------------------------------------------------------------------------


def keep_earlier(path: Path) -> None:
    """Give an earlier run's figures another name, with the time when they were written."""
    if path.exists():
        written = datetime.fromtimestamp(path.stat().st_mtime)
        earlier = path.with_stem(f"{path.stem}_{written:%Y-%m-%d_%H-%M-%S}")
        os.replace(path, earlier)
        print(f"the earlier figures are in {earlier} now", flush=True)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8, help="how long it may take (default: 8)")
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu.json"), help="file of the figures")
    parser.add_argument("--small", action="store_true", help="tiny networks and pictures, on a CPU too")
    parser.add_argument(
        "--sides", type=int, nargs="+", metavar="PIXELS",
        help=f"of the pictures, by importance (default: {' '.join(map(str, SIDES))})",
    )  # fmt: skip
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw what --out holds, and stop")
    return parser


@torch.no_grad()
def main() -> None:
    parser = make_parser()
    options = parser.parse_args()
    if options.plot is not None:
        if not options.out.is_file():
            parser.error(f"{options.out} does not exist: measure first, or name the figures with --out")
        try:
            draw(known_figures(options.out), options.plot)
        except ImportError:
            parser.error("the plot needs a package: pip install matplotlib")
        except (OSError, ValueError) as error:
            parser.error(str(error))
        return
    if not (torch.cuda.is_available() or options.small):
        parser.error("torch finds no CUDA device; --small shows on a CPU that all of this runs")
    if options.out.is_dir():
        parser.error(f"--out {options.out} is a folder: name a file")
    if options.minutes <= 0 or min(options.sides or SIDES) < MIN_SIDE:
        parser.error(f"--minutes must be above 0, and --sides at least {MIN_SIDE}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    keep_earlier(options.out)
    figures = Figures(options.out)
    name = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
    about = {"device": name, "torch": torch.__version__, "date": date.today().isoformat(),
             "networks": "tiny networks" if options.small else "published sizes, random weights"}  # fmt: skip
    figures.set("about", about)
    print(", ".join(about.values()), flush=True)
    sizes = small_sizes() if options.small else Sizes()
    settings = Settings(steps=2, steps_b=2) if options.small else Settings()
    sides = tuple(options.sides or (SMALL_SIDES if options.small else SIDES))
    counting = ProcessPoolExecutor(1, get_context("spawn"))  # one that does not hold up this one's launches
    counts = {side: counting.submit(counted, sizes, side) for side in sides}
    try:
        with suppress(KeyboardInterrupt):
            measure(Run(Networks(sizes, device), figures, settings, counts), sides, options.minutes)
    finally:
        counting.shutdown(wait=False, cancel_futures=True)
    short = sum(part["why"] == NO_TIME for part in figures.known.get("left_out", ()))
    more = f"; {short} parts need more --minutes than {options.minutes:g}" if short else ""
    print(f"{options.out} holds the figures; --plot FILE draws them{more}", flush=True)


if __name__ == "__main__":
    main()
