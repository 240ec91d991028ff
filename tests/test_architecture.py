"""The one arrow of imports: modules and gdf stand alone, core imports both, the scripts import all three."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from conftest import ROOT

ALLOWED = {
    "modules": {"modules"},
    "gdf": {"gdf"},
    "core": {"core", "gdf", "modules"},
    "inference": {"core", "gdf", "modules"},
    "train": {"core", "gdf", "modules"},
}
OURS = set(ALLOWED)
FILES = [path for package in ALLOWED for path in sorted((ROOT / package).rglob("*.py"))]


def imported_packages(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrow(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    assert imported_packages(path) & OURS <= ALLOWED[package]


def test_no_file_evaluates_or_unpickles_freely() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in ("eval", "exec", "pickle.load", "pickle.loads"), f"{path}:{node.lineno}"
                if name == "torch.load":
                    keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                    assert keywords.get("weights_only") == "True", f"{path}:{node.lineno}"
