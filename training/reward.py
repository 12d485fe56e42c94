"""Trains a reward model: a language model that gives a conversation one score, higher for the answer that was chosen.

    python -m training.reward --config training/recipes/llama_style/reward_quickstart.yaml
    accelerate launch --config_file training/accelerate_configs/ddp.yaml -m training.reward --config ...

Reads a model (ours or any of transformers that has a sequence classifier) and pairs of a chosen and a rejected answer;
writes a sequence classifier's folder, or with --use_peft an adapter's, with its `run.json` and card. The same command
again goes on from the last checkpoint, or says that the run is finished. Notable here:
- the loss is Bradley and Terry's, as in InstructGPT (arXiv 2203.02155, equation 1): minus the log of the probability,
  sigmoid(score of chosen - score of rejected), of the preference that the data have;
- a score is read at the last token of the rendered conversation, and only differences between scores mean anything
  (--center_rewards_coefficient 0.01 draws their mean to zero);
- held-out loss, accuracy and margin are means over pairs, whatever the batches;
- `--dry_run true` predicts the memory that the run would take, and loads nothing.
Fields are those of the dataclasses below, of `AdapterArguments`, `QuantizationArguments` and TRL's `RewardConfig`.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer

from .chat_data import load_train_and_eval
from .language_models import LanguageModelArguments, flops_per_token
from .preference_data import PreferenceDataArguments, load_preferences, tokenize_pairs
from .preference_trainer import PairTrainerMixin, check_enough, chosen_batches
from .quantization import keep_adapter_dtype
from .run_setup import (
    evaluate_the_end,
    final_metrics,
    finish_run,
    train_from_command_line,
)
from .tuning import (
    TuningTrainingArguments,
    check_tuning,
    open_base,
    open_tuned_run,
    parse_tuning,
    predict_memory,
    save_tuned_model,
    tokenize_splits,
    with_adapter,
)

# One score, which pipelines then return as it is rather than through a sigmoid.
SCORE_FIELDS = {"num_labels": 1, "id2label": {0: "reward"}, "label2id": {"reward": 0}, "problem_type": "regression"}


@dataclass
class RewardArguments(LanguageModelArguments, PreferenceDataArguments):
    pass


@dataclass
class RewardTrainingArguments(TuningTrainingArguments, RewardConfig):
    full_learning_rate: ClassVar[float] = 1e-5
    adapter_learning_rate: ClassVar[float] = 1e-4  # TRL's default

    output_dir: str = field(default="runs/reward", metadata={"help": "The run folder."})
    learning_rate: float | None = field(
        default=None,
        metadata={"help": "Peak learning rate; by default 1e-5 (Llama 2's) on all weights and 1e-4 on an adapter."},
    )
    max_length: int = field(
        default=1024,
        metadata={"help": "Tokens of prompt and answer, at most the model's context; longer pairs are left out."},
    )


class RewardModelTrainer(PairTrainerMixin, RewardTrainer):
    """TRL's trainer whose held-out figures are means over pairs."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, means_over_pairs=self._preferences, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The scores of each pair's chosen and rejected answer, `(pairs, 2)`."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            _, outputs = self.compute_loss(model, inputs, return_outputs=True)
        scores = outputs.logits.double().view(2, -1).T
        return None, scores, scores[:, 0]

    def _preferences(self, scores: np.ndarray) -> dict[str, float]:
        chosen, rejected = scores.T
        loss = np.logaddexp(0, rejected - chosen).mean()
        if self.args.center_rewards_coefficient is not None:
            loss += self.args.center_rewards_coefficient * ((chosen + rejected) ** 2).mean()
        return {
            "loss": loss,
            "accuracy": (chosen > rejected).mean(),
            "margin": (chosen - rejected).mean(),
            "chosen_score": chosen.mean(),
            "rejected_score": rejected.mean(),
        }


def prepare() -> tuple[RewardModelTrainer, str | None] | None:
    """Everything up to the first step: reads and checks what the user gave, opens model and run folder.

    Returns the trainer and the checkpoint to go on from; None where nothing is left to do.
    """
    tuning, training, given = parse_tuning(RewardArguments, RewardTrainingArguments, __doc__)
    arguments = tuning.model
    config = check_tuning(tuning, training, given, "training.reward")
    if tuning.dry_run.dry_run:
        predict_memory(config, tuning, training, AutoModelForSequenceClassification, sequences_per_example=2)
        return None
    train_rows, held_out_rows, data = load_train_and_eval(arguments, training.eval_strategy != "no", load_preferences)
    model, tokenizer, added_tokens = open_base(tuning, training, AutoModelForSequenceClassification, **SCORE_FIELDS)
    splits = {"train": train_rows, "eval": held_out_rows}
    tokenized, counts = tokenize_splits(
        splits,
        training,
        lambda rows: tokenize_pairs(rows, tokenizer, training.max_length, cut=False),
    )
    check_enough(tokenized["train"], training)
    model = with_adapter(model, tokenizer, tuning, training, added_tokens, lambda: chosen_batches(tokenized["train"]))
    opened = open_tuned_run("reward", model, tokenizer, tuning, training, given, data, counts, ("max_length",))
    if opened is None:
        return None
    record, checkpoint, peak = opened
    with keep_adapter_dtype(model):
        trainer = RewardModelTrainer(
            model=model,
            args=training,
            train_dataset=whole_texts(tokenized["train"]),
            eval_dataset=whole_texts(tokenized["eval"]) if "eval" in tokenized else None,
            processing_class=tokenizer,
            record=record,
            unit="tokens",
            flops_per_unit=flops_per_token(model),
            matmul_peak=peak,
        )
    return trainer, checkpoint


def whole_texts(pairs: Dataset) -> Dataset:
    """`chosen_ids` and `rejected_ids` with the prompt at the beginning of both, as TRL's collator takes them."""

    def join(pair):
        return {name: pair["prompt_ids"] + pair[name] for name in ("chosen_ids", "rejected_ids")}

    return pairs.map(join, remove_columns=["prompt_ids"], desc="Joining prompts and answers")


def scored_example(trainer: RewardModelTrainer) -> dict[str, Any]:
    """The first held-out pair (or training pair) as the texts that the model reads, and their scores."""
    pair = (trainer.eval_dataset or trainer.train_dataset)[0]
    trainer.model.eval()
    _, scores, _ = trainer.prediction_step(trainer.model_wrapped, trainer.data_collator([pair]), False)
    texts = {name: trainer.processing_class.decode(pair[f"{name}_ids"]) for name in ("chosen", "rejected")}
    return texts | {"chosen_score": round(scores[0, 0].item(), 4), "rejected_score": round(scores[0, 1].item(), 4)}


def finish(trainer: RewardModelTrainer) -> None:
    """Saves model or adapter into the run folder and writes what came of the run: metrics, an example, the card."""
    evaluate_the_end(trainer)
    example = scored_example(trainer)
    save_tuned_model(trainer)
    finish_run(trainer, final_metrics(trainer.state.log_history, "tokens"), example=example)


def main() -> None:
    train_from_command_line(prepare, finish)


if __name__ == "__main__":
    main()
