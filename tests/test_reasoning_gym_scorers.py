"""Scorers of reasoning-gym: none that is used runs an answer, hangs on one or praises nonsense; arithmetic is exact."""

import contextlib
import json
import os
import subprocess
import sys
from fractions import Fraction

import pytest

from training.reasoning_gym_scorers import (
    CANNOT_BE_STORED,
    EVALUATES_ANSWERS,
    NOT_REPEATABLE,
    PRAISES_WRONG_ANSWERS,
    VERIFIERS,
    arithmetic,
    check_generator,
    generator_score,
)

CANARY = "zq7canary"
EVALUATED = [CANARY, f"[{CANARY}]", f"[[{CANARY}]]", f"{CANARY}+1", f"({CANARY})", f'{{"a": {CANARY}}}', f"{CANARY}=1"]
NONSENSE = [*EVALUATED, '__import__("os").getcwd()', "nan", "nanj", "nan+nanj", "inf", "-inf", "1e400", "1e999999999"]
NONSENSE += ["[1,2]", "1+1", "9**9**9", "null", "{}", "[]", '""', "\x00", "\ud800", "(" * 900, "[" * 3000, "9" * 4000]
NONSENSE += ["-" * 900, "¬" * 900, "zz " * 900, "9" * 10**6]
countdown = json.dumps({"answer": "x", "metadata": {"source_dataset": "countdown", "numbers": [3, 7, 7], "target": 0}})


def entry_of(name, **metadata):
    return json.dumps({"answer": "5", "metadata": {"source_dataset": name} | metadata})


def test_a_full_score_takes_the_number_itself():
    for answer in ("12", "12.0", "+12", "0,012"):
        assert generator_score(answer, json.dumps({"answer": "12", "metadata": {"source_dataset": "chain_sum"}})) == 1
    minus = json.dumps({"answer": "-12", "metadata": {"source_dataset": "chain_sum"}})
    assert generator_score("\N{MINUS SIGN}12", minus) == 1
    for answer in ("-13", "nan", "inf", "1e3", "", " ", "9" * 10**6, "x", "\ud800"):
        assert generator_score(answer, minus) < 1


@pytest.mark.parametrize(
    "name", sorted(EVALUATES_ANSWERS - VERIFIERS.keys() | PRAISES_WRONG_ANSWERS | CANNOT_BE_STORED | NOT_REPEATABLE)
)
def test_tasks_that_cannot_be_scored_safely_are_refused(name):
    with pytest.raises(ValueError, match=f"reasoning_gym:{name} .*: take another task"):
        check_generator(name)
    with pytest.raises(ValueError, match=f"reasoning_gym:{name} "):
        generator_score("1", entry_of(name))


def test_entries_without_a_known_task():
    with pytest.raises(ValueError, match="names no task"):
        generator_score("1", json.dumps({"answer": "1"}))
    with pytest.raises(ValueError, match="no task 'no_such_task'"):
        generator_score("1", entry_of("no_such_task"))


def test_arithmetic_is_exact_and_knows_its_numbers():
    assert arithmetic("(1 + 2) * 3 - 4 / 6") == (Fraction(25, 3), [1, 2, 3, 4, 6])
    assert arithmetic("−3 × 2 ÷ 7") == (Fraction(-6, 7), [3, 2, 7])
    assert arithmetic("1 - -1") == (2, [1, 1])


@pytest.mark.parametrize(
    "text",
    [
        "2**3", "7//2", "7%2", "1e3", "1.5", "0x10", "1_0", "True", "x", "f(1)", "(1)(2)", "1,2", "[1]", "2 if 1",
        '__import__("os")', "", "1+", "١+١", "(" * 150 + "1" + ")" * 49, "1+" * 99 + "1" * 9, "9" * 10**6, "1\n2",
    ],
)  # fmt: skip
def test_arithmetic_takes_nothing_else(text):
    with pytest.raises(ValueError, match=r"arithmetic of whole numbers|none of"):
        arithmetic(text)


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("3 * (7 - 7)", 1.0),
        ("(7-7)/3", 1.0),
        ("7 − 7 × 3", 0.0),
        ("7 - 7", 0.0),  # not all numbers
        ("3 * (7 - 7) * 7", 0.0),  # one twice
        ("0", 0.0),
        ("3*7*0*7", 0.0),
        ("3/(7-7)", 0.0),
        ("37 - 37", 0.0),
        ("(3-3)*7", 0.0),
    ],
)
def test_countdown_takes_each_number_once(answer, score):
    assert generator_score(answer, countdown) == score


def test_puzzle24_takes_the_given_numbers():
    entry = entry_of("puzzle24", numbers=[4, 6, 1, 1])
    assert generator_score("4 * 6 * 1 * 1", entry) == 1
    assert generator_score("6 * 4 + 1 - 1", entry) == 1
    # The task's own scorer takes any four small numbers.
    assert generator_score("3 * 8 * 1 * 1", entry) == 0


DRAW = """
import contextlib, hashlib, json, sys
from reasoning_gym.factory import DATASETS, create_dataset
drawn = {}
with contextlib.redirect_stdout(sys.stderr):
    for name in sorted(DATASETS.keys() - {"composite"}):
        problems = [repr(create_dataset(name, size=6, seed=7)[i]["question"]) for i in range(6)]
        drawn[name] = hashlib.sha256("".join(problems).encode()).hexdigest()
print(json.dumps(drawn))
"""


@pytest.mark.slow
def test_no_other_task_of_the_installed_version_draws_other_problems_at_each_start():
    one, other = (
        json.loads(
            subprocess.run(
                [sys.executable, "-c", DRAW],
                env={**os.environ, "PYTHONHASHSEED": seed},
                capture_output=True,
                text=True,
                check=True,
                timeout=300,
            ).stdout
        )
        for seed in ("1", "2")
    )
    refused = NOT_REPEATABLE | CANNOT_BE_STORED | EVALUATES_ANSWERS - VERIFIERS.keys()
    assert {name for name in one if one[name] != other[name]} <= refused


recorded: list[str] | None = None


def record(event, arguments):
    if recorded is not None and event == "compile" and CANARY in str(arguments[0]):
        recorded.append(str(arguments[0]))


@pytest.mark.slow
def test_no_other_task_of_the_installed_version_evaluates_answers_or_praises_nonsense():
    global recorded
    from reasoning_gym.factory import DATASETS, create_dataset, get_score_answer_fn

    sys.addaudithook(record)
    evaluating = set()
    for name in sorted(DATASETS.keys() - {"composite"}):
        generator, score = create_dataset(name, size=3, seed=7), get_score_answer_fn(name)
        for index in range(3):
            entry = generator[index]
            known = entry["answer"] if isinstance(entry["answer"], str) else ""
            for answer in [*EVALUATED, f"{known}+{CANARY}", known[: len(known) // 2] + CANARY, f"[{known}, {CANARY}]"]:
                recorded = []
                with contextlib.suppress(Exception):
                    score(answer, entry)
                if recorded:
                    evaluating.add(name)
                recorded = None
            refused = EVALUATES_ANSWERS - VERIFIERS.keys() | PRAISES_WRONG_ANSWERS | CANNOT_BE_STORED
            if name in refused | NOT_REPEATABLE:
                continue
            stored = json.dumps(entry, ensure_ascii=False, default=str)
            example = entry["metadata"].get("example_answer", entry["metadata"].get("example_correct_answer"))
            assert not (known or example) or generator_score(known or example, stored) == 1, name
            wrong = [answer for answer in NONSENSE if generator_score(answer, stored) >= 1]
            assert wrong in ([], [known]), name
    assert evaluating == EVALUATES_ANSWERS
