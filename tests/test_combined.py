"""ComfyUI's combined files, made of the embedded family: taken apart, and refused in place of one network."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

import convert  # noqa: E402  of models/, which conftest adds to the path
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.config.sizes import TINY
from core.weights.checkpoint import CheckpointError, check_file, load_module, read_tensors
from core.weights.clip import TextEncoder
from core.weights.combined import is_combined, take_apart
from core.weights.lora.reading import read_lora
from modules.stage_c import StageC

TINY_FOLDER = ROOT / "models" / "tiny"
BUILD = partial(StageC, **asdict(TINY.stage_c))
Tensors = dict[str, Tensor]


def tiny(name: str) -> Tensors:
    return load_file(TINY_FOLDER / f"{name}.safetensors")


def comfy_network(tensors: Mapping[str, Tensor]) -> Tensors:
    """Queries, keys and values apart, as ComfyUI keeps them."""
    made = {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"(.+)\.in_proj_(weight|bias)", name):
            parts = zip("qkv", tensor.chunk(3), strict=True)
            made |= {f"{match[1]}.to_{letter}.{match[2]}": part.contiguous() for letter, part in parts}
        else:
            made[name] = tensor
    return made


def behind(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def combined_c() -> Tensors:
    return {
        **behind("model.diffusion_model.", comfy_network(tiny("stage_c"))),
        **behind("text_encoder.clip_g.transformer.", tiny("text_encoder/model")),
        "text_encoder.clip_g.logit_scale": torch.ones(()),
        **behind("vae.encoder.", tiny("effnet_encoder")),
        "vae.encoder.mean": torch.ones(3),
        "vae.encoder.std": torch.ones(3),
        **behind("vae.previewer.", tiny("previewer")),
    }


def combined_b() -> Tensors:
    text = tiny("text_encoder/model")
    projection = text.pop("text_projection.weight")
    return {
        **behind("diffusion_model.", tiny("stage_b")),
        **behind("cond_stage_model.clip_g.transformer.", text),
        "cond_stage_model.clip_g.text_projection": projection.T.contiguous(),
        **behind("first_stage_model.", tiny("stage_a")),
    }


def assert_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def test_a_combined_file_is_taken_apart_and_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(combined_c() | {"odd.weight": torch.ones(1)}, tmp_path / "all in one.safetensors")
    folder = tmp_path / "parts"
    command = [str(tmp_path / "all in one.safetensors"), "--split", str(folder)]
    convert.main(command)
    said = capsys.readouterr().out
    assert "left out: 1 tensor is of no known network (odd.weight)" in said
    assert "the tokenizer is not in the file: run python models/download.py tokenizer/" in said
    for name in ("stage_c", "effnet_encoder", "previewer", "text_encoder/model"):
        assert_same(load_file(folder / f"{name}.safetensors"), tiny(name))
        assert f"wrote   {folder / name}.safetensors" in said
    assert not (folder / "stage_b.safetensors").exists()
    load_module(BUILD, folder / "stage_c.safetensors", dtype=torch.float32, what="Stage C")
    shutil.copytree(TINY_FOLDER / "tokenizer", folder / "tokenizer")
    own, theirs = (TextEncoder.load(str(path), torch.float32) for path in (folder, TINY_FOLDER))
    assert torch.equal(
        own.encode(["a red house"], "cpu")["a red house"].tokens,
        theirs.encode(["a red house"], "cpu")["a red house"].tokens,
    )
    with pytest.raises(ValueError, match="stage_c.safetensors, .*config.json would be replaced"):
        convert.main(command)


def test_other_prefixes_and_an_older_projection() -> None:
    parts, others = take_apart(combined_b() | {"scaled_fp8": torch.ones(2)})
    assert {part.file: part.name for part in parts} == {
        "stage_b.safetensors": "Stage B of width 128",
        "text_encoder/model.safetensors": "the text encoder",
        "stage_a.safetensors": "Stage A",
    }
    assert others == []
    for part in parts:
        assert_same(part.tensors, tiny(part.file.removesuffix(".safetensors")))


def test_an_encoder_and_a_previewer_without_prefixes_of_their_own() -> None:
    parts, others = take_apart(behind("vae.", tiny("previewer") | tiny("effnet_encoder")))
    assert others == [] and len(parts) == 2
    for part in parts:
        assert_same(part.tensors, tiny(part.file.removesuffix(".safetensors")))


def test_the_text_encoders_configuration_follows_from_its_tensors() -> None:
    parts, _ = take_apart(combined_b())
    (config,) = (part.config for part in parts if part.config)
    stored = json.loads((TINY_FOLDER / "text_encoder" / "config.json").read_text())
    assert {key: stored[key] for key in config if key != "pad_token_id"} == {
        key: value for key, value in config.items() if key != "pad_token_id"
    }


def test_float8_weights_keep_their_scales(tmp_path: Path) -> None:
    tensors, wanted = {}, {}
    for name, tensor in comfy_network(tiny("stage_c")).items():
        tensors[name] = wanted[name] = tensor
        if name.endswith(".weight") and tensor.dim() == 2 and "to_k" not in name:
            scale = tensor.float().abs().max() / 448
            tensors[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            tensors[name.replace(".weight", ".scale_weight")] = scale
            wanted[name] = tensors[name].float() * scale
    save_file(behind("model.diffusion_model.", tensors), tmp_path / "c.safetensors")
    convert.main([str(tmp_path / "c.safetensors"), "--split", str(tmp_path / "parts")])
    stored = load_file(tmp_path / "parts" / "stage_c.safetensors")
    assert torch.float8_e4m3fn in {tensor.dtype for tensor in stored.values()}
    found = read_tensors(tmp_path / "parts" / "stage_c.safetensors", torch.float32)
    for name, tensor in comfy_network(found).items():
        torch.testing.assert_close(tensor, wanted[name].float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("make", [combined_c, combined_b])
def test_a_combined_file_in_place_of_one_network_names_the_command(tmp_path: Path, make: object) -> None:
    path = tmp_path / "combined.safetensors"
    save_file(make(), path)
    actions = (
        check_file,
        read_tensors,
        read_lora,
        lambda path: load_module(BUILD, path, dtype=torch.float32, what="Stage C"),
    )
    for action in actions:
        with pytest.raises(CheckpointError, match="combined file of ComfyUI") as error:
            action(path)
        assert f"python models/convert.py {path} --split FOLDER" in str(error.value)


def test_only_combined_files_are_taken_for_one() -> None:
    for name in ("stage_c", "stage_b", "stage_a", "effnet_encoder", "previewer", "text_encoder/model"):
        assert not is_combined(tiny(name))
    names = ("diffusion_model.clf.1", "text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1")
    for suffix in (".lora_A.weight", ".lora_B.weight", ".alpha", ".diff"):
        assert not is_combined(name + suffix for name in names)


def test_what_cannot_be_taken_apart_is_refused(tmp_path: Path) -> None:
    incomplete = behind("model.diffusion_model.", comfy_network(tiny("stage_c")))
    del incomplete["model.diffusion_model.down_blocks.0.2.attention.attn.to_v.weight"]
    with pytest.raises(ValueError, match="down_blocks.0.2.attention.attn.to_v.weight is not beside"):
        take_apart(incomplete)
    with pytest.raises(ValueError, match="stage_a.safetensors is no combined file of Stable Cascade"):
        convert.main([str(TINY_FOLDER / "stage_a.safetensors"), "--split", str(tmp_path)])


@pytest.mark.parametrize(
    "flags, message",
    [(["b.safetensors", "--split", "parts"], "leave b.safetensors out"), (["--to", "own"], "OUT is missing"),
     ([], "one of the arguments --to --split is required")],
)  # fmt: skip
def test_wrong_flags_are_told(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="^2$"):
        convert.main(["a.safetensors", *flags])
    assert message in capsys.readouterr().err
