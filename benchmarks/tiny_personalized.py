"""What a LoRA has learnt of the striped balloon, measured on the embedded family by its recogniser.

python benchmarks/tiny_personalized.py --height 128 --width 128: in which share of pictures of held-out scenes
there is one, with the LoRA's token in the prompt and without, and what the LoRA costs ordinary prompts.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from core.commands.flags import (
    Parser,
    add_model_flags,
    add_settings_flags,
    check_weights,
    home_path,
    make_pipeline,
    parse_with_preset,
    run,
    settings_of,
)
from core.config.presets import EMBEDDED
from core.family.evaluation import Case, Evaluation, Judge, Measured, View, held_out_cases
from core.family.evaluation_run import CELL, TINY, by, load_recogniser, table
from core.pictures.images import prepare_folder, save_image, to_image
from core.pictures.sheets import contact_sheet
from core.pipeline.progress import counting
from core.pipeline.resolution import plan
from core.scenes.captions import caption
from core.scenes.scene import EXTRA_SUBJECTS
from core.weights.lora.merging import load_loras

SUBJECT = re.compile(r"striped (hot air )?balloon")  # as captions say it
SHOWN = 4  # scenes on the sheet
TOLD, OTHERS = 0.8, 0.1  # at least, at most: what is asked of a LoRA, shares of striped balloons
LOSS = 0.05  # at most, of the attributes that ordinary pictures get right


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    group = parser.add_argument_group("measurement")
    group.add_argument("--lora", nargs="+", metavar="FILE[:WEIGHT]", help="one of them with a token")
    group.add_argument("--num_image", type=int, default=50, help="held-out scenes")
    group.add_argument("--height", type=int, help="pixels")
    group.add_argument("--width", type=int, help="pixels")
    group.add_argument("--seed", type=int, default=0, help="of the first scene and picture")
    group.add_argument(
        "--output_dir", type=home_path, default="outputs/personalized", help="folder for the sheet"
    )
    add_settings_flags(parser)
    add_model_flags(parser)
    parser.set_defaults(preset=EMBEDDED)
    return parse_with_preset(parser, arguments)


@dataclass(frozen=True)
class Row:
    """Pictures that are made and measured alike."""

    name: str
    cases: Sequence[Case]
    with_lora: bool = True


def cases_of_subject(count: int, seed: int, words: str) -> list[Case]:
    """Held-out scenes with a striped balloon in the place of their subject, called by `words`."""
    cases = []
    for case in held_out_cases(count, seed):
        scene = replace(case.scene, subject=EXTRA_SUBJECTS[0])
        cases.append(Case(scene, SUBJECT.sub(words, caption(scene, case.seed)), case.seed))
    return cases


def make_rows(count: int, seed: int, token: str) -> list[Row]:
    """All that is measured; scenes and seeds of pictures are the same everywhere."""
    ordinary = held_out_cases(count, seed)
    return [
        Row("with the token", cases_of_subject(count, seed, f"{token} balloon")),
        Row("without the token", cases_of_subject(count, seed, "balloon")),
        Row("ordinary prompts", ordinary),
        Row("without the LoRA", ordinary, with_lora=False),
    ]


class Sheet:
    """The first scenes' pictures, a column for each row of the table."""

    def __init__(self) -> None:
        self._columns: dict[str, list[tuple[Image.Image, str]]] = {}

    def __call__(self, view: View, case: Case, pixels: Tensor) -> None:
        cells = self._columns.setdefault(view.name, [])
        if len(cells) < SHOWN:
            cells.append((ImageOps.contain(to_image(pixels), (CELL, CELL)), case.prompt))

    def save(self, path: Path) -> Path:
        cells = [cell for line in zip(*self._columns.values(), strict=True) for cell in line]
        return save_image(contact_sheet(cells), path, "png", {"prompts": [prompt for _, prompt in cells]})


def striped(row: Row, measured: Measured) -> float:
    """The share of striped balloons among pictures of scenes that have one."""
    assert all(case.scene.subject in EXTRA_SUBJECTS for case in row.cases)
    return measured.accuracy.each["subject"]


def report(rows: Sequence[Row], measured: Sequence[Measured]) -> str:
    """A table, and whether the LoRA is what was asked for."""
    lines = [("pictures", "striped balloons", "attributes right")]
    told, others = (striped(row, m) for row, m in zip(rows[:2], measured[:2], strict=True))
    lines += [(rows[0].name, f"{told:.3f}", ""), (rows[1].name, f"{others:.3f}", "")]
    kept, before = (m.accuracy.mean for m in measured[2:])
    lines += [(rows[2].name, "", f"{kept:.3f}"), (rows[3].name, "", f"{before:.3f}")]
    reached = told >= TOLD and others <= OTHERS and before - kept <= LOSS
    bars = f"{TOLD:.0%} or more with the token, {OTHERS:.0%} or less without, at most {LOSS:.0%} lost"
    return f"{table(lines)}\n\n{'reached' if reached else 'not reached'}: {bars}"


def main(given: Sequence[str] | None = None) -> None:
    arguments = parse(given)
    if arguments.num_image < 1:
        raise ValueError(f"--num_image must be at least 1, not {arguments.num_image}")
    size, pipeline = (arguments.height, arguments.width), make_pipeline(arguments)
    plan(*size, pipeline.config_c.geometry)  # raises what is wrong with the size
    loras = load_loras(arguments.lora, pipeline.config_c)
    tokens = [token for lora in loras for token in lora.tokens]
    if not tokens:
        raise ValueError(f"{' and '.join(arguments.lora)}: the LoRA has no token to put into a prompt")
    pipeline.set_loras(loras)
    prepare_folder(arguments.output_dir)
    check_weights(pipeline, arguments.preset)
    recogniser = load_recogniser(str(TINY / "recogniser.safetensors"), pipeline.device)
    if pipeline.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # Stage A runs in float32
    judge, settings, sheet = Judge(recogniser, pipeline.device), settings_of(arguments), Sheet()
    rows, measured = make_rows(arguments.num_image, arguments.seed, tokens[0]), []
    for row in rows:
        pipeline.set_loras(loras if row.with_lora else [])
        evaluation = Evaluation(pipeline, judge, row.cases, settings)
        total = arguments.num_image * (settings.steps + settings.steps_low + settings.steps_b + 1)
        with tqdm(desc=row.name, total=total, unit="step") as bar:
            measured += evaluation.pictures(size, [View(row.name, size)], counting(bar), sheet)
    path = sheet.save(Path(arguments.output_dir) / f"personalized_{by(size).replace(' ', '')}.png")
    print(f"{arguments.num_image} held-out scenes from seed {arguments.seed} at {by(size)}: {path}\n")
    print(report(rows, measured))


if __name__ == "__main__":
    run(main)
