"""Seconds of a guidance update, and where they go: python benchmarks/training_speed.py [--sides 64 128]

One picture at a time with random weights: the published sizes on a GPU, a small family on a CPU. For every
size, with and without checkpointing, it prints seconds, pictures a second of all processes together, the
shares of the encoder, the low-resolution pass, the rest of the forward pass and the backward pass, and how
many times it takes what its products take at the speed of one large product. `--compile` compiles the
networks first.
Two processes: torchrun --nproc_per_node 2 benchmarks/training_speed.py
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from training_memory import SMALL, Job, Training, micro_batch, prepare, update

from core import launch
from core.pipeline.resolution import MIN_SIDE

SIDES, SMALL_SIDES = (1024, 2048, 4096), (64, 128, 256)
RUNS = 5  # updates, after one to warm up, of which the fastest counts
PARTS = ("encoder", "low pass", "high pass", "backward")


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@contextmanager
def clocked(owner: Any, name: str, part: str, times: dict[str, float], device: str) -> Iterator[None]:
    """Within it, the seconds of a method are added to a part's."""
    method = getattr(owner, name)

    def timed(*inputs: Any, **named: Any) -> Any:
        synchronise(device)
        start = time.perf_counter()
        made = method(*inputs, **named)
        synchronise(device)
        times[part] += time.perf_counter() - start
        return made

    setattr(owner, name, timed)
    try:
        yield
    finally:
        setattr(owner, name, method)


def one_update(training: Training, device: str) -> tuple[float, dict[str, float]]:
    """Seconds of an update of one picture, and of its parts."""
    times: dict[str, float] = defaultdict(float)
    inner = getattr(training.module, "module", training.module)  # of DistributedDataParallel
    synchronise(device)
    start = time.perf_counter()
    with (
        clocked(training.effnet, "forward", "encoder", times, device),
        clocked(inner.stage_c, "predict_with_features", "low pass", times, device),
        clocked(inner, "forward", "forward", times, device),
        clocked(torch.Tensor, "backward", "backward", times, device),
    ):
        micro_batch(training, device)
        update(training)
    synchronise(device)
    whole = time.perf_counter() - start
    times["high pass"] = times.pop("forward") - times["low pass"]
    return whole, {part: times[part] / whole for part in PARTS}


def compiled(training: Training) -> Training:
    """The same with compiled blocks of Stage C, and a compiled encoder."""
    training.module.stage_c.plain = True  # PyTorch's compiler does not take all of a CPU's own products
    for block in (*training.module.stage_c.down_blocks, *training.module.stage_c.up_blocks):
        for each in block:
            each.compile()
    training.effnet.compile()
    return training


def floating_point_operations(job: Job) -> float:
    """Of an update of one picture, counted on tensors without data; without what checkpointing repeats."""
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        training = prepare(replace(job, gradient_checkpointing=False), "cpu")
        training.module.stage_c.plain = True  # the CPU's own products are not counted
        micro_batch(training, "cpu")
    return float(counter.get_total_flops())


def ceiling(job: Job, device: str) -> float:
    """Floating-point operations a second of one large product."""
    n = 8192 if device == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=job.dtype)
    times = []
    for _ in range(4 * RUNS):
        synchronise(device)
        start = time.perf_counter()
        _ = a @ a
        synchronise(device)
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times)


def row(job: Job, device: str, speed: float, compile: bool) -> str:
    """A line of the table."""
    training = prepare(job, device)
    if compile:
        compiled(training)
    if launch.processes() > 1:
        module: nn.Module = DistributedDataParallel(training.module, find_unused_parameters=True)
        training = replace(training, module=module)
    one_update(training, device)
    took, parts = min((one_update(training, device) for _ in range(RUNS)), key=lambda found: found[0])
    shares = [f"{100 * parts[name]:.0f} %" for name in PARTS]
    floor = floating_point_operations(job) / speed
    kept = "with" if job.gradient_checkpointing else "without"
    cells = (
        f"{job.side}²",
        kept,
        f"{took:.3f}",
        f"{launch.processes() / took:.2f}",
        *shares,
        f"{took / floor:.1f}",
    )
    return f"| {' | '.join(cells)} |"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sides", type=int, nargs="+", help="of the pictures, in pixels")
    parser.add_argument("--compile", action="store_true", help="compile the networks")
    options = parser.parse_args()
    if min(options.sides or SIDES) < MIN_SIDE:
        parser.error(f"--sides must be at least {MIN_SIDE}, not {min(options.sides)}")
    return options


def told(line: str) -> None:
    if launch.is_main():
        print(line, flush=True)


def main() -> None:
    options = parse()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    job = Job() if device == "cuda" else replace(SMALL, dtype=torch.float32)
    if launch.processes() > 1:
        if device == "cuda":
            torch.cuda.set_device(launch.place()[0])
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    speed = ceiling(job, device)
    told(f"{where}, {launch.processes()} process(es), torch {torch.__version__}, "
         f"{'compiled' if options.compile else 'not compiled'}, {speed / 1e12:.3g} TFLOP/s\n")  # fmt: skip
    told(f"| size | checkpointing | s | pictures/s | {' | '.join(PARTS)} | times the floor |")
    told("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for side in options.sides or (SIDES if device == "cuda" else SMALL_SIDES):
        for checkpointing in (True, False):
            told(
                row(
                    replace(job, side=side, gradient_checkpointing=checkpointing),
                    device,
                    speed,
                    options.compile,
                )
            )
    if launch.processes() > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
