"""Train LoRA and new tokens on a few pictures: python train/train_personalized.py CONFIG.yaml [key=value ...]

It also runs under torchrun. Running the same command again continues from the last checkpoint in
checkpoint_path/experiment_id.
"""

from __future__ import annotations

from core.commands.flags import run
from core.commands.training import read_command
from core.config.schema import PersonalizedTrainConfig


def main() -> int:
    config = read_command(PersonalizedTrainConfig, __doc__)
    from core.training.lora import train_personalized  # loads torch, once the command is read

    return train_personalized(config)


if __name__ == "__main__":
    run(main)
