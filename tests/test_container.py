"""The container's files, as far as they can be tried without one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest
from conftest import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8").replace("\\\n", " ")
LAST = DOCKERFILE.rpartition("\nFROM ")[2]  # the stage that is kept


def told(instruction: str, text: str = LAST) -> list[str]:
    """What stands behind an instruction, each time."""
    return re.findall(rf"^\s*{instruction} (.+)$", text, re.M)


def test_it_does_not_run_as_root() -> None:
    assert told("USER") == ["1000"] and "useradd --uid 1000" in LAST


def test_models_and_pictures_are_mounted() -> None:
    assert json.loads(told("VOLUME")[0]) == ["/models", "/outputs"]
    command = json.loads(told("CMD")[-1])
    given = dict(zip(command[2::2], command[3::2], strict=True))
    assert command[:2] == ["python", "inference/app.py"]
    assert given == {"--host": "0.0.0.0", "--models": "/models", "--output_dir": "/outputs"}


def test_what_is_copied_is_not_ignored() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line[:1] == "!"}
    needed = {
        "core",
        "gdf",
        "modules",
        "inference",
        "configs",
        "models/tiny",
        "requirements.txt",
        "pyproject.toml",
    }
    assert needed <= kept
    assert all(any(ROOT.glob(name)) for name in kept)
    assert {"README.md", "LICENSE"} <= kept  # which pyproject.toml names


def test_the_health_check_asks_as_written() -> None:
    """It is a program of one line: it must at least be one, and fail where nobody answers."""
    program = json.loads(told("HEALTHCHECK")[0].partition("CMD ")[2])
    code = program[2].replace("7860", "1")
    assert program[:2] == ["python", "-c"]
    done = subprocess.run(["python3", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "ConnectionRefusedError" in done.stderr


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed")
def test_hadolint_finds_nothing() -> None:
    done = subprocess.run(["hadolint", str(ROOT / "Dockerfile")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
