"""The LoRAs that --lora names, in a pipeline."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from core.commands.flags import check_weights
from core.config.settings import Job
from core.launch import is_main
from core.pipeline.pipeline import UltraPixelPipeline
from core.printable import say
from core.weights.lora.merging import load_loras, named_files, uncalled


def use_loras(arguments: argparse.Namespace, pipeline: UltraPixelPipeline, jobs: Sequence[Job]) -> None:
    """Let a pipeline use the flags' LoRAs, if any, and say which prompts lack their tokens."""
    if not arguments.lora:
        return
    if not arguments.dry_run:
        check_weights(pipeline, arguments.preset, named_files(arguments.lora))
    loras = load_loras(arguments.lora, pipeline.config_c)
    pipeline.set_loras(loras)
    prompts = list(dict.fromkeys(job.prompt for job in jobs))
    for sentence in uncalled(loras, prompts) if is_main() else ():
        say(f"warning: {sentence}", sys.stderr)
