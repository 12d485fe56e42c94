"""Models in the Hugging Face shape. Importing the package registers its families with transformers' Auto classes."""

from .llama_style import (
    LlamaStyleConfig,
    LlamaStyleForCausalLM,
    LlamaStyleForSequenceClassification,
    LlamaStyleModel,
)

__all__ = [
    "LlamaStyleConfig",
    "LlamaStyleForCausalLM",
    "LlamaStyleForSequenceClassification",
    "LlamaStyleModel",
]
