"""Solving: the estimators equal counting and formulas, and a model that knows its answers scores as it should."""

import itertools
import math
from unittest.mock import patch

import numpy as np
import pytest
import torch
from tiny_solver import SOLUTIONS, save_tiny_solver

from hf_models import LlamaStyleForCausalLM
from training.exact_match import generate_replies, prompt_ids
from training.language_models import load_tokenizer
from training.solving import difference_interval, mean_interval, measure, pass_at_k

PROBLEMS = [
    {"question": question, "answer": answer, "entry": ""}
    for question, answer in zip([*SOLUTIONS, "What is 4+4?"], ("5", "8", "6", "9"), strict=True)
]


@pytest.fixture(scope="module")
def solver(tmp_path_factory):
    folder = tmp_path_factory.mktemp("solver")
    save_tiny_solver(folder)
    tokenizer = load_tokenizer(folder)
    asked = [{"prompt": problem["question"]} for problem in PROBLEMS]
    return LlamaStyleForCausalLM.from_pretrained(folder).eval(), tokenizer, prompt_ids(asked, tokenizer, True)


def test_pass_at_k_is_the_share_of_draws_with_a_right_one():
    for correct, k in itertools.product(range(7), (1, 2, 5, 6)):
        draws = list(itertools.combinations([True] * correct + [False] * (6 - correct), k))
        assert pass_at_k(np.array([correct]), 6, k) == pytest.approx(np.mean([any(draw) for draw in draws]))
    with pytest.raises(ValueError, match="draw at least 8"):
        pass_at_k(np.array([1]), 6, 8)


def test_the_interval_of_one_seed_is_that_of_the_mean():
    values = np.random.default_rng(1).beta(0.5, 0.5, size=400)
    interval = mean_interval(values)
    half_width = 1.96 * values.std(ddof=1) / math.sqrt(len(values))
    assert interval["mean"] == pytest.approx(values.mean())
    assert interval["low"] == pytest.approx(values.mean() - half_width, abs=0.1 * half_width)
    assert interval["high"] == pytest.approx(values.mean() + half_width, abs=0.1 * half_width)
    assert interval == mean_interval(values)


def test_seeds_that_agree_are_no_further_problems_and_seeds_that_differ_widen_the_interval():
    values = np.random.default_rng(1).integers(0, 2, size=300) * 0.5
    one, agreeing = mean_interval(values), mean_interval(np.stack([values] * 3))
    differing = mean_interval(np.stack([values, values + 0.2, values + 0.4]))

    def width(interval):
        return interval["high"] - interval["low"]

    assert width(agreeing) == pytest.approx(width(one), rel=0.1)
    # Of three means that are 0.2 apart, two at most are drawn.
    assert differing["low"] == pytest.approx(values.mean(), abs=0.05)
    assert differing["high"] == pytest.approx(values.mean() + 0.4, abs=0.05)


def test_results_all_alike_leave_room_as_wilsons_interval_does():
    z = 1.959964
    assert mean_interval(np.zeros(100)) == pytest.approx({"mean": 0, "low": 0, "high": z**2 / (100 + z**2)}, abs=1e-5)
    assert mean_interval(np.ones(100)) == pytest.approx({"mean": 1, "low": 100 / (100 + z**2), "high": 1}, abs=1e-5)


def test_a_difference_is_taken_problem_by_problem():
    before = np.random.default_rng(1).random(50)
    after = np.stack([before + 0.1] * 3)
    assert difference_interval(before, after) == pytest.approx({"mean": 0.1, "low": 0.1, "high": 0.1})
    shuffled = difference_interval(before, after[:, ::-1])
    assert shuffled["mean"] == pytest.approx(0.1)
    assert shuffled["high"] - shuffled["low"] > 0.05
    with pytest.raises(ValueError, match="not of the same problems"):
        difference_interval(before[:10], after)
    with pytest.raises(ValueError, match="give one problem or more"):
        mean_interval(np.array([]))


def test_a_model_that_knows_the_answers_is_measured_and_left_as_it_was(solver):
    model, tokenizer, prompts = solver
    model.train()
    state = torch.get_rng_state()
    options = {"samples": 4, "ks": (1, 4), "max_new_tokens": 40, "batch_size": 5, "seed": 1}
    result = measure(model, tokenizer, PROBLEMS, prompts, temperature=0.01, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert result["per_problem"] == {
        "strict": [4, 4, 0, 0],
        "lenient": [4, 4, 4, 0],
        "greedy_strict": [1, 1, 0, 0],
        "greedy_lenient": [1, 1, 1, 0],
    }
    means = {name: value["mean"] for name, value in result.items() if isinstance(value, dict) and "mean" in value}
    strict = dict.fromkeys(("pass@1", "pass@4", "greedy_strict"), 0.5)
    assert means == strict | {"lenient_pass@1": 0.75, "greedy_lenient": 0.75}
    assert (result["format"], result["ended"]) == (0.75, 1.0)
    replies = [SOLUTIONS[problem["question"]] for problem in PROBLEMS]
    lengths = [len(tokenizer(reply, add_special_tokens=False)["input_ids"]) + 1 for reply in replies]
    assert result["tokens"] == pytest.approx(np.mean(lengths))
    assert [example["reply"] for example in result["examples"]] == replies
    assert [example["strict"] for example in result["examples"]] == [True, True, False, False]


def test_the_seed_decides_the_samples(solver):
    model, tokenizer, prompts = solver
    options = {"samples": 2, "ks": (1,), "temperature": 3.0, "max_new_tokens": 12, "batch_size": 8, "greedy": False}
    results = []
    for seed in (1, 1, 2):
        torch.rand(3)  # whatever was drawn before
        results.append(measure(model, tokenizer, PROBLEMS, prompts, seed=seed, **options))
    assert results[0] == results[1] != results[2]
    assert "greedy_strict" not in results[0]


def test_what_cannot_be_measured_is_refused(solver):
    model, tokenizer, prompts = solver
    options = {"max_new_tokens": 12, "batch_size": 8, "seed": 0}
    with pytest.raises(ValueError, match=r"pass@8 cannot be told from 4 samples"):
        measure(model, tokenizer, PROBLEMS, prompts, samples=4, **options)
    with pytest.raises(ValueError, match="exceed the model's context of 256"):
        measure(model, tokenizer, PROBLEMS, prompts, **options | {"max_new_tokens": 250})


def test_tokens_are_drawn_by_their_probability_whatever_the_model_would_rather(solver):
    model, tokenizer, prompts = solver
    with torch.no_grad():
        probabilities = (model(input_ids=torch.tensor(prompts[:1])).logits[0, -1] / 2.0).softmax(-1)
    top = probabilities.topk(2)
    words = tokenizer.batch_decode(top.indices[:, None])
    with patch.multiple(model.generation_config, top_k=1, top_p=0.1, repetition_penalty=9.0, do_sample=True):
        [replies] = generate_replies(model, tokenizer, prompts[:1], 1, 500, samples=1000, temperature=2.0)
    for word, probability in zip(words, top.values.tolist(), strict=True):
        share = np.mean([reply["text"] == word for reply in replies])
        assert share == pytest.approx(probability, abs=4 * math.sqrt(probability * (1 - probability) / 1000))
