"""BPE tokenizers: trained from text, or taken over from a SentencePiece model.

Both roads end in a `PreTrainedTokenizerFast` whose `tokenizer.json` holds everything: a saved folder opens with
`AutoTokenizer` where this package is not installed.
"""

from .sentencepiece_import import from_sentencepiece
from .special_tokens import (
    ANSWER_TAGS,
    BOS_TOKEN,
    END_OF_TURN_TOKEN,
    EOS_TOKEN,
    PAD_TOKEN,
    ROLE_TOKENS,
    THINK_TAGS,
    UNK_TOKEN,
)
from .training import SPLIT_PATTERNS, train_bpe

__all__ = [
    "ANSWER_TAGS",
    "BOS_TOKEN",
    "END_OF_TURN_TOKEN",
    "EOS_TOKEN",
    "PAD_TOKEN",
    "ROLE_TOKENS",
    "SPLIT_PATTERNS",
    "THINK_TAGS",
    "UNK_TOKEN",
    "from_sentencepiece",
    "train_bpe",
]
