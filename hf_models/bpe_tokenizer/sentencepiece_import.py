"""Reading a SentencePiece BPE model into a fast tokenizer with the same ids.

SentencePiece has no list of merges: of all neighbours whose concatenation is a piece it joins those of the highest
score. Listing every pair that makes a piece, by descending score of the piece, says the same to `tokenizers`.

Only what is reproduced exactly is accepted: BPE with identity normalization (as LLaMA's), with or without byte
fallback, dummy prefix and removal of extra spaces.
"""

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from .special_tokens import leading_token


def from_sentencepiece(model_file: str | Path) -> PreTrainedTokenizerFast:
    """Open a SentencePiece `.model` file; ids equal `SentencePieceProcessor.encode`'s with `add_special_tokens=False`.

    With special tokens, the model's bos is put first, as LLaMA does. The vocabulary stays the model's own: none of
    our special tokens is added. As in every fast tokenizer, a text that spells out a control symbol ("</s>") gets
    its id, where SentencePiece splits it into characters.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no SentencePiece model, or one that cannot be reproduced exactly.
    """
    model = _read(Path(model_file))
    _refuse_inexact(model, model_file)
    kinds = type(model).SentencePiece
    names = [piece.piece for piece in model.pieces]
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == kinds.NORMAL}
    controls = [piece.piece for piece in model.pieces if piece.type == kinds.CONTROL]
    ids = model.trainer_spec
    unk_token = names[ids.unk_id]

    backend = Tokenizer(
        BPE(
            vocab={name: index for index, name in enumerate(names)},
            merges=_merges(scores),
            unk_token=unk_token,
            fuse_unk=True,
            byte_fallback=ids.byte_fallback,
        )
    )
    backend.normalizer = _normalizer(model.normalizer_spec)
    backend.decoder = _decoder(model.normalizer_spec)
    backend.add_special_tokens([AddedToken(token, special=True) for token in (unk_token, *controls)])
    named = {"bos_token": ids.bos_id, "eos_token": ids.eos_id, "pad_token": ids.pad_id}
    named_tokens = {name: names[index] for name, index in named.items() if index >= 0 and names[index] in controls}
    if "bos_token" in named_tokens:
        backend.post_processor = leading_token(named_tokens["bos_token"], ids.bos_id)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=unk_token,
        **named_tokens,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def _read(model_file: Path):
    """The model's protobuf message."""
    from google.protobuf.message import DecodeError
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    model = ModelProto()
    try:
        model.ParseFromString(model_file.read_bytes())
    except DecodeError:
        model.Clear()
    if not model.pieces:
        raise ValueError(f"{model_file} is not a SentencePiece model: pass the `.model` file that its trainer wrote.")
    return model


def _refuse_inexact(model, model_file: str | Path) -> None:
    spec, normalizer, kinds = model.trainer_spec, model.normalizer_spec, type(model).SentencePiece
    types = {piece.type for piece in model.pieces}
    reasons = {
        "its model_type is not BPE": spec.model_type != type(spec).BPE,
        f"it normalizes text ({normalizer.name})": bool(normalizer.precompiled_charsmap),
        "it does not escape white space": not normalizer.escape_whitespaces,
        "it treats white space as a suffix": spec.treat_whitespace_as_suffix,
        "it has user-defined symbols": kinds.USER_DEFINED in types,
        "it has unused pieces": kinds.UNUSED in types,
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise ValueError(
            f"{model_file} cannot be reproduced exactly: {' and '.join(found)}. Only BPE models with identity "
            "normalization and no extra symbols can (--model_type=bpe --normalization_rule_name=identity)."
        )


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece; by descending score, then the longest left part first."""
    return [
        (piece[:cut], piece[cut:])
        for piece in sorted(scores, key=scores.__getitem__, reverse=True)
        for cut in range(len(piece) - 1, 0, -1)
        if piece[:cut] in scores and piece[cut:] in scores
    ]


def _normalizer(spec) -> normalizers.Sequence:
    steps = [normalizers.Replace(" ", "▁")]
    if spec.add_dummy_prefix:
        steps.insert(0, normalizers.Prepend("▁"))
    if spec.remove_extra_whitespaces:
        spaces = [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
        # At the end, SentencePiece also removes a U+2581 that was one in the text.
        steps = [*spaces, *steps, normalizers.Replace(Regex(r"▁+\z"), "")]
    return normalizers.Sequence(steps)


def _decoder(spec) -> decoders.Sequence:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else steps)
