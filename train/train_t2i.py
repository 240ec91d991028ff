"""Train the guidance: python train/train_t2i.py CONFIG.yaml [key=value ...], or under torchrun.

Running the same command again continues from the last checkpoint in checkpoint_path/experiment_id.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from core.checkpoint import check_file, config_metadata, load_module, save_tensors
from core.cli import run
from core.conditioning import Conditions, ImageEncoder, TextEncoder, conditions, find_text_encoder, stack
from core.config import TrainConfig, as_yaml, guidance_sizes, load, stage_c_sizes
from core.data.buckets import make_buckets
from core.data.folder import index_folder
from core.data.loader import Batch, FolderData, LoaderSettings, Position, batches, into_buckets
from core.data.shards import ShardData, is_shards, open_shards, shard_batches
from core.guidance_training import (
    GuidedStageC,
    SampleNoise,
    draw_noise,
    drop_conditions,
    encode_latents,
    noise_latents,
)
from core.images import save_image, to_image
from core.layouts import guidance_names
from core.pipeline import DTYPES, load_previewer
from core.preview import preview_row, sample_latents, sheet, with_latents
from core.resolution import plan
from core.settings import Settings
from core.trainer import Recipe, RunLog, StepLoss, Trainer, TrainSettings, check_batch_size
from gdf.diffusion import sample_losses
from gdf.targets import target_named
from modules.effnet import EfficientNetEncoder
from modules.guidance import Guidance
from modules.stage_c import StageC

EXPORT = "ultrapixel_t2i.safetensors"
PREVIEWED = 2  # pictures on a sheet


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="a YAML file such as configs/training/t2i.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the configuration")
    parser.add_argument("--dry_run", action="store_true", help="print the resolved configuration and stop")
    return parser.parse_args()


# --- setup ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Networks:
    """Everything the step runs; all but the guidance is frozen."""

    stage_c: StageC
    guidance: Guidance
    effnet: EfficientNetEncoder
    text: TextEncoder
    image: ImageEncoder | None


def check_inputs(config: TrainConfig, folder: Path, processes: int) -> FolderData | ShardData:
    """The data, indexed; raises what is wrong with it, the batch size or a file before any model loads."""
    check_batch_size(config.batch_size, processes, config.grad_accum_steps)
    if config.effnet_checkpoint_path is None:
        raise ValueError("training needs 'effnet_checkpoint_path' in the configuration")
    for path in (config.generator_checkpoint_path, config.effnet_checkpoint_path, config.pretrained_path):
        if path is not None:
            check_file(path)
    find_text_encoder(config.clip_text_path)
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise ValueError(f"checkpoint_path {folder} cannot be written to: choose another folder")
    buckets = make_buckets(config.image_size, config.multi_aspect_ratio)
    if is_shards(config.webdataset_path):
        return open_shards(config.webdataset_path, buckets)
    return into_buckets(index_folder(config.webdataset_path), buckets)


def load_networks(config: TrainConfig, device: torch.device) -> Networks:
    """Frozen weights in the configuration's number format, the guidance in float32."""
    dtype = DTYPES[config.dtype]
    build_guidance = partial(Guidance, **asdict(guidance_sizes(config)))
    if config.pretrained_path is None:
        torch.manual_seed(config.seed)
        guidance = build_guidance().to(device)
        guidance.init_weights()
    else:
        guidance = load_module(
            build_guidance, config.pretrained_path, dtype=torch.float32, device=device, what="guidance",
            translate=guidance_names,
        )  # fmt: skip
        guidance.train().requires_grad_(True)
    build_c = partial(StageC, **asdict(stage_c_sizes(config)))
    stage_c = load_module(
        build_c, config.generator_checkpoint_path, dtype=dtype, device=device, what="Stage C"
    )
    stage_c.gradient_checkpointing = config.gradient_checkpointing
    effnet = load_module(
        EfficientNetEncoder, config.effnet_checkpoint_path, dtype=torch.float32, device=device,
        what="EfficientNet encoder",
    )  # fmt: skip
    text = TextEncoder.load(config.clip_text_path, dtype)
    image = ImageEncoder.load(config.clip_image_path, dtype) if config.clip_image_path else None
    return Networks(stage_c, guidance, effnet, text, image)


# --- the recipe -----------------------------------------------------------------------------------


def encode_conditions(networks: Networks, batch: Batch, width: int, device: torch.device) -> Conditions:
    """The captions' conditions, with image embeddings where there is an encoder for them."""
    texts = networks.text.encode(batch.captions, device)
    encoder = networks.image
    images = [None if encoder is None else encoder.encode(to_image(p), device) for p in batch.images]
    rows = [conditions(texts[c], image, width) for c, image in zip(batch.captions, images, strict=True)]
    columns = zip(*(vars(row).values() for row in rows), strict=True)
    return Conditions(*(torch.cat(column) for column in columns))


def make_loss(config: TrainConfig, networks: Networks, device: torch.device) -> Callable[..., StepLoss]:
    """The loss of a batch: mean over pixels of (prediction - target)², per sample (eq. 5)."""
    target, width = target_named(config.target), stage_c_sizes(config).c_clip_img
    empty = conditions(networks.text.encode([""], device)[""], None, width)

    def loss(module: nn.Module, batch: Batch, keys: list[tuple[int, ...]]) -> StepLoss:
        z, z_lr = encode_latents(networks.effnet, batch.images.to(device), config.geometry)
        noise: SampleNoise = draw_noise(keys, z.shape[1:], z_lr.shape[1:])
        latents = noise_latents(z, z_lr, noise, target)
        held = drop_conditions(encode_conditions(networks, batch, width, device), empty, noise)
        prediction = module(latents, held.to(device, DTYPES[config.dtype]))
        return StepLoss(sample_losses(prediction, latents.target), latents.logsnr)

    return loss


def make_batches(config: TrainConfig, data: FolderData | ShardData, accelerator: Accelerator):
    """The data from a position (a plain dictionary in checkpoints) on."""
    settings = LoaderSettings(
        batch_size=config.batch_size // accelerator.num_processes // config.grad_accum_steps,
        rank=accelerator.process_index, world_size=accelerator.num_processes, seed=config.seed,
        num_workers=config.num_workers,
    )  # fmt: skip

    def from_position(position: Mapping[str, int] | None) -> Iterator[tuple[Batch, dict[str, int]]]:
        start = None if position is None else Position(**position)
        stream = shard_batches if isinstance(data, ShardData) else batches
        for batch, after in stream(data, settings, start):
            yield batch, asdict(after)

    return from_position


def make_sampler(
    config: TrainConfig, networks: Networks, example: Batch, accelerator: Accelerator
) -> Callable[[int], None] | None:
    """Writes sheets: real, reconstructed, sampled at low and high resolution; None without a previewer."""
    if config.previewer_checkpoint_path is None:
        return None
    device = accelerator.device
    previewer, width = load_previewer(config, device), stage_c_sizes(config).c_clip_img
    target, settings = target_named(config.target), Settings()
    few = Batch(example.images[:PREVIEWED], example.captions[:PREVIEWED], example.names[:PREVIEWED])
    folder = Path(config.output_path, config.experiment_id)

    def sample(step: int) -> None:
        z, z_lr = encode_latents(networks.effnet, few.images.to(device), config.geometry)
        texts = networks.text.encode([*few.captions, ""], device)
        sizes = with_latents(plan(few.images.shape[-2], few.images.shape[-1], config.geometry), z, z_lr)
        rows = []
        for i, caption in enumerate(few.captions):
            held = stack(*(conditions(texts[c], None, width) for c in (caption, "")))
            held = held.to(device, DTYPES[config.dtype])
            with accelerator.autocast():  # the guidance is in float32, the frozen base may not be
                sampled = sample_latents(
                    networks.stage_c, networks.guidance, held, target, sizes, settings, i
                )
            rows.append(preview_row(previewer, few.images[i], [z[i : i + 1], *sampled]))
        save_image(sheet(rows), folder / f"step_{step:08d}.jpg", "jpg", {"captions": few.captions})

    return sample


def make_export(config: TrainConfig, folder: Path) -> Callable[[Mapping[str, Tensor], int], None]:
    """Writes the guidance as inference/test_t2i.py --pretrained_path takes it."""

    def export(parameters: Mapping[str, Tensor], _step: int) -> None:
        named = {name.removeprefix("guidance."): value for name, value in parameters.items()}
        save_tensors(folder / EXPORT, named, config_metadata(asdict(guidance_sizes(config))))

    return export


class UpdateBar:
    """A progress bar, the log file and the trackers, for every update."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator, folder: Path, done: int) -> None:
        self._accelerator, self._log = accelerator, RunLog(folder / "log.jsonl")
        self._bar = tqdm(total=config.updates, initial=done, unit="update")

    def __call__(self, figures: dict[str, float]) -> None:
        self._log(figures)
        self._accelerator.log(figures, step=int(figures["step"]))
        self._bar.set_postfix(loss=f"{figures['loss']:.4f}", lr=f"{figures['lr']:.1e}",
                              images_s=f"{figures['images_per_second']:.2f}")  # fmt: skip
        self._bar.n = int(figures["step"])
        self._bar.refresh()


def main() -> int:
    arguments = parse()
    config = load(TrainConfig, arguments.config, arguments.overrides)
    if arguments.dry_run:
        print(as_yaml(config))
        return 0
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder = Path(config.checkpoint_path, config.experiment_id)
    tracker = "tensorboard" if find_spec("tensorboard") else None
    mixed = "bf16" if config.dtype == "bfloat16" else "no"
    accelerator = Accelerator(mixed_precision=mixed, log_with=tracker, project_dir=folder)
    data = check_inputs(config, folder, accelerator.num_processes)
    accelerator.init_trackers("training")
    device = accelerator.device
    networks = load_networks(config, device)
    make = make_batches(config, data, accelerator)
    example = next(make(None))[0]
    recipe = Recipe(
        GuidedStageC(networks.stage_c, networks.guidance), make, make_loss(config, networks, device),
        make_sampler(config, networks, example, accelerator) if accelerator.is_main_process else None,
        make_export(config, folder),
    )  # fmt: skip
    settings = TrainSettings(
        lr=config.lr, updates=config.updates, batch_size=config.batch_size,
        grad_accum_steps=config.grad_accum_steps, warmup_updates=config.warmup_updates,
        save_every=config.save_every, keep=config.keep, backup_every=config.backup_every, ema=config.ema,
        adaptive_loss_weight=config.adaptive_loss_weight, seed=config.seed,
    )  # fmt: skip
    trainer = Trainer(recipe, settings, folder, accelerator)
    if accelerator.is_main_process:
        (folder / "config.yaml").write_text(as_yaml(config), "utf-8")
    trainer.run(UpdateBar(config, accelerator, folder, 0) if accelerator.is_main_process else None)
    accelerator.end_training()
    return 0


if __name__ == "__main__":
    run(main)
