"""From documents to blocks: tokenise once, pack whole documents into fixed blocks, batch them without a mask.

A document is `bos, tokens, eos`. One longer than a block is cut into pieces that overlap by one token, so that every
token but the first of a document is predicted exactly once: losses over packed text compare with losses over the
documents themselves, and bits per byte count every byte. Pieces are packed best-fit (arXiv 2404.10830) by TRL's
`pack_dataset`, which cuts nothing further. In a batch, `position_ids` restart with each piece and no attention mask is
given: that is how transformers' attention functions are told that the pieces must not see each other.
"""

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from trl import pack_dataset


def pack_documents(
    dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, block_size: int
) -> Dataset | IterableDataset:
    """Rows `text` to rows `input_ids` (at most `block_size` tokens) with `seq_lengths`, the pieces' lengths in them.

    Rows may have `input_ids` instead of `text`: documents that were tokenised before, without bos and eos.
    """
    pieces = dataset.map(
        document_pieces,
        batched=True,
        remove_columns=list(dataset.features),
        fn_kwargs={"tokenizer": tokenizer, "block_size": block_size},
        **_progress(dataset, "Tokenising"),
    )
    return pack_dataset(pieces, block_size, strategy="bfd_split", map_kwargs=_progress(dataset, "Packing"))


def document_start(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token from which a document's first one is predicted: bos, or where there is none, as in Qwen's, eos."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def document_pieces(batch: dict[str, list], tokenizer: PreTrainedTokenizerBase, block_size: int) -> dict[str, list]:
    """Texts (`text`), or their tokens (`input_ids`), to pieces of documents, as the module's head describes them."""
    pieces = []
    for ids in batch["input_ids"] if "input_ids" in batch else text_ids(batch["text"], tokenizer):
        document = [document_start(tokenizer), *ids, tokenizer.eos_token_id]
        pieces += [document[i : i + block_size] for i in range(0, max(1, len(document) - 1), block_size - 1)]
    return {"input_ids": pieces}


def text_ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Without bos and eos. Text that spells a special token is text: a web page must not be able to end a document."""
    return tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]


def _progress(dataset: Dataset | IterableDataset, description: str) -> dict[str, str]:
    return {"desc": description} if isinstance(dataset, Dataset) else {}


@dataclass
class PackedBlockCollator:
    """Batches packed rows: `input_ids`, `position_ids`, `labels`, each `(batch, block_size)`.

    A piece's first token has no context, so it is no label; neither is the padding, which counts as one more piece.
    Where the rows bring `labels` of their own, those are taken instead of the tokens.

    Args:
        flatten: one row of `batch * block_size` tokens. transformers' flash attention looks for packed pieces in
            batches of one row only, and would let those of several rows attend to each other.
    """

    block_size: int
    pad_token_id: int
    flatten: bool = False

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        shape = (len(rows), self.block_size)
        input_ids = torch.full(shape, self.pad_token_id)
        labels = torch.full(shape, -100)
        position_ids = torch.empty(shape, dtype=torch.long)
        for i, row in enumerate(rows):
            filled = len(row["input_ids"])
            input_ids[i, :filled] = torch.as_tensor(row["input_ids"])
            labels[i, :filled] = torch.as_tensor(row.get("labels", row["input_ids"]))
            start = 0
            for length in [*row["seq_lengths"], self.block_size - filled]:
                position_ids[i, start : start + length] = torch.arange(length)
                start += length
        labels[position_ids == 0] = -100
        batch = {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}
        return {name: tensor.view(1, -1) for name, tensor in batch.items()} if self.flatten else batch
