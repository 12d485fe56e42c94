"""FCMAE of transformers' ConvNextV2 layers as they are: the masked-dense model that the sparse one is timed against.

Every cell is computed. The mask is multiplied in where the result would otherwise differ from a sparse one, and nowhere
else: after the stem or the downsampling, after each block, and by a hook in front of each GRN, whose norm is over
visible cells. Parameters carry the names of our `ConvNextV2FcmaeForPreTraining`, so that its weights load as they are.
"""

from functools import partial

import torch
from torch import nn
from transformers import ConvNextV2Config, ConvNextV2Model
from transformers.models.convnextv2.modeling_convnextv2 import ConvNextV2Layer

from hf_models.convnextv2_fcmae import ConvNextV2FcmaeConfig


class StockFcmae(nn.Module):
    def __init__(self, config: ConvNextV2FcmaeConfig):
        super().__init__()
        self.config = config
        shape = {"hidden_sizes": config.hidden_sizes, "depths": config.depths, "num_stages": config.num_stages}
        native = ConvNextV2Config(**shape, patch_size=config.patch_size, num_channels=config.num_channels)
        self.convnextv2 = ConvNextV2Model(native)
        self.convnextv2.layernorm = None  # masked pretraining has no final norm
        self.decoder = StockDecoder(config, native)
        self._stage_masks: list[torch.Tensor] = []  # (batch, height, width, 1), of the current forward pass
        for index, stage in enumerate(self.convnextv2.encoder.stages):
            for layer in stage.layers:
                layer.grn.register_forward_pre_hook(partial(self._mask_features, index))

    def _mask_features(self, stage: int, module: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        return inputs[0] * self._stage_masks[stage].to(inputs[0].dtype)

    def encode(self, pixel_values: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """The last hidden states `(batch, channels, height, width)`; `kept (batch, 1, height, width)` is by patch."""
        hidden_states = self.convnextv2.embeddings(pixel_values)
        sides = [2**index for index in reversed(range(self.config.num_stages))]
        masks = [kept.repeat_interleave(side, dim=2).repeat_interleave(side, dim=3) for side in sides]
        self._stage_masks = [mask.permute(0, 2, 3, 1) for mask in masks]
        for stage, mask in zip(self.convnextv2.encoder.stages, masks, strict=True):
            for layer in stage.downsampling_layer:
                hidden_states = layer(hidden_states)
            hidden_states = hidden_states * mask.to(hidden_states.dtype)
            for layer in stage.layers:
                hidden_states = layer(hidden_states)
                hidden_states = hidden_states * mask.to(hidden_states.dtype)
        return hidden_states

    def forward(self, pixel_values: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """The loss: the mean squared error over removed patches, by patch normalised if the config says so."""
        predicted = self.decoder(self.encode(pixel_values, kept), kept).flatten(2).transpose(1, 2)
        side = self.config.mask_patch_size
        # Pixels of a patch in the order row, column, channel, where `unfold` has the channel first.
        target = nn.functional.unfold(pixel_values, side, stride=side).unflatten(1, (-1, side * side))
        target = target.permute(0, 3, 2, 1).flatten(2)
        if self.config.norm_pix_loss:
            variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) / (variance + self.config.norm_pix_loss_eps).sqrt()
        by_patch = (predicted.float() - target).square().mean(dim=-1)
        removed = 1 - kept.flatten(1)
        return (by_patch * removed).sum() / removed.sum()


class StockDecoder(nn.Module):
    def __init__(self, config: ConvNextV2FcmaeConfig, native: ConvNextV2Config):
        super().__init__()
        hidden_size = config.decoder_hidden_size
        self.proj = nn.Conv2d(config.hidden_sizes[-1], hidden_size, kernel_size=1)
        self.mask_token = nn.Parameter(torch.zeros(1, hidden_size, 1, 1))
        layers = config.decoder_num_hidden_layers
        self.layers = nn.ModuleList(ConvNextV2Layer(native, hidden_size) for _ in range(layers))
        self.pred = nn.Conv2d(hidden_size, config.mask_patch_size**2 * config.num_channels, kernel_size=1)

    def forward(self, hidden_states: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """`(batch, channels, height, width)` -> `(batch, pixels of a patch, height, width)`."""
        projected = self.proj(hidden_states)
        kept = kept.to(projected.dtype)
        hidden_states = projected * kept + self.mask_token.to(projected.dtype) * (1 - kept)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return self.pred(hidden_states)
