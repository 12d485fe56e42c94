"""Models in the Hugging Face shape. Importing the package registers its families with transformers' Auto classes.

Where the package is installed, `push_to_hub` of its models goes by way of `hub_cards`, which checks what it uploads; a
model that was opened by its remote code has transformers' own.
"""

from transformers import PreTrainedModel

from .convnextv2_fcmae import (
    ConvNextV2FcmaeBackbone,
    ConvNextV2FcmaeConfig,
    ConvNextV2FcmaeForImageClassification,
    ConvNextV2FcmaeForPreTraining,
    ConvNextV2FcmaeModel,
)
from .convnextv2_fcmae.modeling_convnextv2_fcmae import ConvNextV2FcmaePreTrainedModel
from .llama_style import (
    LlamaStyleConfig,
    LlamaStyleForCausalLM,
    LlamaStyleForSequenceClassification,
    LlamaStyleModel,
)
from .llama_style.modeling_llama_style import LlamaStylePreTrainedModel


def _push_to_hub(self: PreTrainedModel, repo_id: str, **options) -> str:
    """Checks the model as a stranger would, and publishes it: see `hub_cards.push_model.push_model`."""
    try:
        from hub_cards.push_model import push_model
    except ModuleNotFoundError as error:
        raise ImportError(f"push_to_hub needs {error.name}: pip install 'hf_models[train]'.") from error
    return push_model(self, repo_id, **options)


for _family in (ConvNextV2FcmaePreTrainedModel, LlamaStylePreTrainedModel):
    # Here and not in the classes: their files are remote code, and know nothing of this package.
    _family.push_to_hub = _push_to_hub

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
