"""Reward models: the loss by Bradley and Terry's formula, exact held-out figures, scores that anyone can compute."""

import json
import math
import subprocess
import sys

import pytest
import torch
from card_runs import STRANGER
from preference_runs import in_this_process, make_inputs, pair, run_training, training_command, write_jsonl
from safetensors.torch import load_file
from training_runs import kill_when_there, losses, two_processes
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from training.adapters import open_for_inference
from training.language_models import stored_fingerprint
from training.preference_data import load_preferences
from training.reward import prepare

MODULE = "training.reward"
ADAPTER = {"use_peft": True, "lora_r": 4}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@torch.no_grad()
def scores_by_hand(model, tokenizer, rows):
    """One unpadded conversation at a time: `(pairs, 2)`, chosen and rejected."""
    scores = [
        model(**tokenizer.apply_chat_template(row["prompt"] + row[name], return_dict=True, return_tensors="pt")).logits
        for row in rows
        for name in ("chosen", "rejected")
    ]
    return torch.stack(scores).double().view(-1, 2)


def figures(scores):
    """Minus the log of sigmoid(chosen - rejected), arXiv 2203.02155, equation 1."""
    margins = scores[:, 0] - scores[:, 1]
    return {
        "loss": torch.log1p(torch.exp(-margins)).mean().item(),
        "accuracy": (margins > 0).double().mean().item(),
        "margin": margins.mean().item(),
        "chosen_score": scores[:, 0].mean().item(),
        "rejected_score": scores[:, 1].mean().item(),
    }


@pytest.mark.parametrize("changes", [{}, ADAPTER], ids=str)
def test_loss_and_held_out_figures_are_the_formulas_whatever_the_batches(inputs, tmp_path, monkeypatch, changes):
    trainer, _ = in_this_process(prepare, MODULE, inputs, tmp_path / "run", monkeypatch, **changes)
    model, tokenizer = trainer.model.eval(), trainer.processing_class
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    rows = load_preferences(str(inputs / "pairs"), "train").select(range(3))
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(3)]))
    expected = figures(scores_by_hand(model, tokenizer, rows))
    assert trainer.compute_loss(model, batch).item() == pytest.approx(expected["loss"], rel=1e-5)

    expected = figures(scores_by_hand(model, tokenizer, load_preferences(str(inputs / "pairs"), "test")))
    for batch_size in (1, 4, 10):
        trainer.args.per_device_eval_batch_size = batch_size
        metrics = trainer.evaluate()
        assert {name: metrics[f"eval_{name}"] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    trainer.args.center_rewards_coefficient = 0.1
    sums = scores_by_hand(model, tokenizer, load_preferences(str(inputs / "pairs"), "test")).sum(dim=1)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected["loss"] + 0.1 * (sums**2).mean().item(), rel=1e-4)


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    ended = run_training(MODULE, inputs, folder)
    assert ended.returncode == 0, ended.stderr
    return folder


SCORES = """
import json, sys
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
folder, trust = sys.argv[1], {"trust_remote_code": True}
example = json.load(open(folder + "/run.json"))["example"]
tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
model = AutoModelForSequenceClassification.from_pretrained(folder, **trust)
assert model.config.num_labels == 1 and model.config.pad_token_id == tokenizer.pad_token_id
texts = [example["chosen"], example["rejected"]]
batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
scores = model(batch.input_ids, attention_mask=batch.attention_mask).logits[:, 0].tolist()
classify = pipeline("text-classification", folder, **trust)
piped = classify(texts, add_special_tokens=False)
assert {found["label"] for found in piped} == {"reward"}
print(json.dumps([scores, [found["score"] for found in piped]]))
"""


def test_a_stranger_gets_the_scores_that_the_run_recorded(finished, tmp_path):
    ended = subprocess.run(
        [sys.executable, "-c", STRANGER + SCORES, str(finished)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    example = json.loads((finished / "run.json").read_text())["example"]
    recorded = [example["chosen_score"], example["rejected_score"]]
    for scores in json.loads(ended.stdout.splitlines()[-1]):
        assert scores == pytest.approx(recorded, abs=2e-4)


def test_a_run_learns_and_records_what_it_did(inputs, finished):
    record = json.loads((finished / "run.json").read_text())
    metrics = record["metrics"]
    assert metrics["eval_accuracy"] > 0.8
    assert metrics["eval_loss"] < math.log(2)
    model = AutoModelForSequenceClassification.from_pretrained(finished)
    tokenizer = AutoTokenizer.from_pretrained(finished, trust_remote_code=False)
    expected = figures(scores_by_hand(model, tokenizer, load_preferences(str(inputs / "pairs"), "test")))
    assert {name: metrics[f"eval_{name}"] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)
    names = {path.name for path in finished.iterdir() if path.is_file()}
    assert not [name for name in names if name.endswith((".bin", ".pt"))]
    assert record["task"] == "reward"
    assert "reward" in (finished / "README.md").read_text()


@pytest.mark.parametrize("quantized", [False, True])
def test_an_adapter_brings_its_head_and_leaves_the_base_as_it_was(inputs, tmp_path, quantized):
    before = stored_fingerprint(str(inputs / "model"))
    ended = run_training(MODULE, inputs, tmp_path / "run", **ADAPTER, load_in_4bit=quantized or None)
    assert ended.returncode == 0, ended.stderr
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["data"]["model"]["fingerprint"] == before == stored_fingerprint(str(inputs / "model"))
    stored = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert {"score" if "score" in name else "lora" for name in stored} == {"score", "lora"}
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    if not quantized:
        model, tokenizer = open_for_inference(tmp_path / "run", base=str(inputs / "model"))
        assert (model.config.problem_type, model.config.id2label) == ("regression", {0: "reward"})
        rows = load_preferences(str(inputs / "pairs"), "test")
        assert figures(scores_by_hand(model, tokenizer, rows))["loss"] == pytest.approx(
            record["metrics"]["eval_loss"], rel=1e-4
        )


@pytest.mark.slow
def test_killed_and_resumed_it_gives_the_same_losses_to_the_bit(inputs, finished, tmp_path):
    folder = tmp_path / "killed"
    kill_when_there(training_command(MODULE, inputs, folder), folder / "checkpoint-4")
    ended = run_training(MODULE, inputs, folder)
    assert ended.returncode == 0, ended.stderr
    assert losses(folder) == losses(finished)
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder, finished))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(inputs, finished, tmp_path):
    ended = run_training(MODULE, inputs, tmp_path / "two", two_processes(), per_device_train_batch_size=4)
    assert ended.returncode == 0, ended.stderr
    one, two = ({(s, n): value for s, n, value in losses(folder)} for folder in (finished, tmp_path / "two"))
    assert two == pytest.approx(one, rel=1e-3)


def test_transformers_llama_becomes_a_transformers_classifier_and_long_pairs_are_left_out(inputs, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(inputs / "model", trust_remote_code=False)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **shape)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    long_answer = {"role": "assistant", "content": "It is a city. " * 30}
    path = write_jsonl(tmp_path / "rows.jsonl", [pair(0), pair(1), pair(2) | {"rejected": [long_answer]}])
    changes = {"dataset": path, "per_device_train_batch_size": 1, "max_steps": 2, "eval_strategy": "no"}
    ended = run_training(MODULE, inputs, tmp_path / "run", model=tmp_path / "llama", **changes)
    assert ended.returncode == 0, ended.stderr
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["counts"] == {"train": {"rows": 3, "truncated": 0, "left_out": 1}}
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["pad_token_id"] == tokenizer.pad_token_id


def test_a_dry_run_writes_nothing(inputs, tmp_path, monkeypatch, capsys):
    assert in_this_process(prepare, MODULE, inputs, tmp_path / "run", monkeypatch, dry_run=True) is None
    assert "weights" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
