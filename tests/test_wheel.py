"""The wheel in an environment that has what it requires and nothing else."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image

NAME = re.compile(r"[\w.-]+")
LACKING = """
from importlib.util import find_spec
print([name for name in ("skia", "matplotlib", "pytest") if find_spec(name)])
"""
PICTURE = """
from core.pipeline import UltraPixelPipeline
made = UltraPixelPipeline.from_preset("tiny")("a red house on green hills", 128, 128, seed=1, progress=False)
made[0].save("house.png")
"""


def required(name: str) -> set[str]:
    """The distributions that one requires, with what those require, but for extras."""
    found: set[str] = set()
    ahead = [name]
    while ahead:
        with suppress(PackageNotFoundError):  # for another platform or version of Python
            lines = distribution(ahead.pop()).requires or ()
            new = {NAME.match(line)[0].lower() for line in lines if "extra ==" not in line} - found
            found |= new
            ahead += new
    return found


def show(name: str, folder: Path) -> None:
    """Make a distribution visible in a folder of packages, without a copy of it."""
    with suppress(PackageNotFoundError):
        found = distribution(name)
        for top in {path.parts[0] for path in found.files or ()} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(found.locate_file(top).resolve())


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The python of an environment with the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("core", "gdf", "modules", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "models" / "tiny", source / "models" / "tiny")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run(build, check=True, timeout=300)
    shutil.rmtree(source)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "bare")], check=True)
    python = folder / "bare" / "bin" / "python"
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", str(wheel)], check=True)
    (packages,) = (folder / "bare" / "lib").glob("python*/site-packages")
    for name in required("ultrapixel"):
        show(name, packages)
    return python


def test_a_picture_needs_only_what_the_wheel_requires(bare: Path, tmp_path: Path) -> None:
    lacking = (
        "import importlib.util as u; print([n for n in ('skia', 'matplotlib', 'pytest') if u.find_spec(n)])"
    )
    for code, told in ((lacking, "[]\n"), (PICTURE, "")):
        done = subprocess.run([bare, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert (done.returncode, done.stdout) == (0, told), done.stderr
    assert Image.open(tmp_path / "house.png").size == (128, 128)


def test_the_script_runs_on_the_wheel(bare: Path, tmp_path: Path) -> None:
    shutil.copy(ROOT / "inference" / "test_t2i.py", tmp_path)
    command = [
        bare,
        "test_t2i.py",
        "--preset",
        "tiny",
        "--height",
        "128",
        "--width",
        "128",
        "--prompt",
        "a boat",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.rglob("*.png"))) == 1
