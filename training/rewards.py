"""Rewards that can be computed: is the answer right, is it where it was asked for, is the reply no longer than needed.

Plain functions of TRL's signature, `f(prompts, completions, **columns) -> list[float | None]`, by name in `REWARDS`;
a row with neither an `answer` nor an `entry` has nothing to compute from, and gets None. Notable here:
- `answer_score` is the one definition of a right answer. It reads the answer only where it stands by itself: two
  answers, or one inside the thoughts, are none, for a model that is rewarded for them learns to list guesses;
- `accuracy` is 1.0 for a full score and 0.0 otherwise. Scorers of reasoning-gym give part of the score to wrong
  answers that look right, which a model learns to collect; `reasoning_gym` passes their scores on for who wants them;
- a number has to be given as a number: "3 + 4" is no answer where 7 is known, though it is equal;
- nothing that a model writes is evaluated as code (`reasoning_gym_scorers`, `symbolic_answer`);
- `checked` stops a run at a reward that fails, by its name and with the sample.
"""

import importlib
import math
import re
import threading
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification
from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment

from .exact_match import NUMBER, given_answer, is_right
from .language_models import load_language_model, load_tokenizer
from .reasoning_gym_scorers import MAX_ANSWER, generator_score
from .symbolic_answer import symbolically_equal

Reward = Callable[..., list[float | None]]

TAG = re.compile(r"</?(?:think|answer)>", flags=re.IGNORECASE)
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
WHOLE = re.compile(r"\s*<think>(.+?)</think>\s*<answer>(.+?)</answer>\s*", flags=re.DOTALL)
# Each tag in its place; the rest is for a reply of nothing but thoughts and answer.
TAG_CREDIT = 0.15
FRACTION = re.compile(r"([-+]?)\s*(?:\\[dt]?frac\{(\d+)\}\{(\d+)\}|(\d+)\s*/\s*(\d+))")
SCIENTIFIC = re.compile(
    r"([-+]?\d+(?:\.\d+)?)(?:e|\s*(?:\\times|\\cdot|[*×·])\s*10\s*(?:\^|\*\*)\s*)\{?([-+]?\d{1,3})\}?",
    flags=re.IGNORECASE,
)
# Around the one number of an answer: what only sets it, and what makes another number of it.
WRAPPING = re.compile(r"\\boxed\{|\\text\{[^{}]*\}|\\[$(\[]")
OPERATES_BEFORE = re.compile(r"[-+*/^<>√≠≤≥\\]|\b(?:not|minus|negative)\b", flags=re.IGNORECASE)
OPERATES_AFTER = re.compile(
    r"[-+*/^!²³<>]|\\(?:pi|sqrt|times|cdot|infty)|(?:hundred|thousand|[mb]illion|trillion)\b", flags=re.IGNORECASE
)
# Lengths from which a reply is punished, as a share of the longest: 4,096 of 20,480 tokens (arXiv 2503.14476).
PUNISHED_SHARE = 0.2


# ---- what a reply says -----------------------------------------------------------------------------------------------


def answer_score(reply: str, answer: str, entry: str = "") -> float:
    """How right the reply's answer is, from 0 to 1: by the scorer of the entry's task, or else by the known answer.

    With answer tags there has to be one pair, after the thoughts and not in them; without, the answer is what
    `given_answer` finds after </think>. A reply that opens thoughts and does not close them has no answer.
    """
    given, tagged = _extract(reply)
    if given is None or len(given) > MAX_ANSWER:
        return 0.0
    if entry:
        return generator_score(given if tagged else given_answer(given, answer), entry)
    return float(_exact(given, answer, tagged) or _symbolic(given, answer))


def lenient_score(reply: str, answer: str, entry: str = "") -> float:
    """As `answer_score`, of the answer that `given_answer` finds: the last one, wherever it stands."""
    given = given_answer(reply, answer)
    if len(given) > MAX_ANSWER:
        return 0.0
    if entry:
        return generator_score(given, entry)
    return float(is_right(given, answer) or _symbolic(given, answer))


def format_score(reply: str) -> float:
    """1.0 for `<think>...</think>`, `<answer>...</answer>`, neither empty, and nothing else but white space.

    Otherwise 0.15 for each tag that is there once and in its place, a closing one only after some content: so a model
    that never gets all of it right has something to learn from, and neither repeating tags nor empty ones pay.
    """
    tags = list(TAG.finditer(reply))
    whole = WHOLE.fullmatch(reply)
    if whole and [tag[0] for tag in tags] == list(TAGS) and whole[1].strip() and whole[2].strip():
        return 1.0
    score, last = 0.0, None
    for name in TAGS:
        here = [tag for tag in tags if tag[0] == name]
        if len(here) != 1 or (last is not None and here[0].start() < last.end()):
            continue
        empty = name.startswith("</") and not (
            last is not None and last[0] == name.replace("/", "") and reply[last.end() : here[0].start()].strip()
        )
        score += 0.0 if empty else TAG_CREDIT
        last = here[0]
    return round(score, 2)


def is_strict(reply: str, answer: str, entry: str = "") -> bool:
    """Whether the answer is right and the reply nothing but thoughts and answer."""
    return format_score(reply) == 1.0 and answer_score(reply, answer, entry) >= 1.0


def _extract(reply: str) -> tuple[str | None, bool]:
    """The text that holds the answer, None where there is no single one, and whether it stood in answer tags."""
    tags = list(TAG.finditer(reply))
    names = [tag[0].lower() for tag in tags]
    thoughts = [i for i, name in enumerate(names) if name.endswith("think>")]
    if thoughts and names[thoughts[-1]] == "<think>":
        return None, False
    rest = thoughts[-1] + 1 if thoughts else 0
    if names[rest:] == ["<answer>", "</answer>"] and "<answer>" not in names[:rest] and "</answer>" not in names[:rest]:
        return reply[tags[rest].end() : tags[rest + 1].start()].strip(), True
    if "<answer>" in names or "</answer>" in names:
        return None, False
    return reply[tags[rest - 1].end() if rest else 0 :].strip(), False


def _exact(given: str, answer: str, tagged: bool) -> bool:
    """By text or by number. In answer tags there may be one number, with a unit say; elsewhere the last one counts."""
    given, answer = _plain_digits(given), _plain_digits(answer)
    if not tagged:
        return is_right(given_answer(given, answer), answer)
    if NUMBER.fullmatch(answer.strip()) is None:
        return is_right(given, answer)
    numbers = list(NUMBER.finditer(given))
    if len(numbers) == 1:
        before, after = WRAPPING.sub("", given[: numbers[0].start()]), given[numbers[0].end() :].lstrip(" }")
        # Whatever is done to the number makes another one of it.
        if not OPERATES_BEFORE.search(before) and not OPERATES_AFTER.match(after):
            return is_right(numbers[0][0], answer)
    known = _rational(answer)
    return known is not None and _rational(given) == known


def _symbolic(given: str, answer: str) -> bool:
    """Whether the two are one formula. Known numbers are left to `_rational`: sympy would work out "3 + 4"."""
    known = _rational(answer)
    return symbolically_equal(given, answer) if known is None else _rational(given) == known


def _rational(text: str) -> Fraction | None:
    """The number that is the whole of the text: 1,000; 0.5; 1e3; 5 \\times 10^2; 1/2, \\frac{1}{2} in lowest terms."""
    text = _plain_digits(text).strip().strip("$").strip().rstrip(".")
    if len(text) > MAX_ANSWER:
        return None
    if NUMBER.fullmatch(text):
        return Fraction(text.replace(",", ""))
    if scientific := SCIENTIFIC.fullmatch(text):
        return Fraction(scientific[1]) * Fraction(10) ** int(scientific[2])
    if fraction := FRACTION.fullmatch(text):
        above, below = int(fraction[2] or fraction[4]), int(fraction[3] or fraction[5])
        # 10/2 is a question, and no answer to it.
        if below > 1 and math.gcd(above, below) == 1:
            return Fraction(-above if fraction[1] == "-" else above, below)
    return None


def _plain_digits(text: str) -> str:
    """Without what LaTeX puts between groups of digits, 1{,}000 or 1\\,000, and with the minus sign of keyboards."""
    text = re.sub(r"(?<=\d)(?:\{,\}|,?\\[,!])(?=\d{3})", "", text)
    return text.replace("\N{MINUS SIGN}", "-")


# ---- rewards by name -------------------------------------------------------------------------------------------------


def accuracy(completions: list, **columns: Any) -> list[float | None]:
    """1.0 where `answer_score` is full, 0.0 otherwise."""
    return _by_row(lambda *row: float(answer_score(*row) >= 1.0), completions, columns)


def exact(completions: list, **columns: Any) -> list[float | None]:
    """1.0 where the answer equals the known one as text or number; entries are not looked at."""

    def score(reply, answer, entry):
        given, tagged = _extract(reply)
        return float(given is not None and len(given) <= MAX_ANSWER and _exact(given, answer, tagged))

    return _by_row(score, completions, columns, needs="answer")


def symbolic(completions: list, **columns: Any) -> list[float | None]:
    """1.0 where the answer equals the known one as text, number or formula; entries are not looked at."""
    return _by_row(lambda reply, answer, entry: answer_score(reply, answer), completions, columns, needs="answer")


def reasoning_gym(completions: list, **columns: Any) -> list[float | None]:
    """`answer_score` as it is, with the parts of a score that reasoning-gym gives to wrong answers."""
    return _by_row(answer_score, completions, columns, needs="entry")


def format_reward(completions: list, **columns: Any) -> list[float | None]:
    """`format_score`."""
    return _by_row(lambda reply, answer, entry: format_score(reply), completions, columns)


def repetition(completions: list, completion_ids: list[list[int]], **columns: Any) -> list[float | None]:
    """From 0.0 to -1.0: minus the share of the tokens' 3-grams that were there before (arXiv 2502.03373, C.2)."""
    penalties = iter(get_repetition_penalty_reward(ngram_size=3, max_penalty=-1.0)(completion_ids=completion_ids))
    return [penalty if row else None for penalty, row in zip(penalties, _rows(completions, columns), strict=True)]


def length(
    completions: list, completion_ids: list[list[int]], *, max_completion_length: int, **columns: Any
) -> list[float | None]:
    """From 0.0, up to 80 % of the longest completion, in a straight line to -1.0 (DAPO, arXiv 2503.14476, eq. 13)."""
    cache = max(1, round(PUNISHED_SHARE * max_completion_length))
    penalties = get_soft_overlong_punishment(max_completion_length, cache)(completion_ids=completion_ids)
    return [penalty if row else None for penalty, row in zip(penalties, _rows(completions, columns), strict=True)]


REWARDS: dict[str, Reward] = {
    "accuracy": accuracy,
    "exact": exact,
    "symbolic": symbolic,
    "reasoning_gym": reasoning_gym,
    "format": format_reward,
    "length": length,
    "repetition": repetition,
}


def reward_by_name(name: str, max_completion_length: int) -> Reward:
    """One of `REWARDS`, or a function of the user's own by its import path, `module.function`.

    Raises ValueError where there is none of that name.
    """
    if name == "length":
        return lambda **columns: length(max_completion_length=max_completion_length, **columns)
    if name in REWARDS:
        return REWARDS[name]
    module, _, function = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), function) if module else None
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"The reward {name!r} cannot be imported ({error}): give module.function.") from error
    if not callable(found):
        raise ValueError(f"There is no reward {name!r}: name one of {', '.join(REWARDS)}, or module.function.")
    return found


def _by_row(score: Callable[[str, str, str], float], completions: list, columns: dict, needs: str = "") -> list:
    """The score of each reply, and None where its row has not what the score `needs`."""
    place = {"answer": 0, "entry": 1}.get(needs)
    return [
        score(_text(completion), *row) if row and (place is None or row[place]) else None
        for completion, row in zip(completions, _rows(completions, columns), strict=True)
    ]


def _rows(completions: list, columns: dict[str, Any]) -> list[tuple[str, str] | None]:
    """Of each completion (answer, entry), texts; None where both are empty."""
    nothing = [None] * len(completions)
    answers, entries = columns.get("answer", nothing), columns.get("entry", nothing)
    rows = zip(answers, entries, strict=True)
    return [
        ("" if answer is None else str(answer), entry or "") if answer not in (None, "") or entry else None
        for answer, entry in rows
    ]


def _text(completion: str | list[dict[str, str]]) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


# ---- a model's opinion -----------------------------------------------------------------------------------------------


def reward_model(path: str, device: torch.device | str, batch_size: int = 16) -> Reward:
    """A reward function: the score that the model at `path`, of `training.reward`, gives prompt and completion.

    It scores the rows that have no known answer; a text is read as a question and its answer. Of a conversation that is
    longer than the model's context, the end counts.

    Raises ValueError for what is no reward model, and for one without a chat template.
    """
    tokenizer = load_tokenizer(path)
    model = load_language_model(path, auto_class=AutoModelForSequenceClassification).to(device).eval()
    if model.config.num_labels != 1:
        raise ValueError(
            f"{path} gives {model.config.num_labels} scores and a reward is one: make it by training.reward."
        )
    if not tokenizer.chat_template:
        raise ValueError(f"The tokenizer of {path} has no chat template: give a reward model of conversations.")
    context = getattr(model.config, "max_position_embeddings", None) or 0
    padding = next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)
    # By this transformers' own models find the last token, whatever the mask says.
    model.config.get_text_config().pad_token_id = padding

    @torch.no_grad()
    def score(prompts: list, completions: list, **columns: Any) -> list[float | None]:
        rows = _rows(completions, columns)
        asked = [i for i, row in enumerate(rows) if row is None]
        conversations = [_conversation(prompts[i], completions[i]) for i in asked]
        ids = [tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"] for messages in conversations]
        ids = [tokens[-context:] for tokens in ids]
        scores: list[float | None] = [None] * len(completions)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # little padding
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            longest = len(ids[batch[-1]])
            input_ids = torch.tensor([ids[i] + [padding] * (longest - len(ids[i])) for i in batch], device=device)
            lengths = torch.tensor([[len(ids[i])] for i in batch], device=device)
            mask = (torch.arange(longest, device=device) < lengths).long()
            logits = model(input_ids=input_ids, attention_mask=mask).logits[:, 0].float().tolist()
            for i, value in zip(batch, logits, strict=True):
                scores[asked[i]] = value
        return scores

    score.__name__ = "reward_model"
    return score


def _conversation(prompt: str | list[dict[str, str]], completion: str | list[dict[str, str]]) -> list[dict[str, str]]:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return [*messages, {"role": "assistant", "content": _text(completion)}]


# ---- rewards that fail -----------------------------------------------------------------------------------------------


class RewardError(ValueError):
    """A reward function failed: the message names it and shows the sample."""


def checked(name: str, function: Reward, timeout_seconds: float) -> Reward:
    """The reward function, under its `name`, which raises RewardError for whatever is no list of rewards.

    That is: an exception, more than `timeout_seconds` for a batch, another number of values than completions, a value
    that is neither a finite number nor None. To find the sample the rows are then scored one by one.

    The function runs in a thread, which is no longer waited for after the time. A signal's handler could stop it, but
    a reward may not be called in the main thread, and may set that signal itself, as math-verify does.
    """

    def reward(prompts: list, completions: list, **columns: Any) -> list[float | None]:
        values, fault = _attempt(function, prompts, completions, columns, timeout_seconds)
        if fault is None:
            return values
        culprit, end = 0, time.monotonic() + timeout_seconds
        for i in range(len(completions)):
            one = {
                key: value[i : i + 1] if isinstance(value, list) and len(value) == len(completions) else value
                for key, value in columns.items()
            }
            left = max(0.01, end - time.monotonic())
            _, own_fault = _attempt(function, prompts[i : i + 1], completions[i : i + 1], one, left)
            if own_fault is not None:
                culprit, fault = i, own_fault if fault.startswith("raised") or "finite" in fault else fault
                break
        raise RewardError(
            f"The reward {name!r} {fault}. Sample: prompt {_shown(prompts[culprit])}, "
            f"completion {_shown(_text(completions[culprit]))}."
        )

    reward.__name__ = name
    return reward


def _attempt(
    function: Reward, prompts: list, completions: list, columns: dict, seconds: float
) -> tuple[Any, str | None]:
    """(rewards, None), or (None, what is wrong with them)."""
    outcome: dict[str, Any] = {}

    def call():
        try:
            outcome["values"] = function(prompts=prompts, completions=completions, **columns)
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        return None, f"took longer than {seconds:g} s for {len(completions)} completions"
    if "error" in outcome:
        return None, f"raised {type(outcome['error']).__name__} ({outcome['error']})"
    try:
        values = list(outcome["values"])
    except TypeError:
        return None, f"gave {str(outcome['values'])[:40]!r}, and not a list of numbers"
    if len(values) != len(completions):
        return None, f"gave {len(values)} values for {len(completions)} completions"
    try:
        values = [None if value is None else float(value) for value in values]
    except (TypeError, ValueError):
        return None, f"gave {str(values)[:60]}, and not numbers"
    if not all(value is None or math.isfinite(value) for value in values):
        return None, f"gave {str(values)[:60]}, and not finite numbers"
    return values, None


def _shown(text: Any) -> str:
    text = text if isinstance(text, str) else str(text[-1]["content"] if text else "")
    return repr(text if len(text) <= 200 else f"{text[:150]} ... {text[-45:]}")
