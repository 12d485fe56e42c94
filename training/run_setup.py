"""What a training script does between its arguments and its first step: defaults, checks, run folder, precision."""

import hashlib
import json
import shlex
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import broadcast_object_list
from huggingface_hub import get_token
from torch import nn
from transformers import TrainingArguments, get_scheduler

from hub_cards.build_card import build_card
from hub_cards.hub_upload import UploadError
from hub_cards.publish import PublishError

from .command_line import plain_errors
from .matmul_peak import choose_precision, matmul_peak
from .recorded_outputs import recorded_outputs
from .run_folder_trainer import (
    NonFiniteError,
    check_disk_space,
    checkpoint_bytes,
    last_good_checkpoint,
    prepare_to_resume,
    publish_run,
)
from .run_record import RunRecord

# Of the arguments, what the card shows whether or not it was given.
DESCRIBED = (
    "seed",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "adam_beta1",
    "adam_beta2",
    "weight_decay",
    "max_grad_norm",
)


@dataclass
class RunFolderArguments(TrainingArguments):
    """`TrainingArguments` as our scripts use them: evaluated and saved by steps, the precision measured."""

    precision: str = field(
        default="auto",
        metadata={"help": "fp32, bf16 (autocast), or auto: bf16 where this machine multiplies clearly faster in it."},
    )
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate: no, steps or epoch."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints that are kept."})
    logging_steps: float = field(default=10, metadata={"help": "Optimizer steps between two log lines."})

    def __post_init__(self):
        super().__post_init__()
        if self.precision not in ("auto", "fp32", "bf16"):
            raise ValueError(f"--precision is {self.precision!r}: take auto, fp32 or bf16.")
        self.logging_nan_inf_filter = False  # it would hide behind an average the loss at which we stop
        self.remove_unused_columns = False  # the collators read more columns than the models
        self.dataloader_pin_memory = torch.cuda.is_available()


@dataclass
class ScaledRateArguments(RunFolderArguments):
    """The learning rate in proportion to the batch, as vision's recipes give it (arXiv 1706.02677).

    A class that derives from this gives `base_learning_rate` its default.
    """

    base_learning_rate: float = field(
        default=1.5e-4, metadata={"help": "Peak learning rate for each 256 images of an optimizer step."}
    )
    learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate itself; by default it follows from --base_learning_rate."}
    )

    def __post_init__(self):
        given, self.learning_rate = self.learning_rate, self.learning_rate or 0.0
        super().__post_init__()
        if given is None:
            self.learning_rate = self.base_learning_rate * examples_per_step(self) / 256


class OpenedRun(NamedTuple):
    """`peak` is the matrix multiply's, in floating-point operations a second, all processes together."""

    record: RunRecord
    checkpoint: str | None
    peak: float


def check_training(training: RunFolderArguments, module: str) -> None:
    """Raises ValueError for what the scripts cannot honour, before any data is read. `module` is the command's name."""
    if training.n_gpu > 1:
        raise ValueError(
            f"One process sees {training.n_gpu} GPUs: start one for each with `accelerate launch -m {module}`, or hide "
            "the others with CUDA_VISIBLE_DEVICES=0."
        )
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(training, name) < 1:
            raise ValueError(f"--{name} is {getattr(training, name)}: give 1 or more.")
    if training.max_steps <= 0 and training.num_train_epochs <= 0:
        raise ValueError(f"--num_train_epochs is {training.num_train_epochs}: give more than 0, or --max_steps.")
    if training.prediction_loss_only:
        raise ValueError("--prediction_loss_only leaves nothing to compute the held-out figures from: leave it off.")
    if training.bf16 or training.fp16:
        raise ValueError("--bf16 and --fp16 are chosen by --precision here: give --precision bf16.")
    if training.save_strategy == "best" or training.save_only_model:
        raise ValueError("--save_strategy best and --save_only_model make checkpoints that cannot be resumed from.")
    if training.hub_token:
        raise ValueError(
            "--hub_token would be recorded with the run: leave it off, and `hf auth login` or set HF_TOKEN."
        )
    if training.push_to_hub and not training.hub_model_id:
        raise ValueError("--push_to_hub needs --hub_model_id user/name: the repo to publish the finished run in.")
    if training.push_to_hub and not get_token():
        raise ValueError("--push_to_hub: you are not logged in to the Hub; `hf auth login`, or set HF_TOKEN.")
    _check_schedule(training)


def _check_schedule(training: RunFolderArguments) -> None:
    """Builds the schedule once for nothing: its options would otherwise be read after the data is prepared."""
    try:
        get_scheduler(
            training.lr_scheduler_type,
            torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=training.learning_rate),
            num_warmup_steps=1,
            num_training_steps=1000,
            scheduler_specific_kwargs=dict(training.lr_scheduler_kwargs or {}),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"--lr_scheduler_type {training.lr_scheduler_type} does not go with these --lr_scheduler_kwargs: {error}"
        ) from error


def open_run(
    training: RunFolderArguments, task: str, given: dict[str, Any], data: dict[str, Any], model: nn.Module
) -> OpenedRun | None:
    """Opens the run folder for this very run, and settles `training`'s precision.

    Args:
        given: what was asked for, the last thing that `parse_arguments` returns.
        data: a description of each data set, with its `fingerprint`.

    Returns None where the folder holds this run, finished; its card is written anew then.

    Raises ValueError where it holds another run, and OSError where the disk has no room for the checkpoints.
    """
    is_main_process = training.process_index == 0
    record = RunRecord.start(training.output_dir, task, given, data, writes=is_main_process)
    if record.finished:
        if is_main_process:
            print(f"{training.output_dir} holds this run, finished: only its card is written anew.")
            build_card(training.output_dir)
            publish_if_asked(training)
        return None
    with training.main_process_first(local=False, desc="opening the run folder"):
        checkpoint = (prepare_to_resume if is_main_process else last_good_checkpoint)(training.output_dir)
    if is_main_process and training.save_strategy != "no":
        room = (training.save_total_limit or 1) + 1 - len(list(Path(training.output_dir).glob("checkpoint-*")))
        check_disk_space(Path(training.output_dir), room * checkpoint_bytes(model))

    # A resumed run keeps the precision it began with: a measurement may come out otherwise the second time. For the
    # same reason the main process decides for all.
    precision = record.content.get("training", {}).get("precision") or (
        choose_precision(training.device) if training.precision == "auto" else training.precision
    )
    precision = broadcast_object_list([precision])[0]
    training.bf16, training.mixed_precision = precision == "bf16", {"bf16": "bf16", "fp32": "no"}[precision]
    peak = matmul_peak(training.device, torch.bfloat16 if training.bf16 else torch.float32) * training.world_size
    return OpenedRun(record, checkpoint, peak)


def examples_per_step(training: RunFolderArguments) -> int:
    return training.train_batch_size * training.gradient_accumulation_steps * training.world_size


def describe_training(training: RunFolderArguments, peak: float) -> dict[str, Any]:
    """What the run came down to once every default was filled in."""
    description = {"precision": "bf16" if training.bf16 else "fp32", "matmul_peak_gflops": round(peak / 1e9, 1)}
    if training.max_steps <= 0:  # they prevail
        description["num_train_epochs"] = training.num_train_epochs
    return description | {name: getattr(training, name) for name in DESCRIBED}


def check_config_overrides(overrides: dict | str | None, config_class: type, model: str | None) -> dict[str, Any]:
    """`--config_overrides` as a dictionary; ValueError where it names no field of the config, or comes with --model."""
    if isinstance(overrides, str):
        try:
            overrides = json.loads(overrides)
        except ValueError as error:
            raise ValueError(f'--config_overrides is not JSON such as {{"mask_ratio": 0.5}}: {error}.') from error
    overrides = overrides or {}
    if not isinstance(overrides, dict):
        raise ValueError(f"--config_overrides is {overrides!r}: give config fields and their values.")
    if unknown := overrides.keys() - {field.name for field in fields(config_class)}:
        raise ValueError(
            f"--config_overrides names {', '.join(sorted(unknown))}, which {config_class.__name__} has not."
        )
    if overrides and model is not None:
        raise ValueError("--config_overrides is for a new model, and --model names one that has its config.")
    return overrides


def weights_fingerprint(model: nn.Module) -> str:
    """A hash of every parameter, in order."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def final_metrics(history: list[dict[str, float]], unit: str) -> dict[str, float]:
    """The last loss and evaluation of a run, and its median speed; `unit` is the trainer's, "tokens" or "images".

    What an evaluation before the first step (--eval_on_start) found has `_before` after its name.
    """
    steps = [entry for entry in history if "loss" in entry]  # the last step always logs
    evaluations = [entry for entry in history if is_evaluation(entry)]
    metrics = {"train_loss": steps[-1]["loss"], f"{unit}_seen": steps[-1][f"{unit}_seen"]}
    for name in (f"{unit}_per_second", "matmul_share"):
        metrics[name] = statistics.median(entry[name] for entry in steps)
    times = ("_runtime", "_per_second", "_time")
    for evaluation, suffix in ((evaluations[:1], "_before"), (evaluations[-1:], "")):
        if evaluation and (not suffix or evaluation[0]["step"] == 0):
            names = [name for name in evaluation[0] if name.startswith("eval_") and not name.endswith(times)]
            metrics |= {name + suffix: evaluation[0][name] for name in names}
    return metrics


def is_evaluation(entry: dict[str, float]) -> bool:
    """Whether an entry of a trainer's history tells of held-out data rather than of steps."""
    return any(name.startswith("eval_") for name in entry)


def evaluate_the_end(trainer) -> None:
    """Evaluates the trained model unless the last step did so already."""
    last_step = trainer.state.global_step
    evaluated = any(is_evaluation(log) for log in trainer.state.log_history if log["step"] == last_step)
    if trainer.eval_dataset is not None and (not evaluated or trainer.args.load_best_model_at_end):
        trainer.evaluate()


def save_whole_model(trainer) -> None:
    """Writes the model into the run folder, whole even where the checkpoints are sharded."""
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(_internal_call=True)  # which --push_to_hub does not publish yet


def finish_run(trainer, metrics: dict[str, float], **sections: Any) -> None:
    """Writes what came of the run into its record, and its card; publishes it where that was asked for."""
    is_main_process = trainer.is_world_process_zero()
    if is_main_process:
        sections["outputs"] = recorded_outputs(trainer.args.output_dir)
    trainer.record.finish(metrics, history=trainer.state.log_history, **sections)
    if is_main_process:
        build_card(trainer.args.output_dir)
        print(f"{trainer.args.output_dir}: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
        publish_if_asked(trainer.args)


def publish_if_asked(training: RunFolderArguments) -> None:
    """`--push_to_hub`, of a finished run; a failure is told with the command that tries again, and ends with 2."""
    if not training.push_to_hub:
        return
    try:
        publish_run(training)
    except (PublishError, UploadError) as error:
        words = ["python", "-m", "hub_cards.publish", training.output_dir, "--repo_id", training.hub_model_id]
        words += ["--private"] * bool(training.hub_private_repo)
        words += ["--branch", training.hub_revision] if training.hub_revision else []
        print(f"error: {error}\nThe run is finished. To try again: {shlex.join(words)}", file=sys.stderr)
        sys.exit(2)


def train_from_command_line(prepare: Callable, finish: Callable, *errors: type[Exception]) -> None:
    """A training script's `main`: mistakes of the user's, and in training a non-finite loss, are told in one line.

    Args:
        prepare: returns the trainer and the checkpoint to go on from, or None where nothing is left to do.
        finish: what is done with the trainer after training.
        errors: further errors in training that are about the data rather than the code.
    """
    with plain_errors():
        prepared = prepare()
    if prepared is None:
        return
    trainer, checkpoint = prepared
    with plain_errors(NonFiniteError, *errors):
        trainer.train(resume_from_checkpoint=checkpoint)
    finish(trainer)
