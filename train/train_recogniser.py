"""Train the recogniser of scenes: python train/train_recogniser.py CONFIG.yaml [key=value ...]

It learns to tell the attributes of drawn scenes from their pictures, also from blurred and noisy ones.
Running the same command again continues from the last checkpoint in checkpoint_path/experiment_id.
"""

from __future__ import annotations

from core.commands.flags import run
from core.commands.training import read_command
from core.config.schema import RecogniserTrainConfig


def main() -> int:
    config = read_command(RecogniserTrainConfig, __doc__)
    from core.family.recogniser import train_recogniser  # loads torch, once the command is read

    return train_recogniser(config)


if __name__ == "__main__":
    run(main)
