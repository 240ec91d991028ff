"""The reference numbers, through the same program that anyone runs on a folder of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import check_reference
import pytest
import torch
from safetensors.torch import save_file


def test_every_reference_output_agrees(reference_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_reference.main([str(reference_folder)]) == 0, capsys.readouterr().out


def test_a_wrong_output_is_told(
    reference_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ref = check_reference.read_reference(reference_folder / "previewer.safetensors")
    groups = {
        "weights": ref.weights,
        "inputs": ref.inputs,
        "outputs": {"preview": ref.outputs["preview"] + 1e-4},
    }
    tensors = {f"{group}/{name}": t for group, named in groups.items() for name, t in named.items()}
    save_file(tensors, tmp_path / "previewer.safetensors", {"config": '{"previewer": {"c_hidden": 32}}'})
    assert check_reference.main([str(tmp_path)]) == 1
    assert "ABOVE" in capsys.readouterr().out


def test_a_missing_output_is_told(reference_folder: Path, tmp_path: Path) -> None:
    shutil.copy(reference_folder / "controlnet_simple.safetensors", tmp_path)
    ref = check_reference.read_reference(tmp_path / "controlnet_simple.safetensors")
    line = check_reference.Line(ref.path.name, "x", check_reference.relative_error(None, torch.ones(1)), 1.0)
    assert not line.passed
    assert not check_reference.Line("f", "x", float("nan"), 1.0).passed


def test_an_empty_folder_is_a_usage_error(tmp_path: Path) -> None:
    assert check_reference.main([str(tmp_path)]) == 2
