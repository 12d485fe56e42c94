"""Evaluates a language model: tasks of lm-evaluation-harness, bits per byte of a text, questions with known answers.

    python -m training.evaluate --model runs/quickstart/language_model --text wikipedia_leads
    python -m training.evaluate --model runs/sft --tasks wikipedia_leads_title arc_easy --apply_chat_template true
    python -m training.evaluate --model runs/sft --exact_match questions.jsonl

The model is a run folder, an adapter's folder, a transformers folder or a Hub id. What comes out goes into the
`run.json` of a run folder and into its card, and the replies to questions into its `evaluations/`; nothing else in the
folder changes. Else it is printed, and written where --output says. The same evaluation again replaces the former one.

Bits per byte are those of pretraining: each document is `bos, tokens, eos`, in pieces of --block_size that overlap
by one token, and what the model would need to code all of it is divided by its bytes of UTF-8.
"""

import json
import math
import os
import re
import statistics
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from hub_cards.build_card import TEMPLATES, build_card

from .adapters import open_writer
from .base_model import read_run
from .command_line import parse_arguments, plain_errors
from .dataset_source import local_path
from .exact_match import generate_replies, given_answer, is_right, load_questions, prompt_ids
from .harness_tasks import evaluate_tasks, load_tasks, our_tasks
from .language_models import DTYPES
from .packing import PackedBlockCollator, document_pieces
from .pretrain_lm import token_losses
from .quantization import QuantizationArguments, quantization_config
from .run_record import FILE_NAME, portable, replace_file
from .text_data import SUFFIXES, describe_texts, load_text_dataset

# Pieces of a text where nothing says how long those were that the model was trained on.
BLOCK_SIZE = 1024


@dataclass
class EvaluationArguments:
    model: str = field(
        metadata={"help": "The model: a run folder, an adapter's folder, a transformers folder or a Hub id."}
    )
    base: str | None = field(
        default=None, metadata={"help": "Where the base of an adapter lies, if not where the adapter says."}
    )
    tasks: list[str] | None = field(
        default=None,
        metadata={
            "help": f"Tasks: of ours {', '.join(our_tasks())}; any of lm-evaluation-harness, with data from the "
            "Hub; or a task's YAML file."
        },
    )
    num_fewshot: int | None = field(
        default=None, metadata={"help": "Solved examples before each question of the tasks; by default the task's."}
    )
    text: str | None = field(
        default=None, metadata={"help": "Text to predict: a sample's name, a local file or folder, or a Hub id."}
    )
    text_split: str | None = field(
        default=None, metadata={"help": "Its split; by default test, or train of a single file, which has no other."}
    )
    text_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set with several."})
    text_column: str = field(default="text", metadata={"help": "Column that holds the documents."})
    block_size: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of a piece of text, the most context that a token gets; by default as many as the run was "
            f"trained on, else {BLOCK_SIZE} or the model's context."
        },
    )
    exact_match: str | None = field(
        default=None,
        metadata={
            "help": "Questions with known answers: rows `prompt` (text or messages) and `answer` of a sample, a local "
            "file (jsonl, json, parquet) or folder, or a Hub id."
        },
    )
    exact_match_split: str | None = field(
        default=None, metadata={"help": "Its split; by default test, or train of a single file, which has no other."}
    )
    max_new_tokens: int = field(default=256, metadata={"help": "Longest reply to a question, in tokens."})
    apply_chat_template: bool = field(
        default=False,
        metadata={"help": "Put the questions of tasks, and prompts that are text, into the chat template."},
    )
    limit: int | None = field(
        default=None, metadata={"help": "Of each task, text and question set only the first so many examples."}
    )
    batch_size: int = field(default=8, metadata={"help": "Sequences that go through the model at once."})
    dtype: str | None = field(
        default=None, metadata={"help": f"Of the weights in memory: {', '.join(DTYPES)}; by default as stored."}
    )
    device: str | None = field(
        default=None,
        metadata={"help": "Device to compute on, such as cpu or cuda:1; by default a GPU if there is one."},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the code that a model folder other than ours brings."}
    )
    output: str | None = field(default=None, metadata={"help": "JSON file to write the results into as well."})

    def __post_init__(self):
        if self.tasks is None and self.text is None and self.exact_match is None:
            raise ValueError("There is nothing to evaluate: give --tasks, --text or --exact_match.")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"--dtype is {self.dtype!r}: take one of {', '.join(DTYPES)}.")
        for name in ("limit", "batch_size", "block_size", "max_new_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}: give 1 or more.")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ValueError(f"--num_fewshot is {self.num_fewshot}: give 0 or more.")


@dataclass
class Inputs:
    """What to evaluate on, read and checked; None for what was not asked for."""

    tasks: dict[str, list[Any]] | None = None
    texts: Dataset | None = None
    text_data: dict[str, Any] = field(default_factory=dict)
    block_size: int = 0
    questions: list[dict[str, Any]] | None = None
    question_data: dict[str, Any] = field(default_factory=dict)
    prompts: list[list[int]] = field(default_factory=list)


def read_inputs(arguments: EvaluationArguments) -> Inputs:
    if arguments.output is not None and not Path(arguments.output).absolute().parent.is_dir():
        raise FileNotFoundError(f"--output {arguments.output} lies in no existing folder: make it, or name another.")
    inputs = Inputs()
    if arguments.text is not None:
        inputs.texts, inputs.text_data = load_texts(arguments)
    if arguments.exact_match is not None:
        inputs.questions, inputs.question_data = load_questions(
            arguments.exact_match, arguments.exact_match_split, arguments.limit
        )
    if arguments.tasks is not None:
        inputs.tasks = load_tasks(arguments.tasks)
    return inputs


def load_texts(arguments: EvaluationArguments) -> tuple[Dataset, dict[str, Any]]:
    local = local_path(arguments.text, "text", SUFFIXES)
    split = arguments.text_split or ("train" if local is not None and local.is_file() else "test")
    texts = load_text_dataset(arguments.text, split, arguments.text_column, arguments.text_config)
    texts = texts.select(range(min(len(texts), arguments.limit or len(texts))))
    data = describe_texts(texts, arguments.text, split)
    if data["bytes"] == 0:
        raise ValueError(f"Every document of {arguments.text} ({split}) is empty: give some text.")
    return texts, data


def fit_to_model(
    inputs: Inputs,
    arguments: EvaluationArguments,
    run: dict[str, Any],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Settles what depends on the model and its `run`; raises ValueError for what it cannot be asked."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if arguments.apply_chat_template and not tokenizer.chat_template:
        raise ValueError(f"The tokenizer of {arguments.model} has no chat template: leave --apply_chat_template off.")
    if inputs.texts is not None:
        if tokenizer.eos_token_id is None:
            raise ValueError(f"The tokenizer of {arguments.model} has no eos token, which ends a document: add one.")
        trained = run.get("training", {})
        inputs.block_size = arguments.block_size or trained.get("block_size") or trained.get("max_length")
        inputs.block_size = inputs.block_size or min(BLOCK_SIZE, context or BLOCK_SIZE)
        if not 2 <= inputs.block_size <= (context or inputs.block_size):
            raise ValueError(
                f"--block_size {inputs.block_size} does not fit the model's context of {context} tokens: give 2 or "
                "more and at most that."
            )
    if inputs.questions is not None:
        inputs.prompts = prompt_ids(inputs.questions, tokenizer, arguments.apply_chat_template)
        for number, ids in enumerate(inputs.prompts, start=1):
            if context is not None and len(ids) + arguments.max_new_tokens > context:
                raise ValueError(
                    f"Question {number} of {arguments.exact_match} has {len(ids)} tokens, and with a reply of "
                    f"{arguments.max_new_tokens} exceeds the model's context of {context}: give a smaller "
                    "--max_new_tokens, or leave the question out."
                )


def evaluate(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, arguments: EvaluationArguments, inputs: Inputs
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The results, and the replies to the questions.

    A result has `name`, `kind` (text, exact_match or lm_eval), `metrics` (of each its value and standard error), `n`
    (documents or questions), `settings` and `data`; one of multiple choice also the accuracy of `chance`.
    """
    results, replies = [], []
    if inputs.texts is not None:
        loss, tokens = summed_loss(model, tokenizer, inputs.texts, inputs.block_size, arguments.batch_size)
        metrics = {
            "bits_per_byte": loss / math.log(2) / inputs.text_data["bytes"],
            "perplexity": math.exp(min(loss / tokens, 700.0)),
            "loss": loss / tokens,
        }
        results.append(
            {
                "name": _name(inputs.text_data),
                "kind": "text",
                "metrics": {name: {"value": value, "stderr": None} for name, value in metrics.items()},
                "n": len(inputs.texts),
                "settings": {"block_size": inputs.block_size},
                "data": inputs.text_data,
            }
        )
    if inputs.questions is not None:
        replies = answer(model, tokenizer, inputs, arguments)
        results.append(
            {
                "name": _name(inputs.question_data),
                "kind": "exact_match",
                "metrics": {
                    "exact_match": _mean([reply["right"] for reply in replies]),
                    "ended": _mean([reply["ended"] for reply in replies]),
                },
                "n": len(replies),
                "settings": {
                    "max_new_tokens": arguments.max_new_tokens,
                    "apply_chat_template": arguments.apply_chat_template,
                },
                "data": inputs.question_data,
            }
        )
    if inputs.tasks is not None:
        measured = evaluate_tasks(
            model,
            tokenizer,
            inputs.tasks,
            batch_size=arguments.batch_size,
            num_fewshot=arguments.num_fewshot,
            limit=arguments.limit,
            apply_chat_template=arguments.apply_chat_template,
        )
        results += [{"kind": "lm_eval"} | result for result in measured]
    return results, replies


@torch.no_grad()
def summed_loss(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Dataset, block_size: int, batch_size: int
) -> tuple[float, int]:
    """The documents' cross-entropy in nats, summed over their tokens, and the number of those.

    Every piece is a row of its own, padded on the right: no causal model needs a mask then, nor anything that tells
    packed pieces apart, which not every architecture can.
    """
    pieces = sorted(document_pieces({"text": texts["text"][:]}, tokenizer, block_size)["input_ids"], key=len)[::-1]
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    loss, tokens = 0.0, 0
    for first in range(0, len(pieces), batch_size):
        rows = [{"input_ids": ids, "seq_lengths": [len(ids)]} for ids in pieces[first : first + batch_size]]
        batch = PackedBlockCollator(len(rows[0]["input_ids"]), padding)(rows)
        labels = batch["labels"].to(model.device)
        logits = model(input_ids=batch["input_ids"].to(model.device), use_cache=False).logits
        loss += token_losses(logits, labels).double().sum().item()
        tokens += int((labels[:, 1:] != -100).sum())
    return loss, tokens


def answer(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, inputs: Inputs, arguments: EvaluationArguments
) -> list[dict[str, Any]]:
    """Of each question the `reply`, what in it was `given` as the answer, and whether that is `right`."""
    replies = generate_replies(model, tokenizer, inputs.prompts, arguments.max_new_tokens, arguments.batch_size)
    rows = []
    for question, [reply] in zip(inputs.questions, replies, strict=True):
        given = given_answer(reply["text"], question["answer"])
        right = is_right(given, question["answer"])
        rows.append(question | {"reply": reply["text"], "ended": reply["ended"], "given": given, "right": right})
    return rows


def _mean(values: list[bool]) -> dict[str, float | None]:
    """Mean and its standard error, that of a sample, as the harness has it."""
    error = statistics.stdev(map(float, values)) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"value": sum(values) / len(values), "stderr": error}


def _name(data: dict[str, Any]) -> str:
    return f"{Path(data['dataset']).stem if Path(data['dataset']).exists() else data['dataset']} ({data['split']})"


def describe(result: dict[str, Any], arguments: EvaluationArguments, model: nn.Module) -> dict[str, Any]:
    """`result` as `run.json` holds it: with what it was computed in, and when."""
    settings = result["settings"] | {"dtype": str(model.dtype).removeprefix("torch."), "device": model.device.type}
    if getattr(model, "is_loaded_in_4bit", False):
        settings["load_in_4bit"] = True
    if arguments.limit is not None and result["n"] >= arguments.limit:
        settings["limit"] = arguments.limit
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return portable(result | {"settings": settings, "date": date})


def record(folder: Path, results: list[dict[str, Any]], replies: list[dict[str, Any]]) -> None:
    """Writes the results into the folder's `run.json`, in place of those of the same name, and builds its card anew."""
    run = read_run(str(folder))
    kept = {(result["kind"], result["name"]): result for result in run.get("evaluations", [])}
    run["evaluations"] = list((kept | {(result["kind"], result["name"]): result for result in results}).values())
    for result in results:
        if result["kind"] == "exact_match":
            lines = "".join(json.dumps(reply, ensure_ascii=False) + "\n" for reply in replies)
            (folder / "evaluations").mkdir(exist_ok=True)
            file = re.sub(r"[^\w.-]+", "_", result["name"]).strip("_")
            replace_file(folder / "evaluations" / f"{file}.jsonl", lines)
    replace_file(folder / FILE_NAME, json.dumps(run, indent=2, ensure_ascii=False) + "\n")
    if (TEMPLATES / f"{run.get('task')}.md.jinja").is_file():
        build_card(folder)


def print_table(results: list[dict[str, Any]]) -> None:
    lines = [("evaluation", "metric", "value", "chance", "n")]
    for result in results:
        for metric, measured in result["metrics"].items():
            error = "" if measured["stderr"] is None else f" ± {measured['stderr']:.4f}"
            of_accuracy = metric.startswith("acc") and result.get("chance") is not None
            chance = f"{result['chance']:.4f}" if of_accuracy else ""
            lines.append((result["name"], metric, f"{measured['value']:.4f}{error}", chance, f"{result['n']:,}"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def main() -> None:
    # One process evaluates: where `accelerate launch` starts several, the others have nothing to do.
    if os.environ.get("RANK", "0") != "0":
        return
    with plain_errors():
        arguments, quantization, _ = parse_arguments(EvaluationArguments, QuantizationArguments, description=__doc__)
        inputs = read_inputs(arguments)
        model, tokenizer = open_writer(
            arguments.model,
            dtype="auto" if arguments.dtype is None else getattr(torch, arguments.dtype),
            quantization_config=quantization_config(quantization),
            base=arguments.base,
            trust_remote_code=arguments.trust_remote_code,
            device=arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        )
        run = read_run(arguments.model)
        fit_to_model(inputs, arguments, run or {}, model, tokenizer)
    results, replies = evaluate(model, tokenizer, arguments, inputs)
    results = [describe(result, arguments, model) for result in results]
    print_table(results)
    if arguments.output is not None:
        Path(arguments.output).write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if run is not None:
        with plain_errors():
            record(Path(arguments.model), results, replies)


if __name__ == "__main__":
    main()
