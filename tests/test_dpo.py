"""DPO: its loss by the paper's formula, the reference, exact held-out figures, and runs as a user makes them."""

import json
import math

import pytest
import torch
from preference_runs import in_this_process, make_inputs, pair, run_training, training_command, write_jsonl
from safetensors.torch import load_file
from training_runs import kill_when_there, losses, two_processes

from training.adapters import open_for_inference
from training.dpo import prepare
from training.language_models import load_language_model, stored_fingerprint

MODULE = "training.dpo"
ADAPTER = {"use_peft": True, "lora_r": 4}
ONE_SAMPLE = {"sample_prompts": ["Where is Rome?"]}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def make_trainer(inputs, tmp_path, monkeypatch):
    def make(**changes):
        trainer, _ = in_this_process(prepare, MODULE, inputs, tmp_path / "run", monkeypatch, **ONE_SAMPLE | changes)
        return trainer

    return make


def disturb(model, scale=0.02):
    """Moves what is trained away from where it began."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn_like(parameter)


@torch.no_grad()
def log_prob(model, prompt_ids, answer_ids):
    """Of the answer after the prompt, in float64 from the plain logits of one unpadded text."""
    ids = torch.tensor([prompt_ids + answer_ids])
    logits = model(input_ids=ids).logits[0, :-1].double()
    every = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return every[len(prompt_ids) - 1 :].sum()


def figures_by_hand(policy, reference, pairs, beta=0.1):
    """Equation 7 of arXiv 2305.18290 and its parts, one text at a time."""
    logs = [
        [log_prob(model, row["prompt_ids"], row[name]) for model in (policy, reference)]
        for row in pairs
        for name in ("chosen_ids", "rejected_ids")
    ]
    logs = torch.tensor(logs).view(-1, 2, 2)  # (pairs, chosen and rejected, policy and reference)
    rewards = beta * (logs[..., 0] - logs[..., 1])
    margins = rewards[:, 0] - rewards[:, 1]
    return {
        "loss": -torch.nn.functional.logsigmoid(margins).mean().item(),
        "accuracy": (margins > 0).double().mean().item(),
        "margin": margins.mean().item(),
        "chosen_reward": rewards[:, 0].mean().item(),
        "rejected_reward": rewards[:, 1].mean().item(),
        "chosen_log_prob": logs[:, 0, 0].mean().item(),
        "rejected_log_prob": logs[:, 1, 0].mean().item(),
    }


@pytest.mark.parametrize("changes", [{}, ADAPTER, ADAPTER | {"precompute_ref_log_probs": True}], ids=str)
def test_loss_and_held_out_figures_are_the_papers_whatever_the_batches(make_trainer, inputs, changes):
    trainer = make_trainer(**changes)
    disturb(trainer.model)
    reference = load_language_model(str(inputs / "model"), dtype=torch.float32)
    trainer.model.train()
    rows = [trainer.train_dataset[i] for i in range(3)]
    loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(trainer.data_collator(rows)))
    assert loss.item() == pytest.approx(figures_by_hand(trainer.model.eval(), reference, rows)["loss"], rel=1e-5)

    expected = figures_by_hand(trainer.model.eval(), reference, trainer.eval_dataset)
    for batch_size in (1, 4, 10):
        trainer.args.per_device_eval_batch_size = batch_size
        metrics = trainer.evaluate()
        assert {name: metrics[f"eval_{name}"] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert not [name for name in metrics if "/" in name]  # TRL's, which are means over batches


@pytest.mark.parametrize(
    "changes",
    [
        {"precompute_ref_log_probs": True},
        ADAPTER | {"use_dora": True},
        ADAPTER | {"lora_init": "pissa"},
        ADAPTER | {"lora_init": "olora", "precompute_ref_log_probs": True},
        ADAPTER | {"lora_init": "eva"},
        ADAPTER | {"load_in_4bit": True},
    ],
    ids=str,
)
def test_the_reference_is_the_model_that_training_begins_with(make_trainer, changes):
    trainer = make_trainer(**changes)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert metrics["eval_margin"] == pytest.approx(0, abs=1e-4)
    disturb(trainer.model)
    assert abs(trainer.evaluate()["eval_chosen_reward"]) > 1e-3
    if "use_peft" in changes:
        assert list(trainer.model.peft_config) == ["default"]
        assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}


def test_other_losses_of_trl_are_weighted_by_pairs(make_trainer):
    trainer = make_trainer(loss_type=["ipo"])
    disturb(trainer.model)
    values = []
    for batch_size in (1, 4, 10):
        trainer.args.per_device_eval_batch_size = batch_size
        values.append(trainer.evaluate()["eval_loss"])
    assert values == pytest.approx([values[0]] * 3, rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"sync_ref_model": True}, "--sync_ref_model moves the reference along"),
        ({"per_device_train_batch_size": 64}, "There are 40 pairs to train on and an optimizer step takes 64"),
        ({"max_length": 500}, "does not fit the model's context of 128 tokens"),
        ({"load_in_4bit": True}, "--use_peft true"),
        ({"truncation_mode": "keep_end"}, "--truncation_mode has no effect here"),
    ],
)
def test_bad_arguments_are_refused_before_a_folder_is_made(make_trainer, tmp_path, changes, found):
    with pytest.raises(ValueError, match=found):
        make_trainer(**changes)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_writes_nothing(inputs, tmp_path, monkeypatch, capsys):
    assert in_this_process(prepare, MODULE, inputs, tmp_path / "run", monkeypatch, dry_run=True) is None
    assert "reference" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """An adapter's run that nothing disturbed, and the base's hash before it."""
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    before = stored_fingerprint(str(inputs / "model"))
    ended = run_training(MODULE, inputs, folder, **ADAPTER | ONE_SAMPLE)
    assert ended.returncode == 0, ended.stderr
    return folder, before


def test_a_run_learns_to_prefer_and_leaves_the_base_as_it_was(inputs, finished):
    folder, before = finished
    record = json.loads((folder / "run.json").read_text())
    assert record["metrics"]["eval_accuracy"] > 0.8
    assert record["metrics"]["eval_loss"] < math.log(2)
    assert record["counts"] == {
        name: {"rows": n, "truncated": 0, "left_out": 0} for name, n in (("train", 40), ("eval", 10))
    }
    assert record["data"]["model"]["fingerprint"] == before == stored_fingerprint(str(inputs / "model"))
    names = {path.name for path in folder.iterdir() if path.is_file()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "run.json", "README.md", "tokenizer.json"}
    assert not [name for name in names if name.endswith((".bin", ".pt"))]
    assert "Direct Preference" not in (folder / "README.md").read_text().split("---")[1]  # TRL's card has another head
    assert all("lora_" in name for name in load_file(folder / "adapter_model.safetensors"))
    assert not (folder / "ref").exists()
    # what was saved is what was evaluated
    model, tokenizer = open_for_inference(folder, base=str(inputs / "model"))
    from training.preference_data import load_preferences, tokenize_pairs

    rows, _ = tokenize_pairs(load_preferences(str(inputs / "pairs"), "test"), tokenizer, 96, cut=True)
    reference = load_language_model(str(inputs / "model"))
    expected = figures_by_hand(model, reference, rows)
    assert record["metrics"]["eval_loss"] == pytest.approx(expected["loss"], rel=1e-4)


@pytest.mark.slow
def test_killed_and_resumed_it_gives_the_same_losses_to_the_bit(inputs, finished, tmp_path):
    folder = tmp_path / "killed"
    kill_when_there(training_command(MODULE, inputs, folder, **ADAPTER | ONE_SAMPLE), folder / "checkpoint-4")
    assert json.loads((folder / "run.json").read_text())["status"] == "running"
    ended = run_training(MODULE, inputs, folder, **ADAPTER | ONE_SAMPLE)
    assert ended.returncode == 0, ended.stderr
    assert losses(folder) == losses(finished[0])
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (folder, finished[0]))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    seen = [json.loads((path / "run.json").read_text())["metrics"]["tokens_seen"] for path in (folder, finished[0])]
    assert seen[0] == seen[1] > 0


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(inputs, finished, tmp_path):
    changes = ADAPTER | ONE_SAMPLE | {"per_device_train_batch_size": 4}
    ended = run_training(MODULE, inputs, tmp_path / "two", two_processes(), **changes)
    assert ended.returncode == 0, ended.stderr
    one: dict = {}
    two: dict = {}
    for found, folder in ((one, finished[0]), (two, tmp_path / "two")):
        found |= {(step, name): value for step, name, value in losses(folder)}
    assert two == pytest.approx(one, rel=1e-3)
    records = [json.loads((folder / "run.json").read_text()) for folder in (finished[0], tmp_path / "two")]
    assert records[0]["metrics"]["tokens_seen"] == records[1]["metrics"]["tokens_seen"]


@pytest.mark.slow
def test_full_fine_tuning_is_resumed_with_the_reference_that_it_began_with(inputs, tmp_path):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    changes = ONE_SAMPLE | {"learning_rate": 0.0001}
    assert run_training(MODULE, inputs, undisturbed, **changes).returncode == 0
    kill_when_there(training_command(MODULE, inputs, killed, **changes), killed / "checkpoint-4")
    ended = run_training(MODULE, inputs, killed, **changes)
    assert ended.returncode == 0, ended.stderr
    assert losses(killed) == losses(undisturbed)


def test_cut_answers_are_counted_and_a_batch_of_one_trains(make_trainer, tmp_path):
    long_answer = {"role": "assistant", "content": "It is a city. " * 30}
    rows = [pair(i) for i in range(3)] + [pair(3) | {"chosen": [long_answer]}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    changes = {"dataset": path, "per_device_train_batch_size": 1, "max_steps": 2, "eval_strategy": "no"}
    make_trainer(**changes).train()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["counts"] == {"train": {"rows": 4, "truncated": 1, "left_out": 0}}
    assert [entry["step"] for entry in record["history"] if math.isfinite(entry.get("loss", math.nan))] == [2]
