"""The published weight files: where each lies, its size and hash, and the command that fetches it."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from core.paths import PROJECT

FOLDER = PROJECT / "models"  # where models/download.py puts them
CASCADE = "stabilityai/stable-cascade"
ULTRAPIXEL = "roubaofeipi/UltraPixel"
PRESETS = ("small-big", "big-big", "lite")  # Stage C 3.6B and B 700M; 3.6B and 3B; 1B and 700M
BIG_C = ("small-big", "big-big")
SMALL_B = ("small-big", "lite")
FEW = 2  # files that a command names before it may name their preset,
NEGLIGIBLE = 0.05  # which fetches at most this share besides


@dataclass(frozen=True)
class ModelFile:
    """One published file: its path in the repository is its path in models/."""

    name: str
    repository: str
    size: int | None  # bytes; None for small text files
    presets: tuple[str, ...]  # that need it; none: fetched by name
    sha256: tuple[str, ...] = ()  # any of these; none known: the file's structure is checked instead


FILES = (
    ModelFile("stage_c_bf16.safetensors", CASCADE, 7_180_000_000, BIG_C,
              ("dfe24009fc881011f350d08d9d13be13a1a3b3cbfed667435efe0fd419aca099",)),
    ModelFile("stage_c_lite_bf16.safetensors", CASCADE, 2_060_000_000, ("lite",)),
    ModelFile("stage_b_bf16.safetensors", CASCADE, 3_130_000_000, ("big-big",)),
    ModelFile("stage_b_lite_bf16.safetensors", CASCADE, 1_400_000_000, SMALL_B,
              ("fe92687deefcfb33bb3ec181254b55fe4e434c5084ce9d38815eaa32487ad376",)),
    ModelFile("stage_a.safetensors", CASCADE, 73_700_000, PRESETS,
              ("0a3f5a0b618494f81964dc719dbaaa9bd52f207d464d5fbf45442d363e1c0b5a",)),
    ModelFile("effnet_encoder.safetensors", CASCADE, 81_500_000, PRESETS,
              ("e23c1fe17ba8cdd6c49a5b292d72502bd4cf729e7de9f2060bb4dcc26737c0a0",)),
    ModelFile("previewer.safetensors", CASCADE, 16_000_000, PRESETS,
              ("7d66285b840aaaf69abe809727f0b02657c513dd9376f2f07f3c3ba4fe87f250",)),
    ModelFile("text_encoder/model.safetensors", CASCADE, 1_390_000_000, PRESETS),
    ModelFile("text_encoder/config.json", CASCADE, None, PRESETS),
    ModelFile("tokenizer/vocab.json", CASCADE, None, PRESETS),
    ModelFile("tokenizer/merges.txt", CASCADE, None, PRESETS),
    ModelFile("tokenizer/tokenizer_config.json", CASCADE, None, PRESETS),
    ModelFile("tokenizer/special_tokens_map.json", CASCADE, None, PRESETS),
    ModelFile("ultrapixel_t2i.safetensors", ULTRAPIXEL, 211_117_679, BIG_C,
              ("bef96cabf1621405cd6fdc4ee51b3613e68dd593a4bda3306a021e085e73ee60",    # as published: a pickle
               "3b875e87378f87f5af89902b82eac37ba5efd037a995207e6001e426b9704494")),  # as real safetensors
    ModelFile("lora_cat.safetensors", ULTRAPIXEL, 6_381_449, (),
              ("e7fdfdecb11110118d20e9135210e2452ef5edc0a7b3417cc7803061199713a1",    # as published: a pickle
               "9819a47d70a3b5fceb8d2a6fc185bba76c002fb54308153025b1383067e7d0fd")),  # as real safetensors
    ModelFile("controlnet/canny.safetensors", CASCADE, 218_000_000, ()),
    ModelFile("controlnet/inpainting.safetensors", CASCADE, 218_000_000, ()),
    ModelFile("controlnet/super_resolution.safetensors", CASCADE, 814_000_000, ()),
)  # fmt: skip


def show_size(size: int | None) -> str:
    """A size as it stands in models/README.md, such as 7.18 GB."""
    if size is None:
        return "small text"
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"


def published_at(path: str | os.PathLike[str]) -> ModelFile | None:
    """The published file that models/download.py puts at a path, which may be relative to the project."""
    place = Path(os.path.abspath(FOLDER.parent / path))
    if not (FOLDER / "download.py").exists() or not place.is_relative_to(FOLDER):
        return None
    name = place.relative_to(FOLDER).as_posix()
    return next((file for file in FILES if file.name == name), None)


def fetching(files: Collection[ModelFile]) -> str:
    """The command that fetches published files: by their preset, unless that fetches much else."""
    wanted = sum(file.size or 0 for file in files)
    for preset in PRESETS if len(files) > FEW else ():
        others = [file for file in FILES if preset in file.presets and file not in files]
        besides = sum(file.size or 0 for file in others if not (FOLDER / file.name).exists())
        if all(preset in file.presets for file in files) and besides <= NEGLIGIBLE * wanted:
            return f"python models/download.py --preset {preset}"
    return f"python models/download.py {' '.join(file.name for file in files)}"


def describe_absent(files: Mapping[str | os.PathLike[str], str]) -> str:
    """That files are not there, by what each holds, and what fetches those of them that are published."""
    known = {path: file for path in files if (file := published_at(path)) is not None}
    total = show_size(sum(file.size or 0 for file in known.values()) or None)
    way_out = f"run {fetching(known.values())} ({total})" if known else "correct the path"
    if len(files) == 1:
        return f"{next(iter(files))} does not exist: {way_out}"
    if len(known) < len(files):
        way_out = f"{way_out}, and correct the other paths" if known else "correct the paths"
    sizes = {path: f", {show_size(file.size)}" for path, file in known.items()}
    listed = ", ".join(f"{path} ({what}{sizes.get(path, '')})" for path, what in files.items())
    return f"{len(files)} files do not exist: {listed}: {way_out}"
