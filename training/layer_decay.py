"""The optimizer's parameter groups: what decays, and how fast each layer learns.

Layer-wise learning rates (BEiT, arXiv 2106.08254) multiply the rate by `layer_decay` once for every layer between a
parameter and the head. ConvNeXt counts its blocks one by one (`single`) or in groups (`group`), as the fine-tuning of
ConvNeXt V1 and V2 does (arXiv 2201.03545, 2301.00808): V2 used groups for base and large, single layers elsewhere.
"""

import re
from typing import Any

from timm.optim import param_groups_layer_decay
from torch import nn

LAYER_DECAY_TYPES = ("single", "group")
BLOCKS_PER_GROUP = 3
# The official grouping was written for a stage of 27 blocks and keeps its nine groups, empty or not, for shorter ones.
MIN_GROUPS = 9
NEVER_DECAYED = re.compile(r"bias|position_embeddings|pos_embed")
CONVNEXTS = ("convnext", "convnextv2", "convnextv2_fcmae")
# Our names, which are transformers' too; what matches neither belongs to the final norm or the head.
STAGE = re.compile(r"\bencoder\.stages\.(\d+)\.(?:downsampling_layer|layers\.(\d+))\.")
STEM = re.compile(r"\bembeddings\.")


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices and kernels, not to biases, norms, GRN, LayerScale and positions."""
    return sum(size > 1 for size in parameter.shape) > 1 and not NEVER_DECAYED.search(name)


def layer_of(name: str, depths: list[int], layer_decay_type: str) -> int:
    """The layer of a ConvNeXt's parameter, counted from the stem; final norm and head have the highest number.

    `single`, for N blocks in all: a block's place 1 ... N; the stem and each downsampling go with the block after them,
    the head is N + 1. `group`: the stem 0, each stage one, but the last stage but one a group for every three blocks.
    """
    head = sum(depths) + 1 if layer_decay_type == "single" else _last_group(depths) + 1
    if STEM.search(name):
        return 1 if layer_decay_type == "single" else 0
    if not (found := STAGE.search(name)):
        return head
    stage, block = int(found[1]), int(found[2] or 0)
    if layer_decay_type == "single":
        return sum(depths[:stage]) + block + 1
    if stage == len(depths) - 1:
        return head - 1
    return stage + 1 + (block // BLOCKS_PER_GROUP if stage == len(depths) - 2 else 0)


def _last_group(depths: list[int]) -> int:
    if len(depths) == 1:
        return 1
    groups = -(-depths[-2] // BLOCKS_PER_GROUP)  # rounded up
    return len(depths) - 1 + max(MIN_GROUPS, groups)


def parameter_groups(
    model: nn.Module, learning_rate: float, weight_decay: float, layer_decay: float, layer_decay_type: str
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer, each with its `lr` and `weight_decay`; the head's rate is the first group's.

    Frozen parameters are in none. Raises ValueError where the layers of such a model cannot be told.
    """
    if layer_decay == 1.0:
        groups = _grouped(model, weight_decay, lambda name: 1.0)
    elif model.config.model_type in CONVNEXTS:
        depths = list(model.config.depths)
        head = layer_of("classifier.weight", depths, layer_decay_type)
        groups = _grouped(
            model, weight_decay, lambda name: layer_decay ** (head - layer_of(name, depths, layer_decay_type))
        )
    elif hasattr(getattr(model, "timm_model", None), "group_matcher"):
        if layer_decay_type != "single":
            raise ValueError(f"--layer_decay_type {layer_decay_type} is for ConvNeXt: a timm model knows single alone.")
        never = {name for name, parameter in model.timm_model.named_parameters() if not decays(name, parameter)}
        never |= set(getattr(model.timm_model, "no_weight_decay", set)())
        groups = param_groups_layer_decay(
            model.timm_model, weight_decay, no_weight_decay_list=never, layer_decay=layer_decay
        )
    else:
        raise ValueError(
            f"--layer_decay {layer_decay}: the layers of a {type(model).__name__} are not known here. Give 1.0, or a "
            "ConvNeXt or timm model."
        )
    groups.sort(key=lambda group: -group["lr_scale"])  # the rate that is logged is the first group's
    return [
        {"params": group["params"], "weight_decay": group["weight_decay"], "lr": learning_rate * group["lr_scale"]}
        for group in groups
    ]


def _grouped(model: nn.Module, weight_decay: float, scale_of) -> list[dict[str, Any]]:
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = weight_decay if decays(name, parameter) else 0.0
            groups.setdefault((scale_of(name), decay), []).append(parameter)
    return [
        {"params": parameters, "lr_scale": scale, "weight_decay": decay}
        for (scale, decay), parameters in groups.items()
    ]
