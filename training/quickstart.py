"""The main job on the sample data, start to finish, in minutes on two CPU cores: `make quickstart`.

    python -m training.quickstart             # both halves, or one of them:
    python -m training.quickstart language    # text -> tokenizer -> language model
    python -m training.quickstart vision      # images -> pretrained encoder -> classifier, beside one from scratch

Each stage is the command that a user would type, with a recipe; its folder is the next one's input. A second call finds
finished stages finished and goes on with the rest. Each half ends with its model opened as a stranger would open it,
where hf_models cannot be imported.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from .image_data import decode_image, load_image_dataset

RECIPES = "training/recipes"
PROMPTS = ("The river", "In mathematics,", "Marie Curie was")
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
CLASSIFY_IMAGES = """
from pathlib import Path
from transformers import pipeline

classify = pipeline("image-classification", folder, trust_remote_code=True)
for file in inputs:
    best = classify(file)[0]
    print(f"  {Path(file).stem}: {best['label']} ({best['score']:.0%})")
"""


class Half(NamedTuple):
    """Stages as (module, recipe), the folder that the last one writes, and what a stranger does with it."""

    stages: tuple[tuple[str, str], ...]
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


HALVES = {
    "language": Half(
        (
            ("training.train_tokenizer", f"{RECIPES}/bpe_tokenizer/quickstart.yaml"),
            ("training.pretrain_lm", f"{RECIPES}/llama_style/pretrain_quickstart.yaml"),
        ),
        Path("runs/quickstart/language_model"),
        "AutoModelForCausalLM",
        CONTINUE_PROMPTS,
        lambda folder: list(PROMPTS),
    ),
    "vision": Half(
        (
            ("training.pretrain_fcmae", f"{RECIPES}/convnextv2_fcmae/pretrain_emoji_quickstart.yaml"),
            ("training.finetune_classifier", f"{RECIPES}/convnextv2_fcmae/finetune_emoji_scratch_quickstart.yaml"),
            ("training.finetune_classifier", f"{RECIPES}/convnextv2_fcmae/finetune_emoji_quickstart.yaml"),
        ),
        Path("runs/quickstart/classifier"),
        'pipeline("image-classification")',
        CLASSIFY_IMAGES,
        write_images,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.quickstart", description="The main job on sample data.")
    parser.add_argument("half", nargs="?", choices=HALVES, help="by default both")
    chosen = parser.parse_args().half
    start = time.perf_counter()
    halves = [HALVES[chosen]] if chosen else list(HALVES.values())
    for half in halves:
        run_half(half)
    cards = ", ".join(str(half.model / "README.md") for half in halves)
    print(f"\n== Done in {time.perf_counter() - start:.0f} s. To read: {cards}")


def run_half(half: Half) -> None:
    start = time.perf_counter()
    for module, recipe in half.stages:
        stage_start = time.perf_counter()
        print(f"\n== python -m {module} --config {recipe}", flush=True)
        ended = subprocess.run([sys.executable, "-m", module, "--config", recipe])
        if ended.returncode != 0:
            sys.exit(ended.returncode)
        print(f"== {time.perf_counter() - stage_start:.0f} s", flush=True)
    print(f"\n== Opening {half.model} with {half.auto_class} where hf_models is not to be had", flush=True)
    open_as_a_stranger(half, half.model)
    print(f"== {time.perf_counter() - start:.0f} s in all", flush=True)


def open_as_a_stranger(half: Half, model: Path) -> None:
    """Uses the folder `model` in a clean process in another place, which prints what comes out."""
    with tempfile.TemporaryDirectory() as elsewhere:
        inputs = half.write_inputs(Path(elsewhere))
        command = [sys.executable, "-c", STRANGER + half.code, str(model.resolve()), *inputs]
        subprocess.run(command, cwd=elsewhere, check=True)


if __name__ == "__main__":
    main()
