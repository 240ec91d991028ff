"""What a file of latents says of itself, read without its tensors and without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from core.config.sizes import Size

METADATA_KEY = "ultrapixel"  # of the picture's settings


@dataclass(frozen=True)
class StoredLatents:
    """The metadata of a file of latents."""

    settings: Mapping[str, Any]  # as pictures have them
    texts: Mapping[str, Any]  # all entries, by name

    @property
    def size(self) -> Size:
        """The picture's (height, width) in pixels."""
        return self.settings["height"], self.settings["width"]

    @property
    def lr_size(self) -> Size:
        """That of the picture whose low-resolution pass was made."""
        return tuple(self.settings.get("lr_size") or self.size)


def read_stored(path: str | Path) -> StoredLatents:
    """The metadata of a file of latents; FileNotFoundError, or ValueError for what is none, or is damaged."""
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: this file of latents does not exist")
    try:
        with safe_open(path, framework="numpy") as file:
            texts = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
        stored = StoredLatents(texts[METADATA_KEY], texts)
        assert all(isinstance(side, int) for side in (*stored.size, *stored.lr_size))
        return stored
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, AssertionError, RecursionError):
        raise ValueError(
            f"{path}: this is no file of latents, as --save_latents writes it, or it is damaged"
        ) from None
