"""What the tests of GRPO and of the R1 road train on: a tiny model that answers sums, in more ways than one."""

import json
from pathlib import Path

import torch

from hf_models import LlamaStyleConfig, LlamaStyleForCausalLM
from hf_models.bpe_tokenizer import train_bpe

SUMS = [(a, b) for a in range(10) for b in range(10)]
TEMPLATE = "Sum: {question}\nAnswer:"
ARGUMENTS = {
    "question_column": "q",
    "answer_column": "a",
    "prompt_template": TEMPLATE,
    "apply_chat_template": False,
    "eval_dataset_split": "test",
    "num_eval_problems": 8,
    "eval_samples": 2,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 16,
    "num_generations": 4,
    "max_completion_length": 12,
    "precision": "fp32",
    "learning_rate": 1e-4,
    "max_steps": 4,
    "logging_steps": 1,
    "eval_steps": 4,
    "save_steps": 2,
    "disable_tqdm": True,
    "use_cpu": True,
}


def question(a: int, b: int) -> str:
    return f"{a} + {b} ="


def make_inputs(folder: Path) -> Path:
    """`folder` with `problems/{train,test}.jsonl` (80 and 20 sums) and `model`, half of whose answers are tagged."""
    problems = folder / "problems"
    problems.mkdir(parents=True)
    for split, sums in (("train", SUMS[:80]), ("test", SUMS[80:])):
        lines = [json.dumps({"q": question(a, b), "a": str(a + b)}) + "\n" for a, b in sums]
        (problems / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")

    documents = []
    for a, b in SUMS:
        prompt = TEMPLATE.replace("{question}", question(a, b))
        documents += [prompt + f" {a + b}", prompt + f"<think>{a}+{b}</think><answer>{a + b}</answer>"]
    tokenizer = train_bpe(documents, 280)
    torch.manual_seed(0)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlamaStyleConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, **special,
    )  # fmt: skip
    model = LlamaStyleForCausalLM(config).train()
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in documents]
    ids = [[tokenizer.bos_token_id, *one, tokenizer.eos_token_id] for one in ids]
    longest = max(map(len, ids))
    batch = torch.tensor([one + [tokenizer.pad_token_id] * (longest - len(one)) for one in ids])
    labels = batch.masked_fill(batch == tokenizer.pad_token_id, -100)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(60):
        model(input_ids=batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.eval().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder
