"""A page on which people try a language model: a chat, or for a base model a text that it continues.

What it shows is in `space.json` beside it. The environment variable MODEL, a folder or a Hub id, takes the place of the
model named there. Notable here:
- text appears as it is written, and Stop ends the writing, not just the showing;
- thoughts between <think> and </think> are folded, while they are written too;
- what no longer fits into the context is forgotten from its oldest end, and the page says so.
"""

import copy
import itertools
import json
import os
import re
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

SPACE = json.loads(Path(__file__).with_name("space.json").read_text(encoding="utf-8"))
MODEL = os.environ.get("MODEL") or SPACE["model"]
LONGEST_REPLY = 2048  # tokens, where the context has room for so many
THINK_TAGS = ("<think>", "</think>")
ANSWER_TAGS = re.compile("</?answer>")  # of models that are rewarded for them; people read what is between them


class Refusal(ValueError):
    """What the page says in place of a text: nothing was asked, too much, or the model wrote nothing."""


class Stop(StoppingCriteria):
    """Ends a reply when somebody asks for it, and counts its tokens."""

    def __init__(self):
        self.asked = threading.Event()
        self.tokens = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        self.tokens += 1
        return torch.full((len(input_ids),), self.asked.is_set(), device=input_ids.device)


class LanguageModel:
    """The model, its tokenizer, and what a page asks of them. Messages are dicts of `role` and `content`."""

    def __init__(self, path: str):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        # Half precision is slow on most CPUs.
        options = {"dtype": "auto" if device == "cuda" else torch.float32, "use_safetensors": True}
        options["trust_remote_code"] = SPACE["trust_remote_code"]
        if SPACE["adapter"]:
            from peft import AutoPeftModelForCausalLM

            model = AutoPeftModelForCausalLM.from_pretrained(path, **options)
            if SPACE["own_generation_config"]:
                model.generation_config = GenerationConfig.from_pretrained(path)
        else:
            model = AutoModelForCausalLM.from_pretrained(path, **options)
        self.model = model.to(device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=SPACE["trust_remote_code"])
        self.context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.longest_reply = min(LONGEST_REPLY, (self.context or 2 * LONGEST_REPLY) // 2)
        special = sorted(self.tokenizer.all_special_tokens, key=len, reverse=True)
        self.marks = re.compile("|".join(map(re.escape, special)) or "(?!)")
        self.takes_system_prompt = SPACE["chat"] and self._renders_system_prompt()

    def _renders_system_prompt(self) -> bool:
        try:
            self._chat_ids([{"role": "system", "content": "?"}, {"role": "user", "content": "?"}])
        except Exception:  # whatever a template raises to refuse a role
            return False
        return True

    def chat_prompt(self, messages: list[dict[str, str]], max_new_tokens: int) -> list[int]:
        """The tokens of a conversation, without its oldest exchanges where they would leave no room for a reply.

        Raises Refusal where the last message alone leaves none.
        """
        messages = [message | {"content": self.marks.sub("", message["content"])} for message in messages]
        system = [message for message in messages if message["role"] == "system"]
        exchanges = messages[len(system) :]
        ids = self._chat_ids(messages)
        while len(ids) > self._room(max_new_tokens) and len(exchanges) > 1:
            exchanges = exchanges[2:]
            ids = self._chat_ids(system + exchanges)
        if len(ids) > self._room(max_new_tokens):
            raise Refusal(
                f"The message takes {len(ids)} tokens; beside a reply of {max_new_tokens}, the model's context of "
                f"{self.context} has room for {self._room(max_new_tokens)}. Shorten it, or ask for a shorter reply."
            )
        if forgotten := (len(messages) - len(system) - len(exchanges)) // 2:
            gr.Info(f"The context of {self.context} tokens is full: the oldest {forgotten} exchange(s) are forgotten.")
        return ids

    def text_prompt(self, text: str, max_new_tokens: int) -> list[int]:
        """The tokens of a text, of which only the end is read where it is too long."""
        ids = self.tokenizer(text)["input_ids"]
        if len(ids) <= (room := self._room(max_new_tokens)):
            return ids
        gr.Info(f"The text has {len(ids)} tokens, of which the model reads the last {room}.")
        return ids[-room:]

    def _room(self, max_new_tokens: int) -> float:
        return float("inf") if self.context is None else self.context - max_new_tokens

    def _chat_ids(self, messages: list[dict[str, str]]) -> list[int]:
        encoded = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        return encoded["input_ids"]

    def write(self, ids: list[int], temperature: float, max_new_tokens: int) -> Iterator[str]:
        """What the model has written after the prompt `ids` so far, again and again as it grows.

        Closing the iterator ends the writing. Raises Refusal where the model fails or writes nothing.
        """
        # The streamer gets the prompt too: some tokenizers drop the space at the start of what they decode.
        prompt = self.tokenizer.decode(ids, skip_special_tokens=True)
        streamer = TextIteratorStreamer(self.tokenizer, skip_special_tokens=True)
        settings = copy.deepcopy(self.model.generation_config)
        sampling = {"do_sample": True, "temperature": temperature, "top_p": 0.95} if temperature > 0 else {}
        settings.update(**({"do_sample": False} | sampling), max_length=None, max_new_tokens=max_new_tokens)
        stop, failures = Stop(), []
        inputs = torch.tensor([ids], device=self.model.device)

        def generate() -> None:
            try:
                self.model.generate(
                    input_ids=inputs,
                    attention_mask=torch.ones_like(inputs),
                    generation_config=settings,
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([stop]),
                )
            except Exception as error:  # of another thread: told below
                traceback.print_exc()
                failures.append(error)
                streamer.end()

        writer = threading.Thread(target=generate, daemon=True)
        writer.start()
        text = ""
        try:
            for piece in streamer:
                text += piece
                if piece and len(text) > len(prompt):
                    yield text[len(prompt) :]
        finally:
            stop.asked.set()
            writer.join()
        if failures:
            raise Refusal(f"The model could not write: {failures[0]}")
        if len(text) <= len(prompt):
            raise Refusal("The model ended without writing anything.")
        if stop.tokens >= max_new_tokens:
            gr.Info(f"Cut at {max_new_tokens} tokens: more are in the settings.")


def respond(
    model: LanguageModel,
    message: str,
    history: list[dict],
    temperature: float,
    max_new_tokens: int,
    system_prompt: str = "",
) -> Iterator[str | dict]:
    """The reply to `message` so far, again and again; `history` is Gradio's. A refusal is a message with a title."""
    try:
        yield from _reply(model, message, spoken(history), temperature, max_new_tokens, system_prompt)
    except Refusal as refusal:
        yield {"role": "assistant", "content": str(refusal), "metadata": {"title": "Not answered"}}


def _reply(
    model: LanguageModel,
    message: str,
    exchanges: list[dict[str, str]],
    temperature: float,
    max_new_tokens: int,
    system_prompt: str,
) -> Iterator[str]:
    if not message.strip():
        raise Refusal("There is no message: type one, or take an example.")
    if SPACE["prompt_template"]:
        message = SPACE["prompt_template"].replace("{question}", message)
    if SPACE["chat"]:
        system = [{"role": "system", "content": system_prompt}] if system_prompt.strip() else []
        ids = model.chat_prompt([*system, *exchanges, {"role": "user", "content": message}], max_new_tokens)
    else:  # a model of questions and answers, each for itself
        ids = model.text_prompt(message, max_new_tokens)
    opened, closed = THINK_TAGS
    # Some templates begin the reply's thoughts themselves.
    start = opened if model.tokenizer.decode(ids[-8:]).rstrip().endswith(opened) else ""
    text = ""
    for piece in model.write(ids, temperature, max_new_tokens):
        text = start + ANSWER_TAGS.sub("", piece)
        yield text
    if text.rfind(opened) > text.rfind(closed):
        yield text + closed  # cut while it thought: the page stops waiting for the rest


def spoken(history: list[dict]) -> list[dict[str, str]]:
    """The messages of Gradio's history as a chat template takes them, without thoughts and refusals."""
    messages = []
    for message in history:
        if (message.get("metadata") or {}).get("title"):
            continue
        content = message["content"]
        if not isinstance(content, str):
            content = "".join(part["text"] for part in content if part.get("type") == "text")
        messages.append({"role": message["role"], "content": content})
    # A question that was refused, or whose reply was stopped at once, has no answer.
    roles = ["user", "assistant"]
    pairs = [pair for pair in itertools.pairwise(messages) if [message["role"] for message in pair] == roles]
    return [message for pair in pairs for message in pair]


def continue_text(model: LanguageModel, text: str, temperature: float, max_new_tokens: int) -> Iterator[str]:
    """The text with its continuation so far, again and again."""
    try:
        if not text.strip():
            raise Refusal("There is no text to continue: type its beginning, or take an example.")
        for written in model.write(model.text_prompt(text, max_new_tokens), temperature, max_new_tokens):
            yield text + written
    except Refusal as refusal:
        gr.Warning(str(refusal))
        yield text


def settings(model: LanguageModel) -> list[gr.Slider]:
    """Temperature, and the most tokens of a reply."""
    default = min(SPACE["max_new_tokens"], model.longest_reply)
    return [
        gr.Slider(0, 2, SPACE["temperature"], step=0.05, label="Temperature", info="0: always the likeliest token"),
        gr.Slider(1, model.longest_reply, default, step=1, label="Longest reply", info="in tokens"),
    ]


def chat_page(model: LanguageModel) -> gr.Blocks:
    def reply(*values) -> Iterator[str | dict]:
        yield from respond(model, *values)

    with gr.Blocks(title=SPACE["title"], analytics_enabled=False) as page:
        gr.Markdown(header())
        with gr.Accordion("Settings", open=False, render=False) as accordion:
            inputs = settings(model)
            if model.takes_system_prompt:
                inputs.append(gr.Textbox("", label="System prompt", info="what the model is told at the start"))
        chatbot = gr.Chatbot(
            show_label=False,
            buttons=["copy"],
            reasoning_tags=[THINK_TAGS],
            height="60vh",
            min_height=280,
            placeholder=SPACE["placeholder"],
        )
        gr.ChatInterface(
            reply,
            chatbot=chatbot,
            textbox=gr.Textbox(placeholder="Type a message", show_label=False, submit_btn=True, stop_btn=True),
            additional_inputs=inputs,
            examples=[[example] for example in SPACE["examples"]],
            cache_examples=False,
            flagging_mode="never",
            fill_height=False,
            api_name="respond",
        )
        accordion.render()
    return page


def text_page(model: LanguageModel) -> gr.Blocks:
    def proceed(*values) -> Iterator[str]:
        yield from continue_text(model, *values)

    with gr.Blocks(title=SPACE["title"], analytics_enabled=False) as page:
        gr.Markdown(header())
        text = gr.Textbox(label="Text", lines=8, max_lines=20, placeholder=SPACE["placeholder"], autofocus=True)
        with gr.Row():
            go = gr.Button("Continue", variant="primary", min_width=100)
            stop = gr.Button("Stop", min_width=100)
            gr.ClearButton(text, value="Clear", min_width=100)
        gr.Examples([[example] for example in SPACE["examples"]], text)
        with gr.Accordion("Settings", open=False):
            inputs = [text, *settings(model)]
        writing = gr.on(
            [go.click, text.submit],
            proceed,
            inputs,
            text,
            show_progress="minimal",
            api_name="continue_text",
        )
        stop.click(None, cancels=[writing])
    return page


def header() -> str:
    return f"# {SPACE['title']}\n{SPACE['description']}"


def apology(error: Exception) -> gr.Blocks:
    """The page where the model cannot be opened."""
    with gr.Blocks(title=SPACE["title"], analytics_enabled=False) as page:
        reason = str(error).strip().split("\n")[0]
        gr.Markdown(f"{header()}\n\n**The model could not be opened**, so there is nothing to try here: {reason}")
    return page


def build_page() -> gr.Blocks:
    try:
        model = LanguageModel(MODEL)
    except Exception as error:  # whatever stops the loading, the page says it
        traceback.print_exc()
        return apology(error)
    return chat_page(model) if SPACE["chat"] or SPACE["prompt_template"] else text_page(model)


if __name__ == "__main__":
    # One reply at a time: two would share the same cores. Others wait in the queue and see their place in it.
    build_page().queue(max_size=30, default_concurrency_limit=1).launch(footer_links=[])
