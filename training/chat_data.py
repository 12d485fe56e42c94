"""The one way in which conversations are read, checked, and turned into tokens with labels.

A row has one of three layouts: `messages`, a list of {role, content} (ShareGPT's `conversations` of {from, value}
become that); `prompt` and `completion`, both strings or both lists of messages; or `text`. What is wrong with a row is
told with its file and number before any work is spent.

Where the loss is taken: on what the assistant writes with its end of turn, as the chat template's `{% generation %}`
marks say; on the completion; on all of a text. A row longer than `max_length` is cut at its end. A row of which no
token with a loss is left is left out, and so is one whose messages spell a special token of the tokenizer: within the
template it would be that token. Both are counted.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import jinja2
import pyarrow.compute as pc
import pyarrow.parquet
from transformers import PreTrainedTokenizerBase
from trl import maybe_convert_to_chatml
from trl.chat_template_utils import (
    get_training_chat_template,
    has_generation_markers,
    is_chat_template_stop_token_trained,
)
from trl.data_utils import common_prefix_length

from .dataset_source import describe_source, load_from_hub, local_path
from .text_data import SUFFIXES, check_utf8, json_lines, load_local_files, open_bytes, parquet_footer

LAYOUTS = (("messages",), ("conversations",), ("prompt", "completion"))
MESSAGES = datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")})
ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
NO_LOSS = -100


@dataclass
class ChatDataArguments:
    dataset: str = field(
        default="instructions",
        metadata={
            "help": "Conversations to read: a sample's name, a local file or folder (parquet, jsonl, json; also .gz), "
            "or a Hub id, with the column `messages` (or `conversations`), `prompt` and `completion`, or `text`."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a Hub data set that has several, such as a language."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split to train on; slices: train[:95%%]."})
    text_column: str = field(
        default="text",
        metadata={"help": "Column of whole texts. Named otherwise than `text`, it is taken before the other layouts."},
    )


def load_conversations(
    dataset: str, split: str, config: str | None = None, text_column: str = "text"
) -> datasets.Dataset:
    """One conversation a row, in the column `messages`, or `prompt` and `completion`, or `text`; others are dropped.

    Roles are "system" (first, if at all), then "user" and "assistant" by turns. ShareGPT's "human" and "gpt" become
    those. A completion of messages is one message of the assistant.

    Raises:
        FileNotFoundError: nothing of that name, here or (unless HF_HUB_OFFLINE is set) on the Hub.
        ValueError: no such split, none of the layouts, or the first row that is no conversation, by file and number.
    """
    local = local_path(dataset, "chat", SUFFIXES)
    if local is None:
        rows = load_from_hub(dataset, split, config, streaming=False, modality="chat")
    else:
        check_file = partial(_check_file, text_column=text_column)
        rows = load_local_files(local, split, config, check_file, kinds=("parquet", "json"))
    name = f"{dataset} ({split})"
    if len(rows) == 0:
        raise ValueError(f"{name} has no rows: give data with at least one conversation.")
    columns = find_layout(rows.column_names, text_column, name)
    return rows.select_columns(columns).map(
        lambda row, index, columns, name: _conversation(row, columns, f"{name}, row {index + 1}"),
        with_indices=True,
        fn_kwargs={"columns": columns, "name": name},
        remove_columns=columns,
        features=_features(rows.features, columns),
        desc="Reading conversations",
    )


def load_train_and_eval(
    arguments: Any, evaluates: bool, load: Callable[[str, str, str | None], datasets.Dataset]
) -> tuple[datasets.Dataset, datasets.Dataset | None, dict[str, Any]]:
    """Training and held-out rows, checked by `load`, and the description of both for `run.json`."""
    train = load(arguments.dataset, arguments.dataset_split, arguments.dataset_config)
    data = {"train": describe_rows(train, arguments.dataset, arguments.dataset_split)}
    if not evaluates:
        return train, None, data
    name, split = arguments.eval_dataset or arguments.dataset, arguments.eval_dataset_split
    held_out = load(name, split, arguments.dataset_config if arguments.eval_dataset is None else None)
    return train, held_out, data | {"eval": describe_rows(held_out, name, split)}


def describe_rows(rows: datasets.Dataset, dataset: str, split: str) -> dict[str, Any]:
    """What a run records of its data. The fingerprint is a hash of all rows, in order; a sample brings its `info`."""
    digest = hashlib.sha256()
    for row in rows:
        text = json.dumps(row, ensure_ascii=False, sort_keys=True).encode()
        digest.update(len(text).to_bytes(8, "little") + text)
    description = {"dataset": dataset, "split": split, "fingerprint": digest.hexdigest()[:16], "rows": len(rows)}
    return description | describe_source(local_path(dataset, None, SUFFIXES))


def tokenize_conversations(
    rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, assistant_only_loss: bool = True
) -> tuple[datasets.Dataset, dict[str, int]]:
    """Rows of `load_conversations` to rows of `input_ids` and `labels`, -100 where no loss is taken.

    `messages`, and a prompt and completion of messages, are rendered by the chat template. Strings begin with bos,
    where the tokenizer has one, and end with eos; a special token that they spell is that token, so that conversations
    that were rendered elsewhere can be given.

    Args:
        max_length: tokens at which a row is cut.
        assistant_only_loss: of `messages`, take the loss on the assistant's turns only, rather than on everything.

    Returns:
        the rows, and the counts {"rows": given, "truncated": cut and kept, "left_out": not kept}.

    Raises:
        ValueError: a tokenizer without a chat template or with one without marks, a conversation that the template
            refuses, or rows of which none is left.
    """
    conversational = rows.column_names != ["text"] and not isinstance(rows[0].get("prompt"), str)
    marks = assistant_only_loss and rows.column_names == ["messages"]
    token_ids = datasets.List(datasets.Value("int32"))
    tokenized = rows.map(
        _tokenize,
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        features=datasets.Features({"input_ids": token_ids, "labels": token_ids, "cut": datasets.Value("bool")}),
        fn_kwargs={
            "tokenizer": tokenizer,
            "max_length": max_length,
            "chat_template": chat_template(tokenizer, marks) if conversational else None,
            "marks": marks,
        },
        desc="Tokenising",
    )
    if len(tokenized) == 0:
        raise ValueError(
            f"Of {len(rows)} conversations none is left: within {max_length} tokens they have nothing to be learnt, or "
            "they spell special tokens of the tokenizer. Raise --max_length, or mend the data."
        )
    truncated = pc.sum(tokenized.data.column("cut")).as_py()
    counts = {"rows": len(rows), "truncated": truncated, "left_out": len(rows) - len(tokenized)}
    return tokenized.remove_columns("cut"), counts


def chat_template(tokenizer: PreTrainedTokenizerBase, marks: bool) -> str:
    """The tokenizer's chat template; with `marks`, one that marks the assistant's turns: TRL's, where it knows one."""
    if tokenizer.chat_template is None:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} has no chat template, which conversations need: give "
            "--chat_template_path FILE.jinja."
        )
    template = tokenizer.get_chat_template()
    if not marks:
        return template
    if not has_generation_markers(template):
        try:
            template = get_training_chat_template(tokenizer)
        except ValueError as error:
            raise ValueError(
                f"The chat template of {tokenizer.name_or_path!r} does not mark the assistant's turns by "
                "{% generation %}: give --chat_template_path FILE.jinja with one that does, or "
                "--assistant_only_loss false."
            ) from error
    if not is_chat_template_stop_token_trained(tokenizer, template):
        warnings.warn(
            f"The chat template of {tokenizer.name_or_path!r} leaves the end of the assistant's turn outside of its "
            "{% generation %} marks: the model may not learn to stop.",
            stacklevel=2,
        )
    return template


# --- Layouts and their checks ----------------------------------------------------------------------------------------


def find_layout(found: list[str], text_column: str, name: str) -> list[str]:
    """The columns that make up the conversations."""
    named = [(text_column,)] if text_column != "text" else []
    for columns in (*named, *LAYOUTS, ("text",)):
        if set(columns) <= set(found):
            return list(columns)
    raise ValueError(
        f"{name} has the columns {', '.join(found)}: conversations need 'messages' (or 'conversations'), 'prompt' and "
        f"'completion', or {text_column!r} (--text_column)."
    )


def _features(found: datasets.Features, columns: list[str]) -> datasets.Features:
    if columns in (["messages"], ["conversations"]):
        return datasets.Features({"messages": MESSAGES})
    if len(columns) == 1:
        return datasets.Features({"text": datasets.Value("string")})
    strings = getattr(found["prompt"], "dtype", None) in ("string", "large_string")
    return datasets.Features(dict.fromkeys(columns, datasets.Value("string") if strings else MESSAGES))


def _check_file(file: Path, kind: str, text_column: str) -> None:
    """Raises for the first row of a file that is no conversation."""
    columns, text = None, None
    for place, row in _rows_of(file, kind, text_column):
        columns = columns or find_layout(list(row), text_column, str(file))
        conversation = _conversation(row, columns, place)
        is_text = isinstance(conversation.get("prompt"), str)
        if text not in (None, is_text):
            raise ValueError(f"{place} has a prompt that is {_kind_of(is_text)}, unlike the rows before: mend the row.")
        text = is_text
    if columns is None:
        raise ValueError(f"{file} has no rows: give data with at least one conversation.")


def _kind_of(text: bool) -> str:
    return "a string" if text else "a list of messages"


def _rows_of(file: Path, kind: str, text_column: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """("FILE, row 1", row), and so on."""
    if kind == "parquet":
        columns = find_layout(parquet_footer(file).schema.to_arrow_schema().names, text_column, str(file))
        number = 0
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1000, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield f"{file}, row {number}", row
        return
    check_utf8(file)
    with open_bytes(file) as stream:
        is_array = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    if not is_array:
        yield from ((f"{file}, line {number}", row) for number, row in json_lines(file))
        return
    with open_bytes(file) as stream:
        try:
            rows = json.loads(stream.read().decode("utf-8-sig"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is not JSON ({error}): mend the file.") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"{file}, row {number} is no JSON object: expected {{...}}.")
        yield f"{file}, row {number}", row


def _conversation(row: dict[str, Any], columns: list[str], place: str) -> dict[str, Any]:
    """The row in one of the three layouts; ValueError, which names the `place`, where it is no conversation."""
    for column in columns:
        if column not in row:
            raise ValueError(f"{place} has no field {column!r}, only {', '.join(row)}: mend or remove the row.")
    if len(columns) == 2:
        return _prompt_and_completion(row["prompt"], row["completion"], place)
    value = row[columns[0]]
    if columns[0] in ("messages", "conversations"):
        messages = check_messages(value, columns[0], place)
        check_order(messages, place)
        if all(message["role"] != "assistant" for message in messages):
            raise ValueError(
                f"{place} has no message of the role 'assistant': there is nothing to learn, remove the row."
            )
        return {"messages": messages}
    if not isinstance(value, str):
        raise ValueError(f"{place} has {shown(value)} in {columns[0]!r} where a string is expected: mend the row.")
    return {"text": value}


def _prompt_and_completion(prompt: Any, completion: Any, place: str) -> dict[str, Any]:
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            raise ValueError(f"{place} has an empty 'completion': there is nothing to learn, remove the row.")
        return {"prompt": prompt, "completion": completion}
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise ValueError(
            f"{place} has {shown(prompt)} as 'prompt' and {shown(completion)} as 'completion': expected two strings "
            "or two lists of messages."
        )
    asked, answered = check_messages(prompt, "prompt", place), check_messages(completion, "completion", place)
    check_order(asked + answered, place)
    if len(answered) != 1 or answered[0]["role"] != "assistant":
        raise ValueError(
            f"{place} has a 'completion' of {', '.join(message['role'] for message in answered)}: expected one message "
            "of the role 'assistant'; give longer conversations as 'messages'."
        )
    return {"prompt": asked, "completion": answered}


def check_messages(value: Any, column: str, place: str) -> list[dict[str, str]]:
    """The messages with nothing but role and content, both strings and not empty."""
    if not isinstance(value, list):
        raise ValueError(f"{place} has {shown(value)} in {column!r} where a list of messages is expected.")
    if not value:
        raise ValueError(f"{place} has no messages in {column!r}: remove the row.")
    messages = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            raise ValueError(f"{place}, message {number} is {shown(message)} where {{role, content}} is expected.")
        given = {key: part for key, part in message.items() if part is not None}  # what arrow fills up with
        message = maybe_convert_to_chatml({"messages": [given]})["messages"][0]
        role, content = message.get("role"), message.get("content")
        role = SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
        if role not in ROLES:
            raise ValueError(
                f"{place}, message {number} has the role {shown(role)}: expected one of {', '.join(ROLES)}."
            )
        if not isinstance(content, str):
            raise ValueError(f"{place}, message {number} ({role}) has {shown(content)} as content: expected a string.")
        if not content.strip():
            raise ValueError(f"{place}, message {number} ({role}) is empty: mend or remove the row.")
        messages.append({"role": role, "content": content})
    return messages


def check_order(messages: list[dict[str, str]], place: str) -> None:
    first = int(messages[0]["role"] == "system")
    for number, message in enumerate(messages[first:]):
        expected = ROLES[1 + number % 2]
        if message["role"] != expected:
            raise ValueError(
                f"{place}, message {number + first + 1} has the role {message['role']!r} where {expected!r} is "
                "expected: a conversation is 'system' (or not), then 'user' and 'assistant' by turns."
            )


def shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)[:40]


# --- Tokens and labels -----------------------------------------------------------------------------------------------


def _tokenize(
    batch: dict[str, list],
    indices: list[int],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    chat_template: str | None,
    marks: bool,
) -> dict[str, list]:
    if chat_template is not None:
        encoded = _encode_messages(batch, indices, tokenizer, chat_template, marks)
    elif "text" in batch:
        encoded = encode_completions([""] * len(batch["text"]), batch["text"], tokenizer)
    else:
        encoded = encode_completions(batch["prompt"], batch["completion"], tokenizer)
    rows: dict[str, list] = {"input_ids": [], "labels": [], "cut": []}
    for ids, trained in encoded:
        labels = [token if on else NO_LOSS for token, on in zip(ids, trained, strict=True)][:max_length]
        # A row's first token is predicted from nothing.
        if all(label == NO_LOSS for label in labels[1:]):
            continue
        rows["input_ids"].append(ids[:max_length])
        rows["labels"].append(labels)
        rows["cut"].append(len(ids) > max_length)
    return rows


def _encode_messages(
    batch: dict[str, list], indices: list[int], tokenizer: PreTrainedTokenizerBase, chat_template: str, marks: bool
) -> Iterator[tuple[list[int], list[bool]]]:
    """(token ids, whether the loss is taken on each) of the conversations that spell no special token."""
    prompts = batch.get("prompt")
    conversations = batch["messages"] if prompts is None else [p + c for p, c in zip(*batch.values(), strict=True)]
    special = special_pattern(tokenizer)
    kept = [i for i, messages in enumerate(conversations) if not any(special.search(m["content"]) for m in messages)]
    if not kept:
        return
    render = partial(
        render_chats, tokenizer=tokenizer, chat_template=chat_template, rows=[indices[i] + 1 for i in kept]
    )
    rendered = render([conversations[i] for i in kept], return_assistant_tokens_mask=marks)
    if prompts is not None:
        before = render([prompts[i] for i in kept], add_generation_prompt=True)["input_ids"]
        for ids, prompt_ids in zip(rendered["input_ids"], before, strict=True):
            start = common_prefix_length(prompt_ids, ids)
            yield ids, [False] * start + [True] * (len(ids) - start)
    elif marks:
        for ids, mask in zip(rendered["input_ids"], rendered["assistant_masks"], strict=True):
            yield ids, [bool(on) for on in mask]
    else:
        yield from ((ids, [True] * len(ids)) for ids in rendered["input_ids"])


def render_chats(
    conversations: list[list[dict]], tokenizer: PreTrainedTokenizerBase, chat_template: str, rows: list[int], **options
):
    """`apply_chat_template`, which adds no special token to those of the template. `rows` number the conversations."""
    options |= {"chat_template": chat_template, "return_dict": True, "tokenizer_kwargs": {"verbose": False}}
    try:
        return tokenizer.apply_chat_template(conversations, **options)
    except jinja2.TemplateError:
        for row, conversation in zip(rows, conversations, strict=True):
            try:
                tokenizer.apply_chat_template(conversation, **options)
            except jinja2.TemplateError as error:
                raise ValueError(f"The chat template refuses row {row} of the data: {error}") from error
        raise


def special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern:
    """Matches text that spells a special token, and would become it."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return re.compile(
        "|".join(map(re.escape, sorted(added | set(tokenizer.all_special_tokens), key=len, reverse=True))) or r"(?!)"
    )


def encode_completions(
    prompts: list[str], completions: list[str], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], list[bool]]]:
    """bos, prompt, completion, eos, with the loss on the last two; without a prompt, on everything."""
    encode = partial(tokenizer, add_special_tokens=False, return_attention_mask=False, verbose=False)
    before = encode(prompts)["input_ids"]
    whole = encode([p + c for p, c in zip(prompts, completions, strict=True)])["input_ids"]
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    for prompt, completion, prompt_ids, ids in zip(prompts, completions, before, whole, strict=True):
        if not completion.strip():
            yield [], []
            continue
        if ids[: len(prompt_ids)] != prompt_ids:
            # A token would reach across the border, and the model would learn from a prompt that it is never given.
            ids = prompt_ids + encode(completion)["input_ids"]
        start = len(prompt_ids)
        if ids[:1] != bos:
            ids, start = bos + ids, start + len(bos)
        if ids[-1] != tokenizer.eos_token_id:
            ids = [*ids, tokenizer.eos_token_id]
        start = start if prompt else 0
        yield ids, [False] * start + [True] * (len(ids) - start)
