"""Teaches a language model to prefer the better of two answers, by Direct Preference Optimization (arXiv 2305.18290).

    python -m training.dpo --config training/recipes/llama_style/dpo_quickstart.yaml
    accelerate launch --config_file training/accelerate_configs/ddp.yaml -m training.dpo --config ...

Reads a tuned model (`training.sft` makes one; or any causal LM of transformers with a chat template) and pairs of a
chosen and a rejected answer; writes a model folder, or with --use_peft an adapter's, with its `run.json` and card. The
same command again goes on from the last checkpoint, or says that the run is finished. Notable here:
- the reference is the model as it was: the adapter switched off, or on all weights a frozen copy, or, with
  --precompute_ref_log_probs true, its log-probabilities of the data, taken once before the first step;
- held-out figures are means over pairs, whatever the batches: how much more the model than the reference prefers the
  chosen answer (`eval_margin`, beta times nats) and for which share of the pairs (`eval_accuracy`);
- `--dry_run true` predicts the memory that the run would take, and loads nothing.
Fields are those of the dataclasses below, of `AdapterArguments`, `QuantizationArguments` and TRL's `DPOConfig`.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer

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
from .sft import ReplyCallback
from .tuning import (
    Tuning,
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


@dataclass
class DpoArguments(LanguageModelArguments, PreferenceDataArguments):
    sample_prompts: list[str] = field(
        default_factory=lambda: ["Who was Marie Curie?", "What is a river?", "Hello! How are you today?"],
        metadata={"help": "Questions that the model answers at each evaluation."},
    )


@dataclass
class DpoTrainingArguments(TuningTrainingArguments, DPOConfig):
    # An adapter's is ten times that for all weights, as in Zephyr's recipes (5e-6 with QLoRA and 5e-7 without).
    full_learning_rate: ClassVar[float] = 1e-6
    adapter_learning_rate: ClassVar[float] = 1e-5

    output_dir: str = field(default="runs/dpo", metadata={"help": "The run folder."})
    learning_rate: float | None = field(
        default=None,
        metadata={"help": "Peak learning rate; by default 1e-6 (the paper's) on all weights and 1e-5 on an adapter."},
    )
    max_length: int = field(
        default=1024,
        metadata={"help": "Tokens of prompt and answer, at most the model's context; longer answers are cut."},
    )


class DpoTrainer(PairTrainerMixin, DPOTrainer):
    """DPO whose held-out figures are exact: means over pairs of what the loss is made of."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, means_over_pairs=self._rewards, **kwargs)
        if isinstance(self.model, PeftModel) and "ref" in self.model.peft_config:
            # TRL's copy of the new adapter, which is zero. With the adapter switched off, the base is the reference.
            self.model.delete_adapter("ref")

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss, and each pair's log-probabilities: of chosen and rejected, then the reference's, `(pairs, 4)`."""
        inputs = self._prepare_inputs(inputs)
        log_probs = []  # (2 * pairs,), chosen and then rejected; the policy's and, unless precomputed, the reference's
        hooks = [
            opened.register_forward_hook(lambda _, __, outputs: log_probs.append(outputs.log_probs.sum(dim=1)))
            for opened in (self.model, self.ref_model)
            if opened is not None
        ]
        try:
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = self.compute_loss(model, inputs)
        finally:
            for hook in hooks:
                hook.remove()
        if self.precompute_ref_logps:
            log_probs.append(torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]]))
        figures = torch.cat(log_probs).double().view(4, -1).T
        return None if self._loss_is_plain() else loss, figures, figures[:, 0]

    def _loss_is_plain(self) -> bool:
        """Whether the loss is -log sigmoid of the margin. Of TRL's others, the mean over batches has to do."""
        variants = (self.ld_alpha is not None, self.use_weighting, self.f_divergence_type != "reverse_kl")
        return self.loss_types == ["sigmoid"] and self.loss_weights == [1.0] and not any(variants)

    def _rewards(self, log_probs: np.ndarray) -> dict[str, float]:
        """The implicit rewards of the paper's section 4, beta times nats, and its equation 7."""
        chosen, rejected, reference_chosen, reference_rejected = log_probs.T
        chosen_reward = self.beta * (chosen - reference_chosen)
        rejected_reward = self.beta * (rejected - reference_rejected)
        margin = chosen_reward - rejected_reward
        means = {
            "accuracy": (margin > 0).mean(),
            "margin": margin.mean(),
            "chosen_reward": chosen_reward.mean(),
            "rejected_reward": rejected_reward.mean(),
            "chosen_log_prob": chosen.mean(),
            "rejected_log_prob": rejected.mean(),
        }
        return means | ({"loss": np.logaddexp(0, -margin).mean()} if self._loss_is_plain() else {})


def check_reference(training: DpoTrainingArguments) -> None:
    if training.beta <= 0:
        raise ValueError(f"--beta is {training.beta}: give more than 0.")
    if training.sync_ref_model:
        raise ValueError(
            "--sync_ref_model moves the reference along, which checkpoints do not keep: leave it off, or begin a "
            "further run with this one's result as --model."
        )


def holds_reference(tuning: Tuning, training: DpoTrainingArguments) -> bool:
    """Whether a second copy of the model is the reference. Else the base below the adapter, or what it gave, serves.

    A base of which a part moved into the adapter (PiSSA, OLoRA) is no reference.
    """
    if tuning.adapter.use_peft:
        return tuning.adapter.splits_base
    return not training.precompute_ref_log_probs


def open_reference(tuning: Tuning, training: DpoTrainingArguments) -> PreTrainedModel | None:
    if not holds_reference(tuning, training):
        return None
    reference, _, _ = open_base(tuning, training)
    return reference.eval().requires_grad_(False)


def flops_with_reference(model: PreTrainedModel | PeftModel, training: DpoTrainingArguments) -> float:
    """A token's operations: those of the model, and the reference's forward pass, a third (a half below an adapter)."""
    reference = 0 if training.precompute_ref_log_probs else 1 / 2 if isinstance(model, PeftModel) else 1 / 3
    return flops_per_token(model) * (1 + reference)


def prepare() -> tuple[DpoTrainer, str | None] | None:
    """Everything up to the first step: reads and checks what the user gave, opens model and run folder.

    Returns the trainer and the checkpoint to go on from; None where nothing is left to do.
    """
    tuning, training, given = parse_tuning(DpoArguments, DpoTrainingArguments, __doc__)
    arguments = tuning.model
    config = check_tuning(tuning, training, given, "training.dpo")
    check_reference(training)
    if tuning.dry_run.dry_run:
        copied = holds_reference(tuning, training)
        predict_memory(config, tuning, training, sequences_per_example=2, reference_copy=copied)
        return None
    train_rows, held_out_rows, data = load_train_and_eval(arguments, training.eval_strategy != "no", load_preferences)
    model, tokenizer, added_tokens = open_base(tuning, training)
    splits = {"train": train_rows, "eval": held_out_rows}
    tokenized, counts = tokenize_splits(
        splits,
        training,
        lambda rows: tokenize_pairs(rows, tokenizer, training.max_length, cut=True),
    )
    check_enough(tokenized["train"], training)
    model = with_adapter(model, tokenizer, tuning, training, added_tokens, lambda: chosen_batches(tokenized["train"]))
    opened = open_tuned_run(
        "dpo",
        model,
        tokenizer,
        tuning,
        training,
        given,
        data,
        counts,
        ("max_length", "beta", "loss_type", "precompute_ref_log_probs"),
    )
    if opened is None:
        return None
    record, checkpoint, peak = opened
    with keep_adapter_dtype(model):
        trainer = DpoTrainer(
            model=model,
            ref_model=open_reference(tuning, training),
            args=training,
            train_dataset=tokenized["train"],
            eval_dataset=tokenized.get("eval"),
            processing_class=tokenizer,
            callbacks=[ReplyCallback(record, tokenizer, arguments.sample_prompts)] if tokenizer.chat_template else [],
            record=record,
            unit="tokens",
            flops_per_unit=flops_with_reference(model, training),
            matmul_peak=peak,
        )
    return trainer, checkpoint


def finish(trainer: DpoTrainer) -> None:
    """Saves model or adapter into the run folder and writes what came of the run: metrics, the card."""
    evaluate_the_end(trainer)
    save_tuned_model(trainer)
    finish_run(trainer, final_metrics(trainer.state.log_history, "tokens"))


def main() -> None:
    train_from_command_line(prepare, finish)


if __name__ == "__main__":
    main()
