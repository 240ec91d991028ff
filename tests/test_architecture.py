"""Who may import whom: packages, the rooms of core/, files without circles, no private names of others."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGES = {  # and what each may import of the others
    "modules": {"modules"},
    "gdf": {"gdf"},
    "core": {"core", "gdf", "modules"},
    "inference": {"core", "gdf", "modules"},
    "train": {"core", "gdf", "modules"},
}
ROOMS = {  # of core/, and which others each may use; all may use the small files that lie beside them
    "config": set(),
    "pictures": {"config"},
    "weights": {"config"},
    "pipeline": {"config", "pictures", "weights"},
    "commands": {"config", "pictures", "weights", "pipeline"},
    "server": {"config", "pictures", "weights", "pipeline", "commands"},
    "data": {"config", "pictures"},
    "training": {"config", "pictures", "weights", "pipeline", "data"},
    "scenes": {"config", "data"},
    "family": {"config", "pictures", "weights", "pipeline", "commands", "data", "training", "scenes"},
}
LATE = ("core.data.sources", "core.scenes.drawn")  # the one import against the arrows, inside a function
SHORT = ("core.settings", "core.config.settings")  # the one file beside the rooms that uses one of them
NODES = "inference.comfyui"  # a package, whose files use each other
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
files = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


def module_of(path: Path) -> str:
    """The dotted name of a file; a package's is that of its folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


@cache
def imports(path: Path) -> dict[str, str]:
    """What a file imports of the project, wherever that stands in it: (module or name, dotted) by alias."""
    found: dict[str, str] = {}
    package = module_of(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            found |= {alias.asname or alias.name: f"{source}.{alias.name}" for alias in node.names}
    return {alias: name for alias, name in found.items() if name.split(".")[0] in PACKAGES}


def used(path: Path) -> set[str]:
    """The modules of the project that a file imports, or names of."""
    parents = (name if name in MODULES else name.rpartition(".")[0] for name in imports(path).values())
    return {name for name in parents if name in MODULES} - {module_of(path)}


def room(module: str) -> str | None:
    """The room of core/ that a module belongs to; None for the files beside the rooms."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "core" and parts[1] in ROOMS else None


@files
def test_packages_use_what_they_may(path: Path) -> None:
    own = NODES if module_of(path).startswith(NODES) else None
    others = {name for name in imports(path).values() if own is None or not name.startswith(f"{own}.")}
    assert {name.split(".")[0] for name in others} <= PACKAGES[module_of(path).split(".")[0]]


@pytest.mark.parametrize("path", [path for path in FILES if path.is_relative_to(ROOT / "core")],
                         ids=lambda path: str(path.relative_to(ROOT)))  # fmt: skip
def test_rooms_use_those_before_them(path: Path) -> None:
    own = module_of(path)
    for other in used(path):
        if room(other) not in (None, room(own)) and (own, other) not in (LATE, SHORT):
            assert room(own) is not None, f"{own}, beside the rooms, uses {other}"
            assert room(other) in ROOMS[room(own)], f"{own} uses {other}"


def test_the_table_of_rooms_is_that_of_the_folders() -> None:
    folders = {path.parent.name for path in (ROOT / "core").glob("*/__init__.py")}
    assert folders == set(ROOMS)


def test_the_late_import_stands_inside_a_function() -> None:
    at_the_top = {ast.unparse(node) for node in tree(MODULES[LATE[0]]).body}
    assert LATE[1] in used(MODULES[LATE[0]])
    assert not any("scenes" in line for line in at_the_top if line.startswith(("from", "import")))


def test_no_circle_between_files() -> None:
    graph = {module: used(path) for module, path in MODULES.items()}
    graph[LATE[0]] = graph[LATE[0]] - {LATE[1]}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_files_of_core_name_the_file_that_they_use_not_its_room() -> None:
    rooms = {f"core.{name}" for name in ROOMS}
    for path in FILES:
        if path.is_relative_to(ROOT / "core"):
            assert not used(path) & rooms, f"{path}: a circle would not be seen through what a room exports"


@files
def test_private_names_are_used_by_their_own_file_alone(path: Path) -> None:
    for name in imports(path).values():
        last = name.rpartition(".")[2]
        assert not last.startswith("_") or last.startswith("__"), f"{path}: {name}"
    modules = {alias for alias, name in imports(path).items() if name in MODULES}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in modules:
            assert not node.attr.startswith("_"), f"{path}:{node.lineno}: {ast.unparse(node)}"


def in_a_new_process(code: str) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_configuration_loads_no_torch() -> None:
    names = [name for name in MODULES if room(name) == "config"] + ["core.commands.flags"]
    code = f"import sys, {', '.join(names)}\nprint({{'torch', 'transformers', 'skia'}} & set(sys.modules))"
    assert in_a_new_process(code) == "set()\n"


def test_nothing_but_its_own_rooms_needs_the_drawn_world() -> None:
    names = [name for name in MODULES if name.startswith("core") and room(name) not in ("scenes", "family")]
    blocked = "import sys\nsys.modules |= dict.fromkeys(('skia', 'matplotlib'))\n"
    code = f"{blocked}import {', '.join(names)}\nprint('core.scenes' in sys.modules)"
    assert in_a_new_process(code) == "False\n"


@pytest.mark.parametrize("name", sorted(ROOMS))
def test_a_room_exports_what_its_files_hold(name: str) -> None:
    exported = __import__(f"core.{name}", fromlist=["*"])
    assert exported.__doc__ and exported.__all__
    assert all(hasattr(exported, each) and each in dir(exported) for each in exported.__all__)
    with pytest.raises(AttributeError, match=f"'core.{name}' has no attribute 'nothing'"):
        exported.nothing  # noqa: B018


def test_no_file_evaluates_or_unpickles_freely() -> None:
    for path in FILES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in ("eval", "exec", "pickle.load", "pickle.loads"), f"{path}:{node.lineno}"
                if name == "torch.load":
                    keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                    assert keywords.get("weights_only") == "True", f"{path}:{node.lineno}"
