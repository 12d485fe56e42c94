"""Tokenizers: ids against tiktoken and sentencepiece, round trips, the chat template's mask, saving, bad input."""

import random
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from hf_models.bpe_tokenizer import (
    ANSWER_TAGS,
    BOS_TOKEN,
    END_OF_TURN_TOKEN,
    ROLE_TOKENS,
    SPLIT_PATTERNS,
    THINK_TAGS,
    from_sentencepiece,
    train_bpe,
)
from hf_models.bpe_tokenizer.special_tokens import ADDED_TOKENS
from training.text_data import iterate_texts, load_text_dataset

NUMBERS = ["".join(str(n) for n in range(start, start + 200)) for start in range(0, 3000, 7)]
FRAGMENTS = [
    *(
        " ",
        "  ",
        "    ",
        "\n",
        "\r\n",
        "\n\n\n",
        "\t",
        "\0",
        "\x01",
        "\x1c",
        "\x7f",
        "\x85",
        "\u00a0",
        "\u2028",
        "\u200b",
    ),
    *("'s", "'LL", "'ſ", "don't", "0", "12", "999", "2024", "123456789", "１", "٣", "½", "a", "B", "the", "aa", "ab"),
    *("é", "e\u0301", "中", "の", "ß", "İ", "ǅ", "👍🏽", "\U000e0fff", "\U0010ffff", "\u0378", "!", "...", "_", "-"),
]
ODD_TEXTS = [
    "",
    " ",
    "  ",
    " a ",
    "\n",
    "a\n",
    "\n a",
    "\0",
    "\t\t ",
    "\uffff",
    "\U0010ffff",
    "a\r\nb",
    "x" * 30_000,
]


def random_texts(count: int, seed: int) -> list[str]:
    """Odd fragments joined, and characters of the whole of Unicode (surrogates cannot be encoded)."""
    rng = random.Random(seed)
    fragments = ["".join(rng.choices(FRAGMENTS, k=rng.randint(0, 30))) for _ in range(count)]
    anything = [rng.choice((range(0xD800), range(0xE000, 0x110000))) for _ in range(20 * count)]
    characters = [chr(rng.choice(choices)) for choices in anything]
    return fragments + ["".join(characters[i : i + 20]) for i in range(0, len(characters), 20)]


@pytest.fixture(scope="module")
def train_texts():
    return list(iterate_texts(load_text_dataset("wikipedia_leads", "train[:2000]")))


@pytest.fixture(scope="module")
def held_out_texts():
    return list(iterate_texts(load_text_dataset("wikipedia_leads", "test")))


@pytest.fixture(scope="module", params=["byte_level", "llama"])
def tokenizer(request, train_texts):
    return train_bpe(train_texts, vocab_size=2000, style=request.param)


def ids_of(tokenizer, texts):
    return tokenizer(texts, add_special_tokens=False).input_ids


@pytest.mark.parametrize("pattern", SPLIT_PATTERNS)
def test_byte_level_ids_equal_tiktokens(pattern, train_texts, held_out_texts):
    """Also for merges of digits, which small vocabularies of prose do not have."""
    tokenizer = train_bpe(train_texts + NUMBERS, vocab_size=4000, pattern=pattern)
    trained = len(tokenizer) - len(ADDED_TOKENS)
    byte_of = {name: bytes([byte]) for byte, name in enumerate(tokenizer.convert_ids_to_tokens(range(256)))}
    names = tokenizer.convert_ids_to_tokens(range(trained))
    ranks = {b"".join(byte_of[character] for character in name): rank for rank, name in enumerate(names)}
    assert set(byte_of) == set(pre_tokenizers.ByteLevel.alphabet())
    reference = tiktoken.Encoding(
        "reference", pat_str=SPLIT_PATTERNS[pattern], mergeable_ranks=ranks, special_tokens={}
    )

    texts = held_out_texts + random_texts(3000, seed=0)
    assert ids_of(tokenizer, texts) == reference.encode_batch(texts)
    longest_number = max(len(name) for name in names if name.isdecimal())
    assert longest_number == {"qwen2": 1, "llama3": 3}.get(pattern, longest_number)
    assert pattern != "gpt2" or longest_number > 3


def test_every_string_round_trips(tokenizer, held_out_texts):
    texts = held_out_texts + ODD_TEXTS + random_texts(2000, seed=1)
    if tokenizer.unk_token:  # SentencePiece writes spaces as this character, so it comes back as one.
        texts = [text.replace("▁", "") for text in texts]
    assert tokenizer.batch_decode(ids_of(tokenizer, texts)) == texts


def test_text_of_an_unseen_script_falls_back_to_bytes(tokenizer):
    text = "ᚠᛇᚻ"
    (ids,) = ids_of(tokenizer, [text])
    assert len(ids) - len(ids_of(tokenizer, ["a"])[0]) + 1 >= len(text.encode())
    assert tokenizer.unk_token_id not in ids


def test_digits_stand_alone(tokenizer):
    tokens = tokenizer.tokenize("In 1984 and 2024")
    assert [token for token in tokens if any(character.isdigit() for character in token)] == list("19842024")


def test_vocabulary_has_the_size_asked_for_with_added_tokens_last(tokenizer):
    assert len(tokenizer) == 2000
    assert tokenizer.convert_ids_to_tokens(range(2000 - len(ADDED_TOKENS), 2000)) == [
        str(t.content) for t in ADDED_TOKENS
    ]


def test_pad_eos_and_end_of_turn_differ(tokenizer):
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.eot_token_id}) == 4


def test_bos_comes_first_once(tokenizer):
    plain, other = ids_of(tokenizer, ["A text.", "Another."])
    assert tokenizer("A text.").input_ids == [tokenizer.bos_token_id, *plain]
    assert tokenizer("A text.", "Another.").input_ids == [tokenizer.bos_token_id, *plain, *other]


def test_skipping_special_tokens_keeps_the_tags_that_rewards_read(tokenizer):
    text = f"{BOS_TOKEN}{ROLE_TOKENS[2]}<think>sum</think><answer>4</answer>{END_OF_TURN_TOKEN}"
    (ids,) = ids_of(tokenizer, [text])
    kept = tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "")
    assert kept == "<think>sum</think><answer>4</answer>"
    assert all(tag in tokenizer.convert_ids_to_tokens(ids) for tag in (*THINK_TAGS, *ANSWER_TAGS))


def test_saved_folder_opens_with_auto_tokenizer(tokenizer, tmp_path, held_out_texts):
    tokenizer.save_pretrained(tmp_path)
    opened = AutoTokenizer.from_pretrained(tmp_path)
    texts = held_out_texts[:50] + ODD_TEXTS
    assert opened(texts).input_ids == tokenizer(texts).input_ids
    assert set(opened("a")) == {"input_ids", "attention_mask"}
    assert (opened.eot_token, opened.eot_token_id) == (END_OF_TURN_TOKEN, tokenizer.eot_token_id)
    assert opened.special_tokens_map == tokenizer.special_tokens_map
    assert (
        set(opened.all_special_ids)
        == set(tokenizer.all_special_ids)
        >= set(ids_of(tokenizer, ["".join(ROLE_TOKENS)])[0])
    )
    assert opened.chat_template == tokenizer.chat_template


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Café 👍🏽?"},
    {"role": "assistant", "content": "<think>hm, é中</think> yes\n"},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Quite."},
]


def test_assistant_mask_covers_content_and_end_of_turn_only(tokenizer):
    chat = tokenizer.apply_chat_template(MESSAGES, return_assistant_tokens_mask=True, return_dict=True)
    learnt = [i for i, in_mask in zip(chat["input_ids"], chat["assistant_masks"], strict=True) if in_mask]
    answers = [message["content"] for message in MESSAGES if message["role"] == "assistant"]
    assert learnt == [i for ids in ids_of(tokenizer, answers) for i in (*ids, tokenizer.eot_token_id)]
    assert chat["input_ids"].count(tokenizer.bos_token_id) == 1
    assert chat["input_ids"][0] == tokenizer.bos_token_id


def test_generation_prompt_is_what_precedes_an_answer(tokenizer):
    prompt = tokenizer.apply_chat_template(MESSAGES[:2], add_generation_prompt=True, return_dict=True)["input_ids"]
    whole = tokenizer.apply_chat_template(MESSAGES[:3], return_dict=True)["input_ids"]
    assert whole[: len(prompt)] == prompt
    assert whole[len(prompt) :] == [*ids_of(tokenizer, [MESSAGES[2]["content"]])[0], tokenizer.eot_token_id]


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([{"role": "tool", "content": "x"}], "role 'tool'"),
        ([{"role": "user", "content": ["x"]}], "content that is no text"),
        ([{"role": "user", "content": "x"}, {"role": "system", "content": "x"}], "can only be the first"),
    ],
)
def test_chat_template_refuses_what_it_cannot_render(tokenizer, messages, sentence):
    with pytest.raises(Exception, match=sentence):
        tokenizer.apply_chat_template(messages)


def test_training_is_deterministic_and_blind_to_cuts_of_long_texts(train_texts):
    as_documents = train_bpe(train_texts, 1500)
    as_one = train_bpe(["\n\n".join(train_texts)], 1500)
    assert train_bpe(iter(train_texts), 1500).get_vocab() == as_documents.get_vocab()
    held_out = " ".join(train_texts[:50])
    assert len(as_one.tokenize(held_out)) == pytest.approx(len(as_documents.tokenize(held_out)), rel=0.01)


@pytest.mark.parametrize("style", ["byte_level", "llama"])
def test_vocab_size_is_refused_with_the_size_that_would_do(style):
    texts = ["the cat sat on the mat"]
    with pytest.raises(ValueError, match=r"too small.* ask for (\d+) or more") as too_small:
        train_bpe(texts, 200, style=style)
    smallest = int(str(too_small.value).split("ask for ")[1].split()[0])
    assert len(train_bpe(texts, smallest, style=style)) == smallest
    with pytest.raises(ValueError, match="too small"):
        train_bpe(texts, smallest - 1, style=style)

    with pytest.raises(ValueError, match=r"too little .* makes (\d+) the largest") as too_large:
        train_bpe(texts, 5000, style=style)
    largest = int(str(too_large.value).split("makes ")[1].split()[0])
    assert len(train_bpe(texts, largest, style=style)) == largest
    with pytest.raises(ValueError, match="too little"):
        train_bpe(texts, largest + 1, style=style)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"texts": []}, "no training text"),
        ({"texts": ["", " \n"]}, "no training text"),
        ({"texts": "one string"}, "one string"),
        ({"style": "wordpiece"}, "'byte_level' or 'llama'"),
        ({"pattern": "nanochat"}, "'qwen2', 'llama3', 'gpt2'"),
    ],
)
def test_bad_arguments_are_told_in_a_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        train_bpe(**{"texts": ["some text"], "vocab_size": 300} | arguments)


def train_sentencepiece(folder: Path, texts: list[str], **options) -> Path:
    settings = {"model_type": "bpe", "vocab_size": 1500, "normalization_rule_name": "identity", "minloglevel": 2}
    lines = [line for text in texts for line in text.split("\n")]
    # Runs of one or two letters: their pieces can be made of several pairs.
    lines += ["a" * n + " " + "ab" * n + "-" * n + " " * n for n in range(1, 30)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "reference"), **settings | options
    )
    return folder / "reference.model"


def test_llama_style_compresses_as_sentencepiece_does(tmp_path, train_texts, held_out_texts):
    ours = train_bpe(train_texts, 2000, style="llama")
    settings = {"byte_fallback": True, "split_digits": True, "remove_extra_whitespaces": False}
    model_file = train_sentencepiece(tmp_path, train_texts, vocab_size=2000, character_coverage=1.0, **settings)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    tokens = sum(map(len, reference.encode(held_out_texts)))
    assert sum(map(len, ids_of(ours, held_out_texts))) == pytest.approx(tokens, rel=0.02)


@pytest.mark.parametrize("byte_fallback", [True, False])
@pytest.mark.parametrize("add_dummy_prefix", [True, False])
@pytest.mark.parametrize("remove_extra_whitespaces", [True, False])
def test_imported_ids_equal_sentencepieces(
    byte_fallback, add_dummy_prefix, remove_extra_whitespaces, tmp_path, train_texts, held_out_texts
):
    model_file = train_sentencepiece(
        tmp_path,
        train_texts[:700],
        byte_fallback=byte_fallback,
        add_dummy_prefix=add_dummy_prefix,
        remove_extra_whitespaces=remove_extra_whitespaces,
    )
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    tokenizer = from_sentencepiece(model_file)
    rng = random.Random(2)
    runs = ["".join(rng.choices("aab- ▁", k=rng.randint(0, 40))) for _ in range(1000)]
    texts = held_out_texts + ODD_TEXTS + random_texts(1000, seed=3) + runs
    assert ids_of(tokenizer, texts) == reference.encode(texts)
    assert tokenizer("a").input_ids == [reference.bos_id(), *reference.encode("a")]
    assert len(tokenizer) == reference.vocab_size()
    assert (tokenizer.eos_token_id, tokenizer.unk_token_id) == (reference.eos_id(), reference.unk_id())
    assert tokenizer.decode(reference.encode("A cat.")) == "A cat."


def test_imported_tokenizer_survives_saving(tmp_path, train_texts, held_out_texts):
    tokenizer = from_sentencepiece(train_sentencepiece(tmp_path, train_texts[:300], byte_fallback=True))
    tokenizer.save_pretrained(tmp_path / "saved")
    opened = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert opened(held_out_texts).input_ids == tokenizer(held_out_texts).input_ids


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"model_type": "unigram"}, "not BPE"),
        ({"normalization_rule_name": "nmt_nfkc"}, r"normalizes text \(nmt_nfkc\)"),
        ({"user_defined_symbols": ["<sep>"]}, "user-defined symbols"),
        ({"treat_whitespace_as_suffix": True}, "suffix"),
    ],
)
def test_models_that_cannot_be_reproduced_are_refused(options, sentence, tmp_path, train_texts):
    model_file = train_sentencepiece(tmp_path, train_texts[:200], **{"vocab_size": 400} | options)
    with pytest.raises(ValueError, match=f"{sentence}.*identity"):
        from_sentencepiece(model_file)


def test_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "notes.model").write_text("some notes", encoding="utf-8")
    with pytest.raises(ValueError, match=r"notes\.model is not a SentencePiece model"):
        from_sentencepiece(tmp_path / "notes.model")
