"""Supervised fine-tuning as a user runs it: what it learns from, what it changes, killed and resumed, bad input."""

import hashlib
import json

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tiny_chat_model import ANSWERS, new_tiny_model, tiny_tokenizer
from training_runs import accelerate_two_processes, command, kill_when_there, losses
from training_runs import run as run_command
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

from training.adapters import open_for_inference
from training.language_models import chat_marks, load_tokenizer
from training.sft import main, reply

ARGUMENTS = {
    "precision": "fp32",
    "max_length": 128,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
    "max_steps": 12,
    "learning_rate": 1e-3,
    "logging_steps": 2,
    "eval_steps": 6,
    "save_steps": 4,
    "disable_tqdm": True,
    "use_cpu": True,
}
LORA = {"use_peft": True, "lora_r": 4}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A base that has learnt nothing, and conversations."""
    folder = tmp_path_factory.mktemp("inputs")
    tokenizer = tiny_tokenizer()
    new_tiny_model(tokenizer).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    chats = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in ANSWERS.items()
    ]
    Dataset.from_dict({"messages": [*chats, chats[0] + chats[2]] * 20}).to_parquet(folder / "chats" / "train.parquet")
    Dataset.from_dict({"messages": chats}).to_parquet(folder / "chats" / "test.parquet")
    return folder


def sft(inputs, output_dir, launcher=(), **changes):
    given = {"model": inputs / "base", "dataset": inputs / "chats", "output_dir": output_dir}
    return command("training.sft", given | ARGUMENTS | changes, launcher)


def run(*args, **changes):
    return run_command(sft(*args, **changes))


def run_here(inputs, output_dir, capsys, monkeypatch, **changes):
    """The command in this process: its exit status and what it printed."""
    monkeypatch.setattr("sys.argv", ["sft", *sft(inputs, output_dir, **changes)[3:]])
    capsys.readouterr()
    try:
        main()
    except SystemExit as exit:
        return exit.code, capsys.readouterr()
    return 0, capsys.readouterr()


def base_hash(inputs):
    return hashlib.sha256((inputs / "base" / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def tuned(inputs, tmp_path_factory):
    """All weights, until the answers are known by heart."""
    folder = tmp_path_factory.mktemp("runs") / "full"
    ended = run(inputs, folder, max_steps=60, learning_rate=5e-3, eval_steps=30, save_steps=60, eval_on_start=True)
    assert ended.returncode == 0, ended.stderr
    return folder


@pytest.fixture(scope="module")
def adapter(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "lora"
    before = base_hash(inputs)
    ended = run(inputs, folder, **LORA)
    assert ended.returncode == 0, ended.stderr
    assert base_hash(inputs) == before
    return folder


def test_the_tuned_model_answers_and_stops(tuned):
    model = AutoModelForCausalLM.from_pretrained(tuned)
    tokenizer = load_tokenizer(str(tuned))
    for question, answer in ANSWERS.items():
        assert reply(model, tokenizer, question) == {"text": answer, "ended": True}
    assert tokenizer.eot_token_id in model.generation_config.eos_token_id
    assert tokenizer.pad_token_id not in model.generation_config.eos_token_id


def test_the_run_records_what_it_did(tuned, inputs):
    record = json.loads((tuned / "run.json").read_text())
    assert record["status"] == "finished"
    metrics = record["metrics"]
    assert metrics["eval_loss"] < 0.3 < 4 < metrics["eval_loss_before"]
    assert metrics["eval_token_accuracy"] > 0.9
    assert record["counts"]["train"] == {"rows": 80, "truncated": 0, "left_out": 0}
    assert record["model"]["trainable_parameters"] == record["model"]["parameters"]
    # Every token that is read counts, whether or not the loss is taken on it.
    tokenizer = load_tokenizer(str(tuned))
    chats = Dataset.from_parquet(str(inputs / "chats" / "train.parquet"))["messages"][:]
    per_epoch = sum(len(tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]) for chat in chats)
    # An epoch leaves out the blocks that fill no batch.
    assert 0.7 < metrics["tokens_seen"] / (per_epoch * record["history"][-1]["epoch"]) <= 1
    assert not list(tuned.glob("*.bin"))


def test_held_out_loss_is_the_mean_over_the_assistants_tokens_whatever_the_batches(tuned, inputs):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tuned), load_tokenizer(str(tuned))
    total, tokens = 0.0, 0
    for question, answer in ANSWERS.items():
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
        answer_ids = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eot_token_id]
        ids = torch.tensor([[*prompt["input_ids"], *answer_ids]])
        with torch.no_grad():
            log_probs = model(ids).logits[0].log_softmax(dim=-1)
        total -= sum(log_probs[-len(answer_ids) - 1 + i, token].item() for i, token in enumerate(answer_ids))
        tokens += len(answer_ids)
    assert json.loads((tuned / "run.json").read_text())["metrics"]["eval_loss"] == pytest.approx(
        total / tokens, rel=1e-4
    )


def test_the_training_loss_is_the_assistants_alone_and_packing_changes_nothing(inputs, tmp_path):
    """One step over everything at a rate of zero: its loss is the base's on these tokens, computed by hand."""
    chats = Dataset.from_parquet(str(inputs / "chats" / "train.parquet"))["messages"][:4]
    Dataset.from_dict({"messages": chats}).to_parquet(tmp_path / "few" / "train.parquet")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(inputs / "base"), load_tokenizer(str(inputs / "base"))
    total, tokens = 0.0, 0
    for chat in chats:
        ids = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
        # By the marks in the text: from behind the assistant's to the end of its turn.
        marks = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("assistant", "end_of_turn")}
        trained, inside = [], False
        for i, token in enumerate(ids):
            if inside:
                trained.append(i)
            inside = token == marks["assistant"] or (inside and token != marks["end_of_turn"])
        with torch.no_grad():
            log_probs = model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
        total -= sum(log_probs[i - 1, ids[i]].item() for i in trained)
        tokens += len(trained)
    few = {
        "dataset": tmp_path / "few",
        "eval_strategy": "no",
        "max_steps": 1,
        "learning_rate": 1e-12,
        "logging_steps": 1,
    }
    for name, packing in (("packed", {"packing": True, "per_device_train_batch_size": 1, "max_length": 256}),
                          ("padded", {"packing": False, "per_device_train_batch_size": 4})):  # fmt: skip
        ended = run(inputs, tmp_path / name, **few, **packing)
        assert ended.returncode == 0, ended.stderr
        loss = json.loads((tmp_path / name / "run.json").read_text())["metrics"]["train_loss"]
        assert loss == pytest.approx(total / tokens, rel=1e-4)


def test_an_adapter_opens_with_its_base_and_changes_its_answers(adapter, inputs):
    model, tokenizer = open_for_inference(adapter)
    ids = torch.tensor([tokenizer.apply_chat_template([{"role": "user", "content": "?"}])["input_ids"]])
    with torch.no_grad(), model.disable_adapter():
        base = model(ids).logits
    with torch.no_grad():
        assert not torch.allclose(model(ids).logits, base)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(inputs / "base")(ids).logits, base)
    assert tokenizer.eot_token_id in model.generation_config.eos_token_id
    assert {path.name for path in adapter.glob("*.safetensors")} == {"adapter_model.safetensors"}
    record = json.loads((adapter / "run.json").read_text())
    stored = sum(tensor.numel() for tensor in load_file(adapter / "adapter_model.safetensors").values())
    assert record["model"]["trainable_parameters"] == stored


PISSA = LORA | {"lora_init": "pissa", "lora_dropout": 0.1}


@pytest.mark.parametrize("options", [LORA, pytest.param(PISSA, marks=pytest.mark.slow)], ids=["lora", "pissa_dropout"])
def test_a_killed_adapter_run_goes_on_as_if_nothing_had_happened(inputs, adapter, tmp_path, options):
    undisturbed = adapter
    if options is not LORA:
        undisturbed = tmp_path / "undisturbed"
        assert run(inputs, undisturbed, **options).returncode == 0
    folder = tmp_path / "killed"
    kill_when_there(sft(inputs, folder, **options), folder / "checkpoint-4")
    assert json.loads((folder / "run.json").read_text())["status"] == "running"
    ended = run(inputs, folder, **options)
    assert ended.returncode == 0, ended.stderr
    assert losses(folder) == losses(undisturbed)
    expected = load_file(undisturbed / "adapter_model.safetensors")
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        assert torch.equal(tensor, expected[name]), name


def test_an_adapter_on_four_bits_leaves_the_base_as_it_is(inputs, tmp_path):
    before = base_hash(inputs)
    ended = run(inputs, tmp_path / "run", **LORA, load_in_4bit=True, max_steps=4)
    assert ended.returncode == 0, ended.stderr
    assert base_hash(inputs) == before
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["quantization"]["type"] == "nf4"
    assert "not paged" in ended.stdout
    assert {tensor.dtype for tensor in load_file(tmp_path / "run" / "adapter_model.safetensors").values()} == {
        torch.float32
    }


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, LORA], ids=["full", "lora"])
def test_two_processes_make_the_run_of_one(inputs, tmp_path, options):
    alone = run(inputs, tmp_path / "one", **options, max_steps=3)
    assert alone.returncode == 0, alone.stderr
    together = run(
        inputs, tmp_path / "two", accelerate_two_processes(), **options, per_device_train_batch_size=2, max_steps=3
    )
    assert together.returncode == 0, together.stderr
    one, two = ({(s, n): v for s, n, v in losses(tmp_path / name)} for name in ("one", "two"))
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert two[key] == pytest.approx(value, rel=2e-3), key


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"load_in_4bit": True}, "--use_peft true"),
        ({"max_length": 4096}, "does not fit the model's context of 256 tokens"),
        ({"padding_free": True}, "--padding_free has no effect here"),
        ({"lora_r": 4}, "--lora_r has no effect without --use_peft true"),
        ({"model": "nowhere"}, "'nowhere' cannot be opened"),
        ({"per_device_train_batch_size": 512}, "a step takes 512"),
        ({"lora_r": 0, "use_peft": True}, "--lora_r is 0"),
        ({"dataset": "wikipedia_leads"}, "is of text, not"),
    ],
)
def test_mistakes_are_told_in_one_line_and_leave_nothing_behind(inputs, tmp_path, capsys, monkeypatch, changes, said):
    code, printed = run_here(inputs, tmp_path / "run", capsys, monkeypatch, **changes)
    assert code == 2
    assert said in printed.err.strip().splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_a_template_and_tokens_of_another_tokenizer_come_once_and_end_replies(inputs, tmp_path, capsys, monkeypatch):
    """Onto tied embeddings below an adapter; and its end of turn stays an end beside its end of text."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn_ends|>"]})
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end_of_turn|>", "<|turn_ends|>")
    tokenizer.save_pretrained(tmp_path / "other")
    changes = LORA | {"chat_template_path": tmp_path / "other", "max_steps": 1, "eval_steps": 1}
    code, printed = run_here(inputs, tmp_path / "run", capsys, monkeypatch, **changes)
    assert code == 0, printed.err
    model, tokenizer = open_for_inference(tmp_path / "run")
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|turn_ends|>")}
    assert ends <= set(model.generation_config.eos_token_id)


def test_a_model_whose_packed_conversations_see_each_other_is_refused(inputs, tmp_path, capsys, monkeypatch):
    tokenizer = load_tokenizer(str(inputs / "base"))
    sizes = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "num_hidden_layers": 2}
    config = OPTConfig(vocab_size=len(tokenizer), num_attention_heads=2, max_position_embeddings=256, **sizes)
    OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    tokenizer.save_pretrained(tmp_path / "opt")
    changes = {"model": tmp_path / "opt", "max_steps": 1, "eval_steps": 1}
    code, printed = run_here(inputs, tmp_path / "packed", capsys, monkeypatch, **changes)
    assert code == 2
    assert "--packing false" in printed.err.strip().splitlines()[-1]
    code, printed = run_here(inputs, tmp_path / "padded", capsys, monkeypatch, **changes, packing=False)
    assert code == 0, printed.err


def test_marks_of_a_template_without_a_place_for_a_system_prompt():
    tokenizer = tiny_tokenizer()
    marks = chat_marks(tokenizer)
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = refusal + tokenizer.chat_template
    assert set(chat_marks(tokenizer)) <= set(marks)
    assert tokenizer.eot_token_id in chat_marks(tokenizer)


def test_a_question_longer_than_the_context_has_no_answer(tuned):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tuned), load_tokenizer(str(tuned))
    assert reply(model, tokenizer, "What is a river? " * 200) == {"text": "", "ended": False}


def test_an_adapter_is_no_base(inputs, adapter, tmp_path, capsys, monkeypatch):
    code, printed = run_here(inputs, tmp_path / "run", capsys, monkeypatch, model=adapter)
    assert code == 2
    assert "training.merge_adapter" in printed.err


def test_a_dry_run_predicts_and_writes_nothing(inputs, tmp_path, capsys, monkeypatch):
    code, printed = run_here(inputs, tmp_path / "run", capsys, monkeypatch, **LORA, dry_run=True)
    assert code == 0
    assert "total" in printed.out
    assert "fits" in printed.out
    assert not (tmp_path / "run").exists()
