"""What a mixture is made of, as the user gives it, and the phases that make it.

    sources:
      web: {documents: runs/web/documents, weight: 0.67, max_epochs: 1.1}
      wikipedia: {recipe: training/recipes/text_pipeline/wikipedia.yaml, weight: 0.33, max_epochs: 2.45}

`documents` is anything that `training.text_data` reads, its split "train": a folder of parquet files is read with one
task a file, and a data set of the Hub by one task. `recipe` is one of `training.prepare_text`, whose documents are
taken. The rules of weights and epochs are in `mixing`.
"""

import difflib
import hashlib
import json
import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from .execution import Phase
from .mixing import PlanMixture, Share, WriteTokenShards
from .tally import replace_file
from .token_files import SourceFile, TokeniseDocuments

KEYS = ("documents", "recipe", "weight", "epochs", "max_epochs")
# Weights that miss 1 by less are rounded ones, such as three of 0.333.
WEIGHT_TOLERANCE = 2e-3


@dataclass
class MixArguments:
    sources: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Sources of the mixture, as a recipe's mapping or JSON: {NAME: {documents: PATH or recipe: FILE, "
            "weight: share of the tokens, max_epochs: 1.0}}, or `epochs` in place of `weight`."
        },
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the tokenizer of the token shards; none are made without."}
    )
    total_tokens: int | None = field(
        default=None,
        metadata={"help": "Tokens of the mixture; by default as many as the sources' max_epochs allow."},
    )
    token_shards: int = field(default=8, metadata={"help": "Files that the mixture is written to."})
    mix_seed: int = field(default=0, metadata={"help": "Seed of the order of documents, and of drawn ones."})

    def __post_init__(self):
        if isinstance(self.sources, str):
            try:
                self.sources = json.loads(self.sources)
            except ValueError as error:
                raise ValueError(f"--sources is no JSON ({error}): give it in a recipe, or as {{...}}.") from error
        if self.sources is not None:
            check_sources(self.sources, self.total_tokens)
            if self.tokenizer is None:
                raise ValueError("--sources are mixed by their tokens: give the --tokenizer to count and write them.")
        if self.total_tokens is not None and self.total_tokens < 1:
            raise ValueError(f"--total_tokens is {self.total_tokens}: give 1 or more, or leave it out.")
        if not 1 <= self.token_shards <= 99_999:
            raise ValueError(f"--token_shards is {self.token_shards}: give 1 to 99,999 files.")

    def shares(self) -> list[Share]:
        """The sources' shares; weights add up to 1 exactly."""
        fields = {
            name: {key: float(entry[key]) for key in ("weight", "epochs", "max_epochs") if key in entry}
            for name, entry in self.sources.items()
        }
        total = math.fsum(entry.get("weight", 0.0) for entry in fields.values())
        for entry in fields.values():
            if "weight" in entry:
                entry["weight"] /= total
        return [Share(name, **entry) for name, entry in fields.items()]


def check_sources(sources: Any, total_tokens: int | None) -> None:
    """Raises ValueError, in one sentence, for what can be told wrong before anything is read."""
    if not isinstance(sources, dict) or not sources:
        raise ValueError("--sources is no mapping of names to sources: give {NAME: {documents: PATH, weight: 1.0}}.")
    for name, entry in sources.items():
        if not isinstance(name, str) or not isinstance(entry, dict):
            raise ValueError(
                f"The source {name!r} is {entry!r}: give a mapping such as {{documents: PATH, weight: 1}}."
            )
        for key in entry:
            if key not in KEYS:
                similar = difflib.get_close_matches(str(key), KEYS, n=1)
                mend = f"did you mean {similar[0]!r}?" if similar else f"take {', '.join(KEYS)}."
                raise ValueError(f"The source {name!r} has an unknown key {key!r}: {mend}")
        for first, second in (("documents", "recipe"), ("weight", "epochs")):
            if (first in entry) == (second in entry):
                raise ValueError(f"The source {name!r} needs either {first!r} or {second!r}: give one of the two.")
        for key in ("documents", "recipe"):
            if key in entry and not isinstance(entry[key], str):
                raise ValueError(f"The source {name!r} has {key} {entry[key]!r}: give a path.")
        for key in ("weight", "epochs", "max_epochs"):
            value = entry.get(key, 1.0)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"The source {name!r} has {key} {value!r}: give a number above 0.")
        if "epochs" in entry and "max_epochs" in entry:
            raise ValueError(f"The source {name!r} has epochs and max_epochs, which belongs to a weight: leave it out.")
    _check_weights(sources, total_tokens)


def _check_weights(sources: dict[str, dict[str, Any]], total_tokens: int | None) -> None:
    weights = [entry["weight"] for entry in sources.values() if "weight" in entry]
    if not weights:
        if total_tokens is not None:
            raise ValueError("--total_tokens follows from the sources' epochs: leave it out, or give weights instead.")
        return
    if len(weights) < len(sources):
        raise ValueError("Some of the sources have a weight and some have epochs: give all of them the same.")
    # Not scaled to 1: that would hide a source that was forgotten.
    if abs(math.fsum(weights) - 1) > WEIGHT_TOLERANCE:
        raise ValueError(f"The weights of the sources add up to {math.fsum(weights):g}: make them add up to 1.")


class SourceTexts(NamedTuple):
    """The files of all sources, and by source what an `info.json` beside them says of whose text it is."""

    files: list[SourceFile]
    notices: dict[str, dict[str, Any]]

    def fingerprint(self) -> str:
        """A hash of the files' names and sizes."""
        named = [(f.source, f.path, Path(f.path).stat().st_size if f.kind != "hub" else 0) for f in self.files]
        return hashlib.sha256(json.dumps(named).encode()).hexdigest()[:16]


def read_sources(arguments: MixArguments) -> SourceTexts:
    """Finds and checks the files of `arguments.sources`.

    Raises ValueError or OSError, in one sentence: a source that is not there or cannot be used.
    """
    files, notices = [], {}
    for name in sorted(arguments.sources):
        found, notices[name] = source_files(name, arguments.sources[name])
        files += found
    return SourceTexts(files, notices)


def mixture_phases(arguments: MixArguments, sources: SourceTexts, work: Path, output: Path) -> list[Phase]:
    """The phases that tokenise and mix the sources. Writes the tokenizer into `work`, and runs nothing.

    Args:
        work: folder for the tokenizer, the tokenised files and the plan.
        output: folder for the shards and their `info.json`.

    Raises ValueError or OSError, in one sentence: a tokenizer that is not there or cannot be used.
    """
    return token_phases(arguments, arguments.shares(), *sources, work, output)


def document_phases(arguments: MixArguments, documents: Path, tasks: int, work: Path, output: Path) -> list[Phase]:
    """As `mixture_phases`, of the documents that the `tasks` of an earlier phase will have written to `documents`."""
    files = [SourceFile("documents", str(documents / f"{rank:05d}.parquet"), optional=True) for rank in range(tasks)]
    share = Share("documents", weight=1.0) if arguments.total_tokens else Share("documents", epochs=1.0)
    return token_phases(arguments, [share], files, {}, work, output)


def token_phases(
    arguments: MixArguments,
    shares: list[Share],
    files: list[SourceFile],
    notices: dict[str, dict[str, Any]],
    work: Path,
    output: Path,
) -> list[Phase]:
    tokenizer_file, plan_file, tokens = work / "tokenizer.json", work / "mixture.json", work / "token_files"
    tokenizer = store_tokenizer(arguments.tokenizer, tokenizer_file)
    seed, shards = arguments.mix_seed, arguments.token_shards
    plan = PlanMixture(
        shares, arguments.total_tokens, seed, shards, tokens, len(files), plan_file, output, tokenizer, notices
    )
    return [
        Phase("tokenise", [TokeniseDocuments(files, tokenizer_file, tokens)], len(files)),
        Phase("plan_mixture", [plan], 1),
        Phase("token_shards", [WriteTokenShards(seed, shards, tokens, plan_file, output)], shards),
    ]


def source_files(name: str, entry: dict[str, Any]) -> tuple[list[SourceFile], dict[str, Any]]:
    """The files of one source, and what an `info.json` beside them, if there is one, says of whose text it is."""
    # Imported here: a worker imports this module, and needs none of `datasets`.
    from training.dataset_source import describe_source, local_path
    from training.text_data import SUFFIXES, check_text_file, find_local_files

    place = entry.get("documents") or recipe_documents(name, entry["recipe"])
    if "recipe" in entry and not Path(place).exists():
        raise FileNotFoundError(
            f"The source {name!r} has no documents in {place} yet: run "
            f"`python -m training.prepare_text --config {entry['recipe']}` first."
        )
    local = local_path(place, "text", SUFFIXES)
    if local is None:
        return [SourceFile(name, place, kind="hub")], {}
    kind, found = find_local_files(local, "train", partial(check_text_file, text_column="text"))
    info = describe_source(local).get("info", {})
    notice = {key: info[key] for key in ("license", "attribution", "language") if key in info}
    return [SourceFile(name, str(file), kind) for file in sorted(found["train"])], notice


def recipe_documents(name: str, recipe: str) -> str:
    try:
        content = yaml.safe_load(Path(recipe).read_text(encoding="utf-8"))
        return str(Path(content["output_dir"]) / "documents")
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, KeyError) as error:
        raise ValueError(
            f"The source {name!r} names {recipe}, which is no recipe of training.prepare_text with an output_dir "
            f"({type(error).__name__}): name one, or the documents themselves."
        ) from error


def store_tokenizer(name: str, file: Path) -> dict[str, Any]:
    """Writes the tokenizer's `tokenizer.json` for the workers; returns what `info.json` says of it."""
    from training.language_models import tokenizer_fingerprint  # slow, and of no use to a worker
    from training.run_record import portable

    tokenizer = open_fast_tokenizer(name)
    replace_file(file, tokenizer.backend_tokenizer.to_str().encode())
    return {
        "name": portable(name, "tokenizer"),
        "fingerprint": tokenizer_fingerprint(tokenizer),
        "vocab_size": len(tokenizer),
    }


def open_fast_tokenizer(name: str):
    """Raises ValueError or OSError where `tokenizers` cannot run it."""
    from training.language_models import load_tokenizer

    tokenizer = load_tokenizer(name)
    if not tokenizer.is_fast:
        raise ValueError(f"The tokenizer {name!r} has no tokenizer.json: give one that `tokenizers` can run.")
    return tokenizer
