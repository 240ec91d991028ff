"""Text to image with LoRAs and their tokens: python inference/test_personalized.py --lora FILE --prompt "..."

python inference/test_personalized.py --pretrained_path_lora models/lora_cat.safetensors \
    --prompt "a photo of a cat [roubaobao] in the snow"
python inference/test_personalized.py --lora cat.safetensors:0.8 --lora style.safetensors:0.5 --prompt "..."
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from core.commands.flags import (
    MODEL_FLAGS,
    check_weights,
    home_path,
    make_jobs,
    make_pipeline,
    parse_with_preset,
    picture_parser,
    run,
    settings_of,
)
from core.commands.origins import Gather
from core.launch import is_main
from core.printable import say

CONFIG_C = "configs/training/lora_personalization.yaml"  # has the token of the published file, which lacks it


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line: that of test_t2i, and the LoRAs."""
    parser = picture_parser(__doc__)
    parser.set_defaults(config_c=CONFIG_C)
    group = parser.add_argument_group("LoRA")
    group.add_argument(
        "--lora", "--pretrained_path_lora", type=home_path, action=Gather, default=(),
        metavar="FILE[:WEIGHT]",
        help="a LoRA and how much of it, once for each of several (default: the preset's, else none)",
    )  # fmt: skip
    return parse_with_preset(parser, arguments)


def main(given: Sequence[str] | None = None) -> int:
    arguments = parse(given)
    jobs, settings = make_jobs(arguments), settings_of(arguments)
    if not arguments.lora:
        raise ValueError("no LoRA was given: add --pretrained_path_lora FILE, or --lora FILE:WEIGHT")
    # These load torch, once the flags are read.
    from core.commands.asked import make_asked
    from core.weights.lora.merging import load_loras, named_files, uncalled

    pipeline = make_pipeline(arguments)
    if not arguments.dry_run:
        check_weights(pipeline, arguments.preset, named_files(arguments.lora))
    loras = load_loras(arguments.lora, pipeline.config_c)
    pipeline.set_loras(loras)
    prompts = list(dict.fromkeys(job.prompt for job in jobs))
    for sentence in uncalled(loras, prompts) if is_main() else ():
        say(f"warning: {sentence}", sys.stderr)
    return make_asked(arguments, pipeline, jobs, settings, (*MODEL_FLAGS, "lora"))


if __name__ == "__main__":
    run(main)
