"""A page on which people try a tokenizer: a text as its tokens and their ids.

What it shows is in `space.json` beside it. The environment variable MODEL, a folder or a Hub id, takes the place of the
tokenizer named there.
"""

import json
import os
import traceback
from pathlib import Path

import gradio as gr
from transformers import AutoTokenizer, PreTrainedTokenizerBase

SPACE = json.loads(Path(__file__).with_name("space.json").read_text(encoding="utf-8"))
MODEL = os.environ.get("MODEL") or SPACE["model"]
LONGEST_TEXT = 10_000  # characters: a browser is slow with more coloured pieces


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[tuple[str, str]], str]:
    """Each token's text with its id, and how many there are."""
    if len(text) > LONGEST_TEXT:
        return [], f"The text has {len(text):,} characters: this page shows at most {LONGEST_TEXT:,}."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = []
    for number in ids:
        piece = tokenizer.decode([number])
        if "\ufffd" in piece:  # some of a character's bytes
            piece = tokenizer.convert_ids_to_tokens(number)
        pieces.append((piece.replace("\n", "⏎"), str(number)))
    if not ids:
        return [], ""
    return pieces, f"{len(ids)} tokens for {len(text)} characters: {len(text) / len(ids):.2f} characters a token."


def tokenizer_page(tokenizer: PreTrainedTokenizerBase) -> gr.Blocks:
    def show(text: str) -> tuple[list[tuple[str, str]], str]:
        return tokenize(tokenizer, text)

    with gr.Blocks(title=SPACE["title"], analytics_enabled=False) as page:
        gr.Markdown(header())
        text = gr.Textbox(SPACE["examples"][0], label="Text", lines=4, max_lines=12, autofocus=True)
        gr.Examples([[example] for example in SPACE["examples"]], text)
        pieces = gr.HighlightedText(label="Tokens and their ids", show_legend=False, show_inline_category=True)
        told = gr.Markdown()
        gr.on(
            [page.load, text.change],
            show,
            text,
            [pieces, told],
            trigger_mode="always_last",
            show_progress="hidden",
            api_name="tokenize",
        )
    return page


def header() -> str:
    return f"# {SPACE['title']}\n{SPACE['description']}"


def apology(error: Exception) -> gr.Blocks:
    """The page where the tokenizer cannot be opened."""
    with gr.Blocks(title=SPACE["title"], analytics_enabled=False) as page:
        reason = str(error).strip().split("\n")[0]
        gr.Markdown(f"{header()}\n\n**The tokenizer could not be opened**, so there is nothing to try here: {reason}")
    return page


def build_page() -> gr.Blocks:
    try:
        tokenizer = AutoTokenizer.from_pretrained(MODEL, trust_remote_code=SPACE["trust_remote_code"])
    except Exception as error:  # whatever stops the loading, the page says it
        traceback.print_exc()
        return apology(error)
    return tokenizer_page(tokenizer)


if __name__ == "__main__":
    build_page().queue(max_size=30).launch(footer_links=[])
