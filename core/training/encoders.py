"""The frozen encoders of a training: pictures and captions to latents and conditions of Stage C."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from core.config.schema import (
    ControlTrainConfig,
    LatentGeometry,
    StageBTrainConfig,
    StageCConfig,
    TrainConfig,
    effnet_sizes,
    stage_c_sizes,
)
from core.data.cache import Cache, cached_batches, fill
from core.data.loader import Batch
from core.data.sources import names_shards
from core.pictures.images import to_image
from core.pipeline.conditioning import Conditions, conditions
from core.pipeline.networks import DTYPES
from core.pipeline.resolution import lr_training_size
from core.training.run import Run, plain_positions
from core.weights.checkpoint import load_module
from core.weights.clip import TextEncoder, find_text_encoder
from core.weights.hashes import file_sha256
from core.weights.image_encoder import PictureEncoder, load_image_encoder
from modules.effnet import EfficientNetEncoder, imagenet_normalise
from modules.stage_c import StageC


def frozen_stage_c(config: ControlTrainConfig | TrainConfig, device: torch.device) -> StageC:
    """Stage C's weights in the configuration's number format."""
    stage_c = load_module(
        partial(StageC, **asdict(stage_c_sizes(config))), config.generator_checkpoint_path,
        dtype=DTYPES[config.dtype], device=device, what="Stage C",
    )  # fmt: skip
    stage_c.gradient_checkpointing = config.gradient_checkpointing
    return stage_c


@dataclass(frozen=True)
class EncodedBatch:
    """What frozen encoders make of a batch."""

    z: Tensor  # (B, 16, H, W)
    z_lr: Tensor | None  # (B, 16, h, w), of the pictures at low resolution, where that is asked for
    conditions: Conditions

    def named(self) -> dict[str, Tensor]:
        """As named tensors, for a cache."""
        latents = {"z": self.z} if self.z_lr is None else {"z": self.z, "z_lr": self.z_lr}
        return {**latents, **vars(self.conditions)}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], device: torch.device) -> EncodedBatch:
        """From named tensors, on a device."""
        moved = {name: tensor.to(device) for name, tensor in tensors.items()}
        return cls(moved.pop("z"), moved.pop("z_lr", None), Conditions(**moved))


@dataclass(frozen=True)
class Encoders:
    """The encoder of pictures and those of the conditions, and how pictures are brought to low resolution."""

    effnet: EfficientNetEncoder
    text: TextEncoder
    image: PictureEncoder | None
    geometry: LatentGeometry
    clip_img_width: int
    device: torch.device

    @classmethod
    def load(cls, config: StageCConfig, device: torch.device) -> Encoders:
        """From a configuration's files; the picture's encoder in float32, the others in its number format."""
        build = partial(EfficientNetEncoder, **asdict(effnet_sizes(config)))
        effnet = load_module(
            build, config.effnet_checkpoint_path, dtype=torch.float32, device=device,
            what="EfficientNet encoder",
        )  # fmt: skip
        dtype = DTYPES[config.dtype]
        text = TextEncoder.load(config.clip_text_path, dtype)
        image = load_image_encoder(config.clip_image_path, dtype) if config.clip_image_path else None
        return cls(effnet, text, image, config.geometry, stage_c_sizes(config).c_clip_img, device)

    def encode(self, batch: Batch, with_lr: bool = True) -> EncodedBatch:
        """Latents, at both resolutions or one, and conditions of a batch, with nothing dropped."""
        return EncodedBatch(*self.latents(batch, with_lr), self.conditions(batch))

    def latents(self, batch: Batch, with_lr: bool = True) -> tuple[Tensor, Tensor | None]:
        """The pictures' latents (B, 16, H, W) and, where asked for, those at low resolution (B, 16, h, w)."""
        images = batch.images.to(self.device)
        z = encode_latent(self.effnet, images)
        return z, encode_latent(self.effnet, at_low_resolution(images, self.geometry)) if with_lr else None

    def conditions(self, batch: Batch) -> Conditions:
        """The captions' conditions, with image embeddings where there is an encoder for them."""
        texts = self.text.encode(batch.captions, self.device, together=True)
        rows = [texts[caption] for caption in batch.captions]
        tokens, pooled = torch.cat([row.tokens for row in rows]), torch.cat([row.pooled for row in rows])
        return Conditions(tokens, pooled, self.image_embeddings(batch).to(pooled))

    def image_embeddings(self, batch: Batch) -> Tensor:
        """The pictures' image embeddings (B, 1, I), zeros where there is no encoder for them."""
        if self.image is None:
            return torch.zeros(len(batch.images), 1, self.clip_img_width, device=self.device)
        return torch.cat([self.image.encode(to_image(picture), self.device) for picture in batch.images])

    def empty(self) -> Conditions:
        """The conditions (1, …) of the empty caption."""
        return conditions(self.text.encode([""], self.device)[""], None, self.clip_img_width)


def fingerprint(config: TrainConfig | StageBTrainConfig, files: Iterable[str | None], *settings: Any) -> str:
    """What stands for the encoders of pictures (`files` or folders) and of texts in a cache."""
    paths = []
    for source in map(Path, filter(None, files)):
        paths += sorted(source.rglob("model*.safetensors")) if source.is_dir() else [source]
    folder, tokenizer = find_text_encoder(config.clip_text_path)
    paths += [*sorted(folder.glob("model*.safetensors")), *sorted(tokenizer.glob("*.json"))]
    hashes = sorted({file_sha256(path) for path in paths if path.is_file()})
    parts = [hashes, asdict(config.geometry), config.dtype, *settings]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@torch.no_grad()
def encode_latent(effnet: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Semantic latents (B, 16, H / stride, W / stride), float32, of pictures (B, 3, H, W) in [0, 1]."""
    return effnet(imagenet_normalise(images)).float()


def at_low_resolution(images: Tensor, geometry: LatentGeometry) -> Tensor:
    """Pictures (B, 3, H, W) at the size of the low-resolution pass in training."""
    small = lr_training_size(images.shape[-2], images.shape[-1], geometry)
    return F.interpolate(images, size=small, mode="bilinear", antialias=True, align_corners=False)


def check_cache(config: TrainConfig | StageBTrainConfig) -> None:
    """ValueError where a cache is asked for and the data are shards."""
    if config.cache_path is not None and names_shards(config):
        raise ValueError("'cache_path' cannot be used with shards: leave it out")


def batches_of(run: Run, encoders: Encoders, with_lr: bool = True) -> Callable[[Any], Iterator]:
    """The run's batches of pictures or, where it has a cache, of `EncodedBatch` as named tensors."""
    config = run.config
    if config.cache_path is None:
        return run.batches
    files = [config.effnet_checkpoint_path, config.clip_image_path]
    stamp = fingerprint(config, files, config.clip_image_path, with_lr)
    return cached(run, stamp, lambda batch: encoders.encode(batch, with_lr).named())


def cached(
    run: Run, stamp: str, encode: Callable[[Batch], Mapping[str, Tensor]]
) -> Callable[[Any], Iterator]:
    """Batches of what `encode` makes of pictures, from the run's cache, which is filled first where it lacks
    some; `stamp` stands for all that it depends on beside the pictures.
    """
    settings = run.loader_settings
    cache = Cache(Path(run.config.cache_path), stamp, run.config.seed)
    left = fill(run.data, cache, settings, encode)
    total = next(left)
    with tqdm(total=total, desc="caching latents", unit="picture", disable=not total) as bar:
        for count in left:
            bar.update(total - count - bar.n)
    run.accelerator.wait_for_everyone()
    return lambda position: plain_positions(partial(cached_batches, run.data, cache), settings, position)
