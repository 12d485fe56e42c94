"""Does the data path keep up with the model? Images per second that are read and augmented, beside those trained on.

    python -m benchmarks.image_pipeline [--photos FOLDER] [--rounds 3] [--workers 0 1 2]

The data path is the training scripts' own: their reading, augmentation, sampler and collator, in the DataLoader that
Trainer makes of them. Its images are the 64-pixel emoji (WebP), and photos (JPEG, 500 x 375 pixels, cropped to 224):
those of `--photos`, or synthetic ones, which are coloured noise with a photo's spectrum and about its bytes. There are
three rates: the data path's alone; the model's alone (forward, backward and AdamW on a batch that is there already);
and that of training from the data path, where on a CPU the workers take their share of its cores. Where the last is
about the model's own, nobody is starved.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
import yaml
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from transformers import default_data_collator

from benchmarks import measure
from hf_models.convnextv2_fcmae import (
    ConvNextV2FcmaeConfig,
    ConvNextV2FcmaeForImageClassification,
    ConvNextV2FcmaeForPreTraining,
)
from hf_models.convnextv2_fcmae.sizes import SIZES
from training.classifier_inputs import AugmentationArguments, ClassifierCollator, TrainingItem
from training.classifier_models import image_format
from training.image_data import ImageDataset, load_image_dataset
from training.image_draws import DrawnImages, EpochSampler
from training.image_preparation import build_image_processor, training_transform
from training.pretrain_fcmae import PretrainArguments, make_item, number_of_patches

EMOJI_RECIPE = Path(__file__).parents[1] / "training/recipes/convnextv2_fcmae/pretrain_emoji_quickstart.yaml"
PHOTO_SIZE = (500, 375)  # pixels, width and height: ImageNet's most frequent
JPEG_QUALITY = 90
# Amplitudes that fall with frequency by this power are a natural image's (Field 1987); grain as a camera's is added.
SPECTRUM_POWER = 1.0
CLASSES = 1000

Batch = dict[str, torch.Tensor]


class Task(NamedTuple):
    """A training: the model, its images as the script draws them, and how it makes a batch of them."""

    model: nn.Module
    images: DrawnImages
    collate: Callable[[list], Batch]
    batch_size: int


def pretraining(rows: datasets.Dataset, config: ConvNextV2FcmaeConfig, batch_size: int) -> Task:
    size = [config.image_size] * 2
    smallest_crop = PretrainArguments().crop_scale_min
    transform = training_transform(size, smallest_crop, build_image_processor(config))
    make = partial(make_item, transform=transform, patches=number_of_patches(config))
    images = DrawnImages(ImageDataset(rows, num_channels=config.num_channels), make, seed=0)
    return Task(ConvNextV2FcmaeForPreTraining(config), images, default_data_collator, batch_size)


def fine_tuning(rows: datasets.Dataset, config: ConvNextV2FcmaeConfig, batch_size: int) -> Task:
    model = ConvNextV2FcmaeForImageClassification(config)
    augmentation = AugmentationArguments(mixup=0.8, cutmix=1.0)  # as in the recipes of the larger sizes
    make = TrainingItem(augmentation, image_format(model, build_image_processor(config)))
    images = DrawnImages(ImageDataset(rows, num_channels=config.num_channels), make, seed=0)
    return Task(model, images, ClassifierCollator(augmentation, config.num_labels, 0.1), batch_size)


def build_tasks(photos: str, batch_size: int) -> dict[str, Task]:
    recipe = yaml.safe_load(EMOJI_RECIPE.read_text(encoding="utf-8"))
    emoji_config = ConvNextV2FcmaeConfig(
        **SIZES[recipe["size"]].config | recipe["config_overrides"], image_size=recipe["image_size"]
    )
    photo_config = ConvNextV2FcmaeConfig(**SIZES["atto"].config, image_size=224, num_labels=CLASSES)
    emoji = load_image_dataset(recipe["dataset"], "train")
    unlabelled = load_image_dataset(photos, "train", label_column=None)
    labelled = unlabelled.add_column("label", [row % CLASSES for row in range(len(unlabelled))])
    return {
        "pretraining on emoji": pretraining(emoji, emoji_config, recipe["per_device_train_batch_size"]),
        "pretraining on photos, atto": pretraining(unlabelled, photo_config, batch_size),
        "fine-tuning on photos, atto": fine_tuning(labelled, photo_config, batch_size),
    }


def write_photos(folder: Path, number: int) -> None:
    """JPEGs as heavy to decode as photos: noise whose amplitude falls with the frequency, with grain, in colour."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    width, height = PHOTO_SIZE
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    falling = 1 / np.maximum(frequency, 1 / width) ** SPECTRUM_POWER
    for i in range(number):
        planes = np.fft.irfft2(np.fft.rfft2(generator.standard_normal((3, height, width))) * falling, s=(height, width))
        planes /= planes.std(axis=(1, 2), keepdims=True)
        brightness, *colours = planes
        pixels = 128 + 55 * brightness[..., None] + 15 * np.stack([colours[0], -colours[0], colours[1]], axis=-1)
        pixels += 4 * generator.standard_normal((height, width, 1))
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        image.save(folder / f"photo_{i:04}.jpg", quality=JPEG_QUALITY)


def describe_photos(folder: str, synthetic: bool) -> dict[str, Any]:
    rows = load_image_dataset(folder, "train", label_column=None)
    sizes = [len(record["bytes"] or b"") or Path(record["path"]).stat().st_size for record in rows["image"]]
    return {"synthetic": synthetic, "images": len(rows), "mean_bytes": statistics.mean(sizes)}


def loader_rate(task: Task, workers: int, batches: int, use: Callable[[Batch], object]) -> float:
    """Images per second that come out of the DataLoader, once it runs, when each batch is used thus."""
    loader = DataLoader(
        task.images,
        task.batch_size,
        sampler=EpochSampler(task.images, batch=1, seed=0, epoch=lambda: 0),
        collate_fn=task.collate,
        num_workers=workers,
        drop_last=True,
    )
    ahead = 1 + workers  # these may be made while the workers are started
    if len(loader) < ahead + batches:
        raise SystemExit(f"error: {len(task.images)} images make {len(loader)} batches, of {ahead + batches} needed")
    iterator = iter(loader)
    for _ in range(ahead):
        next(iterator)
    start = time.perf_counter()
    for _ in range(batches):
        use(next(iterator))
    return batches * task.batch_size / (time.perf_counter() - start)


def build_step(task: Task) -> Callable[[Batch], float]:
    """A function that trains on a batch."""
    model = task.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step(batch: Batch) -> float:
        if "labels" in batch:
            loss = nn.functional.cross_entropy(model(pixel_values=batch["pixel_values"]).logits, batch["labels"])
        else:
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def measure_task(task: Task, workers: list[int], batches: int, rounds: int) -> dict[str, Any]:
    """Images per second: of the model, and by number of workers of the data path and of training from it."""
    step = build_step(task)
    ready = task.collate([task.images[number] for number in range(task.batch_size)])
    seconds = measure.interleave({"model": lambda: step(ready)}, 2 * rounds)["model"]
    return {
        "batch_size": task.batch_size,
        "model": [task.batch_size / duration for duration in seconds],
        "data": {n: [loader_rate(task, n, batches, lambda _: None) for _ in range(rounds)] for n in workers},
        "training": {n: [loader_rate(task, n, batches, step) for _ in range(rounds)] for n in workers},
    }


def print_rates(rates: dict[str, dict[str, Any]], workers: list[int]) -> None:
    rows = []
    for name, measured in rates.items():
        model = statistics.median(measured["model"])
        data = [statistics.median(values) for values in measured["data"].values()]
        training = [statistics.median(values) for values in measured["training"].values()]
        row = [name, f"{model:.0f}", *(f"{rate:.0f} ({rate / model:.1f})" for rate in data)]
        rows.append([*row, *(f"{rate:.0f} ({rate / model:.2f})" for rate in training)])
    header = [f"{kind}, {n} workers" for kind in ("data", "training") for n in workers]
    measure.print_table("Images per second (times the model's)", ["", "model", *header], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", help="folder of JPEGs; by default synthetic ones are made")
    parser.add_argument("--batches", type=int, default=12, help="batches of a measurement")
    parser.add_argument("--batch_size", type=int, default=32, help="photos in a batch; the emoji's is the recipe's")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="the DataLoader's processes")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        photos = arguments.photos
        if photos is None:
            # What the library keeps of images that are gone after this would be of no use.
            datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
            photos = str(Path(folder) / "photos")
            write_photos(Path(photos), (1 + max(arguments.workers) + arguments.batches) * arguments.batch_size)
        described = describe_photos(photos, synthetic=arguments.photos is None)
        rates = {
            name: measure_task(task, arguments.workers, arguments.batches, arguments.rounds)
            for name, task in build_tasks(photos, arguments.batch_size).items()
        }
    print_rates(rates, arguments.workers)
    kind = "synthetic photos" if described["synthetic"] else "photos"
    print(f"\n{described['images']} {kind} of {described['mean_bytes'] / 1e3:.0f} kB")
    measure.save(
        "image_pipeline",
        {"photos": described, "images_per_second": rates},
        libraries=("torch", "torchvision", "timm", "pillow", "datasets"),
    )


if __name__ == "__main__":
    main()
