"""The one way in which preferences are read: a prompt with a chosen and a rejected answer, each text or messages.

A row has `prompt`, `chosen` and `rejected`; or the prompt stands at the beginning of both `chosen` and `rejected`, and
is parted from them. What is wrong with a row is told with its place before any work is spent.

What is too long for `max_length` is dealt with by one rule for each use, and counted. DPO cuts answers at their end,
and leaves out a pair whose answers do not differ before the cut. A reward model judges whole answers: a pair is left
out if one of them does not fit. Left out is also, as in SFT, a pair whose messages spell a special token of the
tokenizer.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase
from trl import extract_prompt
from trl.data_utils import common_prefix_length

from .chat_data import (
    MESSAGES,
    check_messages,
    check_order,
    encode_completions,
    render_chats,
    shown,
    special_pattern,
)
from .dataset_source import load_from_hub, local_path
from .text_data import SUFFIXES, check_utf8, json_lines, load_local_files, parquet_footer

COLUMNS = ("prompt", "chosen", "rejected")
Side = str | list[dict[str, str]]


@dataclass
class PreferenceDataArguments:
    dataset: str = field(
        default="preferences",
        metadata={
            "help": "Preferences to read: a sample's name, a local file or folder (parquet, jsonl, json; also .gz), "
            "or a Hub id, with the columns `prompt`, `chosen` and `rejected`, or the last two alone."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a Hub data set that has several, such as a language."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split to train on; slices: train[:95%%]."})
    eval_dataset: str | None = field(
        default=None, metadata={"help": "Preferences to evaluate on. By default another split of --dataset."}
    )
    eval_dataset_split: str = field(default="test", metadata={"help": "Split to evaluate on."})


def load_preferences(dataset: str, split: str, config: str | None = None) -> datasets.Dataset:
    """One pair a row, in the columns `prompt`, `chosen`, `rejected`: strings, or lists of messages of role and content.

    Without a `prompt`, or with one that is a string beside messages, it is what `chosen` and `rejected` begin with.

    Raises:
        FileNotFoundError: nothing of that name, here or (unless HF_HUB_OFFLINE is set) on the Hub.
        ValueError: no such split or columns, or the first row that is no pair, by its place.
    """
    local = local_path(dataset, "preferences", SUFFIXES)
    if local is None:
        rows = load_from_hub(dataset, split, config, streaming=False, modality="preferences")
    else:
        rows = load_local_files(local, split, config, _check_file, kinds=("parquet", "json"))
    name = f"{dataset} ({split})"
    if len(rows) == 0:
        raise ValueError(f"{name} has no rows: give data with at least one pair.")
    _check_columns(rows.column_names, name)
    columns = [column for column in COLUMNS if column in rows.column_names]
    strings = getattr(rows.features["chosen"], "dtype", None) in ("string", "large_string")
    return rows.select_columns(columns).map(
        lambda row, index, name: _pair(row, f"{name}, row {index + 1}"),
        with_indices=True,
        fn_kwargs={"name": name},
        remove_columns=columns,
        features=datasets.Features(dict.fromkeys(COLUMNS, datasets.Value("string") if strings else MESSAGES)),
        desc="Reading pairs",
    )


def tokenize_pairs(
    rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, cut: bool
) -> tuple[datasets.Dataset, dict[str, int]]:
    """Rows of `load_preferences` to rows of `prompt_ids`, `chosen_ids` and `rejected_ids`.

    Messages are rendered by the chat template; strings begin with bos, where the tokenizer has one, and end with eos.

    Args:
        max_length: tokens of a prompt with an answer.
        cut: whether a longer answer is cut (DPO), rather than its pair left out (a reward model).

    Returns:
        the rows, and the counts {"rows": given, "truncated": cut and kept, "left_out": not kept}.

    Raises ValueError: messages without a chat template or refused by it, or rows of which none is left.
    """
    strings = isinstance(rows[0]["prompt"], str)
    if tokenizer.chat_template is None and not strings:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} has no chat template, which messages need: take a model that "
            "was tuned on conversations (`python -m training.sft` makes one)."
        )
    token_ids = datasets.List(datasets.Value("int32"))
    tokenized = rows.map(
        _tokenize,
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        features=datasets.Features(
            dict.fromkeys(("prompt_ids", "chosen_ids", "rejected_ids"), token_ids) | {"cut": datasets.Value("bool")}
        ),
        fn_kwargs={"tokenizer": tokenizer, "max_length": max_length, "cut": cut},
        desc="Tokenising pairs",
    )
    if len(tokenized) == 0:
        raise ValueError(
            f"Of {len(rows)} pairs none is left: within {max_length} tokens their answers "
            f"{'do not differ' if cut else 'do not fit'}, or they spell special tokens of the tokenizer. Raise "
            "--max_length, or mend the data."
        )
    truncated = pc.sum(tokenized.data.column("cut")).as_py()
    counts = {"rows": len(rows), "truncated": truncated, "left_out": len(rows) - len(tokenized)}
    return tokenized.remove_columns("cut"), counts


# --- Checks ----------------------------------------------------------------------------------------------------------


def _check_file(file: Path, kind: str) -> None:
    """Raises for columns that a file lacks, and for the first line of JSON that is no pair."""
    if kind == "parquet":
        _check_columns(parquet_footer(file).schema.to_arrow_schema().names, str(file))
        return
    check_utf8(file)
    for number, row in json_lines(file):
        _check_columns(list(row), f"{file}, line {number},")
        _pair({column: row.get(column) for column in COLUMNS}, f"{file}, line {number}")


def _check_columns(found: list[str], name: str) -> None:
    if not {"chosen", "rejected"} <= set(found):
        raise ValueError(
            f"{name} has the columns {', '.join(found)}: preferences need 'chosen' and 'rejected', with 'prompt' or "
            "with the prompt at the beginning of both."
        )


def _pair(row: dict[str, Any], place: str) -> dict[str, Side]:
    """The row with its prompt apart; ValueError, which names the `place`, where it is no pair."""
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, list) and isinstance(rejected, list):
        row = {name: check_messages(row[name], name, place) for name in COLUMNS if isinstance(row.get(name), list)}
    elif not isinstance(chosen, str) or not isinstance(rejected, str):
        raise ValueError(
            f"{place} has {shown(chosen)} as 'chosen' and {shown(rejected)} as 'rejected': expected two strings or "
            "two lists of messages."
        )
    for name, side in row.items():
        if isinstance(side, str) and not side.strip():
            raise ValueError(f"{place} has an empty {name!r}: mend or remove the row.")
    if row["chosen"] == row["rejected"]:
        raise ValueError(f"{place} has equal 'chosen' and 'rejected', which prefers neither: remove the row.")
    if row.get("prompt") is None:
        if row["chosen"][0] != row["rejected"][0]:
            raise ValueError(
                f"{place} has no 'prompt', and its 'chosen' and 'rejected' do not begin alike: give the prompt apart, "
                "or at the beginning of both."
            )
        shared = min(len(row["chosen"]), len(row["rejected"]))
        if row["chosen"][:shared] == row["rejected"][:shared]:
            raise ValueError(
                f"{place} has no 'prompt', and one of its answers only goes on from the other: mend the row."
            )
        row = extract_prompt(row)
        for name in ("chosen", "rejected"):
            if isinstance(row[name], str) and not row[name].strip():
                raise ValueError(f"{place} has a {name!r} with nothing but the prompt: mend or remove the row.")
    if type(row["prompt"]) is not type(chosen):
        raise ValueError(
            f"{place} has {shown(row['prompt'])} as 'prompt' where a string is expected, as the answers are strings."
        )
    if isinstance(row["prompt"], list):
        _check_turns(row, place)
    return {name: row[name] for name in COLUMNS}


def _check_turns(pair: dict[str, list[dict[str, str]]], place: str) -> None:
    if pair["prompt"][-1]["role"] == "assistant":
        raise ValueError(
            f"{place} has a prompt that ends with a message of the assistant, which belongs to the answers: mend the "
            "row."
        )
    for name in ("chosen", "rejected"):
        check_order(pair["prompt"] + pair[name], f"{place}, prompt and {name}")
        if pair[name][-1]["role"] != "assistant":
            raise ValueError(f"{place} has a {name!r} that does not end with a message of the assistant: mend the row.")


# --- Tokens ----------------------------------------------------------------------------------------------------------


def _tokenize(
    batch: dict[str, list], indices: list[int], tokenizer: PreTrainedTokenizerBase, max_length: int, cut: bool
) -> dict[str, list]:
    rows: dict[str, list] = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": [], "cut": []}
    encode = _encode_strings if isinstance(batch["prompt"][0], str) else _encode_messages
    for prompt, chosen, rejected in encode(batch, indices, tokenizer):
        room = max(0, max_length - len(prompt))
        too_long = max(len(chosen), len(rejected)) > room
        if chosen[:room] == rejected[:room] or (too_long and not cut):
            continue
        for name, value in zip(rows, (prompt, chosen[:room], rejected[:room], too_long), strict=True):
            rows[name].append(value)
    return rows


def _encode_messages(
    batch: dict[str, list], indices: list[int], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """Token ids of (prompt, chosen, rejected) of the pairs that spell no special token."""
    special = special_pattern(tokenizer)
    pairs = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]

    def spells_special(pair):
        return any(special.search(message["content"]) for side in pair.values() for message in side)

    kept = [i for i, pair in enumerate(pairs) if not spells_special(pair)]
    if not kept:
        return
    rows = [indices[i] + 1 for i in kept]
    render = partial(render_chats, tokenizer=tokenizer, chat_template=tokenizer.get_chat_template(), rows=rows)
    prompts = render([pairs[i]["prompt"] for i in kept], add_generation_prompt=True)["input_ids"]
    answers = [render([pairs[i]["prompt"] + pairs[i][name] for i in kept])["input_ids"] for name in COLUMNS[1:]]
    for prompt, *wholes in zip(prompts, *answers, strict=True):
        start = min(common_prefix_length(prompt, whole) for whole in wholes)
        yield prompt[:start], *(whole[start:] for whole in wholes)


def _encode_strings(
    batch: dict[str, list], indices: list[int], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], list[int], list[int]]]:
    answers = [encode_completions(batch["prompt"], batch[name], tokenizer) for name in COLUMNS[1:]]
    for (chosen, of_answer), (rejected, _) in zip(*answers, strict=True):
        start = of_answer.index(True)
        yield chosen[:start], chosen[start:], rejected[start:]
