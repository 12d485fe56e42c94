"""Pretraining as a user runs it: killed and resumed, on two processes, with bad input, and opened by a stranger."""

import contextlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from training_runs import REPOSITORY, command, kill_when_there, losses, two_processes
from training_runs import run as run_command

from hf_models import LlamaStyleForCausalLM
from hf_models.bpe_tokenizer import train_bpe
from training.pretrain_lm import main, prepare
from training.quickstart import PARTS, PROMPTS, open_as_a_stranger
from training.text_data import load_text_dataset

TINY_MODEL = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
ARGUMENTS = {
    "size": "1m",
    "config_overrides": json.dumps(TINY_MODEL | {"num_hidden_layers": 1}),
    "precision": "fp32",
    "block_size": 64,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 64,
    "max_steps": 160,  # a pass over the text is 134
    "learning_rate": 0.0005,  # low enough for rounding not to grow into differences that show
    "logging_steps": 20,
    "eval_steps": 80,
    "save_steps": 40,
    "disable_tqdm": True,
    "use_cpu": True,
}
WITHOUT_SIZE = {"size": None, "config_overrides": None}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tokenizer, and texts few enough that the packing takes no time."""
    folder = tmp_path_factory.mktemp("inputs")
    texts = load_text_dataset("wikipedia_leads", "train").select(range(300))
    texts.select(range(250)).to_parquet(folder / "texts" / "train.parquet")
    texts.select(range(250, 300)).to_parquet(folder / "texts" / "test.parquet")
    train_bpe(texts["text"], 400).save_pretrained(folder / "tokenizer")
    return folder


def pretrain(inputs, output_dir, launcher=(), **changes):
    given = {"dataset": inputs / "texts", "tokenizer": inputs / "tokenizer", "output_dir": output_dir}
    return command("training.pretrain_lm", given | ARGUMENTS | changes, launcher)


def run(*args, **changes):
    return run_command(pretrain(*args, **changes))


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    ended = run(inputs, folder)
    assert ended.returncode == 0, ended.stderr
    return folder


def test_the_run_learns_and_records_what_it_did(finished):
    record = json.loads((finished / "run.json").read_text())
    train_losses = [value for _, name, value in losses(finished) if name == "loss"]
    assert train_losses[-1] < train_losses[0] - 0.5
    assert record["status"] == "finished"
    metrics, train = record["metrics"], record["data"]["train"]
    assert train["documents"] == 250
    # nats a token -> bits a byte, by the counts of the held-out text
    predicted = count_predicted_tokens(finished)
    bits = metrics["eval_loss"] / torch.log(torch.tensor(2.0)).item() * predicted / record["data"]["eval"]["bytes"]
    assert metrics["eval_bits_per_byte"] == pytest.approx(bits, rel=1e-4)
    assert metrics["eval_perplexity"] == pytest.approx(torch.tensor(metrics["eval_loss"]).exp().item(), rel=1e-4)
    assert 0 < metrics["matmul_share"] < 1
    assert {sample["step"] for sample in record["samples"]} == {80, 160}
    machine_paths = [line for line in (finished / "run.json").read_text().splitlines() if str(Path.home()) in line]
    assert not machine_paths


def count_predicted_tokens(finished):
    from transformers import AutoTokenizer

    record = json.loads((finished / "run.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(REPOSITORY / record["tokenizer"]["path"])
    held_out = load_text_dataset(str(REPOSITORY / record["data"]["eval"]["dataset"]), "test")
    # bos predicts nothing; eos is predicted
    return sum(len(ids) + 1 for ids in tokenizer(held_out["text"][:], add_special_tokens=False)["input_ids"])


EVERY_CLASS = """
import sys
sys.modules["hf_models"] = None
import torch
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline
)
folder, trust = sys.argv[1], {"trust_remote_code": True}
assert AutoConfig.from_pretrained(folder, **trust).model_type == "llama_style"
ids = AutoTokenizer.from_pretrained(folder, **trust)("The river", return_tensors="pt").input_ids
hidden = AutoModel.from_pretrained(folder, **trust)(ids).last_hidden_state
causal = AutoModelForCausalLM.from_pretrained(folder, **trust)
torch.testing.assert_close(causal.lm_head(hidden), causal(ids).logits)
assert AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, **trust)(ids).logits.shape == (1, 3)
text = pipeline("text-generation", folder, **trust)("The river", max_new_tokens=4)[0]["generated_text"]
assert text.startswith("The river")
"""


def test_the_folder_opens_with_every_auto_class_and_the_pipeline(finished, tmp_path):
    ended = subprocess.run(
        [sys.executable, "-c", EVERY_CLASS, str(finished)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr


def test_the_folder_opens_where_hf_models_is_not_installed(finished, capfd):
    open_as_a_stranger(PARTS["language"], finished)
    printed = capfd.readouterr().out
    assert all(prompt in printed for prompt in PROMPTS)
    names = {path.suffix for path in finished.iterdir() if path.is_file()}
    assert names == {".json", ".py", ".safetensors", ".jinja", ".md"}
    assert (finished / "card_assets" / "loss.png").stat().st_size > 1000


def test_killed_at_any_moment_and_resumed_it_gives_the_same_losses_to_the_bit(inputs, finished, tmp_path):
    folder = tmp_path / "killed"
    # The first kill comes as soon as a checkpoint is being written, the second some time after a later one.
    for awaited, delay in (("checkpoint_partial", 0.0), ("checkpoint-80", 0.05)):
        kill_when_there(pretrain(inputs, folder), folder / awaited, delay)
        assert json.loads((folder / "run.json").read_text())["status"] in ("running", "finished")
    ended = run(inputs, folder)
    assert ended.returncode == 0, ended.stderr
    assert losses(folder) == losses(finished)
    ours, theirs = load_file(folder / "model.safetensors"), load_file(finished / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_killed_after_its_last_checkpoint_it_takes_no_step_more(inputs, finished, tmp_path):
    folder = tmp_path / "last"
    ended = run(inputs, folder)
    assert ended.returncode == 0, ended.stderr
    content = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(content | {"status": "running"}))
    (folder / "model.safetensors").unlink()
    ended = run(inputs, folder)
    assert ended.returncode == 0, ended.stderr
    assert losses(folder) == losses(finished)
    assert torch.equal(
        load_file(folder / "model.safetensors")["model.norm.weight"],
        load_file(finished / "model.safetensors")["model.norm.weight"],
    )


def test_two_processes_give_the_losses_of_one_with_the_same_global_batch(inputs, finished, tmp_path):
    ended = run(inputs, tmp_path / "two", two_processes(), per_device_train_batch_size=4)
    assert ended.returncode == 0, ended.stderr
    one, two = losses(finished), losses(tmp_path / "two")
    assert [entry[:2] for entry in one] == [entry[:2] for entry in two]
    for (_, name, ours), (_, _, theirs) in zip(two, one, strict=True):
        # Sums in another order, through 160 steps; a norm feels it more than a loss.
        assert ours == pytest.approx(theirs, rel=1e-2 if name == "grad_norm" else 1e-4)


def test_gradient_accumulation_gives_the_losses_of_the_whole_batch(inputs, finished, tmp_path):
    ended = run(
        inputs, tmp_path / "run", per_device_train_batch_size=2, gradient_accumulation_steps=4, eval_strategy="no"
    )
    assert ended.returncode == 0, ended.stderr
    accumulated = [value for _, name, value in losses(tmp_path / "run") if name == "loss"]
    whole = [value for _, name, value in losses(finished) if name == "loss"]
    assert accumulated == pytest.approx(whole, rel=1e-4)


@pytest.mark.slow
def test_a_stream_resumed_after_its_first_pass_gives_the_same_losses_to_the_bit(inputs, tmp_path):
    """A pass over the texts is 33 steps of this batch."""
    options = {"streaming": True, "per_device_train_batch_size": 32, "max_steps": 48, "save_steps": 40}
    ended = run(inputs, tmp_path / "run", **options)
    assert ended.returncode == 0, ended.stderr
    whole = losses(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-48")
    content = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(content | {"status": "running"}))
    ended = run(inputs, tmp_path / "run", **options)
    assert ended.returncode == 0, ended.stderr
    assert losses(tmp_path / "run") == whole
    assert whole[-1][2] < whole[0][2]


def test_a_bfloat16_model_is_trained_further_in_float32(inputs, finished, tmp_path):
    LlamaStyleForCausalLM.from_pretrained(finished, dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    ended = run(inputs, tmp_path / "run", model=tmp_path / "bf16", max_steps=4, **WITHOUT_SIZE)
    assert ended.returncode == 0, ended.stderr
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert losses(tmp_path / "run")[0][2] < losses(finished)[0][2]  # it goes on where it was


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_batch(inputs, tmp_path):
    ended = run(inputs, tmp_path / "run", learning_rate=1e30, max_grad_norm=1e30, save_steps=1, logging_steps=1)
    assert ended.returncode == 2
    error = ended.stderr.strip().splitlines()[-1]
    assert "Error: Stopped at step" in error
    assert "whose first row begins" in error
    assert "checkpoint-" in error
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"].startswith("stopped at step")
    for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
        assert all(value.isfinite().all() for value in load_file(checkpoint / "model.safetensors").values())


def refused(inputs, tmp_path, **changes):
    """What the command, run in this process, says on its way out."""
    said = io.StringIO()
    words = ["pretrain_lm", *pretrain(inputs, tmp_path / "run", **changes)[3:]]
    with mock.patch("sys.argv", words), contextlib.redirect_stderr(said), pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert not (tmp_path / "run").exists()
    return said.getvalue().strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"block_size": 4096}, "--block_size 4096 does not fit the model's context of 1024 tokens"),
        (
            {"config_overrides": '{"hidden_size": 100, "num_attention_heads": 3}'},
            "num_attention_heads (3) does not divide hidden_size (100)",
        ),
        ({"size": "9b"}, "--size '9b' is not known: take one of 1m"),
        ({"text_column": "body"}, "no column 'body', only text"),
        ({"tokenizer": "nowhere"}, "The tokenizer 'nowhere' cannot be opened"),
        (
            {"config_overrides": '{"hidden_siz": 32}'},
            "names hidden_siz, which LlamaStyleConfig has not",
        ),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "does not go with these --lr_scheduler_kwargs"),
        ({"learning_rat": 0.1}, "Unknown field 'learning_rat' in the command line: did you mean 'learning_rate'?"),
    ],
)
def test_bad_input_is_refused_in_one_sentence_before_anything_is_written(inputs, tmp_path, changes, sentence):
    assert sentence in refused(inputs, tmp_path, **changes)


def test_a_folder_with_another_run_is_refused_and_left_as_it_is(inputs, finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    ended = run(inputs, finished, learning_rate=0.001)
    assert ended.returncode == 2
    assert "holds another run: learning_rate was 0.0005 and is now 0.001" in ended.stderr
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_a_disk_without_room_for_the_checkpoints_is_told_before_the_work(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["pretrain_lm", *pretrain(inputs, tmp_path / "run")[3:]])
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match="for checkpoints and the disk has"):
        prepare()
    assert not (tmp_path / "run").exists()


def test_an_empty_text_file_is_refused(inputs, tmp_path):
    (tmp_path / "empty.txt").touch()
    assert "is empty (0 bytes)" in refused(inputs, tmp_path, dataset=tmp_path / "empty.txt")
