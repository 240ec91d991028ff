"""Our packages under private names: nobody else's of the same names are found by us, or touched."""

from __future__ import annotations

import importlib.util
import pickle
import sys
import threading
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT

FILES = {
    "core/__init__.py": "from core.lazily import exporting\n"
    "__getattr__, __dir__, __all__ = exporting(__name__, late=('LATE',))",
    "core/lazily.py": (ROOT / "core" / "lazily.py").read_text("utf-8"),
    "core/late.py": "LATE = 'ours'",
    "core/things.py": """
from __future__ import annotations
import core
import core.late as late
import core.late
import gdf.sums, json, modules
from dataclasses import dataclass, field
from threading import Thread
from typing import get_type_hints
from core import LATE
from modules import nets
from .late import LATE as NEAR

@dataclass(frozen=True)
class Thing:
    size: int = 3
    name: str = field(default="thing")

def found():
    from core import late as again
    def inner():
        import gdf
        return gdf.sums.OWNER
    return [core.late.LATE, late.LATE, LATE, NEAR, again.LATE, inner(), nets.OWNER, modules.OWNER]

def found_in_a_thread():
    results = []
    thread = Thread(target=lambda: results.extend(found()))
    thread.start()
    thread.join()
    return results

HINTS = get_type_hints(Thing)
""",
    "gdf/__init__.py": "", "gdf/sums.py": "OWNER = 'ours'",
    "modules/__init__.py": "OWNER = 'ours'", "modules/nets.py": "OWNER = 'ours'",
}  # fmt: skip
FOREIGN = {
    "core/__init__.py": "LATE = 'theirs'", "core/late.py": "LATE = 'theirs'",
    "core/more.py": "from core.late import LATE", "gdf.py": "OWNER = 'theirs'",
    "modules/__init__.py": "OWNER = 'theirs'", "modules/nets.py": "OWNER = 'theirs'",
}  # fmt: skip


def written(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    return folder


@pytest.fixture
def private() -> ModuleType:
    path = ROOT / "inference" / "comfyui" / "private.py"
    spec = importlib.util.spec_from_file_location("private_packages", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """Foreign packages of our names, imported before; all else is as before in the end."""
    before, finders = dict(sys.modules), list(sys.meta_path)
    for name in [name for name in sys.modules if name.split(".")[0] in ("core", "gdf", "modules")]:
        del sys.modules[name]
    monkeypatch.syspath_prepend(str(written(tmp_path / "foreign", FOREIGN)))
    names = ("core", "core.late", "gdf", "modules", "modules.nets")
    yield {name: import_module(name) for name in names}
    sys.meta_path[:] = finders
    sys.modules.clear()
    sys.modules.update(before)


@pytest.fixture
def things(tmp_path: Path, private: ModuleType, theirs: dict[str, ModuleType]) -> ModuleType:
    package = private.private_package(written(tmp_path / "ours", FILES))
    return import_module(f"{package}.core.things")


def test_every_kind_of_import_finds_ours(things: ModuleType) -> None:
    assert set(things.found()) == {"ours"} and set(things.found_in_a_thread()) == {"ours"}


def test_theirs_are_what_they_were(things: ModuleType, theirs: dict[str, ModuleType]) -> None:
    things.found()
    now = {n: m for n, m in sys.modules.items() if n.split(".")[0] in ("core", "gdf", "modules")}
    assert now == theirs
    assert import_module("core.more").LATE == "theirs"  # loaded only now


def test_both_import_at_once(tmp_path: Path, private: ModuleType, theirs: dict[str, ModuleType]) -> None:
    """Imports of several threads, ours and theirs, of modules that none has loaded yet."""
    for number in range(20):
        written(tmp_path / "foreign", {f"core/n{number}.py": "from core.late import LATE"})
        written(tmp_path / "ours", {**FILES, f"core/n{number}.py": "from core.late import LATE"})
    package, found = private.private_package(tmp_path / "ours"), {"theirs": [], "ours": []}

    def load(owner: str, prefix: str) -> None:
        found[owner] += [import_module(f"{prefix}core.n{number}").LATE for number in range(20)]

    threads = [threading.Thread(target=load, args=a) for a in (("theirs", ""), ("ours", f"{package}."))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {owner: [owner] * 20 for owner in found}


def test_dataclasses_are_pickled_and_their_hints_read(things: ModuleType) -> None:
    thing = things.Thing(size=4)
    assert pickle.loads(pickle.dumps(thing)) == thing
    assert things.HINTS == {"size": int, "name": str}


def test_a_project_has_one_package_and_two_have_two(
    tmp_path: Path, private: ModuleType, theirs: dict[str, ModuleType]
) -> None:
    finders = len(sys.meta_path)
    first, second = (written(tmp_path / name, FILES) for name in ("a", "b"))
    packages = [private.private_package(root) for root in (first, first, second)]
    assert packages[0] == packages[1] != packages[2] and len(sys.meta_path) == finders + 2
    late = [import_module(f"{package}.core.late") for package in packages]
    assert late[0] is late[1] is not late[2]


def test_what_is_not_there_is_missed_by_its_private_name(private: ModuleType, things: ModuleType) -> None:
    package = things.__name__.partition(".")[0]
    with pytest.raises(ModuleNotFoundError, match=f"{package}.core.absent"):
        import_module(f"{package}.core.absent")
