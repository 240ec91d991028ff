"""Text to image: python inference/test_t2i.py --prompt "..." --height 4096 --width 4096

It can also go out from a picture (--init_image), make a region of it anew, or take pictures as prompts.
"""

from __future__ import annotations

import argparse

from core.commands.flags import (
    MODEL_FLAGS,
    make_jobs,
    make_pipeline,
    parse_with_preset,
    picture_parser,
    run,
    settings_of,
)
from core.commands.origins import ORIGIN_FLAGS, add_origin_flags, parse_size, read_origin


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; --from_image takes a picture's settings as defaults for the other flags."""
    parser = picture_parser(__doc__)
    add_origin_flags(parser)
    parsed = parse_with_preset(parser, arguments)
    parse_size(parser, arguments, parsed)
    return parsed


def main(given: list[str] | None = None) -> int:
    arguments = parse(given)
    begun = read_origin(arguments)
    jobs, settings = make_jobs(arguments), settings_of(arguments)
    from core.commands.asked import make_asked  # loads torch, once the flags are read

    pipeline = make_pipeline(arguments)
    pipeline.image_encoder = arguments.image_encoder or pipeline.image_encoder
    pipeline.set_origin(begun)
    models = MODEL_FLAGS if begun is None else (*MODEL_FLAGS, *ORIGIN_FLAGS)
    return make_asked(arguments, pipeline, jobs, settings, models)


if __name__ == "__main__":
    run(main)
