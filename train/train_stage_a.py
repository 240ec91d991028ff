"""Train Stage A from nothing: python train/train_stage_a.py CONFIG.yaml [key=value ...], or under torchrun.

Running the same command again continues from the last checkpoint in checkpoint_path/experiment_id.
"""

from __future__ import annotations

from core.cli import run
from core.config import StageATrainConfig
from core.training_command import read_command


def main() -> int:
    config = read_command(StageATrainConfig, __doc__)
    from core.stage_a_training import train_stage_a  # loads torch, once the command is read

    return train_stage_a(config)


if __name__ == "__main__":
    run(main)
