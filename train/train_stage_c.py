"""Train Stage C: python train/train_stage_c.py CONFIG.yaml [key=value ...], or under torchrun.

All weights are trained, on single pictures, without guidance. Running the same command again continues from
the last checkpoint in checkpoint_path/experiment_id.
"""

from __future__ import annotations

from core.cli import run
from core.config import StageCTrainConfig
from core.training_command import read_command


def main() -> int:
    config = read_command(StageCTrainConfig, __doc__)
    from core.stage_c_training import train_stage_c  # loads torch, once the command is read

    return train_stage_c(config)


if __name__ == "__main__":
    run(main)
