"""Packing loses no token, predicts each once, and keeps documents apart."""

import copy

import pytest
import torch
from datasets import Dataset

from hf_models.bpe_tokenizer import train_bpe
from hf_models.llama_style import LlamaStyleConfig, LlamaStyleForCausalLM
from training.packing import PackedBlockCollator, pack_documents
from training.text_data import load_text_dataset

BLOCK = 32


@pytest.fixture(scope="module")
def texts():
    return load_text_dataset("wikipedia_leads", "test").select(range(40))


@pytest.fixture(scope="module")
def tokenizer(texts):
    return train_bpe(texts["text"], 400)


def documents_of(texts, tokenizer):
    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    return [bos + tokenizer(text, add_special_tokens=False)["input_ids"] + eos for text in texts["text"]]


def test_every_token_after_a_documents_first_is_predicted_exactly_once(texts, tokenizer):
    packed = pack_documents(texts, tokenizer, BLOCK)
    batch = PackedBlockCollator(BLOCK, tokenizer.pad_token_id)(list(packed))
    predicted = batch["labels"][batch["labels"] != -100]
    expected = torch.tensor([token for document in documents_of(texts, tokenizer) for token in document[1:]])
    assert torch.equal(predicted.sort().values, expected.sort().values)
    # What is shifted away inside the loss holds no label, so none is lost there.
    assert (batch["labels"][:, 0] == -100).all()


def test_documents_that_fit_a_block_are_never_cut(texts, tokenizer):
    longest = max(map(len, documents_of(texts, tokenizer)))
    packed = pack_documents(texts, tokenizer, longest)
    pieces = {
        tuple(row["input_ids"][start - length : start])
        for row in packed
        for length, start in zip(row["seq_lengths"], torch.tensor(row["seq_lengths"]).cumsum(0).tolist(), strict=True)
    }
    assert pieces == {tuple(document) for document in documents_of(texts, tokenizer)}


def test_loss_over_packed_blocks_is_the_loss_over_the_documents_one_by_one(texts, tokenizer):
    texts = texts.select(range(12))
    documents = documents_of(texts, tokenizer)
    longest = max(map(len, documents))
    batch = PackedBlockCollator(longest + 5, tokenizer.pad_token_id)(
        list(pack_documents(texts, tokenizer, longest + 5))
    )
    model = LlamaStyleForCausalLM(
        LlamaStyleConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    for mode in (model.train, model.eval):
        mode()
        one_by_one = [model(torch.tensor([d]), labels=torch.tensor([d])).loss * (len(d) - 1) for d in documents]
        expected = torch.stack(one_by_one).sum() / sum(len(document) - 1 for document in documents)
        torch.testing.assert_close(model(**batch).loss, expected)


def test_without_a_bos_token_every_token_is_predicted_all_the_same(texts, tokenizer):
    without_bos = copy.deepcopy(tokenizer)
    without_bos.bos_token = None
    counts = [
        sum((row["labels"] != -100).sum().item() for row in [PackedBlockCollator(BLOCK, 0)(list(packed))])
        for packed in (pack_documents(texts, kind, BLOCK) for kind in (tokenizer, without_bos))
    ]
    assert counts[0] == counts[1]


def test_text_that_spells_a_special_token_ends_no_document(tokenizer):
    text = f"before {tokenizer.eos_token} after"
    packed = pack_documents(Dataset.from_dict({"text": [text]}), tokenizer, 64)
    assert packed[0]["input_ids"].count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(packed[0]["input_ids"][1:-1]) == text


def test_a_stream_is_packed_like_a_table(texts, tokenizer):
    table = pack_documents(texts, tokenizer, BLOCK)
    stream = pack_documents(texts.to_iterable_dataset(), tokenizer, BLOCK)
    assert [row["input_ids"] for row in stream] == table["input_ids"][:]


def test_flattened_blocks_are_the_same_tokens_in_one_row_that_transformers_takes_for_packed():
    from transformers.modeling_flash_attention_utils import _is_packed_sequence

    rows = [{"input_ids": [1, 2, 3], "seq_lengths": [2, 1]}, {"input_ids": [4, 5, 6, 7], "seq_lengths": [4]}]
    batch = PackedBlockCollator(4, 0)(rows)
    flat = PackedBlockCollator(4, 0, flatten=True)(rows)
    for name, tensor in batch.items():
        assert torch.equal(flat[name][0], tensor.flatten())
    assert _is_packed_sequence(flat["position_ids"], batch_size=1)
    assert not _is_packed_sequence(batch["position_ids"], batch_size=2)  # why flattening is needed


def test_labels_that_rows_bring_are_kept_but_at_the_first_token_of_a_piece():
    rows = [{"input_ids": [1, 2, 3, 4], "labels": [1, -100, 3, 4], "seq_lengths": [2, 2]}]
    batch = PackedBlockCollator(5, 0)(rows)
    assert batch["labels"].tolist() == [[-100, -100, -100, 4, -100]]
