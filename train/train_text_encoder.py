"""Train the tiny family's text encoder: python train/train_text_encoder.py CONFIG.yaml [key=value ...]

It learns to tell a scene's attributes from its captions; its tokenizer is made from the captions' words.
Running the same command again continues from the last checkpoint in checkpoint_path/experiment_id.
"""

from __future__ import annotations

from core.commands.flags import run
from core.commands.training import read_command
from core.config.schema import TextTrainConfig


def main() -> int:
    config = read_command(TextTrainConfig, __doc__)
    from core.family.text_encoder import train_text_encoder  # loads torch, once the command is read

    return train_text_encoder(config)


if __name__ == "__main__":
    run(main)
