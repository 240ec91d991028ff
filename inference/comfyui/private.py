"""Our packages under private names, so that other nodes' packages of the same names stay theirs.

ComfyUI runs all nodes in one process, and some bring a `core` or a `modules` of their own. Here our files
belong to a package that nobody else asks for, and what imports `core`, `gdf` and `modules` in them is an
`__import__` of their own: it finds ours, and everybody else's finds what it did before. `sys.path` stays as
it is, and `sys.modules` gets private names alone.
"""

from __future__ import annotations

import builtins
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any

OURS = ("core", "gdf", "modules")


def private_package(root: Path, *others: Path) -> str:
    """The name of a package with the files of the project at `root`, and those of other folders.

    Each project has its own, which exists once in a process.
    """
    name = f"ultrapixel_{zlib.crc32(str(root).encode()):08x}"
    if name not in sys.modules:
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(folder) for folder in (*others, root)]
        sys.meta_path.insert(0, PrivateFinder(name))
        sys.modules[name] = module_from_spec(spec)
    return name


class PrivateFinder(MetaPathFinder):
    """Finds the files of a private package, and nothing else."""

    def __init__(self, package: str) -> None:
        self._package = package

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """What the import machinery asks: where a module is, and what loads it."""
        if not name.startswith(f"{self._package}."):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = PrivateLoader(name, spec.loader.path, self._package)
        return spec


class PrivateLoader(SourceFileLoader):
    """Loads a file as usual, but that its imports, also those inside functions, are the package's own."""

    def __init__(self, name: str, path: str, package: str) -> None:
        super().__init__(name, path)
        self._package = package

    def exec_module(self, module: ModuleType) -> None:
        """Execute the file. All its functions look up `__import__` among the builtins that are set here."""
        vars(module)["__builtins__"] = {**vars(builtins), "__import__": _importing(self._package)}
        super().exec_module(module)


def _importing(package: str) -> Callable[..., ModuleType]:
    """`__import__` for files of a private package."""

    def own_import(
        name: str,
        globals: Mapping[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        first = name.partition(".")[0]
        if level or first not in OURS:
            return builtins.__import__(name, globals, locals, fromlist, level)
        found = builtins.__import__(f"{package}.{name}", globals, locals, fromlist, 0)
        # `import core.memory` names core
        return found if fromlist else sys.modules[f"{package}.{first}"]

    return own_import
