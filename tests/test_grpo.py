"""GRPO as a user runs it: it learns what is rewarded, one seed is one result, and a reward that fails loses nothing."""

import json
import shutil

import pytest
from grpo_runs import ARGUMENTS, make_inputs
from safetensors.torch import load_file
from training_runs import command, kill_when_there, run

from training.adapters import open_for_inference
from training.grpo import GrpoArguments, _failing_together, load_rows, main, prepare
from training.language_models import load_language_model
from training.rewards import RewardError

MODULE = "training.grpo"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def options(inputs, folder, **changes):
    given = {"model": inputs / "model", "dataset": inputs / "problems", "output_dir": folder}
    return given | ARGUMENTS | changes


@pytest.fixture
def grpo(inputs, tmp_path, monkeypatch):
    """Runs the command in this process; returns the run folder and its record."""

    def start(name="run", function=main, **changes):
        folder = tmp_path / name
        words = command(MODULE, options(inputs, folder, **changes))[2:]
        monkeypatch.setattr("sys.argv", words)
        found = function()
        return found if function is prepare else (folder, json.loads((folder / "run.json").read_text()))

    return start


def refused(grpo, capsys, **changes):
    with pytest.raises(SystemExit):
        grpo(**changes)
    return capsys.readouterr().err


def history(record, name):
    return [(entry["step"], entry[name]) for entry in record["history"] if name in entry]


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_it_learns_the_format_that_is_rewarded(grpo):
    folder, record = grpo(
        rewards=["format", "accuracy"],
        reward_weights=[1.0, 0.5],
        learning_rate=1e-3,
        eval_on_start=True,
        max_steps=24,
        eval_steps=12,
        num_eval_problems=20,
        per_device_train_batch_size=32,
        num_generations=8,
    )
    metrics = record["metrics"]
    assert metrics["eval_format_before"] < 0.6 < 0.8 < metrics["eval_format"]
    assert metrics["eval_pass@1_low"] <= metrics["eval_pass@1"] <= metrics["eval_pass@1_high"]
    assert metrics["eval_pass@1"] <= metrics["eval_pass@2"]
    assert record["training"]["rewards"] == {"format": 1.0, "accuracy": 0.5}
    assert record["data"]["train"]["rows"] == 80
    assert record["metrics"]["tokens_seen"] > 24 * 32 * 5
    assert {"prompt", "text", "right", "step"} <= record["samples"][0].keys()
    # What was sampled can be read, with the rewards and advantages that it got.
    rows = [json.loads(line) for line in (folder / "completions" / "step-7.jsonl").read_text().splitlines()]
    assert len(rows) == 32
    assert {row["format"] for row in rows} <= {0.0, 0.15, 0.3, 0.45, 0.6, 1.0}
    groups = [rows[i : i + 8] for i in range(0, 32, 8)]
    assert all(len({row["prompt"] for row in group}) == 1 for group in groups)
    assert all(abs(sum(row["advantage"] for row in group)) < 1e-2 for group in groups)
    assert (folder / "README.md").exists()
    load_language_model(str(folder))


def test_one_seed_one_result_and_another_another(grpo):
    (one, first), (two, second), (three, third) = grpo("one"), grpo("two"), grpo("three", seed=1)
    assert history(first, "reward") == history(second, "reward") != history(third, "reward")
    weights = [load_file(folder / "model.safetensors") for folder in (one, two, three)]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    assert not all(weights[0][name].equal(weights[2][name]) for name in weights[0])


@pytest.mark.parametrize(
    "changes", [{}, {"num_iterations": 2, "beta": 0.05, "save_steps": 4, "eval_steps": 4}], ids=str
)
def test_stopped_and_gone_on_with(grpo, changes, monkeypatch):
    _, whole = grpo("whole", max_steps=8, **changes)

    from training.run_folder_trainer import RunFolderMixin

    save = RunFolderMixin._save_checkpoint

    def save_and_stop(self, *args, **kwargs):
        save(self, *args, **kwargs)
        if self.state.global_step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunFolderMixin, "_save_checkpoint", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        grpo("stopped", max_steps=8, **changes)
    monkeypatch.setattr(RunFolderMixin, "_save_checkpoint", save)
    _, resumed = grpo("stopped", max_steps=8, **changes)
    for name in ("reward", "loss", "grad_norm", "eval_pass@1"):
        assert history(resumed, name) == history(whole, name)


def test_an_adapter(grpo, inputs):
    folder, record = grpo(use_peft=True, lora_r=4, beta=0.1, learning_rate=1e-3)
    assert not (folder / "model.safetensors").exists()
    assert record["model"]["trainable_parameters"] < record["model"]["parameters"] / 4
    assert history(record, "kl")[0][1] == pytest.approx(0, abs=1e-6)  # the reference is the base
    assert history(record, "kl")[-1][1] > 0
    open_for_inference(str(folder))


def test_prompts_alone_are_those_that_the_record_tells_of():
    arguments = GrpoArguments(
        model="x", dataset="", prompt_dataset="instructions", prompt_dataset_split="train[:20]", reward_model="y",
        rewards=[""], num_eval_problems=6,
    )  # fmt: skip
    train, held_out, data, counts = load_rows(arguments, evaluates=True)
    assert (len(train), len(held_out), arguments.rewards) == (20, 6, [])
    assert (data["train"]["rows"], data["eval"]["rows"], counts["rows"]) == (20, 6, 20)
    assert held_out[0]["prompt"][-1]["role"] == "user"


def test_the_command_line_takes_a_recipe_s_reward_model_back():
    arguments = GrpoArguments(model="x", reward_model="", prompt_dataset="")
    assert (arguments.reward_model, arguments.prompt_dataset) == (None, None)


def test_the_best_model_is_that_of_the_highest_accuracy(grpo):
    _, record = grpo(load_best_model_at_end=True, eval_steps=2)
    assert record["metrics"]["eval_pass@1"] == max(value for _, value in history(record, "eval_pass@1"))


# ---- rewards that fail -----------------------------------------------------------------------------------------------


def reward_file(tmp_path, monkeypatch, body):
    (tmp_path / "my_rewards.py").write_text(f"calls = []\ndef mine(prompts, completions, **columns):\n{body}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "my_rewards", raising=False)
    return {"rewards": ["accuracy", "my_rewards.mine"]}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("    calls.append(1)\n    assert len(calls) < 4, 'no more'\n    return [0.5] * len(prompts)", "no more"),
        ("    calls.append(1)\n    return [0.5] * (len(prompts) - (len(calls) > 3))", "15 values for 16 completions"),
    ],
)
def test_a_reward_that_fails_is_named_and_the_steps_before_it_are_kept(
    grpo, tmp_path, monkeypatch, capsys, body, message
):
    changes = reward_file(tmp_path, monkeypatch, body) | {"save_steps": 4}
    error = refused(grpo, capsys, **changes)
    assert "The reward 'my_rewards.mine'" in error
    assert message in error
    assert "Sum: " in error
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]
    reward_file(tmp_path, monkeypatch, "    return [0.5] * len(prompts)")
    _, record = grpo(**changes)
    assert [step for step, _ in history(record, "reward")] == [1, 2, 3, 4]


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": ["accurracy"]}, "There is no reward 'accurracy': name one of accuracy"),
        ({"reward_weights": [1.0]}, "--reward_weights gives 1 weights and there are 2 rewards (accuracy, format)"),
        ({"reward_model": "x"}, "give both or neither"),
        ({"max_completion_length": 64}, "--max_completion_length 64 does not fit the model's context of 64"),
        ({"num_iterations": 2, "save_steps": 3}, "completions are new every 2 steps: give a multiple of 2"),
        ({"log_completions": True}, "--log_completions has no effect here"),
        ({"question_column": "question"}, "has no column 'question', only q, a: set --question_column"),
        ({"num_generations": 3}, "must be divisible by num_generations"),
        ({"eval_samples": 0}, "--eval_samples is 0"),
        ({"difficulty": '{"a": 1}'}, "--difficulty is for generators"),
        (
            {"load_best_model_at_end": True, "metric_for_best_model": "loss", "eval_steps": 2},
            "take one of pass@1, pass@2, lenient",
        ),
        ({"steps_per_generation": 3, "gradient_accumulation_steps": 2}, "completions are new every 3 steps"),
    ],
    ids=str,
)
def test_mistakes_are_told_in_one_line(grpo, capsys, changes, message):
    error = refused(grpo, capsys, **changes)
    last = error.splitlines()[-1]  # after the progress of reading data, where that is read for the first time
    assert last.startswith("Error: ")
    assert message in last
    assert "Traceback" not in error


def with_a_long_problem(folder, split, inputs):
    """The problems, to one split of which one is added that does not fit the model's context."""
    shutil.copytree(inputs / "problems", folder)
    with (folder / f"{split}.jsonl").open("a") as file:
        file.write(json.dumps({"q": "1 + 2 + " * 20 + "3 =", "a": "63"}) + "\n")
    return folder


def test_a_held_out_problem_that_does_not_fit_is_told_before_training(grpo, capsys, inputs, tmp_path):
    dataset = with_a_long_problem(tmp_path / "long", "test", inputs)
    error = refused(grpo, capsys, dataset=dataset, num_eval_problems=21)
    assert "exceed the model's context of 64" in error
    assert not (tmp_path / "run").exists()


def test_problems_that_do_not_fit_are_left_out_and_counted(grpo, inputs, tmp_path):
    dataset = with_a_long_problem(tmp_path / "long", "train", inputs)
    trainer, _ = grpo(function=prepare, dataset=dataset)
    assert len(trainer.train_dataset) == 80
    assert trainer.record.content["counts"]["train"] == {"rows": 81, "left_out": 0, "too_long": 1}


# ---- several processes ----------------------------------------------------------------------------------------------


def test_a_reward_that_fails_in_another_process_fails_here_as_well(monkeypatch):
    reward = _failing_together(lambda prompts: [1.0])
    assert reward(["?"]) == [1.0]
    monkeypatch.setattr("training.grpo.gather_object", lambda faults: [*faults, "The reward 'x' raised"])
    with pytest.raises(RewardError, match="The reward 'x' raised"):
        reward(["?"])


def test_a_process_may_have_no_held_out_problem(grpo):
    trainer, _ = grpo(function=prepare, num_eval_problems=1)
    trainer.held_out = []
    assert trainer._answer_held_out() == ([], [])


# ---- stopped ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on(inputs, tmp_path):
    words = command(MODULE, options(inputs, tmp_path / "killed", max_steps=6))
    for checkpoint in ("checkpoint-2", "checkpoint-4"):
        kill_when_there(words, tmp_path / "killed" / checkpoint, delay=0.2)
    assert run(words).returncode == 0
    assert run(command(MODULE, options(inputs, tmp_path / "whole", max_steps=6))).returncode == 0
    killed, whole = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("killed", "whole"))
    assert history(killed, "reward") == history(whole, "reward")
    assert load_file(tmp_path / "killed" / "model.safetensors").keys()
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("killed", "whole"))
    assert all(one[name].equal(two[name]) for name in one)
