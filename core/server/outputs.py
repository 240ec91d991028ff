"""The folder of the server's pictures, under names that it chooses, and small ones of them."""

from __future__ import annotations

import os
import re
import secrets
import time
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from core.pictures.images import load_image, prepare_folder, read_image_metadata, save_new_image
from core.pipeline.made import Picture

NAME = re.compile(r"\d{8}-\d{6}-[0-9a-f]{16}\.png")
SMALL_SIDE = 320  # px
SMALL_FOLDER = "small"


class Outputs:
    """Pictures in one folder; whatever name a client gives, no other file is touched."""

    def __init__(self, folder: str | Path) -> None:
        """The folder is made if need be; ValueError where nothing can be written to it."""
        self.folder = Path(folder).absolute()
        prepare_folder(self.folder)

    def add(self, picture: Picture) -> str:
        """Save a picture with its settings inside, and return its name."""
        stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(8)}"
        record, image = picture.record, picture.image
        metadata, text = record.metadata(picture.job), record.text(picture.job)
        path = save_new_image(image, self.folder, stem, "png", metadata, text)
        self._write_small(image, path.name)
        return path.name

    def names(self) -> list[str]:
        """The pictures, the newest first."""
        return sorted((path.name for path in self.folder.iterdir() if self._is_own(path)), reverse=True)

    def path(self, name: str) -> Path:
        """The file of a name; FileNotFoundError where there is none."""
        path = self.folder / name
        if path.name != name or not self._is_own(path):
            raise FileNotFoundError("there is no such picture")
        return path

    def small(self, name: str) -> Path:
        """A small JPEG of the picture; errors as `path`, and ValueError for a damaged one."""
        path = self.path(name)
        if not self._small(name).is_file():
            self._write_small(load_image(path), name)
        return self._small(name)

    def settings(self, name: str) -> dict[str, Any]:
        """What a picture was made with; errors as `path`, and ValueError where it does not tell."""
        return read_image_metadata(self.path(name))

    @staticmethod
    def _is_own(path: Path) -> bool:
        return NAME.fullmatch(path.name) is not None and path.is_file() and not path.is_symlink()

    def _small(self, name: str) -> Path:
        return self.folder / SMALL_FOLDER / f"{Path(name).stem}.jpg"

    def _write_small(self, image: Image.Image, name: str) -> None:
        small = image.convert("RGB")
        small.thumbnail((SMALL_SIDE, SMALL_SIDE))
        with suppress(OSError):  # it is made again when it is asked for
            path = self._small(name)
            path.parent.mkdir(exist_ok=True)
            part = path.with_suffix(f".{secrets.token_hex(8)}.part")
            try:
                small.save(part, "JPEG", quality=88)
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)


def png_bytes(image: Image.Image) -> bytes:
    """A picture as PNG, for a moment."""
    content = BytesIO()
    image.save(content, "PNG", compress_level=1)
    return content.getvalue()
