"""The main job on the sample data, start to finish, in minutes on two CPU cores: `make quickstart`.

    python -m training.quickstart             # all of it, or one part:
    python -m training.quickstart language    # text -> tokenizer -> language model
    python -m training.quickstart chat        # language model -> adapter that answers -> merged model -> a conversation
    python -m training.quickstart reasoning   # sums -> base -> GRPO with rewards for right answers
    python -m training.quickstart vision      # images -> pretrained encoder -> classifier, beside one from scratch

Each stage is the command that a user would type, with a recipe; its folder is the next one's input. A second call finds
finished stages finished and goes on with the rest. Each part ends with its model opened as a stranger would open it,
where hf_models cannot be imported.
"""

import argparse
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from .image_data import decode_image, load_image_dataset

RECIPES = "training/recipes"
VISION_RECIPES = f"{RECIPES}/convnextv2_fcmae"
CHAT = Path("runs/quickstart/chat")
PROMPTS = ("The river", "In mathematics,", "Marie Curie was")
QUESTIONS = ("Who was Marie Curie?", "What is a river?", "Hello! How are you today?")
SUMS = ("4 + 3 - 1 + 7", "7 - 9 + 5 - 2", "2 + 8 + 6 - 3")
SUM_PROMPT = "Question: State the final answer to the following arithmetic problem: {sum} =\nAnswer:"
SHOWN_IMAGES = 6

# Run by a process that has never heard of us: the import is made to fail, and the folder's own code must do.
STRANGER = """
import sys
sys.modules["hf_models"] = None
folder, *inputs = sys.argv[1:]
"""
CONTINUE_PROMPTS = """
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
set_seed(0)
for prompt in inputs:
    tokens = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(**tokens, max_new_tokens=48, do_sample=True, temperature=0.7, top_p=0.9)
    print("  " + " ".join(tokenizer.decode(tokens[0], skip_special_tokens=True).split()))
"""
ANSWER_QUESTIONS = """
from transformers import pipeline

answer = pipeline("text-generation", folder, trust_remote_code=True)
for question in inputs:
    conversation = answer([{"role": "user", "content": question}], max_new_tokens=96, do_sample=False)
    print(f"  {question} | {conversation[0]['generated_text'][-1]['content']}")
"""
SOLVE_PROBLEMS = """
from transformers import pipeline

solve = pipeline("text-generation", folder, trust_remote_code=True)
for prompt in inputs:
    print("  " + solve(prompt, max_new_tokens=40, do_sample=False)[0]["generated_text"].replace("\\n", " "))
"""
CLASSIFY_IMAGES = """
from pathlib import Path
from transformers import pipeline

classify = pipeline("image-classification", folder, trust_remote_code=True)
for file in inputs:
    best = classify(file)[0]
    print(f"  {Path(file).stem}: {best['label']} ({best['score']:.0%})")
"""


class Part(NamedTuple):
    """Stages as (module, its arguments), the folder of the finished model, and what a stranger does with it."""

    stages: tuple[tuple[str, ...], ...]
    model: Path
    auto_class: str
    code: str
    write_inputs: Callable[[Path], list[str]]


def write_images(folder: Path) -> list[str]:
    """Some held-out images as files, named by what they show and are."""
    rows = load_image_dataset("emoji", "test")
    names = rows.features["label"].names
    files = []
    for row in rows.select(range(0, len(rows), len(rows) // SHOWN_IMAGES)).select(range(SHOWN_IMAGES)):
        files.append(folder / f"image {len(files) + 1}, of {names[row['label']]}.png")
        decode_image(row["image"], num_channels=3).save(files[-1])
    return list(map(str, files))


PARTS = {
    "language": Part(
        (
            ("training.train_tokenizer", "--config", f"{RECIPES}/bpe_tokenizer/quickstart.yaml"),
            ("training.pretrain_lm", "--config", f"{RECIPES}/llama_style/pretrain_quickstart.yaml"),
        ),
        Path("runs/quickstart/language_model"),
        "AutoModelForCausalLM",
        CONTINUE_PROMPTS,
        lambda folder: list(PROMPTS),
    ),
    "chat": Part(
        (
            ("training.sft", "--config", f"{RECIPES}/llama_style/sft_quickstart.yaml"),
            ("training.merge_adapter", "--adapter", "runs/quickstart/chat_adapter", "--output_dir", str(CHAT)),
            ("training.chat", "--model", str(CHAT), "--temperature", "0", "--prompt", QUESTIONS[0]),
        ),
        CHAT,
        'pipeline("text-generation")',
        ANSWER_QUESTIONS,
        lambda folder: list(QUESTIONS),
    ),
    "reasoning": Part(
        (
            ("training.chain_sum_texts", "--config", f"{RECIPES}/llama_style/sum_texts_quickstart.yaml"),
            ("training.train_tokenizer", "--config", f"{RECIPES}/bpe_tokenizer/sums_quickstart.yaml"),
            ("training.pretrain_lm", "--config", f"{RECIPES}/llama_style/pretrain_sums_quickstart.yaml"),
            ("training.grpo", "--config", f"{RECIPES}/llama_style/grpo_quickstart.yaml"),
        ),
        Path("runs/quickstart/reasoner"),
        'pipeline("text-generation")',
        SOLVE_PROBLEMS,
        lambda folder: [SUM_PROMPT.replace("{sum}", text) for text in SUMS],
    ),
    "vision": Part(
        (
            ("training.pretrain_fcmae", "--config", f"{VISION_RECIPES}/pretrain_emoji_quickstart.yaml"),
            ("training.finetune_classifier", "--config", f"{VISION_RECIPES}/finetune_emoji_scratch_quickstart.yaml"),
            ("training.finetune_classifier", "--config", f"{VISION_RECIPES}/finetune_emoji_quickstart.yaml"),
        ),
        Path("runs/quickstart/classifier"),
        'pipeline("image-classification")',
        CLASSIFY_IMAGES,
        write_images,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.quickstart", description="The main job on sample data.")
    parser.add_argument("part", nargs="?", choices=PARTS, help="by default all; chat needs language's model")
    chosen = parser.parse_args().part
    start = time.perf_counter()
    parts = [PARTS[chosen]] if chosen else list(PARTS.values())
    for part in parts:
        run_part(part)
    cards = ", ".join(str(part.model / "README.md") for part in parts)
    print(f"\n== Done in {time.perf_counter() - start:.0f} s. To read: {cards}")


def run_part(part: Part) -> None:
    start = time.perf_counter()
    for stage in part.stages:
        stage_start = time.perf_counter()
        print(f"\n== python -m {shlex.join(stage)}", flush=True)
        ended = subprocess.run([sys.executable, "-m", *stage])
        if ended.returncode != 0:
            sys.exit(ended.returncode)
        print(f"== {time.perf_counter() - stage_start:.0f} s", flush=True)
    print(f"\n== Opening {part.model} with {part.auto_class} where hf_models is not to be had", flush=True)
    open_as_a_stranger(part, part.model)
    print(f"== {time.perf_counter() - start:.0f} s in all", flush=True)


def open_as_a_stranger(part: Part, model: Path) -> None:
    """Uses the folder `model` in a clean process in another place, which prints what comes out."""
    with tempfile.TemporaryDirectory() as elsewhere:
        inputs = part.write_inputs(Path(elsewhere))
        command = [sys.executable, "-c", STRANGER + part.code, str(model.resolve()), *inputs]
        subprocess.run(command, cwd=elsewhere, check=True)


if __name__ == "__main__":
    main()
