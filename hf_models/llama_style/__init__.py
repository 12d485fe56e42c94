from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .configuration_llama_style import LlamaStyleConfig
from .modeling_llama_style import (
    LlamaStyleForCausalLM,
    LlamaStyleForSequenceClassification,
    LlamaStyleModel,
    LlamaStylePreTrainedModel,
)

AutoConfig.register(LlamaStyleConfig.model_type, LlamaStyleConfig)
# `register` makes the Auto classes of this process know the family; `register_for_auto_class` makes whatever saves the
# model copy its code into the folder, for processes that have never heard of us.
LlamaStyleConfig.register_for_auto_class()
for auto_class, model_class in (
    (AutoModel, LlamaStyleModel),
    (AutoModelForCausalLM, LlamaStyleForCausalLM),
    (AutoModelForSequenceClassification, LlamaStyleForSequenceClassification),
):
    auto_class.register(LlamaStyleConfig, model_class)
    model_class.register_for_auto_class(auto_class.__name__)

__all__ = [
    "LlamaStyleConfig",
    "LlamaStyleForCausalLM",
    "LlamaStyleForSequenceClassification",
    "LlamaStyleModel",
    "LlamaStylePreTrainedModel",
]
