"""How flags are parsed that argparse alone does not parse so: repeated ones, and sizes that are left open."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from core.commands.exploring import FROM


class Gather(argparse.Action):
    """Collects the values of a repeated flag, instead of the default ones."""

    def __call__(
        self,
        _parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        value: str,
        _flag: str | None = None,
    ) -> None:
        held = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*(() if held is self.default else held), value])


def leave_size_open(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, parsed: argparse.Namespace
) -> None:
    """Set height and width to None where nobody asked for them: a picture that is given has its own."""
    if not any(getattr(parsed, name) for name in FROM):
        parser.set_defaults(height=None, width=None)
        asked = parser.parse_args(arguments)
        parsed.height, parsed.width = asked.height, asked.width
