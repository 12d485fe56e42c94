"""ConvNeXt V2 and its masked pretraining, FCMAE (arXiv 2301.00808); ConvNeXt V1 (arXiv 2201.03545) by configuration.

Parameters carry transformers' ConvNextV2 names, so native checkpoints load as they are. Notable here:
- masked pretraining computes the visible cells only, gathered from stem to last stage, in plain PyTorch
  (`VisibleCells`); a path that computes every cell and multiplies by the mask is the reference, and what is exported;
- GRN takes its norm per image, over visible cells only and in float32, so that it is one and the same function in
  pretraining, whatever else is in the batch, and in fine-tuning, and stays finite in half precision;
- hidden states are `(batch, height, width, channels)` throughout, which convolutions see as channels_last;
- stochastic depth and gradient checkpointing work in every class.

This file is published beside the weights (remote code): it imports torch, transformers and its siblings only.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_convnextv2_fcmae import ConvNextV2FcmaeConfig
from .visible_cells_convnextv2_fcmae import VisibleCells, depthwise, halve, pointwise, refuse_second_derivative

NORM_EPS = 1e-6  # of every norm but the final one, and of GRN's division


class ConvNextV2FcmaeGRN(nn.Module):
    """Global response normalisation (arXiv 2301.00808, section 4): each channel scaled by its share of the response."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.bias = nn.Parameter(torch.zeros(1, 1, 1, channels))

    def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """`hidden_states (batch, ..., channels)`; cells where `mask (batch, ..., 1)` is 0 do not count."""
        if mask is not None:
            hidden_states = hidden_states * mask.to(hidden_states.dtype)
        cells, weight, bias = hidden_states.flatten(1, -2), self.weight.view(1, 1, -1), self.bias.view(1, 1, -1)
        differentiable = torch.is_grad_enabled()
        if self.training and differentiable and not torch.compiler.is_compiling():
            return _GRN.apply(cells, weight, bias).view_as(hidden_states)
        # float16 overflows here, and a sum of thousands of squares in bfloat16 loses its digits.
        dtype = _at_least_float32(cells)
        # The root in `_norm` has no gradient where a channel is 0 throughout; `vector_norm` takes 0.
        norm = torch.linalg.vector_norm(cells, dim=1, keepdim=True, dtype=dtype) if differentiable else _norm(cells)
        scale = 1 + weight * norm / (norm.mean(dim=-1, keepdim=True) + NORM_EPS)
        return torch.addcmul(bias.to(cells.dtype), cells, scale.to(cells.dtype)).view_as(hidden_states)


class _GRN(torch.autograd.Function):
    """The same with its gradient written out: fewer passes over the largest tensors of a block, one of them kept."""

    @staticmethod
    def forward(ctx, cells, weight, bias):
        norm = _norm(cells)
        mean = norm.mean(dim=-1, keepdim=True) + NORM_EPS
        scale = (1 + weight * norm / mean).to(cells.dtype)
        ctx.save_for_backward(cells, weight, norm, scale)
        return torch.addcmul(bias.to(cells.dtype), cells, scale)

    @staticmethod
    def backward(ctx, gradient):
        refuse_second_derivative()
        cells, weight, norm, scale = ctx.saved_tensors
        mean = norm.mean(dim=-1, keepdim=True) + NORM_EPS
        if cells.dtype == torch.float16:  # a large activation times the gradient of a scaled-up loss overflows
            gradient, cells = gradient.float(), cells.float()
        scale_gradient = (gradient * cells).sum(dim=1, keepdim=True, dtype=norm.dtype)
        weight_gradient = (scale_gradient * norm / mean).sum(dim=0, keepdim=True)
        share_gradient = scale_gradient * weight
        norm_gradient = (share_gradient - (share_gradient * norm).mean(dim=-1, keepdim=True) / mean) / mean
        # A channel that is zero throughout has norm 0 and no gradient through it.
        direction = torch.where(norm > 0, norm_gradient / norm, 0).to(cells.dtype)
        bias_gradient = gradient.sum(dim=(0, 1), dtype=norm.dtype).view_as(weight)
        return (gradient * scale).addcmul_(cells, direction), weight_gradient, bias_gradient


def _norm(cells: torch.Tensor) -> torch.Tensor:
    """`vector_norm` over the cells; on a CPU that function takes up to a hundred times as long as this."""
    return cells.to(_at_least_float32(cells)).square().sum(dim=1, keepdim=True).sqrt()


def _at_least_float32(cells: torch.Tensor) -> torch.dtype:
    return torch.promote_types(cells.dtype, torch.float32)


class ConvNextV2FcmaeDropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): drops a residual branch for whole images while training."""

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.training or self.drop_prob == 0:
            return hidden_states
        shape = (len(hidden_states), *(1,) * (hidden_states.ndim - 1))
        kept = hidden_states.new_empty(shape).bernoulli_(1 - self.drop_prob)
        return hidden_states * kept / (1 - self.drop_prob)


class ConvNextV2FcmaeLayer(GradientCheckpointingLayer):
    """One block: depthwise 7x7, LayerNorm, and an MLP with GRN (V2) or LayerScale (V1), added to its input."""

    def __init__(self, config: ConvNextV2FcmaeConfig, channels: int, drop_path_rate: float = 0.0):
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, kernel_size=7, padding=3, groups=channels)
        self.layernorm = nn.LayerNorm(channels, eps=NORM_EPS)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.act = ACT2FN[config.hidden_act]
        self.grn = ConvNextV2FcmaeGRN(4 * channels) if config.use_grn else None
        self.pwconv2 = nn.Linear(4 * channels, channels)
        self.layer_scale_init_value = config.layer_scale_init_value
        self.layer_scale_parameter = (
            nn.Parameter(torch.full((channels,), float(config.layer_scale_init_value)))
            if config.layer_scale_init_value > 0
            else None
        )
        self.drop_path = ConvNextV2FcmaeDropPath(drop_path_rate)

    def forward(
        self, hidden_states: torch.Tensor, visible: VisibleCells | None = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: `(batch, height, width, channels)`, or with `visible` its cells `(batch, kept, side, side,
                channels)`.
            mask: `(batch, height, width, 1)`, 0 where a cell is removed: every cell is computed, and those set to 0.
        """
        features = self.layernorm(depthwise(hidden_states, self.dwconv, visible))
        features = self.act(self.pwconv1(features))
        if self.grn is not None:
            features = self.grn(features, mask)
        features = self.pwconv2(features)
        if self.layer_scale_parameter is not None:
            features = features * self.layer_scale_parameter
        if mask is not None:
            features = features * mask.to(features.dtype)
        return hidden_states + self.drop_path(features)


class ConvNextV2FcmaeStage(nn.Module):
    """Halves the resolution, but for the first stage, and runs its blocks."""

    def __init__(self, config: ConvNextV2FcmaeConfig, index: int, drop_path_rates: list[float]):
        super().__init__()
        channels = config.hidden_sizes[index]
        self.downsampling_layer = nn.ModuleList()
        if index > 0:
            before = config.hidden_sizes[index - 1]
            self.downsampling_layer.append(nn.LayerNorm(before, eps=NORM_EPS))
            self.downsampling_layer.append(nn.Conv2d(before, channels, kernel_size=2, stride=2))
        self.layers = nn.ModuleList(ConvNextV2FcmaeLayer(config, channels, rate) for rate in drop_path_rates)

    def forward(
        self, hidden_states: torch.Tensor, visible: VisibleCells | None = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As `ConvNextV2FcmaeLayer.forward`; `mask` is the patches', `(batch, grid height, grid width, 1)`."""
        if self.downsampling_layer:
            norm, convolution = self.downsampling_layer
            # Cells of a patch stay with their patch, so that a patch is a small image of its own here.
            hidden_states = halve(norm(hidden_states), convolution)
        if mask is not None:
            side = hidden_states.shape[1] // mask.shape[1]
            mask = mask.repeat_interleave(side, dim=1).repeat_interleave(side, dim=2)
            hidden_states = hidden_states * mask
        for layer in self.layers:
            hidden_states = layer(hidden_states, visible, mask)
        return hidden_states


class ConvNextV2FcmaeEmbeddings(nn.Module):
    """The stem: patches of pixels to cells, and a norm."""

    def __init__(self, config: ConvNextV2FcmaeConfig):
        super().__init__()
        self.patch_embeddings = nn.Conv2d(
            config.num_channels, config.hidden_sizes[0], kernel_size=config.patch_size, stride=config.patch_size
        )
        self.layernorm = nn.LayerNorm(config.hidden_sizes[0], eps=NORM_EPS)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(batch, channels, height, width)` -> `(batch, height / patch_size, width / patch_size, hidden)`."""
        return self.layernorm(self.patch_embeddings(pixel_values).permute(0, 2, 3, 1))


class ConvNextV2FcmaeEncoder(nn.Module):
    def __init__(self, config: ConvNextV2FcmaeConfig):
        super().__init__()
        # Rising from 0 in the first block; on the CPU, whatever device the model is made on.
        rates = torch.linspace(0, config.drop_path_rate, sum(config.depths), device="cpu").split(config.depths)
        self.stages = nn.ModuleList(
            ConvNextV2FcmaeStage(config, index, stage_rates.tolist()) for index, stage_rates in enumerate(rates)
        )

    def forward(
        self, hidden_states: torch.Tensor, visible: VisibleCells | None = None, mask: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """The output of every stage, in the layout of its input (see `ConvNextV2FcmaeLayer.forward`)."""
        outputs = []
        for stage in self.stages:
            hidden_states = stage(hidden_states, visible, mask)
            outputs.append(hidden_states)
        return outputs


class ConvNextV2FcmaePreTrainedModel(PreTrainedModel):
    config_class = ConvNextV2FcmaeConfig
    config: ConvNextV2FcmaeConfig
    base_model_prefix = "convnextv2"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # losses are means over images: Trainer divides accumulated ones itself
    _no_split_modules = ["ConvNextV2FcmaeLayer"]
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, nn.Linear | nn.Conv2d):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, ConvNextV2FcmaeGRN):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, ConvNextV2FcmaeLayer) and module.layer_scale_parameter is not None:
            init.constant_(module.layer_scale_parameter, module.layer_scale_init_value)
        elif isinstance(module, ConvNextV2FcmaeDecoder):
            init.normal_(module.mask_token, std=self.config.initializer_range)
        else:
            super()._init_weights(module)

    def _check_channels(self, pixel_values: torch.Tensor) -> None:
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.config.num_channels:
            raise ValueError(
                f"pixel_values has the shape {tuple(pixel_values.shape)}: expected is (batch, "
                f"{self.config.num_channels}, height, width), {self.config.num_channels} being config.num_channels."
            )


class ConvNextV2FcmaeModel(ConvNextV2FcmaePreTrainedModel):
    """The encoder over whole images, with the normed mean over its cells as `pooler_output`."""

    def __init__(self, config: ConvNextV2FcmaeConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = ConvNextV2FcmaeEmbeddings(config)
        self.encoder = ConvNextV2FcmaeEncoder(config)
        # Masked pretraining has no final norm.
        self.layernorm = nn.LayerNorm(config.hidden_sizes[-1], eps=config.layer_norm_eps) if add_pooling_layer else None
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, output_hidden_states: bool | None = None, **kwargs
    ) -> BaseModelOutputWithPoolingAndNoAttention:
        """`pixel_values (batch, channels, height, width)`, of any size that leaves the last stage a cell.

        Returns `last_hidden_state (batch, hidden, height / 32, width / 32)`, `pooler_output (batch, hidden)` and, where
        asked for, `hidden_states`: stem and stages, all channels first. (32 stands for `config.mask_patch_size`.)
        """
        self._check_channels(pixel_values)
        hidden_states = self.embeddings(pixel_values)
        states = [hidden_states, *self.encoder(hidden_states)]
        pooled = None if self.layernorm is None else self.layernorm(states[-1].mean(dim=(1, 2)))
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        states = [state.permute(0, 3, 1, 2) for state in states]
        return BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=states[-1],
            pooler_output=pooled,
            hidden_states=tuple(states) if output_hidden_states else None,
        )


class ConvNextV2FcmaeForImageClassification(ConvNextV2FcmaePreTrainedModel):
    """The encoder with a linear classifier on its pooled output."""

    def __init__(self, config: ConvNextV2FcmaeConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.convnextv2 = ConvNextV2FcmaeModel(config)
        self.classifier = nn.Linear(config.hidden_sizes[-1], config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> ImageClassifierOutputWithNoAttention:
        """Arguments of `ConvNextV2FcmaeModel.forward`, and `labels (batch,)`, or `(batch, num_labels)` for multi-label.

        Returns `logits (batch, num_labels)` and, with labels, a `loss`.
        """
        outputs = self.convnextv2(pixel_values, output_hidden_states=output_hidden_states)
        logits = self.classifier(outputs.pooler_output)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


class ConvNextV2FcmaeChannelsFirstLayerNorm(nn.LayerNorm):
    """Over the channels of `(batch, channels, height, width)`."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNextV2FcmaeBackbone(BackboneMixin, ConvNextV2FcmaePreTrainedModel):
    """The encoder as a backbone for detection and segmentation: one normed feature map for each of `out_features`."""

    has_attentions = False

    def __init__(self, config: ConvNextV2FcmaeConfig):
        super().__init__(config)
        self.embeddings = ConvNextV2FcmaeEmbeddings(config)
        self.encoder = ConvNextV2FcmaeEncoder(config)
        self.num_features = [config.hidden_sizes[0], *config.hidden_sizes]
        self.hidden_states_norms = nn.ModuleDict(
            {
                stage: ConvNextV2FcmaeChannelsFirstLayerNorm(channels, eps=NORM_EPS)
                for stage, channels in zip(self.out_features, self.channels, strict=True)
            }
        )
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, output_hidden_states: bool | None = None, **kwargs) -> BackboneOutput:
        """Returns `feature_maps`, one `(batch, channels, height, width)` for each of `out_features`, in their order."""
        self._check_channels(pixel_values)
        hidden_states = self.embeddings(pixel_values)
        states = [state.permute(0, 3, 1, 2) for state in (hidden_states, *self.encoder(hidden_states))]
        feature_maps = tuple(
            self.hidden_states_norms[stage](state)
            for stage, state in zip(self.stage_names, states, strict=True)
            if stage in self.out_features
        )
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return BackboneOutput(feature_maps=feature_maps, hidden_states=tuple(states) if output_hidden_states else None)


class ConvNextV2FcmaeDecoder(nn.Module):
    """Pixels of every patch from the visible patches: projection, mask tokens, one dense block, prediction."""

    def __init__(self, config: ConvNextV2FcmaeConfig):
        super().__init__()
        hidden_size = config.decoder_hidden_size
        self.proj = nn.Conv2d(config.hidden_sizes[-1], hidden_size, kernel_size=1)
        self.mask_token = nn.Parameter(torch.zeros(1, hidden_size, 1, 1))
        self.layers = nn.ModuleList(
            ConvNextV2FcmaeLayer(config, hidden_size) for _ in range(config.decoder_num_hidden_layers)
        )
        self.pred = nn.Conv2d(hidden_size, config.mask_patch_size**2 * config.num_channels, kernel_size=1)

    def forward(
        self, hidden_states: torch.Tensor, visible: VisibleCells | None, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """The encoder's last hidden states, gathered (`visible`) or on the grid (`mask`) -> `(batch, patches, pixels)`.

        Pixels of a patch are in the order row, column, channel.
        """
        token = self.mask_token.view(-1)
        cells = pointwise(hidden_states, self.proj)
        if visible is not None:
            canvas = token.to(cells.dtype).expand(len(cells) * visible.patches, -1)
            hidden_states = canvas.index_copy(0, visible.rows(1), cells.flatten(0, -2))
            hidden_states = hidden_states.view(len(cells), *visible.grid, -1)
        else:
            hidden_states = cells * mask + token * (1 - mask)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return pointwise(hidden_states, self.pred).flatten(1, 2)


@dataclass
class ConvNextV2FcmaeForPreTrainingOutput(ModelOutput):
    """
    Args:
        loss: mean squared error over the pixels of a removed patch, averaged over the removed patches; a scalar.
        logits: `(batch, patches, mask_patch_size**2 * channels)`, the prediction for every patch, pixels in the order
            row, column, channel; normalised by patch with `config.norm_pix_loss`.
        mask: `(batch, patches)`, 1 for removed; patches row by row.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    mask: torch.FloatTensor | None = None


class ConvNextV2FcmaeForPreTraining(ConvNextV2FcmaePreTrainedModel):
    """Fully convolutional masked autoencoder (arXiv 2301.00808, section 3)."""

    def __init__(self, config: ConvNextV2FcmaeConfig):
        super().__init__(config)
        self.convnextv2 = ConvNextV2FcmaeModel(config, add_pooling_layer=False)
        self.decoder = ConvNextV2FcmaeDecoder(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        mask_ratio: float | None = None,
        noise: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        masked_dense: bool = False,
        **kwargs,
    ) -> ConvNextV2FcmaeForPreTrainingOutput:
        """
        Args:
            pixel_values: `(batch, channels, height, width)`, both sides multiples of `config.mask_patch_size`.
            mask_ratio: share of the patches to remove; `config.mask_ratio` by default.
            noise: `(batch, patches)`; the patches with the least noise are kept. Random by default.
            mask: `(batch, patches)`, 1 for removed, in the place of ratio and noise.
            masked_dense: compute every cell and multiply by the mask, the reference for the sparse path. Then a `mask`
                may keep different numbers of patches in the images of a batch.

        Raises ValueError for sizes that are no multiple of the mask patch, a mask that keeps or removes nothing, and
        shapes other than these.
        """
        mask, number_kept = self._mask(pixel_values, mask_ratio, noise, mask, equal_numbers=not masked_dense)
        removed = mask.flatten(1)
        if masked_dense:
            kept = 1 - mask[..., None].to(pixel_values.dtype)
            hidden_states = self.convnextv2.embeddings(pixel_values)
            logits = self.decoder(self.convnextv2.encoder(hidden_states, mask=kept)[-1], None, kept)
        else:
            visible = VisibleCells(removed.bool(), tuple(mask.shape[1:]), number_kept)
            cells = self.convnextv2.embeddings(visible.gather_pixels(pixel_values))
            cells = cells.view(len(pixel_values), -1, *cells.shape[1:])
            logits = self.decoder(self.convnextv2.encoder(cells, visible)[-1], visible, None)
        loss = (self.patch_losses(pixel_values, logits) * removed).sum() / removed.sum()
        return ConvNextV2FcmaeForPreTrainingOutput(loss=loss, logits=logits, mask=removed)

    @torch.no_grad()
    def reconstruct(self, pixel_values: torch.Tensor, **kwargs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The original, the masked image (removed patches are 0) and the reconstruction, each like `pixel_values`.

        Takes the arguments of `forward`. Visible patches of the reconstruction are the original's. With
        `config.norm_pix_loss` the prediction of a patch gets that patch's true mean and deviation, as is usual
        (arXiv 2111.06377, figure 2): what is shown is the structure that was predicted, not the brightness.
        """
        outputs = self(pixel_values, **kwargs)
        patches = self.patchify(pixel_values).float()
        predicted = outputs.logits.float()
        if self.config.norm_pix_loss:
            mean, deviation = self._statistics(patches)
            predicted = predicted * deviation + mean
        removed = outputs.mask[..., None]
        size = pixel_values.shape[2:]
        masked = self.unpatchify(patches * (1 - removed), size)
        reconstruction = self.unpatchify(torch.where(removed == 1, predicted, patches), size)
        return pixel_values, masked.to(pixel_values.dtype), reconstruction.to(pixel_values.dtype)

    def patchify(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(batch, channels, height, width)` -> `(batch, patches, pixels)`, each patch by row, column, channel."""
        batch_size, channels, height, width = pixel_values.shape
        side = self.config.mask_patch_size
        patches = pixel_values.reshape(batch_size, channels, height // side, side, width // side, side)
        return patches.permute(0, 2, 4, 3, 5, 1).reshape(batch_size, -1, side * side * channels)

    def unpatchify(self, patches: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """The reverse of `patchify`, for images of `size` (height, width)."""
        side, channels = self.config.mask_patch_size, self.config.num_channels
        down, across = size[0] // side, size[1] // side
        patches = patches.view(len(patches), down, across, side, side, channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), channels, *size)

    def _statistics(self, patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        return mean, (variance + self.config.norm_pix_loss_eps).sqrt()

    def patch_losses(self, pixel_values: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The mean squared error of every patch, removed or not: `(batch, patches)`, float32."""
        target = self.patchify(pixel_values).float()
        if self.config.norm_pix_loss:
            mean, deviation = self._statistics(target)
            target = (target - mean) / deviation
        return (logits.float() - target).square().mean(dim=-1)

    def _mask(
        self,
        pixel_values: torch.Tensor,
        mask_ratio: float | None,
        noise: torch.Tensor | None,
        mask: torch.Tensor | None,
        equal_numbers: bool,
    ) -> tuple[torch.Tensor, int]:
        """The mask on the grid of patches, `(batch, grid height, grid width)`, 1 for removed, float32; how many are not
        (in the first image, where the numbers differ).
        """
        self._check_channels(pixel_values)
        batch_size, _, height, width = pixel_values.shape
        side = self.config.mask_patch_size
        if height % side or width % side or not height or not width:
            nearest = [max(side, round(length / side) * side) for length in (height, width)]
            raise ValueError(
                f"Images of {height} x {width} pixels do not divide into mask patches of {side} x {side}: resize them, "
                f"for example to {nearest[0]} x {nearest[1]}."
            )
        grid = (height // side, width // side)
        patches = grid[0] * grid[1]
        for name, given in (("noise", noise), ("mask", mask)):
            if given is not None and given.shape != (batch_size, patches):
                raise ValueError(
                    f"{name} has the shape {tuple(given.shape)}: expected is (batch, patches), {(batch_size, patches)}."
                )
        if mask is not None:
            self._check_mask(mask, equal_numbers)
            number_kept = patches - int(mask[0].sum())
            return mask.to(pixel_values.device, torch.float32).view(batch_size, *grid), number_kept

        ratio = self.config.mask_ratio if mask_ratio is None else mask_ratio
        kept = self.config.number_kept(patches, ratio)
        if not 0 < kept < patches:
            raise ValueError(
                f"mask_ratio {ratio} keeps {kept} of the {patches} patches of {height} x {width} pixels: choose a "
                "ratio that keeps at least one and removes at least one, or larger images."
            )
        if noise is None:
            noise = torch.rand(batch_size, patches, device=pixel_values.device)
        removed = torch.ones(batch_size, patches, device=pixel_values.device)
        removed.scatter_(1, noise.to(removed.device).argsort(dim=1)[:, :kept], 0)
        return removed.view(batch_size, *grid), kept

    def _check_mask(self, mask: torch.Tensor, equal_numbers: bool) -> None:
        if ((mask != 0) & (mask != 1)).any():
            raise ValueError("mask holds other values than 0 and 1: 1 is for removed patches, 0 for kept ones.")
        removed = mask.bool().sum(dim=1)
        if not ((removed > 0) & (removed < mask.shape[1])).all():
            raise ValueError("mask keeps nothing or removes nothing of an image: 1 is for removed patches, 0 for kept.")
        if equal_numbers and (removed != removed[0]).any():
            raise ValueError(
                "mask removes different numbers of patches in the images of a batch: equalise them, or set "
                "masked_dense."
            )


__all__ = [
    "ConvNextV2FcmaeBackbone",
    "ConvNextV2FcmaeForImageClassification",
    "ConvNextV2FcmaeForPreTraining",
    "ConvNextV2FcmaeForPreTrainingOutput",
    "ConvNextV2FcmaeModel",
    "ConvNextV2FcmaePreTrainedModel",
]
