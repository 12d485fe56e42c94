"""Pretrains a ConvNeXt V2 on images by masked autoencoding (FCMAE, arXiv 2301.00808); labels are not needed.

    python -m training.pretrain_fcmae --config training/recipes/convnextv2_fcmae/pretrain_emoji_quickstart.yaml
    accelerate launch --config_file training/accelerate_configs/ddp.yaml -m training.pretrain_fcmae --config ...

Reads images; writes a model folder with its image processor, pictures of reconstructions, `run.json` and card. Where
the data has labels, a cheap probe of the frozen features is part of each evaluation. The same command again goes on
from the last checkpoint, or says that the run is finished. Fields are those of `PretrainArguments` below and of
transformers' `TrainingArguments`; with `--dataloader_num_workers N`, N processes read and crop images beside the model,
and the result is the same whatever N is, but for a stream: its files are dealt out to them.
"""

from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from torch import nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2
from transformers import (
    Trainer,
    default_data_collator,
    set_seed,
)
from transformers.integrations import TensorBoardCallback

from hf_models.convnextv2_fcmae import ConvNextV2FcmaeConfig, ConvNextV2FcmaeForPreTraining
from hf_models.convnextv2_fcmae.checkpoints import load_checkpoint
from hf_models.convnextv2_fcmae.sizes import SIZES

from .base_model import base_license
from .command_line import parse_arguments
from .image_data import (
    ImageDataArguments,
    ImageDataset,
    TooManyUnreadableError,
    decode_stream,
    describe_images,
    load_image_dataset,
)
from .image_draws import DrawnImages, DrawnImagesMixin, check_batch, drawn_stream, skipped_images
from .image_preparation import build_image_processor, held_out_transform, training_transform
from .image_probe import PROBES
from .reconstruction_pictures import reconstruction_picture
from .run_folder_trainer import RunFolderMixin
from .run_setup import (
    ScaledRateArguments,
    check_config_overrides,
    check_training,
    describe_training,
    evaluate_the_end,
    examples_per_step,
    final_metrics,
    finish_run,
    open_run,
    save_whole_model,
    train_from_command_line,
    weights_fingerprint,
)

PICTURED_IMAGES = 8
# Held-out images keep their masks from step to step and from run to run, whatever the run's own seed is.
HELD_OUT_SEED = 0
# A stream is shuffled within a window of so many images, compressed: some 200 MB of photographs in each worker.
SHUFFLED_IMAGES = 2_000


@dataclass
class PretrainArguments(ImageDataArguments):
    size: str = field(default="atto", metadata={"help": f"Shape of a new model: {', '.join(SIZES)}."})
    config_overrides: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'Config fields other than the size\'s, as JSON: {"norm_pix_loss_eps": 0.01}.'}
    )
    model: str | None = field(
        default=None,
        metadata={
            "help": "Model to train on, a folder or file of ours, transformers', timm's or the official code's; no new "
            "one then, but for the decoder where it has none."
        },
    )
    image_size: list[int] = field(
        default_factory=lambda: [224],
        metadata={"help": "Side of the square images, or height and width, in pixels: multiples of the mask patch."},
    )
    mask_ratio: float | None = field(
        default=None, metadata={"help": "Share of the patches that is removed; by default the model's, 0.6 for a new."}
    )
    crop_scale_min: float = field(
        default=0.2, metadata={"help": "Smallest share of an image's area that a training crop shows; 1: no crop."}
    )
    eval_dataset: str | None = field(
        default=None, metadata={"help": "Images to evaluate on. By default another split of --dataset."}
    )
    eval_dataset_split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    probe: str | None = field(
        default=None,
        metadata={
            "help": "What is learnt about the labels from the frozen features at each evaluation: knn (the nearest "
            "neighbours' label), linear (a logistic regression) or none. By default knn where the data has labels."
        },
    )
    probe_images: int = field(
        default=5000, metadata={"help": "Training images, and held-out ones, that the probe takes at most."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.config_overrides = check_config_overrides(self.config_overrides, ConvNextV2FcmaeConfig, self.model)
        if self.size not in SIZES:
            raise ValueError(f"--size {self.size!r} is not known: take one of {', '.join(SIZES)}.")
        if isinstance(self.image_size, int):
            self.image_size = [self.image_size]
        if len(self.image_size) == 1:
            self.image_size = self.image_size * 2
        if len(self.image_size) != 2 or not all(isinstance(side, int) and side > 0 for side in self.image_size):
            raise ValueError(f"--image_size is {self.image_size}: give one side, or height and width, in pixels.")
        if not 0 < self.crop_scale_min <= 1:
            raise ValueError(f"--crop_scale_min is {self.crop_scale_min}: give a share above 0 and at most 1.")
        if self.probe not in (None, "none", *PROBES):
            raise ValueError(f"--probe {self.probe!r} is not known: take none, {' or '.join(PROBES)}.")
        if self.probe_images < 1:
            raise ValueError(f"--probe_images is {self.probe_images}: give 1 or more, or --probe none.")


@dataclass
class OptimizationArguments(ScaledRateArguments):
    """The defaults of FCMAE (arXiv 2301.00808, appendix A)."""

    output_dir: str = field(default="runs/pretrain_fcmae", metadata={"help": "The run folder."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Or warmup_stable_decay, ..."})
    warmup_steps: float = field(
        default=0.05, metadata={"help": "Steps of warm-up, or below 1 their share of all: 0.05 is 40 of 800 epochs."}
    )
    weight_decay: float = field(default=0.05, metadata={"help": "Decay of kernels; all else has none."})
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW's second beta."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Gradients are clipped to this norm; 0: not clipped."})


@dataclass
class LabelProbe:
    """Labelled images, without chance in them, from which the probe learns and on which it is judged."""

    kind: str
    train: DrawnImages
    held_out: DrawnImages


class PretrainTrainer(DrawnImagesMixin, RunFolderMixin, Trainer):
    """Draws images by number, decays kernels only, and evaluates by image, with a probe and a picture.

    Args:
        probe: None leaves it out.
        pictured: of the held-out images, which ones the picture shows.
    """

    def __init__(self, *args, probe: LabelProbe | None, pictured: list[int], **kwargs):
        super().__init__(
            *args, compute_metrics=lambda prediction: {"loss": float(prediction.predictions.mean())}, **kwargs
        )
        self.probe, self.pictured = probe, pictured

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        kernels = {module.weight for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)}
        return [name for name, parameter in model.named_parameters() if parameter in kernels]

    def describe_batch(self, inputs):
        pixels = inputs["pixel_values"]
        return f"whose {len(pixels)} images have values from {pixels.min().item():.4g} to {pixels.max().item():.4g}"

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss of every image `(batch,)`, twice: Trainer computes metrics only where it finds labels."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
        by_patch = self.model.patch_losses(inputs["pixel_values"], outputs.logits)
        losses = (by_patch * outputs.mask).sum(dim=1) / outputs.mask.sum(dim=1)
        return None, losses, losses

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.probe is not None:
            accuracy = PROBES[self.probe.kind](*self._features(self.probe.train), *self._features(self.probe.held_out))
            output.metrics[f"{metric_key_prefix}_{self.probe.kind}_accuracy"] = accuracy
        return output

    @torch.no_grad()
    def _features(self, images: DrawnImages) -> tuple[torch.Tensor, torch.Tensor]:
        """The encoder's last hidden states of whole images, averaged over their cells, and the images' labels.

        `(images, hidden)` and `(images,)`, on the CPU, of all processes together.
        """
        # A method of the whole model: FSDP gathers the weights that no block holds for such alone.
        self.model.encode = MethodType(encode, self.model)
        register_fsdp_forward_method(self.model, "encode")
        features, labels = [], []
        for inputs in self.get_test_dataloader(images):
            with self.compute_loss_context_manager():
                states = self.model.encode(inputs["pixel_values"])
            means = states.float().mean(dim=(2, 3))
            means, numbers = self.accelerator.gather_for_metrics((means, inputs["labels"]))
            features.append(means.cpu())
            labels.append(numbers.cpu())
        return torch.cat(features), torch.cat(labels)

    def evaluate(self, *args, **kwargs):
        metrics = super().evaluate(*args, **kwargs)
        with self._clock_stopped():
            self._save_picture()
        return metrics

    def _save_picture(self) -> None:
        """Reconstructs the pictured images and notes the file among the run's samples."""
        step = self.state.global_step
        inputs = self._prepare_inputs(self.data_collator([self.eval_dataset[number] for number in self.pictured]))
        with self.compute_loss_context_manager():
            images = self.model.reconstruct(**inputs)
        if not self.is_world_process_zero():
            return
        name = f"reconstructions/step_{step:06}.png"
        path = Path(self.args.output_dir) / name
        path.parent.mkdir(exist_ok=True)
        processor = self.processing_class
        path.write_bytes(reconstruction_picture(*images, processor.image_mean, processor.image_std))
        kept = [sample for sample in self.record.content["samples"] if sample["step"] < step]
        self.record.save(samples=[*kept, {"step": step, "picture": name}])
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                pixels = v2.functional.pil_to_tensor(Image.open(path))
                callback.tb_writer.add_image("reconstructions", pixels, step)


def encode(model: ConvNextV2FcmaeForPreTraining, pixel_values: torch.Tensor) -> torch.Tensor:
    """The last hidden states of whole images, `(batch, hidden, height / mask patch, width / mask patch)`."""
    return model.convnextv2(pixel_values).last_hidden_state


def build_model(arguments: PretrainArguments) -> ConvNextV2FcmaeForPreTraining:
    """A new model of the asked size, or the one that `arguments.model` names, with a new decoder where it has none."""
    if arguments.model is None:
        shape = SIZES[arguments.size].config | (arguments.config_overrides or {})
        try:
            model = ConvNextV2FcmaeForPreTraining(ConvNextV2FcmaeConfig(**shape))
        except (StrictDataclassError, ValueError) as error:
            raise ValueError(f"--config_overrides: {error}") from error
    else:
        # Autocast computes in bfloat16 where it is told to; weights that an optimizer updates are float32.
        loaded = load_checkpoint(arguments.model).float()
        model = loaded
        if not isinstance(loaded, ConvNextV2FcmaeForPreTraining):
            model = ConvNextV2FcmaeForPreTraining(loaded.config)
            encoder = getattr(loaded, "convnextv2", loaded)
            for part in ("embeddings", "encoder"):
                getattr(model.convnextv2, part).load_state_dict(getattr(encoder, part).state_dict())
    height, width = arguments.image_size
    model.config.image_size = height if height == width else [height, width]
    if arguments.mask_ratio is not None:
        model.config.mask_ratio = arguments.mask_ratio
    return model


def make_item(row: dict[str, Any], transform: v2.Transform, patches: int) -> dict[str, torch.Tensor]:
    """`pixel_values (channels, height, width)` and the `noise (patches,)` that decides its mask."""
    return {"pixel_values": transform(row["image"]), "noise": torch.rand(patches)}


def make_labelled_item(row: dict[str, Any], transform: v2.Transform) -> dict[str, torch.Tensor]:
    return {"pixel_values": transform(row["image"]), "labels": torch.tensor(row["label"])}


def check_arguments(
    arguments: PretrainArguments, training: OptimizationArguments, config: ConvNextV2FcmaeConfig
) -> None:
    """What can be told wrong before any image is read."""
    check_training(training, "training.pretrain_fcmae")
    if config.num_channels not in (1, 3):
        raise ValueError(f"num_channels is {config.num_channels}: images are read as grey (1) or colour (3).")
    side = config.mask_patch_size
    for length in arguments.image_size:
        if length % side:
            below, above = length // side * side, -(-length // side) * side
            nearest = f"{below} or {above}" if below else str(above)
            raise ValueError(
                f"--image_size {' '.join(map(str, arguments.image_size))} does not divide into the model's mask "
                f"patches of {side} pixels: take {nearest} for {length}."
            )
    patches = number_of_patches(config)
    kept = config.number_kept(patches)
    if not 0 < kept < patches:
        raise ValueError(
            f"--mask_ratio {config.mask_ratio} keeps {kept} of the {patches} patches that an image has: give a share "
            "that keeps at least one and removes at least one, such as 0.6, or larger images."
        )
    if arguments.streaming and training.max_steps <= 0:
        raise ValueError("A stream has no known length: give --max_steps.")


def number_of_patches(config: ConvNextV2FcmaeConfig) -> int:
    height, width = config.image_size if isinstance(config.image_size, list) else [config.image_size] * 2
    return (height // config.mask_patch_size) * (width // config.mask_patch_size)


def flops_per_image(model: ConvNextV2FcmaeForPreTraining, size: list[int]) -> float:
    """Of one training step: the forward pass as it was counted, and the backward pass as twice that."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, model.config.num_channels, *size), noise=torch.rand(1, number_of_patches(model.config)))
    return 3.0 * counter.get_total_flops()


def load_images(
    arguments: PretrainArguments, evaluates: bool
) -> tuple[Dataset | IterableDataset, Dataset | None, dict[str, Any]]:
    """Training and held-out images, and the description of both for `run.json`."""
    options = {"image_column": arguments.image_column, "label_column": arguments.label_column}
    options["config"] = arguments.dataset_config
    train = load_image_dataset(arguments.dataset, arguments.dataset_split, streaming=arguments.streaming, **options)
    data = {"train": describe_images(train, arguments.dataset, arguments.dataset_split)}
    if not evaluates:
        return train, None, data
    name, split = arguments.eval_dataset or arguments.dataset, arguments.eval_dataset_split
    if arguments.eval_dataset is not None:
        options["config"] = None
    labels = train.features.get("label")
    held_out = load_image_dataset(name, split, class_names=labels and labels.names, **options)
    data["eval"] = describe_images(held_out, name, split)
    return train, held_out, data


def check_probe(arguments: PretrainArguments, train: Dataset | IterableDataset, held_out: Dataset | None) -> str | None:
    """The kind of the probe, None for no probe; ValueError where the images cannot be probed as asked."""
    if arguments.probe == "none" or held_out is None:
        return None
    unlabelled = [
        split
        for split, rows in ((arguments.dataset_split, train), (arguments.eval_dataset_split, held_out))
        if "label" not in rows.features
    ]
    if isinstance(train, IterableDataset) or unlabelled:
        if arguments.probe is None:
            return None
        found = f"the split {unlabelled[0]!r} has none" if unlabelled else "a stream cannot be gone back to for them"
        raise ValueError(f"--probe {arguments.probe} needs labels, and {found}: give --probe none.")
    return arguments.probe or "knn"


def training_images(
    rows: Dataset | IterableDataset,
    transform: v2.Transform,
    config: ConvNextV2FcmaeConfig,
    training: OptimizationArguments,
) -> DrawnImages | IterableDataset:
    """Images drawn anew in each epoch, or an endless shuffled stream."""
    make = partial(make_item, transform=transform, patches=number_of_patches(config))
    if isinstance(rows, IterableDataset):
        # Each process reads for itself, its own shards where there are enough; by default the first reads for all.
        training.accelerator_config.dispatch_batches = False
        # Repeated within one epoch: of a stream's later epochs Trainer could not find the place where it stopped.
        shuffled = rows.repeat(None).shuffle(seed=training.seed, buffer_size=SHUFFLED_IMAGES)
        decoded = decode_stream(shuffled, num_channels=config.num_channels)
        return drawn_stream(decoded, make, training.seed, columns=list(rows.features))
    return DrawnImages(ImageDataset(rows, num_channels=config.num_channels), make, training.seed)


def evenly_spaced(rows: Dataset, number: int) -> Dataset:
    """At most `number` rows: data are often sorted by class."""
    number = min(number, len(rows))
    return rows.select([i * len(rows) // number for i in range(number)])


def spread_over_classes(rows: Dataset, number: int) -> list[int]:
    """Indices: the first image of every class, then the second of every class, and so on; without labels, the first."""
    if "label" not in rows.features:
        return list(range(min(number, len(rows))))
    seen: Counter[int] = Counter()
    places = []
    for index, label in enumerate(rows["label"]):
        places.append((seen[label], label, index))
        seen[label] += 1
    return [index for _, _, index in sorted(places)[:number]]


def prepare() -> tuple[PretrainTrainer, str | None] | None:
    """Everything up to the first step: reads and checks what the user gave, opens the run folder, sets up the trainer.

    Returns the trainer and the checkpoint to go on from; None where the folder holds this run, finished.
    """
    arguments, training, given = parse_arguments(PretrainArguments, OptimizationArguments, description=__doc__)
    set_seed(training.seed)
    model = build_model(arguments)
    check_arguments(arguments, training, model.config)
    train, held_out, data = load_images(arguments, evaluates=training.eval_strategy != "no")
    probe = check_probe(arguments, train, held_out)
    if isinstance(train, Dataset):
        check_batch(train, examples_per_step(training))
    if arguments.model is not None:
        data["model"] = {"path": arguments.model, "fingerprint": weights_fingerprint(model)}

    opened = open_run(training, "pretrain_fcmae", given, data, model)
    if opened is None:
        return None
    record, checkpoint, peak = opened
    config, processor = model.config, build_image_processor(model.config)
    crops = training_transform(arguments.image_size, arguments.crop_scale_min, processor)
    middle = held_out_transform(arguments.image_size, processor)

    def without_chance(rows: Dataset, make) -> DrawnImages:
        return DrawnImages(ImageDataset(rows, num_channels=config.num_channels), make, HELD_OUT_SEED)

    probed = probe and [evenly_spaced(rows, arguments.probe_images) for rows in (train, held_out)]
    record.save(
        model={
            "parameters": model.num_parameters(),
            "encoder_parameters": model.convnextv2.num_parameters(),
            "config": config.to_dict(),
        },
        training=describe_training(training, peak)
        | {
            "base_learning_rate": None if "learning_rate" in given else training.base_learning_rate,
            "image_size": arguments.image_size,
            "mask_ratio": config.mask_ratio,
            "crop_scale_min": arguments.crop_scale_min,
            "images_per_step": examples_per_step(training),
            "probed_images": len(probed[1]) if probed else None,
        },
        base_license=base_license(arguments.model, config) if arguments.model else None,
    )
    # The model before its first step is what the probe and the pictures are to be compared with.
    training.eval_on_start = held_out is not None and checkpoint is None
    trainer = PretrainTrainer(
        model=model,
        args=training,
        train_dataset=training_images(train, crops, config, training),
        eval_dataset=held_out
        and without_chance(held_out, partial(make_item, transform=middle, patches=number_of_patches(config))),
        data_collator=default_data_collator,
        processing_class=processor,
        record=record,
        unit="images",
        flops_per_unit=flops_per_image(model, arguments.image_size),
        matmul_peak=peak,
        probe=probe
        and LabelProbe(
            probe, *(without_chance(rows, partial(make_labelled_item, transform=middle)) for rows in probed)
        ),
        pictured=held_out and spread_over_classes(held_out, PICTURED_IMAGES),
    )
    return trainer, checkpoint


def finish(trainer: PretrainTrainer) -> None:
    """Saves the model into the run folder and writes what came of the run: metrics and the card."""
    evaluate_the_end(trainer)
    save_whole_model(trainer)
    history = trainer.state.log_history
    metrics = final_metrics(history, "images")
    if trainer.probe is not None:
        name = f"{trainer.probe.kind}_accuracy"
        metrics[f"{name}_at_start"] = next(entry[f"eval_{name}"] for entry in history if f"eval_{name}" in entry)
    finish_run(trainer, metrics, skipped_images=skipped_images(trainer.train_dataset, trainer.eval_dataset))


def main() -> None:
    train_from_command_line(prepare, finish, TooManyUnreadableError)


if __name__ == "__main__":
    main()
