"""Layer-wise learning rates against the table of ConvNeXt V2's fine-tuning, worked out by hand."""

import pytest
import timm
import torch
from transformers import ConvNextConfig, ConvNextForImageClassification, ViTConfig, ViTForImageClassification

from hf_models import ConvNextV2FcmaeConfig, ConvNextV2FcmaeForImageClassification
from training.layer_decay import layer_of, parameter_groups

ATTO, BASE = [2, 2, 6, 2], [3, 3, 27, 3]
STEM, NORM, HEAD = "convnextv2.embeddings.layernorm.weight", "convnextv2.layernorm.bias", "classifier.weight"


def downsampling(stage):
    return f"convnextv2.encoder.stages.{stage}.downsampling_layer.1.weight"


def block(stage, index):
    return f"convnextv2.encoder.stages.{stage}.layers.{index}.pwconv1.weight"


@pytest.mark.parametrize(
    ("depths", "kind", "layers"),
    [
        # N = 12 blocks: the stem and each downsampling with the block that follows, norm and head 13.
        (
            ATTO,
            "single",
            {STEM: 1, block(0, 0): 1, block(0, 1): 2, downsampling(1): 3, block(1, 0): 3, block(1, 1): 4}
            | {downsampling(2): 5, block(2, 0): 5, block(2, 5): 10, downsampling(3): 11, block(3, 1): 12}
            | {NORM: 13, HEAD: 13},
        ),
        (
            BASE,
            "single",
            {STEM: 1, block(0, 2): 3, downsampling(1): 4, block(1, 2): 6, downsampling(2): 7, block(2, 26): 33}
            | {downsampling(3): 34, block(3, 0): 34, block(3, 2): 36, NORM: 37, HEAD: 37},
        ),
        # Twelve groups, whatever the depths.
        (
            BASE,
            "group",
            {STEM: 0, block(0, 0): 1, block(0, 2): 1, downsampling(1): 2, block(1, 2): 2, downsampling(2): 3}
            | {block(2, 0): 3, block(2, 2): 3, block(2, 3): 4, block(2, 26): 11, downsampling(3): 12, block(3, 2): 12}
            | {NORM: 13, HEAD: 13},
        ),
        (
            ATTO,
            "group",
            {STEM: 0, block(0, 1): 1, block(1, 1): 2, block(2, 2): 3, block(2, 5): 4, downsampling(3): 12, HEAD: 13},
        ),
        # Other numbers of stages: the last stage but one is still the one in threes.
        ([2, 4, 2], "group", {STEM: 0, block(0, 1): 1, downsampling(1): 2, block(1, 3): 3, block(2, 0): 11, HEAD: 12}),
        ([3, 3, 30, 3], "group", {block(2, 29): 12, downsampling(3): 13, HEAD: 14}),
        ([2], "group", {STEM: 0, block(0, 1): 1, HEAD: 2}),
        ([2, 4, 2], "single", {STEM: 1, downsampling(1): 3, block(1, 3): 6, block(2, 1): 8, HEAD: 9}),
    ],
)
def test_layers_are_numbered_as_in_the_paper_s_code(depths, kind, layers):
    assert {name: layer_of(name, depths, kind) for name in layers} == layers


def tiny(**changes):
    config = ConvNextV2FcmaeConfig(depths=[1, 2], hidden_sizes=[8, 16], num_labels=3, **changes)
    return ConvNextV2FcmaeForImageClassification(config)


def by_name(model, groups):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)]: group for group in groups for parameter in group["params"]}


@pytest.mark.parametrize("kind", ["single", "group"])
def test_every_parameter_has_the_rate_of_its_layer_and_the_logged_one_is_the_head_s(kind):
    model = tiny()
    groups = parameter_groups(model, 0.1, 0.05, 0.5, kind)
    found = by_name(model, groups)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert sum(len(group["params"]) for group in groups) == len(found)
    head = layer_of(HEAD, [1, 2], kind)
    for name, group in found.items():
        assert group["lr"] == pytest.approx(0.1 * 0.5 ** (head - layer_of(name, [1, 2], kind)))
    assert groups[0]["lr"] == pytest.approx(0.1)


@pytest.mark.parametrize("model", [tiny(), tiny(use_grn=False, layer_scale_init_value=1e-6)], ids=["v2", "v1"])
@pytest.mark.parametrize("layer_decay", [1.0, 0.9])
def test_only_matrices_and_kernels_decay(model, layer_decay):
    found = by_name(model, parameter_groups(model, 0.1, 0.05, layer_decay, "single"))
    kernels = ("pwconv1.weight", "pwconv2.weight", "dwconv.weight", "patch_embeddings.weight", "classifier.weight")
    for name, group in found.items():
        expected = 0.05 if name.endswith((*kernels, "downsampling_layer.1.weight")) else 0.0
        assert group["weight_decay"] == expected, name


def test_transformers_convnext_has_the_same_layers():
    config = ConvNextConfig(depths=[1, 2], hidden_sizes=[8, 16], num_stages=2, num_labels=3)
    theirs, ours = ConvNextForImageClassification(config), tiny(use_grn=False, layer_scale_init_value=1e-6)
    rates = [
        {name.split(".", 1)[1]: group["lr"] for name, group in by_name(model, groups).items()}
        for model in (theirs, ours)
        for groups in [parameter_groups(model, 0.1, 0.05, 0.9, "single")]
    ]
    assert rates[0] == rates[1]


def test_a_timm_model_is_decayed_by_timm_and_another_is_refused():
    model = torch.nn.Module()
    model.timm_model = timm.create_model("test_vit", num_classes=3)
    model.config = ViTConfig()
    found = by_name(model, parameter_groups(model, 0.1, 0.05, 0.5, "single"))
    assert found["timm_model.head.weight"]["lr"] == pytest.approx(0.1)
    rates = [found[f"timm_model.blocks.{index}.mlp.fc1.weight"]["lr"] for index in range(len(model.timm_model.blocks))]
    assert rates == pytest.approx([0.1 * 0.5 ** (len(rates) - index) for index in range(len(rates))])
    assert found["timm_model.pos_embed"]["weight_decay"] == 0.0
    assert found["timm_model.blocks.0.mlp.fc1.weight"]["weight_decay"] == 0.05
    with pytest.raises(ValueError, match="a timm model knows single alone"):
        parameter_groups(model, 0.1, 0.05, 0.5, "group")

    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    foreign = ViTForImageClassification(ViTConfig(**shape, image_size=32))
    with pytest.raises(ValueError, match="layers of a ViTForImageClassification are not known"):
        parameter_groups(foreign, 0.1, 0.05, 0.5, "single")
    found = by_name(foreign, parameter_groups(foreign, 0.1, 0.05, 1.0, "single"))
    assert found["vit.embeddings.position_embeddings"]["weight_decay"] == 0.0


def test_frozen_parameters_are_in_no_group():
    model = tiny()
    model.convnextv2.requires_grad_(False)
    found = by_name(model, parameter_groups(model, 0.1, 0.05, 0.9, "single"))
    assert found.keys() == {"classifier.weight", "classifier.bias"}
