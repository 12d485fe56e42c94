"""Pretrains a LLaMA-style causal language model on text.

    python -m training.pretrain_lm --config training/recipes/llama_style/pretrain_quickstart.yaml
    accelerate launch --config_file training/accelerate_configs/ddp.yaml -m training.pretrain_lm --config ...

Reads a tokenizer folder and a text data set, or the token shards that `training.prepare_text` made of one; writes a
model folder with its `run.json` and card. The same command again goes on from the last checkpoint, or says that the run
is finished. Fields are those of `PretrainArguments` below and of transformers' `TrainingArguments`.
"""

import gzip
import lzma
import math
from dataclasses import dataclass, field
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset, IterableDataset
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, set_seed

from hf_models.llama_style import LlamaStyleConfig, LlamaStyleForCausalLM
from hf_models.llama_style.checkpoints import load_checkpoint
from hf_models.llama_style.sizes import SIZES

from .command_line import parse_arguments
from .language_models import end_of_turn_ids, flops_per_token, load_tokenizer, tokenizer_fingerprint
from .packing import PackedBlockCollator, document_start, pack_documents
from .run_folder_trainer import RunFolderMixin
from .run_record import RunRecord
from .run_setup import (
    RunFolderArguments,
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
from .text_data import TextDataArguments, describe_texts, load_text_dataset
from .token_data import describe_tokens, is_token_data, load_token_dataset

SAMPLE_TOKENS = 64
# A stream is shuffled within a window of so many blocks.
SHUFFLED_BLOCKS = 10_000
# More text than this is not compressed for comparison: xz takes a second for every two megabytes.
COMPRESSED_BYTES = 2**24


@dataclass
class PretrainArguments(TextDataArguments):
    tokenizer: str = field(
        default="runs/quickstart/tokenizer", metadata={"help": "Folder or Hub id of the tokenizer to use."}
    )
    size: str = field(default="6m", metadata={"help": f"Shape of a new model: {', '.join(SIZES)}."})
    config_overrides: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": 'Config fields other than the size\'s, as JSON: {"num_hidden_layers": 4}.'},
    )
    model: str | None = field(
        default=None, metadata={"help": "Folder of a model to train on (ours or transformers' Llama); no new one then."}
    )
    attn_implementation: str = field(
        default="sdpa",
        metadata={"help": "sdpa, flash_attention_2 (GPUs), flex_attention, or eager (short blocks in bf16 on a CPU)."},
    )
    block_size: int = field(default=512, metadata={"help": "Length of a training block, in tokens."})
    eval_dataset: str | None = field(
        default=None,
        metadata={"help": "Text to evaluate on, in a column `text`. By default another split of --dataset."},
    )
    eval_dataset_split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    sample_prompts: list[str] = field(
        default_factory=lambda: ["The river", "In mathematics,"],
        metadata={"help": "Texts that the model continues at each evaluation."},
    )

    def __post_init__(self):
        self.config_overrides = check_config_overrides(self.config_overrides, LlamaStyleConfig, self.model)
        if isinstance(self.sample_prompts, str):
            self.sample_prompts = [self.sample_prompts]
        if not self.sample_prompts:
            raise ValueError("--sample_prompts is empty: give at least one text to continue.")
        if self.size not in SIZES:
            raise ValueError(f"--size {self.size!r} is not known: take one of {', '.join(SIZES)}.")


@dataclass
class OptimizationArguments(RunFolderArguments):
    """The defaults of LLaMA's pretraining (arXiv 2302.13971, section 2.3)."""

    output_dir: str = field(default="runs/pretrain_lm", metadata={"help": "The run folder."})
    learning_rate: float = field(default=3e-4, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine_with_min_lr", metadata={"help": "Or warmup_stable_decay, ..."})
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": 'Options of the schedule, as JSON; {"min_lr_rate": 0.1} for cosine_with_min_lr unless given.'
        },
    )
    weight_decay: float = field(default=0.1, metadata={"help": "Decay of matrices; norms and biases have none."})
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW's second beta."})

    def __post_init__(self):
        super().__post_init__()
        if self.lr_scheduler_type == "cosine_with_min_lr" and self.lr_scheduler_kwargs is None:
            self.lr_scheduler_kwargs = {"min_lr_rate": 0.1}


class PretrainTrainer(RunFolderMixin, Trainer):
    """Counts tokens, decays matrices only, and evaluates in sums over tokens rather than means over batches."""

    def __init__(self, *args, eval_bytes: int | None, **kwargs):
        super().__init__(
            *args, preprocess_logits_for_metrics=token_losses, compute_metrics=self._loss_per_token, **kwargs
        )
        self.eval_bytes = eval_bytes

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

    def units_in_step(self, inputs, num_items_in_batch):
        return num_items_in_batch

    def describe_batch(self, inputs):
        beginning = self.processing_class.decode(inputs["input_ids"][0, :24], skip_special_tokens=True)
        return f"whose first row begins {beginning!r}"

    def _loss_per_token(self, prediction) -> dict[str, float]:
        predicted = prediction.label_ids[:, 1:] != -100
        loss = float(prediction.predictions[predicted].astype("float64").mean())
        metrics = {"loss_per_token": loss, "perplexity": math.exp(min(loss, 700.0))}
        if self.eval_bytes:
            metrics["bits_per_byte"] = loss * int(predicted.sum()) / math.log(2) / self.eval_bytes
        return metrics

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        # Trainer's own loss is a mean over batches of means, whose weight depends on how full each batch is.
        output.metrics[f"{metric_key_prefix}_loss"] = output.metrics.pop(f"{metric_key_prefix}_loss_per_token")
        return output


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`logits (batch, length, vocab)`, `labels (batch, length)` -> `(batch, length - 1)`, nats; 0 where no label is."""
    return nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none")


class SampleCallback(TrainerCallback):
    """Continues the prompts at each evaluation, always from the same random numbers."""

    def __init__(self, record: RunRecord, tokenizer: PreTrainedTokenizerBase, prompts: list[str]):
        self.record, self.tokenizer, self.prompts = record, tokenizer, prompts

    def on_evaluate(self, args, state, control, model, **kwargs):
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(args.seed)
            texts = [continue_text(model, self.tokenizer, p, do_sample=True, temperature=0.8) for p in self.prompts]
        if not state.is_world_process_zero:
            return
        new = [{"step": state.global_step, "prompt": p, "text": t} for p, t in zip(self.prompts, texts, strict=True)]
        kept = [sample for sample in self.record.content["samples"] if sample["step"] < state.global_step]
        self.record.save(samples=kept + new)
        for text in texts:
            print(f"  | {text!r}")


def continue_text(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: str, **options) -> str:
    """The prompt, as the beginning of a document, and up to 64 more tokens."""
    prompt_ids = [document_start(tokenizer), *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    was_training = model.training
    model.eval()
    ids = model.generate(torch.tensor([prompt_ids], device=model.device), max_new_tokens=SAMPLE_TOKENS, **options)
    model.train(was_training)
    return tokenizer.decode(ids[0], skip_special_tokens=True)


def build_model(arguments: PretrainArguments, tokenizer: PreTrainedTokenizerBase) -> LlamaStyleForCausalLM:
    """A new model of the asked size and the tokenizer's vocabulary, or the one in the folder `arguments.model`."""
    if arguments.model is not None:
        # Autocast computes in bfloat16 where it is told to; weights that an optimizer updates are float32.
        model = load_checkpoint(arguments.model).float()
        model.set_attn_implementation(arguments.attn_implementation)
        if model.config.vocab_size < len(tokenizer):
            raise ValueError(
                f"{arguments.model} has {model.config.vocab_size} token embeddings and {arguments.tokenizer} has "
                f"{len(tokenizer)} tokens: give the model's own tokenizer."
            )
        return model
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    shape = SIZES[arguments.size].config | {"vocab_size": len(tokenizer)} | special
    try:
        config = LlamaStyleConfig(**shape | (arguments.config_overrides or {}))
    except StrictDataclassError as error:
        raise ValueError(f"--config_overrides: {error}") from error
    return LlamaStyleForCausalLM._from_config(config, attn_implementation=arguments.attn_implementation)


def check_arguments(arguments: PretrainArguments, training: OptimizationArguments, model, tokenizer) -> None:
    """What can be told wrong before any text is read."""
    check_training(training, "training.pretrain_lm")
    context = model.config.max_position_embeddings
    if not 2 <= arguments.block_size <= context:
        raise ValueError(
            f"--block_size {arguments.block_size} does not fit the model's context of {context} tokens "
            "(max_position_embeddings): give 2 or more and at most that."
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"The tokenizer {arguments.tokenizer} has no eos token, which ends a document: add one.")
    if arguments.streaming and training.max_steps <= 0:
        raise ValueError("A stream has no known length: give --max_steps.")


def load_texts(
    arguments: PretrainArguments, evaluates: bool, tokenizer: dict[str, str]
) -> tuple[Dataset | IterableDataset, Dataset | None, dict[str, Any]]:
    """Training and held-out documents, and the description of both for `run.json`.

    Args:
        tokenizer: its `path` and `fingerprint`.
    """
    options = {"text_column": arguments.text_column, "config": arguments.dataset_config}
    if is_token_data(arguments.dataset):
        if evaluates and arguments.eval_dataset is None:
            raise ValueError(
                f"{arguments.dataset} holds tokens to train on only: name text to evaluate on with --eval_dataset, or "
                "give --eval_strategy no."
            )
        train = load_token_dataset(
            arguments.dataset, arguments.dataset_split, *tokenizer.values(), streaming=arguments.streaming
        )
        data = {"train": describe_tokens(arguments.dataset, arguments.streaming)}
    else:
        train = load_text_dataset(arguments.dataset, arguments.dataset_split, streaming=arguments.streaming, **options)
        data = {"train": describe_texts(train, arguments.dataset, arguments.dataset_split)}
    if data["train"].get("bytes") == 0:
        raise ValueError(f"Every document of {arguments.dataset} ({arguments.dataset_split}) is empty: give some text.")
    if not evaluates:
        return train, None, data
    name, split = arguments.eval_dataset or arguments.dataset, arguments.eval_dataset_split
    held_out = load_text_dataset(name, split, **(options if arguments.eval_dataset is None else {}))
    data["eval"] = describe_texts(held_out, name, split)
    if data["eval"]["bytes"] == 0:
        raise ValueError(f"Every document of {name} ({split}) is empty: name another --eval_dataset_split.")
    return train, held_out, data


def training_blocks(
    texts: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    training: OptimizationArguments,
) -> Dataset | IterableDataset:
    """Packed blocks in whole batches: a table, or an endless shuffled stream."""
    blocks = pack_documents(texts, tokenizer, block_size)
    if isinstance(blocks, IterableDataset):
        # Each process reads for itself, its own shards where there are enough; by default the first reads for all.
        training.accelerator_config.dispatch_batches = False
        # Repeated within one epoch: of a stream's later epochs Trainer could not find the place where it stopped.
        return blocks.repeat(None).shuffle(seed=training.seed, buffer_size=SHUFFLED_BLOCKS)
    batch = examples_per_step(training)
    if len(blocks) < batch:
        raise ValueError(
            f"The text fills {len(blocks)} blocks and a batch takes {batch}: give more text or a smaller batch."
        )
    # However a batch is made up of processes and accumulation, an uneven end would be filled up with repeated rows, or
    # be a smaller step.
    return blocks.select(range(len(blocks) - len(blocks) % batch))


def compressed_bits_per_byte(texts: Dataset) -> dict[str, float]:
    """What general compressors make of the held-out text: the yardstick beside the model's bits per byte."""
    joined = "\n\n".join(texts["text"]).encode()
    if len(joined) > COMPRESSED_BYTES:
        return {}
    compressed = {"gzip": gzip.compress(joined, 9), "xz": lzma.compress(joined, preset=9)}
    return {f"{name}_bits_per_byte": round(8 * len(packed) / len(joined), 4) for name, packed in compressed.items()}


def describe_blocks(arguments: PretrainArguments, training: OptimizationArguments, train) -> dict[str, Any]:
    description = {
        "block_size": arguments.block_size,
        "tokens_per_step": examples_per_step(training) * arguments.block_size,
    }
    if isinstance(train, Dataset):
        tokens = sum(pc.sum(chunk).as_py() for chunk in pc.list_flatten(train.data["seq_lengths"]).chunks)
        description |= {"blocks": len(train), "block_fill": round(tokens / (len(train) * arguments.block_size), 4)}
    return description


def prepare() -> tuple[PretrainTrainer, str | None] | None:
    """Everything up to the first step: reads and checks what the user gave, opens the run folder, packs the text.

    Returns the trainer and the checkpoint to go on from; None where the folder holds this run, finished.
    """
    arguments, training, given = parse_arguments(PretrainArguments, OptimizationArguments, description=__doc__)
    set_seed(training.seed)

    tokenizer = load_tokenizer(arguments.tokenizer)
    model = build_model(arguments, tokenizer)
    check_arguments(arguments, training, model, tokenizer)
    tokenizer_entry = {"path": arguments.tokenizer, "fingerprint": tokenizer_fingerprint(tokenizer)}
    train_texts, held_out_texts, data = load_texts(
        arguments, evaluates=training.eval_strategy != "no", tokenizer=tokenizer_entry
    )
    data["tokenizer"] = tokenizer_entry
    if arguments.model is not None:
        data["model"] = {"path": arguments.model, "fingerprint": weights_fingerprint(model)}

    # Opened before the work of tokenising, so that a folder in use is refused at once.
    opened = open_run(training, "pretrain_lm", given, data, model)
    if opened is None:
        return None
    record, checkpoint, peak = opened
    with training.main_process_first(desc="tokenising"):
        train = training_blocks(train_texts, tokenizer, arguments.block_size, training)
        held_out = held_out_texts and pack_documents(held_out_texts, tokenizer, arguments.block_size)
    record.save(
        model={
            "parameters": model.num_parameters(),
            "non_embedding_parameters": model.num_parameters(exclude_embeddings=True),
            "config": model.config.to_dict(),
        },
        tokenizer={"path": arguments.tokenizer, "vocab_size": len(tokenizer)},
        training=describe_training(training, peak) | describe_blocks(arguments, training, train),
        yardsticks=compressed_bits_per_byte(held_out_texts) if held_out_texts else {},
    )
    trainer = PretrainTrainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=PackedBlockCollator(
            arguments.block_size,
            tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            flatten="flash" in arguments.attn_implementation,
        ),
        processing_class=tokenizer,
        callbacks=[SampleCallback(record, tokenizer, arguments.sample_prompts)],
        record=record,
        unit="tokens",
        flops_per_unit=flops_per_token(model),
        matmul_peak=peak,
        eval_bytes=data.get("eval", {}).get("bytes"),
    )
    return trainer, checkpoint


def finish(trainer: PretrainTrainer) -> None:
    """Saves the model into the run folder and writes what came of the run: metrics, an example, the card."""
    evaluate_the_end(trainer)
    trainer.model.config.use_cache = True  # Trainer switches it off, and the published model is there to generate
    # An adapter trained on this model has only this model's word for where a reply ends.
    trainer.model.generation_config.eos_token_id = end_of_turn_ids(trainer.processing_class)
    save_whole_model(trainer)
    recorded = trainer.record.content
    metrics = final_metrics(trainer.state.log_history, "tokens") | recorded["yardsticks"]
    prompt = recorded["arguments"].get("sample_prompts", PretrainArguments().sample_prompts)[0]
    text = continue_text(trainer.model, trainer.processing_class, prompt, do_sample=False)
    finish_run(trainer, metrics, example={"prompt": prompt, "text": text})


def main() -> None:
    train_from_command_line(prepare, finish)


if __name__ == "__main__":
    main()
