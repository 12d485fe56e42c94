"""Models in the Hugging Face shape. Importing the package registers its families with transformers' Auto classes."""

from .convnextv2_fcmae import (
    ConvNextV2FcmaeBackbone,
    ConvNextV2FcmaeConfig,
    ConvNextV2FcmaeForImageClassification,
    ConvNextV2FcmaeForPreTraining,
    ConvNextV2FcmaeModel,
)
from .llama_style import (
    LlamaStyleConfig,
    LlamaStyleForCausalLM,
    LlamaStyleForSequenceClassification,
    LlamaStyleModel,
)

__all__ = [
    "ConvNextV2FcmaeBackbone",
    "ConvNextV2FcmaeConfig",
    "ConvNextV2FcmaeForImageClassification",
    "ConvNextV2FcmaeForPreTraining",
    "ConvNextV2FcmaeModel",
    "LlamaStyleConfig",
    "LlamaStyleForCausalLM",
    "LlamaStyleForSequenceClassification",
    "LlamaStyleModel",
]
