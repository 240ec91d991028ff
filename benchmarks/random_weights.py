"""Random weights in the published sizes, 10 GB: python benchmarks/random_weights.py FOLDER

Writes what inference/test_t2i.py needs, in the files and number formats of the preset small-big, and prints
the flags that name them. What lies in FOLDER already stays. The tokenizer is the embedded family's. Pictures
of these weights show nothing: times and memory are those of the published ones.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from core.commands.flags import home_path
from core.config.presets import of_project
from core.config.schema import (
    StageBConfig,
    StageCConfig,
    guidance_sizes,
    stage_a_sizes,
    stage_b_sizes,
    stage_c_sizes,
)
from core.config.yaml import as_yaml
from core.pipeline.pipeline import UltraPixelPipeline
from core.weights.checkpoint import build_empty, read_shapes, replacing, save_archive, save_text
from core.weights.clip import WORDS
from core.weights.layouts import to_published_guidance
from core.weights.mapped import DTYPES
from modules.clip_text import ClipText, ClipTextConfig
from modules.guidance import Guidance
from modules.stage_a import StageA
from modules.stage_b import StageB
from modules.stage_c import StageC

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from random_family import Family

PRESET, GUIDANCE = "small-big", "ultrapixel_t2i.safetensors"
TEXT = ClipTextConfig(  # of OpenCLIP's bigG
    hidden_size=1280, intermediate_size=5120, projection_dim=1280, num_hidden_layers=32,
    num_attention_heads=20, hidden_act="gelu",
)  # fmt: skip
STD = 0.02
STORED = {dtype: name for name, dtype in DTYPES.items()}
ALIGNED = 8  # bytes; the tensors of a safetensors file begin at a multiple
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Like = Mapping[str, Tensor]  # tensors without memory


def random_like(name: str, like: Tensor) -> Tensor:
    """A tensor on the CPU, made where it is fastest; variances are positive, and counters zero."""
    if not like.is_floating_point():
        return torch.zeros(like.shape, dtype=like.dtype)
    values = torch.randn(like.shape, dtype=like.dtype, device=DEVICE).mul_(STD)
    return (values.abs_() if name.endswith("running_var") else values).cpu()


def write_safetensors(path: Path, tensors: Like) -> None:
    """Write random tensors one by one, as the file's whole need not fit in memory."""
    header, end = {}, 0
    for name, like in tensors.items():
        offsets = [end, end := end + like.numel() * like.dtype.itemsize]
        header[name] = {"dtype": STORED[like.dtype], "shape": [*like.shape], "data_offsets": offsets}
    text = json.dumps(header).encode()
    text = text.ljust(math.ceil(len(text) / ALIGNED) * ALIGNED)
    with replacing(path) as temporary, temporary.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, like in tensors.items():
            stream.write(random_like(name, like).reshape(-1).view(torch.uint8).numpy())


def write_guidance(path: Path, tensors: Like) -> None:
    """Write random tensors as the published archive."""
    save_archive(path, {name: random_like(name, like) for name, like in tensors.items()})


def configured(folder: Path, small: bool) -> tuple[StageCConfig, StageBConfig, ClipTextConfig]:
    """The preset's configurations with all files in a folder, and the text encoder's sizes."""
    pipeline = UltraPixelPipeline.from_preset(PRESET, "cpu", models=folder)
    config_c, config_b = pipeline.config_c, pipeline.config_b
    if not small:
        return config_c, config_b, TEXT
    sizes = vars(Family())
    config_c = replace(config_c, **{name: sizes[name] for name in ("stage_c", "guidance", "geometry")})
    config_b = replace(config_b, **{name: sizes[name] for name in ("stage_b", "stage_a")})
    width = config_c.stage_c.c_clip_text
    return config_c, config_b, replace(TEXT, hidden_size=width, projection_dim=width, num_hidden_layers=2,
                                       num_attention_heads=4)  # fmt: skip


def networks(config_c: StageCConfig, config_b: StageBConfig, text: ClipTextConfig) -> dict[str, Like]:
    """The tensors of each file, by its path, in its number format."""

    def tensors(build: Callable[[], nn.Module], dtype: torch.dtype = torch.bfloat16) -> Like:
        return build_empty(build).to(dtype).state_dict()

    c, folder = stage_c_sizes(config_c), config_c.clip_text_path
    guidance = tensors(partial(Guidance, **asdict(guidance_sizes(config_c))))
    stage_a = partial(StageA, **asdict(stage_a_sizes(config_b)))
    return {
        config_c.generator_checkpoint_path: tensors(partial(StageC, **asdict(c))),
        config_b.generator_checkpoint_path: tensors(partial(StageB, **asdict(stage_b_sizes(config_b)))),
        config_b.stage_a_checkpoint_path: tensors(stage_a, torch.float32),
        f"{folder}/text_encoder/model.safetensors": tensors(partial(ClipText, text)),
        f"{folder}/{GUIDANCE}": to_published_guidance(guidance, sum(map(sum, c.blocks))),
    }


def write_all(folder: Path, small: bool) -> list[str]:
    """Write what is not there yet, and return the flags of a script that name it.

    ValueError where a file of other sizes lies there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config_c, config_b, text = configured(folder, small)
    files = networks(config_c, config_b, text)
    for path in [path for path, tensors in files.items() if _is_lacking(Path(path), tensors)]:
        write = write_guidance if path.endswith(GUIDANCE) else write_safetensors
        write(Path(path), files[path])
    if not (sizes := folder / "text_encoder" / "config.json").exists():
        save_text(sizes, json.dumps(asdict(text)))
    if not (tokenizer := folder / "tokenizer").exists():
        without = shutil.ignore_patterns(WORDS)
        shutil.copytree(of_project("models/tiny/tokenizer"), tokenizer, ignore=without)
    configs = {"--config_c": folder / "random_c.yaml", "--config_b": folder / "random_b.yaml"}
    for path, config in zip(configs.values(), (config_c, config_b), strict=True):
        save_text(path, as_yaml(config))
    named = {**configs, "--pretrained_path": folder / GUIDANCE}
    return [str(word) for pair in named.items() for word in pair]


def _is_lacking(path: Path, tensors: Like) -> bool:
    """Whether there is no such file yet; ValueError where there is another."""
    wanted = {name.removeprefix("module."): tuple(like.shape) for name, like in tensors.items()}
    if path.exists() and read_shapes(path) != wanted:
        raise ValueError(f"{path} holds tensors of other sizes: name another folder")
    return not path.exists()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=home_path, help="where the files go; it is made if it is not there")
    parser.add_argument("--small", action="store_true", help="tiny networks instead")
    options = parser.parse_args()
    try:
        print(shlex.join(write_all(Path(options.folder).absolute(), options.small)))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
