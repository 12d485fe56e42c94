from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification, AutoModelForPreTraining

from .configuration_convnextv2_fcmae import ConvNextV2FcmaeConfig
from .modeling_convnextv2_fcmae import (
    ConvNextV2FcmaeBackbone,
    ConvNextV2FcmaeForImageClassification,
    ConvNextV2FcmaeForPreTraining,
    ConvNextV2FcmaeModel,
    ConvNextV2FcmaePreTrainedModel,
)

AutoConfig.register(ConvNextV2FcmaeConfig.model_type, ConvNextV2FcmaeConfig)
ConvNextV2FcmaeConfig.register_for_auto_class()
for auto_class, model_class in (
    (AutoModel, ConvNextV2FcmaeModel),
    (AutoModelForPreTraining, ConvNextV2FcmaeForPreTraining),
    (AutoModelForImageClassification, ConvNextV2FcmaeForImageClassification),
    (AutoBackbone, ConvNextV2FcmaeBackbone),
):
    auto_class.register(ConvNextV2FcmaeConfig, model_class)
    model_class.register_for_auto_class(auto_class.__name__)

__all__ = [
    "ConvNextV2FcmaeBackbone",
    "ConvNextV2FcmaeConfig",
    "ConvNextV2FcmaeForImageClassification",
    "ConvNextV2FcmaeForPreTraining",
    "ConvNextV2FcmaeModel",
    "ConvNextV2FcmaePreTrainedModel",
]
