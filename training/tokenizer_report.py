"""How well a tokenizer fits a text, and how tokenizers by other people's settings do on the same text.

GPT-2's own vocabulary, trained on 40 GB of web text, can only be had from the Hub; here stands one of its size and
split regex, trained on the same text as ours.
"""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import sentencepiece
from transformers import PreTrainedTokenizerFast

from hf_models.bpe_tokenizer import from_sentencepiece, train_bpe
from hf_models.bpe_tokenizer.training import BYTE_PIECES

GPT2_VOCAB_SIZE = 50_257
COLUMNS = {
    "vocab_size": "entries",
    "bytes_per_token": "bytes/token",
    "tokens_per_word": "tokens/word",
    "single_byte_share": "single-byte",
    "vocabulary_used": "vocab used",
    "texts_not_round_tripped": "not round-tripped",
}


def measure(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> dict[str, float | int]:
    """Figures of one tokenizer on `texts` (none blank), no special tokens added.

    Returns:
        vocab_size: entries in all.
        bytes_per_token: bytes of UTF-8 a token, the more the better.
        tokens_per_word: tokens per word between white space (fertility).
        single_byte_share: share of the tokens that stand for one byte.
        vocabulary_used: share of the entries that occur.
        texts_not_round_tripped: texts that decoding does not give back as they were.
    """
    encoded = tokenizer(texts, add_special_tokens=False).input_ids
    decoded = tokenizer.batch_decode(encoded)
    counts = Counter(token_id for ids in encoded for token_id in ids)
    pieces = dict(zip(counts, tokenizer.convert_ids_to_tokens(list(counts)), strict=True))
    # One character is one byte in byte-level's alphabet; elsewhere a byte is ASCII, a space or a piece of its own.
    byte_names = {*BYTE_PIECES, *map(chr, range(128)), "▁"}
    if tokenizer.backend_tokenizer.normalizer is None:
        byte_names = {piece for piece in tokenizer.get_vocab() if len(piece) == 1}
    tokens = counts.total()
    return {
        "vocab_size": len(tokenizer),
        "bytes_per_token": round(sum(len(text.encode()) for text in texts) / tokens, 4),
        "tokens_per_word": round(tokens / sum(len(text.split()) for text in texts), 4),
        "single_byte_share": round(sum(counts[i] for i, piece in pieces.items() if piece in byte_names) / tokens, 4),
        "vocabulary_used": round(len(counts) / len(tokenizer), 4),
        "texts_not_round_tripped": sum(text != back for text, back in zip(texts, decoded, strict=True)),
    }


def train_peers(
    read_texts: Callable[[], Iterable[str]], vocab_size: int
) -> Iterator[tuple[str, PreTrainedTokenizerFast]]:
    """Tokenizers by others' settings on the text that `read_texts()` begins anew, each with its name.

    Those of GPT-2's size are left out where the text has not so many merges.
    """
    yield "GPT-2's regex", train_bpe(read_texts(), vocab_size, pattern="gpt2")
    yield "LLaMA-3's regex", train_bpe(read_texts(), vocab_size, pattern="llama3")
    yield "SentencePiece, LLaMA's settings", train_sentencepiece(read_texts(), vocab_size)
    try:
        yield "GPT-2's regex and size", train_bpe(read_texts(), GPT2_VOCAB_SIZE, pattern="gpt2")
    except ValueError:
        return


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """BPE with byte fallback, single digits and no normalization, as LLaMA's (arXiv 2302.13971, section 2.1)."""
    with tempfile.TemporaryDirectory() as folder:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in text.split("\n")),
            model_prefix=f"{folder}/peer",
            model_type="bpe",
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            byte_fallback=True,
            split_digits=True,
            max_sentence_length=100_000,  # Bytes; longer lines would be left out.
            minloglevel=2,
        )
        return from_sentencepiece(f"{folder}/peer.model")


def format_table(report: dict[str, dict[str, float | int]]) -> str:
    """The measurements by name, one line each."""
    width = max(map(len, report))
    lines = [" " * width + "".join(f"  {title:>{max(11, len(title))}}" for title in COLUMNS.values())]
    for name, figures in report.items():
        cells = (f"  {figures[key]:>{max(11, len(title))}}" for key, title in COLUMNS.items())
        lines.append(f"{name:<{width}}" + "".join(cells))
    return "\n".join(lines)
