"""Text to image: python inference/test_t2i.py --prompt "..." --height 4096 --width 4096"""

from __future__ import annotations

import argparse

from core.commands.flags import make_jobs, make_pipeline, parse_with_preset, picture_parser, run, settings_of


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; --from_image takes a picture's settings as defaults for the other flags."""
    return parse_with_preset(picture_parser(__doc__), arguments)


def main(given: list[str] | None = None) -> int:
    arguments = parse(given)
    jobs, settings = make_jobs(arguments), settings_of(arguments)
    from core.commands.asked import make_asked  # loads torch, once the flags are read

    return make_asked(arguments, make_pipeline(arguments), jobs, settings)


if __name__ == "__main__":
    run(main)
