"""Problems: seeds and difficulties never bring a held-out problem into training; bad input is told in one sentence."""

import json

import pytest

from training import problems
from training.problems import ProblemArguments, held_out, load_problems, prompt_of, without

EASY = {"min_terms": 3, "max_terms": 4, "min_digits": 1, "max_digits": 1}
HARD = {"min_terms": 4, "max_terms": 6, "min_digits": 1, "max_digits": 1}


def questions(split, size, **options):
    return [row["question"] for row in load_problems("reasoning_gym:chain_sum", split, size, **options)[0]]


def test_splits_share_no_problem_whatever_seed_and_difficulty():
    train = set()
    for seed in (0, 7):
        for difficulty in (EASY, HARD):
            train |= set(questions("train", 1000, difficulty=difficulty, seed=seed))
    test = {q for d in (EASY, HARD) for seed in (0, 3) for q in questions("test", 300, difficulty=d, seed=seed)}
    assert train.isdisjoint(test)
    assert all(held_out(question) for question in test)
    assert not any(held_out(question) for question in train)
    # Drawn at random, the three-term sums of the two splits would meet: there are only 4,000 of them.
    assert len(train) > 3000


def test_seeds_share_no_draw_and_one_seed_is_one_set():
    one, same, other = (questions("train", 200, difficulty=HARD, seed=seed) for seed in (5, 5, 6))
    assert one == same
    assert set(one).isdisjoint(other)


def test_entries_bring_what_their_scorer_needs():
    rows, description = load_problems("reasoning_gym:chain_sum", "test", 20, difficulty=EASY)
    entry = json.loads(rows[0]["entry"])
    assert entry["metadata"]["source_dataset"] == "chain_sum"
    assert eval_sum(entry["metadata"]["expression"]) == int(rows[0]["answer"])
    assert description["rows"] == 20
    assert description["info"]["license"] == "Apache-2.0"
    assert description["difficulty"] == EASY


def eval_sum(expression):
    first, *rest = expression.split()
    return int(first) + sum(int(sign + term) for sign, term in zip(rest[::2], rest[1::2], strict=True))


def test_more_problems_than_there_are():
    with pytest.raises(ValueError, match=r"chain_sum has only .* different problems .* ask for fewer"):
        questions("train", 500, difficulty={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1})


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ("reasoning_gym:chain_some", {}, "no generator 'chain_some'"),
        ("reasoning_gym:chain_sum", {"difficulty": {"terms": 3}}, "--difficulty names terms; chain_sum has min_terms"),
        ("reasoning_gym:chain_sum", {"difficulty": {"min_terms": 5, "max_terms": 2}}, "is refused by chain_sum"),
        ("reasoning_gym:chain_sum", {"seed": 5000}, "a seed from 0 to 1,000"),
        ("reasoning_gym:chain_sum", {"size": 0}, "0 problems .* ask for 1 or more"),
        ("problems.jsonl", {}, "no file or folder 'problems.jsonl'"),
    ],
)
def test_mistakes_are_named(dataset, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_problems(dataset, "train", **{"size": 10} | options)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_any_data_set_with_two_columns(tmp_path):
    rows = [
        {"q": "What is 2 + 2?", "a": "2 and 2 are 4.\n#### 4"},
        {"q": "what is  2 + 2?", "a": "4"},
        {"q": "Capital of France?", "a": "Paris"},
    ]
    file = write(tmp_path / "p.jsonl", rows)
    found, description = load_problems(file, "train", question_column="q", answer_column="a")
    assert [(row["question"], row["answer"], row["entry"]) for row in found] == [
        ("What is 2 + 2?", "4", ""),
        ("Capital of France?", "Paris", ""),
    ]
    assert description["rows"] == 2
    with pytest.raises(ValueError, match=r"no column 'question', only q, a: set --question_column"):
        load_problems(file, "train")
    with pytest.raises(ValueError, match="has 2 different problems, and 3 were asked for"):
        load_problems(file, "train", 3, question_column="q", answer_column="a")
    with pytest.raises(ValueError, match="--difficulty is for generators"):
        load_problems(file, "train", difficulty=EASY)


def test_a_row_without_an_answer_is_named(tmp_path):
    file = write(tmp_path / "p.jsonl", [{"question": "One?", "answer": "1"}, {"question": "Two?", "answer": ""}])
    with pytest.raises(ValueError, match="row 2 has no question or no answer"):
        load_problems(file, "train")
    file = write(tmp_path / "working.jsonl", [{"question": "One?", "answer": "It is one. ####"}])
    with pytest.raises(ValueError, match="row 1 has no question or no answer"):
        load_problems(file, "train")
    file = write(tmp_path / "lists.jsonl", [{"question": "One?", "answer": ["1", "one"]}])
    with pytest.raises(ValueError, match=r"row 1 has the answer .*: give a text or a number"):
        load_problems(file, "train")


@pytest.mark.parametrize("content", ["[1, 2", '["a"]', '{"rows": 1}'])
def test_an_info_file_of_somebody_else_is_none_of_ours(tmp_path, content):
    write(tmp_path / "train.jsonl", [{"question": "One?", "answer": "1"}])
    (tmp_path / "info.json").write_text(content)
    assert "info" not in load_problems(str(tmp_path), "train")[1]


def test_a_block_of_problems_goes_on_where_the_one_before_ends(monkeypatch):
    whole = questions("train", 200, difficulty=HARD)
    monkeypatch.setattr(problems, "BLOCK", 50)
    assert questions("train", 200, difficulty=HARD) == whole


def test_what_is_held_out_is_taken_from_the_training_rows():
    rows = [{"question": "A  b?"}, {"question": "c?"}]
    assert without(rows, [{"question": "a B?"}]) == [{"question": "c?"}]


def test_prompts():
    assert prompt_of("1 + {x}", "Q: {question}\nA:", False) == "Q: 1 + {x}\nA:"
    assert prompt_of("1", "{question}", True) == [{"role": "user", "content": "1"}]
    with pytest.raises(ValueError, match=r"put \{question\} where the question goes"):
        ProblemArguments(prompt_template="Q:")
    with pytest.raises(ValueError, match="--difficulty is not JSON"):
        ProblemArguments(difficulty="{max")
    with pytest.raises(ValueError, match=r"--difficulty is \[4\]: give fields"):
        ProblemArguments(difficulty="[4]")
