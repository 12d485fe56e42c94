"""What LoRA and QLoRA lose against fine-tuning all weights, on the same conversations for as many steps.

    python -m benchmarks.lora_against_full            # needs runs/quickstart/language_model; about ten minutes

Each way is the command that a user types, with the learning rate that a sweep on one seed found best for it. They take
turns, seed by seed; held-out loss is the mean over seeds with its standard deviation, memory is what the process's peak
exceeds that of one that only opens its libraries.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .measure import print_table, save

SHARED = {
    "dataset": "instructions",
    "max_length": 256,
    "attn_implementation": "eager",
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 50,
    "warmup_steps": 10,
    "lr_scheduler_type": "cosine",
    "eval_on_start": True,
    "save_strategy": "no",
}
WAYS = {
    "full": {"learning_rate": 1e-3},
    "LoRA": {"learning_rate": 7e-3, "use_peft": True},
    "QLoRA": {"learning_rate": 7e-3, "use_peft": True, "load_in_4bit": True},
}


def run(way: dict[str, Any], folder: Path, arguments: argparse.Namespace, seed: int) -> dict[str, float]:
    """One training; what it recorded, and its peak memory in bytes."""
    fields = SHARED | way | {"model": arguments.model, "dataset_split": arguments.split, "output_dir": folder}
    fields |= {"max_steps": arguments.steps, "eval_steps": arguments.steps, "seed": seed}
    if "use_peft" in way:
        fields |= {"lora_r": arguments.rank, "lora_alpha": 2 * arguments.rank}
    words = [str(word) for name, value in fields.items() for word in (f"--{name}", value)]
    peak = peak_of([sys.executable, "-m", "training.sft", *words])
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    steps = [entry for entry in record["history"] if "loss" in entry]
    tokens_per_step = steps[-1]["tokens_seen"] / steps[-1]["step"]
    return {
        "eval_loss": record["metrics"]["eval_loss"],
        "eval_loss_before": record["metrics"]["eval_loss_before"],
        "seconds_per_step": tokens_per_step / record["metrics"]["tokens_per_second"],
        "trainable_parameters": record["model"]["trainable_parameters"],
        "parameters": record["model"]["parameters"],
        "stored_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "peak_bytes": peak,
    }


def peak_of(command: list[str]) -> int:
    """The peak resident memory of a command, in bytes."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    error = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit(error)
    return usage.ru_maxrss * 1024


def summarise(runs: list[dict[str, float]], floor: int) -> dict[str, Any]:
    losses = [run["eval_loss"] for run in runs]
    return runs[0] | {
        "eval_loss": statistics.mean(losses),
        "eval_loss_deviation": statistics.stdev(losses) if len(losses) > 1 else 0.0,
        "seconds_per_step": statistics.median(run["seconds_per_step"] for run in runs),
        "peak_bytes": statistics.median(run["peak_bytes"] for run in runs) - floor,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lora_against_full", description=__doc__)
    parser.add_argument("--model", default="runs/quickstart/language_model", help="the base; default: %(default)s")
    parser.add_argument("--split", default="train", help="of the conversations; default: %(default)s")
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps; default: %(default)s")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters; default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each way; default: %(default)s")
    arguments = parser.parse_args()

    scratch = Path(tempfile.mkdtemp(prefix="lora_against_full_"))
    results: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    try:
        floor = peak_of([sys.executable, "-c", "import training.sft, bitsandbytes"])
        for seed in range(arguments.seeds):
            for name, way in WAYS.items():
                results[name].append(run(way, scratch / f"{name}_{seed}", arguments, seed))
                print(f"{name}, seed {seed}: held-out loss {results[name][-1]['eval_loss']:.4f}", flush=True)
    finally:
        shutil.rmtree(scratch)
    rows = {name: summarise(runs, floor) for name, runs in results.items()}
    full, lora = rows["full"], rows["LoRA"]
    before = f"held-out loss before training {full['eval_loss_before']:.4f}"
    print_table(
        f"{arguments.steps} steps on {arguments.split}, rank {arguments.rank}, {arguments.seeds} seeds; {before}",
        ["", "held-out loss", "against full", "trained", "share", "stored", "s/step", "peak above the libraries"],
        [
            [
                name,
                f"{row['eval_loss']:.4f} ± {row['eval_loss_deviation']:.4f}",
                f"{row['eval_loss'] / full['eval_loss'] - 1:+.1%}",
                f"{row['trainable_parameters']:,}",
                f"{row['trainable_parameters'] / row['parameters']:.1%}",
                f"{row['stored_bytes'] / 1e6:.1f} MB",
                f"{row['seconds_per_step']:.3f}",
                f"{row['peak_bytes'] / 2**20:.0f} MiB",
            ]
            for name, row in rows.items()
        ],
    )
    print(f"QLoRA against LoRA: {rows['QLoRA']['eval_loss'] / lora['eval_loss'] - 1:+.2%}.")
    save(
        "lora_against_full",
        {"arguments": vars(arguments), "ways": WAYS, "rows": rows, "runs": results},
        libraries=("torch", "transformers", "trl", "peft", "bitsandbytes"),
    )


if __name__ == "__main__":
    main()
