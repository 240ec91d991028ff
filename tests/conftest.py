"""Shared by all tests: torchvision imports on CPU builds, and the references that lie beside the tests."""

from pathlib import Path

import pytest

import modules.torchvision_operators  # noqa: F401  before transformers and diffusers

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def reference_folder() -> Path:
    return ROOT / "tests" / "reference"
