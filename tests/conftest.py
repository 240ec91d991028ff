"""Shared by all tests: torchvision imports on CPU builds, and the references that lie beside the tests."""

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import interpreted  # noqa: F401  before torch, which looks for triton

import pytest  # isort: skip
import torch  # isort: skip

import modules.torchvision_operators  # noqa: F401  before transformers and diffusers
from core.pipeline.pipeline import UltraPixelPipeline

if "PYTEST_XDIST_WORKER" in os.environ:  # one process per core already
    torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "models"))
from random_family import Family, write_family  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The tests' hashes do not go into the user's cache."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """A test that leaves this project's log silenced fails, not those after it that read the log."""
    yield
    names = [n for n in logging.root.manager.loggerDict if n.split(".")[0] in ("core", "gdf", "modules")]
    own = map(logging.getLogger, names)
    assert not [one.name for one in own if one.level or one.disabled or not one.propagate]


@pytest.fixture(scope="session")
def reference_folder() -> Path:
    return ROOT / "tests" / "reference"


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family of random weights in the published layout."""
    folder = tmp_path_factory.mktemp("family")
    write_family(folder, Family())
    return folder


@pytest.fixture(scope="module")
def lesson(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures with small networks, and configurations of four updates on them."""
    from training_lesson import write_lesson  # here, as it imports this file

    folder = tmp_path_factory.mktemp("lesson")
    write_lesson(folder)
    return folder


def random_pipeline(folder: Path, guided: bool = True, device: str = "cpu") -> UltraPixelPipeline:
    guidance = folder / "ultrapixel_t2i.safetensors" if guided else None
    return UltraPixelPipeline.from_config(folder / "stage_c.yaml", folder / "stage_b.yaml", guidance, device)
