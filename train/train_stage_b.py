"""Train Stage B: python train/train_stage_b.py CONFIG.yaml [key=value ...], or under torchrun.

The encoder of Stage C's latents is trained along, unless the configuration names its file. Running the same
command again continues from the last checkpoint in checkpoint_path/experiment_id.
"""

from __future__ import annotations

from core.cli import run
from core.config import StageBTrainConfig
from core.training_command import read_command


def main() -> int:
    config = read_command(StageBTrainConfig, __doc__)
    from core.stage_b_training import train_stage_b  # loads torch, once the command is read

    return train_stage_b(config)


if __name__ == "__main__":
    run(main)
