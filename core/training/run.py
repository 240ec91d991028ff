"""What every training script does around its recipe: checks, run folder, trackers, the loop."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from accelerate import Accelerator
from torch import Tensor, nn

from core import launch
from core.config.batch_size import fitted_batch
from core.config.presets import EMBEDDED
from core.config.schema import RunConfig, effnet_sizes
from core.config.yaml import as_yaml
from core.data.loader import Batch, LoaderSettings, Position
from core.data.sources import Data, open_data, stream
from core.devices import cores
from core.pictures.images import prepare_folder
from core.training.distributed import ignore_accelerate_variables, join
from core.training.exports import Export, Exports
from core.training.log import UpdateBar, save_losses, tell_of_curve, tracker_named
from core.training.trainer import Recipe, Trainer, TrainSettings, checkpoints
from core.weights.checkpoint import (
    Translate,
    check_files,
    config_metadata,
    load_module,
    save_tensors,
    save_text,
)
from core.weights.clip import absent_text_files, find_text_encoder
from gdf.loss_weights import loss_weight_named

log = logging.getLogger(__name__)


CONFIG_FILE, LOG_FILE, LOCK_FILE = "config.yaml", "log.jsonl", ".lock"
EXPORT_EFFNET = "effnet_encoder.safetensors"
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


def sheet_folder(config: RunConfig) -> Path:
    """Where a run's previews go."""
    if config.output_path is None:
        return run_folder(config) / "samples"
    return Path(config.output_path, config.experiment_id)


def check_run(config: RunConfig, files: Iterable[str | None]) -> Data:
    """The data, indexed; raises what is wrong with it, a file or the folders of the run."""
    read = {path: "weights" for path in chain(files, [config.pretrained_path]) if path is not None}
    text_encoder = getattr(config, "clip_text_path", None)
    check_files(read if text_encoder is None else read | absent_text_files(text_encoder))
    if text_encoder is not None:
        find_text_encoder(text_encoder)
    _check_continues(config)
    data = open_data(config)
    cache = getattr(config, "cache_path", None)
    for folder in (run_folder(config), sheet_folder(config), *([cache] if cache else ())):
        prepare_folder(folder)
    return data


def _check_continues(config: RunConfig) -> None:
    """ValueError where the folder's checkpoints are of a run with other networks."""
    folder, now = run_folder(config), yaml.safe_load(as_yaml(config))
    path = folder / CONFIG_FILE
    then = _read_written(path, last=list(now)[-1]) if checkpoints(folder) and path.exists() else None
    if then is None:
        return
    for key in (*FIXED, *(FIXED_OF_LORA if "lora_rank" in now else ())):
        if _fixed(then.get(key)) != _fixed(now.get(key)):
            raise ValueError(
                f"the checkpoints in {folder} are of a run with another '{key}' (see {path}): choose another "
                "experiment_id, or remove them"
            )
    if then.get("ema") and now["ema"] and then["ema"] != now["ema"]:
        log.warning("'ema' was %s in this run and is %s from here on", then["ema"], now["ema"])


def _fixed(value: Any) -> Any:
    """A key's value, or of a network's sizes those that its weights depend on; None where there is none."""
    if isinstance(value, dict):
        value = {name: size for name, size in value.items() if name != "scale_sides"}
    return value or None


def _read_written(path: Path, last: str) -> dict[str, Any] | None:
    """A configuration that a run wrote, which ends with the key `last`; None, and a warning, if damaged."""
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, yaml.YAMLError, ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or last not in values:
        if launch.is_main():
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


def export_with_encoder(run: Run, part: str, key: str, sizes: Any) -> tuple[Export, str]:
    """Writes a part of the trained module and, where it is trained along, the encoder; and how both are used.

    The part's name begins those of its tensors and of its file; `key` is that of the configuration that names
    the file, `sizes` a dataclass.
    """
    path = run.export_path(f"{part}.safetensors")
    files, keys = {f"{part}.": (path, sizes)}, {key: path}
    if run.config.effnet_checkpoint_path is None:
        path = keys["effnet_checkpoint_path"] = run.export_path(EXPORT_EFFNET, "export_effnet_path")
        files["effnet."] = (path, effnet_sizes(run.config))
    return export_parts(files), as_keys(**keys)


def as_keys(**files: Path) -> str:
    """How weights are used that a configuration names, by key."""
    keys = " ".join(f"{key}={shlex.quote(str(path))}" for key, path in files.items())
    return f"{keys} on the command line of the next training, or in its file and those of inference"


def in_dtype(export: Export | None, dtype: torch.dtype) -> Export | None:
    """An export whose matrices are rounded to a number format; vectors stay as they are."""
    if export is None:
        return None
    return lambda tensors, step: export(
        {n: t.to(dtype) if t.is_floating_point() and t.dim() > 1 else t for n, t in tensors.items()}, step
    )


def hold(folder: Path) -> IO[str] | None:
    """Hold a run's folder until what this gives is closed, or the process ends; ValueError where it is held.

    None where the system or the disk has no locks. The lock is not shared with data workers, which can
    outlive a killed training by some seconds.
    """
    stream = (folder / LOCK_FILE).open("a", encoding="utf-8")
    try:
        import fcntl  # Windows has none

        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        stream.close()
        raise ValueError(
            f"another training runs in {folder}: wait until it ends, or choose another folder"
        ) from None
    except (ImportError, OSError):
        stream.close()
        return None
    return stream


# --- the run --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What a recipe is made with."""

    config: Any  # the script's own kind of RunConfig
    accelerator: Accelerator
    data: Data
    folder: Path
    exports: Exports

    @property
    def device(self) -> torch.device:
        """Where this process trains."""
        return self.accelerator.device

    @property
    def loader_settings(self) -> LoaderSettings:
        """How this process's part of the data is read."""
        config, accelerator = self.config, self.accelerator
        return LoaderSettings(
            batch_size=config.pictures_at_once,
            rank=accelerator.process_index, world_size=accelerator.num_processes, seed=config.seed,
            num_workers=config.num_workers, max_broken=config.max_broken,
        )  # fmt: skip

    def batches(self, position: Mapping[str, int] | None) -> Iterator[tuple[Batch, dict[str, int]]]:
        """The data from a position (a plain dictionary in checkpoints) on."""
        yield from plain_positions(partial(stream, self.data), self.loader_settings, position)

    def export_path(self, name: str, key: str = "export_path") -> Path:
        """Where trained weights go: the file that `key` names, or `name` in the run's folder.

        ValueError where another file is there. Call it before anything loads.
        """
        given = getattr(self.config, key)
        return self.exports.claim(self.folder / name if given is None else Path(given), key)

    def export_folder(self, name: str, files: Iterable[str]) -> Path:
        """The same of weights in several files, for which `export_path` is a folder."""
        given = self.config.export_path
        folder = self.folder / name if given is None else Path(given)
        for file in files:
            self.exports.claim(folder / file, "export_path")
        return folder

    def sheet_path(self, step: int) -> Path:
        """Where the previews of an update go."""
        return sheet_folder(self.config) / f"step_{step:08d}.jpg"

    def inference_command(self, script: str, *flags: str | Path) -> str:
        """A command that makes a picture with the trained weights, by the run's own configuration."""
        preset = ("--preset", EMBEDDED) if self.config.model_version == EMBEDDED else ()
        words = (f"inference/{script}", *preset, "--config_c", self.folder / CONFIG_FILE, *flags)
        return f'python {shlex.join(map(str, words))} --prompt "..."'


def plain_positions(
    read: Callable[[LoaderSettings, Position | None], Iterator[tuple[Any, Position]]],
    settings: LoaderSettings,
    position: Mapping[str, int] | None,
) -> Iterator[tuple[Any, dict[str, int]]]:
    """What `read` gives from a position on, positions as plain dictionaries."""
    for batch, after in read(settings, None if position is None else Position(**position)):
        yield batch, asdict(after)


def leave_a_core_free() -> None:
    """Compute with one thread fewer than there are cores, where OMP_NUM_THREADS does not say how many.

    Threads meet some thousand times in an update. One that shares its core with another process, be it the
    training's own that reads data, lets all others wait there, each time for as long as that process may run.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, min(torch.get_num_threads(), cores() - 1)))


def train(
    config: RunConfig,
    files: Iterable[str | None],
    build: Callable[[Run], Recipe],
    mixed_precision: bool = False,
) -> int:
    """Run, or go on with, the training that a script describes; `files` are weights that it reads."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config, folder, tracker = fitted_batch(config), run_folder(config), tracker_named(config.tracker)
    data = check_run(config, files)
    held = hold(folder) if launch.is_main() else None
    mixed = "bf16" if mixed_precision else "no"
    ignore_accelerate_variables()
    accelerator = join(mixed_precision=mixed, log_with=tracker, project_dir=folder)
    if accelerator.device.type == "cpu":
        leave_a_core_free()
    accelerator.init_trackers(config.experiment_id, init_kwargs={"wandb": {"dir": str(folder)}})
    exports = Exports(folder, config.overwrite_export)
    recipe = build(Run(config, accelerator, data, folder, exports))
    export = exports.recorded(in_dtype(recipe.export, getattr(torch, config.export_dtype)))
    trainer = Trainer(replace(recipe, export=export), settings_of(config), folder, accelerator)
    trainer.resume()
    if accelerator.is_main_process:
        save_text(folder / CONFIG_FILE, as_yaml(config))
    done = trainer.step
    _run(trainer, config)
    if accelerator.is_main_process:
        for sentence in outcome(config.updates, done, trainer.step, exports.files, recipe.use):
            log.info("%s", sentence)
    for tracker in accelerator.trackers:
        tracker.finish()
    launch.part()
    if held is not None:
        held.close()
    if trainer.step < config.updates and launch.is_first():
        launch.end_launch()  # it was stopped, and would print a traceback over what was just told
    return 0


def _run(trainer: Trainer, config: RunConfig) -> None:
    """Train to the last update, or write the weights again where that one is done: a kill may have kept them
    from being written, and they may be asked for in another place.
    """
    if trainer.step >= config.updates:
        trainer.save()
        trainer.run()
    elif trainer.accelerator.is_main_process:
        log_file = trainer.folder / LOG_FILE
        tell_of_curve()
        with closing(UpdateBar(trainer.accelerator, log_file, trainer.step, config.updates)) as bar:
            trainer.run(bar, lambda seen: save_losses(seen, trainer.folder, trainer.step))
    else:
        trainer.run()


def outcome(updates: int, before: int, after: int, files: Iterable[Path], use: str | None) -> list[str]:
    """What a training that did updates `before` to `after` tells at its end: lines of text."""
    if before >= updates:
        lines = [f"nothing was left to do: updates is {updates}, and {before} are done"]
    elif after < updates:
        lines = [f"stopped after update {after} of {updates}"]
    else:
        lines = [f"update {updates} of {updates} is done"]
    written = [str(path) for path in files if path.exists()]
    if written:
        lines.append(f"the weights lie in {', '.join(written)}")
        lines += [] if use is None else [f"to use them: {use}"]
    way = "the same command again" if after < updates else f"the same command with updates above {after}"
    return [*lines, f"to go on: {way}"]


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
