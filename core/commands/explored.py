"""What a run goes on from, and the sheet of what it finds at low resolution."""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import ImageOps

from core.config.settings import Job, Settings
from core.pictures.images import save_new_image, to_image
from core.pictures.sheets import contact_sheet
from core.pipeline.latents import Earlier
from core.pipeline.made import Picture
from core.pipeline.pipeline import UltraPixelPipeline
from core.pipeline.resolution import plan_for
from core.pipeline.sources import NOISE_ALONE, Source

CELL = 256  # px, the longer side of a picture on the sheet


@dataclass(frozen=True)
class Continued:
    """The picture that a run goes on from, if it does."""

    pipeline: UltraPixelPipeline
    earlier: Earlier | None = None
    decodes: bool = False  # Stages B and A alone

    @classmethod
    def of(cls, arguments: argparse.Namespace, pipeline: UltraPixelPipeline) -> Continued:
        """What the flags go on from; errors as `Earlier.of_file`."""
        config, decoded = pipeline.config_c, getattr(arguments, "from_latents", None)
        path = decoded or getattr(arguments, "from_lr", None)
        return cls(pipeline, None if path is None else Earlier.of_file(path, config), bool(decoded))

    def check(self, jobs: Sequence[Job], settings: Settings) -> None:
        """ValueError where a job's size, or its settings, do not fit."""
        for job in jobs if self.earlier is not None else ():
            self._added(Source(), job, settings)

    def sources(self, jobs: Sequence[Job], settings: Settings) -> list[Source]:
        """What the jobs go on from; the pipeline's own where that is nothing."""
        own = self.pipeline.own_sources(jobs)
        if self.earlier is None:
            return own
        pairs = zip(own or [NOISE_ALONE] * len(jobs), jobs, strict=True)
        return [self._added(source, job, settings) for source, job in pairs]

    def _added(self, source: Source, job: Job, settings: Settings) -> Source:
        size, own, config = (job.height, job.width), job.settings or settings, self.pipeline.config_c
        if self.decodes:
            return self.earlier.decoding(size, own.lr_only, source)
        latent = plan_for(config, *size, own.lr_size).lr_latent
        if latent != plan_for(config, *self.earlier.lr_size).lr_latent:
            sides = "{} {}".format(*self.earlier.lr_size)
            raise ValueError(
                f"{self.earlier.name}: its low-resolution pass is that of --lr_size {sides}: leave it out"
            )
        return self.earlier.going_on(source)


class Sheet:
    """A sheet of small pictures with their seeds, saved once they are made, or what is made of them."""

    def __init__(self, folder: str, wanted: bool) -> None:
        self._folder, self._wanted = folder, wanted
        self._cells: list = []

    def add(self, picture: Picture) -> None:
        """Keep a picture for the sheet, reduced."""
        if self._wanted:
            small = ImageOps.contain(to_image(picture.pixels), (CELL, CELL))
            self._cells.append((small, f"seed {picture.seed}"))

    def save(self) -> str | None:
        """Save the sheet under a new name and return its path; None where nothing is on it."""
        if not self._cells:
            return None
        sheet = contact_sheet(self._cells, math.ceil(math.sqrt(len(self._cells))))
        try:
            return str(save_new_image(sheet, self._folder, "contact_sheet", "png", {}))
        except (OSError, ValueError) as error:
            warnings.warn(f"the sheet of the pictures is not saved ({error})", stacklevel=2)
            return None
