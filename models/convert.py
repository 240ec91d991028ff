"""Convert a LoRA of Stage C between layouts: python models/convert.py IN OUT --to own|published|kohya|peft

or take a combined file of ComfyUI apart: python models/convert.py IN --split FOLDER

python models/convert.py models/lora_cat.safetensors cat.safetensors --to own \\
    --token "[roubaobao]" --initialise_from "^cat</w>"                   with its token, which the file lacks
python models/convert.py models/lora_cat.safetensors comfyui.safetensors --to kohya --leave_out tokens
python models/convert.py cat.safetensors comfyui.safetensors --to kohya --text_encoder models --dtype float16
                                                                  its tokens as whole rows, for ComfyUI
python models/convert.py onetrainer.safetensors adapter --to peft        a folder, for diffusers
python models/convert.py stable_cascade_stage_c.safetensors --split FOLDER
                                                     Stage C, text encoder and others as files of their own
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from core.commands.flags import Parser, home_path, run
from core.config.sizes import STAGE_C_VERSIONS, StageCSizes
from core.weights.lora.layouts import KOHYA, LAYOUTS

LEFT_OUT = ("tokens", "text")
DTYPES = ("float32", "bfloat16", "float16")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument(
        "source", metavar="IN", type=home_path,
        help="a LoRA in any layout, or a folder of peft or OneTrainer; with --split, a combined file",
    )  # fmt: skip
    parser.add_argument(
        "target", metavar="OUT", type=home_path, nargs="?", help="the file to write, with peft a folder"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--to", choices=LAYOUTS, help="layout of OUT; ComfyUI reads kohya's")
    what.add_argument(
        "--split",
        metavar="FOLDER",
        type=home_path,
        help="take a combined file of ComfyUI apart, into a folder",
    )
    parser.add_argument(
        "--version",
        help=f"of Stage C: {', '.join(STAGE_C_VERSIONS)} or a configuration (default: found from the file)",
    )
    parser.add_argument("--token", action="append", help="string of the new token; once for each of several")
    parser.add_argument(
        "--initialise_from", action="append", metavar="REGEX",
        help="vocabulary entries whose mean a token starts from, '' for none; once for each --token",
    )  # fmt: skip
    parser.add_argument(
        "--leave_out", nargs="+", choices=LEFT_OUT, default=[], help="what OUT has not (default: nothing)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="number format of OUT (default: float32)")
    parser.add_argument(
        "--text_encoder", metavar="FOLDER", type=home_path,
        help="turns offsets of tokens into whole rows where OUT holds those, and checks the text's updates",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if options.to is not None and options.target is None:
        parser.error("OUT is missing: name the file to write")
    if options.split is not None and options.target is not None:
        parser.error(f"with --split the files go into its FOLDER: leave {options.target} out")
    return options


if __name__ == "__main__":
    parse()  # answers --help and wrong flags before what follows loads torch

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

from core.config.schema import stage_c_sizes
from core.config.yaml import load_stage_c
from core.weights.checkpoint import count_tensors, name_some, open_tensors, save_tensors
from core.weights.clip import TextEncoder
from core.weights.combined import take_apart
from core.weights.lora.files import LoraFile, LoraTokens, name_tokens, write_lora
from core.weights.lora.reading import find_version, read_lora
from core.weights.lora.tokens import whole_rows
from core.weights.published import FILES, fetching
from modules.lora import LoraUpdate, check_update

EMPTY = {"tokens": {"tokens": None}, "text": {"text_updates": {}}}  # of what is left out
SHOWN = 4  # ranks, alphas and tokens that are listed before the rest is counted


def sizes_of(version: str | None) -> StageCSizes | None:
    """The sizes of a version or a configuration."""
    if version is None or version in STAGE_C_VERSIONS:
        return STAGE_C_VERSIONS.get(version)
    if version.endswith((".yaml", ".yml")):
        return stage_c_sizes(load_stage_c(version))
    known = ", ".join(STAGE_C_VERSIONS)
    raise ValueError(f"unknown version {version!r} of Stage C: use {known}, or a configuration's .yaml")


def fit_to_text_encoder(lora: LoraFile, folder: str | None, layout: str) -> LoraFile:
    """The LoRA with its tokens as the layout holds them; ValueError where the text encoder does not fit."""
    offsets = layout == KOHYA and lora.tokens is not None and not lora.tokens.absolute
    if folder is None:
        if offsets:
            raise ValueError(
                "the kohya layout holds whole token rows, and this LoRA offsets: add them to rows of a text "
                "encoder with --text_encoder FOLDER, or use --leave_out tokens"
            )
        return lora
    encoder = TextEncoder.load(folder, torch.float32)
    for name, update in lora.text_updates.items():
        check_update(encoder.model, name, update)
    return replace(lora, tokens=whole_rows(encoder, lora.tokens)) if offsets else lora


def describe(lora: LoraFile) -> str:
    """What a LoRA holds, in a line."""
    parts = [f"{lora.layout} layout", f"Stage C {find_version(lora.sizes) or 'of the configured size'}"]
    for what, updates in (("Stage C", lora.updates), ("the text encoder", lora.text_updates)):
        if updates:
            parts.append(f"updates of {what}: {describe_updates(list(updates.values()))}")
    if lora.tokens is not None:
        parts.append(describe_tokens(lora.tokens))
    return "; ".join(parts)


def describe_updates(updates: Sequence[LoraUpdate]) -> str:
    ranks = Counter(str(update.rank) for update in updates)
    alphas = Counter(f"{update.alpha:.4g}" for update in updates)
    return f"{len(updates)} of rank {shorten(list(ranks))} with alpha {shorten(list(alphas))}"


def describe_tokens(tokens: LoraTokens) -> str:
    """Whether they are whole rows, and all that is known of them."""
    text = f"token {'rows' if tokens.absolute else 'offsets'} {tuple(tokens.values.shape)}"
    if tokens.indices is not None:
        text += f" at {shorten([str(index) for index in tokens.indices])}"
    text += " without names" if tokens.names is None else f" of {shorten(list(dict.fromkeys(tokens.names)))}"
    if tokens.initialise_from is not None:
        text += f" from {shorten([expression or 'zero' for expression in tokens.initialise_from])}"
    return text


def shorten(texts: Sequence[str]) -> str:
    rest = len(texts) - SHOWN
    return ", ".join(texts[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def convert(options: argparse.Namespace) -> None:
    """Write a LoRA in another layout."""
    lora = read_lora(options.source, sizes_of(options.version))
    print(f"read    {options.source}: {describe(lora)}")
    if options.token:
        expressions = options.initialise_from and [text or None for text in options.initialise_from]
        lora = name_tokens(lora, options.token, expressions)
    elif options.initialise_from:
        raise ValueError("--initialise_from says where a --token starts from: give that too")
    for part in options.leave_out:
        lora = replace(lora, **EMPTY[part])
    lora = fit_to_text_encoder(lora, options.text_encoder, options.to)
    write_lora(options.target, lora, options.to, options.dtype and getattr(torch, options.dtype))
    print(f"wrote   {options.target}: {describe(read_lora(options.target, lora.sizes))}")


def split(source: str, folder: Path) -> None:
    """Write the networks of a combined file as files of their own; ValueError where one is there already."""
    parts, others = take_apart(open_tensors(source))
    if not parts:
        raise ValueError(f"{source} is no combined file of Stable Cascade: no network is found in it")
    print(f"read    {source}: {', '.join(part.name for part in parts)}")
    paths = [folder / part.file for part in parts]
    paths += [path.with_name("config.json") for path, part in zip(paths, parts, strict=True) if part.config]
    if there := [str(path) for path in paths if path.exists()]:
        raise ValueError(f"{', '.join(there)} would be replaced: name another folder, or move them away")
    for part in parts:
        path = folder / part.file
        save_tensors(path, part.tensors, {"format": "pt"})
        if part.config is not None:
            path.with_name("config.json").write_text(json.dumps(part.config, indent=2) + "\n", "utf-8")
        print(f"wrote   {path}: {part.name}, {len(part.tensors)} tensors")
    if others:
        print(f"left out: {count_tensors(others)} of no known network ({name_some(others)})")
    if any(part.file.startswith("text_encoder") for part in parts) and not (folder / "tokenizer").exists():
        command = fetching([file for file in FILES if file.name.startswith("tokenizer/")])
        print(f"the tokenizer is not in the file: run {command}, and copy models/tokenizer to {folder}")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.split is None:
        convert(options)
    else:
        split(options.source, Path(options.split))


if __name__ == "__main__":
    run(main)
