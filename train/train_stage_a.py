"""Train Stage A from nothing: python train/train_stage_a.py CONFIG.yaml [key=value ...], or under torchrun.

Running the same command again continues from the last checkpoint in checkpoint_path/experiment_id.
"""

from __future__ import annotations

from core.commands.flags import run
from core.commands.training import read_command
from core.config.schema import StageATrainConfig


def main() -> int:
    config = read_command(StageATrainConfig, __doc__)
    from core.training.stage_a import train_stage_a  # loads torch, once the command is read

    return train_stage_a(config)


if __name__ == "__main__":
    run(main)
