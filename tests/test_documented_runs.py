"""The commands of the documentation are run, in one scratch folder and cut to a step or two.

What a command needs is made first, by the documented command that makes it. A command that is not run is listed in
`NOT_RUN` with the reason; one that is neither run nor listed fails. Some of them:

    pytest -m slow tests/test_documented_runs.py -k sft
"""

import itertools
import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from command_process import run_code, run_module
from documented_commands import MARKDOWN, ROOT, documented_commands, markdown_blocks
from PIL import Image
from tiny_solver import SOLUTIONS

from hf_models import ConvNextV2FcmaeConfig, ConvNextV2FcmaeForImageClassification, ConvNextV2FcmaeForPreTraining
from hf_models.convnextv2_fcmae.checkpoints import save_checkpoint

LONG = "takes a quarter of an hour or more; its stages are run here"
WHOLE_SUITE = "is the tests"
NEEDS_GPUS = "is for several GPUs; test_llama_style_distributed.py goes with two processes on a CPU"
NEEDS_HUB = "needs the Hub"
NEEDS_REGISTRY = "needs a package registry"
MEASURES = "measures for minutes on a quiet machine; benchmarks/results has what it found"
ELSEWHERE = "is run by a test of its own"
OWN_INSTALLATION = "needs an installation of its own"
NEEDS_DATA = "is for data that cannot be had here"
# A command, or the beginning of several -> why it is not run here.
NOT_RUN = {
    "make quickstart": LONG,
    "make demo-vision": LONG,
    "make demo-r1": LONG,
    "make demo-text": "is two commands that are run here",
    "make kenlm": NEEDS_REGISTRY,
    "python -m training.train_perplexity_model": f"{ELSEWHERE}, test_perplexity.py, where KenLM is",
    "python -m training.train_reference_classifier --config": NEEDS_DATA,
    "python -m training.text_pipeline.cited_urls": f"{ELSEWHERE}, test_reference_classifier.py",
    "python -m training.prepare_text --config training/recipes/text_pipeline/llama_mixture.yaml": NEEDS_DATA,
    "python -m training.prepare_text --config training/recipes/text_pipeline/web_": NEEDS_DATA,
    "python -m training.pretrain_lm --dataset runs/text/llama_mixture/tokens": f"{ELSEWHERE}, test_token_data.py",
    "python -m training.crawl": f"{ELSEWHERE}, test_crawl.py, against a site of its own",
    "make test": WHOLE_SUITE,
    "make lint": WHOLE_SUITE,
    "make llama-cpp": NEEDS_REGISTRY,
    "python -m pytest": WHOLE_SUITE,
    "python -m training.quickstart": LONG,
    "python -m training.r1 --base FOLDER": f"{ELSEWHERE}, test_r1.py",
    "python -m training.r1 --config": f"{ELSEWHERE}, test_r1.py, with shorter recipes",
    "python -m benchmarks.": MEASURES,
    "accelerate launch --config_file": NEEDS_GPUS,
    "python -m training.sft --config training/recipes/llama_style/sft_7b.yaml": NEEDS_GPUS,
    "python -m training.grpo --config training/recipes/llama_style/grpo_7b.yaml": NEEDS_GPUS,
    "python -m training.pretrain_fcmae --config training/recipes/convnextv2_fcmae/pretrain_atto.yaml": NEEDS_GPUS,
    "python -m training.finetune_classifier --config training/recipes/convnextv2_fcmae/finetune_atto.yaml": NEEDS_GPUS,
    "python -m training.sft --model openai-community/gpt2": NEEDS_HUB,
    "python -m training.evaluate --model FOLDER --tasks arc_easy": NEEDS_HUB,
    "python -m training.evaluate --model runs/sft --tasks wikipedia_leads_title arc_easy": NEEDS_HUB,
    "lm_eval": NEEDS_HUB,
    "python -m hub_cards.publish": f"{ELSEWHERE}, test_publish.py, against a Hub of its own; as a dry run here too",
    "python -m hub_cards.space FOLDER": f"{ELSEWHERE}, test_space_browser.py",
    "transformers serve": f"{ELSEWHERE}, test_transformers_serve.py",
    "transformers chat": f"{ELSEWHERE}, test_transformers_serve.py",
    "llama-cli": OWN_INSTALLATION,
    "vllm serve": OWN_INSTALLATION,
    "pip ": NEEDS_REGISTRY,
    "npm ": NEEDS_REGISTRY,
    "apt-get ": NEEDS_REGISTRY,
    "dpkg-deb ": NEEDS_REGISTRY,
    "python training/sample_data/": NEEDS_REGISTRY,
}

STEPS = "--max_steps 2 --eval_steps 2 --save_steps 2 --logging_steps 1 --warmup_steps 0 --lr_scheduler_type constant"
SMALL_BATCHES = "--per_device_train_batch_size 4 --per_device_eval_batch_size 8"
# What makes a module's work short.
CUTS = {
    "training.pretrain_lm": f"{STEPS} {SMALL_BATCHES} --lr_scheduler_kwargs {{}}",
    "training.pretrain_fcmae": f"{STEPS} {SMALL_BATCHES}",
    "training.finetune_classifier": f"{STEPS} {SMALL_BATCHES} --warmup_epochs 0 --eval_strategy steps "
    "--save_strategy steps",
    "training.sft": f"{STEPS} {SMALL_BATCHES}",
    "training.dpo": f"{STEPS} {SMALL_BATCHES}",
    "training.reward": f"{STEPS} {SMALL_BATCHES}",
    "training.grpo": f"{STEPS} --per_device_train_batch_size 4 --num_generations 2 --max_completion_length 8 "
    "--num_eval_problems 2 --eval_samples 2",
    "training.build_preferences": "--dataset_split train[:12] --eval_dataset_split test[:6] --max_new_tokens 8",
    "training.chain_sum_texts": "--num_problems 600 --num_facts 60 --num_articles 10",
    "training.collect": "--num_problems 3 --max_new_tokens 40 --test_share 0.34",
    "training.evaluate": "--limit 3 --max_new_tokens 4",
    "training.chat": "--max_new_tokens 4",
    "training.train_language_id": "--buckets 2000 --epochs 2",
    "training.train_reference_classifier": "--max_documents 100",
}
# Of the samples, and of what the commands make, a part.
SPLITS = {
    "training.pretrain_lm": "--dataset_split train[:100] --eval_dataset_split test[:10]",
    "training.pretrain_fcmae": "--dataset_split train[:40] --eval_dataset_split test[:10]",
    "training.finetune_classifier": "--dataset_split train[:80] --eval_dataset_split test[:20]",
    "training.sft": "--dataset_split train[:100] --eval_dataset_split test[:10]",
    "training.dpo": "--dataset_split train[:20] --eval_dataset_split test[:10]",
    "training.reward": "--dataset_split train[:20] --eval_dataset_split test[:10]",
}
# What stands for a placeholder, by the module that reads it and by the command.
PLACEHOLDERS = {
    "training.pretrain_lm": {"FOLDER": "runs/quickstart/language_model"},
    "training.prepare_text": {
        "crawl/*.warc.gz": "training/sample_data/small_crawl/*.warc.gz",
        "lid.176.bin": "runs/text_quickstart/language_id/language_id.bin",
    },
    "training.train_language_id": {"FOLDER": "languages"},
    "training.train_reference_classifier": {"data/cited_pages": "wikipedia_leads", "data/random_pages": "texts.jsonl"},
    "training.pretrain_fcmae": {"FOLDER": "images"},
    "training.finetune_classifier": {"FOLDER": "images"},
    "training.sft": {"FOLDER": "runs/quickstart/language_model"},
    "training.grpo": {"FOLDER": "runs/quickstart/chat"},
    "training.collect": {"FOLDER": "solver", "runs/r1/zero": "solver", "reasoning_gym:chain_sum": "problems.jsonl"},
    "training.evaluate": {
        "FOLDER": "runs/quickstart/language_model",
        "FILE.jsonl": "questions.jsonl",
        "runs/sft": "runs/quickstart/chat",
    },
    "training.chat": {"FOLDER": "runs/quickstart/chat", "runs/sft": "runs/quickstart/chat"},
    "training.NAME": {"training.NAME": "training.chat"},
    "hub_cards.build_card": {"FOLDER": "runs/quickstart/language_model"},
    "hub_cards.publish": {"FOLDER": "runs/quickstart/language_model"},
    "hf_models.convert": {
        "FOLDER": "runs/quickstart/language_model",
        "SRC": "runs/quickstart/classifier",
        "LAYOUT": "transformers",
    },
}
VISION_LAYOUTS = ("official", "official_sparse", "onnx")


def not_run(command):
    if command.module == "hub_cards.publish" and "--dry_run" in command.words:
        return None
    return next((reason for start, reason in NOT_RUN.items() if command.text.startswith(start)), None)


def option(words, name):
    return words[words.index(name) + 1] if name in words[:-1] else None


def check(text, status, output):
    assert status == 0, f"{text}\n\n{output[-4000:]}"


class Workshop:
    """A folder in which documented commands are run, each once."""

    def __init__(self, folder):
        self.folder = folder
        for name in ("training", "hf_models", "hub_cards"):
            (folder / name).symlink_to(ROOT / name)
        self.commands = [c for c in documented_commands() if not_run(c) is None]
        self.words = {command: self._filled(number, command) for number, command in enumerate(self.commands)}
        self.maker = {}
        for command in self.commands:
            self.maker.setdefault(self._output(command), command)
        self.done = set()
        self._write_inputs()

    def _filled(self, number, command):
        """The command's words with its placeholders filled and its work cut short."""
        fills = dict(PLACEHOLDERS.get(command.module, {}))
        if command.module == "hf_models.convert":
            layout = option(command.words, "--to")
            if layout in VISION_LAYOUTS:
                fills["FOLDER"] = "runs/quickstart/classifier"
            if layout == "timm":  # whose models have four stages, the quickstart's three
                fills["FOLDER"] = fills["SRC"] = "convnextv2_atto_1k_224_ema.pt"
            if layout == "official_sparse":
                fills["SRC"] = "runs/quickstart/pretrained_vision"
            fills |= {
                f"DST{suffix}": f"runs/written/{number}{suffix}" for suffix in ("", ".pt", ".pt2", ".pth", ".gguf")
            }
        words = [fills.get(word, word) for word in (command.module, *command.arguments)]
        words += CUTS.get(command.module, "").split()
        dataset = option(words, "--dataset") or self._recipe(words).get("dataset")
        if not dataset or not ("." in dataset or dataset == "images"):
            words += SPLITS.get(command.module, "").split()
        return words

    def _recipe(self, words):
        recipe = option(words, "--config")
        return yaml.safe_load((ROOT / recipe).read_text()) if recipe else {}

    def _output(self, command):
        words = self.words[command]
        if command.module == "hf_models.convert":
            return words[2]
        return option(words, "--output_dir") or self._recipe(words).get("output_dir")

    def make(self, path):
        """Runs the documented command that makes `path`, if it is not there."""
        if not (self.folder / path).exists():
            self.run(self.maker[path])

    def run(self, command):
        if command in self.done:
            return
        self.done.add(command)
        words, output = self.words[command], self._output(command)
        values = [value if isinstance(value, list) else [value] for value in self._recipe(words).values()]
        for path in [*words, *itertools.chain(*values)]:
            for made in (path, str(Path(path).parent)) if isinstance(path, str) else ():
                if made in self.maker and made != output:
                    self.make(made)
        if output and self.maker[output] != command:  # it has been made in another way
            words = [*words, "--output_dir", f"{output}_{len(self.done)}"]
        elif not output and command.module in CUTS and "--eval_steps" in words:  # the default's folder, of several
            words = [*words, "--output_dir", f"runs/unnamed/{len(self.done)}"]
        module, *arguments = words
        check(command.text, *run_module(module, arguments, self.folder))

    def _write_rows(self, name, rows):
        (self.folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def _write_inputs(self):
        """Files of the user's own, and weights as others have published them."""
        (self.folder / "notes.txt").write_text("\n".join(file.read_text(encoding="utf-8") for file in MARKDOWN))
        chat = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hello to you!"}]
        self._write_rows("chats.jsonl", [{"messages": chat}] * 1000)
        answers = zip(SOLUTIONS, ("5", "8", "6"), strict=True)
        problems = [{"question": question, "answer": answer} for question, answer in answers]
        problems += [{"question": f"What is {number}+2?", "answer": str(number + 2)} for number in range(10, 50)]
        self._write_rows("problems.jsonl", problems)
        self._write_rows("questions.jsonl", [{"prompt": "What is 2+3?", "answer": "5"}])
        (self.folder / "languages").mkdir()
        rows = pq.read_table(ROOT / "training/sample_data/small_crawl_labels/languages.parquet").to_pylist()
        self._write_rows("texts.jsonl", [{"text": row["text"], "lang": row["language"]} for row in rows])
        for language in ("en", "fr"):
            texts = "\n\n".join(row["text"] for row in rows if row["language"] == language)
            (self.folder / "languages" / f"{language}.txt").write_text(texts, encoding="utf-8")
        for number in range(48):
            split, kind = "test" if number % 6 == 0 else "train", ("cats", "dogs")[number % 2]
            file = self.folder / "images" / split / kind / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((40, 32), 10.0 + number).convert("RGB").save(file)
        torch.manual_seed(0)
        config = ConvNextV2FcmaeConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16], decoder_hidden_size=8)
        for name, model_class, layout in (
            ("convnextv2_atto_1k_224_ema.pt", ConvNextV2FcmaeForImageClassification, "official"),
            ("convnextv2_atto_1k_224_fcmae.pt", ConvNextV2FcmaeForPreTraining, "official"),
            ("checkpoint-799.pth", ConvNextV2FcmaeForPreTraining, "official_sparse"),
        ):
            save_checkpoint(model_class(config), self.folder / name, layout)
        save_solver = "from tiny_solver import save_tiny_solver; save_tiny_solver('solver')"
        check(save_solver, *run_code(save_solver, self.folder))


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("documented"))


COMMANDS = documented_commands()
BLOCKS = [block for file in MARKDOWN for block in markdown_blocks(file) if block.language == "python"]


def test_what_is_not_run_is_documented():
    for start in NOT_RUN:
        assert any(command.text.startswith(start) for command in COMMANDS), f"{start!r} is in no document"


def test_everything_else_is_of_a_module_of_ours():
    """And can therefore be run here."""
    for command in COMMANDS:
        assert not_run(command) or command.module, f"{command.place}: {command.text} is neither run nor in NOT_RUN"


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS if not_run(c) is None], ids=lambda c: c.text)
def test_command_runs(command, workshop):
    workshop.run(command)


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.place}: {block.text.splitlines()[-1]}")
def test_python_runs(block, workshop):
    for path in re.findall(r'"(runs/[^"]+)"', block.text):
        if path in workshop.maker:
            workshop.make(path)
    check(block.text, *run_code(block.text, workshop.folder))
