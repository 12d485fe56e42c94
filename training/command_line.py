"""What all commands share: fields from dataclasses, a recipe or the command line; mistakes told in one line."""

import contextlib
import difflib
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import yaml

RECIPE_HELP = (
    "--config FILE.yaml reads any of the fields below from a recipe, and environment variables from its key `env`; "
    "fields on the command line come before the recipe's."
)


def parse_arguments(*dataclass_types: type, description: str = "") -> tuple[Any, ...]:
    """One instance of each dataclass, from `--config FILE.yaml` and `--field value` on the command line.

    Last comes a dictionary of the fields to which recipe or command line give another value than the default: what was
    asked for.

    Raises:
        FileNotFoundError: no such recipe.
        ValueError: a recipe that is no YAML mapping, or a field that no dataclass has, in the recipe or outside.
    """
    from trl.scripts.utils import TrlParser  # imports torch, which workers that import a command's module do without

    # TrlParser takes the recipe only as a word of its own, and its field names only as they are spelt.
    words = [part for word in sys.argv[1:] for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    recipe = words[words.index("--config") + 1 :][:1] if "--config" in words else ["(no recipe)"]
    if not recipe:
        raise ValueError("--config has no value: name a recipe, such as training/recipes/.../quickstart.yaml.")
    parser = TrlParser(dataclass_types, description=f"{description} {RECIPE_HELP}", allow_abbrev=False)
    parser.error = _raise  # argparse's would print the usage, all fields of it, before the message
    try:
        *parsed, unknown_in_recipe, unknown_words = parser.parse_args_and_config(
            words, return_remaining_strings=True, separate_remaining_strings=True
        )
    except yaml.YAMLError as error:
        raise ValueError(f"{recipe[0]} is not valid YAML: {' '.join(str(error).split())}") from error
    known = [field.name for dataclass_type in dataclass_types for field in fields(dataclass_type) if field.init]
    # The parser returns a recipe's unknown entries as --key value --key value.
    for place, unknown in ((recipe[0], unknown_in_recipe[::2]), ("the command line", unknown_words)):
        if unknown and place == "the command line" and not unknown[0].startswith("-"):
            raise ValueError(
                f"{unknown[0]!r} on the command line belongs to no field: remove it, or name its field (--FIELD VALUE)."
            )
        if unknown:
            name = unknown[0].removeprefix("--").split("=")[0]
            similar = difflib.get_close_matches(name, known, n=1)
            mend = f"did you mean {similar[0]!r}?" if similar else "--help lists the fields there are."
            raise ValueError(f"Unknown field {name!r} in {place}: {mend}")
    named = {word.removeprefix("--").split("=")[0].replace("-", "_") for word in words if word.startswith("--")}
    named |= {name.removeprefix("no_") for name in named}  # --no_FIELD switches one off
    if "--config" in words:
        named |= set(yaml.safe_load(Path(recipe[0]).read_text(encoding="utf-8")))
    given = {}
    for instance in parsed:
        kinds = get_type_hints(type(instance))
        for field in fields(instance):
            value = getattr(instance, field.name)
            if field.name in named and value != field.default:
                _check_type(field.name, kinds[field.name], value)
                given[field.name] = value
    return *parsed, given


def _raise(message: str) -> NoReturn:
    raise ValueError(f"On the command line, {message}.")


def _check_type(name: str, kind: Any, value: Any) -> None:
    """Raises where a recipe gave a plain field something else; argparse converts what is on the command line."""
    accepted = {int: int, float: (int, float), str: str, bool: bool}.get(kind)
    if accepted and (not isinstance(value, accepted) or (kind is not bool and isinstance(value, bool))):
        raise ValueError(f"The field {name!r} is {value!r}: give a value of type {kind.__name__}.")


@contextlib.contextmanager
def plain_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Ends the program with one line on stderr and exit status 2 at an error of `kinds`.

    The default, ValueError, OSError and ImportError, is for the parts of a command that read and check what the user
    gave. Around a training loop it would hide where a defect of ours is: name the one error that is meant there.
    """
    kinds = kinds or (ValueError, OSError, ImportError)
    try:
        yield
    except kinds as error:
        print("Error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
