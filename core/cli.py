"""What the scripts' command lines share: flags, one-sentence errors, progress bars, the closing table."""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from core.config_files import FLOAT16_REFUSED
from core.images import FORMATS, read_image_metadata
from core.pipeline import Job, Progress, StageUse, UltraPixelPipeline
from core.presets import DEFAULT, EMBEDDED, PRESETS
from core.printable import say, unbroken
from core.settings import Settings
from gdf.samplers import SAMPLERS

DTYPE_NAMES = {
    "bf16": "bfloat16", "bfloat16": "bfloat16", "float32": "float32", "fp32": "float32",
}  # fmt: skip
FLOAT16_NAMES = ("fp16", "float16", "half")
MODEL_FLAGS = ("config_c", "config_b", "pretrained_path", "dtype")  # what tells which models made a picture
FACTS = ("versions", "weights")  # in pictures, besides the values of flags


# --- running a script -----------------------------------------------------------------------------


def run(main: Callable[[], int | None]) -> None:
    """Run a script's main: a user's mistake is one sentence on standard error and exit code 2."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        sys.exit(main() or 0)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except torch.OutOfMemoryError as error:
        cause = str(error).splitlines()[0]
        _fail(
            f"error: the device's memory is full ({cause}): ask for a smaller picture, without --resident",
            2,
        )
    except (ValueError, OSError) as error:
        _fail(f"error: {error}", 2)


def _fail(message: str, code: int) -> None:
    sys.stderr.write(message + "\n")
    sys.exit(code)


# --- flags ----------------------------------------------------------------------------------------


def dtype_name(text: str) -> str:
    """The configuration's name of a number format given on the command line."""
    if text in FLOAT16_NAMES:
        raise argparse.ArgumentTypeError(f"{FLOAT16_REFUSED}: use bf16 or float32")
    if text not in DTYPE_NAMES:
        raise argparse.ArgumentTypeError(f"unknown number format {text!r}: use bf16 or float32")
    return DTYPE_NAMES[text]


def guidance_r(text: str) -> float | str:
    """A number, or last_step."""
    try:
        return text if text == "last_step" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor last_step") from None


def device_named(text: str | None) -> torch.device:
    """The asked device, or the GPU where there is one; ValueError for one that is not there."""
    if text is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError:
        raise ValueError(f"unknown device {text!r}: use cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"the device {text!r} is not supported: use cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ValueError(f"the device {text!r} is not there ({found} CUDA devices found): use --device cpu")
    return device


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Which files, and how they run."""
    group = parser.add_argument_group("models")
    group.add_argument(
        "--preset", choices=tuple(PRESETS), help="sets the three flags below, the picture's size and --cfg"
    )
    group.add_argument("--config_c", default=DEFAULT.config_c, help="configuration of Stage C")
    group.add_argument("--config_b", default=DEFAULT.config_b, help="configuration of Stages B and A")
    group.add_argument(
        "--pretrained_path", default=DEFAULT.pretrained_path, help="guidance weights ('none': unguided)"
    )
    group.add_argument("--dtype", type=dtype_name, help="bf16 or float32; left out, the configuration's")
    group.add_argument("--device", help="cpu, cuda or cuda:N; left out, the GPU where there is one")
    group.add_argument(
        "--resident", action="store_true", help="keep all stages on the device (faster, more memory)"
    )
    group.add_argument(
        "--allow_download", action="store_true", help="let the text encoder be fetched from its hub"
    )


def add_picture_flags(parser: argparse.ArgumentParser) -> None:
    """What pictures to make, and where they go."""
    group = parser.add_argument_group("pictures")
    group.add_argument("--height", type=int, default=DEFAULT.height, help="pixels")
    group.add_argument("--width", type=int, default=DEFAULT.width, help="pixels")
    group.add_argument("--prompt", help="what the picture shows")
    group.add_argument("--prompt_file", help="a text file with one prompt a paragraph, instead of --prompt")
    group.add_argument("--negative_prompt", default="", help="what it should not show")
    group.add_argument("--num_image", type=int, default=1, help="pictures per prompt")
    group.add_argument("--seed", type=int, default=123, help="of the first picture; the i-th has seed + i")
    group.add_argument("--output_dir", default="outputs", help="folder for the pictures")
    group.add_argument("--format", choices=FORMATS, default="png")


def add_settings_flags(parser: argparse.ArgumentParser) -> None:
    """How the passes sample; the names are those of `Settings`."""
    d = Settings()
    group = parser.add_argument_group("sampling")
    samplers = tuple(SAMPLERS)
    group.add_argument("--steps", type=int, default=d.steps, help="of each pass of Stage C")
    group.add_argument("--cfg", type=float, default=d.cfg, help="guidance weight of Stage C; 1 for none")
    group.add_argument("--cfg_end", type=float, help="guidance weight at the last step, linear in between")
    group.add_argument(
        "--cfg_interval", type=float, nargs=2, default=d.cfg_interval, metavar=("LOW", "HIGH"),
        help="times in [0, 1] between which the unconditional half is computed",
    )  # fmt: skip
    group.add_argument("--cfg_rescale", type=float, default=d.cfg_rescale)
    group.add_argument("--shift", type=float, default=d.shift, help="of the noise schedule of Stage C")
    group.add_argument("--sampler", choices=samplers, default=d.sampler, help="of Stage C")
    group.add_argument(
        "--guidance_r", type=guidance_r, help="noise condition of the guiding features, or last_step"
    )
    group.add_argument("--steps_b", type=int, default=d.steps_b)
    group.add_argument("--cfg_b", type=float, default=d.cfg_b)
    group.add_argument("--sampler_b", choices=samplers, default=d.sampler_b)
    group.add_argument("--stage_a_tiled", action="store_true", help="decode in tiles also where it would fit")


def parse_with_preset(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, own: Collection[str] = ()
) -> argparse.Namespace:
    """The parsed flags, with --preset and then --from_image, if there is such a flag, giving the defaults.

    `own` names flags whose defaults a preset leaves as the script has them.
    """
    known = parser.parse_args(arguments)
    if known.preset is not None:
        preset = asdict(PRESETS[known.preset])
        parser.set_defaults(**{name: value for name, value in preset.items() if name not in own})
    if getattr(known, "from_image", None) is not None:
        stored = read_image_metadata(known.from_image)
        others = [name for name in stored if stored[name] and not hasattr(known, name)]
        if foreign := sorted({*others} - {*FACTS}):
            raise ValueError(
                f"{known.from_image} was made with --{foreign[0]}, which this script does not have: use the "
                "one that made it"
            )
        parser.set_defaults(**{name: value for name, value in stored.items() if hasattr(known, name)})
    return parser.parse_args(arguments)


def make_pipeline(arguments: argparse.Namespace) -> UltraPixelPipeline:
    """The pipeline that the flags name; nothing is loaded yet."""
    guidance = None if arguments.pretrained_path == "none" else arguments.pretrained_path
    device = device_named(arguments.device)
    return UltraPixelPipeline.from_config(
        arguments.config_c, arguments.config_b, guidance, device, arguments.dtype, arguments.resident,
        arguments.allow_download,
    )  # fmt: skip


def check_weights(pipeline: UltraPixelPipeline, preset: str | None) -> None:
    """Raise what is wrong with any weight file; where one is missing, also what runs without it."""
    try:
        pipeline.check_files()
    except (ValueError, FileNotFoundError) as error:
        missing = any(not Path(path).exists() for path in pipeline.files().values())
        if preset is None and missing and Path(PRESETS[EMBEDDED].pretrained_path).exists():
            raise ValueError(f"{error}; --preset {EMBEDDED} runs now, its weights are here") from None
        raise


def settings_of(arguments: argparse.Namespace) -> Settings:
    """The settings that the flags describe."""
    values = {name: getattr(arguments, name) for name in Settings.__dataclass_fields__}
    return Settings(**{**values, "cfg_interval": tuple(values["cfg_interval"])})


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a text file, one a paragraph; ValueError where there is none."""
    try:
        text = Path(path).read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: the prompt file is not UTF-8 text") from None
    prompts = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text)]
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise ValueError(f"{path}: the prompt file holds no prompt; write one a paragraph")
    return prompts


# --- while it runs, and at the end ----------------------------------------------------------------


class ProgressBars:
    """A progress bar per stage, with all its pictures' steps; use it as the pipeline's observer."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = list(jobs)
        self._bars: dict[str, tqdm] = {}

    def __call__(self, progress: Progress) -> None:
        with unbroken(sys.stderr):
            self._advance(progress)

    def _advance(self, progress: Progress) -> None:
        bar = self._bars.get(progress.stage)
        if bar is None:
            total = progress.steps * len(self._jobs)
            bar = self._bars[progress.stage] = tqdm(total=total, desc=progress.stage.ljust(24), unit="step")
        bar.update()

    def say(self, text: str) -> None:
        """Write a line to standard output, beside which the bars stay whole."""
        with unbroken(sys.stderr):
            for bar in self._bars.values():
                bar.clear()
        say(text, sys.stdout)

    def close(self) -> None:
        """End all bars, from above: one that ended earlier would move those below it."""
        with unbroken(sys.stderr):
            for bar in self._bars.values():
                bar.close()


def usage_table(uses: Sequence[StageUse]) -> str:
    """Elapsed time and peak memory per stage, as text."""
    lines = [f"{'stage':<10}{'seconds':>10}{'peak memory':>16}"]
    for use in uses:
        memory = f"{use.peak_memory / 2**30:.2f} GiB" if use.peak_memory else "-"
        lines.append(f"{use.name:<10}{use.seconds:>10.2f}{memory:>16}")
    lines.append(f"{'all':<10}{sum(use.seconds for use in uses):>10.2f}")
    return "\n".join(lines)
