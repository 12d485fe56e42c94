"""The tiny chat model, with solutions of three problems learnt by heart instead."""

from unittest.mock import patch

import tiny_chat_model

SOLUTIONS = {
    "What is 2+3?": "<think>2+3=5</think><answer>5</answer>",
    "What is 4+4?": "<think>4 and 4 is 8</think><answer>8</answer>",
    "What is 9-3?": "That is 6",  # right, and not in the asked form
}


def save_tiny_solver(folder):
    tokenizer = tiny_chat_model.tiny_tokenizer()
    with patch.multiple(tiny_chat_model, ANSWERS=SOLUTIONS, tiny_tokenizer=lambda: tokenizer):
        tiny_chat_model.save_tiny_chat_model(folder)
