"""Peak memory of loading: python benchmarks/load_memory.py [--folder DIR]

Writes Stage C at the published width but with few blocks, as safetensors, also in float8 with scales, and as
torch archives, loads each in a fresh process and prints the growth of resident memory at its peak over the
model's own bytes. Linux only.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from core.weights.checkpoint import load_module, save_archive, save_tensors
from modules.stage_c import StageC

build = partial(StageC, blocks=((1, 2), (2, 1)))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
BOUND = 1.15  # for safetensors files

CASES = (  # the file, its dtype, the model's
    ("safetensors", "fp32", "bf16"),
    ("safetensors", "bf16", "bf16"),
    ("safetensors", "fp32", "fp32"),
    ("safetensors", "fp8", "bf16"),
    ("archive", "fp32", "bf16"),
    ("archive", "bf16", "bf16"),
)


def resident_bytes(field: str) -> int:
    """This process's VmRSS (now) or VmHWM (at its peak)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status does not tell {field}: this benchmark needs Linux")


def write(path: Path, kind: str, dtype: torch.dtype) -> None:
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in build().state_dict().items()}
    weights = {name: torch.rand(shape).to(dtype) for name, shape in shapes.items()}
    if dtype == DTYPES["fp8"]:
        scaled = [name for name in weights if name.endswith(".weight")]
        weights |= {name.replace(".weight", ".scale_weight"): torch.ones(()) for name in scaled}
    if kind == "safetensors":
        save_tensors(path, weights, {})
    else:
        save_archive(path, weights)


def measure(path: Path, dtype: torch.dtype) -> None:
    """Print the model's bytes, the growth at its peak and the seconds of loading."""
    before, start = resident_bytes("VmRSS"), time.perf_counter()
    module = load_module(build, path, dtype=dtype, what="Stage C")
    seconds, growth = time.perf_counter() - start, resident_bytes("VmHWM") - before
    model = sum(tensor.nbytes for tensor in module.state_dict().values())
    print(model, growth, f"{seconds:.2f}")


def run_self(*arguments: object) -> str:
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> int:
    """Exit code 1 if a safetensors file needs more than the bound."""
    parser = argparse.ArgumentParser(description="Peak memory of loading, as a ratio to the model's bytes.")
    parser.add_argument("--folder", type=Path, help="where the files are written and removed (2 GB)")
    parser.add_argument("--write", nargs=3, metavar=("PATH", "KIND", "DTYPE"), help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=2, metavar=("PATH", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        path, kind, dtype = options.write
        write(Path(path), kind, DTYPES[dtype])
    elif options.measure:
        path, dtype = options.measure
        measure(Path(path), DTYPES[dtype])
    else:
        return run_cases(options.folder)
    return 0


def run_cases(folder: Path | None) -> int:
    passed = True
    for kind, stored, loaded in CASES:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            path = Path(scratch) / "weights"
            run_self("--write", path, kind, stored)
            model, growth, seconds = run_self("--measure", path, loaded).split()
        ratio = int(growth) / int(model)
        print(
            f"{kind:11} {stored} file -> {loaded} model of {int(model) / 1e6:.0f} MB: "
            f"peak {ratio:.3f} times the model, {seconds} s", flush=True
        )  # fmt: skip
        passed &= kind != "safetensors" or ratio <= BOUND
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
