"""Prompts as templates: choices {red|blue} and wildcards __colour__ from files, by `dynamicprompts`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from core.config.settings import Job
from core.paths import at_home

if TYPE_CHECKING:
    from dynamicprompts.wildcards import WildcardManager


class Wildcards:
    """Fills templates from the files of a folder.

    ValueError where there is no such folder, a file in it is not UTF-8, or `dynamicprompts` is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        path = Path(at_home(str(folder)))
        if not path.is_dir():
            raise ValueError(f"{folder}: wildcards are files in a folder, and there is no such folder")
        self._manager = _manager(path)

    def fill(self, job: Job) -> Job:
        """The job, its prompts made of the templates that they are; it keeps those that say more.

        Its seed alone chooses, so that nothing else that a run makes changes a picture.
        """
        from dynamicprompts.generators import RandomPromptGenerator

        generate = RandomPromptGenerator(self._manager, seed=job.seed).generate
        changed = {}
        for name, kept in (("prompt", "template"), ("negative_prompt", "negative_template")):
            template = getattr(job, name)
            result = _filled(generate, template)
            if result != template:
                changed |= {name: result, kept: template}
        return replace(job, **changed)


def _filled(generate: Callable[[str, int], list[str]], template: str) -> str:
    try:
        return "".join(generate(template, 1))
    except RecursionError:
        raise ValueError(f"the prompt {template!r} has no end: a wildcard's file leads back to it") from None
    except Exception as error:  # the parser's own, and KeyError for a variable without a value
        reason = str(error).strip("'\"").partition("\n")[0]
        raise ValueError(f"the prompt {template!r} cannot be filled as a template: {reason}") from None


def _manager(folder: Path) -> WildcardManager:
    try:
        from dynamicprompts.wildcards import WildcardManager
    except ImportError:
        raise ValueError(
            "wildcards need the package dynamicprompts, which is not installed: pip install dynamicprompts"
        ) from None

    class Known(WildcardManager):
        """Names a wildcard without values, which would stay in the prompt as it is."""

        def get_values(self, wildcard: str) -> object:
            if ".." in wildcard:  # which it logs with a traceback
                raise ValueError(f"the wildcard {wildcard} lies outside of {folder}: name a file in it")
            values = super().get_values(wildcard)
            if not values:
                raise ValueError(_unknown(wildcard, self.get_collection_names(), folder))
            return values

    for path in folder.rglob("*.txt"):
        _check_text(path)
    return Known(folder)


def _unknown(wildcard: str, names: set[str], folder: Path) -> str:
    near = get_close_matches(wildcard, sorted(names), n=1, cutoff=0)
    hint = f"the nearest of its files is {near[0]}" if near else "it has no files with any"
    hint = "its file is empty" if near == [wildcard] else hint
    return f"the wildcard {wildcard} has no values in {folder}; {hint}"


def _check_text(path: Path) -> None:
    try:
        path.read_text("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: the file of a wildcard is not UTF-8 text") from None
    except OSError as error:
        raise ValueError(f"{path}: the file of a wildcard cannot be read ({error.strerror})") from None
