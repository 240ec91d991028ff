"""The real script on files of the published width with few blocks: python benchmarks/full_width.py

Writes random weights in the published layout (Stage C at width 2048, Stage B at 320 to 1280, the text encoder
at 1280) as safetensors and as torch archives, and runs inference/test_t2i.py on both, for the same pictures.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from core.config.schema import LatentGeometry
from core.config.sizes import GuidanceSizes, PreviewerSizes, StageASizes, StageBSizes, StageCSizes
from core.weights.checkpoint import read_tensors, save_archive

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "models"))
from random_family import Family, write_family

FULL_WIDTH = Family(
    stage_c=StageCSizes(blocks=((1, 1), (1, 1))),
    guidance=GuidanceSizes(),
    stage_b=StageBSizes((320, 640, 1280, 1280), (-1, -1, 20, 20), ((1, 1, 1, 1), (1, 1, 1, 1)),
                        ((1, 1, 1, 1), (3, 3, 2, 2))),
    stage_a=StageASizes(),
    previewer=PreviewerSizes(),
    geometry=LatentGeometry(),
)  # fmt: skip


def picture(folder: Path, output: Path) -> np.ndarray:
    start = time.perf_counter()
    flags = {"config_c": folder / "stage_c.yaml", "config_b": folder / "stage_b.yaml", "prompt": "a red kite",
             "pretrained_path": folder / "ultrapixel_t2i.safetensors", "output_dir": output,
             "height": 1024, "width": 1024, "steps": 1, "steps_b": 1}  # fmt: skip
    command = [sys.executable, str(ROOT / "inference" / "test_t2i.py")]
    subprocess.run(command + [str(part) for k, v in flags.items() for part in (f"--{k}", v)], check=True)
    print(f"{output.name}: {time.perf_counter() - start:.1f} s", flush=True)
    (path,) = output.glob("*.png")
    return np.asarray(Image.open(path))


def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "models")
        write_family(folder, FULL_WIDTH)
        first = picture(folder, Path(temporary, "safetensors"))
        for name in ("stage_c", "stage_b", "stage_a"):
            path = folder / f"{name}.safetensors"
            save_archive(path, {"state_dict": read_tensors(path, torch.float32)})
        second = picture(folder, Path(temporary, "archives"))
    same = np.array_equal(first, second)
    print(f"{first.shape} pictures from both kinds of file are {'the same' if same else 'DIFFERENT'}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
