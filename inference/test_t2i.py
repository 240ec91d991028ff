"""Text to image: python inference/test_t2i.py --prompt "..." --height 4096 --width 4096

It can also go out from a picture (--init_image), make a region of it anew, or take pictures as prompts.
LoRAs and controls go together, and each may be given several times:
python inference/test_t2i.py --prompt "..." --lora FILE:0.8 --control canny:PICTURE
"""

from __future__ import annotations

import argparse

from core.commands.added import add_control_flags, add_lora_flag, given_controls, parse_with_added
from core.commands.flags import MODEL_FLAGS, make_jobs, make_pipeline, picture_parser, run, settings_of
from core.commands.origins import ORIGIN_FLAGS, add_origin_flags, read_origin
from core.commands.parsing import leave_size_open
from core.commands.prompts import lines_of


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; --from_image takes a picture's settings as defaults for the other flags."""
    parser = picture_parser(__doc__)
    add_origin_flags(parser)
    add_lora_flag(parser, "none, whatever the preset")
    add_control_flags(parser)
    parsed = parse_with_added(parser, arguments)
    if parsed.region is not None:
        leave_size_open(parser, arguments, parsed)
    return parsed


def main(given: list[str] | None = None) -> int:
    arguments = parse(given)
    lines_of(arguments)  # raises if there is no prompt
    controls, begun, settings = given_controls(arguments), read_origin(arguments), settings_of(arguments)
    jobs = [] if controls else make_jobs(arguments)  # a picture that controls may give the size
    # These load torch, once the flags are read.
    from core.commands.asked import make_asked
    from core.commands.controlled import use_controls
    from core.commands.loras import use_loras
    from core.pipeline.steering import with_suffix

    pipeline = make_pipeline(arguments)
    pipeline.image_encoder = arguments.image_encoder or pipeline.image_encoder
    pipeline.set_origin(begun)
    control = use_controls(arguments, pipeline, controls)
    jobs = jobs or make_jobs(arguments)
    use_loras(arguments, pipeline, jobs)
    jobs = [with_suffix(job) for job in jobs] if controls else jobs
    added = [name for name in ("lora", "controls") if getattr(arguments, name)]
    models = (*MODEL_FLAGS, *(() if begun is None else ORIGIN_FLAGS), *added)
    return make_asked(arguments, pipeline, jobs, settings, models, control)


if __name__ == "__main__":
    run(main)
