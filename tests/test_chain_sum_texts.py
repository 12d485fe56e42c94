"""The pretraining text of the R1 demonstration: its sums are right but for the mistakes asked for, none is held out."""

import json
import random
import re

import pytest

from training.chain_sum_texts import DIRECT, WORKED, TextArguments, answer_in, main, steps_of, write_texts
from training.problems import held_out


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    sizes = {"num_problems": 3000, "num_facts": 50, "num_articles": 5, "num_test": 20, "max_terms": 5}
    counts = write_texts(TextArguments(output_dir=str(folder), **sizes))
    documents = [
        json.loads(line)["text"]
        for split in ("train", "test")
        for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return folder, counts, documents


def test_no_question_is_held_out_and_none_comes_twice(texts):
    _, counts, documents = texts
    questions = [text.split("\nAnswer:")[0].removeprefix("Question: ") for text in documents if "\nAnswer:" in text]
    assert len(questions) == len(set(questions)) == counts["problems"] > 2000
    assert not any(held_out(question) for question in questions)


def test_facts_are_right_and_so_are_most_of_the_steps(texts):
    _, counts, documents = texts
    facts = [text for text in documents if re.fullmatch(r"(-?\d+[+-]\d=-?\d+ ?)+", text)]
    assert len(facts) == counts["facts"] == 50
    assert all(right(step) for fact in facts for step in fact.split())
    worked = [text.split("<think>")[1].split("</think>")[0] for text in documents if "<think>" in text]
    steps = [step for text in worked for step in text.split()]
    assert 0.92 < sum(map(right, steps)) / len(steps) < 0.98


def right(step):
    first, sign, second, result = re.fullmatch(r"(-?\d+)([+-])(\d)=(-?\d+)", step).groups()
    return int(first) + int(sign + second) == int(result)


def test_steps_carry_a_mistake_on():
    assert steps_of("9 - 3 + 6", random.Random(0), 0.0) == (["9-3=6", "6+6=12"], 12)
    steps, total = steps_of("9 - 3 + 6", random.Random(0), 1.0)
    assert steps[1].startswith(steps[0].split("=")[1])
    assert not right(steps[0])
    assert steps[1].endswith(f"={total}")


@pytest.mark.parametrize("style", [*WORKED, *DIRECT])
def test_styles(style):
    texts = {answer_in(style, "2 + 3 - 4", "1", random.Random(seed)) for seed in range(60)}
    tagged = [text for text in texts if re.fullmatch(r"<think>.+</think><answer>-?\d+</answer>", text)]
    assert (len(tagged) == len(texts)) == (style == "tagged")
    assert any("1" in text for text in texts) or style in ("refusal", "cut")


def test_again_and_other_arguments(texts, monkeypatch, capsys):
    folder, _, _ = texts
    words = ["--num_problems", "3000", "--num_facts", "50", "--num_articles", "5", "--num_test", "20"]
    monkeypatch.setattr("sys.argv", ["x", *words, "--max_terms", "5", "--output_dir", str(folder)])
    main()
    assert "holds these texts" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["x", *words, "--max_terms", "4", "--output_dir", str(folder)])
    with pytest.raises(SystemExit):
        main()
    assert "holds other texts: choose another --output_dir" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--min_terms 5 is more than --max_terms 4"):
        TextArguments(min_terms=5, max_terms=4)


def test_files_of_others_are_left_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "train.jsonl").write_text("mine")
    monkeypatch.setattr("sys.argv", ["chain_sum_texts", "--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit):
        main()
    assert "holds other files (train.jsonl)" in capsys.readouterr().err
    assert (tmp_path / "train.jsonl").read_text() == "mine"
