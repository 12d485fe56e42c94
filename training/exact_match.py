"""Questions whose answers can be checked: the model replies, greedily or by chance, and a stated rule compares.

The rule (`given_answer` and `is_right`): what the model answers is what stands in its reply's last
<answer>...</answer>, or else the whole reply after its last </think>. Where the known answer is a number, the last
number in that has to be equal to it as a number (1,000 is 1000.0). Otherwise the whole of it has to be equal to the
known answer but for case, white space, punctuation at its ends and brackets around it; signs and the brackets of a list
are no punctuation: -1/2 is not 1/2, nor [1, 2) the same as (1, 2].
"""

import hashlib
import json
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import jinja2
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import BatchEncoding

from .dataset_source import describe_source, load_from_hub, local_path
from .language_models import end_of_turn_ids
from .packing import document_start

# Of 1,024 replies of 50 tokens on average and 96 at most, a model of 0.9M parameters wrote 4,900 tokens a second on one
# core in one go; 4, 8 and 16 at a time gave 12,400, 12,200 and 11,800.
TOKENS_AT_ONCE = 8
KINDS = {".parquet": "parquet", ".json": "json"}
TAGGED = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", flags=re.DOTALL | re.IGNORECASE)
# A sign is part of a number unless it follows a number, a word or a bracket: then it subtracts.
NUMBER = re.compile(
    r"(?<![\w)\]])[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\d+(?:,\d{3})*(?:\.\d+)?"
    r"|(?<![\w)\].])[-+]?\.\d+"
)
PUNCTUATION = " .,:;?!\"'`*_$%\\"
BRACKETED = re.compile(r"[(\[{]?([^()\[\]{},;]*)[)\]}]?")


def given_answer(reply: str, answer: str) -> str:
    """What of the `reply` is compared with the known `answer`; empty where a number is expected and none is there."""
    tagged = TAGGED.findall(reply)
    given = tagged[-1] if tagged else reply.rsplit("</think>", 1)[-1]
    if _number(answer) is None:
        return given.strip()
    numbers = NUMBER.findall(given.replace("\N{MINUS SIGN}", "-"))
    return numbers[-1] if numbers else ""


def is_right(given: str, answer: str) -> bool:
    expected = _number(answer)
    return _normalised(given) == _normalised(answer) if expected is None else _number(given) == expected


def _number(text: str) -> Decimal | None:
    text = text.strip().replace("\N{MINUS SIGN}", "-")
    return Decimal(text.replace(",", "")) if NUMBER.fullmatch(text) else None


def _normalised(text: str) -> str:
    text = " ".join(text.casefold().split())
    inner = text.strip(PUNCTUATION)
    if bracketed := BRACKETED.fullmatch(inner):
        inner = bracketed[1].strip(PUNCTUATION)
    return inner or text


def load_questions(
    dataset: str, split: str | None = None, limit: int | None = None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows `prompt` (text or messages) and `answer` (as text), and their description for `run.json`.

    Args:
        dataset: a sample's name, a local file (jsonl, json, parquet) or folder, or a Hub id.
        split: by default "train" of a single file, which has no other, and else "test".

    Raises ValueError, naming the line or the row, where there is no prompt or no answer that could be compared.
    """
    local = local_path(dataset, "text", {".jsonl", *KINDS})
    split = split or ("train" if local is not None and local.is_file() else "test")
    if local is not None and local.suffix == ".jsonl":
        if split != "train":
            raise ValueError(f"{local} is a single file and has only the split 'train', not {split!r}.")
        rows = _read_lines(local)
    else:
        rows = _read_rows(dataset, local, split)
    questions = [_question(row, place) for place, row in rows[:limit]]
    if not questions:
        raise ValueError(f"{dataset} holds no questions: give rows with the fields 'prompt' and 'answer'.")
    digest = hashlib.sha256(json.dumps(questions, ensure_ascii=False, sort_keys=True).encode())
    description = {"dataset": dataset, "split": split, "fingerprint": digest.hexdigest()[:16], "rows": len(questions)}
    return questions, description | describe_source(local)


def _read_lines(file: Path) -> list[tuple[str, Any]]:
    rows = []
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error}): convert it.") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            place = f"{file}, line {number}"
            try:
                rows.append((place, json.loads(line)))
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{place} is not JSON ({error.msg} at column {error.colno}): mend the line."
                ) from error
    return rows


def _read_rows(dataset: str, local: Path | None, split: str) -> list[tuple[str, Any]]:
    if local is None:
        table = load_from_hub(dataset, split, None, False, "text")
    else:
        try:
            if local.is_file() and local.suffix not in KINDS:
                raise ValueError("it is no .jsonl, .json or .parquet file")
            kind, options = (KINDS[local.suffix], {"data_files": str(local)}) if local.is_file() else (str(local), {})
            table = datasets.load_dataset(kind, split=split, **options)
        except (datasets.exceptions.DatasetGenerationError, FileNotFoundError, ValueError) as error:
            raise ValueError(f"{local} cannot be read as questions: {error.__cause__ or error}.") from error
    return [(f"{dataset} ({split}), row {number}", row) for number, row in enumerate(table)]


def _question(row: Any, place: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{place} is no JSON object: expected {{'prompt': ..., 'answer': ...}}.")
    for field in ("prompt", "answer"):
        if row.get(field) in (None, "", []):
            found = f"only {', '.join(row)}" if field not in row else "or an empty one"
            raise ValueError(f"{place} has no field {field!r}, {found}: each row needs 'prompt' and 'answer'.")
    prompt, answer = row["prompt"], row["answer"]
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise ValueError(f"{place} has the answer {str(answer)[:40]!r}: give a text or a number.")
    of_messages = isinstance(prompt, list) and all(
        isinstance(message, dict) and {"role", "content"} <= message.keys() for message in prompt
    )
    if not isinstance(prompt, str) and not (of_messages and prompt[-1]["role"] != "assistant"):
        raise ValueError(
            f"{place} has the prompt {str(prompt)[:40]!r}: give a text, or messages ({{'role': ..., 'content': ...}}) "
            "that end with a question."
        )
    return {"prompt": prompt, "answer": str(answer)}


def prompt_ids(
    questions: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, apply_chat_template: bool
) -> list[list[int]]:
    """The tokens before each reply: messages in the chat template; a text there too, or as the start of a document.

    Raises ValueError where a template is needed that the tokenizer lacks, or that does not take the messages.
    """
    prompts = []
    for number, question in enumerate(questions, start=1):
        prompt = question["prompt"]
        if isinstance(prompt, str) and not apply_chat_template:
            ids = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
            start = document_start(tokenizer)
            prompts.append(ids if start is None else [start, *ids])
            continue
        if not tokenizer.chat_template:
            raise ValueError("The model's tokenizer has no chat template, which messages need: give prompts of text.")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        try:
            encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        except jinja2.TemplateError as error:
            raise ValueError(f"The chat template does not take question {number}: {error}") from error
        prompts.append(encoded["input_ids"] if isinstance(encoded, BatchEncoding) else encoded)
    return prompts


def generate_replies(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    max_new_tokens: int,
    batch_size: int,
    samples: int = 1,
    temperature: float = 0.0,
) -> list[list[dict[str, Any]]]:
    """Of each prompt `samples` replies: the `text`, whether it `ended` by itself, its `tokens` with the end's.

    Prompts of like length share a batch, padded on the left; that changes no reply of temperature 0.

    Args:
        prompts: token ids, none empty.
        batch_size: replies that are written at once.
        samples: replies to a prompt.
        temperature: 0 takes the likeliest token each time. Otherwise tokens are drawn from all of the vocabulary,
            whatever else the model's own generation settings say; torch's seed and the batch size decide which.
    """
    ends = end_of_turn_ids(tokenizer)
    padding = next(token for token in (tokenizer.pad_token_id, *ends, 0) if token is not None)
    sampled = temperature > 0
    sampling = {
        "do_sample": sampled,
        "temperature": temperature if sampled else None,
        "top_k": 0 if sampled else None,
        "top_p": 1.0 if sampled else None,
        "min_p": None,
        "min_new_tokens": None,
        "num_beams": 1,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
    }
    rows = [i for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])) for _ in range(samples)]
    replies: list[list[dict[str, Any]]] = [[] for _ in prompts]
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        continued = continue_prompts(model, [prompts[i] for i in batch], max_new_tokens, ends, padding, **sampling)
        for i, ids in zip(batch, continued, strict=True):
            ended = ids[-1] in ends
            # Special tokens stay in the text: <answer> may be one.
            text = tokenizer.decode(ids[:-1] if ended else ids)
            replies[i].append({"text": text, "ended": ended, "tokens": len(ids)})
    return replies


@torch.no_grad()
def continue_prompts(
    model: nn.Module, prompts: list[list[int]], max_new_tokens: int, ends: list[int], padding: int, **options: Any
) -> list[list[int]]:
    """Of each prompt the new tokens, up to the first of `ends`, which is among them. `options` are `generate`'s.

    `generate` goes on for all rows until the last one ends. So it is asked for a few tokens at a time, and between
    these the rows that ended leave the batch, and the cache of keys and values.
    """
    longest = max(map(len, prompts))
    input_ids = torch.tensor([[padding] * (longest - len(ids)) + ids for ids in prompts], device=model.device)
    attention_mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
    continued: list[list[int]] = [[] for _ in prompts]
    running = list(range(len(prompts)))
    cache, left, piece = None, max_new_tokens, TOKENS_AT_ONCE
    while running and left > 0:
        output = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            max_new_tokens=min(piece, left),
            **options,
            eos_token_id=ends or None,
            pad_token_id=padding,
            return_dict_in_generate=True,
        )
        new = output.sequences[:, input_ids.shape[1] :]
        left -= new.shape[1]
        going = []
        for row, (i, ids) in enumerate(zip(running, new.tolist(), strict=True)):
            end = next((place for place, token in enumerate(ids) if token in ends), None)
            continued[i] += ids if end is None else ids[: end + 1]
            if end is None:
                going.append(row)
        running = [running[row] for row in going]
        rows = torch.tensor(going, dtype=torch.long, device=model.device)
        input_ids = output.sequences[rows]
        attention_mask = torch.cat([attention_mask[rows], attention_mask.new_ones(len(rows), new.shape[1])], dim=1)
        cache = output.past_key_values
        if type(cache) is DynamicCache and all(hasattr(layer, "batch_select_indices") for layer in cache.layers):
            cache.batch_select_indices(rows)
        else:  # A recurrent model's, a static one, none: the rest is written in one go, from what there is so far.
            cache, piece = None, left
    return continued
