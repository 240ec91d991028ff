"""This code against another checkout of it: python benchmarks/against_checkout.py FOLDER [--parts hr ...]

Each runs in a process of its own, and the two take turns: after a first run of both, which is not counted,
`--pairs` runs each. Printed are the medians of the seconds and the median of the pairs' ratios. The parts:

hr         a high-resolution step of a Stage C of width 512, with guidance and both halves of cfg
diffusers  the same without guidance, beside diffusers' network instead of another checkout
picture    a picture of 512 x 512 of the embedded family
stage_b    a step of a Stage B of half the lite (700M) widths, at a latent of 256 x 256
memory     by how much the memory of one such step grows at its peak (Linux only)
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
PARTS = ("hr", "diffusers", "picture", "stage_b", "memory")
MIB = 2**20
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}  # threads sleep soon, as in scripts
EXACT = {"MALLOC_MMAP_THRESHOLD_": str(MIB)}  # tensors go back to the system at once, which takes time
Work = Callable[[], object]


# --- the work, in the process of a checkout -------------------------------------------------------


def _stage_c(blocks: list[int]):
    import torch
    from peers import random_stage_c

    torch.manual_seed(0)
    down, up = blocks, blocks[::-1]
    return random_stage_c(512, 8, (down, up))


def hr(blocks: list[int], side: int) -> Work:
    """A step of the high-resolution pass, with guidance and both halves of cfg."""
    import torch
    from peers import randomised

    from modules.guidance import Guidance

    stage_c = _stage_c(blocks)
    guidance = randomised(Guidance(ind=512, ch=256, n_head=8, head_dim=32, n_groups=16, f_dim=256), 0.05)
    held = stage_c.prepare(torch.randn(2, 77, 48), torch.randn(2, 1, 48), torch.randn(2, 1, 32))
    _, features = stage_c.predict_with_features(torch.randn(2, 16, 24, 24), torch.full((2,), 0.05), held)
    bound = guidance.prepare(features.first(1), stage_c.site_sizes((side, side)))
    x, r = torch.randn(2, 16, side, side), torch.full((2,), 0.5)
    return lambda: stage_c.predict(x, r, held, guidance=bound)


def plain_hr(blocks: list[int], side: int, theirs: bool) -> Work:
    """The same without guidance, which diffusers' network does not have; ours or theirs."""
    import torch
    from peers import unet_of

    stage_c = _stage_c(blocks)
    x, r = torch.randn(2, 16, side, side), torch.full((2,), 0.5)
    text, pooled, image = torch.randn(2, 77, 48), torch.randn(2, 1, 48), torch.randn(2, 1, 32)
    if theirs:
        network = unet_of(stage_c)
        return lambda: network(x, r, pooled, text, image).sample
    held = stage_c.prepare(text, pooled, image)
    return lambda: stage_c.predict(x, r, held)


def picture() -> Work:
    """A picture of the embedded family, with all that is loaded."""
    try:
        from core.pipeline.pipeline import Job, UltraPixelPipeline
    except ImportError:  # before core had rooms
        from core.pipeline import Job, UltraPixelPipeline
    from core.settings import Settings

    files = "configs/tiny/stage_c.yaml", "configs/tiny/stage_b.yaml", "models/tiny/ultrapixel_t2i.safetensors"
    pipeline = UltraPixelPipeline.from_config(*files, device="cpu")
    return lambda: pipeline.run([Job("a red house by the sea", 512, 512, 1)], Settings(cfg=2.0))


def stage_b(side: int) -> Work:
    """A step of a Stage B of half the lite (700M) widths, and what is prepared for it."""
    import torch
    from peers import TEXT, randomised

    from modules.stage_b import StageB

    torch.manual_seed(0)
    sizes = dict(c_hidden=(160, 288, 576, 576), nhead=(-1, -1, 9, 9), c_cond=640, c_clip=TEXT)
    network = randomised(StageB(**sizes), 0.05)

    def step(side: int) -> None:
        x, r = torch.randn(2, 4, side, side), torch.full((2,), 0.5)
        network(x, r, torch.randn(2, 16, 12, 12), torch.randn(2, 1, TEXT))

    step(16)
    return lambda: step(side)


def work_of(part: str, arguments: argparse.Namespace) -> Work:
    """The work of a part, in the checkout of the working directory."""
    if part == "hr":
        return hr(arguments.blocks, arguments.side)
    if part in ("ours", "theirs"):
        return plain_hr(arguments.blocks, arguments.side, part == "theirs")
    return picture() if part == "picture" else stage_b(arguments.side_b)


def memory(field: str) -> int:
    """This process's VmRSS (now) or VmHWM (at its peak) in bytes, 0 where the system does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


def serve(part: str, arguments: argparse.Namespace) -> None:
    """Do the work once for every line that comes in; answer with seconds, and bytes at the peak."""
    sys.path[:0] = [str(Path.cwd()), str(Path("tests").resolve())]
    import torch

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with torch.no_grad():
        work = work_of(part, arguments)
        for _ in sys.stdin:
            if Path("/proc/self/clear_refs").exists():
                Path("/proc/self/clear_refs").write_text("5")  # forget the peak of before
            before, start = memory("VmRSS"), time.perf_counter()
            work()
            print(time.perf_counter() - start, memory("VmHWM") - before, flush=True)


# --- turns ----------------------------------------------------------------------------------------


class Checkout:
    """The process that does a part's work with a checkout's code."""

    def __init__(self, folder: Path, part: str, arguments: argparse.Namespace) -> None:
        more = ["--threads", str(arguments.threads), "--side", str(arguments.side), "--side_b",
                str(arguments.side_b), "--blocks", *map(str, arguments.blocks)]  # fmt: skip
        command = [sys.executable, str(Path(__file__).resolve()), str(folder), "--serve", part, *more]
        self._process = subprocess.Popen(
            command,
            cwd=folder,
            env={**ENVIRONMENT, **os.environ, **(EXACT if part == "memory" else {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self) -> tuple[float, int]:
        """Seconds of the work, and the growth of its memory at the peak."""
        print(file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline().split()
        if not answer:
            raise SystemExit(f"the work failed with exit code {self._process.wait()}")
        return float(answer[0]), int(answer[1])

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def compare(part: str, ours: Checkout, theirs: Checkout, pairs: int) -> None:
    """Print the seconds of both and how they compare, or the memory."""
    _, grown = zip(ours.run(), theirs.run(), strict=True)
    if part == "memory":
        figures = "".join(f"{growth / MIB:6.0f} MiB" for growth in grown)
        print(f"{part:<12}{figures}  {grown[0] / grown[1]:.2f} of it", flush=True)
    else:
        seconds = [(ours.run()[0], theirs.run()[0]) for _ in range(pairs)]
        figures = "".join(f"{median(column):8.2f} s" for column in zip(*seconds, strict=True))
        ratio = median(b / a for a, b in seconds)
        print(f"{part:<12}{figures}  {ratio:.2f} times as fast", flush=True)
    for checkout in (ours, theirs):
        checkout.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="the other checkout")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to compare")
    parser.add_argument("--pairs", type=int, default=5, help="runs of each")
    parser.add_argument("--threads", type=int, default=0, help="of each process (0: as PyTorch has it)")
    parser.add_argument("--blocks", type=int, nargs=2, default=(8, 24), help="Stage C's, per level")
    parser.add_argument("--side", type=int, default=48, help="of Stage C's latent")
    parser.add_argument("--side_b", type=int, default=256, help="of Stage B's latent")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve(arguments.serve, arguments)
    print(f"{'':<12}{'ours':>10}{'theirs':>10}")
    for part in arguments.parts:
        names = ("ours", "theirs") if part == "diffusers" else (part, part)
        folders = (ROOT, ROOT if part == "diffusers" else arguments.folder.resolve())
        both = [Checkout(folder, name, arguments) for folder, name in zip(folders, names, strict=True)]
        compare(part, *both, arguments.pairs)


if __name__ == "__main__":
    main()
