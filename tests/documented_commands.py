"""Finds the commands that the documentation gives, and reads them with the parsers of the modules that they call.

Where commands are looked for: code blocks and code spans of Markdown, indented lines of module docstrings, and the
stages of the quickstart. A command is what begins with one of `STARTS`.
"""

import argparse
import ast
import contextlib
import dataclasses
import importlib
import importlib.util
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

import training.tuning
from training.quickstart import PARTS

ROOT = Path(__file__).resolve().parent.parent
MARKDOWN = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "training/sample_data/README.md")
PACKAGES = ("training", "hub_cards", "hf_models")
STARTS = (
    "python -m",
    "python training/",
    "make ",
    "accelerate launch",
    "torchrun",
    "lm_eval",
    "transformers serve",
    "transformers chat",
    "llama-cli",
    "vllm serve",
    "pip ",
    "npm ",
    "apt-get ",
    "dpkg-deb ",
)
# Other people's commands, which the migration page names beside ours.
FOREIGN = ("make evaluate",)
# What is put before a command, and none by itself.
LAUNCHERS = ("python -m", "accelerate launch", "torchrun --nproc_per_node N")
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
CONTINUED = re.compile(r" *\\\n\s*")


class Command(NamedTuple):
    """A command as it is written, on one line and without a comment, and where: `docs/publishing.md`."""

    text: str
    place: str

    @property
    def words(self) -> list[str]:
        """Without what stands for further fields."""
        return [word for word in shlex.split(self.text) if word not in ("...", "…")]

    @property
    def module(self) -> str | None:
        """Whose parser reads the arguments, where that is one of ours."""
        words = self.words
        name = words[words.index("-m") + 1] if "-m" in words[:-1] else ""
        if words[:2] == ["python", words[1]] and words[1].startswith("training/"):
            name = words[1].removesuffix(".py").replace("/", ".")
        return name if name.split(".")[0] in (*PACKAGES, "benchmarks") else None

    @property
    def arguments(self) -> list[str]:
        """What stands behind the module."""
        words = self.words
        return words[words.index("-m") + 2 :] if "-m" in words else words[2:]


class Block(NamedTuple):
    """A fenced block of Markdown."""

    language: str
    text: str
    place: str


def markdown_blocks(file: Path) -> list[Block]:
    place = str(file.relative_to(ROOT))
    return [
        Block(language, re.sub(f"^{indent}", "", text, flags=re.MULTILINE), place)
        for indent, language, text in FENCE.findall(file.read_text(encoding="utf-8"))
    ]


def code_spans(file: Path) -> list[str]:
    """Code within lines, each on one line, outside of blocks; a table's `\\|` is a `|`."""
    prose = FENCE.sub("", file.read_text(encoding="utf-8"))
    return [" ".join(span.split()).replace("\\|", "|") for span in SPAN.findall(prose)]


def _commands_in(lines: list[str], place: str) -> Iterator[Command]:
    for line in lines:
        line = re.sub(r"\s+#\s.*", "", line)
        if line.startswith(STARTS) and line not in LAUNCHERS and not line.startswith(FOREIGN):
            yield Command(line, place)


def documented_commands() -> list[Command]:
    """Every command, in the order of the documents; one that stands twice is there once."""
    found = []
    for file in MARKDOWN:
        place = str(file.relative_to(ROOT))
        for block in markdown_blocks(file):
            found += _commands_in(CONTINUED.sub(" ", block.text).splitlines(), place)
        found += _commands_in(code_spans(file), place)
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
            indented = [line.strip() for line in CONTINUED.sub(" ", docstring).splitlines() if line.startswith("    ")]
            found += _commands_in(indented, str(file.relative_to(ROOT)))
    for part in PARTS.values():  # what `make quickstart` runs
        found += [Command(f"python -m {shlex.join(stage)}", "training/quickstart.py") for stage in part.stages]
    first = {}
    for command in found:
        first.setdefault(tuple(command.words), command)
    return list(first.values())


def fields_of(module: str) -> set[str]:
    """The names of the fields, without their dashes, that the command of `module` takes."""
    command, found = _command(module), set()

    def note(*dataclass_types, description=""):
        found.update(field.name for kind in dataclass_types for field in dataclasses.fields(kind) if field.init)
        raise ParsedError

    def note_parser(parser, *_):
        found.update(option.lstrip("-") for action in parser._actions for option in action.option_strings)
        raise ParsedError

    with pytest.MonkeyPatch.context() as patch:
        _replace_parsers(command, patch, lambda _: note, lambda _: note_parser)
        with contextlib.suppress(ParsedError):
            command.main()
    return found


def expand(text: str) -> list[str]:
    """`pretrain_{atto,tiny}` as `pretrain_atto` and `pretrain_tiny`; an ellipsis among them stands for nothing."""
    match = re.search(r"\{([^{}]*,[^{}]*)\}", text)
    if not match:
        return [text]
    choices = [choice for choice in match[1].split(",") if choice not in ("…", "...")]
    return [whole for choice in choices for whole in expand(text[: match.start()] + choice + text[match.end() :])]


class ParsedError(BaseException):
    """Raised, in the place of what a command does, once it has read its arguments."""


def parse(module: str, arguments: list[str]) -> None:
    """Has `module` read `arguments` as its command would, and stops it there.

    Raises ValueError with what the command would say of a mistake.
    """
    command, complaints = _command(module), []

    def stop_after(function):
        def parsed(*args, **kwargs):
            function(*args, **kwargs)
            raise ParsedError

        return parsed

    def complain(parser, message):
        complaints.append(message)
        sys.exit(2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module, *arguments])
        patch.chdir(ROOT)
        patch.setattr("builtins.print", lambda *words, **_: complaints.append(" ".join(map(str, words))))
        _replace_parsers(command, patch, stop_after, stop_after)
        if not _has_fields(command):
            patch.setattr(argparse.ArgumentParser, "error", complain)
        try:
            command.main()
        except ParsedError:
            return
        except SystemExit as end:
            raise ValueError(" ".join(complaints) or f"exit {end.code}") from None
    raise ValueError(f"{module} read no arguments")


def _command(module: str) -> ModuleType:
    found = importlib.import_module(module)
    return importlib.import_module(f"{module}.__main__") if hasattr(found, "__path__") else found


def _has_fields(command: ModuleType) -> bool:
    """Whether the command's fields are dataclasses', rather than argparse's."""
    return hasattr(command, "parse_arguments") or hasattr(command, "parse_tuning")


def _replace_parsers(command: ModuleType, patch: pytest.MonkeyPatch, of_fields: Callable, of_parser: Callable) -> None:
    if not _has_fields(command):
        patch.setattr(argparse.ArgumentParser, "parse_args", of_parser(argparse.ArgumentParser.parse_args))
        return
    for module in (command, training.tuning):
        if hasattr(module, "parse_arguments"):
            patch.setattr(module, "parse_arguments", of_fields(module.parse_arguments))
