"""Train the guidance: python train/train_t2i.py CONFIG.yaml [key=value ...], or under torchrun.

Running the same command again continues from the last checkpoint in checkpoint_path/experiment_id.
"""

from __future__ import annotations

from core.cli import run
from core.config import TrainConfig
from core.training_command import read_command


def main() -> int:
    config = read_command(TrainConfig, __doc__)
    from core.guidance_training import train_guidance  # loads torch, once the command is read

    return train_guidance(config)


if __name__ == "__main__":
    run(main)
