"""Makes preferences of conversations: chosen is the reference answer, rejected the worst of a model's own samples.

    python -m training.build_preferences --model runs/quickstart/chat --dataset instructions \\
        --dataset_split train[:600] --eval_dataset_split test[:100] --output_dir data/preferences

The rule: of each conversation, what stands before the assistant's last turn is the prompt, and that turn is chosen. The
model answers the prompt `--samples` times at `--temperature` and `--top_p`. Of the answers that are neither empty nor
the reference itself, those go first that came to their end by themselves, and of these the one least similar to the
reference, by the F1 of their words (as in SQuAD, arXiv 1606.05250), is rejected. The pair is kept only where it is less
similar than `--max_similarity`.

Writes a folder that `--dataset` of `training.dpo` and `training.reward` takes: train.parquet and test.parquet with the
columns prompt, chosen, rejected, similarity and ended (whether the rejected answer came to its end by itself), and
info.json: the licence of the conversations, and how the pairs were made. The same command gives the same pairs.
"""

import json
import math
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .adapters import open_writer
from .chat_data import ChatDataArguments, describe_rows, load_conversations
from .command_line import parse_arguments, plain_errors
from .language_models import end_of_turn_ids
from .preference_data import Side
from .run_record import portable


@dataclass
class BuildArguments(ChatDataArguments):
    model: str = field(
        default="runs/quickstart/chat",
        metadata={"help": "Whose samples are rejected: the folder of a model or an adapter, or a Hub id."},
    )
    eval_dataset_split: str = field(
        default="", metadata={"help": "Split to make the held-out pairs of (test.parquet); none by default."}
    )
    output_dir: str = field(default="data/preferences", metadata={"help": "The folder to write, new or empty."})
    samples: int = field(default=4, metadata={"help": "Answers that the model gives to each prompt."})
    temperature: float = field(default=0.9, metadata={"help": "At which they are sampled."})
    top_p: float = field(default=0.95, metadata={"help": "Share of the probability that is sampled from."})
    max_new_tokens: int = field(default=96, metadata={"help": "Tokens of a sample, at most."})
    max_similarity: float = field(
        default=0.5, metadata={"help": "A rejected answer is less similar to the reference than this, from 0 to 1."}
    )
    batch_size: int = field(default=32, metadata={"help": "Prompts that are answered at once."})
    seed: int = field(default=0, metadata={"help": "Of the sampling."})

    def __post_init__(self):
        if self.samples < 1 or self.batch_size < 1 or self.max_new_tokens < 1:
            raise ValueError("--samples, --batch_size and --max_new_tokens have to be 1 or more.")
        if self.temperature <= 0:
            raise ValueError(f"--temperature is {self.temperature}: give more than 0.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p is {self.top_p}: give more than 0 and at most 1.")
        if not 0 < self.max_similarity <= 1:
            raise ValueError(f"--max_similarity is {self.max_similarity}: give more than 0 and at most 1.")


def word_f1(answer: str, reference: str) -> float:
    """The harmonic mean of two shares: of the answer's words in the reference, and of the reference's in the answer."""
    found, expected = (Counter(re.findall(r"\w+", text.lower())) for text in (answer, reference))
    return 2 * (found & expected).total() / max(1, found.total() + expected.total())


def build(
    conversations: datasets.Dataset,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    arguments: BuildArguments,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The pairs, in the order of the conversations, and how many of them came of how many."""
    tasks = [split_last_answer(row) for row in conversations]
    prompts = [encode_prompt(prompt, tokenizer) for prompt, _ in tasks]
    context = getattr(model.config, "max_position_embeddings", math.inf)
    fitting = [i for i, ids in enumerate(prompts) if len(ids) + arguments.max_new_tokens <= context]
    by_length = sorted(fitting, key=lambda i: len(prompts[i]))  # little padding
    pairs = {}
    for start in range(0, len(by_length), arguments.batch_size):
        batch = by_length[start : start + arguments.batch_size]
        samples = sample_answers(model, tokenizer, [prompts[i] for i in batch], arguments)
        for i, answers in zip(batch, samples, strict=True):
            prompt, chosen = tasks[i]
            worst = worst_answer(answers, text_of(chosen))
            if worst is not None and worst["similarity"] < arguments.max_similarity:
                rejected = worst["text"] if isinstance(chosen, str) else [chosen[0] | {"content": worst["text"]}]
                pairs[i] = {"prompt": prompt, "chosen": chosen, "rejected": rejected} | {
                    name: worst[name] for name in ("similarity", "ended")
                }
        print(f"{min(start + arguments.batch_size, len(by_length))} of {len(by_length)} prompts answered", flush=True)
    counts = {"conversations": len(tasks), "prompts_too_long": len(tasks) - len(fitting), "pairs": len(pairs)}
    return [pairs[i] for i in sorted(pairs)], counts


def split_last_answer(row: dict[str, Any]) -> tuple[Side, Side]:
    """(what stands before the assistant's last turn, that turn)."""
    if "completion" in row:
        return row["prompt"], row["completion"]
    messages = row["messages"]
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    return messages[:last], [messages[last]]


def encode_prompt(prompt: Side, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if isinstance(prompt, str):
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        return bos + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]


@torch.no_grad()
def sample_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], arguments: BuildArguments
) -> list[list[dict[str, Any]]]:
    """Of each prompt, `samples` answers: `text`, and whether it `ended` by itself."""
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    longest = max(map(len, prompts))
    input_ids = torch.tensor([[padding] * (longest - len(ids)) + ids for ids in prompts])
    attention_mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    ends = end_of_turn_ids(tokenizer)
    sampled = model.generate(
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        do_sample=True,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=0,
        max_new_tokens=arguments.max_new_tokens,
        num_return_sequences=arguments.samples,
        eos_token_id=ends,
        pad_token_id=padding,
    )[:, longest:].tolist()
    answers = []
    for ids in sampled:
        end = next((place for place, token in enumerate(ids) if token in ends), None)
        text = tokenizer.decode(ids[:end], skip_special_tokens=True).strip()
        answers.append({"text": text, "ended": end is not None})
    return [answers[i : i + arguments.samples] for i in range(0, len(answers), arguments.samples)]


def worst_answer(answers: list[dict[str, Any]], reference: str) -> dict[str, Any] | None:
    """The answer with the lowest `similarity`; None where all are empty or the reference.

    Those that ended go first: one that was cut off would be told from the reference by that alone.
    """
    judged = [
        answer | {"similarity": round(word_f1(answer["text"], reference), 4)}
        for answer in answers
        if answer["text"] and answer["text"] != reference.strip()
    ]
    return min(judged, key=lambda answer: (not answer["ended"], answer["similarity"]), default=None)


def text_of(side: Side) -> str:
    return side if isinstance(side, str) else side[-1]["content"]


def load_answered(arguments: BuildArguments, split: str) -> datasets.Dataset:
    rows = load_conversations(arguments.dataset, split, arguments.dataset_config, arguments.text_column)
    if rows.column_names == ["text"]:
        raise ValueError(
            f"{arguments.dataset} ({split}) holds whole texts, in which no answer is told from its prompt: give "
            "'messages', or 'prompt' and 'completion'."
        )
    return rows


def describe(arguments: BuildArguments, data: dict[str, Any], counts: dict[str, Any]) -> dict[str, Any]:
    """`info.json`: the source's own, where it has one, and how the pairs were made."""
    source = data["train"].get("info", {})
    name = source.get("name", data["train"]["dataset"])
    info = {"name": f"Preferences on: {name}", "modality": "preferences"}
    info |= {field: source[field] for field in ("license", "language", "attribution") if field in source}
    origin = (
        f"Conversations: {name}. Chosen is the reference answer; rejected, of {arguments.samples} samples of a "
        f"language model (temperature {arguments.temperature}, top-p {arguments.top_p}), complete ones first, the one "
        f"least similar to it by the F1 of their words, where that is below {arguments.max_similarity} "
        "(`training/build_preferences.py`)."
    )
    asked = {field: value for field, value in asdict(arguments).items() if field != "output_dir"}
    described = {split: {k: v for k, v in data[split].items() if k != "info"} for split in data}
    return info | {"origin": origin, "made_by": portable({"arguments": asked, "data": described, "counts": counts})}


def prepare_folder(output_dir: str) -> Path:
    folder = Path(output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already, with content: choose another --output_dir, or empty this one.")
    return folder


def run(arguments: BuildArguments) -> dict[str, Any]:
    """Writes the folder; returns the content of its info.json. Nothing is written before all pairs are there."""
    folder = prepare_folder(arguments.output_dir)
    splits = {"train": arguments.dataset_split}
    if arguments.eval_dataset_split:
        splits["test"] = arguments.eval_dataset_split
    rows = {name: load_answered(arguments, split) for name, split in splits.items()}
    data = {name: describe_rows(rows[name], arguments.dataset, split) for name, split in splits.items()}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = open_writer(arguments.model, device=device)
    built, counts = {}, {}
    torch.manual_seed(arguments.seed)
    for name in rows:
        built[name], counts[name] = build(rows[name], model, tokenizer, arguments)
        if not built[name]:
            raise ValueError(
                f"Of {len(rows[name])} conversations of {splits[name]} came no pair: no sample is less similar to its "
                "reference than --max_similarity, or no prompt leaves room for an answer."
            )
    info = describe(arguments, data, counts)
    folder.mkdir(parents=True, exist_ok=True)
    for name, pairs in built.items():
        pq.write_table(pa.Table.from_pylist(pairs), folder / f"{name}.parquet", compression="zstd")
    (folder / "info.json").write_text(json.dumps(info, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return info


def main() -> None:
    with plain_errors():
        arguments, _ = parse_arguments(BuildArguments, description=__doc__)
        info = run(arguments)
    for name, counts in info["made_by"]["counts"].items():
        print(f"{arguments.output_dir} ({name}): {counts['pairs']} pairs of {counts['conversations']} conversations")


if __name__ == "__main__":
    main()
