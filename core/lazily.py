"""How a room of core/ exports names without loading their modules before they are used."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any


def exporting(
    room: str, **names: tuple[str, ...]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package, from the names that each of its modules gives."""
    homes = {name: module for module, own in names.items() for name in own}

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {room!r} has no attribute {name!r}")
        return getattr(import_module(f"{room}.{homes[name]}"), name)

    return get, lambda: sorted(homes), sorted(homes)
