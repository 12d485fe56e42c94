"""What the trainers on preferences, DPO's and the reward model's, add to TRL's."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from datasets import Dataset
from transformers import EvalPrediction

from .run_folder_trainer import RunFolderMixin
from .run_setup import RunFolderArguments, examples_per_step


class PairTrainerMixin(RunFolderMixin):
    """Put before TRL's trainer: takes tokenised pairs, counts tokens, evaluates over pairs.

    The class defines `prediction_step`, which gives one row of figures a pair, in place of TRL's means over batches.

    Args:
        means_over_pairs: the held-out figures from the rows of all pairs.
    """

    def __init__(self, *args, means_over_pairs: Callable[[np.ndarray], dict[str, float]], **kwargs):
        super().__init__(*args, compute_metrics=self._means, **kwargs)
        self._means_over_pairs = means_over_pairs
        self._counted_tokens = 0

    def _prepare_dataset(self, dataset: Dataset, *args) -> Dataset:
        return dataset  # tokenised by `tokenize_pairs`, which counts and names rows

    def _means(self, prediction: EvalPrediction) -> dict[str, float]:
        return {name: float(value) for name, value in self._means_over_pairs(prediction.predictions).items()}

    def evaluation_loop(self, *args, **kwargs):
        output = super().evaluation_loop(*args, **kwargs)
        self._metrics["eval"].clear()  # means over batches
        return output

    def units_in_step(self, inputs, num_items_in_batch):
        # TRL's count has no padding and is of all processes.
        tokens, self._counted_tokens = self._total_train_tokens - self._counted_tokens, self._total_train_tokens
        return tokens

    def log(self, logs, start_time=None):
        self._metrics["train"].pop("num_tokens", None)  # `tokens_seen` goes on after a resume
        super().log(logs, start_time)

    def describe_batch(self, inputs):
        beginning = self.processing_class.decode(inputs["input_ids"][0, :24], skip_special_tokens=True)
        return f"whose first pair begins {beginning!r}"

    def create_model_card(self, *args, **kwargs):
        pass  # the card is built at the end, from run.json


def check_enough(pairs: Dataset, training: RunFolderArguments) -> None:
    """Raises ValueError where the pairs do not fill one optimizer step."""
    batch = examples_per_step(training)
    if len(pairs) < batch:
        raise ValueError(
            f"There are {len(pairs)} pairs to train on and an optimizer step takes {batch}: give more pairs or a "
            "smaller batch."
        )


def chosen_batches(pairs: Dataset) -> Iterator[dict[str, torch.Tensor]]:
    """Prompts with their chosen answers, one a batch, in random order: for adapters that begin from activations."""
    for pair in pairs.shuffle(seed=0):
        yield {"input_ids": torch.tensor([pair["prompt_ids"] + pair["chosen_ids"]])}
