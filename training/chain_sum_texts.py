"""Writes pretraining text from which a small model learns to add: worked chain sums in several styles, among prose.

    python -m training.chain_sum_texts --output_dir runs/r1_demo/texts

The text of the demonstration of reinforcement learning (`training.r1`), whose base has to know what it is to select:
- facts, a step each: `12+7=19`;
- questions of reasoning-gym's `chain_sum` and an answer in one of the styles of `WORKED` and `DIRECT`. Few are worked
  and tagged: a base that always answered so would leave nothing to reinforcement learning but arithmetic. Direct
  answers are wrong now and then, and some of the steps too, as in text from the web;
- articles of the sample `wikipedia_leads`.
No question of the test split of `chain_sum` is in it (see `training.problems.held_out`). Writes train.jsonl and
test.jsonl, one document a line, which `--dataset` takes, and info.json.
"""

import json
import math
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .command_line import parse_arguments, plain_errors
from .problems import load_problems
from .run_record import replace_file
from .text_data import iterate_texts, load_text_dataset

PROMPT = "Question: {question}\nAnswer:"
# Weights of the ways to answer, those that show their steps ("tagged" and "cut" between tags) and those that do not.
# The steps begin in several ways, so that "The answer is" is the likeliest beginning of all: left to itself the base
# answers at once, which it is bad at, and has to find out that working pays.
WORKED = {"worked": 17, "step_by_step": 14, "work_it_out": 14, "tagged": 15, "cut": 7}
OPENINGS = {"worked": "", "step_by_step": " Step by step:", "work_it_out": " Let me work it out:"}
DIRECT = {"sentence": 26, "number": 3, "answer_tag": 2, "refusal": 2}
WRONG_ANSWERS = 0.2  # of those that are given directly
WRONG_STEPS = 0.05
FACTS_A_DOCUMENT = 8
BEGUN = "unfinished"  # a file in a folder that is being written, or was when the command was killed
# There are 200 sums of two digits and 4,000 of three, of which nine in ten are not held out.
MOST_SHORT = {2: 150, 3: 3000}
# Beyond --max_terms, the first length has half of this share of the others' number, and each further one half again. A
# base that has met no sum of 11 solves one in twenty-five of them, however well it does at 10, and reinforcement
# learning chooses only among what is sampled.
RARE_SHARE = 0.2
ABOUT = {
    "name": "Worked chain sums, and Wikipedia leads (English)",
    "modality": "text",
    "license": "cc-by-sa-4.0",
    "language": ["en"],
    "origin": "Sums of reasoning-gym's chain_sum (Apache-2.0) answered by a rule, and articles of the sample "
    "`wikipedia_leads`.",
    "attribution": "Articles by Wikipedia's contributors, "
    "[CC BY-SA 4.0](https://creativecommons.org/licenses/by-sa/4.0/). The authors of an article are listed in its "
    "history at `https://en.wikipedia.org/wiki/TITLE?action=history`. Whoever passes the texts on keeps this notice "
    "and the licence.",
}


@dataclass
class TextArguments:
    output_dir: str = field(default="runs/r1_demo/texts", metadata={"help": "The folder to write, new."})
    num_problems: int = field(default=110_000, metadata={"help": "Questions, as many of each length as there are."})
    num_facts: int = field(default=25_000, metadata={"help": f"Documents of {FACTS_A_DOCUMENT} facts."})
    num_articles: int = field(default=800, metadata={"help": "Articles of wikipedia_leads."})
    min_terms: int = field(default=2, metadata={"help": "Fewest terms of a sum."})
    max_terms: int = field(default=10, metadata={"help": "Most terms of a sum."})
    rare_max_terms: int = field(
        default=0, metadata={"help": "Most terms of the few sums that are longer; by default there are none."}
    )
    num_test: int = field(default=500, metadata={"help": "Documents of the held-out split."})
    worked_share: float = field(default=0.43, metadata={"help": "Share of the answers that show their steps."})
    seed: int = field(default=0, metadata={"help": "Of styles, mistakes and order."})

    def __post_init__(self):
        if self.min_terms > self.max_terms:
            raise ValueError(
                f"--min_terms {self.min_terms} is more than --max_terms {self.max_terms}: give at most that."
            )


def steps_of(expression: str, rng: random.Random, wrong_share: float) -> tuple[list[str], int]:
    """ "9 - 3 + 6" -> (["9-3=6", "6+6=12"], 12). A wrong step is off by one or two, and is carried on."""
    first, *rest = expression.split()
    total, steps = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        result = total + int(term) if sign == "+" else total - int(term)
        if rng.random() < wrong_share:
            result += rng.choice((-2, -1, 1, 2))
        steps.append(f"{total}{sign}{term}={result}")
        total = result
    return steps, total


def answer_in(style: str, expression: str, answer: str, rng: random.Random) -> str:
    """What follows "Answer:"."""
    direct = answer
    if style in ("number", "sentence", "answer_tag") and rng.random() < WRONG_ANSWERS:
        direct = str(int(answer) + rng.choice((-3, -2, -1, 1, 2, 3, 10, -10)))
    steps, worked = steps_of(expression, rng, WRONG_STEPS)
    match style:
        case "number":
            return f" {direct}"
        case "sentence":
            return f" The answer is {direct}."
        case "answer_tag":
            return f"<answer>{direct}</answer>"
        case "worked" | "step_by_step" | "work_it_out":
            return f"{OPENINGS[style]} {' '.join(steps)}"
        case "tagged":
            return f"<think>{' '.join(steps)}</think><answer>{worked}</answer>"
        case "cut":
            return f"<think>{' '.join(steps[: rng.randint(0, len(steps) - 1)])}"
    return " I do not know."


def fact(rng: random.Random) -> str:
    total, term, sign = rng.randint(-60, 90), rng.randint(0, 9), rng.choice("+-")
    return f"{total}{sign}{term}={total + term if sign == '+' else total - term}"


def write_texts(arguments: TextArguments) -> dict[str, int]:
    """Writes the folder; returns the number of documents of each kind."""
    rng = random.Random(arguments.seed)
    documents = [" ".join(fact(rng) for _ in range(FACTS_A_DOCUMENT)) for _ in range(arguments.num_facts)]
    articles = load_text_dataset("wikipedia_leads", f"train[:{arguments.num_articles}]")
    documents += iterate_texts(articles)
    # As many of each length, rather than of each problem drawn, where the short ones would soon come again.
    common = arguments.num_problems / (arguments.max_terms + 1 - arguments.min_terms)
    problems = []
    for terms in range(arguments.min_terms, max(arguments.max_terms, arguments.rare_max_terms) + 1):
        difficulty = {"min_terms": terms, "max_terms": terms, "min_digits": 1, "max_digits": 1}
        beyond = terms - arguments.max_terms
        size = math.ceil(common if beyond <= 0 else common * RARE_SHARE / 2**beyond)
        size = min(size, MOST_SHORT.get(terms, size))
        problems += load_problems("reasoning_gym:chain_sum", "train", size, difficulty=difficulty, seed=900)[0]
    for problem in problems:
        expression = json.loads(problem["entry"])["metadata"]["expression"]
        styles = WORKED if rng.random() < arguments.worked_share else DIRECT
        style = rng.choices(list(styles), styles.values())[0]
        documents.append(
            PROMPT.replace("{question}", problem["question"]) + answer_in(style, expression, problem["answer"], rng)
        )
    rng.shuffle(documents)
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / BEGUN).touch()
    splits = {"test": documents[: arguments.num_test], "train": documents[arguments.num_test :]}
    for split, texts in splits.items():
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        replace_file(folder / f"{split}.jsonl", "".join(lines))
    counts = {"problems": len(problems), "facts": arguments.num_facts, "articles": arguments.num_articles}
    # Written last: it says that the folder is whole.
    info = ABOUT | {"counts": counts, "arguments": asked(arguments)}
    replace_file(folder / "info.json", json.dumps(info, indent=2, ensure_ascii=False) + "\n")
    (folder / BEGUN).unlink()
    return counts


def asked(arguments: TextArguments) -> dict[str, int]:
    return {name: value for name, value in asdict(arguments).items() if name != "output_dir"}


def main() -> None:
    with plain_errors():
        arguments, _ = parse_arguments(TextArguments, description=__doc__)
        info = Path(arguments.output_dir) / "info.json"
        if info.is_file():
            if json.loads(info.read_text(encoding="utf-8")).get("arguments") != asked(arguments):
                raise ValueError(f"{info.parent} holds other texts: choose another --output_dir, or delete this one.")
            print(f"{info.parent} holds these texts.")
            return
        others = [path.name for path in info.parent.iterdir()] if info.parent.is_dir() else []
        if others and not (info.parent / BEGUN).is_file():
            raise ValueError(f"{info.parent} holds other files ({others[0]}): choose another --output_dir.")
        counts = write_texts(arguments)
        print(f"{arguments.output_dir}: " + ", ".join(f"{count:,} {kind}" for kind, count in counts.items()))


if __name__ == "__main__":
    main()
