"""Train the whole embedded family from nothing: python train/make_tiny.py, or make tiny

One training after the other runs in runs/tiny, and what each is for is copied into models/tiny when it is
done, where the next ones read it. Running it again goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from core.commands.flags import Parser, run

ROOT = Path(__file__).parents[1]
CONFIGS, MODELS = ROOT / "configs" / "tiny", ROOT / "models" / "tiny"
TIMES = "times.json"  # seconds of each training, over all calls, beside the runs


PREFACE = """\
All of the embedded family is trained anew, which takes many hours on two cores. Ctrl-C stops it; the same
command goes on. What is done replaces files in models/tiny, which fit each other again only when all is done:
git checkout models/tiny brings back those that were there."""


@dataclass(frozen=True)
class Part:
    """A training: its script, its file in configs/tiny, and which of its files go where in models/tiny."""

    script: str
    config: str
    results: tuple[tuple[str, str], ...] = ()


def same(*names: str) -> tuple[tuple[str, str], ...]:
    """Results that keep their names."""
    return tuple((name, name) for name in names)


TEXT = ("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "tokenizer/words.txt",
        "text_encoder/config.json", "text_encoder/model.safetensors")  # fmt: skip
PARTS = (
    Part("train_text_encoder", "train_text_encoder", tuple((f"text/{name}", name) for name in TEXT)),
    Part("train_recogniser", "train_recogniser", same("recogniser.safetensors")),
    Part(
        "train_recogniser", "train_image_encoder", (("recogniser.safetensors", "image_encoder.safetensors"),)
    ),
    Part("train_stage_a", "train_stage_a"),
    Part("train_stage_a", "train_stage_a_finish", same("stage_a.safetensors")),
    Part("train_previewer", "train_encoder"),
    Part("train_stage_b", "train_stage_b", same("effnet_encoder.safetensors")),
    Part("train_stage_b", "train_stage_b_finish", same("stage_b.safetensors")),
    Part("train_previewer", "train_previewer", same("previewer.safetensors")),
    Part("train_stage_c", "train_stage_c"),
    Part("train_stage_c", "train_stage_c_finish", same("stage_c.safetensors")),
    Part("train_t2i", "train_t2i", same("ultrapixel_t2i.safetensors")),
    Part(
        "train_personalized",
        "train_personalized",
        (("lora.safetensors", "lora_striped_balloon.safetensors"),),
    ),
    *(
        Part(
            "train_ultrapixel_control",
            f"train_control_{kind}",
            ((f"{kind}.safetensors", f"controlnet_{kind}.safetensors"),),
        )
        for kind in ("canny", "inpainting", "super_resolution")
    ),
)


def make(part: Part) -> None:
    """Run a training to its end and copy its results; ValueError where it stopped before."""
    path = CONFIGS / f"{part.config}.yaml"
    values = yaml.safe_load(path.read_text("utf-8"))
    folder = ROOT / values["checkpoint_path"] / values["experiment_id"]
    before, started = done(folder), time.monotonic()
    code = train(part.script, path)
    seconds = time.monotonic() - started if done(folder) > before else 0.0
    took = add_time(folder.parent / TIMES, part.config, seconds)
    if code or done(folder) < values["updates"]:
        raise ValueError(f"{path} is not trained to its end: the same command again goes on with it")
    for source, target in part.results:
        copy(folder / source, MODELS / target)
    print(f"{part.config}: {took / 60:.1f} minutes", flush=True)


def train(script: str, config: Path) -> int:
    """Run a training script; its exit code, once it has saved where this script is stopped."""
    threads = str(os.cpu_count() or 1)  # nothing else is expected to run: no core is left free
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    command = [sys.executable, f"train/{script}.py", str(config)]
    with subprocess.Popen(command, cwd=ROOT, env=environment) as process:
        signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C reaches the training by itself
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        return process.wait()


def done(folder: Path) -> int:
    """The last update that a run saved; 0 before the first."""
    return max((int(path.stem.removeprefix("step_")) for path in folder.glob("step_*.pt")), default=0)


def copy(source: Path, target: Path) -> None:
    """Copy a file, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.part")
    shutil.copyfile(source, temporary)
    os.replace(temporary, target)


def add_time(path: Path, name: str, seconds: float) -> float:
    """Add to the time that a training took, which a file keeps; the sum. A damaged file begins anew."""
    from core.weights.checkpoint import read_json, save_text  # loads torch, once the flags are read

    try:
        times = read_json(path) if path.exists() else {}
    except ValueError as error:
        print(f"warning: {error}", file=sys.stderr)
        times = {}
    times[name] = times.get(name, 0.0) + seconds
    path.parent.mkdir(parents=True, exist_ok=True)
    save_text(path, json.dumps(times, indent=2) + "\n")
    return times[name]


def main() -> int:
    Parser(__doc__).parse_args()
    print(PREFACE, flush=True)
    for number, part in enumerate(PARTS, 1):
        print(f"{number} of {len(PARTS)}: {part.config}", flush=True)
        make(part)
    return 0


if __name__ == "__main__":
    run(main)
