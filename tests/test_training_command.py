"""The command line of the training scripts."""

from __future__ import annotations

import sys
from unittest import mock

import pytest
from conftest import ROOT

from core.commands.training import read_command
from core.config.schema import TrainConfig

CONFIG = str(ROOT / "configs" / "tiny" / "train_t2i.yaml")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--lr", "5"), "lr=5"),
        (("--lr=5",), "lr=5"),
        (("--learning-rate", "5"), "lr=5"),
        (("updates=3", "--lr", "5", "seed=1"), "lr=5"),
        (("--lr",), "lr=VALUE"),
        (("--dry-run",), "--dry_run"),
    ],
)
def test_a_flag_that_there_is_not_leads_to_the_key(
    words: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["script", CONFIG, *words]
    with mock.patch.object(sys, "argv", arguments), pytest.raises(SystemExit) as end:
        read_command(TrainConfig, None)
    assert end.value.code == 2 and capsys.readouterr().err.splitlines()[-1].endswith(f" {told}")


def test_keys_may_follow_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["script", CONFIG, "--dry_run", "lr=0.25"]
    with mock.patch.object(sys, "argv", arguments), pytest.raises(SystemExit) as end:
        read_command(TrainConfig, None)
    assert not end.value.code and "\nlr: 0.25\n" in capsys.readouterr().out
