"""What every training script does around its recipe: checks, run folder, trackers, the loop."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from torch import Tensor, nn

from core.checkpoint import Translate, check_file, config_metadata, load_module, save_tensors, save_text
from core.config import RunConfig
from core.config_files import as_yaml
from core.data.loader import Batch, LoaderSettings, Position
from core.data.sources import Data, open_data, stream
from core.distributed import ignore_accelerate_variables
from core.trainer import Recipe, Trainer, TrainSettings, check_batch_size, checkpoints
from core.training_log import UpdateBar, save_losses, tracker_named
from gdf.loss_weights import loss_weight_named

log = logging.getLogger(__name__)

Export = Callable[[Mapping[str, Tensor], int], None]  # of named tensors at an update

CONFIG_FILE, LOG_FILE = "config.yaml", "log.jsonl"
# What cannot change between the parts of a run, since its checkpoints would not fit.
FIXED = (
    "model_version", "stage_c", "stage_b", "stage_a", "guidance", "effnet", "previewer", "target",
    "controlnet", "controlnet_filter",
)  # fmt: skip
FIXED_OF_LORA = ("lora_rank", "module_filters", "train_tokens")  # other trainings train no tokens


# --- before any model loads -----------------------------------------------------------------------


def run_folder(config: RunConfig) -> Path:
    """Where a run keeps its configuration, log and checkpoints."""
    return Path(config.checkpoint_path, config.experiment_id)


def check_run(config: RunConfig, files: Iterable[str | None], processes: int) -> Data:
    """The data, indexed; raises what is wrong with it, the batch size, a file or the folder of the run."""
    check_batch_size(config.batch_size, processes, config.grad_accum_steps)
    for path in chain(files, [config.pretrained_path]):
        if path is not None:
            check_file(path)
    for folder in (run_folder(config), Path(config.output_path)):
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise ValueError(f"{folder} cannot be written to: choose another folder")
    _check_continues(config)
    return open_data(config)


def _check_continues(config: RunConfig) -> None:
    """ValueError where the folder's checkpoints are of a run with other networks."""
    folder, now = run_folder(config), yaml.safe_load(as_yaml(config))
    path = folder / CONFIG_FILE
    then = _read_written(path, last=list(now)[-1]) if checkpoints(folder) and path.exists() else None
    if then is None:
        return
    for key in (*FIXED, *(FIXED_OF_LORA if "lora_rank" in now else ())):
        if (then.get(key) or None) != (now.get(key) or None):  # left out or empty
            raise ValueError(
                f"the checkpoints in {folder} are of a run with another '{key}' (see {path}): choose another "
                "experiment_id, or remove them"
            )


def _read_written(path: Path, last: str) -> dict[str, Any] | None:
    """A configuration that a run wrote, which ends with the key `last`; None, and a warning, if damaged."""
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, yaml.YAMLError, ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or last not in values:
        log.warning("%s is damaged or not complete, and is not compared with the present one", path)
        return None
    return values


def trained_module(
    build: Callable[[], nn.Module],
    path: str | None,
    device: torch.device,
    what: str,
    translate: Translate | None = None,
) -> nn.Module:
    """A module to train, in float32: from a file, or with new weights where there is none."""
    if path is not None:
        module = load_module(build, path, dtype=torch.float32, device=device, what=what, translate=translate)
        return module.train().requires_grad_(True)
    module = build().to(device).train()
    if hasattr(module, "init_weights"):  # others are initialised as torch does
        module.init_weights()
    return module


def export_parts(files: Mapping[str, tuple[Path, Any]]) -> Export:
    """Writes parts of the trained module into files of their own, with their sizes.

    `files`: the prefix of a part's names, such as "stage_b.", to its path and its sizes (a dataclass).
    """

    def export(tensors: Mapping[str, Tensor], _step: int) -> None:
        for prefix, (path, sizes) in files.items():
            named = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            save_tensors(path, named, config_metadata(asdict(sizes)))

    return export


def in_dtype(export: Export | None, dtype: torch.dtype) -> Export | None:
    """An export whose matrices are rounded to a number format; vectors stay as they are."""
    if export is None:
        return None
    return lambda tensors, step: export(
        {n: t.to(dtype) if t.is_floating_point() and t.dim() > 1 else t for n, t in tensors.items()}, step
    )


# --- the run --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What a recipe is made with."""

    config: Any  # the script's own kind of RunConfig
    accelerator: Accelerator
    data: Data
    folder: Path

    @property
    def device(self) -> torch.device:
        """Where this process trains."""
        return self.accelerator.device

    @property
    def loader_settings(self) -> LoaderSettings:
        """How this process's part of the data is read."""
        config, accelerator = self.config, self.accelerator
        return LoaderSettings(
            batch_size=config.batch_size // accelerator.num_processes // config.grad_accum_steps,
            rank=accelerator.process_index, world_size=accelerator.num_processes, seed=config.seed,
            num_workers=config.num_workers, max_broken=config.max_broken,
        )  # fmt: skip

    def batches(self, position: Mapping[str, int] | None) -> Iterator[tuple[Batch, dict[str, int]]]:
        """The data from a position (a plain dictionary in checkpoints) on."""
        yield from plain_positions(partial(stream, self.data), self.loader_settings, position)

    def export_path(self, name: str) -> Path:
        """Where trained weights go."""
        return self.folder / name if self.config.export_path is None else Path(self.config.export_path)

    def sheet_path(self, step: int) -> Path:
        """Where the previews of an update go."""
        return Path(self.config.output_path, self.config.experiment_id, f"step_{step:08d}.jpg")


def plain_positions(
    read: Callable[[LoaderSettings, Position | None], Iterator[tuple[Any, Position]]],
    settings: LoaderSettings,
    position: Mapping[str, int] | None,
) -> Iterator[tuple[Any, dict[str, int]]]:
    """What `read` gives from a position on, positions as plain dictionaries."""
    for batch, after in read(settings, None if position is None else Position(**position)):
        yield batch, asdict(after)


def train(
    config: RunConfig,
    files: Iterable[str | None],
    build: Callable[[Run], Recipe],
    mixed_precision: bool = False,
) -> int:
    """Run, or go on with, the training that a script describes; `files` are weights that it reads."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder = run_folder(config)
    tracker = tracker_named(config.tracker)
    mixed = "bf16" if mixed_precision else "no"
    ignore_accelerate_variables()
    accelerator = Accelerator(mixed_precision=mixed, log_with=tracker, project_dir=folder)
    data = check_run(config, files, accelerator.num_processes)
    accelerator.init_trackers(config.experiment_id, init_kwargs={"wandb": {"dir": str(folder)}})
    recipe = build(Run(config, accelerator, data, folder))
    recipe = replace(recipe, export=in_dtype(recipe.export, getattr(torch, config.export_dtype)))
    trainer = Trainer(recipe, settings_of(config), folder, accelerator)
    trainer.resume()
    if accelerator.is_main_process:
        save_text(folder / CONFIG_FILE, as_yaml(config))
        with closing(UpdateBar(accelerator, folder / LOG_FILE, trainer.step, config.updates)) as bar:
            trainer.run(bar, lambda seen: save_losses(seen, folder, trainer.step))
    else:
        trainer.run()
    accelerator.end_training()
    return 0


def settings_of(config: RunConfig) -> TrainSettings:
    """What the loop needs of a configuration."""
    return TrainSettings(
        lr=config.lr, lr_end=config.lr_end, updates=config.updates, batch_size=config.batch_size,
        grad_accum_steps=config.grad_accum_steps, warmup_updates=config.warmup_updates,
        optimizer=config.optimizer, compile=config.compile, shard=config.use_fsdp,
        save_every=config.save_every, keep=config.keep, backup_every=config.backup_every, ema=config.ema,
        adaptive_loss_weight=config.adaptive_loss_weight, seed=config.seed,
        loss_weight=loss_weight_named(config.loss_weight, config.loss_weight_shift),
    )  # fmt: skip
