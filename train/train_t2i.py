"""Train the guidance: python train/train_t2i.py CONFIG.yaml [key=value ...], or under torchrun.

Running the same command again continues from the last checkpoint in checkpoint_path/experiment_id.
"""

from __future__ import annotations

from core.commands.flags import run
from core.commands.training import read_command
from core.config.schema import TrainConfig


def main() -> int:
    config = read_command(TrainConfig, __doc__)
    from core.training.guidance import train_guidance  # loads torch, once the command is read

    return train_guidance(config)


if __name__ == "__main__":
    run(main)
