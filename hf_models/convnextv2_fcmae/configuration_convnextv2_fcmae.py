"""Configuration of ConvNeXt V1 and V2, with the fields of V2's masked pretraining (FCMAE).

Fields, names and defaults are those of transformers' `ConvNextV2Config` where it has them, but for `layer_norm_eps`,
whose default is the official code's 1e-6.

This file is published beside the weights (remote code): it imports nothing of our package.
"""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin

# Every Auto class that opens a published folder. `save_pretrained` alone would write only the saved class's entry.
AUTO_MAP = {
    "AutoConfig": "configuration_convnextv2_fcmae.ConvNextV2FcmaeConfig",
    "AutoModel": "modeling_convnextv2_fcmae.ConvNextV2FcmaeModel",
    "AutoModelForPreTraining": "modeling_convnextv2_fcmae.ConvNextV2FcmaeForPreTraining",
    "AutoModelForImageClassification": "modeling_convnextv2_fcmae.ConvNextV2FcmaeForImageClassification",
    "AutoBackbone": "modeling_convnextv2_fcmae.ConvNextV2FcmaeBackbone",
}


@strict
class ConvNextV2FcmaeConfig(BackboneConfigMixin, PreTrainedConfig):
    """Shape and constants of a ConvNeXt V2 (arXiv 2301.00808), or V1 (arXiv 2201.03545).

    `patch_size` (pixels) is kernel and stride of the stem; every stage after the first halves the resolution, and the
    length of `depths` is the number of stages. `image_size` (pixels) is what the model was trained on; it bounds
    nothing. V1 is `use_grn=False, layer_scale_init_value=1e-6`; with 0 there is no LayerScale.

    Masked pretraining hides `mask_ratio` of an image's squares of `mask_patch_size` pixels, and rebuilds them with
    `decoder_num_hidden_layers` blocks of width `decoder_hidden_size`. With `norm_pix_loss` the target is each square
    minus its mean, divided by `sqrt(variance + norm_pix_loss_eps)`: on drawings with flat backgrounds an epsilon of
    1e-2 keeps faint noise from counting as much as the picture.

    Raises a `ValueError` that names the field for values that describe no model.
    """

    model_type = "convnextv2_fcmae"
    attribute_map = {"num_hidden_layers": "num_stages"}

    num_channels: int = 3
    patch_size: int = 4
    hidden_sizes: list[int] | tuple[int, ...] = (96, 192, 384, 768)
    depths: list[int] | tuple[int, ...] = (3, 3, 9, 3)
    hidden_act: str = "gelu"
    use_grn: bool = True
    layer_scale_init_value: float | int = 0.0
    drop_path_rate: float | int = 0.0
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    image_size: int | list[int] | tuple[int, ...] = 224
    mask_ratio: float | int = 0.6
    decoder_hidden_size: int = 512
    decoder_num_hidden_layers: int = 1
    norm_pix_loss: bool = True
    norm_pix_loss_eps: float = 1e-6
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        kwargs.pop("num_stages", None)  # transformers' field: here it follows from `depths`
        self.hidden_sizes, self.depths = list(self.hidden_sizes), list(self.depths)
        self.stage_names = ["stem"] + [f"stage{i}" for i in range(1, len(self.depths) + 1)]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        # Whole at every save, whatever an older file said: the code lies beside the weights.
        kwargs["auto_map"] = dict(AUTO_MAP)
        super().__post_init__(**kwargs)
        # `@strict` calls this too, but wraps what it raises in an error that is no ValueError.
        self.validate_architecture()

    @property
    def num_stages(self) -> int:
        return len(self.depths)

    @property
    def mask_patch_size(self) -> int:
        """Side of the squares that are masked, in pixels: one cell of the last stage."""
        return self.patch_size * 2 ** (len(self.depths) - 1)

    def number_kept(self, patches: int, mask_ratio: float | None = None) -> int:
        """How many of an image's `patches` stay visible, at `mask_ratio` or the config's own."""
        ratio = self.mask_ratio if mask_ratio is None else mask_ratio
        return int(patches * (1 - ratio) + 1e-6)  # 10 * (1 - 0.9) is a little less than 1

    def validate_architecture(self):
        if not self.depths or len(self.depths) != len(self.hidden_sizes):
            raise ValueError(
                f"depths {self.depths} and hidden_sizes {self.hidden_sizes} differ in length: give one of each a stage."
            )
        for field in ("num_channels", "patch_size", "decoder_hidden_size", "decoder_num_hidden_layers"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}: give 1 or more.")
        for field in ("depths", "hidden_sizes"):
            if min(getattr(self, field)) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}: every stage needs 1 or more.")
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"mask_ratio is {self.mask_ratio}: give a share between 0 and 1, such as 0.6.")
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate is {self.drop_path_rate}: give 0 or more, and less than 1.")
        if self.norm_pix_loss_eps <= 0:
            raise ValueError(f"norm_pix_loss_eps is {self.norm_pix_loss_eps}: flat squares would divide by zero.")
        if self.layer_scale_init_value < 0:
            raise ValueError(f"layer_scale_init_value is {self.layer_scale_init_value}: give 0 (none) or more.")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act is {self.hidden_act!r}: choose one of {', '.join(ACT2FN)}.")


__all__ = ["ConvNextV2FcmaeConfig"]
