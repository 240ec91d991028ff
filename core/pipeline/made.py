"""Pictures that were made, and what is written into their files: settings, versions, hashes of weights."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

from core.config.settings import Job, Settings
from core.paths import at_home
from core.pictures.files import DEEP, format_of
from core.pictures.images import save_image, to_image, to_levels
from core.pipeline.latents import Latents
from core.weights.hashes import file_sha256

if TYPE_CHECKING:
    from core.pictures.images import Levels

HURRIED_WITHIN = 0.1  # seconds
PACKAGES = ("ultrapixel", "torch", "transformers")


@dataclass(frozen=True)
class Record:
    """How pictures were made, as it is written into them."""

    settings: Settings
    models: Mapping[str, Any]  # values of flags
    model: str  # its name, for other programs
    hashes: WeightHashes

    def metadata(self, job: Job) -> dict[str, Any]:
        """What `picture_metadata` gives."""
        return picture_metadata(job, job.settings or self.settings, self.models, self.hashes.result())

    def text(self, job: Job) -> str:
        """What `infotext` gives."""
        return infotext(job, job.settings or self.settings, self.model)


@dataclass(frozen=True)
class Picture:
    """A finished picture: its job and its pixels (3, height, width) in [0, 1], float32 on the CPU.

    Where a given picture has alpha, it is the fourth channel.
    """

    job: Job
    pixels: Tensor
    record: Record | None = None  # of what a call returns
    latents: Latents | None = None

    def __repr__(self) -> str:
        return f"Picture(seed={self.seed}, {self.job.height} x {self.job.width}, {self.job.prompt!r})"

    def _repr_png_(self) -> bytes:
        """The picture as a notebook shows it."""
        content = BytesIO()
        self.image.save(content, "PNG")
        return content.getvalue()

    @property
    def image(self) -> Image.Image:
        """The picture, 8 bits a colour."""
        return to_image(self.pixels)

    @property
    def seed(self) -> int:
        """The seed that makes it again."""
        return self.job.seed

    def drawn(self, format: str) -> Image.Image | Levels:
        """The picture with as many bits a colour as a format has: an 8-bit image, or levels of 16."""
        return to_levels(self.pixels) if format in DEEP else self.image

    def save(
        self, path: str | Path, bits: int | None = None, *, lossless: bool = False, provenance: bool = False
    ) -> Path:
        """Write it with its settings inside, as .png, .jpg, .webp, .tiff, .avif or .jxl.

        An existing file is replaced, and the path comes back. `bits` a colour are 16 for .tiff and 8 for the
        others, unless .png is asked for 16. `lossless` is for .webp. `provenance` says in the file that a
        model made it. ValueError for another suffix, and for bits that it does not have.
        """
        path = Path(at_home(str(path)))
        text = self.job.prompt if self.record is None else self.record.text(self.job)
        format = format_of(path, bits, lossless)
        return save_image(self.drawn(format), path, format, self._metadata(), text, provenance)

    def save_latents(self, path: str | Path) -> Path:
        """Write its latents, with its settings, as safetensors; an existing file is replaced.

        The path comes back. ValueError where it has none.
        """
        if self.latents is None:
            raise ValueError("this picture comes without its latents: make it again to save them")
        path = Path(at_home(str(path)))
        self.latents.save(path, self._metadata())
        return path

    def _metadata(self) -> dict[str, Any]:
        return self.job.values() if self.record is None else self.record.metadata(self.job)


class Pictures(list[Picture]):
    """Pictures in the order in which they were asked for."""

    @property
    def images(self) -> list[Image.Image]:
        """All of them as `Picture.image` gives them."""
        return [picture.image for picture in self]


class WeightHashes:
    """SHA-256 of the weight files, found beside the run in a thread of its own."""

    def __init__(self, files: Mapping[str, str], known: WeightHashes | None = None) -> None:
        """`known` are those of an earlier run: a file that is as it was is not read again."""
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sha256")
        self._stamps = {path: _stamp(path) for path in files.values() if Path(path).is_file()}
        self._hashes: dict[str, Future[str]] = {
            path: known._hashes[path]
            if known is not None and known._stamps.get(path) == stamp
            else pool.submit(file_sha256, path)
            for path, stamp in self._stamps.items()
        }
        pool.shutdown(wait=False)
        self._hurried = Event()

    def __getstate__(self) -> dict[str, Any]:
        found = {path: future.result() for path, future in self._hashes.items() if _was_read(path, future)}
        return {"stamps": self._stamps, "found": found}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._stamps, self._hashes, self._hurried = state["stamps"], {}, Event()
        for path, found in state["found"].items():
            self._hashes[path] = Future()
            self._hashes[path].set_result(found)

    def hurry(self) -> None:
        """Let nobody wait for hashes any longer."""
        self._hurried.set()

    def result(self) -> dict[str, str]:
        """File name to hash, of those that can be read; all are waited for, unless that is to be hurried."""
        while not self._hurried.is_set() and not all(future.done() for future in self._hashes.values()):
            futures.wait(self._hashes.values(), timeout=HURRIED_WITHIN)
        done = {path: future for path, future in self._hashes.items() if future.done()}
        return {path: future.result() for path, future in done.items() if _was_read(path, future)}


def _stamp(path: str) -> tuple[int, ...]:
    status = Path(path).stat()
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size


def _was_read(path: str, future: Future[str]) -> bool:
    error = future.exception()
    if error is not None:
        warnings.warn(f"the hash of {path} is left out of the pictures' settings: {error}", stacklevel=2)
    return error is None


def picture_metadata(
    job: Job, settings: Settings, models: Mapping[str, Any], hashes: Mapping[str, str]
) -> dict[str, Any]:
    """The settings that repeat a picture (--from_image), with versions and hashes to tell what made it."""
    found = {package: _version(package) for package in PACKAGES}
    versions = {package: number for package, number in found.items() if number is not None}
    return {**job.values(), **asdict(settings), **models, "versions": versions, "weights": dict(hashes)}


def _version(package: str) -> str | None:
    """The version of a package; None, and a warning, where it is not installed but lies on PYTHONPATH."""
    with suppress(PackageNotFoundError, KeyError, ValueError):  # the others: of damaged metadata
        if number := version(package):
            return number
    warnings.warn(
        f"the version of {package} is not known and is left out of the pictures' settings", stacklevel=3
    )
    return None


def infotext(job: Job, settings: Settings, model: str) -> str:
    """A picture's settings in the form of A1111, which many programs read: prompts, then a line of values."""
    values = {
        "Steps": settings.steps,
        "Sampler": settings.sampler,
        "CFG scale": settings.cfg,
        "Seed": job.seed,
        "Size": f"{job.width}x{job.height}",
        "Model": model,
    }
    negative = [f"Negative prompt: {job.negative_prompt}"] if job.negative_prompt else []
    line = ", ".join(f"{name}: {_quoted(str(value))}" for name, value in values.items())
    return "\n".join([job.prompt, *negative, line])


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if set(value) & set(',:\n"') else value
