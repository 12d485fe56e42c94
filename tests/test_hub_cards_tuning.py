"""The cards of tuned models: whole, an adapter alone, or merged; what run.json says, on the right terms, working."""

import copy
import math
import re
from pathlib import Path

import pytest
from card_runs import card_text, pictures, python_snippets, run_as_stranger, write_run
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from hf_models import LlamaStyleConfig, LlamaStyleForCausalLM, LlamaStyleForSequenceClassification
from hf_models.bpe_tokenizer import train_bpe
from hub_cards.build_card import build_card

TASKS = ("sft", "dpo", "reward")
KINDS = ("full", "adapter", "merged")
QUESTION = 'Who wrote "Hamlet"?'
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
}
INFO = {
    "name": "Questions | answers",
    "license": "cc-by-sa-4.0",
    "language": ["en"],
    "origin": "Questions on leads of Wikipedia.",
    "attribution": "Text by Wikipedia's contributors.",
}
METRICS = {
    "sft": {"eval_loss": 2.3456, "eval_perplexity": math.exp(2.3456), "eval_token_accuracy": 0.4321},
    "dpo": {"eval_loss": 0.6123, "eval_accuracy": 0.64, "eval_margin": 0.219},
    "reward": {"eval_loss": 0.5321, "eval_accuracy": 0.72, "eval_margin": 1.043},
}
ADAPTER = {
    "r": 16,
    "lora_alpha": 32.0,
    "lora_dropout": 0.05,
    "target_modules": ["k_proj", "q_proj"],
    "use_rslora": False,
    "use_dora": False,
    "init": "default",
    "modules_to_save": [],
}
QUANTIZATION = {
    "bits": 4,
    "type": "nf4",
    "double_quantization": True,
    "compute_dtype": "bfloat16",
    "optimizer": "adamw_bnb_8bit",
}


def tuned_run(task: str, kind: str = "full") -> dict:
    """A finished run as the scripts of `training/` record it."""
    metrics = METRICS[task]
    data = {"dataset": "instructions", "fingerprint": "0123456789abcdef", "info": INFO}
    history = []
    for step in range(10, 70, 10):
        history.append({"step": step, "loss": 5 / step, "learning_rate": 1e-3 / step, "tokens_seen": 6200 * step})
        if step % 20 == 0:
            history.append({"step": step} | metrics)
    run = {
        "task": task,
        "status": "finished",
        "arguments": {"model": "runs/base", "learning_rate": 2e-4, "lora_r": 16, "output_dir": "runs/tuned"},
        "data": {
            "train": data | {"split": "train", "rows": 8123},
            "eval": data | {"split": "test", "rows": 407},
            "model": {"path": "runs/base", "fingerprint": "0123456789abcdef"},
        },
        "command": f"python -m training.{task} --config quickstart.yaml",
        "git_revision": "0123abcd",
        "libraries": {"torch": "2.14.1", "trl": "1.16.0", "peft": "0.21.2"},
        "hardware": {"cpu": "Some CPU", "cores": 2, "memory_gib": 23.5, "accelerators": [], "processes": 1},
        "wall_time_seconds": 171.0,
        "model": {
            "parameters": 5868800,
            "trainable_parameters": 5868800,
            "config": SHAPE | {"model_type": "llama_style", "auto_map": {"AutoConfig": "configuration.Config"}},
        },
        "training": {"seed": 42, "precision": "bf16", "max_length": 256, "packing": True, "examples_per_step": 16},
        "counts": {
            "train": {"rows": 8123, "truncated": 311, "left_out": 17},
            "eval": {"rows": 407, "truncated": 12, "left_out": 7},
        },
        "base_run": {
            "path": "runs/base",
            "task": "pretrain_lm",
            "data": "Wikipedia leads (English)",
            "license": "cc-by-sa-4.0",
            "metrics": {"eval_bits_per_byte": 1.8482, "tokens_seen": 1808415},
        },
        "metrics": metrics | {"train_loss": 2.2, "tokens_seen": 372000, "tokens_per_second": 8100.0},
        "history": history,
        "samples": [],
    }
    if task == "reward":
        run["example"] = {"chosen": "<|user|>?", "rejected": "<|user|>|", "chosen_score": 0.7, "rejected_score": -0.12}
    else:
        run["samples"] = [
            {"step": 40, "prompt": QUESTION, "text": "Not yet.", "ended": True},
            {"step": 60, "prompt": QUESTION, "text": "It was ```written``` | by\n\n# a man", "ended": True},
            {"step": 60, "prompt": "Hello!", "text": "Hi hi hi", "ended": False},
        ]
    if kind != "full":
        run["model"]["trainable_parameters"] = 98304
        run["adapter"] = copy.deepcopy(ADAPTER)
    if kind == "merged":
        run["merged"] = {
            "adapter": "runs/adapter",
            "base": "runs/base",
            "dtype": "bfloat16",
            "largest_logit": 12.5,
            "max_logit_difference": 3.1e-6,
            "max_logit_difference_as_stored": 0.021,
            "mean_logit_difference_to_quantized": 0.14,
            "max_logit_difference_to_quantized": 0.87,
        }
    return run


def without_pictures(run: dict) -> dict:
    """They take most of a card's time."""
    return {name: section for name, section in run.items() if name != "history"}


def terms(folder: Path, run: dict) -> tuple[str | None, str]:
    card = ModelCard.load(build_card(write_run(folder, without_pictures(run))))
    return card.data.license, " ".join(card.text.split())


@pytest.mark.parametrize("task", TASKS)
def test_metadata_is_what_the_run_recorded(tmp_path, task):
    full = ModelCard.load(build_card(write_run(tmp_path / "full", without_pictures(tuned_run(task))))).data
    assert full.library_name == "transformers"
    assert full.pipeline_tag == ("text-classification" if task == "reward" else "text-generation")
    assert {"trl", "custom_code", "llama_style"} <= set(full.tags)
    assert "lora" not in full.tags
    assert {result.metric_value for result in full.eval_results} <= set(METRICS[task].values())
    assert {result.dataset_split for result in full.eval_results} == {"test"}
    run = without_pictures(tuned_run(task, "adapter")) | {"quantization": QUANTIZATION}
    adapter = ModelCard.load(build_card(write_run(tmp_path / "adapter", run))).data
    assert adapter.library_name == "peft"
    assert {"lora", "qlora"} <= set(adapter.tags)
    merged = ModelCard.load(build_card(write_run(tmp_path / "merged", tuned_run(task, "merged")))).data
    assert merged.library_name == "transformers"
    assert "lora" in merged.tags


def test_a_base_is_linked_where_it_is_on_the_hub(tmp_path):
    run = without_pictures(tuned_run("sft", "adapter"))
    assert ModelCard.load(build_card(write_run(tmp_path / "local", run))).data.base_model is None
    assert "names its base by a path, `runs/base`" in card_text(tmp_path / "local", run)
    run["data"]["model"] |= {"path": "someone/base", "source": "hub"}
    del run["base_run"]
    assert ModelCard.load(build_card(write_run(tmp_path / "hub", run))).data.base_model == "someone/base"
    assert "by a path" not in card_text(tmp_path / "hub", run)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_card_is_whole_and_its_tables_and_pictures_are_sound(tmp_path, task, kind):
    card = card_text(tmp_path / "run", tuned_run(task, kind))
    headings = ["Use", "Results", "What it began with", "Model", "Data and licence", "Training", "Limits"]
    headings += (
        ["Reproduce", "Citation"] + ["Adapter"] * (kind != "full") + ["Example" if task == "reward" else "Samples"]
    )
    for heading in headings:
        assert f"\n\n## {heading}\n\n" in card
    assert len(re.findall("^## ", card, flags=re.MULTILINE)) == len(headings)
    assert str(tmp_path) not in card
    assert "\n\n\n" not in card
    assert "None" not in card
    assert "lora_r" not in card  # in the adapter's table, as the rank
    for table in re.findall(r"(?:^\|.*\n)+", card, flags=re.MULTILINE):
        assert {len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()} == {table.split("\n")[1].count("|")}
        assert re.fullmatch(r"\|(:?-+:?\|)+", table.split("\n")[1])
    assert len(pictures(card)) == 3
    for picture in pictures(card):
        Image.open(tmp_path / "run" / picture).verify()
        assert (tmp_path / "run" / picture).stat().st_size <= 100_000


@pytest.mark.parametrize(
    ("task", "section"),
    [
        (task, name)
        for task in TASKS
        for name in sorted(tuned_run(task, "merged").keys() - {"task", "model", "history"})
    ],
)
def test_no_section_leans_on_another(tmp_path, task, section):
    run = without_pictures(tuned_run(task, "merged"))
    del run[section]
    card = card_text(tmp_path / "run", run)
    assert "\n\n\n" not in card
    assert "None" not in card


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("adapter", [{}, {"r": 8}])
def test_missing_sections_vanish(tmp_path, task, adapter):
    run = {"task": task, "model": {"parameters": 1000}} | ({"adapter": adapter} if adapter else {})
    card = card_text(tmp_path / "run", run)
    found = re.findall(r"^## (.*)", card, flags=re.MULTILINE)
    assert found == ["Use", "Model", *(["Adapter"] if adapter else []), "Limits", "Citation"]
    assert "%" not in card
    assert "model-index" not in card


def test_the_figures_are_the_run_s(tmp_path):
    card = card_text(tmp_path / "sft", without_pictures(tuned_run("sft", "adapter")))
    for row in (
        f"| **Perplexity (per token)** | **{math.exp(2.3456):.4g}** |",
        "| Loss (nats a token) | 2.346 |",
        "| Tokens predicted right | 43.2% |",
        "| Questions \\| answers, train (training) | 8,123 | 311 | 17 |",
        "| Questions \\| answers, test (held out) | 407 | 12 | 7 |",
        "| Rank | 16 |",
        "| Layers | `k_proj`, `q_proj` |",
        f"| Trained parameters | 98,304, {98304 / 5868800:.2%} of the base's |",
        "| Bits per byte of its own held-out text | 1.848 |",
    ):
        assert row in card
    assert "LoRA adapter alone** of rank 16" in card
    assert "Before" not in card
    merged = card_text(tmp_path / "merged", without_pictures(tuned_run("sft", "merged")))
    assert "by at most 3.1e-06, where the largest is 12.5 |" in merged
    assert "| – once rounded to bfloat16 | by at most 0.021 |" in merged
    assert "by at most 0.87, on average 0.14 |" in merged
    assert "All its weights were trained." in card_text(tmp_path / "full", without_pictures(tuned_run("sft")))


def test_a_model_that_was_trained_in_4_bits_says_what_its_figures_are_of(tmp_path):
    for kind in ("adapter", "merged"):
        run = without_pictures(tuned_run("sft", kind))
        assert "with the base in 4 bits" not in " ".join(card_text(tmp_path / "run", run).split())
        card = card_text(tmp_path / "run", run | {"quantization": QUANTIZATION})
        assert "with the base in 4 bits" in " ".join(card.split())


def test_figures_from_before_training_stand_beside_those_from_after(tmp_path):
    run = without_pictures(tuned_run("sft"))
    run["metrics"]["eval_loss_before"] = 4.5678
    card = card_text(tmp_path / "sft", run)
    assert "| Loss (nats a token) | 2.346 | 4.568 |" in card
    assert "| Tokens predicted right | 43.2% |  |" in card


@pytest.mark.parametrize("task", ["dpo", "reward"])
def test_an_accuracy_over_pairs_comes_with_its_standard_error(tmp_path, task):
    card = card_text(tmp_path / "run", without_pictures(tuned_run(task)))
    accuracy = METRICS[task]["eval_accuracy"]
    assert "With 400 pairs the standard error of this accuracy" in card  # 407, of which 7 were left out
    assert f"**{100 * math.sqrt(accuracy * (1 - accuracy) / 400):.1f} points**" in card
    assert f"**{accuracy:.1%}**" in card
    run = without_pictures(tuned_run(task))
    run["metrics"]["eval_accuracy"] = 1.0
    assert "standard error" not in card_text(tmp_path / "run", run)


def test_samples_are_of_the_last_step_and_say_what_had_not_ended(tmp_path):
    card = card_text(tmp_path / "run", without_pictures(tuned_run("sft")))
    assert f"Prompt `{QUESTION}`:\n\n````text\nIt was ```written``` | by\n\n# a man\n````" in card
    assert "Prompt `Hello!` (the reply had not ended at the limit, and is cut off there):\n" in card
    assert "Not yet." not in card
    run = without_pictures(tuned_run("sft"))
    run["samples"][-1] |= {"text": " ", "ended": True}
    assert "\n\nPrompt `Hello!`: the reply was empty.\n\n" in card_text(tmp_path / "run", run)


@pytest.mark.parametrize(
    ("changes", "papers"),
    [
        ({}, {"2106.09685"}),
        ({"use_dora": True}, {"2106.09685", "2402.09353"}),
        ({"use_rslora": True}, {"2106.09685", "2312.03732"}),
        ({"init": "pissa_niter_4"}, {"2106.09685", "2404.02948"}),
        ({"init": "eva"}, {"2106.09685", "2410.07170"}),
    ],
)
def test_what_was_used_is_cited(tmp_path, changes, papers):
    run = without_pictures(tuned_run("dpo", "adapter"))
    run["adapter"] |= changes
    run["quantization"] = QUANTIZATION
    card = card_text(tmp_path / "run", run)
    citation = card.split("## Citation")[1]
    methods = {"2106.09685", "2402.09353", "2312.03732", "2404.02948", "2410.07170"}
    assert set(re.findall(r"arXiv ([\d.]+)", citation)) & methods == papers
    assert {"2305.14314", "2305.18290"} <= set(re.findall(r"arXiv ([\d.]+)", citation))
    assert "| Optimizer | `adamw_bnb_8bit` |" in card
    assert "| Base in training | 4 bits (NF4 with double quantisation), computing in bfloat16 |" in card


def test_a_run_claims_the_licence_that_base_and_data_share_and_no_other(tmp_path):
    shared = tuned_run("sft")
    license, text = terms(tmp_path / "run", shared)
    assert license == "cc-by-sa-4.0"
    assert "the licence of those conversations and of `runs/base`" in text
    differing = copy.deepcopy(shared)
    differing["base_run"]["license"] = "mit"
    license, text = terms(tmp_path / "run", differing)
    assert license is None
    assert "two licences to respect: that of `runs/base`, which the run began with, `mit`, and that of" in text
    assert "those conversations, `cc-by-sa-4.0`" in text
    unknown_base = copy.deepcopy(shared)
    unknown_base["base_run"]["license"] = None
    license, text = terms(tmp_path / "run", unknown_base)
    assert license is None
    assert "this run does not know it" in text
    unknown_data = copy.deepcopy(shared)
    del unknown_data["data"]["train"]["info"]
    license, text = terms(tmp_path / "run", unknown_data)
    assert license is None
    assert "recorded no licence of those conversations" in text
    assert "`cc-by-sa-4.0`" in text  # the base's
    adapter = terms(tmp_path / "run", tuned_run("sft", "adapter"))[1]
    assert "The adapter is under `cc-by-sa-4.0`" in adapter


def test_only_custom_code_asks_for_trust(tmp_path):
    run = without_pictures(tuned_run("sft"))
    assert card_text(tmp_path / "ours", run).count("trust_remote_code=True)") == 3
    run["model"]["config"] = SHAPE | {"model_type": "qwen2"}
    card = card_text(tmp_path / "theirs", run)
    assert "trust_remote_code" not in card
    assert "LLaMA" not in card
    assert "Apache-2.0" not in card


def save_folders(folder: Path, of_ours: bool, tokenizer) -> dict[str, dict]:
    """A base, the models tuned from it and adapters for it, beside each other; the runs of the tuned ones."""
    config_class, causal_lm, classifier = (
        (LlamaStyleConfig, LlamaStyleForCausalLM, LlamaStyleForSequenceClassification)
        if of_ours
        else (LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification)
    )
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = config_class(vocab_size=len(tokenizer), **SHAPE, **special)
    base, runs = f"base_{of_ours}", {}
    causal_lm(config).save_pretrained(folder / base)
    for task in TASKS:
        for kind in ("full", "adapter"):
            options = {"num_labels": 1} if task == "reward" else {}
            model = (classifier if task == "reward" else causal_lm).from_pretrained(folder / base, **options)
            run = without_pictures(tuned_run(task, kind))
            run["model"]["config"] = model.config.to_dict()
            run["data"]["model"]["path"] = base
            if kind == "adapter":
                settings = LoraConfig(
                    task_type="SEQ_CLS" if task == "reward" else "CAUSAL_LM", target_modules=["q_proj"]
                )
                model = get_peft_model(model, settings)
                settings.base_model_name_or_path = base  # as the reader sees it, who works beside the folders
            name = f"{task}_{kind}_{of_ours}"
            model.save_pretrained(folder / name)
            if task != "reward":
                model.generation_config.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
            runs[name] = run
    return runs


def test_snippets_run_where_our_packages_are_not(tmp_path):
    """Those of every task, of whole models and adapters, ours and transformers', in one process, beside the folders."""
    tokenizer = train_bpe(["Who wrote Hamlet? What is a river?"] * 3, vocab_size=275)
    runs = save_folders(tmp_path, True, tokenizer) | save_folders(tmp_path, False, tokenizer)
    for name, run in runs.items():
        run["arguments"] |= {"output_dir": name}  # the bases, too, are named as seen from there
    cards = "".join(card_text(tmp_path / name, run) for name, run in runs.items())
    snippets = python_snippets(cards)
    assert snippets.count("AutoPeftModelForCausalLM.from_pretrained(") == 8  # to ask, and to merge
    assert snippets.count("AutoPeftModelForSequenceClassification.from_pretrained(") == 4
    printed = run_as_stranger(cards, tmp_path)
    scores = re.findall(r"^[+-]\d+\.\d{3} ", printed, flags=re.MULTILINE)
    assert len(scores) == 8  # two answers by each whole model, and by each adapter
    assert (tmp_path / "merged" / "model.safetensors").is_file()
