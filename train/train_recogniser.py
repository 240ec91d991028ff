"""Train the recogniser of scenes: python train/train_recogniser.py CONFIG.yaml [key=value ...]

It learns to tell the attributes of drawn scenes from their pictures, also from blurred and noisy ones.
Running the same command again continues from the last checkpoint in checkpoint_path/experiment_id.
"""

from __future__ import annotations

from core.cli import run
from core.config import RecogniserTrainConfig
from core.training_command import read_command


def main() -> int:
    config = read_command(RecogniserTrainConfig, __doc__)
    from core.recogniser_training import train_recogniser  # loads torch, once the command is read

    return train_recogniser(config)


if __name__ == "__main__":
    run(main)
