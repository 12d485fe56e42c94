"""timm's model folder: what its `config.json` says of a ConvNeXt, and how it describes the images' preprocessing.

timm rebuilds a model from the name of an architecture and the arguments (`model_args`) that differ from that name's;
`timm.create_model("local-dir:FOLDER", pretrained=True)` opens what is written here.
"""

import json
import math
from pathlib import Path

from ..stored_weights import read_config_fields
from .configuration_convnextv2_fcmae import ConvNextV2FcmaeConfig
from .sizes import SIZES

# With 1×1 convolutions in the MLP (see `conv_mlp`) rather than linear layers.
_CONV_MLP_SIZES = ("atto", "femto", "pico", "nano")
# Name -> (depths, widths, GRN). timm has every size in both families, but no V2 xlarge and no V1 huge.
ARCHITECTURES = {
    f"{family}_{name.removeprefix('v1_')}": (size.config["depths"], size.config["hidden_sizes"], family == "convnextv2")
    for family, absent in (("convnext", "huge"), ("convnextv2", "v1_xlarge"))
    for name, size in SIZES.items()
    if name != absent
}
# Arguments that leave another model than ours unless they are these, and ones that only training or loading feels.
_ONLY = {
    "act_layer": "gelu",
    "conv_bias": True,
    "global_pool": "avg",
    "head_hidden_size": None,
    "head_norm_first": False,
    "kernel_sizes": 7,
    "norm_eps": 1e-6,
    "norm_layer": None,
    "output_stride": 32,
    "stem_type": "patch",
}
_OF_NO_EFFECT = ("conv_mlp", "drop_rate", "head_init_scale", "num_classes", "pretrained_strict")

_RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}  # PIL's numbers
PREPROCESSING = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


def read_timm_config(path: Path) -> dict:
    """The fields of our config that timm's `config.json` in the folder `path` decides.

    Raises ValueError for an architecture, or for an argument of it, that is no ConvNeXt of ours.
    """
    fields = read_config_fields(path / "config.json")
    pretrained = fields.get("pretrained_cfg", fields)  # older folders have one level only
    arguments = dict(fields.get("model_args") or {})
    name = fields.get("architecture")
    if name not in ARCHITECTURES:
        raise ValueError(f"architecture is {name!r}; known are {', '.join(ARCHITECTURES)}.")
    depths, dims, use_grn = ARCHITECTURES[name]
    for argument in _OF_NO_EFFECT:
        arguments.pop(argument, None)
    layer_scale = arguments.pop("ls_init_value", None if use_grn else 1e-6)
    ours = {
        "depths": list(arguments.pop("depths", depths)),
        "hidden_sizes": list(arguments.pop("dims", dims)),
        "use_grn": arguments.pop("use_grn", use_grn),
        "layer_scale_init_value": layer_scale or 0.0,
        "num_channels": arguments.pop("in_chans", 3),
        "patch_size": arguments.pop("patch_size", 4),
        "drop_path_rate": arguments.pop("drop_path_rate", 0.0),
    }
    for argument, value in arguments.items():
        if value is not None and (argument not in _ONLY or value != _ONLY[argument]):
            raise ValueError(f"model_args has {argument} {value!r}, which a ConvNeXt of ours does not have.")
    refuse_where_timm_differs(ConvNextV2FcmaeConfig(**ours))

    labels = fields.get("label_names") or pretrained.get("label_names") or pretrained.get("labels") or {}
    if not isinstance(labels, dict):
        labels = dict(enumerate(labels))
    # As an object, labels may have gaps: a class without a name keeps transformers' usual one.
    labels = {int(number): label for number, label in labels.items()}
    classes = fields.get("num_classes", pretrained.get("num_classes")) or len(labels)
    if labels and classes:
        ours["id2label"] = {number: labels.get(number, f"LABEL_{number}") for number in range(classes)}
        ours["label2id"] = {label: number for number, label in ours["id2label"].items()}
    elif classes:
        ours["num_labels"] = classes
    if size := pretrained.get("input_size"):
        ours["image_size"] = size[-1] if size[-1] == size[-2] else list(size[-2:])
    return ours


def write_timm_config(path: Path, config: ConvNextV2FcmaeConfig, head: str | None) -> bool:
    """Makes the folder `path` with timm's `config.json`, and returns whether its MLPs are 1×1 convolutions.

    Args:
        head: "classifier"; "norm" for a final norm only; None for an encoder that ends with its last stage.
    """
    refuse_where_timm_differs(config)
    described = (config.depths, config.hidden_sizes, config.use_grn)
    name = next((name for name, known in ARCHITECTURES.items() if known == described), None)
    arguments = {}
    if name is None:
        name = "convnextv2_atto" if config.use_grn else "convnext_atto"
        arguments |= {"depths": config.depths, "dims": config.hidden_sizes}
    if (config.layer_scale_init_value or None) != (None if config.use_grn else 1e-6):
        arguments["ls_init_value"] = config.layer_scale_init_value or None
    arguments |= {"patch_size": config.patch_size} if config.patch_size != 4 else {}
    arguments |= {"in_chans": config.num_channels} if config.num_channels != 3 else {}
    if head is None:
        # timm's head has a norm always; its own folders of FCMAE encoders are opened as laxly.
        arguments["pretrained_strict"] = False

    classes = config.num_labels if head == "classifier" else 0
    size = config.image_size if isinstance(config.image_size, (list, tuple)) else [config.image_size] * 2
    fields = {
        "architecture": name,
        "num_classes": classes,
        "num_features": config.hidden_sizes[-1],
        "global_pool": "avg",
        "model_args": arguments,
        "pretrained_cfg": {
            "num_classes": classes,
            "input_size": [config.num_channels, *size],
            "first_conv": "stem.0",
            "classifier": "head.fc",
        },
    }
    labels = [config.id2label.get(number) for number in range(classes)]
    if classes and None not in labels and labels != [f"LABEL_{number}" for number in range(classes)]:
        fields["label_names"] = labels
    path.mkdir(parents=True, exist_ok=True)
    _write_json(path / "config.json", fields)
    return name.endswith(_CONV_MLP_SIZES)


def refuse_where_timm_differs(config: ConvNextV2FcmaeConfig) -> None:
    """Raises ValueError for a model that timm's ConvNeXt computes otherwise, though its parameters might fit."""
    if len(config.depths) != 4:
        raise ValueError(f"depths is {config.depths}, and timm's ConvNeXt has four stages: choose another layout.")
    if config.patch_size == 2 or config.patch_size >= 8:
        # With 2 its first stage halves the resolution, from 8 its last one dilates in the place of that.
        raise ValueError(
            f"patch_size is {config.patch_size}, and timm's ConvNeXt downsamples otherwise then: choose another layout."
        )
    if config.hidden_act != "gelu":
        raise ValueError(f"hidden_act is {config.hidden_act!r}, and timm's ConvNeXt has 'gelu': choose another layout.")


def carry_preprocessing(source: Path, destination: Path) -> str | None:
    """Gives the folder `destination` the preprocessing of `source`, in the form that its layout reads.

    timm has it in `config.json`, transformers in `preprocessor_config.json`; a single file has none. Returns one
    sentence where nothing could be carried over, for the user to read.
    """
    file = source / "preprocessor_config.json"
    theirs = read_config_fields(source / "config.json") if source.is_dir() else {}
    target = read_config_fields(destination / "config.json")
    if "architecture" in theirs:
        pretrained = theirs.get("pretrained_cfg", theirs)
        found = {field: pretrained[field] for field in PREPROCESSING if field in pretrained}
    elif file.is_file():
        found = read_config_fields(file) if "architecture" not in target else _processor_as_timm(file)
    else:
        return f"{source} describes no preprocessing of images, so {destination.name} does not either."

    if "architecture" in target:
        if found:
            pretrained = target["pretrained_cfg"]
            if "size" in found:
                pretrained["input_size"][1:] = [found.pop("size")] * 2
            pretrained |= found
            _write_json(destination / "config.json", target)
            return None
    else:
        if "architecture" in theirs:
            found = _timm_as_processor(found)
        if found:
            _write_json(destination / "preprocessor_config.json", found)
            return None
    return (
        f"The preprocessing of {source} has no counterpart in the layout of {destination.name}: "
        "it is left out, so set it up by hand."
    )


def _timm_as_processor(found: dict) -> dict | None:
    """ConvNextImageProcessor's fields, or None where it would do something else."""
    if not {"input_size", "mean", "std", "crop_pct"} <= found.keys():
        return None
    _, height, width = found["input_size"]
    # At 384 pixels and more that processor warps the whole image to a square; below, it crops the centre.
    warps = found.get("crop_mode") == "squash" and found["crop_pct"] == 1
    crops = found.get("crop_mode") in (None, "center")
    interpolation = found.get("interpolation", "bicubic")
    if height != width or not (warps if height >= 384 else crops) or interpolation not in _RESAMPLE:
        return None
    return {
        "image_processor_type": "ConvNextImageProcessor",
        "size": {"shortest_edge": height},
        "crop_pct": found["crop_pct"],
        "resample": _RESAMPLE[interpolation],
        "image_mean": list(found["mean"]),
        "image_std": list(found["std"]),
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
    }


def _processor_as_timm(file: Path) -> dict | None:
    """timm's fields for a ConvNextImageProcessor, the inverse of `_timm_as_processor`, or None for any other."""
    fields = read_config_fields(file)
    kind = str(fields.get("image_processor_type", fields.get("feature_extractor_type")))
    size = fields.get("size")
    size = size.get("shortest_edge") if isinstance(size, dict) else size
    names = {number: name for name, number in _RESAMPLE.items()}
    # Absent fields of a processor mean a default; only these have one that is the same for all versions.
    same = all(fields.get(step, True) for step in ("do_resize", "do_rescale", "do_normalize"))
    same = same and math.isclose(fields.get("rescale_factor", 1 / 255), 1 / 255)
    known = {"crop_pct", "resample", "image_mean", "image_std"} <= fields.keys() and fields["resample"] in names
    if not kind.startswith("ConvNext") or not isinstance(size, int) or not same or not known:
        return None
    return {
        "size": size,
        "mean": fields["image_mean"],
        "std": fields["image_std"],
        "interpolation": names[fields["resample"]],
        "crop_pct": fields["crop_pct"] if size < 384 else 1.0,
        "crop_mode": "center" if size < 384 else "squash",
    }


def _write_json(file: Path, fields: dict) -> None:
    file.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
