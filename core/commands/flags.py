"""What the scripts' command lines share: flags, one-sentence errors, the closing table.

It loads no torch, so that --help and a wrong flag are answered at once: what computes is imported by the
scripts once their flags are read.
"""

from __future__ import annotations

import argparse
import difflib
import re
import traceback
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from core.commands.exploring import add_exploring_flags, settle, stored_defaults
from core.commands.grid import axes_of
from core.commands.prompts import drawn_seed, jobs_of, lines_of
from core.config.arguments import DRAW_SEED, number_format
from core.config.offloading import AUTO, NONE, OFFLOAD_NAMES
from core.config.presets import DEFAULT, EMBEDDED, PRESETS
from core.config.settings import (
    FAST,
    FP8_NAMES,
    PUBLISHED_STEPS,
    TRAINING_R,
    Job,
    Settings,
    settings_from,
)
from core.devices import KINDS, own_device
from core.launch import fail, leave, processes, told_once
from core.paths import at_home, located
from core.pictures.files import FORMATS
from core.pictures.images import prepare_folder
from gdf.names import SAMPLER_NAMES, TIME_NAMES

if TYPE_CHECKING:
    from core.pipeline.pipeline import UltraPixelPipeline
    from core.pipeline.stages import StageUse

# What tells which models made a picture.
MODEL_FLAGS = ("config_c", "config_b", "pretrained_path", "dtype", "int8")
OWN_PACKAGES = ("core", "gdf", "modules")
PLOTS = (".png", ".jpg", ".jpeg", ".webp", ".pdf", ".svg")
CPU_IS_FULL = "DefaultCPUAllocator: can't allocate memory"  # torch's own words in a RuntimeError
INTERRUPTED = 30.0  # seconds that Ctrl-C leaves the other processes to save what they have


# --- running a script -----------------------------------------------------------------------------


def run(main: Callable[[], int | None]) -> None:
    """Run a script's main: a user's mistake is one sentence on standard error and exit code 2.

    Of several processes one tells the error of all, of whatever kind it is.
    """
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        leave(main() or 0)
    except KeyboardInterrupt as error:
        fail(f"interrupted: {error}" if str(error) else "interrupted", 130, patience=INTERRUPTED)
    except ImportError as error:
        if (error.name or "").split(".")[0] in OWN_PACKAGES:
            raise
        fail(*told(error))
    except Exception as error:
        if processes() == 1 and not is_mistake(error):
            raise
        fail(*told(error))


def is_mistake(error: Exception) -> bool:
    """Whether a sentence says all about an error, so that nobody needs a traceback."""
    return isinstance(error, ValueError | OSError | ImportError) or _memory_is_full(error)


def told(error: Exception) -> tuple[str, int]:
    """What is said about an error that ends a script, and the exit code."""
    if not is_mistake(error):
        return "".join(traceback.format_exception(error)).rstrip(), 1
    if isinstance(error, ImportError):
        package = (error.name or "").split(".")[0]
        lacking = f"the package {package} is missing: pip install -r requirements.txt"
        return f"error: {lacking if package else error}", 2
    if not _memory_is_full(error):
        return f"error: {error}", 2
    cause, other = str(error).splitlines()[0], "" if CPU_IS_FULL in str(error) else ", or use --device cpu"
    return (
        f"error: the device's memory is full ({cause}): make a smaller picture{other}; for "
        "a training, set a smaller image_size, pictures_at_once=1 and gradient_checkpointing=true"
    ), 2


def _memory_is_full(error: Exception) -> bool:
    """Whether a device's memory was too little, by torch's errors, which is not imported here."""
    return type(error).__name__ == "OutOfMemoryError" or CPU_IS_FULL in str(error)


# --- flags ----------------------------------------------------------------------------------------


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows every flag's default, unless its text tells it, and the description as it is written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if "(default" in (action.help or "") or action.required or not action.option_strings:
            return action.help
        if action.const is True or action.default is None:
            return f"{action.help} (default: {'off' if action.const else 'none'})"
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Shows defaults, and names the nearest flags where one is not known."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=Help)

    def error(self, message: str) -> NoReturn:
        """End with a sentence and exit code 2."""
        wrong = re.search(r"^unrecognized arguments: .*?(--[\w-]+)", message)
        near = difflib.get_close_matches(wrong[1], self._option_string_actions, n=1) if wrong else []
        hint = f" (did you mean {near[0]}?)" if near else ""
        self.exit(2, f"error: {message}{hint}; --help shows all flags\n")


def home_path(text: str) -> str:
    """A path of the command line, in which no shell may have replaced the ~."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty: name a file or a folder")
    try:
        return at_home(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def plot_path(text: str) -> str:
    """A path of the command line to a plot that is written, whose name says the format."""
    path = home_path(text)
    if Path(path).suffix.lower() not in PLOTS:
        raise argparse.ArgumentTypeError(f"{text}: a plot's name ends in {', '.join(PLOTS)}")
    return path


def hours(text: str) -> float:
    """A time from the command line, from 0 up."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:  # a NaN is neither
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 up")
    return value


def dtype_name(text: str) -> str:
    """The configuration's name of a number format."""
    try:
        return number_format(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def guidance_r(text: str) -> float | str:
    """A number, or last_step."""
    try:
        return text if text == "last_step" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor last_step") from None


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Which files, and how they run."""
    group = parser.add_argument_group("models")
    group.add_argument(
        "--preset", choices=tuple(PRESETS),
        help="models that belong together; it gives the defaults that are said to be the preset's",
    )  # fmt: skip
    group.add_argument(
        "--config_c", type=home_path, default=DEFAULT.config_c,
        help="configuration of Stage C (default: the preset's, else %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--config_b", type=home_path, default=DEFAULT.config_b,
        help="configuration of Stages B and A (default: the preset's, else %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--pretrained_path", type=home_path, default=DEFAULT.pretrained_path,
        help="guidance weights, or 'none': without guidance (default: the preset's, else %(default)s)",
    )  # fmt: skip
    group.add_argument("--dtype", type=dtype_name, help="bf16 or float32 (default: the configuration's)")
    group.add_argument(
        "--int8", action="store_true",
        help="keep the weights of Stages C and B as 8-bit integers: half the memory, a little worse",
    )  # fmt: skip
    group.add_argument("--device", help=f"{KINDS} (default: cuda where there is a GPU, else cpu)")
    group.add_argument(
        "--offload", choices=OFFLOAD_NAMES, default=AUTO,
        help="where weights rest: all on the device (none), there one stage at a time (stage), or block by "
        "block (block: the least memory); auto chooses by what is free",
    )  # fmt: skip
    group.add_argument(
        "--resident", dest="offload", action="store_const", const=NONE, default=AUTO, help="as --offload none"
    )
    group.add_argument(
        "--plain", action="store_true",
        help="PyTorch's own operators alone, to compare with: no fused kernels, recorded steps or TF32",
    )  # fmt: skip
    group.add_argument(
        "--allow_download", action="store_true", help="let the text encoder be fetched from its hub"
    )


def add_picture_flags(parser: argparse.ArgumentParser) -> None:
    """What pictures to make, and where they go."""
    group = parser.add_argument_group("pictures")
    for side in ("height", "width"):
        group.add_argument(
            f"--{side}", type=int, default=getattr(DEFAULT, side),
            help="pixels (default: the preset's, else %(default)s)",
        )  # fmt: skip
    prompts = group.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", help="what the picture shows; it or --prompt_file")
    add_prompt_flags(group, prompts)
    group.add_argument("--negative_prompt", default="", help="what it should not show (default: nothing)")
    group.add_argument("--num_image", type=int, default=1, help="pictures per prompt")
    group.add_argument(
        "--seed", type=int, default=123, help="of the first picture, the i-th has seed + i; -1 draws one"
    )
    group.add_argument("--output_dir", type=home_path, default="outputs", help="folder for the pictures")
    group.add_argument(
        "--format", choices=FORMATS, default="png",
        help="of the files; png16 and tiff have 16 bits a colour, and jxl needs pillow-jxl-plugin",
    )  # fmt: skip
    group.add_argument(
        "--provenance", action="store_true", help="say in the files that a model made the pictures (IPTC)"
    )


def add_prompt_flags(group: argparse._ArgumentGroup, prompts: argparse._MutuallyExclusiveGroup) -> None:
    """Prompts from elsewhere, and how they are read."""
    prompts.add_argument(
        "--prompt_file", type=home_path,
        help="prompts in a text file, one a paragraph, or in CSV or JSON lines with a size, seed … of their "
        "own",
    )  # fmt: skip
    prompts.add_argument(
        "--loop", action="store_true", help="read prompts from standard input, a line each, models loaded"
    )
    group.add_argument(
        "--wildcards", type=home_path, metavar="FOLDER",
        help="let prompts have choices {red|blue} and __wildcards__ from this folder's files",
    )  # fmt: skip
    group.add_argument(
        "--weighted_prompts", action="store_true", help="let (a house:1.3) and [less] weight parts of prompts"
    )
    group.add_argument(
        "--long_prompts", action="store_true",
        help="read all of a prompt that is too long for the text encoder, in pieces",
    )  # fmt: skip
    group.add_argument(
        "--grid", nargs="+", metavar="NAME=A,B",
        help="make a sheet over the values of one or two settings, as in seed=1,2,3 cfg=1,2,4",
    )  # fmt: skip


def add_settings_flags(parser: argparse.ArgumentParser, own: Collection[str] = ()) -> None:
    """How the passes sample; the names are those of `Settings`, `own` as in `parse_with_preset`."""
    d = Settings()
    preset = "" if "cfg" in own else " (default: the preset's, else %(default)s)"
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--fast", action="store_true",
        help=f"about twice as fast, a little worse: the same as {_as_flags(FAST)}",
    )  # fmt: skip
    group.add_argument("--steps", type=int, default=d.steps, help="of each pass of Stage C")
    group.add_argument("--steps_lr", type=int, help="of the low-resolution pass (default: --steps)")
    group.add_argument(
        "--cfg", type=float, default=d.cfg,
        help="how strongly the prompt counts in Stage C (classifier-free guidance); 1 turns cfg off, not "
        f"UltraPixel's guidance{preset}",
    )  # fmt: skip
    group.add_argument(
        "--cfg_end", type=float, help="cfg at the last step, linear in between (default: --cfg)"
    )
    group.add_argument(
        "--cfg_interval", type=float, nargs=2, default=d.cfg_interval, metavar=("LOW", "HIGH"),
        help="times in [0, 1] between which the unconditional half is computed (default: 0 1)",
    )  # fmt: skip
    group.add_argument(
        "--cfg_rescale", type=float, default=d.cfg_rescale,
        help="how far, 0 to 1, the guided prediction is drawn back to its contrast without cfg",
    )  # fmt: skip
    group.add_argument("--shift", type=float, default=d.shift, help="of the noise schedule of Stage C")
    for name, which in (("cfg_lr", "low"), ("cfg_hr", "high")):
        told = f"cfg of the {which}-resolution pass (default: --cfg)"
        group.add_argument(f"--{name}", type=float, help=told)
    group.add_argument(
        "--times", choices=TIME_NAMES, default=d.times,
        help="of Stage C's steps: uniform, or karras, which spends more of them on weak noise",
    )  # fmt: skip
    group.add_argument("--sampler", choices=SAMPLER_NAMES, default=d.sampler, help="of Stage C")
    group.add_argument(
        "--guidance_r", type=guidance_r,
        help="noise condition of the guiding features, a number or last_step (default: last_step at "
        f"{PUBLISHED_STEPS} uniform steps, else {TRAINING_R})",
    )  # fmt: skip
    group.add_argument(
        "--guidance_unconditional", type=float, default=d.guidance_unconditional,
        help="share of the guidance in the half that cfg moves away from: below 1, cfg strengthens the "
        "guidance, too (default: %(default)s)",
    )  # fmt: skip
    group.add_argument("--steps_b", type=int, default=d.steps_b, help="of Stage B")
    group.add_argument("--cfg_b", type=float, default=d.cfg_b, help="cfg of Stage B; 1 turns it off")
    group.add_argument("--sampler_b", choices=SAMPLER_NAMES, default=d.sampler_b, help="of Stage B")
    group.add_argument(
        "--reuse", type=int, default=d.reuse,
        help="so many steps of the high-resolution pass share what Stage C's inner levels make",
    )  # fmt: skip
    group.add_argument(
        "--fp8", choices=FP8_NAMES, default=d.fp8,
        help="products in float8: auto where the device has them, on also elsewhere, by rounding (slow)",
    )  # fmt: skip
    group.add_argument("--stage_a_tiled", action="store_true", help="decode in tiles also where it would fit")


def _as_flags(values: Mapping[str, Any]) -> str:
    """Values as flags that give them."""
    parts = ((name, value if isinstance(value, tuple) else (value,)) for name, value in values.items())
    return " ".join(f"--{name} {' '.join(map(str, value))}" for name, value in parts)


def picture_parser(description: str, own: Collection[str] = ()) -> argparse.ArgumentParser:
    """A parser with the flags of all scripts that make pictures, for `parse_with_preset`; `own` as there."""
    parser = Parser(description)
    add_picture_flags(parser)
    add_settings_flags(parser, own)
    add_exploring_flags(parser, home_path)
    add_model_flags(parser)
    group = parser.add_argument_group("run")
    group.add_argument(
        "--from_image", type=home_path, metavar="FILE",
        help="make this picture again, or with what other flags change; it gives their defaults",
    )  # fmt: skip
    group.add_argument(
        "--batch", type=int, default=1,
        help="pictures of one size to make at once: faster, where one does not fill the device",
    )  # fmt: skip
    group.add_argument("--preview", action="store_true", help="save small previews while Stage C runs")
    group.add_argument("--dry_run", action="store_true", help="print configuration and plan, and stop")
    group.add_argument(
        "--skip_existing", action=argparse.BooleanOptionalAction,
        help="leave out pictures that the folder has, made by the same settings and weights (default: under "
        "torchrun)",
    )  # fmt: skip
    group.add_argument(
        "--split", action="store_true",
        help="under torchrun: all processes make each picture together, instead of a share of the pictures",
    )  # fmt: skip
    return parser


def parse_with_preset(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, own: Collection[str] = ()
) -> argparse.Namespace:
    """The parsed flags, with --preset and then --from_image, if there is such a flag, giving the defaults.

    `own` names flags whose defaults a preset leaves as the script has them. --seed -1 draws a seed and says
    which.
    """
    with told_once():
        known = parser.parse_args(arguments)
    if known.preset is not None:
        preset = asdict(PRESETS[known.preset])
        parser.set_defaults(**{name: value for name, value in preset.items() if name not in own})
    if (stored := stored_defaults(known)) is not None:
        parser.set_defaults(**stored)
    if getattr(known, "fast", False):
        parser.set_defaults(**FAST)
    found = parser.parse_args(arguments)
    if stored is not None:
        settle(parser, arguments, stored, found)
    if getattr(found, "seed", None) == DRAW_SEED:
        found.seed = drawn_seed()
    return found


def make_pipeline(arguments: argparse.Namespace) -> UltraPixelPipeline:
    """The pipeline that the flags name; no weights are loaded yet."""
    from core.pipeline.pipeline import UltraPixelPipeline

    guidance = None if arguments.pretrained_path == "none" else arguments.pretrained_path
    device = own_device(arguments.device)
    pipeline = UltraPixelPipeline.from_config(
        arguments.config_c, arguments.config_b, guidance, device, arguments.dtype,
        allow_download=arguments.allow_download, offload=arguments.offload,
        int8=arguments.int8,
    )  # fmt: skip
    pipeline.plain = arguments.plain
    return pipeline


def check_weights(
    pipeline: UltraPixelPipeline, preset: str | None, others: Mapping[str, str] | None = None
) -> None:
    """Raise what is wrong with any weight file; where one is missing, also what runs without it.

    `others` are files that the pipeline does not know yet: what each holds, by path.
    """
    try:
        pipeline.check_files(others)
    except (ValueError, FileNotFoundError) as error:
        missing = any(not Path(path).exists() for path in (*pipeline.files().values(), *(others or ())))
        if preset is None and missing and Path(located(PRESETS[EMBEDDED].pretrained_path)).exists():
            raise ValueError(f"{error}; --preset {EMBEDDED} runs now, its weights are here") from None
        raise


def settings_of(arguments: argparse.Namespace) -> Settings:
    """The settings that the flags describe."""
    return settings_from(vars(arguments))


def make_jobs(arguments: argparse.Namespace) -> list[Job]:
    """The pictures to make: each prompt --num_image times, the i-th of all with seed + i; none with --loop.

    Their folder is made, unless nothing is to be made (--dry_run). ValueError for what they cannot be.
    """
    axes_of(arguments.grid)  # raises what is wrong with it
    jobs = jobs_of(lines_of(arguments), arguments, settings_of(arguments))
    if not arguments.dry_run:
        prepare_folder(arguments.output_dir)
    return jobs


# --- at the end ----------------------------------------------------------------------------------


def usage_table(uses: Sequence[StageUse]) -> str:
    """Elapsed time and peak memory per stage, as text."""
    on_device = any(use.peak_memory != use.host_memory for use in uses)
    host = f"{'host memory':>16}" if on_device else ""
    lines = [f"{'stage':<10}{'seconds':>10}{'peak memory':>16}{host}"]
    for use in uses:
        host = f"{_in_gib(use.host_memory):>16}" if on_device else ""
        lines.append(f"{use.name:<10}{use.seconds:>10.2f}{_in_gib(use.peak_memory):>16}{host}")
    lines.append(f"{'all':<10}{sum(use.seconds for use in uses):>10.2f}")
    return "\n".join(lines)


def _in_gib(memory: int) -> str:
    return f"{memory / 2**30:.2f} GiB" if memory else "-"
