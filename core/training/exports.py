"""The weight files that a run writes: of those that are there already it replaces its own alone."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from core.weights.checkpoint import replacing
from core.weights.hashes import file_sha256

Export = Callable[[Mapping[str, Tensor], int], None]  # of named tensors at an update

RECORD = "exports.json"  # in a run's folder: files outside it that the run wrote, with their sha256
MARKS = ("step_*.pt", "config.yaml", "log.jsonl")  # of which a run leaves at least one in its folder


@dataclass(frozen=True)
class Exports:
    """The files that a run with this folder will write; `overwrite`: whatever is in their places."""

    folder: Path
    overwrite: bool = False
    files: list[Path] = field(default_factory=list)

    def claim(self, path: Path, key: str) -> Path:
        """`path`, where the run will write; `key` is that of the configuration that names it.

        ValueError where a file is that the run did not write, and where none can be written.
        """
        if path.is_dir():
            raise ValueError(f"{path} is a folder: name a file in it as '{key}'")
        parent = next(folder for folder in path.absolute().parents if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise ValueError(f"{path} cannot be written, because of {parent}: choose another '{key}'")
        if path.exists() and not self.overwrite and not self._is_own(path):
            raise ValueError(
                f"{path} was not written by this run and would be replaced: choose another '{key}', or give "
                "overwrite_export=true"
            )
        self.files.append(path)
        return path

    def recorded(self, export: Export | None) -> Export | None:
        """An export that also remembers what it writes outside the run's folder."""
        if export is None:
            return None

        def export_and_record(tensors: Mapping[str, Tensor], step: int) -> None:
            self._record(finished=False)
            export(tensors, step)
            self._record(finished=True)

        return export_and_record

    def _is_own(self, path: Path) -> bool:
        """Whether the run wrote a file: one in its folder, or one whose hash it knows.

        The hash is None from before a file is written until after it, so that a kill between is no obstacle.
        """
        if self._is_inside(path):
            return any(next(self.folder.glob(mark), None) for mark in MARKS)
        known, name = self._read(), str(path.resolve())
        return name in known and known[name] in (None, file_sha256(path))

    def _record(self, finished: bool) -> None:
        outside = [path for path in self.files if not self._is_inside(path)]
        if outside:
            known = {str(path.resolve()): file_sha256(path) if finished else None for path in outside}
            with replacing(self.folder / RECORD) as temporary:
                temporary.write_text(json.dumps({**self._read(), **known}, indent=2) + "\n", "utf-8")

    def _read(self) -> dict[str, str | None]:
        try:
            return dict(json.loads((self.folder / RECORD).read_text("utf-8")))
        except (OSError, ValueError, TypeError):  # none yet, or damaged: then no file is known
            return {}

    def _is_inside(self, path: Path) -> bool:
        return path.resolve().is_relative_to(self.folder.resolve())
