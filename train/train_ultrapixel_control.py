"""Train a ControlNet: python train/train_ultrapixel_control.py CONFIG.yaml [key=value ...]

It also runs under torchrun. Stage C and the guidance stay as they are: control acts on the low-resolution
pass, and the ControlNet learns to denoise latents of that size under what it sees of the pictures. Running
the same command again continues from the last checkpoint in checkpoint_path/experiment_id.
"""

from __future__ import annotations

from core.commands.flags import run
from core.commands.training import read_command
from core.config.schema import ControlTrainConfig


def main() -> int:
    config = read_command(ControlTrainConfig, __doc__)
    from core.training.control import train_controlnet  # loads torch, once the command is read

    return train_controlnet(config)


if __name__ == "__main__":
    run(main)
