"""The special tokens of our tokenizers, their order in the vocabulary, and the chat template that uses them.

Padding, end of text and end of turn are three tokens: with one token for two of them, the loss masks out what the
model has to learn in order to stop. The tags are added tokens but not special ones, so `skip_special_tokens=True`
leaves them in the text, where rewards look for them. A chat is rendered as text first: a user who spells a mark writes
one, so a server has to strip them from what strangers send.
"""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, processors
from transformers import PreTrainedTokenizerFast

PAD_TOKEN = "<|pad|>"
BOS_TOKEN = "<|bos|>"
EOS_TOKEN = "<|eos|>"
END_OF_TURN_TOKEN = "<|end_of_turn|>"
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>")
THINK_TAGS = ("<think>", "</think>")
ANSWER_TAGS = ("<answer>", "</answer>")
UNK_TOKEN = "<unk>"  # LLaMA style only: byte-level vocabularies know every text.

# In the order of their ids, which follow those of the trained vocabulary.
ADDED_TOKENS = [
    *(AddedToken(token, special=True) for token in (PAD_TOKEN, BOS_TOKEN, EOS_TOKEN, END_OF_TURN_TOKEN, *ROLE_TOKENS)),
    *(AddedToken(tag, special=False, normalized=False) for tag in (*THINK_TAGS, *ANSWER_TAGS)),
]

CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")


def add_special_tokens(
    backend: Tokenizer, unk_token: str | None = None, model_max_length: int | None = None
) -> PreTrainedTokenizerFast:
    """Wrap a trained `backend` for transformers, with our tokens appended, a leading bos and the chat template.

    The end-of-turn token is `tokenizer.eot_token` and `tokenizer.eot_token_id`, also after saving and loading.
    """
    backend.add_tokens(ADDED_TOKENS)
    backend.post_processor = leading_token(BOS_TOKEN, backend.token_to_id(BOS_TOKEN))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD_TOKEN,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        unk_token=unk_token,
        eot_token=END_OF_TURN_TOKEN,
        extra_special_tokens=list(ROLE_TOKENS),
        chat_template=CHAT_TEMPLATE,
        model_max_length=model_max_length,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def leading_token(token: str, token_id: int) -> processors.TemplateProcessing:
    """A post-processor that puts `token` before a text, or once before a pair of texts."""
    return processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A $B:1", special_tokens=[(token, token_id)]
    )
