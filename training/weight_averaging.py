"""An exponential moving average of the weights beside those that are trained (timm's `ModelEmaV3`).

It is what is evaluated and published; checkpoints hold it beside the trained weights, so that a resumed run has the
same average as one that was never stopped.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from timm.utils import ModelEmaV3
from transformers import TrainerCallback

FILE_NAME = "averaged_weights.safetensors"


class AveragedWeightsMixin:
    """Put before `RunFolderMixin`: `class MyTrainer(AveragedWeightsMixin, RunFolderMixin, Trainer)`.

    Args:
        ema_decay: share of the average that a step keeps; 0 for no average. In the first steps it keeps less, 1 - (1 +
            step)^(-2/3), so that a short run's average does not consist of its random beginning.
    """

    def __init__(self, *args, ema_decay: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.average = ModelEmaV3(self.model, decay=ema_decay, use_warmup=True) if ema_decay else None
        if self.average is not None:
            self.add_callback(_UpdateAverage(self.average))

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within, the model has the average's weights, and the average the model's."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        if self.average is None:
            return
        pairs = zip(self.model.state_dict().values(), self.average.module.state_dict().values(), strict=True)
        for trained, averaged in pairs:
            kept = trained.clone()
            trained.copy_(averaged)
            averaged.copy_(kept)

    def evaluation_loop(self, *args, **kwargs):
        with self.averaged_weights():
            return super().evaluation_loop(*args, **kwargs)

    def _save(self, output_dir=None, state_dict=None):
        if not self._staging:  # the published folder
            with self.averaged_weights():
                return super()._save(output_dir, state_dict)
        super()._save(output_dir, state_dict)
        if self.average is not None and self.args.should_save:
            save_model(self.average.module, str(Path(output_dir) / FILE_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_average(resume_from_checkpoint)

    def _load_best_model(self):
        super()._load_best_model()
        self._load_average(self.state.best_model_checkpoint)

    def _load_average(self, checkpoint: str) -> None:
        if self.average is not None:
            load_model(self.average.module, str(Path(checkpoint) / FILE_NAME))

    def _checkpoint_bytes(self):
        average = () if self.average is None else self.average.module.state_dict().values()
        return super()._checkpoint_bytes() + sum(tensor.nbytes for tensor in average)


class _UpdateAverage(TrainerCallback):
    def __init__(self, average: ModelEmaV3):
        self.average = average

    def on_step_end(self, args, state, control, model, **kwargs):
        self.average.update(model, step=state.global_step)
