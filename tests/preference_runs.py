"""A tiny language model, pairs of answers, and the commands that train on them, for the tests of DPO and rewards."""

import json
from pathlib import Path

from training_runs import command, run

from hf_models import LlamaStyleConfig, LlamaStyleForCausalLM
from hf_models.bpe_tokenizer import train_bpe

CITIES = ("Paris", "Rome", "Oslo", "Cairo", "Lima", "Quito", "Delhi", "Accra", "Bern", "Riga", "Sofia", "Tunis")
LANDS = ("France", "Italy", "Norway", "Egypt", "Peru", "Ecuador", "India", "Ghana", "Austria", "Latvia", "Bulgaria")
ARGUMENTS = {
    "precision": "fp32",
    "max_length": 96,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 4,  # three batches of the ten held-out pairs, the last one of two
    "max_steps": 8,
    "learning_rate": 0.001,
    "logging_steps": 2,
    "eval_steps": 4,
    "save_steps": 4,
    "disable_tqdm": True,
    "use_cpu": True,
}


def pair(number: int) -> dict:
    city, land = CITIES[number % len(CITIES)], LANDS[number % len(LANDS)]
    question = {"role": "user", "content": f"Where is {city}, and what is {number}?"}
    return {
        "prompt": [question],
        "chosen": [{"role": "assistant", "content": f"{city} is a city in {land}. {number} is a number."}],
        "rejected": [{"role": "assistant", "content": f"It is {land}" + " or not" * (number % 5) + "."}],
    }


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_inputs(folder: Path) -> Path:
    """`folder` with `model`, `pairs/train.jsonl` (40) and `pairs/test.jsonl` (10)."""
    import torch

    torch.manual_seed(0)
    texts = [message["content"] for i in range(60) for side in pair(i).values() for message in side]
    tokenizer = train_bpe(texts * 3, 320)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlamaStyleConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128, **special,
    )  # fmt: skip
    LlamaStyleForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_jsonl(folder / "pairs" / "train.jsonl", [pair(i) for i in range(40)])
    write_jsonl(folder / "pairs" / "test.jsonl", [pair(i) for i in range(40, 50)])
    return folder


def training_command(module, inputs, output_dir, launcher=(), **changes):
    given = {"model": inputs / "model", "dataset": inputs / "pairs", "output_dir": output_dir}
    return command(module, given | ARGUMENTS | changes, launcher)


def run_training(*args, **changes):
    return run(training_command(*args, **changes))


def in_this_process(prepare, module, inputs, output_dir, monkeypatch, **changes):
    """What `prepare` returns for a command line."""
    words = training_command(module, inputs, output_dir, **changes)
    monkeypatch.setattr("sys.argv", words[words.index(module) :])
    return prepare()
