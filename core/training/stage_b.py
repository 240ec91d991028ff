"""Training of Stage B, with the encoder of its condition along, as the semantic compressor was made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.config.schema import StageBTrainConfig, effnet_sizes, stage_a_sizes, stage_b_sizes
from core.config.settings import Settings
from core.data.loader import Batch
from core.pictures.images import save_image
from core.pipeline.networks import DTYPES
from core.pipeline.passes import NoiseSource, decode_picture, stage_b_pass
from core.pipeline.resolution import plan
from core.random_keys import generator_of
from core.training.encoders import cached, check_cache, fingerprint
from core.training.noising import Noised, noised
from core.training.preview import row_of, sheet
from core.training.run import Run, export_with_encoder, train, trained_module
from core.training.trainer import Recipe, StepLoss
from core.weights.checkpoint import load_module
from core.weights.clip import TextEncoder
from gdf.diffusion import pyramid_noise, sample_losses
from gdf.schedules import draw_times
from gdf.targets import target_named
from modules.effnet import EfficientNetEncoder, imagenet_normalise
from modules.stage_a import StageA
from modules.stage_b import StageB

LATENT_SHARE = 0.9  # of the samples that see the encoder's latent, the others zeros
TEXT_DROPOUT = 0.05
SCALES = (0.5, 1.0)  # of the picture that the encoder sees
PREVIEWED = 4  # pictures on a sheet


# --- a step ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageBNoise:
    """The random numbers of a batch's samples; each sample's depend on its own key alone."""

    t: Tensor  # (B,)
    epsilon: Tensor  # (B, 4, H, W)
    keep_latent: Tensor  # (B,), bool
    drop_text: Tensor  # (B,), bool
    seeds: list[int]  # of the noise on the encoder's latents, whose size is not known yet


def draw_noise(keys: Sequence[Sequence[int]], size: Sequence[int], pyramid: bool) -> StageBNoise:
    """Random numbers for samples with these keys and latents of `size` (4, H, W), drawn on the CPU."""
    drawn, seeds = [], []
    for key in keys:
        generator = generator_of(key)
        t = draw_times(1, generator)[0]
        shape = (1, *size)
        noise = pyramid_noise(shape, generator) if pyramid else torch.randn(shape, generator=generator)
        keep, drop = torch.rand(2, generator=generator)
        drawn.append((t, noise[0], keep < LATENT_SHARE, drop < TEXT_DROPOUT))
        seeds.append(int(torch.randint(2**62, (), generator=generator)))
    return StageBNoise(*(torch.stack(column) for column in zip(*drawn, strict=True)), seeds)


def encoder_picture(images: Tensor, key: Sequence[int], stride: int) -> Tensor:
    """Pictures (B, 3, H, W) as the encoder sees them: at a random scale, sides multiples of its stride.

    The scale follows from the update's key, so that all samples and processes share it.
    """
    low, high = SCALES
    scale = low + (high - low) * float(torch.rand((), generator=generator_of(key)))
    size = [max(1, round(scale * side / stride)) * stride for side in images.shape[-2:]]
    return F.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)


class StageBTraining(nn.Module):
    """Stage B, and the encoder whose latents condition it, where that is trained along."""

    def __init__(
        self, stage_b: StageB, effnet: EfficientNetEncoder | None, config: StageBTrainConfig
    ) -> None:
        super().__init__()
        self.stage_b, self.effnet, self.latent_noise = stage_b, effnet, config.latent_noise

    def forward(self, latents: Noised, seen: Tensor, pooled: Tensor, noise: StageBNoise) -> Tensor:
        """The prediction (B, 4, H, W) given pooled texts (B, 1, P) and pictures (B, 3, h, w) in [0, 1].

        Without an encoder, `seen` are the latents (B, 16, h, w) of a finished one instead of pictures.
        """
        effnet = seen if self.effnet is None else self.effnet(imagenet_normalise(seen))
        if self.latent_noise:
            draws = [torch.randn(effnet.shape[1:], generator=generator_of((seed,))) for seed in noise.seeds]
            effnet = effnet + self.latent_noise * torch.stack(draws).to(effnet)
        effnet = effnet * noise.keep_latent.to(effnet)[:, None, None, None]
        return self.stage_b(latents.x, latents.r, effnet, pooled)


# --- setup ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Networks:
    """Stage B and the encoder, which are trained, and the frozen ones around them."""

    stage_b: StageB
    effnet: EfficientNetEncoder
    stage_a: StageA
    text: TextEncoder
    finished: bool  # the encoder is, and not trained along

    @torch.no_grad()
    def encode(self, batch: Batch, picture: Tensor, device: torch.device) -> dict[str, Tensor]:
        """Latents `z` (B, 4, H, W), pooled texts `pooled` (B, 1, P), and what Stage B's training `seen`.

        That is the encoder's latents of `picture` (B, 3, h, w) where it is finished, else `picture` itself.
        """
        texts = self.text.encode(batch.captions, device, together=True)
        picture = picture.to(device)
        return {
            "z": self.stage_a.encode(batch.images.to(device)),
            "seen": self.effnet(imagenet_normalise(picture)) if self.finished else picture,
            "pooled": torch.cat([texts[caption].pooled for caption in batch.captions]),
        }


def load_networks(config: StageBTrainConfig, device: torch.device) -> Networks:
    """Trained weights in float32, from files or new; frozen ones as in inference."""
    stage_a = load_module(
        partial(StageA, **asdict(stage_a_sizes(config))), config.stage_a_checkpoint_path,
        dtype=torch.float32, device=device, what="Stage A",
    )  # fmt: skip
    text = TextEncoder.load(config.clip_text_path, DTYPES[config.dtype])
    torch.manual_seed(config.seed)
    build_b = partial(StageB, **asdict(stage_b_sizes(config)))
    build_effnet = partial(EfficientNetEncoder, **asdict(effnet_sizes(config)))
    if config.effnet_checkpoint_path is None:
        effnet = trained_module(build_effnet, config.effnet_pretrained_path, device, "EfficientNet encoder")
    else:
        effnet = load_module(
            build_effnet, config.effnet_checkpoint_path, dtype=torch.float32, device=device,
            what="EfficientNet encoder",
        )  # fmt: skip
    stage_b = trained_module(build_b, config.pretrained_path, device, "Stage B")
    stage_b.gradient_checkpointing = config.gradient_checkpointing
    return Networks(stage_b, effnet, stage_a, text, config.effnet_checkpoint_path is not None)


# --- the recipe -----------------------------------------------------------------------------------


def make_loss(run: Run, networks: Networks) -> Callable[..., StepLoss]:
    """The loss of a batch: mean over the latent's pixels of (prediction - target)², per sample."""
    config, device = run.config, run.device
    target, dtype = target_named(config.target), DTYPES[config.dtype]
    empty = networks.text.encode([""], device)[""].pooled

    def loss(module: nn.Module, batch: Batch | Mapping[str, Tensor], keys: list[tuple[int, ...]]) -> StepLoss:
        if isinstance(batch, Batch):
            picture = encoder_picture(batch.images, keys[0][:2], config.geometry.stride)
            batch = networks.encode(batch, picture, device)
        z, seen, pooled = (batch[name].to(device) for name in ("z", "seen", "pooled"))
        noise = draw_noise(keys, z.shape[1:], config.pyramid_noise)
        latents = noised(z, noise.t, noise.epsilon, target)
        pooled = torch.where(noise.drop_text[:, None, None].to(device), empty, pooled)
        prediction = module(latents, seen, pooled.to(dtype), noise)
        return StepLoss(sample_losses(prediction, latents.target), latents.logsnr)

    return loss


def batches_of(run: Run, networks: Networks) -> Callable[[Any], Iterator]:
    """The run's batches of pictures or, where it has a cache, of what Stage B sees of them."""
    config = run.config
    if config.cache_path is None:
        return run.batches

    def encode(batch: Batch) -> dict[str, Tensor]:
        return networks.encode(batch, _at_compression(batch.images, config), run.device)

    files = [config.stage_a_checkpoint_path, config.effnet_checkpoint_path]
    return cached(run, fingerprint(config, files, "stage_b"), encode)


def make_sampler(run: Run, networks: Networks, example: Batch) -> Callable[[int], None]:
    """Writes sheets: real, as Stage A gives it back, and sampled by Stage B from the encoder's latent."""
    few = Batch(example.images[:PREVIEWED], example.captions[:PREVIEWED], example.names[:PREVIEWED])
    images, target, settings = few.images.to(run.device), target_named(run.config.target), Settings()
    sizes = plan(images.shape[-2], images.shape[-1], run.config.geometry)
    texts = networks.text.encode([*few.captions, ""], run.device)

    def sample(step: int) -> None:
        trained = networks.effnet.training
        networks.effnet.eval()
        latents = networks.effnet(imagenet_normalise(_at_compression(images, run.config)))
        networks.effnet.train(trained)
        networks.stage_b.eval()
        rows = []
        for i, caption in enumerate(few.captions):
            pooled = torch.cat([texts[caption].pooled, texts[""].pooled])
            noise = NoiseSource.of(i, 0, run.device)
            with run.accelerator.autocast():
                sampled = stage_b_pass(
                    networks.stage_b, latents[i : i + 1], pooled, target, sizes, settings, noise
                )
            again = networks.stage_a.decode(networks.stage_a.encode(images[i : i + 1]))[0]
            made = decode_picture(networks.stage_a, sampled.x0.float(), sizes, tiled=False)
            rows.append(row_of([images[i], again, made]))
        networks.stage_b.train()
        if run.accelerator.is_main_process:
            save_image(sheet(rows), run.sheet_path(step), "jpg", {"captions": few.captions})

    return sample


def _at_compression(images: Tensor, config: StageBTrainConfig) -> Tensor:
    """Pictures scaled so that the encoder's latent has the size that Stage C makes for them."""
    geometry = config.geometry
    size = [round(side / geometry.compression) * geometry.stride for side in images.shape[-2:]]
    return nn.functional.interpolate(images, size=size, mode="bilinear", antialias=True)


def build(run: Run) -> Recipe:
    """Stage B's recipe."""
    sizes = stage_b_sizes(run.config)
    export, use = export_with_encoder(run, "stage_b", "generator_checkpoint_path", sizes)
    networks = load_networks(run.config, run.device)
    example = next(run.batches(None))[0]
    module = StageBTraining(networks.stage_b, None if networks.finished else networks.effnet, run.config)
    return Recipe(
        module, batches_of(run, networks), make_loss(run, networks), make_sampler(run, networks, example),
        export, use,
    )  # fmt: skip


def train_stage_b(config: StageBTrainConfig) -> int:
    """Run this training, or go on with it; return the exit code."""
    check_cache(config)
    files = [config.stage_a_checkpoint_path, config.effnet_checkpoint_path, config.effnet_pretrained_path]
    return train(config, files, build, mixed_precision=config.dtype == "bfloat16")
