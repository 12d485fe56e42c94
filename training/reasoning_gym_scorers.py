"""The scorers of reasoning-gym's tasks, without those that would run what a model writes or that can be fooled.

Many of these tasks have no single right answer, so each brings a function that scores one. What a model writes is
data: the scorers that hand it to Python's `eval` or to sympy's `parse_expr`, which evaluates too, are refused, but for
two that are replaced by an arithmetic of our own. `EVALUATES_ANSWERS` and the sets below it were found by scoring
hostile answers to entries of every task (reasoning-gym 0.1.25) with an audit hook that sees whatever is compiled or
executed; a test does it again, so that a new version cannot bring others unseen. (`number_sorting` and
`bitwise_arithmetic` evaluate too, but only the entry, which comes from their own generators.)
"""

import ast
import functools
import json
import math
import operator
import re
from collections.abc import Callable
from fractions import Fraction
from importlib.util import find_spec
from typing import Any

# These scorers evaluate the answer as Python. Countdown and puzzle24 are verified here instead.
EVALUATES_ANSWERS = frozenset(
    {
        "binary_matrix",
        "countdown",
        "intermediate_integration",
        "n_queens",
        "polynomial_multiplication",
        "puzzle24",
        "simple_integration",
        "spiral_matrix",
        "string_insertion",
    }
)
# Full score for any answer that is not empty; and for any that the known one's digits begin with, such as 0.
PRAISES_WRONG_ANSWERS = frozenset({"coin_flip", "game_of_life_halting"})
# Not even the right answer gets a full score once the entry has been stored as JSON (tuples become lists); and one
# that takes its scorer from other tasks, which its name does not tell.
CANNOT_BE_STORED = frozenset({"arc_agi", "composite", "rearc"})
# Drawn from sets of texts, whose order differs from one start of Python to the next; and by programs (codeio) whose
# results depend on what ran before.
NOT_REPEATABLE = frozenset({"codeio", "isomorphic_strings", "list_functions", "ransom_note", "word_ladder"})

MAX_ANSWER = 4000  # characters
# What floats and fractions are read from: not a number, endless, or of so large a power of ten that it never ends.
NOT_FINITE = re.compile(r"(?<![a-z])(?:nan|inf|infinity)[ij]?(?![a-z])", flags=re.IGNORECASE)
LARGE_POWER = re.compile(r"(?<!\w)[\d_.]++e[-+]?[\d_]{4,}", flags=re.IGNORECASE)


def check_generator(name: str) -> None:
    """Raises ValueError, in one sentence, for a task of reasoning-gym whose answers are not scored here."""
    if name in EVALUATES_ANSWERS - VERIFIERS.keys():
        raise ValueError(f"reasoning_gym:{name} evaluates answers as code to score them: take another task.")
    if name in PRAISES_WRONG_ANSWERS:
        raise ValueError(f"reasoning_gym:{name} gives wrong answers a full score: take another task.")
    if name in CANNOT_BE_STORED:
        raise ValueError(f"reasoning_gym:{name} cannot score an entry that was stored as JSON: take another task.")
    if name in NOT_REPEATABLE:
        raise ValueError(f"reasoning_gym:{name} draws other problems each time, whatever the seed: take another task.")


def generator_score(answer: str, entry: str) -> float:
    """What the scorer of its task gives an answer, from 0 to 1; partial scores as they are.

    0 as well for an answer that is too long, not finite, or makes the scorer fail.

    Args:
        entry: JSON of the task's entry, as its generator made it: some scorers evaluate that.

    Raises ValueError for an entry without a task's name, and for one of a task that `check_generator` refuses.
    """
    parsed = json.loads(entry)
    name = parsed.get("metadata", {}).get("source_dataset") if isinstance(parsed, dict) else None
    if name is None:
        raise ValueError(f"The entry {entry[:80]!r} names no task: it needs metadata.source_dataset.")
    known = str(parsed.get("answer"))
    answer = answer.strip()
    if "\N{MINUS SIGN}" not in known:
        answer = answer.replace("\N{MINUS SIGN}", "-")
    score = _scorer(name)
    if not 0 < len(answer) <= MAX_ANSWER:
        return 0.0
    if answer != known and (NOT_FINITE.search(answer) or LARGE_POWER.search(answer)):
        return 0.0
    try:
        value = float(score(answer, parsed))
    except Exception:  # a scorer's way to refuse what it cannot read
        return 0.0
    return min(max(value, 0.0), 1.0) if math.isfinite(value) else 0.0


@functools.cache
def _scorer(name: str) -> Callable[[str, dict[str, Any]], float]:
    check_generator(name)
    if name in VERIFIERS:
        return VERIFIERS[name]
    if find_spec("reasoning_gym") is None:
        raise ImportError("Generated problems need reasoning-gym: pip install 'hf_models[train]'.")
    from reasoning_gym.factory import DATASETS, get_score_answer_fn

    if name not in DATASETS:
        raise ValueError(f"reasoning-gym has no task {name!r}, which an entry names: install the version that has.")
    return get_score_answer_fn(name)


# ---- arithmetic ------------------------------------------------------------------------------------------------------

MAX_EXPRESSION = 200  # characters
OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def arithmetic(text: str) -> tuple[Fraction, list[int]]:
    """The exact value of an expression of whole numbers, + - * / and brackets, and the numbers in it.

    Raises ValueError for anything else, ZeroDivisionError for a division by zero.
    """
    for sign, ascii_sign in {"\N{MINUS SIGN}": "-", "×": "*", "÷": "/"}.items():
        text = text.replace(sign, ascii_sign)
    if len(text) > MAX_EXPRESSION or re.fullmatch(r"[0-9+\-*/()\s]+", text) is None:
        raise ValueError(f"{text[:40]!r} is no arithmetic of whole numbers.")
    try:
        tree = ast.parse(" ".join(text.split()), mode="eval").body
    except (SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError(f"{text[:40]!r} is no arithmetic of whole numbers.") from error
    numbers: list[int] = []
    return _value(tree, numbers), numbers


def _value(node: ast.expr, numbers: list[int]) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        numbers.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](_value(node.left, numbers), _value(node.right, numbers))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        value = _value(node.operand, numbers)
        return value if isinstance(node.op, ast.UAdd) else -value
    raise ValueError("An operation that is none of + - * /.")


def _reaches(target: int, answer: str, entry: dict[str, Any]) -> float:
    """1.0 for an expression that has the target's value and takes each of the entry's numbers once."""
    value, used = arithmetic(answer)
    return float(value == target and sorted(used) == sorted(entry["metadata"]["numbers"]))


VERIFIERS = {
    "countdown": lambda answer, entry: _reaches(entry["metadata"]["target"], answer, entry),
    "puzzle24": lambda answer, entry: _reaches(24, answer, entry),
}
