"""The encoder of image prompts: CLIP's vision tower, or the embedded family's small network."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from core.weights.checkpoint import load_module, read_config
from core.weights.clip import ImageEncoder
from modules.recogniser import Recogniser

CLIP = "openai/clip-vit-large-patch14"  # what Stage C was trained with


class PictureEncoder(Protocol):
    """What makes embeddings of pictures."""

    def encode(self, image: Image.Image, device: torch.device | str) -> Tensor:
        """The embedding (1, 1, I) of a picture, on `device`, where the encoder is afterwards."""

    def to(self, device: torch.device | str) -> PictureEncoder:
        """Move the encoder and return it."""


@dataclass(frozen=True)
class SmallImageEncoder:
    """The embedded family's encoder, which sees a picture as a whole, squeezed to a square."""

    model: Recogniser

    def to(self, device: torch.device | str) -> SmallImageEncoder:
        """Move the model and return self."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def encode(self, image: Image.Image, device: torch.device | str) -> Tensor:
        """The embedding (1, 1, I) of a picture, on `device`."""
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None]
        return self.to(device).model.embed(pixels.to(device).float() / 255)[:, None]


def load_image_encoder(source: str, dtype: torch.dtype, allow_download: bool = False) -> PictureEncoder:
    """The encoder in a folder or under a hub id (CLIP's), or in a single file (the embedded family's).

    OSError or ValueError, of one sentence, where there is none.
    """
    if not source.endswith(".safetensors"):
        return ImageEncoder.load(source, dtype, allow_download)
    if not Path(source).is_file():
        raise FileNotFoundError(f"{source}: this image encoder does not exist")
    sizes = read_config(source) or {}
    if not sizes.get("c_embedding"):
        raise ValueError(f"{source} is no image encoder: name CLIP's folder or hub id, or a small one's file")
    build = partial(Recogniser, **sizes)
    return SmallImageEncoder(load_module(build, source, dtype=torch.float32, what="image encoder"))
