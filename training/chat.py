"""Talks with a language model in the terminal, or answers the messages of a script.

    python -m training.chat --model runs/sft
    python -m training.chat --model runs/sft --temperature 0 --prompt "What is a river?" "Name one in Asia."

The model is a run folder, an adapter's folder, a transformers folder or a Hub id, with a chat template in its
tokenizer. Notable here:
- a reply is written as it comes, and ends at the model's end of turn or after `--max_new_tokens`;
- with `--prompt`, or where stdin is no terminal (one message a line), stdout holds the replies and nothing else;
- what no longer fits into the model's context is forgotten from its oldest end, in whole exchanges, and this is told;
- keys and values of what was said before are kept from turn to turn: only what is new is computed;
- a message cannot speak for others: marks of the chat format are taken out of it.
"""

import contextlib
import copy
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jinja2.exceptions import TemplateError
from transformers import (
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.cache_utils import DynamicLayer
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from .adapters import base_of, is_adapter_folder, open_writer
from .chat_data import special_pattern
from .command_line import parse_arguments, plain_errors
from .language_models import DTYPES, LanguageModelArguments, end_of_turn_ids, load_config
from .quantization import QuantizationArguments, check_quantizable, quantization_config

REPLY_TOKENS = 512
# What a terminal would obey rather than show: C0 and C1 controls but for tab and line break.
TERMINAL_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
HOW_TO = "/reset forgets the conversation, /exit or Ctrl-D ends; Ctrl-C interrupts a reply, twice it ends."


@dataclass
class ChatArguments(LanguageModelArguments):
    model: str = field(
        metadata={"help": "Whom to talk with: a run folder, an adapter's folder, a transformers folder or a Hub id."}
    )
    base: str | None = field(
        default=None, metadata={"help": "An adapter's base model, where it no longer lies where it was."}
    )
    dtype: str | None = field(
        default=None, metadata={"help": f"Of the weights in memory: {', '.join(DTYPES)}. By default as stored."}
    )
    device: str | None = field(
        default=None, metadata={"help": "cpu, cuda, cuda:1, ... By default a GPU if there is one."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that comes with the model; ours and transformers' need none."}
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "What the model is told before the first message."}
    )
    prompt: list[str] | None = field(
        default=None,
        metadata={"help": "One message or several of one conversation: only the replies are printed, and it ends."},
    )
    temperature: float = field(default=0.7, metadata={"help": "Of sampling; 0 always takes the likeliest token."})
    top_p: float = field(
        default=0.95, metadata={"help": "Tokens are sampled from the likeliest ones of so much probability together."}
    )
    max_new_tokens: int | None = field(
        default=None,
        metadata={"help": f"Longest reply. By default {REPLY_TOKENS} tokens, or half the context where that is less."},
    )
    seed: int | None = field(default=None, metadata={"help": "For replies that come out the same again."})

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.prompt, str):
            self.prompt = [self.prompt]
        if self.prompt is not None and not all(text.strip() for text in self.prompt or [""]):
            raise ValueError("--prompt has an empty message: give a text to answer.")
        if self.temperature < 0:
            raise ValueError(f"--temperature is {self.temperature}: give 0 or more.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p is {self.top_p}: give more than 0 and at most 1.")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"--max_new_tokens is {self.max_new_tokens}: give 1 or more.")


class MessageError(ValueError):
    """A message that cannot be sent; the conversation is as before."""


class Turn(NamedTuple):
    """What the model is given at its turn, and what the user is told of it."""

    ids: list[int]
    notes: list[str]


class Conversation:
    """Messages, rendered by the tokenizer's chat template into at most `context - max_new_tokens` tokens.

    Raises ValueError where the tokenizer has no chat template, or one that has no place for the system prompt.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        context: int | None,
        max_new_tokens: int,
        system_prompt: str | None = None,
    ):
        if not tokenizer.chat_template:
            raise ValueError(
                f"{tokenizer.name_or_path} has no chat template, so a message cannot be told from a reply: it is a "
                "base model, which continues text as its card shows; `python -m training.sft` teaches it to answer."
            )
        self.tokenizer, self.context, self.max_new_tokens = tokenizer, context, max_new_tokens
        self.marks = special_pattern(tokenizer)
        self.system = []
        if system_prompt:
            self.system = [{"role": "system", "content": self.without_marks(system_prompt)[0]}]
        self.exchanges: list[dict[str, str]] = []  # user and assistant in turn
        try:
            self._render([{"role": "user", "content": "?"}])
        except TemplateError as error:
            raise ValueError(
                f"The chat template of {tokenizer.name_or_path} refuses a system prompt and a message: {error}"
            ) from error

    def reset(self) -> None:
        self.exchanges = []

    def ask(self, text: str) -> Turn:
        """Adds the user's message, and forgets the oldest exchanges where it would not fit otherwise.

        Raises MessageError where nothing is left of the message, or where it does not fit even alone.
        """
        text, found = self.without_marks(text)
        notes = [f"Taken out of the message, as marks of the chat format: {' '.join(found)}."] if found else []
        if not text.strip():
            raise MessageError(" ".join([*notes, "Nothing is left of the message: give a text to answer."]))
        exchanges = [*self.exchanges, {"role": "user", "content": text}]
        ids = self._render(exchanges)
        room = None if self.context is None else self.context - self.max_new_tokens
        while room is not None and len(ids) > room and len(exchanges) > 1:
            exchanges = exchanges[2:]
            ids = self._render(exchanges)
        if room is not None and len(ids) > room:
            raise MessageError(
                f"The message{' with the system prompt' if self.system else ''} takes {len(ids)} tokens, and beside a "
                f"reply of {self.max_new_tokens} (--max_new_tokens) the context of {self.context} has room for {room}: "
                "shorten it, or ask for shorter replies."
            )
        if forgotten := (len(self.exchanges) + 1 - len(exchanges)) // 2:
            what = "exchange is" if forgotten == 1 else f"{forgotten} exchanges are"
            notes.append(f"The context of {self.context} tokens is full: the oldest {what} forgotten.")
        self.exchanges = exchanges
        return Turn(ids, notes)

    def answer(self, text: str) -> None:
        """Adds the model's reply to the last message."""
        self.exchanges.append({"role": "assistant", "content": self.without_marks(text)[0]})

    def without_marks(self, text: str) -> tuple[str, list[str]]:
        """The text without the strings that the tokenizer reads as special tokens, and those that were in it."""
        found = []
        while here := self.marks.findall(text):  # again, for what is left may spell another one
            found += here
            text = self.marks.sub("", text)
        return text, sorted(set(found))

    def _render(self, exchanges: list[dict[str, str]]) -> list[int]:
        return self.tokenizer.apply_chat_template([*self.system, *exchanges], add_generation_prompt=True)["input_ids"]


class ReplyStreamer(BaseStreamer):
    """Takes a reply's tokens from `generate`, and hands its text on as soon as characters are whole."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: set[int], write: Callable[[str], None]):
        self.tokenizer, self.ends, self.write = tokenizer, ends, write
        self.ids: list[int] = []
        self.awaits_prompt = True
        self.start = self.written = 0  # of what is decoded again with each token, and of what is written already

    def put(self, value: torch.Tensor) -> None:
        if self.awaits_prompt:
            self.awaits_prompt = False
            return
        self.ids += [token for token in value.tolist() if token not in self.ends]
        self._write_whole()

    def end(self) -> None:
        self._write_whole(at_end=True)

    def text(self) -> str:
        return self._decode(0, len(self.ids))

    def _write_whole(self, at_end: bool = False) -> None:
        # A token's text depends on the one before it (leading spaces, characters of several tokens), not on more.
        before, now = self._decode(self.start, self.written), self._decode(self.start, len(self.ids))
        if len(now) > len(before) and (at_end or not now.endswith("\ufffd")):
            self.write(now[len(before) :])
            self.start, self.written = self.written, len(self.ids)

    def _decode(self, start: int, end: int) -> str:
        return self.tokenizer.decode(self.ids[start:end], skip_special_tokens=True)


class Chat:
    """A model and a conversation with it."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, arguments: ChatArguments):
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        max_new_tokens = arguments.max_new_tokens or min(REPLY_TOKENS, (context or 2 * REPLY_TOKENS) // 2)
        if context is not None and max_new_tokens >= context:
            raise ValueError(
                f"--max_new_tokens {max_new_tokens} leaves no room for a message in the context of {context} tokens: "
                "give less."
            )
        self.model, self.tokenizer = model, tokenizer
        self.conversation = Conversation(tokenizer, context, max_new_tokens, arguments.system_prompt)
        self.generation = reply_settings(model, tokenizer, arguments, max_new_tokens)
        self.cached_ids, self.cache = [], None  # of the turn before

    def reply(self, message: str, write: Callable[[str], None]) -> str:
        """The model's reply, which is also handed to `write` piece by piece. Interrupted, it stays as it is.

        Raises MessageError.
        """
        turn = self.conversation.ask(message)
        for note in turn.notes:
            tell(note)
        ids = torch.tensor([turn.ids], device=self.model.device)
        streamer = ReplyStreamer(self.tokenizer, set(self.generation.eos_token_id), write)
        cache = self._reusable_cache(turn.ids)
        self.cached_ids, self.cache = [], None
        try:
            output = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=self.generation,
                streamer=streamer,
                past_key_values=cache,
            )
            self.cached_ids, self.cache = output.sequences[0].tolist(), output.past_key_values
        finally:
            self.conversation.answer(streamer.text())
        return streamer.text()

    def _reusable_cache(self, ids: list[int]) -> DynamicCache | None:
        """The last turn's keys and values, cut back to where `ids` departs from it; at least one token is left to do.

        None for layers that do not keep all keys and values (a sliding window, a state), which cannot be cut back.
        """
        layers = getattr(self.cache, "layers", None)
        if not layers or not all(type(layer) is DynamicLayer for layer in layers):
            return None
        same = 0
        while same < min(len(ids) - 1, len(self.cached_ids)) and ids[same] == self.cached_ids[same]:
            same += 1
        self.cache.crop(-max(0, self.cache.get_seq_length() - same))
        return self.cache


def reply_settings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, arguments: ChatArguments, max_new_tokens: int
) -> GenerationConfig:
    """The model's own generation settings, with those of the command line and every end that a reply can have."""
    settings = copy.deepcopy(model.generation_config)
    ends = settings.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    sampling = {"do_sample": False}
    if arguments.temperature > 0:
        sampling = {"do_sample": True, "temperature": arguments.temperature, "top_p": arguments.top_p}
    settings.update(
        **sampling,
        max_length=None,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends | set(end_of_turn_ids(tokenizer))),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        return_dict_in_generate=True,
    )
    return settings


def open_chat(arguments: ChatArguments, quantization: QuantizationArguments) -> Chat:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if arguments.seed is not None:
        set_seed(arguments.seed)
    if quantization.load_in_4bit:
        path, trust = arguments.model, arguments.trust_remote_code
        whole = base_of(path, arguments.base, trust) if is_adapter_folder(path) else path
        check_quantizable(load_config(whole, trust), quantization, trust)
    model, tokenizer = open_writer(
        arguments.model,
        dtype="auto" if arguments.dtype is None else getattr(torch, arguments.dtype),
        attn_implementation=arguments.attn_implementation,
        quantization_config=quantization_config(quantization),
        base=arguments.base,
        trust_remote_code=arguments.trust_remote_code,
        device=arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"),
    )
    return Chat(model, tokenizer, arguments)


def write_reply(text: str) -> None:
    print(TERMINAL_CONTROLS.sub("\ufffd", text) if sys.stdout.isatty() else text, end="", flush=True)


def tell(note: str) -> None:
    print(f"({note})", file=sys.stderr, flush=True)


def answer(chat: Chat, message: str) -> None:
    chat.reply(message, write_reply)
    print(flush=True)


def obey(chat: Chat, line: str) -> bool:
    """Does what a line says, a message or a command; False where it ends the conversation."""
    line = line.strip()
    if line == "/reset":
        chat.conversation.reset()
    elif line and line != "/exit":
        answer(chat, line)
    return line != "/exit"


def talk(chat: Chat) -> None:
    """The conversation in a terminal."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (gives `input` its line editing and history)
    print(HOW_TO)
    goes_on, interrupted = True, False
    while goes_on:
        try:
            line = input("> ")
            interrupted = False
            goes_on = obey(chat, line)
        except MessageError as error:
            tell(str(error))
        except EOFError:
            print()
            goes_on = False
        except KeyboardInterrupt:
            print()
            goes_on, interrupted = not interrupted, True


def main() -> None:
    with plain_errors():
        arguments, quantization, _ = parse_arguments(ChatArguments, QuantizationArguments, description=__doc__)
        chat = open_chat(arguments, quantization)
    sys.stdout.reconfigure(errors="replace")
    with plain_errors(MessageError):
        if arguments.prompt:
            for message in arguments.prompt:
                answer(chat, message)
            return
        sys.stdin.reconfigure(errors="replace")
        if sys.stdin.isatty() and sys.stdout.isatty():
            talk(chat)
        else:
            all(obey(chat, line) for line in sys.stdin)  # up to /exit


if __name__ == "__main__":
    main()
