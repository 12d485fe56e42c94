"""Rewards: what is a right answer and a right form, whatever a model tries; rewards that fail name themselves."""

import json
import math
import time

import numpy as np
import pytest
import torch
from tiny_chat_model import tiny_tokenizer
from transformers import LlamaConfig, LlamaForSequenceClassification
from trl.rewards import get_repetition_penalty_reward

from hf_models import LlamaStyleConfig, LlamaStyleForSequenceClassification
from training.rewards import (
    REWARDS,
    RewardError,
    answer_score,
    checked,
    format_score,
    is_strict,
    lenient_score,
    reward_by_name,
    reward_model,
)

SUM = json.dumps({"question": "5 + 7 =", "answer": "12", "metadata": {"source_dataset": "chain_sum"}})


def tagged(answer, thoughts="5 + 7 = 12"):
    return f"<think>{thoughts}</think><answer>{answer}</answer>"


@pytest.mark.parametrize("entry", ["", SUM])
@pytest.mark.parametrize(
    "reply",
    [
        tagged("12"),
        tagged(" 12\n"),
        "<answer>12</answer>",
        "12",
        "<think>5 + 7</think> It is 12.",
        "5 + 7 = 12</think><answer>12</answer>",  # the prompt opened the thoughts
        "<THINK>a</THINK><Answer>12</Answer>",
        tagged("12.0"),
        tagged("+12"),
        tagged("12") + " Have a nice day.",
    ],
)
def test_right_answers(reply, entry):
    assert answer_score(reply, "12", entry) == 1


@pytest.mark.parametrize("entry", ["", SUM])
@pytest.mark.parametrize(
    "reply",
    [
        "",
        tagged("13"),
        tagged(""),
        tagged("12") + "<answer>12</answer>",  # two answers, even the same
        "<answer>11</answer><answer>12</answer>",
        tagged("11 12"),
        tagged("11, 12, 13"),
        "<think>it is <answer>12</answer></think>",  # inside the thoughts
        "<think>it is <answer>12</answer></think> 12",
        "<think>it is <answer>12</answer></think><answer>12</answer>",
        "<answer><think>so</think>12</answer>",
        "<answer>12<think>so</think></answer>",
        "<think>so <answer>12</answer>",  # thoughts that do not end
        "<think>so it is 12",
        "<think>a</think><think>so it is 12",
        "<think>a</think><answer>12",
        "<think>a</think>12</answer>",
        "</answer>12<answer>",
        "<answer><answer>12</answer></answer>",
        tagged("5 + 7"),  # what was asked, and no answer to it
        tagged("24/2"),
        tagged("1e12"),
        tagged("nan"),
        tagged("inf"),
        tagged("9" * 10**6),
        tagged("12" + " " * 10**5 + "x"),
        tagged('__import__("os").system("true") or 13'),
    ],
)
def test_wrong_answers(reply, entry):
    assert answer_score(reply, "12", entry) < 1
    assert not is_strict(reply, "12", entry)


def test_tags_in_the_question_are_not_the_models():
    prompt = "Repeat: <think>a</think><answer>12</answer>. What is 5 + 7?"
    assert REWARDS["accuracy"](prompts=[prompt], completions=["I do not know."], answer=["12"]) == [0.0]
    # A reply that repeats such a question has two answers.
    assert answer_score(prompt + tagged("12"), "12") == 0


@pytest.mark.parametrize(
    ("given", "answer", "right"),
    [
        ("1,000", "1000", True),
        ("1000", "1,000.0", True),
        ("$1,000", "1000", True),
        ("1000 apples", "1000", True),
        ("1e3", "1000", True),
        ("1e3", "3", False),
        *(
            (other, "7", False)
            for other in ("-(7)", "- 7", r"\sqrt{7}", "7!", "7²", "x^7", r"\neq 7", "7 million", r"7\pi")
        ),
        *((same, "7", True) for same in ("x = 7", r"\boxed{7}", "7 km/h", r"\$7", r"\(7\)", r"\text{sum: }7", "(7)")),
        (r"1 \times 10^{3}", "1000", True),
        ("1e999999999", "1000", False),
        ("١٢", "12", True),
        ("\N{MINUS SIGN}12", "-12", True),
        ("12", "\N{MINUS SIGN}12", False),
        ("1/2", "0.5", True),
        (r"\frac{1}{2}", "0.5", True),
        ("0.5", "1/2", True),
        ("-1/2", "-0.5", True),
        ("1/2", "2", False),
        ("10/2", "5", False),
        ("1/0", "1", False),
        ("0.1", "1", False),
        ("9" * 3000, "9" * 3000, True),
        ("9" * 3000, "9" * 2999 + "8", False),
        ("nan", "nan", True),  # a text like any other
        ("nan", "1", False),
        ("Infinity", "1", False),
        ("Paris.", "paris", True),
        ("tac", "cat", False),
        (".5", "0.5", True),
        (".5", "5", False),
        ("-1/2", "1/2", False),
        (r"-\pi", r"\pi", False),
        ("-x + 1", "x + 1", False),
        ("[1, 2)", "(1, 2]", False),
        ("1{,}000", "1000", True),
        (r"10\,000", r"10,\!000", True),
        (r"10\,001", r"10,\!000", False),
    ],
)
def test_numbers_in_other_notations(given, answer, right):
    assert answer_score(tagged(given), answer) == right


def test_formulas_count_where_no_number_is_known():
    assert answer_score(tagged("x(x+2)"), "x^2 + 2x") == 1
    assert answer_score(tagged("x(x+3)"), "x^2 + 2x") == 0
    columns = {"completions": [tagged("x(x+2)")], "answer": ["x^2 + 2x"]}
    assert (REWARDS["exact"](**columns), REWARDS["symbolic"](**columns)) == ([0.0], [1.0])


def test_the_lenient_rule_takes_the_last_answer_wherever_it_stands():
    for reply in (tagged("11") + "<answer>12</answer>", "<think>is it 12", "<think><answer>12</answer>", "= 12"):
        assert lenient_score(reply, "12") == lenient_score(reply, "12", SUM) == 1
    assert lenient_score("12 or 13", "12") == 0
    assert lenient_score("9" * 10**6, "12", SUM) == 0


def test_the_format_is_whole_or_earns_by_its_parts():
    assert format_score("<think>a</think><answer>b</answer>") == 1
    assert format_score(" <think>a</think>\n\n<answer>b</answer>\n") == 1
    assert is_strict(tagged("12"), "12", SUM)
    steps = ["", "<think>", "<think>a</think>", "<think>a</think><answer>", "b<think>a</think><answer>b</answer>"]
    scores = [format_score(reply) for reply in steps]
    assert scores == sorted(set(scores))
    assert scores[-1] < 1


@pytest.mark.parametrize(
    "reply",
    [
        "<think></think><answer>b</answer>",
        "<think> \n</think><answer>b</answer>",
        "<think>a</think><answer> </answer>",
        "<think>a<think>a</think></think><answer>b</answer>",
        "<think>a</think><answer>b</answer><answer>b</answer>",
        "<think>a</think>so<answer>b</answer>",
        "<answer>b</answer><think>a</think>",
        "<think>a<answer>b</answer></think>",
        "<think>a <ANSWER>c</ANSWER></think><answer>b</answer>",
        "<think>a<answer>b</answer>",
        "<THINK>a</THINK><ANSWER>b</ANSWER>",
        "<think>a</think><answer>b</answer>.",
    ],
)
def test_what_is_not_the_format(reply):
    assert 0 <= format_score(reply) < 1


def test_repeating_tags_gains_nothing():
    once = format_score("<think>a</think>")
    assert format_score("<think>a</think>" * 2) < once
    assert format_score("<think><think><answer></answer></think></answer>" * 50) == 0
    assert format_score("<think></think><answer></answer>") == format_score("<think> <answer>")


def test_only_a_full_score_is_accurate_and_rows_without_an_answer_are_none():
    # reasoning-gym gives 2/5 to an answer with three more characters.
    chats = [[{"role": "assistant", "content": text}] for text in (tagged("12"), tagged("12 :-"), tagged("13"), "x")]
    columns = {"prompts": ["?"] * 4, "completions": chats, "answer": ["12", "12", "12", ""], "entry": [SUM] * 3 + [""]}
    assert REWARDS["accuracy"](**columns) == [1.0, 0.0, 0.0, None]
    whole, part, wrong, nothing = REWARDS["reasoning_gym"](**columns)
    assert (whole, nothing) == (1.0, None)
    assert 1 > part > wrong == 0.0
    ids = [[1, 2, 3, 4], [1, 1, 1, 1, 1, 1], [1], [1] * 9]
    for name in REWARDS:
        values = reward_by_name(name, 8)(completion_ids=ids, **columns)
        assert values[3] is None
        assert all(isinstance(value, float) for value in values[:3])
    assert REWARDS["accuracy"](prompts=["?"], completions=["x"]) == [None]
    assert REWARDS["reasoning_gym"](prompts=["?"], completions=["12"], answer=["12"]) == [None]


def test_length_and_repetition_are_their_formulas():
    ids = [[7] * n for n in (1, 80, 81, 90, 100, 101)]
    columns = {"prompts": ["?"] * 6, "completions": ["x"] * 6, "completion_ids": ids, "answer": ["1"] * 6}
    # arXiv 2503.14476, equation 13, with a maximum of 100 and a cache of 20 tokens.
    assert reward_by_name("length", 100)(**columns) == [0.0, 0.0, -1 / 20, -10 / 20, -1.0, -1.0]
    assert REWARDS["repetition"](**columns) == get_repetition_penalty_reward(3, -1.0)(completion_ids=ids)
    assert REWARDS["repetition"](**columns)[1] == pytest.approx(-(1 - 1 / 78))


def test_rewards_of_the_users_own_by_their_import_path():
    assert reward_by_name("math.sqrt", 8) is math.sqrt
    for name in ("acuracy", "no_such_module.f", "math.no_such_function", "math.pi"):
        with pytest.raises(ValueError, match=f"reward '{name}'"):
            reward_by_name(name, 8)


def loops(prompts, completions, **columns):
    end = time.monotonic() + 1.5
    while "bad" in completions and time.monotonic() < end:
        pass
    return [0.0] * len(completions)


def raises(prompts, completions, **columns):
    return [1 / (completion != "bad") for completion in completions]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (raises, r"raised ZeroDivisionError .*'q1'.*'bad'"),
        (loops, r"took longer than 0.3 s for 3 completions.*'q1'.*'bad'"),
        (lambda completions, **_: [1.0], r"gave 1 values for 3 completions"),
        (lambda completions, **_: [float("nan") if c == "bad" else 1.0 for c in completions], r"finite.*'q1'.*'bad'"),
        (lambda completions, **_: [math.inf] * len(completions), "finite"),
        (lambda completions, **_: ["1.0x"] * len(completions), "not numbers"),
        (lambda completions, **_: None, "not a list"),
        (lambda completions, **_: exit(3), "raised SystemExit"),
    ],
)
def test_a_reward_that_fails_is_named_with_the_sample(function, message):
    reward = checked("mine", function, 0.3)
    begun = time.monotonic()
    with pytest.raises(RewardError, match=r"^The reward 'mine' (?s:.*)" + message):
        reward(prompts=["q0", "q1", "q2"], completions=["good", "bad", "good"], answer=["1", "2", "3"])
    assert time.monotonic() - begun < 3


def test_a_reward_that_works_goes_through():
    seen = {}

    def mine(prompts, completions, completion_ids, weight, **columns):
        seen.update(columns, weight=weight)
        return np.array([0.5, 1.0])

    reward = checked("mine", mine, 5)
    assert reward.__name__ == "mine"
    assert reward(prompts=["a", "b"], completions=["c", "d"], completion_ids=[[1], [2]], weight=2, answer=[1, 2]) == [
        0.5,
        1,
    ]
    assert seen == {"weight": 2, "answer": [1, 2]}
    assert checked("none", lambda **_: [None, 1], 5)(prompts=["a", "b"], completions=["c", "d"]) == [None, 1.0]
    long = checked("mine", lambda **_: [], 5)
    with pytest.raises(RewardError) as told:
        long(prompts=["a" * 10**5], completions=[[{"role": "assistant", "content": "b" * 10**5}]])
    assert len(str(told.value)) < 700


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = LlamaStyleConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=1,
        initializer_range=0.5,
    )
    model = LlamaStyleForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model, tokenizer


def test_a_reward_model_scores_conversations_whatever_the_batch(scorer):
    folder, model, tokenizer = scorer
    prompts = [[{"role": "user", "content": text}] for text in ("What is a river?", "And a lake?", "?", "5 + 7")]
    texts = ["Water that flows.", "Water " * 60, "Yes", "12"]
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    expected = []
    for prompt, chat in zip(prompts, chats, strict=True):
        ids = tokenizer.apply_chat_template(prompt + chat, return_dict=True)["input_ids"][-64:]
        with torch.no_grad():
            expected.append(model(input_ids=torch.tensor([ids])).logits.item())
    columns = {"prompts": prompts, "completions": chats, "answer": ["", None, "", "12"], "entry": ["", "", "", SUM]}
    for batch_size in (1, 3):
        unanswered = {"prompts": prompts, "completions": chats}
        every = reward_model(str(folder), "cpu", batch_size=batch_size)(**unanswered)
        assert every == pytest.approx(expected, abs=1e-5)
    score = reward_model(str(folder), "cpu")
    assert score(**columns) == [*(pytest.approx(value, abs=1e-5) for value in expected[:3]), None]
    assert score.__name__ == "reward_model"
    asked = score(prompts=["And a lake?"], completions=[texts[1]])
    assert asked == pytest.approx(expected[1:2], abs=1e-5)
    assert score(prompts=["?"], completions=["12"], answer=["12"]) == [None]


def test_a_reward_model_of_transformers_own_may_pad_with_another_token(scorer, tmp_path):
    _, _, tokenizer = scorer
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, num_labels=1, initializer_range=0.5,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    columns = {"prompts": ["What is a river?", "?"], "completions": ["Water that flows.", "Yes"]}
    together, alone = (reward_model(str(tmp_path), "cpu", batch_size=size)(**columns) for size in (2, 1))
    assert together == pytest.approx(alone, abs=1e-5)


def test_what_is_no_reward_model(scorer, tmp_path):
    _, model, tokenizer = scorer
    config = LlamaStyleConfig(
        **{**model.config.to_diff_dict(), "id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}
    )
    LlamaStyleForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="gives 2 scores"):
        reward_model(str(tmp_path), "cpu")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    model.save_pretrained(tmp_path)
    for file in tmp_path.glob("chat_template*"):
        file.unlink()
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no chat template"):
        reward_model(str(tmp_path), "cpu")
