"""Preferences in every layout become the same pairs, their tokens are the chat template's, and bad rows are named."""

import json

import pytest
from datasets import Dataset
from preference_runs import pair, write_jsonl

from hf_models.bpe_tokenizer import train_bpe
from training.preference_data import load_preferences, tokenize_pairs

USER, ASSISTANT, SYSTEM = ({"role": role, "content": f"I am the {role}."} for role in ("user", "assistant", "system"))
OTHER = {"role": "assistant", "content": "I am not."}


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([message["content"] for i in range(60) for side in pair(i).values() for message in side] * 3, 320)


def load(tmp_path, rows):
    return load_preferences(str(write_jsonl(tmp_path / "rows.jsonl", rows)), "train")


def test_every_layout_gives_the_same_pairs(tmp_path):
    expected = [pair(i) for i in range(5)]
    whole = [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in expected]
    layouts = {
        "explicit": expected,
        "implicit": whole,
        "prompt_as_string": [
            w | {"prompt": row["prompt"][0]["content"]} for w, row in zip(whole, expected, strict=True)
        ],
        "other_columns": [row | {"score": 1.0, "source": "here"} for row in expected],
    }
    for name, rows in layouts.items():
        assert load(tmp_path / name, rows).to_list() == expected
    Dataset.from_list(expected).to_parquet(tmp_path / "rows.parquet")
    assert load_preferences(str(tmp_path / "rows.parquet"), "train").to_list() == expected


def test_texts_keep_their_prompt_or_are_parted_where_they_begin_to_differ(tmp_path):
    explicit = {"prompt": "One and one is", "chosen": " two.", "rejected": " three."}
    assert load(tmp_path / "explicit", [explicit])[0] == explicit
    implicit = load(tmp_path / "implicit", [{"chosen": "Q: 1+1? A: it is 2", "rejected": "Q: 1+1? A: maybe 3"}])[0]
    assert implicit == {"prompt": "Q: 1+1? A:", "chosen": " it is 2", "rejected": " maybe 3"}


GOOD = {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [OTHER]}


@pytest.mark.parametrize(
    ("bad", "found"),
    [
        (
            {"question": "a", "answer": "b"},
            "has the columns question, answer: preferences need 'chosen' and 'rejected'",
        ),
        (GOOD | {"rejected": [ASSISTANT]}, "equal 'chosen' and 'rejected'"),
        (GOOD | {"chosen": [ASSISTANT | {"content": " "}]}, "message 1 (assistant) is empty"),
        (GOOD | {"chosen": []}, "no messages in 'chosen'"),
        (GOOD | {"prompt": [USER, USER]}, "message 2 has the role 'user' where 'assistant' is expected"),
        (GOOD | {"prompt": [USER, ASSISTANT]}, "a prompt that ends with a message of the assistant"),
        (GOOD | {"prompt": [USER, SYSTEM]}, "message 2 has the role 'system'"),
        (GOOD | {"chosen": [ASSISTANT, USER]}, "does not end with a message of the assistant"),
        (GOOD | {"chosen": [USER]}, "message 2 has the role 'user'"),
        (GOOD | {"chosen": [{"role": "judge", "content": "x"}]}, 'has the role "judge"'),
        ({"chosen": [USER, ASSISTANT], "rejected": [SYSTEM, USER, OTHER]}, "do not begin alike"),
        ({"chosen": [USER], "rejected": [USER, OTHER]}, "only goes on from the other"),
        ({"chosen": "Yes", "rejected": "Yes, no"}, "only goes on from the other"),
        ({"chosen": "a \n", "rejected": "a b"}, "a 'chosen' with nothing but the prompt"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "an empty 'rejected'"),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, "as 'chosen' and 3 as 'rejected'"),
        ({"prompt": [USER], "chosen": "b", "rejected": "c"}, "as 'prompt' where a string is expected"),
    ],
)
def test_a_row_that_is_no_pair_is_named_with_its_line(tmp_path, bad, found):
    with pytest.raises(ValueError, match="line 2") as error:
        load(tmp_path, [GOOD, bad])
    assert found in str(error.value)
    assert "\n" not in str(error.value)


def test_rows_of_parquet_are_named_by_number_and_columns_before_they_are_read(tmp_path):
    Dataset.from_list([GOOD, GOOD | {"rejected": [ASSISTANT]}]).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"rows.parquet \(train\), row 2 has equal"):
        load_preferences(str(tmp_path / "rows.parquet"), "train")
    Dataset.from_list([{"text": "a"}]).to_parquet(tmp_path / "texts.parquet")
    with pytest.raises(ValueError, match=r"texts.parquet has the columns text: preferences need"):
        load_preferences(str(tmp_path / "texts.parquet"), "train")


def test_a_sample_of_another_kind_is_refused_by_its_kind():
    with pytest.raises(ValueError, match="is of text, not preferences"):
        load_preferences("wikipedia_leads", "train")


def test_tokens_of_messages_are_those_of_the_chat_template(tmp_path, tokenizer):
    rows = load(tmp_path, [pair(i) for i in range(5)])
    tokens, counts = tokenize_pairs(rows, tokenizer, 200, cut=True)
    assert counts == {"rows": 5, "truncated": 0, "left_out": 0}
    for row, ids in zip(rows, tokens, strict=True):
        asked = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        assert ids["prompt_ids"] == asked
        for name in ("chosen", "rejected"):
            whole = tokenizer.apply_chat_template(row["prompt"] + row[name])["input_ids"]
            assert ids["prompt_ids"] + ids[f"{name}_ids"] == whole
            assert ids[f"{name}_ids"][-1] == tokenizer.convert_tokens_to_ids("<|end_of_turn|>")


def test_texts_begin_with_bos_and_end_with_eos_once(tmp_path, tokenizer):
    rows = load(tmp_path, [{"prompt": "Rome is", "chosen": " a city.", "rejected": f" it.{tokenizer.eos_token}"}])
    [ids], _ = tokenize_pairs(rows, tokenizer, 200, cut=True)
    decoded = {name: tokenizer.decode(ids[name]) for name in ids}
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    assert decoded == {"prompt_ids": f"{bos}Rome is", "chosen_ids": f" a city.{eos}", "rejected_ids": f" it.{eos}"}


def test_long_pairs_are_cut_or_left_out_and_counted(tmp_path, tokenizer):
    start = {"role": "assistant", "content": "It is a city."}
    short = GOOD
    late = GOOD | {"chosen": [start | {"content": "a " * 60 + "b"}], "rejected": [start | {"content": "a " * 60 + "c"}]}
    long_answer = GOOD | {"chosen": [start | {"content": "city " * 80}]}
    long_prompt = GOOD | {"prompt": [USER | {"content": "city " * 80}]}
    rows = load(tmp_path, [short, late, long_answer, long_prompt])
    cut, counts = tokenize_pairs(rows, tokenizer, 50, cut=True)
    assert counts == {"rows": 4, "truncated": 1, "left_out": 2}  # two answers are the same up to the cut
    assert len(cut[1]["prompt_ids"] + cut[1]["chosen_ids"]) == 50
    assert cut[0] == tokenize_pairs(rows.select([0]), tokenizer, 500, cut=True)[0][0]
    whole, counts = tokenize_pairs(rows, tokenizer, 50, cut=False)
    assert counts == {"rows": 4, "truncated": 0, "left_out": 3}
    assert whole[0] == cut[0]
    for judged in (True, False):
        with pytest.raises(ValueError, match="Of 4 pairs none is left: within 2 tokens"):
            tokenize_pairs(rows, tokenizer, 2, cut=judged)


def test_a_pair_that_spells_a_special_token_is_left_out(tmp_path, tokenizer):
    spelt = GOOD | {"rejected": [OTHER | {"content": f"Done.{tokenizer.eos_token} Ignore this."}]}
    tokens, counts = tokenize_pairs(load(tmp_path, [GOOD, spelt]), tokenizer, 200, cut=True)
    assert (len(tokens), counts["left_out"]) == (1, 1)


def test_messages_need_a_chat_template_and_one_that_takes_them(tmp_path, tokenizer):
    rows = load(tmp_path, [GOOD, GOOD | {"prompt": [SYSTEM, USER]}])
    bare = train_bpe(["some text to train on"] * 50, 270)
    bare.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        tokenize_pairs(rows, bare, 200, cut=True)
    bare.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    with pytest.raises(ValueError, match="refuses row 2 of the data: no system message"):
        tokenize_pairs(rows, bare, 200, cut=True)


def test_line_with_broken_json_is_named(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [GOOD])
    path.write_text(json.dumps(GOOD) + "\n{broken\n")
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2 is not JSON"):
        load_preferences(str(path), "train")
