"""What every trainer of ours adds to transformers' `Trainer` (or TRL's, which derive from it).

- A checkpoint is written beside its place and moved there when it is whole: whatever is named `checkpoint-N` can be
  resumed from, at whichever moment the process was killed.
- A loss or a gradient that is not finite stops the run before the optimizer sees it, and names the batch.
- `run.json` follows along; no pickle stays at the top of the folder.
- The log has tokens (or images) a second and the share of the machine's matrix-multiply peak.
"""

import json
import math
import os
import shutil
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from hub_cards.publish import publish

from .run_record import RunRecord

STAGING = "checkpoint_partial"
# Of a trained parameter's bytes in a checkpoint: AdamW's two moments in float32.
OPTIMIZER_BYTES_PER_PARAMETER = 8


class NonFiniteError(ValueError):
    """The loss or the gradient became infinite or not a number."""


def publish_run(training: TrainingArguments, **options: Any) -> str:
    """Publishes the finished run in `training.output_dir` as its `hub_…` fields say; `options` of `publish` prevail."""
    asked = {"private": training.hub_private_repo, "branch": training.hub_revision}
    return publish(training.output_dir, training.hub_model_id, **asked | options)


class RunFolderMixin:
    """Put before a trainer class: `class MyTrainer(RunFolderMixin, Trainer)`, which defines two methods.

    - `units_in_step(inputs, num_items_in_batch)`: tokens or images of one optimizer step over all processes;
    - `describe_batch(inputs)`: a few words by which a person finds the batch again.

    Args:
        record: the run's `RunRecord`.
        unit: what the throughput counts, "tokens" or "images".
        flops_per_unit: multiply-adds counted twice, forward and backward, of one token or image.
        matmul_peak: floating-point operations a second of the machine's matrix multiply, all processes together.
    """

    def __init__(self, *args, record: RunRecord, unit: str, flops_per_unit: float, matmul_peak: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.record = record
        self.unit = unit
        self.flops_per_unit = flops_per_unit
        self.matmul_peak = matmul_peak
        self.units_seen: torch.Tensor | int = 0
        self._logged_units = 0
        self._clock: float | None = None  # set when the first step begins: what comes before is no training
        self._staging = False
        self.add_callback(_LogBeforeSaving())

    # ---- checkpoints ----

    def _get_output_dir(self, trial):
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, STAGING) if self._staging else folder

    def _save_checkpoint(self, model, trial):
        with self._clock_stopped():
            self._save_staged(model, trial)
            self.record.save(history=self.state.log_history)

    def _save_staged(self, model, trial):
        output_dir = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        check_disk_space(output_dir, self._checkpoint_bytes())
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = False
        self.accelerator.wait_for_everyone()
        staged = output_dir / STAGING / name
        if self.state.best_model_checkpoint == str(staged):
            self.state.best_model_checkpoint = str(output_dir / name)
            if self.args.should_save:
                self.state.save_to_json(str(staged / "trainer_state.json"))
        if self.args.should_save:
            os.replace(staged, output_dir / name)
            (output_dir / STAGING).rmdir()
            rotate_checkpoints(
                str(output_dir), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=False
            )

    def _checkpoint_bytes(self) -> int:
        return checkpoint_bytes(self.model)

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            # Its content is in run.json, and a folder that others download holds no pickle.
            (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink(missing_ok=True)

    # ---- the Hub: a run is published when it is finished, by `run_setup.finish_run` ----

    def init_hf_repo(self, token=None, private=None):
        self.hub_model_id = self.args.hub_model_id

    def _push_from_checkpoint(self, checkpoint_folder):
        pass

    def push_to_hub(self, commit_message=None, blocking=True, token=None, revision=None, **kwargs):
        """Publishes the finished run folder, as `hub_cards.publish` does, in `args.hub_model_id`."""
        if not self.is_world_process_zero():
            return None
        return publish_run(
            self.args, commit_message=commit_message, token=token, **{"branch": revision} if revision else {}
        )

    # ---- finite or stopped ----

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self._clock is None:
            self._clock = time.perf_counter()
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise self._non_finite(f"the loss is {loss.item()}", inputs)
        if self.accelerator.gradient_state.sync_gradients:
            self.units_seen = self.units_seen + self.units_in_step(inputs, num_items_in_batch)
        self._last_inputs = inputs
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        value = norm.item() if torch.is_tensor(norm) else norm
        # float16's loss scaler meets infinite gradients as a matter of course and skips the step by itself.
        if self.accelerator.scaler is None and value is not None and not math.isfinite(value):
            raise self._non_finite(f"the gradient's norm is {value}", self._last_inputs)
        return norm

    def _non_finite(self, what: str, inputs: dict[str, Any]) -> NonFiniteError:
        step = self.state.global_step + 1
        path = Path(self.args.output_dir) / "nonfinite" / f"step_{step}_process_{self.args.process_index}.safetensors"
        path.parent.mkdir(exist_ok=True)
        save_file({name: value.contiguous() for name, value in inputs.items() if torch.is_tensor(value)}, path)
        checkpoint = last_good_checkpoint(self.args.output_dir)
        self.record.save(history=self.state.log_history, status=f"stopped at step {step}: {what}")
        return NonFiniteError(
            f"Stopped at step {step}, before the optimizer's update: {what} on the batch {self.describe_batch(inputs)} "
            f"(saved as {path}). Last good checkpoint: {checkpoint or 'none yet'}. "
            "Look at that batch, or begin a new --output_dir with --model CHECKPOINT and a lower --learning_rate."
        )

    # ---- throughput ----

    def get_eval_dataloader(self, eval_dataset=None):
        # Held-out data are read to the end, whatever becomes of an uneven end in training.
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drop_last

    def evaluate(self, *args, **kwargs):
        with self._clock_stopped():
            metrics = super().evaluate(*args, **kwargs)
            self.record.save(history=self.state.log_history)
        return metrics

    @contextmanager
    def _clock_stopped(self):
        start = time.perf_counter()
        yield
        if self._clock is not None:
            self._clock += time.perf_counter() - start

    def train(self, resume_from_checkpoint=None, **kwargs):
        if resume_from_checkpoint:
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / "trainer_state.json"))
            logged = [entry[f"{self.unit}_seen"] for entry in state.log_history if f"{self.unit}_seen" in entry]
            self.units_seen = self._logged_units = logged[-1] if logged else 0
            if state.global_step >= state.max_steps:  # Trainer would take one step too many
                self._load_from_checkpoint(resume_from_checkpoint)
                self.state = state
                if self.args.load_best_model_at_end and state.best_model_checkpoint:
                    self._load_best_model()
                return None
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def log(self, logs, start_time=None):
        if "loss" in logs:
            seen = int(self.units_seen)
            now = time.perf_counter()
            rate = (seen - self._logged_units) / (now - self._clock)
            logs[f"{self.unit}_seen"] = seen
            logs[f"{self.unit}_per_second"] = round(rate, 1)
            logs["matmul_share"] = round(rate * self.flops_per_unit / self.matmul_peak, 4)
            self._logged_units, self._clock = seen, now
        super().log(logs, start_time)


class _LogBeforeSaving(TrainerCallback):
    """Logs at every step that saves, and at the last.

    The sums behind a logged loss are not part of a checkpoint: they must be empty when it is written, or the first
    loss after a resume would be another one than that of the run that was never stopped.
    """

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= control.should_save or state.global_step >= state.max_steps

    on_epoch_end = on_step_end


def last_good_checkpoint(output_dir: str | Path) -> str | None:
    """The newest `checkpoint-N` that is whole: every file there and readable, as far as headers and lengths tell."""
    return next((str(path) for path in _checkpoints(output_dir) if _fault(path) is None), None)


def _checkpoints(output_dir: str | Path) -> list[Path]:
    """Newest first, by number."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True)


def _fault(checkpoint: Path) -> str | None:
    # One file each or shards; FSDP has folders for weights and optimizer, DeepSpeed one for both.
    needed = {
        "weights": ("model.", "model-", "adapter_model", "pytorch_model", "global_step"),
        "optimizer": ("optimizer", "global_step"),
        "random state": ("rng_state",),
    }
    for what, names in needed.items():
        if not any(path.name.startswith(names) for path in checkpoint.iterdir()):
            return f"it has no {what}"
    try:
        for path in {checkpoint / "trainer_state.json", *checkpoint.glob("*.json")}:
            json.loads(path.read_text(encoding="utf-8"))
        for path in checkpoint.glob("*.safetensors"):
            with safe_open(path, framework="pt"):  # reads the header and compares the file's length with it
                pass
    except (OSError, ValueError, SafetensorError) as error:
        return str(error)
    for path in [*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]:
        if not zipfile.is_zipfile(path):  # a zip's directory stands at its end: a truncated file has none
            return f"{path.name} is cut short"
    return None


def prepare_to_resume(output_dir: str | Path) -> str | None:
    """Returns the checkpoint to go on from, None for a fresh start; for the main process to call.

    What a killed save left behind is removed. A damaged checkpoint newer than the one returned is set aside under
    another name: the run will come to its step again.
    """
    shutil.rmtree(Path(output_dir) / STAGING, ignore_errors=True)
    for path in _checkpoints(output_dir):
        fault = _fault(path)
        if fault is None:
            return str(path)
        aside = path.with_name(f"damaged_{path.name}")
        print(f"{path} cannot be resumed from ({fault}): it is now {aside}.")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    return None


def checkpoint_bytes(model: torch.nn.Module) -> int:
    """What a checkpoint of `model` takes on the disk; of a model with an adapter, only the adapter is stored."""
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    stored = trained if hasattr(model, "peft_config") else parameters
    moments = OPTIMIZER_BYTES_PER_PARAMETER * sum(parameter.numel() for parameter in trained)
    return moments + sum(parameter.numel() * parameter.element_size() for parameter in stored)


def check_disk_space(folder: Path, needed: int) -> None:
    """Raises OSError unless the disk that holds `folder` has `needed` bytes free."""
    existing = next(parent for parent in [folder, *folder.resolve().parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OSError(
            f"{folder} needs {needed / 2**30:.2f} GiB for checkpoints and the disk has {free / 2**30:.2f} GiB free: "
            "make room, lower --save_total_limit, or choose another --output_dir."
        )
