"""Train Stage B: python train/train_stage_b.py CONFIG.yaml [key=value ...], or under torchrun.

The encoder of Stage C's latents is trained along, unless the configuration names its file. Running the same
command again continues from the last checkpoint in checkpoint_path/experiment_id.
"""

from __future__ import annotations

from core.commands.flags import run
from core.commands.training import read_command
from core.config.schema import StageBTrainConfig


def main() -> int:
    config = read_command(StageBTrainConfig, __doc__)
    from core.training.stage_b import train_stage_b  # loads torch, once the command is read

    return train_stage_b(config)


if __name__ == "__main__":
    run(main)
