"""Multiple-choice questions made of the sample `wikipedia_leads`, for the tasks in the YAML files beside this one.

Held-out leads become the questions, training leads the examples of few-shot prompts. The wrong choices are drawn by a
generator seeded with the lead's number, so that every run asks the same questions in the same order. Those of
`titles` and `endings` come from leads of the same topic, so that the topic alone does not tell which is right.
"""

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets

LEADS = Path(__file__).parent.parent / "sample_data" / "wikipedia_leads"
CHOICES = 4
# Few-shot examples are drawn from so many training leads, evenly spread.
EXAMPLE_LEADS = 500
# Sentences, told apart crudely: one has 40 characters at least, so that "St." or "c." ends none.
SENTENCE = re.compile(r".{40,}?[a-z)\]][.!?](?= [A-Z]|$)", flags=re.DOTALL)


def titles(**_) -> dict[str, datasets.Dataset]:
    """Of a lead's first sentence: which of four titles of the same topic is its own?"""
    return _splits(lambda lead, peers, draw: _choose(lead["title"], [peer["title"] for peer in peers], draw))


def topics(**_) -> dict[str, datasets.Dataset]:
    """Of a lead's first sentence: which of four topics was it filed under?"""

    def question(lead, peers, draw):
        return None if lead["topic"] == "Uncategorized" else _choose(lead["topic"], TOPICS, draw)

    return _splits(question)


def endings(**_) -> dict[str, datasets.Dataset]:
    """Of a lead's first sentence: which of four is the second? Leads of one sentence ask nothing."""

    def question(lead, peers, draw):
        if not lead["ending"]:
            return None
        return _choose(lead["ending"], [peer["ending"] for peer in peers if peer["ending"]], draw)

    return _splits(question)


TOPICS = [
    "Arts",
    "Biology and health sciences",
    "Everyday life",
    "Geography",
    "History",
    "Mathematics",
    "People",
    "Philosophy and religion",
    "Physical sciences",
    "Society and social sciences",
    "Technology",
]


def _choose(right: str, others: list[str], draw: random.Random) -> dict[str, Any]:
    """`choices`, and the place of the right one among them as `label`."""
    choices = [right, *draw.sample([other for other in others if other != right], CHOICES - 1)]
    draw.shuffle(choices)
    return {"choices": choices, "label": choices.index(right)}


def _splits(question: Callable[[dict, list[dict], random.Random], dict | None]) -> dict[str, datasets.Dataset]:
    test, train = (datasets.load_dataset(str(LEADS), split=split) for split in ("test", "train"))
    train = train.select(range(0, len(train), len(train) // EXAMPLE_LEADS))
    return {"train": _questions(train, question), "test": _questions(test, question)}


def _questions(leads: datasets.Dataset, question: Callable) -> datasets.Dataset:
    rows = []
    for row in leads:
        first, second = (*SENTENCE.findall(row["text"]), "", "")[:2]
        rows.append(row | {"beginning": first or row["text"], "ending": second.strip()})
    by_topic: dict[str, list[dict]] = {}
    for row in rows:
        by_topic.setdefault(row["topic"], []).append(row)
    asked = [row | (question(row, by_topic[row["topic"]], random.Random(i)) or {}) for i, row in enumerate(rows)]
    return datasets.Dataset.from_list([row for row in asked if "choices" in row])
