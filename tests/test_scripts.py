"""Scripts beside inference/ and train/: argparse reads their flags, and in models/ before torch is loaded."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

FOLDERS = ("models", "benchmarks", "figures")
SCRIPTS = [
    path
    for path in [*(p for folder in FOLDERS for p in sorted((ROOT / folder).glob("*.py"))),
                 ROOT / "tests" / "check_reference.py"]
    if '__name__ == "__main__"' in path.read_text("utf-8")
]  # fmt: skip
ASKED = """
import runpy, sys
sys.argv = [sys.argv[1], sys.argv[2]]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(sorted({"torch", "transformers", "huggingface_hub"} & sys.modules.keys()))
"""


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SCRIPTS, ids=named)
def test_flags_are_read_by_argparse(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert any(call.endswith(("parse_args", "parse_with_preset")) for call in calls)
    assert not any(
        ast.unparse(node) == "sys.argv" for node in ast.walk(tree) if isinstance(node, ast.Attribute)
    )


@pytest.mark.parametrize("path", [path for path in SCRIPTS if path.parent.name == "models"], ids=named)
@pytest.mark.parametrize("flag, code", [("--help", 0), ("--wrong", 2)])
def test_help_and_wrong_flags_are_answered_at_once(path: Path, flag: str, code: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", ASKED, str(path), flag]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == code and "Traceback" not in done.stderr
    assert done.stdout.splitlines()[-1] == "[]"  # nothing that takes long was loaded
    if code == 0:
        assert "usage:" in done.stdout
    else:
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
