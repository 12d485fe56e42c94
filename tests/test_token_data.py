"""Token shards as `pretrain_lm` reads them: the blocks, losses and refusals that the texts themselves would give."""

import contextlib
import io
import json
import shutil
from unittest import mock

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from training_runs import command, losses

from hf_models.bpe_tokenizer import train_bpe
from training.language_models import load_tokenizer, tokenizer_fingerprint
from training.packing import pack_documents
from training.pretrain_lm import main
from training.text_data import load_text_dataset
from training.text_pipeline.mixture_inputs import MixArguments, mixture_phases, read_sources
from training.token_data import describe_tokens, is_token_data, load_token_dataset

ARGUMENTS = {
    "size": "1m",
    "config_overrides": json.dumps(
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "num_hidden_layers": 1,
        }
    ),
    "precision": "fp32",
    "block_size": 64,
    "per_device_train_batch_size": 4,
    "max_steps": 2,
    "logging_steps": 1,
    "eval_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tokenizer, another one, and the shards of two sources; `texts` has what is in them."""
    folder = tmp_path_factory.mktemp("inputs")
    texts = load_text_dataset("wikipedia_leads", "test")["text"][:60]
    train_bpe(texts, 400).save_pretrained(folder / "tokenizer")
    train_bpe(texts, 300).save_pretrained(folder / "other_tokenizer")
    for name, part in (("even", texts[::2]), ("odd", texts[1::2])):
        pq.write_table(pa.table({"text": part}), folder / f"{name}.parquet")
    sources = {name: {"documents": str(folder / f"{name}.parquet"), "epochs": 1} for name in ("even", "odd")}
    arguments = MixArguments(sources=sources, tokenizer=str(folder / "tokenizer"), token_shards=4)
    for phase in mixture_phases(arguments, read_sources(arguments), folder / "work", folder / "tokens"):
        for rank in range(phase.tasks):
            phase.steps[0].run(rank=rank, world_size=phase.tasks)
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    text_of = {tuple(tokenizer(text, add_special_tokens=False)["input_ids"]): text for text in texts}
    in_order = [text_of[tuple(row["input_ids"])] for row in rows_of(folder / "tokens")]
    pq.write_table(pa.table({"text": in_order}), folder / "texts.parquet")
    return folder


@pytest.fixture(scope="module")
def tokenizer(inputs):
    return load_tokenizer(str(inputs / "tokenizer"))


def rows_of(tokens):
    return [row for file in sorted(tokens.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def test_shards_stream_in_their_order_with_our_reader_and_without(inputs, tokenizer):
    rows = rows_of(inputs / "tokens")
    assert len(rows) == 60
    for streaming in (False, True):
        theirs = datasets.load_dataset(str(inputs / "tokens"), split="train", streaming=streaming)
        assert list(theirs) == rows
        fingerprint = tokenizer_fingerprint(tokenizer)
        ours = load_token_dataset(str(inputs / "tokens"), "train", "it", fingerprint, streaming)
        assert [row["input_ids"] for row in ours] == [row["input_ids"] for row in rows]


def test_shards_are_described_by_source(inputs):
    assert is_token_data(str(inputs / "tokens"))
    assert not is_token_data(str(inputs / "texts.parquet"))
    assert not is_token_data("wikipedia_leads")
    description = describe_tokens(str(inputs / "tokens"), streaming=False)
    for source in ("even", "odd"):
        mine = [row["input_ids"] for row in rows_of(inputs / "tokens") if row["source"] == source]
        assert description["sources"][source] == {"tokens": sum(map(len, mine)), "documents": 30}


@pytest.mark.parametrize("streaming", [False, True])
def test_blocks_packed_from_shards_equal_those_from_the_texts_in_their_order(inputs, tokenizer, streaming):
    fingerprint = tokenizer_fingerprint(tokenizer)
    shards = load_token_dataset(str(inputs / "tokens"), "train", "it", fingerprint, streaming)
    texts = load_text_dataset(str(inputs / "texts.parquet"), "train", streaming=streaming)
    found = list(pack_documents(shards, tokenizer, 64))
    assert found == list(pack_documents(texts, tokenizer, 64))
    predicted = sum(length - 1 for row in found for length in row["seq_lengths"])
    # Of each document all its tokens and the eos are predicted.
    assert predicted == sum(len(row["input_ids"]) + 1 for row in rows_of(inputs / "tokens"))


def pretrain(inputs, output_dir, **changes):
    """The command, in this process; returns its exit status and the last line on stderr."""
    given = {"dataset": inputs / "tokens", "tokenizer": inputs / "tokenizer", "output_dir": output_dir}
    said, status = io.StringIO(), 0
    words = command("training.pretrain_lm", given | ARGUMENTS | changes)[2:]
    with mock.patch("sys.argv", words), contextlib.redirect_stderr(said):
        try:
            main()
        except SystemExit as ended:
            status = ended.code
    return status, (said.getvalue().strip().splitlines() or [""])[-1]


def test_training_on_shards_gives_the_losses_of_training_on_the_texts(inputs, tmp_path):
    assert pretrain(inputs, tmp_path / "tokens")[0] == 0
    assert pretrain(inputs, tmp_path / "texts", dataset=inputs / "texts.parquet")[0] == 0
    assert losses(tmp_path / "tokens") == losses(tmp_path / "texts")
    train = json.loads((tmp_path / "tokens" / "run.json").read_text())["data"]["train"]
    info = json.loads((inputs / "tokens" / "info.json").read_text())
    assert train["fingerprint"] == info["fingerprint"]
    assert train["tokens"] == info["tokens"]
    assert train["sources"].keys() == {"even", "odd"}


def test_a_stream_of_shards_is_resumed_to_the_bit(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("training.pretrain_lm.SHUFFLED_BLOCKS", 40)  # fewer than an epoch has
    options = {"streaming": True, "save_steps": 2, "max_steps": 4}
    assert pretrain(inputs, tmp_path, **options)[0] == 0
    whole = losses(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-4")
    content = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(content | {"status": "running"}))
    assert pretrain(inputs, tmp_path, **options)[0] == 0
    assert losses(tmp_path) == whole
    assert len(whole) > 4


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tokenizer": "other_tokenizer"}, "is another one"),
        ({"dataset_split": "test"}, "only the split 'train', not 'test'"),
        ({"eval_strategy": "steps"}, "name text to evaluate on with --eval_dataset"),
    ],
)
def test_what_shards_cannot_give_is_refused_in_one_sentence(inputs, tmp_path, changes, sentence):
    changes = {name: inputs / value if name == "tokenizer" else value for name, value in changes.items()}
    status, said = pretrain(inputs, tmp_path / "run", **changes)
    assert status == 2
    assert sentence in said
    assert not (tmp_path / "run").exists()


def test_shards_that_are_missing_or_not_those_that_were_described_are_refused(inputs, tokenizer, tmp_path):
    folder, fingerprint = tmp_path / "tokens", tokenizer_fingerprint(tokenizer)
    shutil.copytree(inputs / "tokens", folder)
    full = sorted(folder.glob("*.parquet"))[0]
    pq.write_table(pq.read_table(full).slice(0, 0), full)
    with pytest.raises(ValueError, match=r"hold \d+ documents, and its info.json says 60"):
        load_token_dataset(str(folder), "train", "it", fingerprint)
    full.unlink()
    with pytest.raises(ValueError, match=r"has 3 of 4 shards: run"):
        load_token_dataset(str(folder), "train", "it", fingerprint)


def test_evaluation_beside_shards_is_on_text(inputs, tmp_path):
    changes = {"eval_strategy": "steps", "eval_dataset": inputs / "texts.parquet", "eval_dataset_split": "train"}
    assert pretrain(inputs, tmp_path, max_steps=1, eval_steps=1, **changes)[0] == 0
    metrics = json.loads((tmp_path / "run.json").read_text())["metrics"]
    assert np.isfinite(metrics["eval_bits_per_byte"])
