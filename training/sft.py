"""Teaches a language model to answer, by supervised fine-tuning: on all weights, LoRA, or LoRA on a base in 4 bits.

    python -m training.sft --config training/recipes/llama_style/sft_quickstart.yaml
    accelerate launch --config_file training/accelerate_configs/ddp.yaml -m training.sft --config ...

Reads a model (ours or any causal LM of transformers) and conversations; writes a model folder, or with --use_peft an
adapter's, with its `run.json` and card. The same command again goes on from the last checkpoint, or says that the run
is finished. Notable here:
- the loss is taken on the assistant's turns only, their end included, so that the model learns to stop; labels are set
  by position, so that a padding token that is also the end of text does not unteach it;
- conversations are packed into blocks in which they do not see each other; held-out ones are not packed, and the
  held-out loss is a mean over tokens, whatever the batches;
- `--dry_run true` predicts the memory that the run would take, and loads nothing.
Fields are those of the dataclasses below, of `AdapterArguments`, `QuantizationArguments` and TRL's `SFTConfig`.
"""

import inspect
import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import SFTConfig, SFTTrainer, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from .chat_data import ChatDataArguments, load_conversations, load_train_and_eval, tokenize_conversations
from .language_models import LanguageModelArguments, end_of_turn_ids, flops_per_token
from .packing import PackedBlockCollator
from .quantization import keep_adapter_dtype
from .run_folder_trainer import RunFolderMixin
from .run_record import RunRecord
from .run_setup import (
    evaluate_the_end,
    examples_per_step,
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

REPLY_TOKENS = 128


@dataclass
class SftArguments(LanguageModelArguments, ChatDataArguments):
    eval_dataset: str | None = field(
        default=None, metadata={"help": "Conversations to evaluate on. By default another split of --dataset."}
    )
    eval_dataset_split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    sample_prompts: list[str] = field(
        default_factory=lambda: ["Who was Marie Curie?", "What is a river?", "Hello! How are you today?"],
        metadata={"help": "Questions that the model answers at each evaluation."},
    )


@dataclass
class SftTrainingArguments(TuningTrainingArguments, SFTConfig):
    output_dir: str = field(default="runs/sft", metadata={"help": "The run folder."})
    full_learning_rate: ClassVar[float] = 2e-5
    adapter_learning_rate: ClassVar[float] = 2e-4

    learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Peak learning rate; by default 2e-5 (TRL's) on all weights and 2e-4 (QLoRA's) on an adapter."
        },
    )
    max_length: int = field(
        default=1024,
        metadata={
            "help": "Tokens of a conversation and of a packed block; at most the model's context. See --packing."
        },
    )
    packing: bool = field(
        default=True,
        metadata={"help": "Fill blocks of --max_length with several conversations, which do not see each other."},
    )
    assistant_only_loss: bool = field(
        default=True,
        metadata={"help": "Take the loss on the assistant's turns only, rather than on all of `messages`."},
    )

    def __post_init__(self):
        super().__post_init__()
        self.dataloader_drop_last = True  # an uneven end would be filled up with repeated rows, or be a smaller batch


class SftTrainer(RunFolderMixin, SFTTrainer):
    """Counts the tokens that the model reads, and evaluates in sums over tokens rather than means over batches."""

    def __init__(self, *args, eval_collator: DataCollatorForLanguageModeling, **kwargs):
        super().__init__(*args, compute_metrics=_means_over_tokens, **kwargs)
        self.eval_collator = eval_collator
        self._tokens_in_step: torch.Tensor | int = 0

    def get_eval_dataloader(self, eval_dataset=None):
        training_collator, self.data_collator = self.data_collator, self.eval_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = training_collator

    def training_step(self, model, inputs, num_items_in_batch=None):
        # Packed blocks have no mask. Where the end of text serves as padding, their ends are then not counted.
        read = inputs.get("attention_mask", inputs["input_ids"] != self.processing_class.pad_token_id)
        self._tokens_in_step += read.sum()
        return super().training_step(model, inputs, num_items_in_batch)

    def units_in_step(self, inputs, num_items_in_batch):
        tokens, self._tokens_in_step = self._tokens_in_step, 0
        return self.accelerator.reduce(tokens.to(self.args.device), "sum")

    def describe_batch(self, inputs):
        beginning = self.processing_class.decode(inputs["input_ids"][0, :24], skip_special_tokens=True)
        return f"whose first row begins {beginning!r}"

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        sums = [-outputs.log_probs.sum(dim=1), outputs.is_top1.sum(dim=1), outputs.label_mask.sum(dim=1)]
        return None, torch.stack([s.double() for s in sums], dim=1), inputs["labels"][:, :1]

    def log(self, logs, start_time=None):
        for metrics in self._metrics.values():
            metrics.pop("num_tokens", None)  # padding included; `tokens_seen` is ours
        super().log(logs, start_time)


def _means_over_tokens(prediction) -> dict[str, float]:
    """From each row's summed loss, its tokens predicted right, and its tokens."""
    loss, right, tokens = prediction.predictions.sum(axis=0)
    loss = float(loss / tokens)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "token_accuracy": float(right / tokens)}


class ReplyCallback(TrainerCallback):
    """Answers the sample prompts at each evaluation, greedily."""

    def __init__(self, record: RunRecord, tokenizer: PreTrainedTokenizerBase, prompts: list[str]):
        self.record, self.tokenizer, self.prompts = record, tokenizer, prompts

    def on_evaluate(self, args, state, control, model, **kwargs):
        new = [{"step": state.global_step, "prompt": p} | reply(model, self.tokenizer, p) for p in self.prompts]
        if not state.is_world_process_zero:
            return
        kept = [sample for sample in self.record.content["samples"] if sample["step"] < state.global_step]
        self.record.save(samples=kept + new)
        for sample in new:
            print(f"  {sample['prompt']} | {sample['text']!r}{'' if sample['ended'] else ' ...'}")


def reply(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: str) -> dict[str, Any]:
    """`text`, the likeliest answer to one question, and whether it `ended` within 128 tokens."""
    question = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    ends, context = end_of_turn_ids(tokenizer), getattr(model.config, "max_position_embeddings", 2**31)
    if inputs["input_ids"].shape[1] >= context:  # no room for an answer
        return {"text": "", "ended": False}
    was_training = model.training
    model.eval()
    ids = model.generate(
        **inputs.to(model.device),
        max_new_tokens=min(REPLY_TOKENS, context - inputs["input_ids"].shape[1]),
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
    )[0, inputs["input_ids"].shape[1] :].tolist()
    model.train(was_training)
    return {"text": tokenizer.decode(ids, skip_special_tokens=True), "ended": ids[-1] in ends}


def training_blocks(rows: Dataset, training: SftTrainingArguments) -> Dataset:
    """The tokenised rows, packed where asked for; ValueError where they do not fill one batch."""
    if training.packing:
        rows = pack_dataset(rows, training.max_length, strategy="bfd", map_kwargs={"desc": "Packing"})
    batch = examples_per_step(training)
    if len(rows) < batch:
        what = f"blocks of {training.max_length} tokens" if training.packing else "rows"
        raise ValueError(
            f"The conversations fill {len(rows)} {what} and a step takes {batch}: give more conversations, a "
            "smaller batch or a smaller --max_length."
        )
    return rows


def check_arguments(arguments: SftArguments, training: SftTrainingArguments, model: PreTrainedModel) -> None:
    """What only the opened model tells."""
    if not training.packing:
        return
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"{type(model).__name__} takes no position_ids, by which packed conversations are kept apart: give "
            "--packing false."
        )
    # Flash attention runs on GPUs only, and DeepSpeed's shards not before the trainer has them.
    if "flash" not in arguments.attn_implementation and training.deepspeed_plugin is None and _sees_other_piece(model):
        raise ValueError(
            f"{type(model).__name__} lets packed conversations see each other, for all their position_ids: give "
            "--packing false."
        )


@torch.no_grad()
def _sees_other_piece(model: PreTrainedModel) -> bool:
    """Whether a packed piece changes what follows it: some models take position_ids and build a mask without them."""
    packed = torch.tensor([[0, 1, 2, 6, 7, 8], [3, 4, 5, 6, 7, 8]], device=model.device)
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 2]], device=model.device)
    first, second = (
        model(input_ids=row[None], position_ids=position_ids, use_cache=False).logits[0, 3:].float() for row in packed
    )
    return bool((first - second).abs().max() > 1e-3 * first.abs().max())


def prepare() -> tuple[SftTrainer, str | None] | None:
    """Everything up to the first step: reads and checks what the user gave, opens model and run folder.

    Returns the trainer and the checkpoint to go on from; None where nothing is left to do.
    """
    tuning, training, given = parse_tuning(SftArguments, SftTrainingArguments, __doc__)
    arguments = tuning.model
    config = check_tuning(tuning, training, given, "training.sft")
    if "pad_to_multiple_of" in given:
        raise ValueError("--pad_to_multiple_of has no effect here: packed blocks are all of --max_length.")
    if tuning.dry_run.dry_run:
        predict_memory(config, tuning, training)
        return None
    load = partial(load_conversations, text_column=arguments.text_column)
    train_rows, held_out_rows, data = load_train_and_eval(arguments, training.eval_strategy != "no", load)
    model, tokenizer, added_tokens = open_base(tuning, training)
    check_arguments(arguments, training, model)
    splits = {"train": train_rows, "eval": held_out_rows}
    tokenized, counts = tokenize_splits(
        splits,
        training,
        lambda rows: tokenize_conversations(rows, tokenizer, training.max_length, training.assistant_only_loss),
    )
    train = training_blocks(tokenized["train"], training)
    pad = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)
    packed = PackedBlockCollator(
        training.max_length, tokenizer.pad_token_id, flatten="flash" in arguments.attn_implementation
    )
    collator = packed if training.packing else pad
    model = with_adapter(
        model, tokenizer, tuning, training, added_tokens, lambda: (pad([row]) for row in tokenized["train"])
    )
    opened = open_tuned_run("sft", model, tokenizer, tuning, training, given, data, counts, ("max_length", "packing"))
    if opened is None:
        return None
    record, checkpoint, peak = opened
    # The rows are ready. TRL's own packing would make one row of a batch, with a mask as large as that.
    training.packing, training.assistant_only_loss = False, False
    training.dataset_kwargs = {"skip_prepare_dataset": True}
    with keep_adapter_dtype(model):
        trainer = SftTrainer(
            model=model,
            args=training,
            train_dataset=train,
            eval_dataset=tokenized.get("eval"),
            data_collator=collator,
            eval_collator=pad,
            processing_class=tokenizer,
            callbacks=[ReplyCallback(record, tokenizer, arguments.sample_prompts)] if tokenizer.chat_template else [],
            record=record,
            unit="tokens",
            flops_per_unit=flops_per_token(model),
            matmul_peak=peak,
        )
    return trainer, checkpoint


def finish(trainer: SftTrainer) -> None:
    """Saves model or adapter into the run folder and writes what came of the run: metrics, an example, the card."""
    evaluate_the_end(trainer)
    save_tuned_model(trainer)
    metrics = final_metrics(trainer.state.log_history, "tokens")
    finish_run(trainer, metrics)


def main() -> None:
    train_from_command_line(prepare, finish)


if __name__ == "__main__":
    main()
