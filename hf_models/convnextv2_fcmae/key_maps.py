"""What the official repository and timm call the parameters of a ConvNeXt, and in what form they store them.

Everything here speaks of our names without the model's prefix: `encoder.stages.0.layers.0.dwconv.weight`. A mapping
works on any tensor, also on the "meta" ones that stand for a file's header, so that shapes are checked first.

Official names are those of facebookresearch/ConvNeXt and ConvNeXt-V2, with FCMAE's decoder beside them.
`official_sparse` is what the pretraining code itself saves: MinkowskiEngine's kernels, and a prefix before the encoder.
"""

import math
import re

import torch
from torch import Tensor

_STAGE = "encoder.stages.{s}"


def _block_rows(ours: str, theirs: str, names: dict[str, str]) -> dict[str, str]:
    return {f"{ours}.{name}": f"{theirs}.{their_name}" for name, their_name in names.items()}


_OFFICIAL_BLOCK = {
    "dwconv.": "dwconv.",
    "layernorm.": "norm.",
    "pwconv1.": "pwconv1.",
    "pwconv2.": "pwconv2.",
    "grn.weight": "grn.gamma",
    "grn.bias": "grn.beta",
    "layer_scale_parameter": "gamma",
}
_TIMM_BLOCK = {
    "dwconv.": "conv_dw.",
    "layernorm.": "norm.",
    "pwconv1.": "mlp.fc1.",
    "pwconv2.": "mlp.fc2.",
    "grn.": "mlp.grn.",
    "layer_scale_parameter": "gamma",
}
# Our name to theirs. A name that ends with a dot goes on with "weight" or "bias", the same on both sides.
_NAMES = {
    "official": {
        "embeddings.patch_embeddings.": "downsample_layers.0.0.",
        "embeddings.layernorm.": "downsample_layers.0.1.",
        f"{_STAGE}.downsampling_layer.{{j}}.": "downsample_layers.{s}.{j}.",
        **_block_rows(f"{_STAGE}.layers.{{b}}", "stages.{s}.{b}", _OFFICIAL_BLOCK),
        "layernorm.": "norm.",
        "classifier.": "head.",
        "decoder.proj.": "proj.",
        "decoder.mask_token": "mask_token",
        **_block_rows("decoder.layers.{b}", "decoder.{b}", _OFFICIAL_BLOCK),
        "decoder.pred.": "pred.",
    },
    "timm": {
        "embeddings.patch_embeddings.": "stem.0.",
        "embeddings.layernorm.": "stem.1.",
        f"{_STAGE}.downsampling_layer.{{j}}.": "stages.{s}.downsample.{j}.",
        **_block_rows(f"{_STAGE}.layers.{{b}}", "stages.{s}.blocks.{b}", _TIMM_BLOCK),
        "layernorm.": "head.norm.",
        "classifier.": "head.fc.",
    },
}
# Inside the pretraining code's encoder, by official name: the infix of its norms and linear layers, and its kernels.
_MINKOWSKI_NAMES = (
    (r"(downsample_layers\.[1-9]\d*\.0|stages\.\d+\.\d+\.norm)\.(weight|bias)", r"\1.ln.\2"),
    (r"(stages\.\d+\.\d+\.pwconv[12])\.(weight|bias)", r"\1.linear.\2"),
    (r"(downsample_layers\.[1-9]\d*\.1|stages\.\d+\.\d+\.dwconv)\.weight", r"\1.kernel"),
)


def _compile(names: dict[str, str]) -> list[tuple[re.Pattern, str]]:
    """Patterns of full names and the templates that rewrite what they match."""
    rules = []
    for source, target in names.items():
        leaf = source.endswith(".")
        pattern = re.sub(r"\\\{(\w)\\\}", r"(?P<\1>0|[1-9]\\d*)", re.escape(source))
        rules.append((re.compile(pattern + ("(?P<leaf>weight|bias)" if leaf else "")), target + "{leaf}" * leaf))
    return rules


_TO_THEIRS = {layout: _compile(names) for layout, names in _NAMES.items()}
_TO_OURS = {layout: _compile({theirs: ours for ours, theirs in names.items()}) for layout, names in _NAMES.items()}


def _rename(name: str, rules: list[tuple[re.Pattern, str]]) -> str | None:
    for pattern, template in rules:
        if match := pattern.fullmatch(name):
            return template.format(**match.groupdict())
    return None


def layout_of_names(names: set[str]) -> str | None:
    """Which layout these names are of, or None."""
    if any(name.endswith(".kernel") for name in names):
        return "official_sparse"
    if any(name.removeprefix("encoder.").startswith("downsample_layers.") for name in names):
        return "official"
    return "timm" if any(name.startswith("stem.") for name in names) else None


def our_name(name: str, layout: str) -> str | None:
    """Ours for a stored name, or None where the layout has no such name."""
    if layout == "timm":
        return _rename(name, _TO_OURS["timm"])
    # Converted pretraining checkpoints are seen with and without the prefix and the infixes.
    plain = re.sub(r"\.(ln|linear)\.(weight|bias)$", r".\2", name.removeprefix("encoder."))
    return _rename(re.sub(r"\.kernel$", ".weight", plain), _TO_OURS["official"])


def their_name(name: str, layout: str) -> str | None:
    """The layout's for one of our names, or None where it has no such parameter."""
    if layout == "timm":
        return _rename(name, _TO_THEIRS["timm"])
    official = _rename(name, _TO_THEIRS["official"])
    if layout == "official" or official is None or not official.startswith(("downsample_layers.", "stages.")):
        return official
    for pattern, replacement in _MINKOWSKI_NAMES:
        official = re.sub(f"^{pattern}$", replacement, official)
    return f"encoder.{official}"


def to_our_form(name: str, tensor: Tensor) -> Tensor:
    """`tensor`, stored in any layout's form of the parameter that we call `name`, in ours.

    A form that is known nowhere stays as it is, for the comparison of shapes to name it.
    """
    shape = tensor.shape
    if ".grn." in name and shape and math.prod(shape[:-1]) == 1:
        return tensor.reshape(1, 1, 1, shape[-1])
    if name.endswith("bias") and len(shape) == 2 and shape[0] == 1:
        return tensor[0]
    if ".pwconv" in name and len(shape) == 4 and shape[2:] == (1, 1):
        return tensor[:, :, 0, 0]
    if name.endswith(("dwconv.weight", "downsampling_layer.1.weight")) and len(shape) in (2, 3):
        side = math.isqrt(shape[0])
        if side**2 != shape[0]:
            return tensor
        # (k², [in,] out), the first axis in x-major order -> (out, in or 1, k, k), y before x.
        kernel = tensor if len(shape) == 3 else tensor.unsqueeze(1)
        return kernel.permute(2, 1, 0).reshape(*kernel.shape[:0:-1], side, side).transpose(3, 2)
    return tensor


def to_their_form(name: str, tensor: Tensor, layout: str, conv_mlp: bool = False) -> Tensor:
    """The inverse of `to_our_form`; timm's small sizes have 1×1 convolutions (`conv_mlp`) for our linear layers."""
    if layout == "timm":
        if ".grn." in name:
            return tensor.flatten()
        return tensor[:, :, None, None] if conv_mlp and re.search(r"\.pwconv\d\.weight$", name) else tensor
    if layout == "official" or not name.startswith("encoder."):
        return tensor
    if ".grn." in name:
        return tensor.reshape(1, -1)
    if name.endswith(("dwconv.bias", "downsampling_layer.1.bias")):
        return tensor[None]
    if name.endswith(("dwconv.weight", "downsampling_layer.1.weight")):
        kernel = tensor.transpose(3, 2).flatten(2).permute(2, 1, 0)
        return kernel.squeeze(1) if name.endswith("dwconv.weight") else kernel
    return tensor


def dimensions(parameters: dict[str, Tensor], layout: str) -> dict:
    """The config fields that the parameters' names and shapes, in our names and form, decide.

    Raises ValueError, by the layout's names, where what decides one is missing or of another rank.
    """

    def shape(name: str, rank: int) -> torch.Size:
        shown = their_name(name, layout) or name
        if name not in parameters:
            raise ValueError(f"it lacks {shown}")
        if parameters[name].ndim != rank:
            raise ValueError(f"{shown} {tuple(parameters[name].shape)} has not {rank} dimensions")
        return parameters[name].shape

    blocks: dict[int, set[int]] = {}
    for name in parameters:
        if match := re.match(r"encoder\.stages\.(\d+)\.layers\.(\d+)\.", name):
            blocks.setdefault(int(match[1]), set()).add(int(match[2]))
    decoder_layers = {name.split(".")[2] for name in parameters if name.startswith("decoder.layers.")}
    stem = shape("embeddings.patch_embeddings.weight", 4)
    fields = {
        "num_channels": stem[1],
        "patch_size": stem[2],
        # Counted, not the highest number: a gap is then reported as what is missing.
        "depths": [len(blocks[stage]) for stage in sorted(blocks)],
        "hidden_sizes": [shape(f"encoder.stages.{s}.layers.0.dwconv.weight", 4)[0] for s in range(len(blocks))],
        "use_grn": any(".grn." in name for name in parameters if name.startswith("encoder.")),
        "layer_scale_init_value": 1e-6 if any(n.endswith("layer_scale_parameter") for n in parameters) else 0.0,
    }
    if not blocks:
        raise ValueError("it holds a stem but no blocks")
    if "classifier.weight" in parameters:
        fields["num_labels"] = shape("classifier.weight", 2)[0]
    if decoder_layers:
        fields["decoder_hidden_size"] = shape("decoder.mask_token", 4)[1]
        fields["decoder_num_hidden_layers"] = len(decoder_layers)
    return fields
