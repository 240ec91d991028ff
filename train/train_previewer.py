"""Train the previewer: python train/train_previewer.py CONFIG.yaml [key=value ...], or under torchrun.

It learns to show the encoder's latents as small pictures. Without a finished encoder in the configuration,
that is trained along: an autoencoder, from which train_stage_b.py can start. Running the same command again
continues.
"""

from __future__ import annotations

from core.commands.flags import run
from core.commands.training import read_command
from core.config.schema import PreviewerTrainConfig


def main() -> int:
    config = read_command(PreviewerTrainConfig, __doc__)
    from core.training.previewer import train_previewer  # loads torch, once the command is read

    return train_previewer(config)


if __name__ == "__main__":
    run(main)
