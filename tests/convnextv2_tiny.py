"""Masked pretraining once more, from transformers' own layers: what our models are compared with.

Nothing of ours takes part. Every cell is computed; a hook at every depthwise convolution and at every GRN sets the
removed cells of its input to zero. All other layers of ConvNeXt see one cell, or one mask patch, at a time, so that
nothing else needs a mask, and removed cells may hold anything. The decoder follows arXiv 2301.00808, section 3.
"""

import torch
from torch import nn
from transformers import (
    ConvNextBackbone,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextModel,
    ConvNextV2Backbone,
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    ConvNextV2Model,
)
from transformers.models.convnext.modeling_convnext import ConvNextLayer
from transformers.models.convnextv2.modeling_convnextv2 import ConvNextV2Layer

V1 = {"use_grn": False, "layer_scale_init_value": 1e-6}
PARTS = {  # of transformers, by `config.use_grn`
    True: {
        "config": ConvNextV2Config,
        "model": ConvNextV2Model,
        "classifier": ConvNextV2ForImageClassification,
        "backbone": ConvNextV2Backbone,
        "layer": ConvNextV2Layer,
    },
    False: {
        "config": ConvNextConfig,
        "model": ConvNextModel,
        "classifier": ConvNextForImageClassification,
        "backbone": ConvNextBackbone,
        "layer": ConvNextLayer,
    },
}
SHARED_FIELDS = ("num_channels", "patch_size", "hidden_sizes", "depths", "hidden_act", "layer_norm_eps", "num_labels")


def their_config(config, **fields):
    """transformers' config of the same model."""
    fields |= {field: getattr(config, field) for field in SHARED_FIELDS}
    if not config.use_grn:
        fields["layer_scale_init_value"] = config.layer_scale_init_value
    return PARTS[config.use_grn]["config"](num_stages=len(config.depths), **fields)


def theirs(model, part: str, **fields):
    """transformers' model with the weights of `model`, in eval mode."""
    reference = PARTS[model.config.use_grn][part](their_config(model.config, **fields)).eval()
    prefix = reference.base_model_prefix + "."  # "convnext." for V1
    state = {name.replace("convnextv2.", prefix): tensor for name, tensor in model.state_dict().items()}
    reference.load_state_dict(state)
    return reference


class MaskedDense(nn.Module):
    """`loss`, `logits` and the encoder's last hidden states, with the parameter names of ConvNextV2FcmaeForPreTraining.

    `side` is a mask patch in pixels.
    """

    def __init__(self, model):
        super().__init__()
        config, theirs = their_config(model.config), PARTS[model.config.use_grn]
        self.side = config.patch_size * 2 ** (len(config.depths) - 1)
        self.eps = model.config.norm_pix_loss_eps if model.config.norm_pix_loss else None
        width, pixels = model.config.decoder_hidden_size, self.side**2 * config.num_channels
        self.convnextv2 = theirs["model"](config)
        self.convnextv2.layernorm = nn.Identity()
        self.decoder = nn.Module()
        self.decoder.proj = nn.Conv2d(config.hidden_sizes[-1], width, 1)
        self.decoder.mask_token = nn.Parameter(torch.zeros(1, width, 1, 1))
        self.decoder.layers = nn.ModuleList(
            theirs["layer"](config, width) for _ in range(model.config.decoder_num_hidden_layers)
        )
        self.decoder.pred = nn.Conv2d(width, pixels, 1)
        self.load_state_dict(model.state_dict())
        self.to(next(model.parameters()).dtype)
        for name, module in self.convnextv2.named_modules():
            if name.endswith((".dwconv", ".grn")):
                module.register_forward_pre_hook(self._hide_removed)

    def _hide_removed(self, module, inputs):
        """Convolutions see `(batch, channels, height, width)`, GRN `(batch, height, width, channels)`."""
        convolution = isinstance(module, nn.Conv2d)
        height = inputs[0].shape[2 if convolution else 1]
        kept = (1 - self.mask).to(inputs[0].dtype)[:, None]
        kept = nn.functional.interpolate(kept, scale_factor=height // kept.shape[2], mode="nearest")
        return inputs[0] * (kept if convolution else kept.permute(0, 2, 3, 1))

    def forward(self, pixel_values, mask):
        """`mask (batch, patches)`, 1 for removed."""
        batch, channels, height, width = pixel_values.shape
        self.mask = mask.view(batch, height // self.side, width // self.side)
        encoded = self.convnextv2(pixel_values).last_hidden_state
        removed = self.mask[:, None]
        hidden = torch.where(removed == 1, self.decoder.mask_token, self.decoder.proj(encoded))
        for layer in self.decoder.layers:
            hidden = layer(hidden)
        logits = self.decoder.pred(hidden).flatten(2).transpose(1, 2)

        # unfold has the pixels of a patch as (channel, row, column), the official code as (row, column, channel).
        target = nn.functional.unfold(pixel_values, self.side, stride=self.side).transpose(1, 2)
        target = target.unflatten(2, (channels, self.side**2)).transpose(2, 3).flatten(2)
        if self.eps is not None:
            variance, mean = target.var(dim=2, keepdim=True), target.mean(dim=2, keepdim=True)
            target = (target - mean) / (variance + self.eps) ** 0.5
        loss = ((logits - target) ** 2).mean(dim=2)[mask == 1].mean()
        return loss, logits, encoded
