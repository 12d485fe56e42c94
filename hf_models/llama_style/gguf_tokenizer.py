"""What a GGUF file says of a tokenizer, so that llama.cpp splits text into the same tokens as `tokenizer.json` does.

llama.cpp has two tokenizers that a BPE of ours can become, and each knows less than `tokenizers` does:
- `gpt2`, byte-level: its split regex is one of a fixed list, named by `tokenizer.ggml.pre`;
- `llama`, SentencePiece's: it has no merges but a score for each piece, and joins any two neighbours that make a piece.
What they cannot say is refused: such a file would load and answer, only worse than the model that it was made of.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from gguf import TokenType
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from ..bpe_tokenizer import SPLIT_PATTERNS
from ..bpe_tokenizer.training import BYTE_PIECES
from ..stored_weights import some

# The regex in tokenizer.json -> llama.cpp's name for what it computes.
_PRE_OF_REGEX = {
    SPLIT_PATTERNS["qwen2"]: "qwen2",
    SPLIT_PATTERNS["llama3"]: "llama-bpe",
    SPLIT_PATTERNS["gpt2"]: "gpt-2",
    # The same as OpenAI wrote it, and as `tokenizers` has it built in.
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "gpt-2",
}
# Those with which llama.cpp looks a whole word up before it merges: `ignore_merges` in tokenizer.json.
_LOOKS_WORDS_UP = ("llama-bpe",)
_SPACE = "▁"
_PREPEND = {"type": "Prepend", "prepend": _SPACE}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}


def tokenizer_metadata(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The `tokenizer.*` keys of a GGUF file (github.com/ggml-org/ggml, docs/gguf.md) and their values.

    Raises ValueError, in one sentence that says what to do, for a tokenizer that llama.cpp would not reproduce.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    if model["type"] != "BPE":
        raise ValueError(f"The tokenizer is a {model['type']}, and only BPE can be written as GGUF here.")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ValueError("The tokenizer marks parts of words with a prefix or suffix, which llama.cpp's BPE has not.")
    _refuse_inexact_added_tokens(backend)

    added = {token["id"]: token for token in backend["added_tokens"]}
    texts = {index: text for text, index in model["vocab"].items()}
    texts |= {index: token["content"] for index, token in added.items()}
    kinds = {index: _added_kind(token) for index, token in added.items()}
    if any(step["type"] == "ByteLevel" for step in _steps(backend["pre_tokenizer"])):
        metadata = _byte_level(tokenizer.backend_tokenizer, backend)
    else:
        metadata = _sentencepiece(tokenizer.backend_tokenizer, backend, texts.values())
        scores = metadata["tokenizer.ggml.scores"]
        metadata["tokenizer.ggml.scores"] = [scores.get(texts.get(index), 0.0) for index in range(max(texts) + 1)]
        kinds |= {model["vocab"][piece]: TokenType.BYTE for piece in BYTE_PIECES}
        if tokenizer.unk_token_id is not None:
            kinds[tokenizer.unk_token_id] = TokenType.UNKNOWN
            metadata["tokenizer.ggml.unknown_token_id"] = tokenizer.unk_token_id

    ids = range(max(texts) + 1)
    metadata["tokenizer.ggml.tokens"] = [texts.get(index, f"[PAD{index}]") for index in ids]
    kinds = {index: TokenType.UNUSED for index in ids if index not in texts} | kinds
    metadata["tokenizer.ggml.token_type"] = [int(kinds.get(index, TokenType.NORMAL)) for index in ids]
    metadata |= _special_tokens(tokenizer)
    templates = tokenizer.chat_template or {}
    if isinstance(templates, str):
        templates = {"default": templates}
    for name, template in templates.items():
        metadata["tokenizer.chat_template" + ("" if name == "default" else f".{name}")] = template
    if further := [name for name in templates if name != "default"]:
        metadata["tokenizer.chat_templates"] = further
    return metadata


def _added_kind(token: dict[str, Any]) -> TokenType:
    # User-defined ones are found in every text, control ones only where a caller asks for special tokens.
    return TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED


def _steps(part: dict[str, Any] | None) -> Sequence[dict[str, Any]]:
    """The members of a sequence in `tokenizer.json`, or the one part alone."""
    if part is None:
        return []
    return part.get("pretokenizers") or part.get("normalizers") or [part]


def _refuse_inexact_added_tokens(backend: dict[str, Any]) -> None:
    flags = ("lstrip", "rstrip", "single_word", *(["normalized"] if backend["normalizer"] else []))
    for token in backend["added_tokens"]:
        if found := [flag for flag in flags if token[flag]]:
            raise ValueError(
                f"The added token {token['content']!r} has {' and '.join(found)} set, which llama.cpp does not know: "
                "set that to false in tokenizer.json if the model was trained without it."
            )


def _byte_level(tokenizer: Tokenizer, backend: dict[str, Any]) -> dict[str, Any]:
    """The keys of llama.cpp's `gpt2`."""
    if backend["normalizer"] is not None:
        raise ValueError(
            f"The tokenizer normalises text ({', '.join(step['type'] for step in _steps(backend['normalizer']))}), "
            "which llama.cpp's byte-level BPE does not: remove the normalizer from tokenizer.json if all texts are "
            "in that form anyway."
        )
    steps = list(_steps(backend["pre_tokenizer"]))
    last = steps.pop()
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        raise ValueError(
            "The tokenizer puts a space before a text, or goes on after ByteLevel: llama.cpp does neither."
        )
    if last["use_regex"] and not steps:
        pre = "gpt-2"
    else:
        pre = None if last["use_regex"] else _PRE_OF_REGEX.get(_only_regex(steps))
    if pre is None:
        shown = _only_regex(steps) or json.dumps(steps, ensure_ascii=False)
        raise ValueError(
            f"The tokenizer splits text by {shown!r}, for which llama.cpp has no counterpart: train one with the split "
            f"pattern {', '.join(map(repr, SPLIT_PATTERNS))} (training.train_tokenizer), or serve the model in "
            "transformers or vLLM (--to transformers)."
        )

    model = backend["model"]
    looks_words_up = pre in _LOOKS_WORDS_UP
    if bool(model.get("ignore_merges")) != looks_words_up:
        _refuse_unmerged_tokens(tokenizer, backend, pre)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in model["merges"]],
    }


def _only_regex(steps: Sequence[dict[str, Any]]) -> str | None:
    if len(steps) != 1 or steps[0]["type"] != "Split" or steps[0]["invert"] or steps[0]["behavior"] != "Isolated":
        return None
    return steps[0]["pattern"].get("Regex")


def _refuse_unmerged_tokens(tokenizer: Tokenizer, backend: dict[str, Any], pre: str) -> None:
    """Looking words up changes nothing where every token is what the merges make of its text."""
    if unmerged := _not_reached_by_merges(backend, backend["model"]["vocab"], tokenizer):
        raise ValueError(
            f"The tokenizer {'looks' if pre not in _LOOKS_WORDS_UP else 'does not look'} whole words up before merging "
            f"(ignore_merges), and llama.cpp's {pre!r} does the opposite: tokens such as {some(map(repr, unmerged))} "
            "would change, so that it cannot be written as GGUF."
        )


def _not_reached_by_merges(backend: dict[str, Any], tokens: Iterable[str], tokenizer: Tokenizer) -> list[str]:
    """Those of `tokens` of which the merges alone do not make one token again."""
    added = {token["content"] for token in backend["added_tokens"]}
    model = tokenizer.model
    if backend["model"].get("ignore_merges"):
        model = Tokenizer.from_str(json.dumps(backend | {"model": backend["model"] | {"ignore_merges": False}})).model
    return [token for token in tokens if token not in added and len(model.tokenize(token)) != 1]


def _sentencepiece(tokenizer: Tokenizer, backend: dict[str, Any], texts: Iterable[str]) -> dict[str, Any]:
    """The keys of llama.cpp's `llama`, the scores still by piece."""
    model = backend["model"]
    if not model.get("byte_fallback") or not all(piece in model["vocab"] for piece in BYTE_PIECES):
        raise ValueError(
            "The tokenizer is neither byte-level nor does it fall back to bytes, and llama.cpp has no other BPE."
        )
    normalizer = list(_steps(backend["normalizer"]))
    if normalizer not in ([_PREPEND, _REPLACE], [_REPLACE]):
        shown = ", ".join(step["type"] for step in normalizer) or "nothing"
        raise ValueError(
            f"The tokenizer's normalizer ({shown}) is not SentencePiece's plain one, a {_SPACE} before each text and "
            "for each space, the only one that llama.cpp has."
        )
    for step in _steps(backend["pre_tokenizer"]):
        digits = step["type"] == "Digits" and step["individual_digits"]
        spaces = step["type"] == "Split" and step["pattern"] == {"String": _SPACE}
        if not digits and not (spaces and step["behavior"] == "MergedWithNext" and not step["invert"]):
            raise ValueError(
                f"The tokenizer splits text by {step['type']} ({json.dumps(step, ensure_ascii=False)}), which "
                "llama.cpp's SentencePiece does not: serve the model in transformers or vLLM (--to transformers)."
            )
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.add_space_prefix": _PREPEND in normalizer,
        "tokenizer.ggml.scores": _scores(tokenizer, backend, set(texts)),
    }


def _scores(tokenizer: Tokenizer, backend: dict[str, Any], texts: set[str]) -> dict[str, float]:
    """Scores with which joining the best-scored neighbours repeats the merges: minus the place of a piece in them.

    That holds if every piece has one place in the merges, after those of its parts, and if neighbours that make a piece
    either are one of its merges or never meet. They never meet if the merges make the piece of its text: all merges
    that come before have been done on both, and those cannot leave other parts in the midst of a text than alone.
    The splits of `pre_tokenizer` cannot matter if no piece crosses them.
    """
    place: dict[str, int] = {}
    scattered = []
    for left, right in backend["model"]["merges"]:
        piece = left + right
        place.setdefault(piece, len(place))
        if place[piece] != len(place) - 1 or max(place.get(left, -1), place.get(right, -1)) >= place[piece]:
            scattered.append(piece)
    merges = {(left, right) for left, right in backend["model"]["merges"]}
    ambiguous = [
        piece
        for piece in texts
        if any(
            piece[:cut] in texts and piece[cut:] in texts and (piece[:cut], piece[cut:]) not in merges
            for cut in range(1, len(piece))
        )
    ]
    # Added tokens are found before anything is merged.
    unsafe = scattered + _not_reached_by_merges(backend, ambiguous, tokenizer)
    if backend["pre_tokenizer"] is not None:
        unsafe += [piece for piece in place if len(tokenizer.pre_tokenizer.pre_tokenize_str(piece)) > 1]
    if unsafe:
        raise ValueError(
            f"The tokenizer's merges are not in the order of scores as SentencePiece has them, for example of "
            f"{some(map(repr, sorted(unsafe)))}: llama.cpp would split text otherwise, so that it cannot be written as "
            "GGUF."
        )
    return {piece: -float(index) for piece, index in place.items()}


def _special_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    if tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has no eos_token, and llama.cpp would take another one for it: set one.")
    named = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id", "eot": "eot_token_id"}
    metadata = {f"tokenizer.ggml.{key}_token_id": getattr(tokenizer, name, None) for key, name in named.items()}
    metadata = {key: index for key, index in metadata.items() if index is not None}

    plain = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a")
    before, after = whole[: whole.index(plain[0])], whole[whole.index(plain[0]) + len(plain) :]
    for name, found, wanted in (("bos", before, tokenizer.bos_token_id), ("eos", after, tokenizer.eos_token_id)):
        if found not in ([], [wanted]):
            around = tokenizer.convert_ids_to_tokens(found)
            raise ValueError(f"The tokenizer puts {around} around a text, where llama.cpp only knows one {name}_token.")
        # Written in any case: llama.cpp's own default differs between its tokenizers.
        metadata[f"tokenizer.ggml.add_{name}_token"] = bool(found)
    return metadata
