"""Preferences built from conversations: the rule that picks the rejected answer, and the folder that comes of it."""

import json

import pytest
import torch
from preference_runs import write_jsonl
from tiny_chat_model import ANSWERS, save_tiny_chat_model

from training.build_preferences import BuildArguments, run, word_f1, worst_answer
from training.preference_data import load_preferences


@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [
        ("A river is water.", "a river is WATER", 1.0),
        ("stone", "a river is water", 0.0),
        ("a river", "a river is water", 2 / 3),  # precision 1, recall 1/2
        ("water water water", "a river is water", 2 / 7),  # precision 1/3, recall 1/4
        ("...", "a river", 0.0),
        ("...", "!", 0.0),
    ],
)
def test_similarity_is_the_harmonic_mean_of_precision_and_recall_of_words(answer, reference, f1):
    assert word_f1(answer, reference) == pytest.approx(f1)


def test_the_least_similar_answer_that_says_something_else_is_rejected():
    answers = [{"text": text, "ended": True} for text in ("a river is", "the river", "the lake river", "", "a river")]
    cut_off = [{"text": "stone", "ended": False}]
    assert worst_answer(answers, "a river")["text"] == "the lake river"
    assert worst_answer(answers + cut_off, "a river")["text"] == "the lake river"
    assert worst_answer(answers[3:] + cut_off, "a river")["text"] == "stone"
    assert worst_answer(answers[3:], "a river") is None


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    save_tiny_chat_model(folder / "model")
    rows = []
    for question, answer in ANSWERS.items():
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows += [{"messages": turns}, {"messages": [*turns, *turns, {"role": "user", "content": "Go on."}]}]
    rows.append({"messages": [{"role": "user", "content": "river " * 300}, {"role": "assistant", "content": "Yes."}]})
    write_jsonl(folder / "chats" / "train.jsonl", rows)
    write_jsonl(folder / "chats" / "test.jsonl", rows[:2])
    return folder


def arguments(folders, output_dir, **changes):
    # At this temperature a model that knows its answers by heart says other things too.
    options = {
        "temperature": 3.0,
        "top_p": 1.0,
        "max_new_tokens": 24,
        "batch_size": 4,
        "eval_dataset_split": "test",
    } | changes
    return BuildArguments(
        model=str(folders / "model"), dataset=str(folders / "chats"), output_dir=str(output_dir), **options
    )


def test_the_folder_holds_pairs_by_the_rule_and_says_how_they_were_made(folders, tmp_path):
    info = run(arguments(folders, tmp_path / "pairs"))
    assert info == json.loads((tmp_path / "pairs" / "info.json").read_text())
    assert info["modality"] == "preferences"
    counts = info["made_by"]["counts"]["train"]
    assert (counts["conversations"], counts["prompts_too_long"]) == (7, 1)
    assert str(tmp_path) not in json.dumps(info["made_by"]["arguments"]["seed"])
    pairs = load_preferences(str(tmp_path / "pairs"), "train")
    assert 0 < counts["pairs"] == len(pairs) <= 6
    for row in pairs:
        question, chosen, rejected = row["prompt"][-1]["content"], row["chosen"][0], row["rejected"][0]
        assert chosen["content"] == ANSWERS[question]
        assert rejected["content"].strip()
        assert word_f1(rejected["content"], chosen["content"]) < 0.5
    assert len(load_preferences(str(tmp_path / "pairs"), "test")) == info["made_by"]["counts"]["test"]["pairs"]


def test_the_same_command_gives_the_same_pairs_and_another_seed_others(folders, tmp_path):
    rows = []
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        torch.rand(3)  # whatever was drawn before
        run(arguments(folders, tmp_path / name, seed=seed))
        rows.append(load_preferences(str(tmp_path / name), "train").to_list())
    assert rows[0] == rows[1] != rows[2]


def test_a_model_that_only_gives_the_references_has_nothing_to_reject(folders, tmp_path):
    with pytest.raises(ValueError, match="came no pair"):
        run(arguments(folders, tmp_path / "none", temperature=0.01))
    assert not (tmp_path / "none").exists()


def test_a_folder_with_content_is_left_alone_and_texts_have_no_answers(folders, tmp_path):
    (tmp_path / "note").write_text("mine")
    with pytest.raises(ValueError, match="is there already, with content"):
        run(arguments(folders, tmp_path))
    path = write_jsonl(tmp_path / "texts.jsonl", [{"text": "A river is water."}])
    with pytest.raises(ValueError, match="holds whole texts"):
        run(BuildArguments(model=str(folders / "model"), dataset=str(path), output_dir=str(tmp_path / "new")))


def test_prompts_and_completions_that_are_strings_stay_strings(folders, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "What is a river?", "completion": " It is water."}] * 2)
    options = {"model": str(folders / "model"), "temperature": 3.0, "top_p": 1.0, "max_new_tokens": 24}
    run(BuildArguments(dataset=str(path), output_dir=str(tmp_path / "pairs"), **options))
    row = load_preferences(str(tmp_path / "pairs"), "train")[0]
    assert (row["prompt"], row["chosen"]) == ("What is a river?", " It is water.")
    assert isinstance(row["rejected"], str)
