"""Training a BPE tokenizer, byte-level (GPT-2 and after) or in LLaMA's style (SentencePiece's behaviour).

Byte-level merges are found by rustbpe, several times as fast as the trainer of `tokenizers`
(`benchmarks/tokenizer_training.py`), and converted to a `tokenizer.json`: the ids are rustbpe's ranks, so they are
also tiktoken's for the same ranks and regex. There is no normalizer: what is decoded is what was encoded.

The split regex has to be one of three, because llama.cpp has no others and a GGUF export would otherwise tokenise
differently from the model it was made of.
"""

import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Literal

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from .special_tokens import ADDED_TOKENS, UNK_TOKEN, add_special_tokens

_CONTRACTIONS_AND_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS_AND_SPACES = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Merges never cross the borders that these draw. They differ in how many digits may make one token.
SPLIT_PATTERNS = {
    "qwen2": rf"{_CONTRACTIONS_AND_WORDS}|\p{{N}}|{_SYMBOLS_AND_SPACES}",  # digits one by one
    "llama3": rf"{_CONTRACTIONS_AND_WORDS}|\p{{N}}{{1,3}}|{_SYMBOLS_AND_SPACES}",  # also GPT-4's cl100k
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}
BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]
# Trainers keep thousands of texts in memory at a time, and the regex engine overflows its stack on endless runs.
LONGEST_TEXT = 10_000  # characters


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    style: Literal["byte_level", "llama"] = "byte_level",
    pattern: Literal["qwen2", "llama3", "gpt2"] = "qwen2",
    model_max_length: int | None = None,
) -> PreTrainedTokenizerFast:
    """Train a tokenizer with our special tokens and chat template on `texts`, read once.

    Args:
        texts: documents; longer ones are cut at white space every 10,000 characters.
        vocab_size: entries in all, special tokens included; the result has exactly so many.
        style: "byte_level", where every string round-trips; or "llama": words carry their leading space as U+2581,
            digits stand alone, unknown characters fall back to bytes. There every string round-trips except for
            U+2581, which becomes a space as in SentencePiece, and a space that appears after an added token.
        pattern: the split regex of byte-level tokenizers, by the model that made it known.
        model_max_length: tokens that the model takes, recorded for truncation.

    Raises:
        ValueError: an unknown style or pattern, no text, or a vocab_size that the text's alphabet exceeds or that
            its merges do not reach.
    """
    if style not in ("byte_level", "llama"):
        raise ValueError(f"The style {style!r} is unknown: choose 'byte_level' or 'llama'.")
    if pattern not in SPLIT_PATTERNS:
        raise ValueError(f"The pattern {pattern!r} is unknown: choose one of {', '.join(map(repr, SPLIT_PATTERNS))}.")
    if isinstance(texts, str):
        raise ValueError("`texts` is one string where a list or another iterable of strings is expected: pass [text].")
    pieces = _pieces(texts)
    first = next(pieces, None)
    if first is None:
        raise ValueError("There is no training text: every document is empty or white space.")
    pieces = itertools.chain([first], pieces)

    if style == "llama":
        backend = _train_llama_style(pieces, vocab_size)
        return add_special_tokens(backend, unk_token=UNK_TOKEN, model_max_length=model_max_length)
    backend = _train_byte_level(pieces, vocab_size, SPLIT_PATTERNS[pattern])
    return add_special_tokens(backend, model_max_length=model_max_length)


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    """The texts without blank ones, cut before a space or line break where they exceed LONGEST_TEXT."""
    for text in texts:
        if not text or text.isspace():
            continue
        start = 0
        while len(text) - start > LONGEST_TEXT:
            end = start + LONGEST_TEXT
            cut = max(text.rfind(" ", start + 1, end), text.rfind("\n", start + 1, end))
            cut = end if cut == -1 else cut
            yield text[start:cut]
            start = cut
        yield text[start:]


def _train_byte_level(pieces: Iterable[str], vocab_size: int, regex: str) -> Tokenizer:
    import rustbpe  # Only training needs it: the extra `train` brings it.

    entries = vocab_size - len(ADDED_TOKENS)
    if entries < 256:
        _refuse_small_vocab_size(vocab_size, alphabet="256 bytes", smallest=256 + len(ADDED_TOKENS))
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(pieces, vocab_size=entries, pattern=regex)
    ranks = dict(trainer.get_mergeable_ranks())
    if len(ranks) < entries:
        _refuse_little_text(vocab_size, merges=len(ranks) - 256, largest=len(ranks) + len(ADDED_TOKENS))

    printable = dict(enumerate(_printable_bytes()))
    vocab = {token.decode("latin-1").translate(printable): rank for token, rank in ranks.items()}
    backend = Tokenizer(BPE(vocab=vocab, merges=_merges(vocab)))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _merges(ranks: dict[str, int]) -> list[tuple[str, str]]:
    """The two parts of each token of several characters, in the order of `ranks`, which is that of the merges.

    They are what all earlier merges leave of the token's characters.
    """
    merges = []
    rank_of = ranks.get
    for token, rank in ranks.items():
        size = len(token)
        # One cut into two earlier tokens is the one, and quicker to find than to repeat the merges.
        cuts = [i for i in range(1, size) if rank_of(token[:i], rank) < rank and rank_of(token[i:], rank) < rank]
        if len(cuts) > 1:
            parts = list(token)
            pair_ranks = [rank_of(token[i : i + 2], rank) for i in range(size - 1)]
            while len(parts) > 2:
                earliest = pair_ranks.index(min(pair_ranks))
                merged = parts[earliest] + parts[earliest + 1]
                parts[earliest : earliest + 2] = [merged]
                del pair_ranks[earliest]
                if earliest < len(pair_ranks):
                    pair_ranks[earliest] = rank_of(merged + parts[earliest + 1], rank)
                if earliest > 0:
                    pair_ranks[earliest - 1] = rank_of(parts[earliest - 1] + merged, rank)
            merges.append((parts[0], parts[1]))
        elif cuts:
            merges.append((token[: cuts[0]], token[cuts[0] :]))
    return merges


def _printable_bytes() -> list[str]:
    """GPT-2's stand-in for each byte: Latin-1's printable characters for themselves, then U+0100 and on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _train_llama_style(pieces: Iterable[str], vocab_size: int) -> Tokenizer:
    backend = Tokenizer(BPE(unk_token=UNK_TOKEN, fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    # No merge crosses a U+2581 in training, so splitting there changes no id and lets `tokenizers` cache words.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("▁", behavior="merged_with_next"),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    entries = vocab_size - len(ADDED_TOKENS)
    trainer = BpeTrainer(vocab_size=max(entries, 0), special_tokens=[UNK_TOKEN, *BYTE_PIECES], show_progress=False)
    # SentencePiece trains on lines, so a line break is never part of a piece but falls back to its byte.
    lines = (line for piece in pieces for line in piece.split("\n"))
    backend.train_from_iterator(lines, trainer)

    found = backend.get_vocab_size()
    merges = len(json.loads(backend.to_str())["model"]["merges"])
    if found > entries:
        alphabet = f"<unk>, 256 bytes and the text's {found - merges - 257} characters"
        _refuse_small_vocab_size(vocab_size, alphabet, smallest=found - merges + len(ADDED_TOKENS))
    if found < entries:
        _refuse_little_text(vocab_size, merges, largest=found + len(ADDED_TOKENS))
    # The trainer takes the byte pieces in as special tokens only; as such, decoding would drop them.
    serialized = json.loads(backend.to_str())
    serialized["added_tokens"] = []
    return Tokenizer.from_str(json.dumps(serialized))


def _refuse_small_vocab_size(vocab_size: int, alphabet: str, smallest: int) -> None:
    raise ValueError(
        f"vocab_size={vocab_size} is too small: {alphabet} and {len(ADDED_TOKENS)} special tokens need {smallest}; "
        f"ask for {smallest} or more."
    )


def _refuse_little_text(vocab_size: int, merges: int, largest: int) -> None:
    raise ValueError(
        f"The training text is too little for vocab_size={vocab_size}: it holds only {merges} merges, which makes "
        f"{largest} the largest possible vocab_size; ask for that or add text."
    )
