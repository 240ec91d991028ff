"""Advice about files that are not there or not whole: only what helps, and all of it at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import ROOT

from core.commands.flags import check_weights
from core.config.presets import PRESETS
from core.config.schema import ControlConfig
from core.pipeline.pipeline import UltraPixelPipeline
from core.weights import published
from core.weights.checkpoint import CheckpointError, check_file, check_files
from core.weights.clip import TextEncoder
from core.weights.lora.merging import named_files
from core.weights.published import FILES, fetching, published_at

BIG = PRESETS["small-big"]


@pytest.fixture
def no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose models/ holds download.py alone."""
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "download.py").touch()
    monkeypatch.setattr(published, "FOLDER", folder)
    monkeypatch.chdir(tmp_path)
    return folder


def refusal(path: str | Path) -> str:
    with pytest.raises(CheckpointError) as error:
        check_file(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_file_is_fetched_by_name_where_it_is_published(no_weights: Path) -> None:
    message = refusal("models/stage_a.safetensors")
    assert message.startswith("models/stage_a.safetensors does not exist: ")
    assert message.endswith("run python models/download.py stage_a.safetensors (73.7 MB)")
    assert "download.py controlnet/canny.safetensors" in refusal(no_weights / "controlnet/canny.safetensors")
    for other in (
        "stage_a.safetensors",
        "models/tiny/stage_a.safetensors",
        "models/stage_a.pt",
        "../models/x",
    ):
        assert refusal(other) == f"{other} does not exist: correct the path"


def test_a_damaged_file_is_fetched_again_where_it_is_published(no_weights: Path) -> None:
    for name, advice in (
        ("previewer.safetensors", "delete it and run python models/download.py previewer.safetensors"),
        ("mine.safetensors", "delete it and get it again"),
    ):
        for content in (b"", b"<html>", b"weights", b"PK\x03\x04", b"\x10" + 7 * b"\0" + b"{}"):
            (no_weights / name).write_bytes(content)
            assert refusal(no_weights / name).endswith(advice)


def test_without_the_script_it_is_not_named(no_weights: Path) -> None:
    (no_weights / "download.py").unlink()  # an installed package has none
    assert refusal("models/stage_a.safetensors").endswith("does not exist: correct the path")


@pytest.mark.parametrize("name", ["small-big", "big-big", "lite"])
def test_all_files_of_a_preset_are_missed_at_once(no_weights: Path, name: str) -> None:
    preset = PRESETS[name]
    guidance = None if preset.pretrained_path == "none" else preset.pretrained_path
    pipeline = UltraPixelPipeline.from_config(ROOT / preset.config_c, ROOT / preset.config_b, guidance)
    with pytest.raises(CheckpointError) as error:
        pipeline.check_files()
    message = str(error.value)
    needed = [file for file in FILES if name in file.presets]
    optional = ("effnet_encoder", "previewer", "tokenizer/tokenizer_config", "tokenizer/special")
    for file in needed:
        assert (f"models/{file.name} (" in message) != file.name.startswith(optional)
    assert message.startswith("8 files" if guidance else "7 files")
    assert "(Stage A, 73.7 MB)" in message and "(tokenizer, small text)" in message
    assert f": run python models/download.py --preset {name} (" in message and "\n" not in message


def test_a_lora_and_a_controlnet_are_missed_with_the_rest(no_weights: Path) -> None:
    pipeline = UltraPixelPipeline.from_config(ROOT / BIG.config_c, ROOT / BIG.config_b, BIG.pretrained_path)
    pipeline.set_control(ControlConfig())
    with pytest.raises(ValueError) as error:
        check_weights(pipeline, None, named_files(["models/lora_cat.safetensors:0.5", "mine"]))
    message = str(error.value)
    assert message.startswith("11 files do not exist: ")
    for part in (
        "lora_cat.safetensors (LoRA, 6.38 MB)",
        "mine (LoRA)",
        "canny.safetensors (ControlNet, 218 MB)",
    ):
        assert part in message
    assert " lora_cat.safetensors text_encoder" in message and "correct the other paths" in message


def test_a_missing_text_encoder_names_what_helps(no_weights: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run python models/download.py text_encoder/model.safetens"):
        TextEncoder.load("models", torch.float32)
    with pytest.raises(FileNotFoundError, match="name its folder, or use the hub id"):
        TextEncoder.load("models/tiny", torch.float32)


def test_several_files_of_which_some_are_published(no_weights: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        check_files({"models/stage_a.safetensors": "Stage A", "mine.safetensors": "Stage C"})
    assert str(error.value) == (
        "2 files do not exist: models/stage_a.safetensors (Stage A, 73.7 MB), mine.safetensors (Stage C): "
        "run python models/download.py stage_a.safetensors (73.7 MB), and correct the other paths"
    )
    with pytest.raises(CheckpointError, match=r"a \(A\), b \(B\): correct the paths$"):
        check_files({"a": "A", "b": "B"})


def test_a_preset_is_named_only_where_it_fetches_little_else(no_weights: Path) -> None:
    shared = [file for file in FILES if file.name.startswith(("text_encoder", "tokenizer"))]
    assert "--preset" not in fetching(shared)  # as Stage B and C would come too
    for file in FILES:
        if file not in shared:
            (no_weights / file.name).parent.mkdir(exist_ok=True)
            (no_weights / file.name).touch()
    assert fetching(shared) == "python models/download.py --preset small-big"


def test_every_published_file_is_known_by_its_place() -> None:
    for file in FILES:
        assert published_at(ROOT / "models" / file.name) == file == published_at(f"models/{file.name}")
