"""The parts of ComfyUI that its custom nodes meet; what they do to its memory and bar is kept in lists.

`Stub` stands for the running program: what the nodes told it, and whether the user has cancelled.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from PIL import Image
from torch import Tensor

EXTENSIONS = {".safetensors", ".pt", ".ckpt", ".sft", ".pth", ".bin"}


class InterruptProcessingException(Exception):
    """The user has cancelled."""


@dataclass
class Stub:
    """ComfyUI, with its model folders below `root`."""

    root: Path
    device: str = "cpu"
    cancel_after: int | None = None  # calls of throw_exception_if_processing_interrupted
    asked: list[tuple[int, torch.device]] = field(default_factory=list)  # of free_memory
    emptied: int = 0
    shown: list[tuple[int, int, Any]] = field(default_factory=list)  # (value, total, preview)
    checks: int = 0
    saved: list[Tensor] = field(default_factory=list)

    def modules(self) -> dict[str, ModuleType]:
        """The modules that nodes import, by name."""
        comfy = _module("comfy", __path__=[])
        comfy.utils = _module("comfy.utils", ProgressBar=self._bar())
        comfy.model_management = _module(
            "comfy.model_management",
            InterruptProcessingException=InterruptProcessingException,
            get_torch_device=lambda: torch.device(self.device),
            free_memory=lambda needed, device: self.asked.append((needed, device)),
            soft_empty_cache=self._empty,
            throw_exception_if_processing_interrupted=self._check,
        )
        folders = _module("folder_paths", get_filename_list=self._names, get_full_path=self._path)
        return {module.__name__: module for module in (comfy, comfy.utils, comfy.model_management, folders)}

    def _bar(self) -> Callable[..., Any]:
        stub = self

        class ProgressBar:
            def __init__(self, total: int) -> None:
                self.total = total

            def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
                stub.shown.append((value, self.total if total is None else total, preview))

        return ProgressBar

    def _empty(self) -> None:
        self.emptied += 1

    def _check(self) -> None:
        self.checks += 1
        if self.cancel_after is not None and self.checks > self.cancel_after:
            raise InterruptProcessingException

    def _names(self, key: str) -> list[str]:
        folder = self.root / "models" / key
        return sorted(
            str(p.relative_to(folder)) for p in folder.rglob("*.*") if p.suffix in EXTENSIONS
        )  # fmt: skip

    def _path(self, key: str, name: str) -> str | None:
        path = self.root / "models" / key / name
        return str(path) if path.is_file() else None

    @contextmanager
    def running(self, *links: Path) -> Iterator[list[ModuleType]]:
        """Within it, the program runs, with links to folders of nodes among its custom_nodes."""
        held = dict(sys.modules)
        with mock.patch.dict(sys.modules, self.modules()):
            yield [self._loaded(folder) for folder in links]
            kept = {name: module for name, module in sys.modules.items() if name not in held}
        sys.modules.update({name: m for name, m in kept.items() if name.startswith("ultrapixel_")})

    def _loaded(self, folder: Path) -> ModuleType:
        """A folder of nodes, loaded under its path, as ComfyUI does."""
        link = self.root / "custom_nodes" / "ultrapixel"
        if not link.exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(folder, target_is_directory=True)
        name = str(link).replace(".", "_x_")
        spec = importlib.util.spec_from_file_location(name, link / "__init__.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module

    def execute(self, nodes: ModuleType, workflow: Mapping[str, Any]) -> dict[str, tuple]:
        """Run a workflow in the API's format, each node once its inputs are there; outputs by node."""
        classes, outputs = {**nodes.NODE_CLASS_MAPPINGS, **self._own_nodes()}, {}
        waiting = dict(workflow)
        while waiting:
            name = next(n for n, node in waiting.items() if outputs.keys() >= _before(node))
            node = waiting.pop(name)
            given = {
                key: outputs[value[0]][value[1]] if isinstance(value, list) else value
                for key, value in node["inputs"].items()
            }
            outputs[name] = call(classes[node["class_type"]], **given)
        return outputs

    def _own_nodes(self) -> dict[str, type]:
        stub = self

        class LoadImage:
            FUNCTION = "load"

            def load(self, image: str) -> tuple[Tensor, Tensor]:
                picture = Image.open(stub.root / "input" / image).convert("RGBA")
                pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
                pixels = pixels.view(1, picture.height, picture.width, 4).float() / 255
                return pixels[..., :3], 1 - pixels[..., 3]

        class SaveImage:
            FUNCTION = "save"

            def save(self, images: Tensor, **_: str) -> tuple[()]:
                stub.saved += list(images)
                return ()

        return {"LoadImage": LoadImage, "SaveImage": SaveImage}


@torch.inference_mode()
def call(node: type, **given: Any) -> tuple:
    """A node's function, as ComfyUI calls it."""
    return getattr(node(), node.FUNCTION)(**given)


def _before(node: Mapping[str, Any]) -> set[str]:
    return {value[0] for value in node["inputs"].values() if isinstance(value, list)}


def _module(name: str, **names: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(names)
    return module
