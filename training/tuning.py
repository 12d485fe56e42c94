"""What fine-tuning's scripts (SFT, DPO, reward) share: a base that is tuned whole, by an adapter, or in 4 bits."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from accelerate.utils import str_to_bool
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, set_seed
from transformers import PreTrainedTokenizerBase as Tokenizer
from trl import clone_chat_template

from .adapters import AdapterArguments, add_adapter, keep_initial_adapter, save_adapter
from .base_model import base_entry, base_run_section, read_run
from .command_line import parse_arguments
from .language_models import (
    LanguageModelArguments,
    chat_marks,
    end_of_turn_ids,
    load_config,
    load_language_model,
    load_tokenizer,
    stored_fingerprint,
)
from .matmul_peak import choose_precision
from .memory_estimate import DryRunArguments, TrainingShape, print_dry_run
from .quantization import (
    QuantizationArguments,
    check_quantizable,
    prepare_quantized,
    quantization_config,
    settle_optimizer,
)
from .run_setup import (
    OpenedRun,
    RunFolderArguments,
    check_training,
    describe_training,
    examples_per_step,
    open_run,
    save_whole_model,
)

# Fields of TRL's and transformers' that these scripts settle otherwise.
NOT_HONOURED = {
    "model_init_kwargs": "--dtype and --attn_implementation say how the model is opened",
    "resume_from_checkpoint": "the same command again goes on from its last checkpoint",
    "do_train": "the command trains, and evaluates by --eval_strategy",
    "do_eval": "--eval_strategy says when to evaluate",
    "do_predict": "`python -m training.evaluate` does so afterwards",
    "batch_eval_metrics": "held-out figures are of all batches together",
    "eval_do_concat_batches": "held-out figures are of all batches together",
    "dataset_text_field": "give --text_column",
    "dataset_kwargs": "the data are prepared here",
    "dataset_num_proc": "the data are prepared here",
    "shuffle_dataset": "rows are shuffled at every epoch",
    "padding_free": "pairs are padded, and SFT's --packing does without padding",
    "packing_strategy": "whole conversations are packed best-fit",
    "eval_packing": "held-out conversations are not packed",
    "truncation_mode": "what is too long is cut at its end",
    "completion_only_loss": "of prompt and completion, the loss is always taken on the completion",
    "eos_token": "the tokenizer says where a text ends",
    "pad_token": "the tokenizer says what padding is",
}


@dataclass
class TuningTrainingArguments(RunFolderArguments):
    """To put before TRL's config of a trainer. A class that derives from both gives the two learning rates."""

    full_learning_rate: ClassVar[float]
    adapter_learning_rate: ClassVar[float]

    learning_rate: float | None = field(default=None, metadata={"help": "Peak learning rate."})
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Compute activations twice rather than keep them: less memory, slower."}
    )
    bf16: bool | None = field(default=False, metadata={"help": "Chosen by --precision."})


# Of a config, what says how it was opened rather than what it describes.
NO_SHAPE = ("_name_or_path", "quantization_config", "dtype")


class Tuning(NamedTuple):
    """What the command line says of the model that is tuned."""

    model: LanguageModelArguments
    adapter: AdapterArguments
    quantization: QuantizationArguments
    dry_run: DryRunArguments


def parse_tuning(
    arguments_type: type[LanguageModelArguments], training_type: type, description: str
) -> tuple[Tuning, Any, dict[str, Any]]:
    """What the command line asks for: the model's side, the trainer's side, and the fields that were given."""
    *model_side, training, given = parse_arguments(
        arguments_type, AdapterArguments, QuantizationArguments, DryRunArguments, training_type, description=description
    )
    set_seed(training.seed)
    return Tuning(*model_side), training, given


def check_tuning(
    tuning: Tuning, training: TuningTrainingArguments, given: dict[str, Any], module: str
) -> PreTrainedConfig:
    """Raises ValueError for what can be told wrong before anything is read, and fills in what follows from the rest.

    Returns the config of the model.
    """
    if training.learning_rate is None:
        training.learning_rate = (
            training.adapter_learning_rate if tuning.adapter.use_peft else training.full_learning_rate
        )
    check_training(training, module)
    for name in given.keys() & NOT_HONOURED.keys():
        raise ValueError(f"--{name} has no effect here: {NOT_HONOURED[name]}.")
    for settings, switch in ((tuning.adapter, "use_peft"), (tuning.quantization, "load_in_4bit")):
        unused = [field.name for field in fields(settings) if field.name in given]
        if unused and not getattr(settings, switch):
            raise ValueError(f"--{unused[0]} has no effect without --{switch} true: give that too, or leave it off.")
    if tuning.quantization.load_in_4bit and not tuning.adapter.use_peft:
        raise ValueError("Weights of 4 bits cannot be trained: give --use_peft true with --load_in_4bit true.")
    config = load_config(tuning.model.model, training.trust_remote_code)
    if hasattr(training, "max_length"):
        _settle_length(config, training, given)
    template = getattr(training, "chat_template_path", None) or ""
    if template.endswith((".jinja", ".j2")) and not Path(template).is_file():
        raise FileNotFoundError(f"--chat_template_path {template} is not there: name an existing file.")
    check_quantizable(config, tuning.quantization, training.trust_remote_code)
    note = settle_optimizer(training, tuning.quantization, given)
    if note and training.process_index == 0:
        print(note)
    return config


def _settle_length(config: PreTrainedConfig, training: TuningTrainingArguments, given: dict[str, Any]) -> None:
    context = getattr(config, "max_position_embeddings", None)
    if "max_length" not in given and context:
        training.max_length = min(training.max_length, context)
    if training.max_length < 2 or (context and training.max_length > context):
        raise ValueError(
            f"--max_length {training.max_length} does not fit the model's context of {context} tokens "
            "(max_position_embeddings): give 2 or more and at most that."
        )


def predict_memory(
    config: PreTrainedConfig,
    tuning: Tuning,
    training: TuningTrainingArguments,
    auto_class: type = AutoModelForCausalLM,
    sequences_per_example: int = 1,
    reference_copy: bool = False,
    length: int | None = None,
) -> None:
    """`--dry_run`: prints what a step of this run would hold, without loading anything.

    Args:
        length: tokens of a sequence; by default `training.max_length`.
        sequences_per_example: 2 for pairs of a chosen and a rejected answer.
        reference_copy: whether the run holds a second, frozen model.
    """
    if config.pad_token_id is None:
        config.pad_token_id = config.eos_token_id or 0  # as `open_base` does; a classifier cannot do without
    precision = choose_precision(training.device) if training.precision == "auto" else training.precision
    shape = TrainingShape(
        batch_size=training.per_device_train_batch_size,
        length=training.max_length if length is None else length,
        dtype=_dtype_in_memory(tuning, config),
        bf16=precision == "bf16",
        gradient_checkpointing=training.gradient_checkpointing,
        adapter=tuning.adapter,
        quantization=tuning.quantization,
        optimizer=str(getattr(training.optim, "value", training.optim)),
        accumulates=training.gradient_accumulation_steps > 1,
        sequences_per_example=sequences_per_example,
        reference_copy=reference_copy,
        processes=training.world_size,
        device_type=training.device.type,
    )
    print_dry_run(
        config,
        shape,
        device_memory_gib=tuning.dry_run.device_memory_gib,
        auto_class=auto_class,
        # Flash attention keeps as much as sdpa does, and need not be installed where the run is planned.
        attn_implementation="sdpa" if "flash" in tuning.model.attn_implementation else tuning.model.attn_implementation,
        trust_remote_code=training.trust_remote_code,
    )


def _dtype_in_memory(tuning: Tuning, config: PreTrainedConfig) -> torch.dtype:
    """float32 where weights are trained; where only an adapter is, the dtype of the files."""
    if tuning.model.dtype is not None:
        return getattr(torch, tuning.model.dtype)
    stored = (config.dtype or torch.float32) if tuning.adapter.use_peft else torch.float32
    # Layers of 4 bits give float16 back as float16, which autocast to bfloat16 refuses to join.
    return torch.bfloat16 if tuning.quantization.load_in_4bit and stored == torch.float16 else stored


def open_base(
    tuning: Tuning, training: TuningTrainingArguments, auto_class: type = AutoModelForCausalLM, **config_fields: Any
) -> tuple[PreTrainedModel, Tokenizer, list[int]]:
    """The model, its tokenizer, and the ids of the tokens that a chat template from elsewhere brought with it."""
    arguments = tuning.model
    tokenizer = load_tokenizer(arguments.model, training.trust_remote_code)
    config = load_config(arguments.model, training.trust_remote_code)
    model = load_language_model(
        arguments.model,
        auto_class=auto_class,
        dtype=_dtype_in_memory(tuning, config),
        attn_implementation=arguments.attn_implementation,
        quantization_config=quantization_config(tuning.quantization),
        trust_remote_code=training.trust_remote_code,
        **config_fields,
    )
    if tuning.quantization.load_in_4bit:
        prepare_quantized(model)
    added = []
    template = getattr(training, "chat_template_path", None)
    if template is not None and template.endswith((".jinja", ".j2")):
        with open(template, encoding="utf-8") as file:
            tokenizer.chat_template = file.read()
    elif template is not None:
        model, tokenizer, added = clone_chat_template(model, tokenizer, template)
    if template is not None:
        # TRL's trainers would do it again: to an adapted model, and with the template's eos as the only end of replies.
        training.chat_template_path = None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    if model.can_generate():
        ends = model.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        model.generation_config.eos_token_id = sorted(ends | set(end_of_turn_ids(tokenizer)))
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer, added


def with_adapter(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    tuning: Tuning,
    training: TuningTrainingArguments,
    added_tokens: list[int],
    batches: Callable[[], Iterable[dict]],
) -> PreTrainedModel | PeftModel:
    """`model` itself, or with an adapter around it. `batches` are of training rows, for an initialisation that looks at
    activations.

    To a base that was pretrained by us the marks of a chat are as new as tokens added now: it has never read them.
    """
    if not tuning.adapter.use_peft:
        return model
    base_run = read_run(tuning.model.model) or {}
    unread = chat_marks(tokenizer) if base_run.get("task") == "pretrain_lm" and tokenizer.chat_template else []
    sharded = (
        training.deepspeed_plugin is not None or training.fsdp or str_to_bool(os.getenv("ACCELERATE_USE_FSDP", "no"))
    )
    return add_adapter(
        model,
        tuning.adapter,
        task_type="CAUSAL_LM" if model.can_generate() else "SEQ_CLS",
        base=tuning.model.model,
        added_tokens=bool(added_tokens or (unread and sharded)),
        new_tokens=[] if added_tokens or sharded else unread,
        batches=batches,
        output_dir=training.output_dir,
    )


def tokenize_splits(
    splits: dict[str, Dataset | None], training: TuningTrainingArguments, tokenize: Callable[[Dataset], tuple]
) -> tuple[dict[str, Dataset], dict[str, dict[str, int]]]:
    """Rows for the trainer, and counts of what became of them, of each split that there is."""
    with training.main_process_first(desc="tokenising"):
        done = {name: tokenize(rows) for name, rows in splits.items() if rows is not None}
    return {name: rows for name, (rows, _) in done.items()}, {name: counts for name, (_, counts) in done.items()}


def open_tuned_run(
    task: str,
    model: PreTrainedModel | PeftModel,
    tokenizer: Tokenizer,
    tuning: Tuning,
    training: TuningTrainingArguments,
    given: dict[str, Any],
    data: dict[str, Any],
    counts: dict[str, dict[str, int]],
    settings: tuple[str, ...],
) -> OpenedRun | None:
    """`open_run`, and what a record says of a tuned model from the beginning.

    Args:
        settings: the fields of `training` that are recorded beside those of every run.
    """
    opened = open_run(
        training,
        task,
        given,
        data | {"model": base_entry(tuning.model.model, stored_fingerprint(tuning.model.model))},
        model,
    )
    if opened is None:
        return None
    opened.record.save(
        **_describe_tuned_model(model, tuning, training),
        **base_run_section(tuning.model.model),
        training=describe_training(training, opened.peak)
        | {name: getattr(training, name) for name in settings}
        | {"examples_per_step": examples_per_step(training)},
        tokenizer={"path": tuning.model.model, "vocab_size": len(tokenizer)},
        counts=counts,
    )
    if training.process_index == 0:
        keep_initial_adapter(model, training.output_dir)
    return opened


def _describe_tuned_model(model: PreTrainedModel | PeftModel, tuning: Tuning, training) -> dict[str, Any]:
    """Sections of `run.json` on the model, its adapter and its quantisation."""
    adapted = isinstance(model, PeftModel)
    base = model.get_base_model() if adapted else model
    trainable, parameters = model.get_nb_trainable_parameters() if adapted else (base.num_parameters(),) * 2
    config = {name: value for name, value in base.config.to_dict().items() if name not in NO_SHAPE}
    sections: dict[str, Any] = {
        "model": {
            "parameters": parameters - trainable if adapted else parameters,
            "trainable_parameters": trainable,
            "config": config,
        }
    }
    if adapted:
        settings = model.peft_config["default"]
        sections["adapter"] = {
            "r": settings.r,
            "lora_alpha": settings.lora_alpha,
            "lora_dropout": settings.lora_dropout,
            "target_modules": sorted({name.rsplit(".", 1)[-1] for name in settings.target_modules}),
            "token_rows": len(next(iter((settings.trainable_token_indices or {"": []}).values()))),
            "modules_to_save": sorted(_last_names(base) & set(settings.modules_to_save or ())),
            "use_rslora": settings.use_rslora,
            "use_dora": settings.use_dora,
            "init": tuning.adapter.lora_init,
        }
    if tuning.quantization.load_in_4bit:
        sections["quantization"] = {
            "bits": 4,
            "type": tuning.quantization.bnb_4bit_quant_type,
            "double_quantization": tuning.quantization.bnb_4bit_use_double_quant,
            "compute_dtype": "bfloat16",
            "optimizer": training.optim,
        }
    return sections


def _last_names(model: PreTrainedModel) -> set[str]:
    return {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}


def save_tuned_model(trainer) -> None:
    """Writes the model, or the adapter, into the run folder, and where its replies end."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(model, PeftModel):
        save_adapter(trainer, trainer.args.output_dir)
        if trainer.args.should_save and model.get_base_model().can_generate():
            model.get_base_model().generation_config.save_pretrained(trainer.args.output_dir)
    else:
        model.config.use_cache = True  # Trainer switches it off, and the published model is there to generate
        save_whole_model(trainer)
