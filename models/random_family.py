"""Write a small family of models with random weights: python models/random_family.py FOLDER

It has the published layout: Stage C, Stage B, Stage A, the previewer, the guidance (as the published pickled
archive), a CLIP text encoder with a tokenizer of single characters, and the two configurations that name
them. Its pictures are noise: it is there to run the scripts, not to look at.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from core.commands.flags import Parser, home_path


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("folder", type=home_path, help="where the files go; it is made if it is not there")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    parse()  # answers --help and wrong flags before what follows loads torch

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

import modules.torchvision_operators  # noqa: F401  before transformers
from core.commands.flags import run
from core.config.schema import LatentGeometry, StageBConfig, StageCConfig
from core.config.sizes import GuidanceSizes, PreviewerSizes, StageASizes, StageBSizes, StageCSizes
from core.config.yaml import as_yaml
from core.weights.checkpoint import config_metadata, save_archive, save_tensors
from core.weights.layouts import to_published_guidance
from modules.guidance import Guidance
from modules.previewer import Previewer
from modules.stage_a import StageA
from modules.stage_b import StageB
from modules.stage_c import StageC

from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer  # isort: skip

TEXT_WIDTH = 64


@dataclass(frozen=True)
class Family:
    """The sizes of all networks; the defaults make a picture of 512 pixels in seconds on a CPU."""

    stage_c: StageCSizes = StageCSizes(
        c_cond=64, c_hidden=(64, 64), nhead=(4, 4), blocks=((1, 2), (2, 1)), c_clip_text=TEXT_WIDTH,
        c_clip_text_pooled=TEXT_WIDTH, c_clip_img=32,
    )  # fmt: skip
    guidance: GuidanceSizes = GuidanceSizes(ind=64, ch=32, n_head=4, head_dim=8, n_groups=8, f_dim=32)
    stage_b: StageBSizes = StageBSizes(
        c_hidden=(32, 32, 64, 64), nhead=(-1, -1, 4, 4), blocks=((1, 1, 1, 1), (1, 1, 1, 1)),
        block_repeat=((1, 1, 1, 1), (2, 2, 2, 2)), c_cond=64, c_clip=TEXT_WIDTH,
    )  # fmt: skip
    stage_a: StageASizes = StageASizes(c_hidden=32, bottleneck_blocks=2, codebook_size=64)
    previewer: PreviewerSizes = PreviewerSizes(c_hidden=16)
    geometry: LatentGeometry = LatentGeometry(compression=10.67, stride=8, lr_cells=16, lr_train_cells=12)


def write_family(folder: Path, family: Family) -> None:
    """Write all files of a family with random weights of these sizes into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    parts = {"stage_c": (StageC, family.stage_c), "stage_b": (StageB, family.stage_b),
             "stage_a": (StageA, family.stage_a), "previewer": (Previewer, family.previewer)}  # fmt: skip
    for name, (build, sizes) in parts.items():
        network = build(**asdict(sizes))
        randomise(network)
        save_tensors(folder / f"{name}.safetensors", network.state_dict(), config_metadata(asdict(sizes)))
    added = Guidance(**asdict(family.guidance))
    added.init_weights()
    res_blocks = sum(sum(levels) for levels in family.stage_c.blocks)
    save_archive(folder / "ultrapixel_t2i.safetensors", to_published_guidance(added.state_dict(), res_blocks))
    write_text_encoder(folder, family.stage_c.c_clip_text)
    write_configs(folder, family)


def randomise(network: nn.Module) -> None:
    """Weights that are not degenerate: what starts at zero gets small random values."""
    for parameter in network.parameters():
        if parameter.dim() < 2 or not parameter.any():
            nn.init.normal_(parameter, std=0.02)


def write_text_encoder(folder: Path, width: int) -> None:
    """A CLIP text encoder of `width`, and a tokenizer whose tokens are single characters."""
    characters = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256))]
    characters += [chr(256 + n) for n in range(68)]  # how byte-level BPE writes the other bytes
    tokens = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    end = len(tokens) - 1
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    tokenizer.save_pretrained(folder / "tokenizer")
    config = CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=width, intermediate_size=2 * width, projection_dim=width,
        num_hidden_layers=2, num_attention_heads=4, bos_token_id=end - 1, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    CLIPTextModelWithProjection(config).save_pretrained(folder / "text_encoder")


def write_configs(folder: Path, family: Family) -> None:
    """The configurations stage_c.yaml and stage_b.yaml beside the weights."""
    config_c = StageCConfig(
        model_version="random", dtype="float32",
        generator_checkpoint_path=str(folder / "stage_c.safetensors"),
        previewer_checkpoint_path=str(folder / "previewer.safetensors"), clip_text_path=str(folder),
        stage_c=family.stage_c, guidance=family.guidance, previewer=family.previewer,
        geometry=family.geometry,
    )  # fmt: skip
    config_b = StageBConfig(
        model_version="random", dtype="float32",
        generator_checkpoint_path=str(folder / "stage_b.safetensors"),
        stage_a_checkpoint_path=str(folder / "stage_a.safetensors"), stage_b=family.stage_b,
        stage_a=family.stage_a,
    )  # fmt: skip
    (folder / "stage_c.yaml").write_text(as_yaml(config_c), "utf-8")
    (folder / "stage_b.yaml").write_text(as_yaml(config_b), "utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    folder = parse(arguments).folder
    write_family(Path(folder), Family())
    print(f"wrote a family of random weights to {folder}")


if __name__ == "__main__":
    run(main)
