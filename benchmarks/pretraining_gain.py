"""What masked pretraining is worth to a classifier of few images: the same fine-tuning with it and without, over seeds.

    python -m benchmarks.pretraining_gain                 # three seeds, on the emoji: `make demo-vision`
    python -m benchmarks.pretraining_gain --seeds 0       # one of them

Runs the quickstart's vision recipes, with a longer pretraining, as a user would; each run's folder stays in
`runs/demo_vision/seed_N`, and a second call goes on where the first stopped. The two classifiers of a seed differ in
nothing but the weights that they begin with.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from .measure import print_table, save

RECIPES = Path("training/recipes/convnextv2_fcmae")
FOLDER = Path("runs/demo_vision")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of pretraining and fine-tuning")
    parser.add_argument("--pretraining_epochs", type=int, default=150, help="passes over the images")
    arguments = parser.parse_args()
    results = [run_seed(seed, arguments.pretraining_epochs) for seed in arguments.seeds]
    rows = [
        [
            str(result["seed"]),
            *(f"{100 * result[name]:.1f} %" for name in ("from_scratch", "pretrained")),
            f"{100 * (result['pretrained'] - result['from_scratch']):+.1f}",
            f"{result['pretraining_seconds']:.0f} s",
        ]
        for result in results
    ]
    if len(results) > 1:
        rows.append(["mean ± deviation", *summary(results), ""])
    print_table(
        f"Accuracy on {results[0]['held_out_images']} held-out emoji",
        ["seed", "from scratch", "pretrained", "points", "pretraining"],
        rows,
    )
    save(
        "pretraining_gain",
        {"pretraining_epochs": arguments.pretraining_epochs, "runs": results},
        libraries=("torch", "transformers", "timm"),
    )


def summary(results: list[dict]) -> list[str]:
    scratch = [100 * result["from_scratch"] for result in results]
    pretrained = [100 * result["pretrained"] for result in results]
    gains = [after - before for before, after in zip(scratch, pretrained, strict=True)]
    cells = [f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f} %" for values in (scratch, pretrained)]
    return [*cells, f"{statistics.mean(gains):+.1f} ± {statistics.stdev(gains):.1f}"]


def run_seed(seed: int, epochs: int) -> dict:
    folder = FOLDER / f"seed_{seed}"
    encoder, scratch, classifier = (folder / name for name in ("pretrained", "from_scratch", "classifier"))
    shared = ["--seed", seed, "--save_strategy", "no"]
    train("pretrain_fcmae", "pretrain_emoji_quickstart", encoder, "--num_train_epochs", epochs, "--seed", seed)
    train("finetune_classifier", "finetune_emoji_scratch_quickstart", scratch, "--model", encoder, *shared)
    compared = ["--model", encoder, "--compare_with", scratch]
    train("finetune_classifier", "finetune_emoji_quickstart", classifier, *compared, *shared)
    runs = [json.loads((run / "run.json").read_text(encoding="utf-8")) for run in (encoder, scratch, classifier)]
    return {
        "seed": seed,
        "from_scratch": runs[1]["metrics"]["eval_accuracy"],
        "pretrained": runs[2]["metrics"]["eval_accuracy"],
        "knn_at_start": runs[0]["metrics"]["knn_accuracy_at_start"],
        "knn": runs[0]["metrics"]["eval_knn_accuracy"],
        "held_out_images": runs[2]["data"]["eval"]["images"],
        "pretraining_seconds": runs[0]["wall_time_seconds"],
        "finetuning_seconds": runs[2]["wall_time_seconds"],
    }


def train(script: str, recipe: str, folder: Path, *options: object) -> None:
    command = [sys.executable, "-m", f"training.{script}", "--config", str(RECIPES / f"{recipe}.yaml")]
    subprocess.run([*command, "--output_dir", str(folder), *map(str, options)], check=True)


if __name__ == "__main__":
    main()
