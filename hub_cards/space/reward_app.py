"""A page on which people try a reward model: two answers to one question, and which it expects people to prefer.

What it shows is in `space.json` beside it. The environment variable MODEL, a folder or a Hub id, takes the place of the
model named there.
"""

import json
import math
import os
import traceback
from pathlib import Path

import gradio as gr
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

SPACE = json.loads(Path(__file__).with_name("space.json").read_text(encoding="utf-8"))
MODEL = os.environ.get("MODEL") or SPACE["model"]


class RewardModel:
    """The model and its tokenizer."""

    def __init__(self, path: str):
        options = {"trust_remote_code": SPACE["trust_remote_code"], "use_safetensors": True, "dtype": torch.float32}
        self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=SPACE["trust_remote_code"])
        if SPACE["adapter"]:
            from peft import AutoPeftModelForSequenceClassification

            model = AutoPeftModelForSequenceClassification.from_pretrained(path, num_labels=1, **options)
            model.config.pad_token_id = self.tokenizer.pad_token_id
        else:
            model = AutoModelForSequenceClassification.from_pretrained(path, **options)
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self.context = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    @torch.inference_mode()
    def score(self, question: str, answer: str) -> float:
        """Raises ValueError for an empty text, and where question and answer exceed the context."""
        if not question.strip() or not answer.strip():
            raise ValueError("Give a question and two answers to compare.")
        conversation = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        inputs = self.tokenizer.apply_chat_template(conversation, return_tensors="pt", return_dict=True)
        tokens = inputs["input_ids"].shape[1]
        if self.context is not None and tokens > self.context:
            raise ValueError(
                f"Question and answer take {tokens} tokens, and the model reads at most {self.context}: shorten them."
            )
        return self.model(**inputs.to(self.model.device)).logits[0, 0].item()

    def compare(self, question: str, first: str, second: str) -> tuple[dict[str, float], str]:
        """How likely each answer is preferred, by the Bradley-Terry model, and both scores as a sentence."""
        scores = self.score(question, first), self.score(question, second)
        preferred = 1 / (1 + math.exp(min(scores[1] - scores[0], 700)))
        shares = {"First answer": preferred, "Second answer": 1 - preferred}
        return shares, f"Scores: {scores[0]:+.3f} and {scores[1]:+.3f}. Only their difference means something."


def reward_page(model: RewardModel) -> gr.Blocks:
    def compare(*texts: str) -> tuple[dict[str, float] | None, str]:
        try:
            return model.compare(*texts)
        except ValueError as error:
            gr.Warning(str(error))
            return None, ""

    with gr.Blocks(title=SPACE["title"], analytics_enabled=False) as page:
        gr.Markdown(header())
        question = gr.Textbox(label="Question", autofocus=True)
        with gr.Row():
            answers = [gr.Textbox(label=f"{which} answer", lines=4, min_width=280) for which in ("First", "Second")]
        button = gr.Button("Compare", variant="primary")
        examples = SPACE["examples"]
        gr.Examples(examples, [question, *answers], example_labels=[example[0] for example in examples])
        preferred = gr.Label(label="Preferred with the probability")
        scores = gr.Markdown()
        button.click(compare, [question, *answers], [preferred, scores], api_name="compare")
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
        model = RewardModel(MODEL)
    except Exception as error:  # whatever stops the loading, the page says it
        traceback.print_exc()
        return apology(error)
    return reward_page(model)


if __name__ == "__main__":
    build_page().queue(max_size=30, default_concurrency_limit=1).launch(footer_links=[])
