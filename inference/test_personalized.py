"""Text to image with LoRAs and their tokens: python inference/test_personalized.py --lora FILE --prompt "..."

python inference/test_personalized.py --pretrained_path_lora models/lora_cat.safetensors \
    --prompt "a photo of a cat [roubaobao] in the snow"
python inference/test_personalized.py --lora cat.safetensors:0.8 --lora style.safetensors:0.5 --prompt "..."
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from core.commands.added import add_lora_flag
from core.commands.flags import (
    MODEL_FLAGS,
    make_jobs,
    make_pipeline,
    parse_with_preset,
    picture_parser,
    run,
    settings_of,
)

CONFIG_C = "configs/training/lora_personalization.yaml"  # has the token of the published file, which lacks it


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line: that of test_t2i, and the LoRAs."""
    parser = picture_parser(__doc__)
    parser.set_defaults(config_c=CONFIG_C)
    add_lora_flag(parser, "the preset's, else none")
    return parse_with_preset(parser, arguments)


def main(given: Sequence[str] | None = None) -> int:
    arguments = parse(given)
    jobs, settings = make_jobs(arguments), settings_of(arguments)
    if not arguments.lora:
        raise ValueError("no LoRA was given: add --pretrained_path_lora FILE, or --lora FILE:WEIGHT")
    # These load torch, once the flags are read.
    from core.commands.asked import make_asked
    from core.commands.loras import use_loras

    pipeline = make_pipeline(arguments)
    use_loras(arguments, pipeline, jobs)
    return make_asked(arguments, pipeline, jobs, settings, (*MODEL_FLAGS, "lora"))


if __name__ == "__main__":
    run(main)
