"""Problems whose answers can be verified: of reasoning-gym's generators, or of any data set with two columns.

`--dataset reasoning_gym:chain_sum` is the generator of that name (reasoning-gym has some hundred, arXiv 2505.24760), at
the difficulty that `--difficulty` gives. A generator has no end, so what is held out is a rule rather than a list: a
problem belongs to the split "test" where the hash of its question says so, and to "train" otherwise. Whatever the
seeds and difficulties of two stages, what one trains on is never what another is tested on. The seeds of the two
splits are apart as well: reasoning-gym draws problem i from seed + i, so neighbouring seeds share nearly all problems.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from .dataset_source import describe_source, load_from_hub, local_path
from .reasoning_gym_scorers import check_generator
from .text_data import SUFFIXES, check_utf8, load_local_files, parquet_footer

GENERATORS = "reasoning_gym:"
# Of all problems one in ten is held out.
HELD_OUT_SHARE = 10
# Generators draw from 31 bits at most (some hand the seed to numpy): the upper half is the test split's.
SEEDS_OF_SPLIT = {"train": 0, "test": 2**30}
SEEDS_A_DRAW = 2**20
# Problems for which a generator is opened at once: acre makes all of them then, and a million take gigabytes.
BLOCK = 20_000
# An answer as GSM8K writes it: the working, and after this the number.
FINAL_ANSWER = "####"


@dataclass
class ProblemArguments:
    dataset: str = field(
        default="reasoning_gym:chain_sum",
        metadata={
            "help": "Problems: reasoning_gym:NAME, or a sample's name, a local file or folder (parquet, jsonl, json) "
            "or a Hub id, with a column of questions and one of answers."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a Hub data set that has several, such as gsm8k's main."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split to train on; slices: train[:95%%]."})
    difficulty: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": 'Of a generator, as JSON: fields of its configuration, such as {"min_terms": 4, "max_terms": 6}.'
        },
    )
    num_problems: int | None = field(
        default=None, metadata={"help": "How many; by default 1,000 of a generator, and all of a data set."}
    )
    problem_seed: int = field(default=0, metadata={"help": "Which of a generator's problems, from 0 to 1,000."})
    question_column: str = field(default="question", metadata={"help": "Column of questions."})
    answer_column: str = field(default="answer", metadata={"help": "Column of answers."})
    prompt_template: str = field(
        default="{question}", metadata={"help": "Text of a prompt, with {question} where the question goes."}
    )
    apply_chat_template: bool = field(
        default=True,
        metadata={"help": "Ask in the chat template; false for a base model, which continues the prompt's text."},
    )

    def __post_init__(self):
        self.difficulty = parse_difficulty("difficulty", self.difficulty)
        if "{question}" not in self.prompt_template:
            raise ValueError(
                f"--prompt_template is {self.prompt_template!r}: put {{question}} where the question goes."
            )

    def load(self) -> tuple[list[dict[str, str]], dict[str, Any]]:
        """The problems that were asked for, and their description."""
        return load_problems(
            self.dataset,
            self.dataset_split,
            self.num_problems,
            config=self.dataset_config,
            difficulty=self.difficulty,
            seed=self.problem_seed,
            question_column=self.question_column,
            answer_column=self.answer_column,
        )


def parse_difficulty(option: str, value: Any) -> dict[str, Any] | None:
    """The fields that `--difficulty` or another `option` like it gives, as JSON or as a mapping of a recipe."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f'--{option} is not JSON such as {{"max_terms": 4}}: {error}.') from error
    if value is not None and not isinstance(value, dict):
        raise ValueError(f'--{option} is {value!r}: give fields of a generator, such as {{"max_terms": 4}}.')
    return value


def held_out(question: str) -> bool:
    """Whether a generated problem belongs to the test split, whoever asks."""
    return hashlib.sha256(" ".join(question.split()).encode()).digest()[0] * HELD_OUT_SHARE < 256


def load_problems(
    dataset: str,
    split: str,
    size: int | None = None,
    *,
    config: str | None = None,
    difficulty: dict[str, Any] | None = None,
    seed: int = 0,
    question_column: str = "question",
    answer_column: str = "answer",
) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """Rows `question`, `answer` and `entry` (a generator's, as JSON, for its scorer; else empty), no question twice.

    Args:
        size: how many; by default 1,000 of a generator and all of a data set.
        config: of a data set of the Hub that has several.
        difficulty: of a generator, fields of its configuration.
        seed: of a generator, from 0 to 1,000: two seeds share no draw.

    Returns the rows and their description for `run.json`.

    Raises:
        ValueError: an unknown generator, split, field of a difficulty or column; fewer problems than were asked for.
        FileNotFoundError: no such data set.
    """
    if size is not None and size < 1:
        raise ValueError(f"{size} problems of {dataset} were asked for: ask for 1 or more.")
    if dataset.startswith(GENERATORS):
        size = 1000 if size is None else size
        problems = _generate(dataset.removeprefix(GENERATORS), split, size, difficulty or {}, seed)
        source = {"source": "generator", "info": _generator_info(dataset)}
        source |= {"difficulty": difficulty or {}, "seed": seed}
    else:
        if difficulty:
            raise ValueError(f"--difficulty is for generators, and {dataset} is a data set: leave it off.")
        problems = _read(dataset, config, split, size, question_column, answer_column)
        source = describe_source(local_path(dataset, None, SUFFIXES))
    digest = hashlib.sha256(json.dumps(problems, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:16]
    return problems, {"dataset": dataset, "split": split, "fingerprint": digest, "rows": len(problems)} | source


def without(problems: list[dict[str, str]], excluded: list[dict[str, str]]) -> list[dict[str, str]]:
    """The problems that are not among the `excluded`, as far as white space and case do not count."""
    known = {_normalised(problem["question"]) for problem in excluded}
    return [problem for problem in problems if _normalised(problem["question"]) not in known]


def prompt_of(question: str, prompt_template: str, apply_chat_template: bool) -> str | list[dict[str, str]]:
    """A text, or for chats one message of the user's."""
    text = prompt_template.replace("{question}", question)
    return [{"role": "user", "content": text}] if apply_chat_template else text


def _normalised(question: str) -> str:
    return " ".join(question.casefold().split())


def _generator_info(dataset: str) -> dict[str, str]:
    return {
        "name": f"reasoning-gym, {dataset.removeprefix(GENERATORS)}",
        "license": "Apache-2.0",
        "origin": "Drawn by a generator of [reasoning-gym](https://github.com/open-thought/reasoning-gym).",
    }


def _generate(name: str, split: str, size: int, difficulty: dict[str, Any], seed: int) -> list[dict[str, str]]:
    if find_spec("reasoning_gym") is None:
        raise ImportError("Generated problems need reasoning-gym: pip install 'hf_models[train]'.")
    from reasoning_gym.factory import DATASETS, create_dataset

    if name not in DATASETS:
        raise ValueError(f"reasoning-gym has no generator {name!r}: take one of {', '.join(sorted(DATASETS))}.")
    check_generator(name)
    if split not in SEEDS_OF_SPLIT:
        raise ValueError(f"A generator has the splits 'train' and 'test', not {split!r}.")
    if not 0 <= seed < 2**30 // SEEDS_A_DRAW:
        raise ValueError(f"--problem_seed is {seed}: give a seed from 0 to 1,000.")
    known = [field.name for field in dataclasses.fields(DATASETS[name][1]) if field.name not in ("seed", "size")]
    if unknown := difficulty.keys() - set(known):
        raise ValueError(f"--difficulty names {', '.join(sorted(unknown))}; {name} has {', '.join(known)}.")
    problems: dict[str, dict[str, str]] = {}
    # A difficulty may hold fewer problems than are asked for: what ever comes again says so.
    tried = min(SEEDS_A_DRAW, (1000 + 10 * size) * HELD_OUT_SHARE)
    for index in range(tried):
        if index % BLOCK == 0:
            first_seed = SEEDS_OF_SPLIT[split] + seed * SEEDS_A_DRAW + index
            try:
                generated = create_dataset(name, seed=first_seed, size=BLOCK, **difficulty)
            except (AssertionError, TypeError, ValueError) as error:
                raise ValueError(f"--difficulty {json.dumps(difficulty)} is refused by {name}: {error}.") from error
        entry = generated[index % BLOCK]
        question, answer = str(entry["question"]), entry["answer"]
        if held_out(question) != (split == "test") or question in problems:
            continue
        # JSON makes text of what it does not know (dates, fractions); the scorers that need such are few.
        text = json.dumps(entry, ensure_ascii=False, default=str)
        problems[question] = {"question": question, "answer": "" if answer is None else str(answer), "entry": text}
        if len(problems) == size:
            return list(problems.values())
    raise ValueError(
        f"{name} has only {len(problems)} different problems of this difficulty in the split {split!r}, and {size} "
        "were asked for: ask for fewer, or make --difficulty harder."
    )


def _read(
    dataset: str, config: str | None, split: str, size: int | None, question_column: str, answer_column: str
) -> list[dict[str, str]]:
    local = local_path(dataset, None, SUFFIXES)
    if local is None:
        rows = load_from_hub(dataset, split, config, streaming=False, modality=None)
    else:
        rows = load_local_files(local, split, config, _check_file, kinds=("parquet", "json"))
    for option, column in (("question_column", question_column), ("answer_column", answer_column)):
        if column not in rows.column_names:
            raise ValueError(
                f"{dataset} ({split}) has no column {column!r}, only {', '.join(rows.column_names)}: set --{option}."
            )
    problems: dict[str, dict[str, str]] = {}
    for number, row in enumerate(rows, start=1):
        question, answer = row[question_column], row[answer_column]
        if isinstance(answer, bool) or not isinstance(answer, str | int | float | None):
            raise ValueError(
                f"{dataset} ({split}), row {number} has the answer {str(answer)[:40]!r}: give a text or a number."
            )
        answer = "" if answer is None else str(answer).rsplit(FINAL_ANSWER, 1)[-1].strip()
        if not isinstance(question, str) or not question.strip() or not answer:
            raise ValueError(
                f"{dataset} ({split}), row {number} has no question or no answer ({question_column!r}, "
                f"{answer_column!r}): mend or remove the row."
            )
        problems.setdefault(_normalised(question), {"question": question, "answer": answer, "entry": ""})
    found = list(problems.values())
    if size is not None and size > len(found):
        raise ValueError(f"{dataset} ({split}) has {len(found)} different problems, and {size} were asked for.")
    return found[:size]


def _check_file(file, kind: str) -> None:
    if kind == "parquet":
        parquet_footer(file)
    else:
        check_utf8(file)
