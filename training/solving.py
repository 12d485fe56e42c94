"""How well a model solves problems with known answers: pass@1 and pass@k of its samples, and its likeliest reply.

Two measures stand side by side, because what reinforcement learning adds is often the form alone: strict (the answer is
right and the reply has the asked form, `rewards.is_strict`) and lenient (the answer is right, wherever it stands,
`rewards.lenient_score`). An interval is one of 95 %, over the problems: with a few seeds of a training run, over those
as well.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from .exact_match import generate_replies
from .rewards import format_score, is_strict, lenient_score

RESAMPLES = 2000
CONFIDENCE = 0.95
Z = 1.96  # of the normal distribution, for CONFIDENCE
EXAMPLES = 4


def pass_at_k(correct: np.ndarray, samples: int, k: int) -> np.ndarray:
    """Of each problem the chance that k samples hold a right one, estimated without bias from `samples` of them.

    1 - C(samples - correct, k) / C(samples, k), equation 1 of arXiv 2107.03374.

    Args:
        correct: integers (problems,), how many of the samples were right.

    Raises ValueError where k samples were not drawn.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} cannot be told from {samples} samples a problem: draw at least {k}.")
    by_correct = [1 - math.comb(samples - c, k) / math.comb(samples, k) for c in range(samples + 1)]
    return np.array(by_correct)[np.asarray(correct, dtype=int)]


def mean_interval(values: np.ndarray) -> dict[str, float]:
    """{"mean", "low", "high"} of values from 0 to 1, of shape (problems,) or (seeds, problems).

    The interval is a percentile bootstrap with a fixed seed: 2,000 times problems are drawn anew, and, apart from that,
    seeds (Owen's pigeonhole bootstrap, 2007). So a problem's results stay together, as a hard problem is hard for all
    seeds, and so do a seed's. One less is drawn of each than there are, which makes the variance unbiased (Rao and Wu,
    1988): the interval of three seeds that differ much goes from the worst to the best of them. Where all values are
    0, or all 1, no draw differs, and the other end is that of Wilson's interval (1927) for as many problems.
    """
    values = _by_seed(values)
    mean, low, high = _bootstrap(values)
    problems = values.shape[1]
    if values.max() == 0:
        high = Z**2 / (problems + Z**2)
    if values.min() == 1:
        low = problems / (problems + Z**2)
    return {"mean": mean, "low": low, "high": high}


def difference_interval(before: np.ndarray, after: np.ndarray) -> dict[str, float]:
    """{"mean", "low", "high"} of after - before on the same problems, each (problems,) or (seeds, problems).

    Paired: the interval is that of `mean_interval` over each problem's difference. One `before` may serve for all seeds
    of `after`; where both have seeds, the first belongs to the first.

    Raises ValueError where they do not have the same problems.
    """
    before, after = _by_seed(before), _by_seed(after)
    if before.shape[1] != after.shape[1] or 1 < len(before) != len(after):
        raise ValueError(f"Results of the shapes {before.shape} and {after.shape} are not of the same problems.")
    mean, low, high = _bootstrap(after - before)
    return {"mean": mean, "low": low, "high": high}


def _by_seed(values: np.ndarray) -> np.ndarray:
    """As (seeds, problems)."""
    values = np.atleast_2d(np.asarray(values, dtype=float))
    if values.size == 0:
        raise ValueError("There are no results to take a mean of: give one problem or more.")
    return values


def _bootstrap(values: np.ndarray) -> tuple[float, float, float]:
    """Mean and percentiles of values (seeds, problems), as `mean_interval` has it."""
    random = np.random.default_rng(0)
    # Shares of a draw, (resamples, seeds) and (resamples, problems).
    drawn = [(n, max(1, n - 1)) for n in values.shape]
    of_seeds, of_problems = (random.multinomial(m, np.full(n, 1 / n), size=RESAMPLES) / m for n, m in drawn)
    means = ((of_seeds @ values) * of_problems).sum(axis=1)  # (resamples,)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(values.mean()), float(low), float(high)


def measure(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[dict[str, str]],
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    samples: int = 8,
    ks: tuple[int, ...] = (1, 8),
    temperature: float = 1.0,
    greedy: bool = True,
) -> dict[str, Any]:
    """What the model's replies are worth, ready for JSON; neither the model nor torch's random numbers are changed.

    Args:
        problems: rows of `problems.load_problems`.
        prompts: their token ids, of `exact_match.prompt_ids`.
        max_new_tokens: of a reply; one that is cut off there has not ended.
        batch_size: replies that are written at once.
        seed: of the samples: the same seed, model, prompts and batch size give the same ones.
        samples: of each problem, at `temperature`.
        greedy: whether the likeliest reply is measured as well, with the entries `greedy_strict` and `greedy_lenient`.

    Returns:
        `pass@k` for each of `ks` (strict), `lenient_pass@1` and the greedy accuracies, each as {mean, low, high};
        `format` and `ended`, shares of the samples, and their mean `tokens`, the end's included; `per_problem`, how
        many samples of each problem were right (greedy: 0 or 1), by which runs are compared; and a few `examples`.

    Raises ValueError where a prompt leaves too little room in the model's context, or a k exceeds `samples`.
    """
    if max(ks) > samples:
        raise ValueError(f"pass@{max(ks)} cannot be told from {samples} samples a problem: draw at least {max(ks)}.")
    ask = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "seed": seed}
    sampled = sample_replies(model, tokenizer, prompts, samples=samples, temperature=temperature, **ask)
    likeliest = sample_replies(model, tokenizer, prompts, samples=1, temperature=0.0, **ask) if greedy else None
    return summarise(problems, sampled, likeliest, ks=ks) | {"temperature": temperature}


def sample_replies(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    *,
    samples: int,
    temperature: float,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
) -> list[list[dict[str, Any]]]:
    """`generate_replies` from random numbers of its own, of a model that may be in the midst of training.

    Raises ValueError where a prompt leaves too little room in the model's context.
    """
    check_room(model, prompts, max_new_tokens)
    was_training = model.training
    model.eval()
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        replies = generate_replies(
            model, tokenizer, prompts, max_new_tokens, batch_size, samples=samples, temperature=temperature
        )
    model.train(was_training)
    return replies


def summarise(
    problems: list[dict[str, str]],
    sampled: list[list[dict[str, Any]]],
    likeliest: list[list[dict[str, Any]]] | None = None,
    *,
    ks: tuple[int, ...],
) -> dict[str, Any]:
    """What `measure` returns, of replies that `sample_replies` gave: some a problem, and the likeliest one."""
    samples = len(sampled[0])
    strict, lenient = _right(problems, sampled)
    replies = [reply for of_problem in sampled for reply in of_problem]
    result = {f"pass@{k}": mean_interval(pass_at_k(strict, samples, k)) for k in ks}
    result["lenient_pass@1"] = mean_interval(pass_at_k(lenient, samples, 1))
    per_problem = {"strict": strict.tolist(), "lenient": lenient.tolist()}
    if likeliest is not None:
        for name, right in zip(("greedy_strict", "greedy_lenient"), _right(problems, likeliest), strict=True):
            result[name] = mean_interval(right)
            per_problem[name] = right.tolist()
    return result | {
        "format": float(np.mean([format_score(reply["text"]) == 1 for reply in replies])),
        "ended": float(np.mean([reply["ended"] for reply in replies])),
        "tokens": float(np.mean([reply["tokens"] for reply in replies])),
        "problems": len(problems),
        "samples": samples,
        "per_problem": per_problem,
        "examples": [
            {name: problem[name] for name in ("question", "answer")} | judge(problem, replies[0]["text"])
            for problem, replies in zip(problems[:EXAMPLES], sampled, strict=False)
        ],
    }


def check_room(model: nn.Module, prompts: list[list[int]], max_new_tokens: int) -> None:
    """Raises ValueError where a prompt and a reply of `max_new_tokens` exceed the model's context."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, prompts))
    if context is not None and longest + max_new_tokens > context:
        raise ValueError(
            f"A prompt of {longest} tokens and a reply of {max_new_tokens} exceed the model's context of {context}: "
            "give shorter problems, or replies of fewer tokens."
        )


def judge(problem: dict[str, str], reply: str) -> dict[str, Any]:
    """The `reply`, and whether it is right by the `strict` and the `lenient` measure."""
    answer, entry = problem["answer"], problem["entry"]
    return {
        "reply": reply,
        "strict": is_strict(reply, answer, entry),
        "lenient": lenient_score(reply, answer, entry) >= 1,
    }


def _right(problems: list[dict[str, str]], replies: list[list[dict[str, Any]]]) -> tuple[np.ndarray, np.ndarray]:
    """Of each problem how many replies are right, by the strict and the lenient measure: two of shape (problems,)."""
    counts = np.zeros((2, len(problems)), dtype=int)
    for i, (problem, of_problem) in enumerate(zip(problems, replies, strict=True)):
        judged: dict[str, dict[str, Any]] = {}  # samples repeat each other, and a symbolic comparison takes time
        for reply in of_problem:
            text = reply["text"]
            judged[text] = judged.get(text) or judge(problem, text)
            counts[:, i] += judged[text]["strict"], judged[text]["lenient"]
    return counts[0], counts[1]
