"""Train Stage C: python train/train_stage_c.py CONFIG.yaml [key=value ...], or under torchrun.

All weights are trained, on single pictures, without guidance. Running the same command again continues from
the last checkpoint in checkpoint_path/experiment_id.
"""

from __future__ import annotations

from core.commands.flags import run
from core.commands.training import read_command
from core.config.schema import StageCTrainConfig


def main() -> int:
    config = read_command(StageCTrainConfig, __doc__)
    from core.training.stage_c import train_stage_c  # loads torch, once the command is read

    return train_stage_c(config)


if __name__ == "__main__":
    run(main)
