"""float8 weights: read as they are meant from every kind of file, with scales and without."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from core.config.schema import ControlConfig
from core.config.sizes import TINY
from core.pipeline.control import open_controlnet
from core.weights.checkpoint import CheckpointError, load_module, read_shapes, read_tensors
from core.weights.clip import TextEncoder
from core.weights.lora.reading import read_lora
from modules.controlnet import ControlNet
from modules.guidance import Guidance
from modules.stage_b import StageB
from modules.stage_c import StageC

TINY_FOLDER = ROOT / "models" / "tiny"
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "stage_c": partial(StageC, **asdict(TINY.stage_c)),
    "stage_b": partial(StageB, **asdict(TINY.stage_b)),
    "ultrapixel_t2i": partial(Guidance, **asdict(TINY.guidance)),
}
Tensors = dict[str, Tensor]


def tiny(name: str) -> Tensors:
    return load_file(TINY_FOLDER / f"{name}.safetensors")


def is_matrix(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dim() > 1


def in_float8(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[Tensors, Tensors]:
    """Matrices cast, and what a reader should make of them."""
    stored = {name: t.to(dtype) if is_matrix(t) else t for name, t in tensors.items()}
    return stored, {name: t.float() if is_matrix(t) else t for name, t in stored.items()}


def beside(name: str, suffix: str) -> str:
    """The name of a scale, where `weight` may end the weight's name or not."""
    return name.removesuffix("weight") + suffix if name.endswith("weight") else f"{name}.{suffix}"


def scaled(
    tensors: Mapping[str, Tensor], suffix: str, by_row: bool, dtype: torch.dtype = torch.float8_e4m3fn
) -> tuple[Tensors, Tensors]:
    """As ComfyUI writes them: the largest number, of each row or of all, at the end of the range."""
    stored, meant = {}, {}
    for name, tensor in tensors.items():
        stored[name] = meant[name] = tensor
        if is_matrix(tensor):
            largest = tensor.float().abs().flatten(1).amax(1).view(-1, *(1 for _ in tensor.shape[1:]))
            scale = ((largest if by_row else largest.max()) / torch.finfo(dtype).max).clamp(min=1e-6)
            stored[name] = (tensor.float() / scale).to(dtype)
            meant[name] = stored[name].float() * scale
            stored[beside(name, suffix)] = scale
            stored[beside(name, "scale_input")] = torch.ones(())
    return {**stored, "scaled_fp8": torch.zeros(2, dtype=dtype)}, meant


def assert_close(found: Mapping[str, Tensor], meant: Mapping[str, Tensor]) -> None:
    assert found.keys() == meant.keys()
    for name, tensor in meant.items():
        torch.testing.assert_close(found[name].float(), tensor.float(), rtol=1e-6, atol=0, msg=name)


@pytest.mark.parametrize("save", [save_file, torch.save])
@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_plain_float8_is_cast(tmp_path: Path, dtype: torch.dtype, save: Callable) -> None:
    stored, meant = in_float8(tiny("stage_a"), dtype)
    save(stored, tmp_path / "a")
    assert_close(read_tensors(tmp_path / "a"), meant)
    found = read_tensors(tmp_path / "a", torch.bfloat16)
    assert {t.dtype for t in found.values() if t.is_floating_point()} == {torch.bfloat16}
    assert_close(found, {name: t.bfloat16() if t.is_floating_point() else t for name, t in meant.items()})


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("by_row", [False, True])
def test_networks_with_scales_load(tmp_path: Path, name: str, suffix: str, by_row: bool) -> None:
    stored, meant = scaled(tiny(name), suffix, by_row)
    save_file(stored, tmp_path / "w")
    module = load_module(NETWORKS[name], tmp_path / "w", dtype=torch.float32, what=name)
    assert_close(module.state_dict(), {key: meant[key] for key in module.state_dict()})
    assert read_shapes(tmp_path / "w").keys() == meant.keys()


def test_a_controlnet_loads(tmp_path: Path) -> None:
    stored, meant = scaled(tiny("controlnet_canny"), "scale_weight", False)
    metadata = load_metadata("controlnet_canny")
    save_file(stored, tmp_path / "w", metadata)
    file = open_controlnet(ControlConfig(controlnet_checkpoint_path=str(tmp_path / "w")), TINY.stage_c)
    module = load_module(
        partial(ControlNet, **asdict(file.sizes)), file.path, dtype=torch.float32, what=file.name
    )
    assert_close(module.state_dict(), {key: meant[key] for key in module.state_dict()})


def load_metadata(name: str) -> dict[str, str]:
    with (TINY_FOLDER / f"{name}.safetensors").open("rb") as stream:
        return json.loads(stream.read(int.from_bytes(stream.read(8), "little")))["__metadata__"]


@pytest.mark.parametrize("by_row", [False, True])
def test_a_lora_is_read(tmp_path: Path, by_row: bool) -> None:
    stored, meant = scaled(tiny("lora_striped_balloon"), "scale_weight", by_row)
    save_file(stored, tmp_path / "w", load_metadata("lora_striped_balloon"))
    lora = read_lora(tmp_path / "w", TINY.stage_c)
    assert len(lora.updates) == 60
    for name, update in lora.updates.items():
        torch.testing.assert_close(update.down, meant[f"{name}.lora_down"])
        torch.testing.assert_close(update.up, meant[f"{name}.lora_up"])


def test_a_text_encoder_loads(tmp_path: Path) -> None:
    shutil.copytree(TINY_FOLDER / "tokenizer", tmp_path / "tokenizer")
    shutil.copytree(TINY_FOLDER / "text_encoder", tmp_path / "text_encoder")
    stored, meant = scaled(tiny("text_encoder/model"), "scale_weight", False)
    save_file(stored, tmp_path / "text_encoder" / "model.safetensors")
    found = TextEncoder.load(str(tmp_path), torch.float32).model.state_dict()
    assert_close(found, {name: meant[name] for name in found})


def test_other_places_of_a_scale() -> None:
    weight = torch.ones(2, 2).to(torch.float8_e4m3fn)
    for name, scale in (
        ("attn.in_proj_weight", "attn.in_proj_weight_scale"),
        ("attn.in_proj_weight", "attn.in_proj_weight.scale_weight"),
        ("attn.in_proj_weight", "attn.scale_weight"),
        ("weights.0.lora_down", "weights.0.lora_down.scale_weight"),
    ):
        tensors = {name: weight, scale: torch.tensor([3.0])}
        assert_close(read(tensors), {name: torch.full((2, 2), 3.0)})
    tensors = {"a.weight": weight, "a.weight_scale": torch.tensor([2.0, 3.0]), "a.comfy_quant": torch.ones(9)}
    assert_close(read(tensors), {"a.weight": torch.tensor([[2.0, 2.0], [3.0, 3.0]])})
    assert list(read({"b.scale_weight": torch.ones(())})) == ["b.scale_weight"]  # of nothing


def read(tensors: Tensors) -> Tensors:
    path = Path(read.folder) / "w"
    save_file(tensors, path)
    return read_tensors(path)


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path) -> None:
    read.folder = tmp_path


def test_wrong_scales_and_nan_are_named(tmp_path: Path) -> None:
    weight = torch.ones(2, 3).to(torch.float8_e4m3fn)
    with pytest.raises(CheckpointError, match=r"a.weight cannot be read: its scale is of shape \(3,\)"):
        read({"a.weight": weight, "a.scale_weight": torch.ones(3)})
    with pytest.raises(CheckpointError, match="a.weight holds NaN or infinity"):
        read({"a.weight": torch.full((2, 2), torch.nan).to(torch.float8_e5m2)})
    with pytest.raises(CheckpointError, match="a.weight holds NaN or infinity"):
        read({"a.weight": weight, "a.scale_weight": torch.tensor(torch.inf)})
