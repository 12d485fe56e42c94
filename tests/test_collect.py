"""Collecting: what is verified is kept, the folder is one that SFT reads, and a killed command goes on."""

import json
import shutil
import sys
from unittest.mock import patch

import pytest
from preference_runs import write_jsonl
from tiny_solver import SOLUTIONS, save_tiny_solver

from training import collect
from training.chat_data import load_conversations
from training.collect import CollectArguments, main, run, select


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny_solver(folder / "model")
    rows = [{"question": q, "answer": a} for q, a in zip(SOLUTIONS, ("5", "8", "6"), strict=True)]
    write_jsonl(folder / "problems.jsonl", rows)
    turns = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Good day."}]
    write_jsonl(folder / "talk.jsonl", [{"messages": turns}] * 4)
    write_jsonl(folder / "pairs.jsonl", [{"prompt": turns[:1], "completion": turns[1:]}] * 4)
    write_jsonl(folder / "texts.jsonl", [{"text": "Good day."}])
    return folder


def arguments(inputs, output_dir, **changes):
    options = {"samples": 4, "temperature": 0.01, "max_new_tokens": 40, "batch_size": 4, "test_share": 0.5} | changes
    return CollectArguments(
        model=str(inputs / "model"), dataset=str(inputs / "problems.jsonl"), output_dir=str(output_dir), **options
    )


def test_the_shortest_different_right_answers_are_kept():
    problem = {"question": "What is 2+3?", "answer": "5", "entry": ""}
    long, short = "<think>2 and 3 make 5</think><answer>5</answer>", "<think>2+3=5</think><answer>5</answer>"
    wrong, bare = "<think>2+3=6</think><answer>6</answer>", "5"
    replies = [
        {"text": text, "tokens": len(text), "ended": True} for text in (wrong, long, bare, short, f"{short}\n", short)
    ]
    assert select(problem, replies, 1) == {"accepted": 4, "kept": [short]}
    assert select(problem, replies, 5) == {"accepted": 4, "kept": [short, long]}
    assert select(problem, replies[:1], 5) == {"accepted": 0, "kept": []}


def test_the_folder_holds_verified_answers_and_general_conversations(inputs, tmp_path):
    talk = {"general_dataset": str(inputs / "talk.jsonl"), "general_split": "train[:2]"}
    info = run(arguments(inputs, tmp_path / "collected", **talk))
    assert info == json.loads((tmp_path / "collected" / "info.json").read_text())
    assert '"/' not in json.dumps(info)  # no path of this machine
    assert " /" not in json.dumps(info)
    counts = info["made_by"]["counts"]
    assert counts == {
        "problems": 3,
        "samples": 12,
        "accepted": 8,
        "acceptance": pytest.approx(2 / 3),
        "prompts_too_long": 0,
        "solved": 2,
        "kept": 2,
        "train_rows": 2,
        "test_rows": 2,
        "general": 2,
    }
    rows = [row for split in ("train", "test") for row in load_conversations(str(tmp_path / "collected"), split)]
    exchanges = [tuple(message["content"] for message in row["messages"]) for row in rows]
    expected = [*SOLUTIONS.items()][:2] + [("Hello!", "Good day.")] * 2
    assert sorted(exchanges) == sorted(expected)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["collected"]
    assert sorted(entry.name for entry in (tmp_path / "collected").iterdir()) == [
        "info.json",
        "test.parquet",
        "train.parquet",
    ]


def test_prompts_and_completions_of_messages_are_conversations_and_texts_are_not(inputs, tmp_path):
    pairs = {"general_dataset": str(inputs / "pairs.jsonl"), "test_share": 0.0}
    counts = run(arguments(inputs, tmp_path / "pairs", **pairs))["made_by"]["counts"]
    assert (counts["train_rows"], counts["general"]) == (6, 4)
    assert not (tmp_path / "pairs" / "test.parquet").exists()
    with pytest.raises(ValueError, match="holds texts, not conversations"):
        run(arguments(inputs, tmp_path / "texts", general_dataset=str(inputs / "texts.jsonl")))


def test_the_same_command_again_finds_the_folder_finished(inputs, tmp_path, monkeypatch, capsys):
    target = tmp_path / "collected"
    talk = {"general_dataset": "instructions", "general_split": "test[:3]"}
    info = run(arguments(inputs, target, **talk))
    assert info["license"] == "cc-by-sa-4.0"
    assert "Wikipedia" in info["attribution"]
    asked = {"model": inputs / "model", "dataset": inputs / "problems.jsonl", "output_dir": target} | talk
    asked |= {"samples": 4, "temperature": 0.01, "max_new_tokens": 40, "batch_size": 4, "test_share": 0.5}
    before = {file: file.stat().st_mtime_ns for file in target.iterdir()}
    monkeypatch.setattr("sys.argv", ["collect", *(str(word) for name in asked for word in (f"--{name}", asked[name]))])
    main()
    assert "is finished: 8 of 12 answers accepted (66.7%), 2 of 3 problems solved" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in target.iterdir()} == before
    monkeypatch.setattr("sys.argv", [*sys.argv, "--keep", "2"])
    with pytest.raises(SystemExit):
        main()
    assert "keep was 1 and is now 2" in capsys.readouterr().err


@pytest.mark.parametrize(("license", "kept"), [("mit", None), ("cc-by-sa-4.0", "cc-by-sa-4.0")])
def test_of_two_licences_none_is_claimed_and_both_notices_are_kept(inputs, tmp_path, license, kept):
    source = tmp_path / "problems"
    source.mkdir()
    shutil.copy(inputs / "problems.jsonl", source / "train.jsonl")
    about = {"name": "Sums", "modality": "chat", "license": license, "attribution": "By a teacher."}
    (source / "info.json").write_text(json.dumps(about))
    changes = {"general_dataset": "instructions", "general_split": "test[:3]"}
    asked = arguments(inputs, tmp_path / "collected", **changes)
    asked.dataset = str(source)
    info = run(asked)
    assert info.get("license") == kept
    assert info["attribution"].startswith("By a teacher. ")
    assert "Wikipedia" in info["attribution"]


class Killed(BaseException):
    pass


def test_a_killed_command_goes_on_where_it_was_and_ends_with_the_same_rows(inputs, tmp_path):
    # Other answers at each draw; one chunk a problem.
    options = {"temperature": 1.5, "samples": 16, "batch_size": 4, "keep": 4, "test_share": 0.0}
    undisturbed = run(arguments(inputs, tmp_path / "undisturbed", **options))
    written = []

    def count_and_die(*given, die_at=None, original=collect.generate_replies, **named):
        if len(written) == die_at:
            raise Killed
        written.append(given)
        return original(*given, **named)

    def dying(at):
        return patch.object(collect, "generate_replies", lambda *a, **n: count_and_die(*a, die_at=at, **n))

    target = tmp_path / "killed"
    with pytest.raises(Killed), dying(2):
        run(arguments(inputs, target, **options))
    assert not target.exists()
    with pytest.raises(ValueError, match="seed was 0 and is now 1"):
        run(arguments(inputs, target, seed=1, **options))
    with dying(None):
        info = run(arguments(inputs, target, **options))
    assert len(written) == 3
    assert info == undisturbed
    rows = [load_conversations(str(tmp_path / name), "train").to_list() for name in ("undisturbed", "killed")]
    assert rows[0] == rows[1]
    with dying(3):  # nothing more is written
        assert run(arguments(inputs, target, **options)) == info
    with pytest.raises(ValueError, match="keep was 4 and is now 2"):
        run(arguments(inputs, target, **options | {"keep": 2}))


def test_the_folder_appears_only_when_it_is_whole(inputs, tmp_path):
    with (
        pytest.raises(Killed),
        patch.object(collect.os, "replace", side_effect=Killed),
        patch.object(collect, "replace_file", lambda file, text: file.write_text(text)),
    ):
        run(arguments(inputs, tmp_path / "collected"))
    assert not (tmp_path / "collected").exists()
    run(arguments(inputs, tmp_path / "collected"))
    assert load_conversations(str(tmp_path / "collected"), "train")
    assert not (tmp_path / "collected.partial").exists()


def test_folders_of_others_are_left_alone_and_a_model_that_solves_nothing_is_refused(inputs, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note").write_text("mine")
    with pytest.raises(ValueError, match="is there already, with other content"):
        run(arguments(inputs, tmp_path / "mine"))
    with pytest.raises(ValueError, match="None of 12 answers to 3 problems was accepted"):
        run(arguments(inputs, tmp_path / "none", max_new_tokens=3))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["mine"]


@pytest.mark.parametrize(
    ("field", "value"), [("samples", 0), ("keep", 0), ("temperature", 0.0), ("test_share", 1.0), ("batch_size", 0)]
)
def test_values_without_a_meaning_are_refused(field, value):
    with pytest.raises(ValueError, match=f"--{field} is {value}"):
        CollectArguments(**{field: value})
