"""Trains an image classifier: fine-tunes a pretrained ConvNeXt or another model, or begins with new weights.

    python -m training.finetune_classifier --config training/recipes/convnextv2_fcmae/finetune_emoji_quickstart.yaml
    accelerate launch --config_file training/accelerate_configs/ddp.yaml -m training.finetune_classifier --config ...

Reads a model and labelled images; writes a model folder with its image processor, `run.json` and card. The same command
again goes on from the last checkpoint, or says that the run is finished. Fields are those of `FinetuneArguments` below
and of transformers' `TrainingArguments`. With --use_peft an adapter is trained; the model in the folder
has it merged, and it lies in `adapter/` besides.
"""

import os
import shutil
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, Trainer, set_seed

from hf_models.stored_weights import some
from hub_cards.build_card import ASSETS

from .adapters import AdapterArguments, add_adapter, save_adapter
from .base_model import base_entry, base_license, read_run
from .classification_report import confusion_counts, per_class_table
from .classifier_inputs import UNREADABLE, AugmentationArguments, ClassifierCollator, HeldOutImages, TrainingItem
from .classifier_models import (
    SIZES,
    Classifier,
    ClassifierArguments,
    adapter_layers,
    forward_flops,
    head_parameters,
    image_format,
    open_classifier,
)
from .command_line import parse_arguments
from .image_data import (
    ImageDataArguments,
    ImageDataset,
    TooManyUnreadableError,
    describe_images,
    load_image_dataset,
)
from .image_draws import DrawnImages, DrawnImagesMixin, check_batch, skipped_images
from .layer_decay import LAYER_DECAY_TYPES, parameter_groups
from .run_folder_trainer import RunFolderMixin
from .run_setup import (
    ScaledRateArguments,
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
from .weight_averaging import AveragedWeightsMixin

TASK = "finetune_classifier"
TOP = 5
ADAPTER = "adapter"  # of a run with --use_peft, in its folder
BASE_PICTURE = f"{ASSETS}/base_reconstruction.png"


@dataclass
class FinetuneArguments(ClassifierArguments, AugmentationArguments, ImageDataArguments, AdapterArguments):
    eval_dataset: str | None = field(
        default=None, metadata={"help": "Images to evaluate on. By default another split of --dataset."}
    )
    eval_dataset_split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    freeze_backbone: bool = field(default=False, metadata={"help": "Train the head alone (linear probing)."})
    compare_with: list[str] = field(
        default_factory=list,
        metadata={"help": "Finished run folders of this script, with the same evaluation data, to show beside this."},
    )

    def __post_init__(self):
        ClassifierArguments.__post_init__(self)
        AugmentationArguments.__post_init__(self)
        ImageDataArguments.__post_init__(self)
        AdapterArguments.__post_init__(self)
        self.compare_with = [os.path.relpath(folder) for folder in self.compare_with]


@dataclass
class OptimizationArguments(ScaledRateArguments):
    """The defaults of ConvNeXt V2's fine-tuning (arXiv 2301.00808, appendix), where all sizes agree."""

    output_dir: str = field(default=f"runs/{TASK}", metadata={"help": "The run folder."})
    base_learning_rate: float = field(
        default=8e-4, metadata={"help": "Peak learning rate for each 256 images of an optimizer step."}
    )
    lr_scheduler_type: str = field(default="cosine_with_min_lr", metadata={"help": "Or warmup_stable_decay, ..."})
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": 'Options of the schedule, as JSON; {"min_lr": 1e-6} for cosine_with_min_lr unless given.'},
    )
    warmup_epochs: float = field(default=0.0, metadata={"help": "Length of the warm-up, in place of warmup_steps."})
    weight_decay: float = field(default=0.05, metadata={"help": "Decay of matrices; norms and biases have none."})
    layer_decay: float = field(
        default=1.0, metadata={"help": "Factor of the learning rate from each layer to the one before it; 1 for none."}
    )
    layer_decay_type: str = field(
        default="single", metadata={"help": "What a layer is: single (a block) or group (three blocks, or a stage)."}
    )
    ema_decay: float = field(
        default=0.0,
        metadata={"help": "Share of the averaged weights that a step keeps, such as 0.9999; 0: no average."},
    )
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps or epoch."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save: no, steps or epoch."})

    def __post_init__(self):
        super().__post_init__()
        if self.lr_scheduler_type == "cosine_with_min_lr" and self.lr_scheduler_kwargs is None:
            self.lr_scheduler_kwargs = {"min_lr": min(1e-6, self.learning_rate)}
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"--layer_decay is {self.layer_decay}: give a factor above 0, and 1 for none.")
        if self.layer_decay_type not in LAYER_DECAY_TYPES:
            raise ValueError(f"--layer_decay_type is {self.layer_decay_type!r}: take {' or '.join(LAYER_DECAY_TYPES)}.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"--ema_decay is {self.ema_decay}: give 0 (no average) or more, and less than 1.")
        if not 0 <= self.label_smoothing_factor < 1:
            raise ValueError(
                f"--label_smoothing_factor is {self.label_smoothing_factor}: give 0 or more, and less than 1."
            )
        if self.warmup_epochs < 0:
            raise ValueError(f"--warmup_epochs is {self.warmup_epochs}: give 0 or more.")
        if self.warmup_epochs and self.warmup_steps:
            raise ValueError("--warmup_epochs and --warmup_steps both say how long the warm-up is: give one.")


class FinetuneTrainer(AveragedWeightsMixin, DrawnImagesMixin, RunFolderMixin, Trainer):
    """Trains on probabilities of classes, by layer-wise rates, and counts every held-out image once."""

    def __init__(self, *args, frozen: bool, **kwargs):
        super().__init__(
            *args, preprocess_logits_for_metrics=image_outcomes, compute_metrics=self._image_metrics, **kwargs
        )
        self.frozen = frozen
        self.model_accepts_loss_kwargs = False  # our loss is a batch's mean, whatever the model's own would be
        self.outcomes: tuple[int, np.ndarray, np.ndarray] | None = None

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            model = self.model if model is None else model
            args = self.args
            groups = parameter_groups(
                model, args.learning_rate, args.weight_decay, args.layer_decay, args.layer_decay_type
            )
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(args, model)
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.frozen:
            self.model.eval()  # features as they will be used: no dropped path, no statistics of a batch
        logits = model(pixel_values=inputs["pixel_values"]).logits
        loss = nn.functional.cross_entropy(logits.float(), inputs["labels"])
        return (loss, {"logits": logits}) if return_outputs else loss

    def describe_batch(self, inputs):
        classes = inputs["labels"].argmax(1).tolist()[:8]
        return "whose first images are of " + ", ".join(self.model.config.id2label[number] for number in classes)

    def _image_metrics(self, prediction) -> dict[str, float]:
        readable = prediction.label_ids != UNREADABLE
        self.eval_dataset.check_unreadable(np.flatnonzero(~readable))
        losses, predicted, in_top = prediction.predictions[readable].astype("float64").T
        labels = prediction.label_ids[readable]
        self.outcomes = (self.state.global_step, labels, predicted.astype("int64"))
        metrics = {"loss_per_image": float(losses.mean()), "accuracy": float((predicted == labels).mean())}
        if self.model.config.num_labels > TOP:
            metrics[f"top{TOP}_accuracy"] = float(in_top.mean())
        return metrics

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        # Trainer's own loss is a mean over batches of means, the last of which may be of fewer images.
        output.metrics[f"{metric_key_prefix}_loss"] = output.metrics.pop(f"{metric_key_prefix}_loss_per_image")
        return output


def image_outcomes(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`logits (batch, classes)`, `labels (batch,)` -> `(batch, 3)`: loss in nats, class, 1.0 if in the top 5."""
    logits = logits.float()
    loss = nn.functional.cross_entropy(logits, labels, reduction="none")
    in_top = (logits.topk(min(TOP, logits.shape[1]), dim=1).indices == labels[:, None]).any(1)
    return torch.stack([loss, logits.argmax(1).float(), in_top.float()], dim=1)


def check_arguments(arguments: FinetuneArguments, training: OptimizationArguments) -> None:
    """What can be told wrong before model and data are read."""
    check_training(training, f"training.{TASK}")
    if arguments.streaming:
        raise ValueError("--streaming has no known classes and epochs, which fine-tuning counts: leave it off.")
    if arguments.mixes and training.per_device_train_batch_size % 2:
        raise ValueError(
            f"--mixup and --cutmix pair the images of a batch, and --per_device_train_batch_size is "
            f"{training.per_device_train_batch_size}: give an even one."
        )
    if arguments.freeze_backbone and arguments.from_scratch:
        raise ValueError("--freeze_backbone would keep the random weights of --from_scratch: give one of the two.")
    sharded = [name for name in ("FSDP", "DEEPSPEED") if os.environ.get(f"ACCELERATE_USE_{name}") == "true"]
    if training.ema_decay and sharded:
        raise ValueError(f"--ema_decay averages whole weights, which {sharded[0]} shards: give 0, or use ddp.yaml.")
    if arguments.use_peft:
        _check_adapter(arguments, training, sharded)
    if arguments.compare_with and training.eval_strategy == "no":
        raise ValueError("--compare_with compares evaluations, and --eval_strategy is no: leave one off.")


def _check_adapter(arguments: FinetuneArguments, training: OptimizationArguments, sharded: list[str]) -> None:
    if arguments.model in SIZES or arguments.from_scratch:
        raise ValueError("--use_peft adapts weights that are trained, and these are new: name a trained --model.")
    if arguments.freeze_backbone:
        raise ValueError("--use_peft changes the backbone that --freeze_backbone keeps: give one of the two.")
    if training.ema_decay:
        raise ValueError(f"--ema_decay {training.ema_decay} averages whole weights, not an adapter's: give 0.")
    if sharded:
        raise ValueError(f"--use_peft ends in a merge of whole weights, which {sharded[0]} shards: use ddp.yaml.")
    if arguments.lora_init not in ("default", "gaussian"):
        raise ValueError(
            f"--lora_init {arguments.lora_init} is for linear layers, and image classifiers have convolutions, too: "
            "take default or gaussian."
        )


def load_comparisons(folders: list[str], data: dict[str, Any]) -> list[dict[str, Any]]:
    """What finished runs on the same held-out images came to; ValueError for a folder that is no such run."""
    comparisons = []
    for folder in folders:
        run = read_run(folder)
        if run is None or run["task"] != TASK or run["status"] != "finished":
            raise ValueError(f"--compare_with {folder} holds no finished run of training.{TASK}.")
        if run["data"].get("eval", {}).get("fingerprint") != data["eval"]["fingerprint"]:
            raise ValueError(
                f"--compare_with {folder} was evaluated on other images than this run: nothing to compare."
            )
        comparisons.append(
            {
                "name": Path(folder).resolve().name,
                "path": folder,
                "model": run["arguments"].get("model", ClassifierArguments.model),
                "from_scratch": "model" not in run["data"],
                "metrics": run["metrics"],
                "wall_time_seconds": run["wall_time_seconds"],
            }
        )
    return comparisons


def describe_base(arguments: FinetuneArguments, model: PreTrainedModel) -> dict[str, Any]:
    """Sections of `run.json` about the weights that the run began with: the run they come from, and their licence."""
    if arguments.model in SIZES or arguments.from_scratch:
        return {}
    sections = {"base_license": base_license(arguments.model, model.config)}
    run = read_run(arguments.model)
    if run is None:
        return sections
    base = {
        "path": arguments.model,
        "task": run["task"],
        "data": run["data"]["train"].get("info", {}).get("name") or run["data"]["train"]["dataset"],
        "metrics": run["metrics"],
        "wall_time_seconds": run["wall_time_seconds"],
        "images_seen": run["metrics"].get("images_seen"),
        "picture": BASE_PICTURE if _picture_of(run, arguments.model) else None,
    }
    return sections | {"base_run": base}


def _picture_of(run: dict[str, Any], folder: str) -> Path | None:
    """The last reconstruction that a masked pretraining left."""
    pictures = [sample["picture"] for sample in run.get("samples", []) if "picture" in sample]
    last = Path(folder) / pictures[-1] if pictures else None
    return last if last is not None and last.is_file() else None


def copy_base_picture(arguments: FinetuneArguments, output_dir: str) -> None:
    picture = Path(output_dir) / BASE_PICTURE
    picture.parent.mkdir(exist_ok=True)
    shutil.copyfile(_picture_of(read_run(arguments.model), arguments.model), picture)


def load_images(
    arguments: FinetuneArguments, training: OptimizationArguments
) -> tuple[Dataset, Dataset | None, dict[str, Any]]:
    """Training and held-out images, and the description of both for `run.json`."""
    columns = {"image_column": arguments.image_column, "label_column": arguments.label_column, "require_labels": True}
    config = {"config": arguments.dataset_config}
    train = load_image_dataset(arguments.dataset, arguments.dataset_split, **columns, **config)
    labels = train.features["label"].names
    if len(labels) < 2:
        raise ValueError(
            f"{arguments.dataset} ({arguments.dataset_split}) has the one class {labels[0]!r}: give two or more to "
            "tell apart."
        )
    data = {"train": describe_images(train, arguments.dataset, arguments.dataset_split)}
    if training.eval_strategy == "no":
        return train, None, data
    name, split = arguments.eval_dataset or arguments.dataset, arguments.eval_dataset_split
    config = config if arguments.eval_dataset is None else {}
    held_out = load_image_dataset(name, split, **columns, **config, class_names=labels)
    unseen = set(held_out["label"]) - set(train["label"])
    if unseen and training.process_index == 0:
        print(f"No training image is of the classes {some(labels[number] for number in sorted(unseen))}.")
    return train, held_out, data | {"eval": describe_images(held_out, name, split)}


def describe_model(classifier: Classifier) -> dict[str, Any]:
    model = classifier.model
    config = {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"}
    return {
        "parameters": model.num_parameters(),
        "trainable_parameters": model.num_parameters(only_trainable=True),
        "new_parameters": classifier.new,
        "config": config,
    }


def describe_adapter(config: LoraConfig) -> dict[str, Any]:
    names = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora")
    layers = {
        name: sorted({layer.rsplit(".", 1)[-1] for layer in getattr(config, name)})
        for name in ("target_modules", "modules_to_save")
    }
    return {name: getattr(config, name) for name in names} | layers


def prepare() -> tuple[FinetuneTrainer, str | None] | None:
    """Everything up to the first step: reads and checks what the user gave, and opens the run folder.

    Returns the trainer and the checkpoint to go on from; None where the folder holds this run, finished.
    """
    arguments, training, given = parse_arguments(FinetuneArguments, OptimizationArguments, description=__doc__)
    check_arguments(arguments, training)
    train_images, held_out_images, data = load_images(arguments, training)
    labels = train_images.features["label"].names
    comparisons = load_comparisons(arguments.compare_with, data)

    set_seed(training.seed)
    classifier = open_classifier(arguments, labels)
    model, processor = classifier.model, classifier.processor
    images = image_format(model, processor)
    flops = forward_flops(model, images, arguments.model)
    if arguments.freeze_backbone:
        model.requires_grad_(False)
        for parameter in head_parameters(model).values():
            parameter.requires_grad_(True)
    # Built for nothing: that a model's layers are not known would otherwise be told only when training begins.
    parameter_groups(model, 1.0, 0.0, training.layer_decay, training.layer_decay_type)
    check_batch(train_images, examples_per_step(training))
    if training.warmup_epochs:
        training.warmup_steps = round(training.warmup_epochs * (len(train_images) // examples_per_step(training)))
    if arguments.model not in SIZES and not arguments.from_scratch:
        data["model"] = base_entry(arguments.model, weights_fingerprint(model))

    sections = {"model": describe_model(classifier)}
    if arguments.use_peft:
        targets, whole = adapter_layers(model, arguments.lora_r)
        model = add_adapter(model, arguments, task_type=None, base=arguments.model, targets=targets, whole=whole)
        sections["model"]["trainable_parameters"] = model.get_nb_trainable_parameters()[0]
        sections["adapter"] = describe_adapter(model.peft_config["default"])

    training_item = TrainingItem(arguments, images)
    opened = open_run(training, TASK, given, data, model)
    if opened is None:
        return None
    record, checkpoint, peak = opened
    training.label_names = ["labels"]
    base = describe_base(arguments, model)
    trainer = FinetuneTrainer(
        model=model,
        args=training,
        train_dataset=DrawnImages(
            ImageDataset(train_images, num_channels=images.channels), training_item, training.seed
        ),
        eval_dataset=held_out_images and HeldOutImages(held_out_images, processor, images),
        data_collator=ClassifierCollator(arguments, len(labels), training.label_smoothing_factor),
        processing_class=processor,
        record=record,
        unit="images",
        flops_per_unit=flops * _passes(arguments),
        matmul_peak=peak,
        ema_decay=training.ema_decay,
        frozen=arguments.freeze_backbone,
    )
    record.save(
        image=images._asdict(),
        training=describe_training(training, peak)
        | {name: getattr(training, name) for name in ("layer_decay", "layer_decay_type", "ema_decay")}
        | {augmentation.name: getattr(arguments, augmentation.name) for augmentation in fields(AugmentationArguments)}
        | {
            "auto_augment": arguments.auto_augment or "none",
            "images_per_step": examples_per_step(training),
            "label_smoothing": training.label_smoothing_factor,
        },
        comparisons=comparisons,
        **sections,
        **base,
    )
    if trainer.is_world_process_zero() and base.get("base_run", {}).get("picture"):
        copy_base_picture(arguments, training.output_dir)
    return trainer, checkpoint


def _passes(arguments: FinetuneArguments) -> int:
    """Of a training step, in forward passes: backward to the inputs, and to the weights where they are trained."""
    return 1 if arguments.freeze_backbone else 2 if arguments.use_peft else 3


def save_merged(trainer: FinetuneTrainer) -> dict[str, Any]:
    """Writes the adapter into `adapter/` and the model with it merged into the run folder; what the merge changed."""
    folder = Path(trainer.args.output_dir) / ADAPTER
    if trainer.is_world_process_zero():
        save_adapter(trainer.model, folder)
    image = trainer.record.content["image"]
    pixels = torch.randn(4, image["channels"], *image["size"], generator=torch.Generator().manual_seed(0))
    separate = _logits(trainer.model, pixels)
    trainer.model = trainer.model.merge_and_unload()
    save_whole_model(trainer)
    difference = (_logits(trainer.model, pixels) - separate).abs().max()
    figures = {"max_logit_difference": float(difference), "largest_logit": float(separate.abs().max())}
    return {"merged": {"path": str(folder)} | figures}


@torch.no_grad()
def _logits(model: PreTrainedModel | PeftModel, pixels: torch.Tensor) -> torch.Tensor:
    return model.eval()(pixel_values=pixels.to(model.device)).logits.float()


def finish(trainer: FinetuneTrainer) -> None:
    """Saves the model into the run folder and writes what came of the run: metrics, classes, the card."""
    evaluate_the_end(trainer)
    if trainer.eval_dataset is not None and (trainer.outcomes or (None,))[0] != trainer.state.global_step:
        trainer.predict(trainer.eval_dataset)  # evaluated before this process was started: its outcomes again
    sections = {}
    if isinstance(trainer.model, PeftModel):
        sections = save_merged(trainer)
    else:
        save_whole_model(trainer)
    if trainer.outcomes is not None:
        _, labels, predicted = trainer.outcomes
        names = list(trainer.model.config.id2label.values())
        counts = confusion_counts(labels, predicted, len(names))
        sections |= {
            "per_class": per_class_table(counts, names),
            "confusion": {"labels": names, "counts": counts.tolist()},
        }
    metrics = final_metrics(trainer.state.log_history, "images")
    skipped = skipped_images(trainer.train_dataset, trainer.eval_dataset)
    finish_run(trainer, metrics, skipped_images=skipped, **sections)


def main() -> None:
    train_from_command_line(prepare, finish, TooManyUnreadableError)


if __name__ == "__main__":
    main()
