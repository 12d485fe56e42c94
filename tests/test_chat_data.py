"""Conversations: every layout is read and checked alike, and the loss is on what the assistant writes, no more."""

import collections
import gzip
import json
import re

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import AddedToken
from trl.chat_template_utils import gemma_chat_template, qwen2_5_chat_template

from hf_models.bpe_tokenizer import train_bpe
from training.chat_data import describe_rows, load_conversations, tokenize_conversations
from training.dataset_source import SAMPLE_DATA, sample_info
from training.sample_data.build_instructions import split_sentences

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
SHORT = [(USER, "What is a river?"), (ASSISTANT, "Water that flows — to the sea 🌊.")]
LONG = [(SYSTEM, "Be brief."), *SHORT, (USER, "And a lake?"), (ASSISTANT, "Water that stays.")]
UNMARKED = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"


@pytest.fixture(autouse=True)
def _cache_in_a_temporary_folder(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def small_tokenizer(style="byte_level"):
    texts = [text for _, text in LONG] * 4
    return train_bpe(texts, 310 if style == "byte_level" else 340, style)


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


def messages(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def write_lines(path, *rows):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return str(path)


def load(path, *rows, **options):
    return load_conversations(write_lines(path, *rows), "train", **options)


def tokenize(tokenizer, *rows, max_length=512, **options):
    return tokenize_conversations(datasets.Dataset.from_list(list(rows)), tokenizer, max_length, **options)


def trained_text(tokenizer, row):
    """What the loss is taken on, as text; the other labels are all -100."""
    assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))
    return tokenizer.decode([label for label in row["labels"] if label != -100])


# --- Reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.jsonl.gz"])
def test_every_kind_of_file_gives_the_same_conversations(name, tmp_path):
    rows = [{"id": i, "messages": messages(*turns), "score": 1.5} for i, turns in enumerate((SHORT, LONG))]
    path, lines = tmp_path / name, "\n".join(map(json.dumps, rows))
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        text = json.dumps(rows, indent=1) if name == "a.json" else lines
        path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    read = load_conversations(str(path), "train")
    assert read.column_names == ["messages"]
    assert read["messages"][:] == [messages(*SHORT), messages(*LONG)]


def test_sharegpt_becomes_messages(tmp_path):
    names = {USER: "human", ASSISTANT: "gpt", SYSTEM: "system"}
    rows = [
        {"conversations": [{"from": names[role], "value": content, "weight": None} for role, content in LONG]},
        {"conversations": [{"from": role, "value": content} for role, content in SHORT]},
    ]
    read = load(tmp_path / "a.jsonl", *rows)
    assert list(read) == [{"messages": messages(*LONG)}, {"messages": messages(*SHORT)}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2 + 2 =", "completion": " 4"},
        {"prompt": messages(*SHORT[:1]), "completion": messages(*SHORT[1:])},
        {"text": "A whole text."},
    ],
)
def test_other_layouts_keep_their_columns_only(row, tmp_path):
    assert list(load(tmp_path / "a.jsonl", row | {"id": 7})) == [row]


def test_messages_come_before_other_columns_and_a_named_column_before_messages(tmp_path):
    row = {"text": "rendered", "prompt": "What?", "messages": messages(*SHORT), "body": "A text."}
    assert load(tmp_path / "a.jsonl", row).column_names == ["messages"]
    assert list(load(tmp_path / "b.jsonl", row, text_column="body")) == [{"text": "A text."}]


def test_folder_is_split_and_sliced(tmp_path):
    for name, count in (("train", 4), ("test", 1)):
        write_lines(tmp_path / f"{name}.jsonl", *[{"messages": messages(*SHORT)}] * count)
    sizes = [len(load_conversations(str(tmp_path), split)) for split in ("train", "train[:50%]", "test", "train+test")]
    assert sizes == [4, 2, 1, 5]


GOOD = {"messages": messages(*SHORT)}
REFUSED_ROWS = {
    "no messages": ({"messages": []}, r"a\.jsonl, line 2 has no messages in 'messages'"),
    "null": ({"messages": None}, r"line 2 has null in 'messages' where a list of messages is expected"),
    "string": ({"messages": "hello"}, r'line 2 has "hello" in \'messages\' where a list'),
    "other column": ({"text": "hello"}, r"line 2 has no field 'messages', only text"),
    "no message": ({"messages": ["hello"]}, r'line 2, message 1 is "hello" where \{role, content\} is expected'),
    "tool": ({"messages": messages(*SHORT, ("tool", "4"))}, r'message 3 has the role "tool": expected one of system'),
    "no role": ({"messages": [{"content": "a"}]}, r"message 1 has the role null: expected one of"),
    "late system": ({"messages": messages(*SHORT, (SYSTEM, "a"))}, r"message 3 has the role 'system' where 'user' is"),
    "assistant first": ({"messages": messages(*SHORT[1:])}, r"message 1 has the role 'assistant' where 'user' is"),
    "user twice": ({"messages": messages(*SHORT[:1] * 2)}, r"message 2 has the role 'user' where 'assistant' is"),
    "after system": (
        {"messages": messages(*LONG[:1], *SHORT[1:])},
        r"message 2 has the role 'assistant' where 'user' is expected",
    ),
    "blank": ({"messages": messages(SHORT[0], (ASSISTANT, " \n"))}, r"line 2, message 2 \(assistant\) is empty"),
    "no content": ({"messages": [*messages(SHORT[0]), {"role": ASSISTANT}]}, r"message 2 \(assistant\) has null as"),
    "blocks": (
        {"messages": [{"role": USER, "content": [{"type": "text", "text": "a"}]}]},
        r"message 1 \(user\) has \[\{\"type\".* as content: expected a string",
    ),
    "no answer": ({"messages": messages(*SHORT[:1])}, r"line 2 has no message of the role 'assistant'"),
}


@pytest.mark.parametrize("fault", REFUSED_ROWS)
def test_row_that_is_no_conversation_is_refused_with_its_place(fault, tmp_path):
    row, sentence = REFUSED_ROWS[fault]
    with pytest.raises(ValueError, match=sentence):
        load(tmp_path / "a.jsonl", GOOD, row)


PAIR = {"prompt": "2 + 2 =", "completion": "4"}
CHAT_PAIR = {"prompt": messages(*SHORT[:1]), "completion": messages(*SHORT[1:])}
REFUSED_PAIRS = {
    "empty completion": (PAIR, PAIR | {"completion": " "}, r"line 2 has an empty 'completion'"),
    "number": (PAIR, PAIR | {"completion": 4}, r"as 'prompt' and 4 as 'completion': expected two strings or two lists"),
    "mixed": (PAIR, PAIR | {"completion": CHAT_PAIR["completion"]}, "expected two strings or two lists"),
    "both kinds": (PAIR, CHAT_PAIR, "line 2 has a prompt that is a list of messages, unlike the rows before"),
    "two answers": (
        CHAT_PAIR,
        CHAT_PAIR | {"completion": messages(*LONG[2:])},
        r"'completion' of assistant, user, assistant: expected one message of the role 'assistant'",
    ),
    "order": (CHAT_PAIR, {"prompt": messages(*SHORT), "completion": messages(*SHORT[1:])}, "message 3 has the role"),
    "empty list": (CHAT_PAIR, CHAT_PAIR | {"completion": []}, "line 2 has no messages in 'completion'"),
}


@pytest.mark.parametrize("fault", REFUSED_PAIRS)
def test_prompt_and_completion_that_do_not_fit_are_refused(fault, tmp_path):
    *rows, sentence = REFUSED_PAIRS[fault]
    with pytest.raises(ValueError, match=sentence):
        load(tmp_path / "a.jsonl", *rows)


def test_refusal_names_rows_of_parquet_and_of_arrays_too(tmp_path):
    rows = [GOOD, GOOD, {"messages": messages(*SHORT[1:])}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    for name in ("a.parquet", "a.json"):
        with pytest.raises(ValueError, match=re.escape(name) + ", row 3, message 1 has the role 'assistant'"):
            load_conversations(str(tmp_path / name), "train")


def test_refusal_names_rows_of_the_hub_too(monkeypatch):
    rows = datasets.Dataset.from_list([GOOD, {"messages": messages(*SHORT[:1])}])
    monkeypatch.setattr("training.chat_data.load_from_hub", lambda *args, **options: rows)
    with pytest.raises(ValueError, match=r"owner/name \(train\), row 2 has no message of the role 'assistant'"):
        load_conversations("owner/name", "train")


def test_unknown_columns_are_told_with_those_that_are_needed(tmp_path):
    sentence = (
        r"has the columns instruction, output: conversations need 'messages' .*'prompt' and 'completion', or 'text'"
    )
    with pytest.raises(ValueError, match=sentence):
        load(tmp_path / "a.jsonl", {"instruction": "a", "output": "b"})
    pq.write_table(pa.Table.from_pylist([{"instruction": "a", "output": "b"}]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=sentence):
        load_conversations(str(tmp_path / "a.parquet"), "train")


@pytest.mark.parametrize(
    ("name", "contents", "sentence"),
    [
        ("empty.jsonl", b"", r"is empty \(0 bytes\)"),
        ("none.json", b"[]", "has no rows"),
        ("cut.json", b'[{"messages": ', "is not JSON"),
        ("cut.jsonl", b'{"messages": ', "line 1 is not JSON"),
        ("latin1.jsonl", '{"text": "é"}'.encode("latin-1"), "is not UTF-8 at line 1"),
        ("fake.parquet", b"messages", "is not a parquet file"),
        ("text.txt", b"A text.", r"\(\.txt\): give \.parquet, \.jsonl or \.json files"),
    ],
)
def test_file_that_cannot_be_read_is_told(name, contents, sentence, tmp_path):
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(ValueError, match=sentence):
        load_conversations(str(tmp_path / name), "train")


def test_sample_of_another_kind_is_told_with_ours():
    with pytest.raises(ValueError, match=r"'wikipedia_leads' is of text, not chat: take .*instructions"):
        load_conversations("wikipedia_leads", "train")


def test_fingerprint_tells_contents_order_and_borders_apart():
    rows = [messages((USER, "ab"), (ASSISTANT, "c")), messages((USER, "a"), (ASSISTANT, "bc"))]

    def fingerprint(*conversations):
        table = datasets.Dataset.from_list([{"messages": conversation} for conversation in conversations])
        return describe_rows(table, "a", "train")["fingerprint"]

    assert fingerprint(*rows) == fingerprint(*rows)
    assert len({fingerprint(*rows), fingerprint(*rows[::-1]), fingerprint(rows[0]), fingerprint(rows[1])}) == 4


# --- Tokens and labels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["byte_level", "llama"])
@pytest.mark.parametrize("turns", [SHORT, LONG])
def test_loss_is_on_the_assistants_turns_and_their_ends(turns, style):
    tokenizer = small_tokenizer(style)
    rows, counts = tokenize(tokenizer, {"messages": messages(*turns)})
    # By hand: each turn is the role's mark, the content and the end of turn, after one bos.
    expected_ids, expected_labels = [tokenizer.bos_token_id], [-100]
    for role, content in turns:
        mark = tokenizer.convert_tokens_to_ids(f"<|{role}|>")
        ids = [*tokenizer(content, add_special_tokens=False)["input_ids"], tokenizer.eot_token_id]
        expected_ids += [mark, *ids]
        expected_labels += [-100, *(ids if role == ASSISTANT else [-100] * len(ids))]
    if style == "byte_level":  # LLaMA's style writes a space before a text that stands alone, and after a mark
        assert (rows[0]["input_ids"], rows[0]["labels"]) == (expected_ids, expected_labels)
    said = "".join(content + "<|end_of_turn|>" for role, content in turns if role == ASSISTANT)
    assert trained_text(tokenizer, rows[0]).replace("> ", ">") == said
    assert rows[0]["input_ids"].count(tokenizer.bos_token_id) == 1
    assert counts == {"rows": 1, "truncated": 0, "left_out": 0}


def test_loss_on_everything_where_asked_for(tokenizer):
    rows, _ = tokenize(tokenizer, {"messages": messages(*LONG)}, assistant_only_loss=False)
    assert rows[0]["labels"] == rows[0]["input_ids"]


def test_completion_of_messages_equals_the_last_turn(tokenizer):
    pair, _ = tokenize(tokenizer, {"prompt": messages(*LONG[:-1]), "completion": messages(*LONG[-1:])})
    whole, _ = tokenize(tokenizer, {"messages": messages(*LONG)})
    assert pair[0]["input_ids"] == whole[0]["input_ids"]
    assert trained_text(tokenizer, pair[0]) == "Water that stays.<|end_of_turn|>"


@pytest.mark.parametrize(
    ("prompt", "completion"), [("What is a river?", " Water."), ("A ri", "ver"), ("", "Water."), ("<|bos|>A", " lake")]
)
def test_completion_of_text_is_what_follows_the_prompt_as_it_is_given(prompt, completion, tokenizer):
    rows, _ = tokenize(tokenizer, {"prompt": prompt, "completion": completion})
    prompt_ids = tokenizer(prompt.removeprefix("<|bos|>"), add_special_tokens=False)["input_ids"]
    begin = 1 + len(prompt_ids)
    assert rows[0]["input_ids"][:begin] == [tokenizer.bos_token_id, *prompt_ids]
    assert rows[0]["labels"][1:begin] == [-100] * len(prompt_ids)
    learnt = rows[0]["labels"][begin:]
    assert learnt == rows[0]["input_ids"][begin:]
    assert tokenizer.decode(learnt) == completion + "<|eos|>"


def test_text_is_learnt_whole_with_one_beginning_and_end(tokenizer):
    rows, counts = tokenize(
        tokenizer, {"text": "Water."}, {"text": "<|bos|><|user|>Water.<|end_of_turn|><|eos|>"}, {"text": " "}
    )
    ids = tokenizer("Water.", add_special_tokens=False)["input_ids"]
    assert rows[0]["input_ids"] == rows[0]["labels"] == [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    assert collections.Counter(rows[1]["input_ids"])[tokenizer.bos_token_id] == 1
    assert rows[1]["input_ids"][-2:] == [tokenizer.eot_token_id, tokenizer.eos_token_id]
    assert counts == {"rows": 3, "truncated": 0, "left_out": 1}


def test_long_rows_are_cut_at_their_end_and_counted(tokenizer):
    conversations = [{"messages": messages(*turns)} for turns in (SHORT, LONG, [(USER, "river " * 50), SHORT[1]])]
    whole, _ = tokenize(tokenizer, *conversations)
    length = len(whole[0]["input_ids"])
    assert length < min(len(whole[1]["input_ids"]), len(tokenizer("river " * 50)["input_ids"]))
    rows, counts = tokenize(tokenizer, *conversations, max_length=length)
    # The first fits, the second keeps its beginning, of the third the question alone would be left.
    assert list(rows) == [whole[0], {name: ids[:length] for name, ids in whole[1].items()}]
    assert counts == {"rows": 3, "truncated": 1, "left_out": 1}


def test_rows_of_which_nothing_is_left_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"Of 2 conversations none is left: within 5 tokens.*--max_length"):
        tokenize(tokenizer, *[{"messages": messages(*LONG)}] * 2, max_length=5)


def test_messages_that_spell_special_tokens_are_left_out(tokenizer):
    """Rendered into the template, they would be those tokens. Tags are no special tokens: they are to be learnt."""
    spelled = messages((USER, "Say <|end_of_turn|><|assistant|>!"), (ASSISTANT, "No."))
    tagged = messages((USER, "2 + 2?"), (ASSISTANT, "<think>2 + 2 = 4</think><answer>4</answer>"))
    rows, counts = tokenize(tokenizer, {"messages": spelled}, {"messages": tagged})
    assert counts == {"rows": 2, "truncated": 0, "left_out": 1}
    assert trained_text(tokenizer, rows[0]) == tagged[1]["content"] + "<|end_of_turn|>"
    _, counts = tokenize(tokenizer, {"prompt": spelled[:1], "completion": spelled[1:]}, CHAT_PAIR)
    assert counts["left_out"] == 1


def test_same_rows_are_tokenised_once(tmp_path):
    rows, tokenizer = load(tmp_path / "a.jsonl", GOOD), small_tokenizer()
    files = [tokenize_conversations(rows, tokenizer, length)[0].cache_files for length in (64, 64, 32)]
    files.append(tokenize_conversations(rows, small_tokenizer(), 64)[0].cache_files)
    assert files[0] == files[1] == files[3] != files[2]


def with_template(template, *special_tokens):
    tokenizer = small_tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=True) for token in special_tokens], special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def test_template_without_marks_that_trl_knows_is_marked_by_it():
    tokenizer = with_template(qwen2_5_chat_template, "<|im_start|>", "<|im_end|>")
    rows, _ = tokenize(tokenizer, {"messages": messages(*LONG)})
    # TRL's marks take in the line breaks that Qwen's template has before a content and after its end.
    said = "".join(f"\n{content}<|im_end|>\n" for role, content in LONG if role == ASSISTANT)
    assert trained_text(tokenizer, rows[0]) == said


def test_template_without_marks_that_nobody_knows_is_refused_with_the_mend():
    tokenizer = with_template(UNMARKED)
    with pytest.raises(
        ValueError, match=r"generation %\}: give --chat_template_path .* or --assistant_only_loss false"
    ):
        tokenize(tokenizer, GOOD)
    rows, _ = tokenize(tokenizer, GOOD, assistant_only_loss=False)
    assert trained_text(tokenizer, rows[0]) == "".join(f"{role}: {content}\n" for role, content in SHORT)
    # A completion is found without marks.
    rows, _ = tokenize(tokenizer, {"prompt": messages(*SHORT[:1]), "completion": messages(*SHORT[1:])})
    assert trained_text(tokenizer, rows[0]).endswith(SHORT[1][1] + "\n")


def test_missing_template_is_told():
    with pytest.raises(ValueError, match=r"has no chat template, which conversations need: give --chat_template_path"):
        tokenize(with_template(None), GOOD)


def test_marks_without_the_end_of_turn_are_warned_of():
    template = "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}<|eos|>{% endfor %}"
    with pytest.warns(UserWarning, match="the model may not learn to stop"):
        tokenize(with_template(template), GOOD)


def test_conversation_that_the_template_refuses_is_told_by_its_row():
    """Gemma's first templates know no system message."""
    tokenizer = with_template(gemma_chat_template, "<start_of_turn>", "<end_of_turn>")
    with pytest.raises(ValueError, match=r"The chat template refuses row 2 of the data: .*[Ss]ystem"):
        tokenize(tokenizer, GOOD, {"messages": messages(*LONG)})


# --- The sample ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sample():
    return {
        split: pq.read_table(SAMPLE_DATA / f"instructions/{split}.parquet").to_pylist() for split in ("train", "test")
    }


def test_sample_is_made_of_conversations_and_described():
    rows = load_conversations("instructions", "test")
    description = describe_rows(rows, "instructions", "test")
    assert description["rows"] == len(rows) > 400
    assert description["info"]["license"] == "cc-by-sa-4.0"
    assert "MIT" in sample_info(SAMPLE_DATA / "instructions")["attribution"]
    assert all(row["messages"][-1]["role"] == ASSISTANT for row in rows)


def test_sample_answers_are_the_openings_of_leads_of_the_same_split(sample):
    leads = {}
    for split in sample:
        table = pq.read_table(SAMPLE_DATA / f"wikipedia_leads/{split}.parquet", columns=["text"]).to_pylist()
        leads[split] = collections.defaultdict(list)
        for row in table:
            text = " ".join(row["text"].split())
            leads[split][text[:12]].append(text)
    for split, rows in sample.items():
        other = "train" if split == "test" else "test"
        for row in rows:
            if row["source"] == "wikipedia_leads":
                answer = next(message["content"] for message in row["messages"] if message["role"] == ASSISTANT)
                assert any(text.startswith(answer) for text in leads[split][answer[:12]])
                assert not any(text.startswith(answer) for text in leads[other][answer[:12]])
                assert len(answer.split()) <= 60


def test_sample_shares_no_conversation_between_its_splits(sample):
    train, test = ({json.dumps(row["messages"]) for row in sample[split]} for split in ("train", "test"))
    assert not train & test
    assert len(train) == len(sample["train"])


def test_sample_keeps_to_the_number_of_sentences_that_is_asked_for(sample):
    asked = {"Answer in one sentence.": 1, "Answer in two sentences.": 2}
    seen = collections.Counter()
    for row in sample["train"]:
        said = row["messages"][0]["content"]
        if said in asked:
            seen[said] += 1
            assert len(split_sentences(row["messages"][2]["content"])) == asked[said]
    assert min(seen.values()) > 100


def test_sample_holds_no_addresses_or_long_numbers_of_the_people_who_chatted(sample):
    private = re.compile(r"@|https?:|\bwww\.\w|\w\.(?:com|org|net|edu)\b|\d{4}|\d{3}[-. ]\d{3}")
    texts = [m["content"] for rows in sample.values() for r in rows if r["source"] == "chitchat" for m in r["messages"]]
    assert len(texts) > 4000
    assert not [text for text in texts if private.search(text)]


def test_sentences_do_not_end_after_abbreviations_or_initials():
    sentences = [
        "Dr. J. R. R. Smith (c. 1900) left the U.S. Army in St. Louis.",
        'He was called "Jr. the Great."',
        "Why?",
    ]
    assert split_sentences(" ".join(sentences)) == sentences
