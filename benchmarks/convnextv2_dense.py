"""Classifying and fine-tuning with our ConvNeXt V2, transformers' and timm's, same weights and images.

    python -m benchmarks.convnextv2_dense [--sizes atto tiny] [--rounds 7]

Inference (eval, inference mode) on one image and on sixteen, and one training step (forward, backward, no optimizer) on
sixteen, at 224 pixels in float32. The weights are ours, random, converted by `checkpoints.py`; timm's model is the one
that `create_model` builds for the name, pointwise convolutions in its small sizes included. Each of the three is given
the memory format, for weights and images, in which it is the faster. Logits, losses and the gradients' norm must be
equal, or nothing is reported. Targets: inference at least as fast as the faster of the two, the step faster than both.
"""

import argparse
import copy
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from torch import nn
from transformers import ConvNextV2ForImageClassification

from benchmarks import measure
from hf_models.convnextv2_fcmae import ConvNextV2FcmaeConfig, ConvNextV2FcmaeForImageClassification
from hf_models.convnextv2_fcmae.checkpoints import save_checkpoint
from hf_models.convnextv2_fcmae.sizes import SIZES

LIBRARIES = ("hf_models", "transformers", "timm")
LIBRARY_VERSIONS = ("torch", "transformers", "timm")
TOLERANCE = 1e-4  # of logits, as a share of the largest; of the loss and of the gradients' norm


class Task(NamedTuple):
    name: str
    batch_size: int
    trains: bool


def tasks(batch_size: int) -> list[Task]:
    return [
        Task("inference", 1, False),
        Task("inference", batch_size, False),
        Task("fine-tuning step", batch_size, True),
    ]


def build_ours(size: str) -> ConvNextV2FcmaeForImageClassification:
    """The classifier of 1,000 classes with random weights, none of them zero throughout."""
    torch.manual_seed(0)
    model = ConvNextV2FcmaeForImageClassification(ConvNextV2FcmaeConfig(**SIZES[size].config, num_labels=1000))
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "grn" in name:
            nn.init.normal_(parameter, std=0.5 if "grn" in name else 0.1)
    return model


def build_models(size: str) -> dict[str, nn.Module]:
    """The same classifier three times, by library."""
    ours = build_ours(size)
    with tempfile.TemporaryDirectory() as folder:
        paths = {layout: Path(folder) / layout for layout in ("transformers", "timm")}
        for layout, path in paths.items():
            save_checkpoint(ours, path, layout)
        theirs = ConvNextV2ForImageClassification.from_pretrained(paths["transformers"])
        timms = timm.create_model(f"local-dir:{paths['timm']}", pretrained=True)
    return dict(zip(LIBRARIES, (ours, theirs, timms), strict=True))


def logits_of(library: str, model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    return model(pixel_values) if library == "timm" else model(pixel_values=pixel_values).logits


def run(library: str, model: nn.Module, task: Task, pixel_values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The logits of inference, or the loss of a step, which leaves its gradients."""
    if not task.trains:
        with torch.inference_mode():
            return logits_of(library, model, pixel_values)
    model.zero_grad(set_to_none=True)
    loss = nn.functional.cross_entropy(logits_of(library, model, pixel_values), labels)
    loss.backward()
    return loss.detach()


def prepare(library: str, model: nn.Module, task: Task, images: tuple, memory_format: str) -> Callable[[], object]:
    """A function that sets `model` up for `task` in `memory_format`, and returns what is to be timed."""
    pixel_values, labels = images
    chosen = measure.MEMORY_FORMATS[memory_format]
    model.to(memory_format=chosen).train(task.trains)
    pixel_values = pixel_values[: task.batch_size].contiguous(memory_format=chosen)
    return partial(run, library, model, task, pixel_values, labels[: task.batch_size])


def choose_format(library: str, model: nn.Module, task: Task, images: tuple) -> tuple[str, dict[str, float]]:
    """The faster memory format, and the median seconds of both."""
    seconds = measure.medians(
        {name: prepare(library, copy.deepcopy(model), task, images, name) for name in measure.MEMORY_FORMATS}, rounds=5
    )
    return min(seconds, key=seconds.get), seconds


def check_equal(models: dict[str, nn.Module], task: Task, outputs: dict[str, torch.Tensor]) -> None:
    """Raises SystemExit where logits, or loss and norm of all gradients, differ from ours."""
    found = {library: [output] for library, output in outputs.items()}
    if task.trains:
        for library, model in models.items():
            found[library].append(nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()]))
    for library in LIBRARIES[1:]:
        for ours, other in zip(found["hf_models"], found[library], strict=True):
            difference = ((ours - other).abs().max() / other.abs().max()).item()
            if not difference <= TOLERANCE:
                raise SystemExit(f"error: {task.name}: hf_models and {library} differ by {difference:.1e} of the value")


def compare(models: dict[str, nn.Module], task: Task, images: tuple, rounds: int) -> dict:
    chosen = {library: choose_format(library, model, task, images) for library, model in models.items()}
    candidates = {
        library: prepare(library, model, task, images, chosen[library][0]) for library, model in models.items()
    }
    check_equal(models, task, {library: candidate() for library, candidate in candidates.items()})
    seconds = measure.interleave(candidates, rounds)
    return task._asdict() | {
        "memory_format": {library: name for library, (name, _) in chosen.items()},
        "format_seconds": {library: medians for library, (_, medians) in chosen.items()},
        "seconds": seconds,
        "speedup": {library: measure.speedup(seconds[library], seconds["hf_models"]) for library in LIBRARIES[1:]},
    }


def print_table(size: str, parameters: int, image_size: int, measured: list[dict]) -> None:
    rows = []
    for entry in measured:
        cells = [
            f"{1e3 * statistics.median(entry['seconds'][library]):.1f} {entry['memory_format'][library]}"
            for library in LIBRARIES
        ]
        ratios = [
            f"{speedup['ratio']:.2f} ({speedup['lower']:.2f} to {speedup['upper']:.2f})"
            for speedup in entry["speedup"].values()
        ]
        rows.append([entry["name"], str(entry["batch_size"]), *cells, *ratios])
    measure.print_table(
        f"{size}, {parameters / 1e6:.1f}M parameters, {image_size} pixels, float32: ms and memory format",
        ["", "images", *LIBRARIES, "times transformers (quartiles)", "times timm (quartiles)"],
        rows,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["atto", "tiny"], choices=[n for n in SIZES if "v1" not in n])
    parser.add_argument("--batch_size", type=int, default=16, help="images of the larger inference and of the step")
    parser.add_argument("--image_size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds")
    arguments = parser.parse_args()

    results = {}
    for size in arguments.sizes:
        models = build_models(size)
        images = (
            torch.randn(arguments.batch_size, 3, arguments.image_size, arguments.image_size),
            torch.randint(1000, (arguments.batch_size,)),
        )
        measured = [compare(models, task, images, arguments.rounds) for task in tasks(arguments.batch_size)]
        parameters = models["hf_models"].num_parameters()
        print_table(size, parameters, arguments.image_size, measured)
        results[size] = {"parameters": parameters, "tasks": measured}
    measure.save("convnextv2_dense", {"arguments": vars(arguments)} | results, LIBRARY_VERSIONS)


if __name__ == "__main__":
    main()
