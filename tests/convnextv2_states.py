"""Small ConvNeXts of ours with random parameters, and their state dicts as the official repository names them."""

import torch

from hf_models.convnextv2_fcmae import (
    ConvNextV2FcmaeBackbone,
    ConvNextV2FcmaeConfig,
    ConvNextV2FcmaeForImageClassification,
    ConvNextV2FcmaeForPreTraining,
    ConvNextV2FcmaeModel,
)

SMALL = {"depths": [1, 2, 1, 1], "hidden_sizes": [8, 16, 24, 32], "num_labels": 5}
V1 = {"use_grn": False, "layer_scale_init_value": 1e-6}
OURS = {
    "encoder": ConvNextV2FcmaeModel,
    "classifier": ConvNextV2FcmaeForImageClassification,
    "pretraining": ConvNextV2FcmaeForPreTraining,
    "backbone": ConvNextV2FcmaeBackbone,
}


def randomised(model):
    """Every parameter away from its initial value: GRN and biases start at 0, LayerScale at 1e-6."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def ours(task="classifier", **fields):
    config = ConvNextV2FcmaeConfig(**SMALL | {"decoder_hidden_size": 12} | fields)
    return randomised(OURS[task](config))


def pixels(model_or_channels=3, size=64):
    return torch.randn(2, getattr(getattr(model_or_channels, "config", None), "num_channels", 3), size, size)


def target(folder, layout):
    return folder / ("model.pt" if layout.startswith("official") else "model")


def assert_same_tensors(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


def assert_close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def official_state(model):
    """The official dense state dict, written down here again from the table of names."""
    state = {}
    for name, tensor in model.state_dict().items():
        name = name.removeprefix("convnextv2.")
        for old, new in (
            ("decoder.layers.", "decoder_block."),
            ("embeddings.patch_embeddings", "downsample_layers.0.0"),
            ("embeddings.layernorm", "downsample_layers.0.1"),
            ("encoder.stages.", "stages."),
            (".layers.", "."),
            ("layernorm", "norm"),
            ("grn.weight", "grn.gamma"),
            ("grn.bias", "grn.beta"),
            ("layer_scale_parameter", "gamma"),
            ("classifier", "head"),
            ("decoder.", ""),
            ("decoder_block.", "decoder."),
        ):
            name = name.replace(old, new)
        if "downsampling_layer" in name:
            _, stage, _, index, leaf = name.split(".")
            name = f"downsample_layers.{stage}.{index}.{leaf}"
        state[name] = tensor
    return state


def sparse_state(model):
    """What the official pretraining code would save for `model`: the encoder in MinkowskiEngine's modules."""
    state = {}
    for name, tensor in official_state(model).items():
        if not name.startswith(("downsample_layers.", "stages.")):
            state[name] = tensor
            continue
        if name.endswith((".dwconv.weight", ".1.weight")) and not name.startswith("downsample_layers.0"):
            outs, ins, side, _ = tensor.shape
            kernel = torch.empty(side * side, ins, outs)
            for y in range(side):
                for x in range(side):
                    kernel[x * side + y] = tensor[:, :, y, x].T
            name = name.replace(".weight", ".kernel")
            tensor = kernel[:, 0] if "dwconv" in name else kernel
            if "dwconv" not in name:
                # The formula of the official fine-tuning code, on a kernel whose axes all differ.
                again = kernel.permute(2, 1, 0).reshape(outs, ins, side, side).transpose(3, 2)
                assert torch.equal(again, official_state(model)[name.replace(".kernel", ".weight")])
        elif ".grn." in name or (name.endswith((".dwconv.bias", ".1.bias")) and "downsample_layers.0" not in name):
            tensor = tensor.reshape(1, -1)
        elif "downsample_layers.0" not in name:
            linear = "pwconv" in name
            stem, leaf = name.rsplit(".", 1)
            name = f"{stem}.{'linear' if linear else 'ln'}.{leaf}"
        state[f"encoder.{name}"] = tensor
    return state
