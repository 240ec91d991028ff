"""Servers for tests: inference/app.py in a process of its own, with random weights beside the family's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from conftest import ROOT
from test_loras import make_lora
from test_readme_commands import write_controlnet

from core.config.sizes import STAGE_C_VERSIONS
from core.weights.lora.files import write_lora

QUICK = {"size": "64x64", "seed": 5, "steps": 1, "steps_b": 1}


def write_models(folder: Path) -> Path:
    """A folder that stands for models/: the embedded family, with random ControlNets and a random LoRA."""
    (folder / "tiny").mkdir()
    for path in (ROOT / "models" / "tiny").iterdir():
        if not path.name.startswith(("controlnet", "lora")):
            (folder / "tiny" / path.name).symlink_to(path)
    for kind in ("canny", "inpainting"):
        write_controlnet(folder / "tiny" / f"controlnet_{kind}.safetensors", kind)
    torch.manual_seed(0)
    write_lora(folder / "tiny/lora_random.safetensors", make_lora(1, sizes=STAGE_C_VERSIONS["tiny"]), "own")
    return folder


@contextmanager
def started(
    folder: Path, *flags: str, environment: Mapping[str, str] | None = None
) -> Iterator[tuple[subprocess.Popen, str]]:
    """A server whose pictures go to `folder`, and its address; what it says may hold no traceback.

    That goes to a file: a pipe that nobody reads would fill up, and the server wait for it forever.
    """
    app = str(ROOT / "inference/app.py")
    command = [sys.executable, app, "--port", "0", "--output_dir", str(folder), *flags]
    heard = folder.parent / f"{folder.name}.txt"
    with heard.open("w") as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True,
            env={**os.environ, **(environment or {})},
        )  # fmt: skip
    try:
        line = process.stdout.readline()
        assert line.startswith("http"), heard.read_text()
        yield process, line.split()[0]
    finally:
        process.kill()
    assert "Traceback" not in heard.read_text(), heard.read_text()


@contextmanager
def served(folder: Path, *flags: str) -> Iterator[str]:
    """The address of such a server; at the end it stops as by Ctrl-C."""
    with started(folder, *flags) as (process, address):
        yield address
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
