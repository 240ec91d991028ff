"""Peak device memory of a training step: python benchmarks/training_memory.py [--personalized] [--measure]

Runs the step of `core.training.guidance` at the published sizes (Stage C 3.6B in bfloat16, frozen; the
guidance in float32 under bfloat16 autocast; AdamW; the encoder in float32; one picture per process, in the
second of two micro-batches) on tensors that hold no data, and follows every storage from the operator that
makes it to its release. That takes one core, two minutes, 0.5 GB and no GPU. `--measure` runs the same step
on a CUDA device and prints `torch.cuda.max_memory_allocated`; `--check` compares the count with what the
CPU's allocator gives out in real steps of a small configuration. `--personalized` does all this for the step
of `core.training.personalization`: a LoRA of rank 4 on the attention and one new token, the guidance frozen,
in bfloat16, and gradients through the text encoder.

A CPU build of torch cannot run autograd on fake 'cuda' tensors. So the fake tensors lie on the CPU, and
`autocast_as_on_cuda` makes the CPU's autocast choose number formats by CUDA's lists (norms in float32, for
one). Attention is a fused kernel that keeps its output and a float32 per query and head, never a matrix of
pixels by pixels. Not counted: what kernels take while they run (workspaces; the backward pass of flash
attention takes a float32 map of the queries), the allocator's fragments, the CUDA context, and, with several
processes, the buckets of DistributedDataParallel, as large as the gradients.
"""

from __future__ import annotations

import argparse
import gc
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import modules.torchvision_operators  # noqa: F401  before transformers
from core.config.schema import LatentGeometry
from core.config.sizes import TINY, EffnetSizes, GuidanceSizes, StageCSizes
from core.data.loader import Batch
from core.training.encoders import Encoders
from core.training.guidance import GuidedStageC, draw_noise, drop_conditions, noise_latents
from core.training.personalization import PersonalizedStageC
from core.training.trainer import CLIP_NORM
from core.weights.clip import TextCondition
from core.weights.lora.names import published_orders
from gdf.diffusion import sample_losses
from gdf.targets import EPSILON
from modules.effnet import EfficientNetEncoder
from modules.guidance import Guidance
from modules.stage_c import StageC

from transformers import CLIPTextConfig, CLIPTextModelWithProjection  # isort: skip

SIDES = (1024, 2048, 3072, 4096, 4608)  # of the pictures, in pixels
TEXT_ENCODER = 694_659_840  # parameters of the CLIP text encoder, which stays on the device
TEXT_TOKENS = 77
TEXT_LAYERS, TEXT_VOCABULARY = 32, 49409  # of the same, with a new token
RANK = 4
GRANULE = 512  # bytes: CUDA's allocator hands out multiples
GIB = 2**30


@dataclass(frozen=True)
class Job:
    """What is trained, and on which pictures; the defaults are the published sizes."""

    side: int = 1024  # of the square picture, in pixels
    gradient_checkpointing: bool = True
    stage_c: StageCSizes = StageCSizes()
    guidance: GuidanceSizes = GuidanceSizes()
    effnet: EffnetSizes = EffnetSizes()
    geometry: LatentGeometry = LatentGeometry()
    dtype: torch.dtype = torch.bfloat16  # of Stage C, and autocast's
    text_encoder: int = TEXT_ENCODER  # parameters, in the same dtype
    personalized: bool = False  # LoRA and a token instead of the guidance, and a text encoder of this depth
    text_layers: int = TEXT_LAYERS
    text_vocabulary: int = TEXT_VOCABULARY

    @property
    def latent(self) -> int:
        """The latent's side."""
        return self.side // self.geometry.stride


@dataclass(frozen=True)
class Memory:
    """Bytes on the device: weights, the optimiser's state and the gradients between steps, and the peak."""

    weights: int
    optimiser: int
    gradients: int
    peak: int

    @property
    def growth(self) -> int:
        """The peak over what lies there between two micro-batches."""
        return self.peak - self.weights - self.optimiser - self.gradients


# --- following storages ---------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operators return, while they live: `now`, and at most `peak`."""

    def __init__(self, granule: int = GRANULE) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._granule = granule
        self._living: dict[int, weakref.ref] = {}

    def follow(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors from before the mode was entered."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if id(storage) not in self._living:
                size = -(-storage.nbytes() // self._granule) * self._granule
                release = partial(self._release, id(storage), size)
                self._living[id(storage)] = weakref.ref(storage, release)
                self.now += size
        self.peak = max(self.peak, self.now)

    def _release(self, key: int, size: int, _: weakref.ref) -> None:
        del self._living[key]
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ARG002
        out = function(*args, **(kwargs or {}))
        self.follow(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        return out


# --- CUDA's autocast on the CPU -------------------------------------------------------------------

# ATen/autocast_mode.h: AT_FORALL_FP32, AT_FORALL_FP32_SET_OPT_DTYPE and AT_FORALL_PROMOTE, as far as networks
# like ours may call them and the CPU's lists differ
IN_FLOAT32 = (
    "layer_norm", "native_layer_norm", "group_norm", "rms_norm", "exp", "log", "reciprocal", "rsqrt",
    "softplus", "pow.Tensor_Scalar", "upsample_nearest2d", "upsample_bilinear2d", "_upsample_bilinear2d_aa",
)  # fmt: skip
SUMMED_IN_FLOAT32 = ("sum", "sum.dim_IntList", "linalg_vector_norm", "cumsum")
WIDEST = ("addcmul", "addcdiv")
NORM = "norm.ScalarOpt_dim"


def _operator(name: str) -> Callable:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _is_low(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.element_size() < 4


def _in_float32(operator: Callable, *args, **kwargs):
    with torch.autocast("cpu", enabled=False):
        return operator(*(a.float() if _is_low(a) else a for a in args), **kwargs)


def _summed_in_float32(operator: Callable, x: Tensor, *args, **kwargs):
    if _is_low(x):
        kwargs = {"dtype": torch.float32, **{k: v for k, v in kwargs.items() if v is not None}}
    with torch.autocast("cpu", enabled=False):
        return operator(x, *args, **kwargs)


def _norm(x: Tensor, p, dim, keepdim: bool = False) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return torch.ops.aten.norm.ScalarOpt_dim_dtype(x, p, dim, keepdim, dtype=torch.float32)


def _widest(operator: Callable, *args, **kwargs):
    if any(isinstance(a, Tensor) and a.dtype == torch.float32 for a in args):
        return _in_float32(operator, *args, **kwargs)
    with torch.autocast("cpu", enabled=False):
        return operator(*args, **kwargs)


@contextmanager
def autocast_as_on_cuda() -> Iterator[None]:
    """Within it, autocast on the CPU treats the operators above as CUDA's autocast treats them."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        for names, policy in (
            (IN_FLOAT32, _in_float32), (SUMMED_IN_FLOAT32, _summed_in_float32), (WIDEST, _widest)
        ):  # fmt: skip
            for name in names:
                library.impl(name, partial(policy, _operator(name)), "AutocastCPU")
        library.impl(NORM, _norm, "AutocastCPU")
        yield


# --- the step -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """Networks and optimiser of a job on a device."""

    job: Job
    module: GuidedStageC | PersonalizedStageC
    effnet: EfficientNetEncoder
    text_encoder: list[Tensor]  # its weights, or what stands in for them
    optimizer: torch.optim.AdamW

    def follow(self, live: LiveBytes) -> tuple[int, int, int]:
        """Let `live` count the weights, the optimiser's state and the gradients: bytes of each."""
        modules = (self.module, self.module.stage_c, self.module.guidance, self.effnet)
        weights = [t for m in modules for t in (*m.parameters(), *m.buffers())] + self.text_encoder
        state = [t for entry in self.optimizer.state.values() for t in entry.values()]
        gradients = [p.grad for p in self.module.parameters()]
        totals = [live.now]
        for tensors in (weights, state, gradients):
            live.follow(tensors)
            totals.append(live.now)
        return tuple(after - before for before, after in zip(totals, totals[1:], strict=False))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New parameters have this dtype: `Module.to` cannot convert fake ones."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def prepare(job: Job, device: str) -> Training:
    """Random weights in the middle of an update: the optimiser has its state, and gradients exist."""
    with torch.device(device):
        with default_dtype(job.dtype):
            stage_c = StageC(**asdict(job.stage_c))
        effnet = EfficientNetEncoder(**asdict(job.effnet)).requires_grad_(False)
        stage_c.gradient_checkpointing = job.gradient_checkpointing
        module, text_encoder = (make_personalized if job.personalized else make_guided)(job, stage_c)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, foreach=True)  # CUDA's default
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return Training(job, module.train(), effnet, text_encoder, optimizer)


def make_guided(job: Job, stage_c: StageC) -> tuple[GuidedStageC, list[Tensor]]:
    """The guidance to train, and what stands in for the text encoder."""
    guidance = Guidance(**asdict(job.guidance))
    guidance.init_weights()
    return GuidedStageC(stage_c, guidance), [torch.empty(job.text_encoder, dtype=job.dtype)]


def make_personalized(job: Job, stage_c: StageC) -> tuple[PersonalizedStageC, list[Tensor]]:
    """A LoRA and a token to train, and the text encoder's weights."""
    with default_dtype(job.dtype):
        guidance = Guidance(**asdict(job.guidance))
        text = RandomTokens(job, make_text_model(job))
    weights = published_orders(job.stage_c)[0]
    module = PersonalizedStageC(stage_c, guidance, text, weights, RANK, [job.text_vocabulary - 1])
    return module, [*text.model.parameters(), *text.model.buffers()]


def make_text_model(job: Job) -> CLIPTextModelWithProjection:
    """A text encoder as wide as Stage C expects it; CLIP bigG at the published sizes."""
    width = job.stage_c.c_clip_text
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=job.text_vocabulary, hidden_size=width, intermediate_size=4 * width,
            projection_dim=job.stage_c.c_clip_text_pooled, num_hidden_layers=job.text_layers,
            num_attention_heads=width // min(64, width // 2), hidden_act="gelu",
            bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip


@dataclass(frozen=True)
class RandomText:
    """In the place of `core.weights.clip.TextEncoder`: its output for any caption, without its network."""

    job: Job

    def encode(self, prompts: Iterable[str], device: str, together: bool = False) -> dict[str, TextCondition]:  # noqa: ARG002
        sizes, kind = self.job.stage_c, {"dtype": self.job.dtype, "device": device}
        tokens = torch.randn(1, TEXT_TOKENS, sizes.c_clip_text, **kind)
        pooled = torch.randn(1, 1, sizes.c_clip_text_pooled, **kind)
        return {prompt: TextCondition(tokens, pooled) for prompt in prompts}


@dataclass(frozen=True)
class RandomTokens:
    """In the place of `core.weights.clip.TextEncoder` too, with the network and without a tokenizer."""

    job: Job
    model: CLIPTextModelWithProjection

    def embed(self, prompts: Sequence[str], device: str) -> tuple[Tensor, Tensor]:
        """The new token in every place: fake tensors cannot tell where a text ends."""
        ids = torch.full((len(prompts), TEXT_TOKENS), self.job.text_vocabulary - 1, device=device)
        out = self.model.text_model(input_ids=ids)
        return out.last_hidden_state, self.model.text_projection(out.last_hidden_state[:, -1:])


def micro_batch(training: Training, device: str) -> None:
    """Forward and backward for one random picture, as the training script and the trainer do it."""
    job = training.job
    encoders = Encoders(
        training.effnet, RandomText(job), None, job.geometry, job.stage_c.c_clip_img, torch.device(device)
    )
    batch = Batch(torch.rand(1, 3, job.side, job.side), [""], [""])
    z, z_lr = encoders.latents(batch)
    noise = draw_noise([(0, 0, 0)], z.shape[1:], z_lr.shape[1:])
    latents = noise_latents(z, z_lr, noise, EPSILON)
    if job.personalized:
        inputs = (batch.captions, encoders.image_embeddings(batch), noise)
    else:
        inputs = (drop_conditions(encoders.conditions(batch), encoders.empty(), noise).to(device, job.dtype),)
    with torch.autocast(device, job.dtype) if job.dtype == torch.bfloat16 else nullcontext():
        prediction = training.module(latents, *inputs)
    sample_losses(prediction, latents.target).mean().backward()


def update(training: Training) -> None:
    """What follows the last micro-batch."""
    torch.nn.utils.clip_grad_norm_(training.module.parameters(), CLIP_NORM, foreach=True)
    training.optimizer.step()
    training.optimizer.zero_grad(set_to_none=True)


# --- three ways to a figure -----------------------------------------------------------------------


def count(training: Training, granule: int = GRANULE) -> Memory:
    """Memory of a micro-batch and the update after it on the CPU, from the storages that live."""
    live = LiveBytes(granule)
    weights, optimiser, gradients = training.follow(live)
    gc.collect()
    with autocast_as_on_cuda(), live:
        micro_batch(training, "cpu")
        update(training)
    return Memory(weights, optimiser, gradients, live.peak)


def estimate(job: Job, granule: int = GRANULE) -> Memory:
    """Memory of a job's training step; takes next to none itself."""
    with FakeTensorMode():
        return count(prepare(job, "cpu"), granule)


def allocator_growth(job: Job) -> int:
    """Bytes that the CPU's allocator gives out at the peak of a real step, by the profiler's record of it."""
    training = prepare(job, "cpu")
    gc.collect()
    with autocast_as_on_cuda(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        micro_batch(training, "cpu")
        update(training)
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events))


def measure(job: Job) -> Memory | None:
    """Memory of a job's training step as the CUDA device has it; None where it does not fit."""
    gc.collect()
    torch.cuda.empty_cache()
    try:
        training = prepare(job, "cuda")
        resident = training.follow(LiveBytes())
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        micro_batch(training, "cuda")
        update(training)
        torch.cuda.synchronize()
    except torch.cuda.OutOfMemoryError:
        return None
    return Memory(*resident, torch.cuda.max_memory_allocated())


# --- output ---------------------------------------------------------------------------------------

SMALL = Job(
    side=256,
    stage_c=StageCSizes(c_cond=256, c_hidden=(256, 256), nhead=(4, 4), blocks=((1, 3), (3, 1))),
    guidance=GuidanceSizes(ind=256, ch=128, n_head=4, head_dim=32, n_groups=16, f_dim=128),
    effnet=TINY.effnet,
    geometry=LatentGeometry(stride=8, lr_train_cells=12),
    text_encoder=0,
    text_layers=2,
    text_vocabulary=100,
)


def pair(job: Job, figure: Callable[[Job], Memory | None]) -> list[Memory | None]:
    """With gradient checkpointing and without."""
    return [figure(replace(job, gradient_checkpointing=checkpointing)) for checkpointing in (True, False)]


def print_table(sides: Iterable[int], figure: Callable[[Job], Memory | None], personalized: bool) -> None:
    """A line of Markdown for each size of picture, in GiB."""
    print("| size | latent | weights + optimiser | peak with checkpointing | peak without |")
    print("|---|---|---|---|---|", flush=True)
    for side in sides:
        job = Job(side, personalized=personalized)
        both = pair(job, figure)
        resident = next((f"{(m.weights + m.optimiser) / GIB:.1f}" for m in both if m), "-")
        peaks = " | ".join(f"{m.peak / GIB:.1f}" if m else "does not fit" for m in both)
        print(f"| {side}² | {job.latent}² | {resident} | {peaks} |", flush=True)


def print_check(personalized: bool) -> None:
    """The count against the allocator of the CPU: what a step takes over what lies there before it."""
    for dtype in (torch.float32, torch.bfloat16):
        for checkpointing in (True, False):
            job = replace(SMALL, dtype=dtype, gradient_checkpointing=checkpointing, personalized=personalized)
            counted, real = estimate(job, 1).growth, allocator_growth(job)
            print(f"{str(dtype):15} {'with' if checkpointing else 'without':8} checkpointing: "
                  f"{counted / 1e6:.2f} MB counted, {real / 1e6:.2f} MB allocated, "
                  f"ratio {counted / real:.4f}", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak device memory of a training step.")
    parser.add_argument(
        "--personalized", action="store_true", help="LoRA and a token instead of the guidance"
    )
    parser.add_argument("--sides", type=int, nargs="+", default=SIDES, help="of the pictures, in pixels")
    parser.add_argument(
        "--measure", action="store_true", help="measure on the CUDA device, with real tensors"
    )
    parser.add_argument("--check", action="store_true", help="compare the count with real runs on the CPU")
    options = parser.parse_args()
    if options.check:
        print_check(options.personalized)
        return
    if options.measure and not torch.cuda.is_available():
        sys.exit("--measure needs a CUDA device, and torch finds none")
    where = torch.cuda.get_device_name() if options.measure else "counted without a device"
    print(f"GiB, batch 1, {where}\n", flush=True)
    print_table(options.sides, measure if options.measure else estimate, options.personalized)


if __name__ == "__main__":
    main()
