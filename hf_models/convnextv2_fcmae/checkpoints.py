"""Checkpoints of ConvNeXt V1 and V2: ours, transformers', timm's and the official repositories', in and out.

A conversion renames parameters and gives some another form (`key_maps.py`); no number changes. What is checked here,
before any weight is read, is that the file holds exactly the model that its config describes, or, where there is no
config, one model that its names and shapes describe. One thing may be missing: the final norm, which masked pretraining
does not have; it then starts as new, and a warning says so.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import ConvNextConfig, ConvNextV2Config
from transformers.utils import logging

from ..exported_program import ImageGraph, save_exported_program
from ..stored_weights import (
    KIND_FIELDS,
    StoredParameter,
    check_parameters,
    common_dtype,
    parameters_of_file,
    parameters_of_folder,
    read_config_fields,
    some,
    tensors_of_torch_file,
)
from .configuration_convnextv2_fcmae import ConvNextV2FcmaeConfig
from .key_maps import dimensions, layout_of_names, our_name, their_name, to_our_form, to_their_form
from .modeling_convnextv2_fcmae import (
    ConvNextV2FcmaeBackbone,
    ConvNextV2FcmaeForImageClassification,
    ConvNextV2FcmaeForPreTraining,
    ConvNextV2FcmaeModel,
    ConvNextV2FcmaePreTrainedModel,
)
from .onnx_file import write_onnx
from .timm_folder import read_timm_config, refuse_where_timm_differs, write_timm_config

LAYOUTS = ("hf_models", "transformers", "timm", "official", "official_sparse")
EXPORTS = ("onnx", "torch_export")  # written only
LAYOUT_OF_MODEL_TYPE = {"convnextv2_fcmae": "hf_models", "convnextv2": "transformers", "convnext": "transformers"}
FILE_SUFFIXES = (".pt", ".pth")

_PREFIX = "convnextv2."
_CLASSES = {
    "Model": ConvNextV2FcmaeModel,
    "ForPreTraining": ConvNextV2FcmaeForPreTraining,
    "ForImageClassification": ConvNextV2FcmaeForImageClassification,
    "Backbone": ConvNextV2FcmaeBackbone,
}
# Which class of a family's it is, by the name that `architectures` gives it.
_TASK_OF_ARCHITECTURE = {
    f"{family}{task}": task for family in ("ConvNextV2Fcmae", "ConvNextV2", "ConvNext") for task in _CLASSES
}
# Fields that transformers' ConvNextV2Config does not have, and ones that ours derives.
_OUR_FIELDS = (
    "decoder_hidden_size",
    "decoder_num_hidden_layers",
    "layer_scale_init_value",
    "mask_ratio",
    "norm_pix_loss",
    "norm_pix_loss_eps",
    "use_grn",
)
_DERIVED_FIELDS = ("num_stages", "stage_names")
# The final norm, which masked pretraining does not have.
_NEW_NORM = {"layernorm.weight": torch.ones, "layernorm.bias": torch.zeros}

logger = logging.get_logger(__name__)


class _Source(NamedTuple):
    """A checkpoint whose weights are not read yet."""

    layout: str
    config: dict | None  # the object in config.json, for a folder
    stored: dict[str, StoredParameter] | dict[str, Tensor]  # by stored name; tensors where the file maps them
    prefix: str  # what stands before the base model's names in transformers' layouts

    @property
    def is_ours_or_native(self) -> bool:
        return self.layout in ("hf_models", "transformers")

    def our_name(self, name: str) -> str | None:
        return name.removeprefix(self.prefix) if self.is_ours_or_native else our_name(name, self.layout)

    def stored_name(self, whole: str) -> str:
        """What the source would call the parameter whose name in our model is `whole`."""
        if self.is_ours_or_native:
            return whole.replace(_PREFIX, self.prefix, 1)
        ours = whole.removeprefix(_PREFIX)
        return their_name(ours, self.layout) or ours

    def our_form(self, ours: str, tensor: Tensor) -> Tensor:
        return tensor if self.is_ours_or_native else to_our_form(ours, tensor)

    def header(self, name: str) -> Tensor:
        """Shape and dtype as a tensor without content."""
        entry = self.stored[name]
        return torch.empty(tuple(entry.shape), dtype=entry.dtype, device="meta")


def load_checkpoint(path: str | Path, layout: str = "auto") -> ConvNextV2FcmaePreTrainedModel:
    """Opens a checkpoint as the class that its parameters call for, the weights bit for bit and in the file's dtype.

    A decoder makes a ConvNextV2FcmaeForPreTraining, a head a ConvNextV2FcmaeForImageClassification, norms of feature
    maps a ConvNextV2FcmaeBackbone, and an encoder alone a ConvNextV2FcmaeModel. Where no config lies beside the weights
    (a single file), sizes follow from the shapes and all other fields are the defaults.

    Args:
        path: a folder of ours, transformers' (convnextv2, convnext) or timm's with safetensors; or one file with
            official or timm names: `.safetensors`, or what `torch.save` wrote (read without running code).
        layout: "hf_models" (ours), "transformers", "timm", "official", "official_sparse" (the pretraining code's own,
            with MinkowskiEngine's kernels), or "auto": what the config or the names say.

    Raises FileNotFoundError or ValueError, in one sentence: nothing to read there, another kind of model, an unreadable
    file, missing or unexpected parameters (by name), shapes that differ from the config's or from each other.
    """
    path = Path(path)
    source = _open(path)
    if layout not in ("auto", source.layout):
        raise ValueError(f"{path} is of layout {source.layout!r}, asked for as {layout!r}; known are {some(LAYOUTS)}.")
    names = _our_names(path, source)
    headers = {ours: source.our_form(ours, source.header(stored)) for ours, stored in names.items()}
    config, task = _described(path, source, headers)
    with torch.device("meta"):
        model = _CLASSES[task](config)
    new = {}
    if task == "Model" and not headers.keys() & {"layernorm.weight", "layernorm.bias"}:
        new = _NEW_NORM
    _check(path, source, model, names, headers, new)

    dtype = common_dtype(path, {names[ours]: header.dtype for ours, header in headers.items()})
    weights = _read(source)
    state = {}
    for whole, parameter in model.state_dict().items():
        ours = whole.removeprefix(_PREFIX)
        if ours in new:
            state[whole] = new[ours](parameter.shape, dtype=dtype)
        else:
            tensor = source.our_form(ours, weights.pop(names[ours])).to(dtype)
            # A memory of its own: the file may be overwritten while the model lives.
            state[whole] = tensor.clone(memory_format=torch.contiguous_format)
    model.load_state_dict(state, assign=True)
    model.config.dtype = dtype
    if new:
        logger.warning(f"{path} holds an encoder only: {some(new)} are new, and there is no head.")
    return model.eval()


def save_checkpoint(model: ConvNextV2FcmaePreTrainedModel, path: str | Path, layout: str) -> None:
    """Writes `model` in its own dtype: to the folder `path`, or, as one file, to `path`.

    Args:
        layout: "hf_models" writes what `save_pretrained` does, our code beside the weights; "transformers" a native
            ConvNextV2 folder, or ConvNext where the model has no GRN; "timm" a folder for
            `timm.create_model("local-dir:PATH", pretrained=True)`; "official" the dense `.pt` of the paper's
            repository, with FCMAE's decoder under its own names; "official_sparse" the `.pth` of its pretraining code;
            "onnx" a folder with `model.onnx` and the config of "transformers"; "torch_export" a `.pt2` file. The last
            two are graphs to run: `load_checkpoint` does not open them.

    Only ours and the official layouts have a decoder: of a pretraining model the others get the encoder, and a warning
    names what is left out. Official files hold weights only, so labels and other fields of the config stay behind.

    Raises ValueError for an unknown layout, for a model that the layout cannot hold, and for a graph that computes
    something else than the model; ImportError without the packages that ONNX needs.
    """
    path = Path(path)
    # By name: a model opened as remote code is of a class of its own.
    name = type(model).__name__
    if not name.startswith("ConvNextV2Fcmae") or name not in _TASK_OF_ARCHITECTURE:
        raise ValueError(f"Only a ConvNeXt of ours can be saved, and this is a {name}.")
    if layout not in (*LAYOUTS, *EXPORTS):
        raise ValueError(f"No layout {layout!r}: choose one of {', '.join((*LAYOUTS, *EXPORTS))}.")
    config, task = model.config, _TASK_OF_ARCHITECTURE[name]
    with torch.device("meta"):
        described = _CLASSES[task](config).state_dict()
    if differing := sorted(described.keys() ^ model.state_dict().keys()):
        raise ValueError(
            f"The model and its config differ in what parameters there are, {some(differing)}: merge adapters first."
        )
    if layout == "hf_models":
        model.save_pretrained(path)
        return

    if layout == "torch_export":
        save_exported_program(ImageGraph(_dense(model, task, layout)), path)
        return

    if config.use_grn and config.layer_scale_init_value > 0 and layout != "timm":
        raise ValueError(
            f"The model has both GRN and LayerScale, which the layout {layout!r} has not: save it as timm or hf_models."
        )
    if layout == "onnx":
        write_onnx(_dense(model, task, layout), path)
        _native_config(config, task, torch.float32).save_pretrained(path)
        return
    state = {name.removeprefix(_PREFIX): tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    if layout in ("transformers", "timm"):
        state = _without_decoder(state, layout)
    if layout == "transformers":
        _save_as_native(config, task, state, path)
        return

    if task == "Backbone":
        raise ValueError(f"The layout {layout!r} has no norms of feature maps: save the backbone as transformers.")
    if config.layer_norm_eps != 1e-6:
        logger.warning(
            f"layer_norm_eps is {config.layer_norm_eps}, and the layout {layout!r} says 1e-6: logits differ a little."
        )
    if layout == "timm":
        _save_as_timm(config, state, path)
    else:
        _save_as_official(config, task, state, path, layout)


def _without_decoder(state: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """What a layout that has no decoder gets of the `state`."""
    left_out = [name for name in state if name.startswith("decoder.")]
    if left_out:
        logger.warning(f"The layout {layout!r} has no decoder: left out are {some(left_out)}.")
    return {name: tensor for name, tensor in state.items() if name not in left_out}


def _dense(model: ConvNextV2FcmaePreTrainedModel, task: str, layout: str) -> ConvNextV2FcmaePreTrainedModel:
    """What a graph is traced of: the same model in eval mode, or of a pretraining one the encoder, its norm new."""
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    if task == "ForPreTraining":
        task, state = "Model", {name.removeprefix(_PREFIX): tensor for name, tensor in state.items()}
        state = _without_decoder(state, layout)
        state |= {name: new(model.config.hidden_sizes[-1], dtype=model.dtype) for name, new in _NEW_NORM.items()}
    with torch.device("meta"):
        dense = _CLASSES[task](model.config)
    dense.load_state_dict(state, assign=True)
    return dense


def _native_config(config: ConvNextV2FcmaeConfig, task: str, dtype: torch.dtype) -> ConvNextV2Config | ConvNextConfig:
    fields = {
        name: value
        for name, value in config.to_dict().items()
        if name not in (*KIND_FIELDS, *_OUR_FIELDS, *_DERIVED_FIELDS)
    }
    fields["num_stages"] = len(config.depths)
    if config.use_grn:
        native = ConvNextV2Config(**fields)
    else:
        native = ConvNextConfig(**fields, layer_scale_init_value=config.layer_scale_init_value)
    family = "ConvNextV2" if config.use_grn else "ConvNext"
    native.architectures = [f"{family}{'Model' if task == 'ForPreTraining' else task}"]
    native.dtype = dtype
    return native


def _save_as_native(config: ConvNextV2FcmaeConfig, task: str, state: dict[str, Tensor], path: Path) -> None:
    native = _native_config(config, task, next(iter(state.values())).dtype)
    native.save_pretrained(path)
    prefix = f"{native.model_type}." if task == "ForImageClassification" else ""
    _write_safetensors(
        path, {name if name.startswith("classifier.") else prefix + name: tensor for name, tensor in state.items()}
    )


def _save_as_timm(config: ConvNextV2FcmaeConfig, state: dict[str, Tensor], path: Path) -> None:
    head = "classifier" if "classifier.weight" in state else "norm" if "layernorm.weight" in state else None
    conv_mlp = write_timm_config(path, config, head)
    _write_safetensors(
        path,
        {their_name(name, "timm"): to_their_form(name, tensor, "timm", conv_mlp) for name, tensor in state.items()},
    )


def _save_as_official(
    config: ConvNextV2FcmaeConfig, task: str, state: dict[str, Tensor], path: Path, layout: str
) -> None:
    if path.suffix not in FILE_SUFFIXES:
        raise ValueError(f"The layout {layout!r} is one file: name it {path.name}.pt rather than {path.name}.")
    if config.hidden_act != "gelu":
        raise ValueError(f"hidden_act is {config.hidden_act!r}, and the official code computes 'gelu' only.")
    if layout == "official_sparse" and (task != "ForPreTraining" or not config.use_grn):
        raise ValueError("The layout 'official_sparse' holds a V2 pretraining model only: save this one as official.")
    # Copies, as torch.save writes the whole memory that a tensor is a view of.
    renamed = {
        their_name(name, layout): to_their_form(name, tensor, layout).clone(memory_format=torch.contiguous_format)
        for name, tensor in state.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": renamed}, path)


def _write_safetensors(path: Path, state: dict[str, Tensor]) -> None:
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})


def _open(path: Path) -> _Source:
    if path.is_dir():
        config = read_config_fields(path / "config.json")
        if config.get("quantization_config") is not None:
            raise ValueError(f"{path} holds quantised weights; open the model in full precision and save that first.")
        found = "timm" if "architecture" in config else LAYOUT_OF_MODEL_TYPE.get(config.get("model_type"))
        if found is None:
            known = ", ".join(LAYOUT_OF_MODEL_TYPE)
            raise ValueError(
                f"{path / 'config.json'} has model_type {config.get('model_type')!r}; known are {known}, "
                "and timm's ConvNeXts by their architecture."
            )
        prefix = "convnext." if config.get("model_type") == "convnext" else _PREFIX
        return _Source(found, config, parameters_of_folder(path), prefix)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give a local model folder or a weights file.")

    stored = parameters_of_file(path) if path.suffix == ".safetensors" else tensors_of_torch_file(path)
    found = layout_of_names(stored.keys())
    if found is None:
        raise ValueError(
            f"{path} holds {some(stored) or 'nothing'}, and none of the official or timm names of a ConvNeXt; "
            "of a model that was saved as a folder, give the folder."
        )
    return _Source(found, None, stored, prefix="")


def _read(source: _Source) -> dict[str, Tensor]:
    """Every stored tensor by its stored name."""
    if source.config is None and isinstance(next(iter(source.stored.values())), Tensor):
        return dict(source.stored)
    weights = {}
    for file in {entry.file for entry in source.stored.values()}:
        weights |= load_file(file)
    return weights


def _our_names(path: Path, source: _Source) -> dict[str, str]:
    """Our names of the stored parameters that have one -> the stored names."""
    names = {}
    for name in source.stored:
        ours = source.our_name(name)
        if ours in names:
            raise ValueError(f"{path} holds both {names[ours]} and {name}, which are the same parameter.")
        if ours is not None:
            names[ours] = name
    return names


def _check(
    path: Path,
    source: _Source,
    model: ConvNextV2FcmaePreTrainedModel,
    names: dict[str, str],
    headers: dict[str, Tensor],
    new: Iterable[str],
) -> None:
    """Raises unless the source holds exactly the parameters of `model` but for the `new` ones."""
    config = model.config
    expected = {}
    for whole, parameter in model.state_dict().items():
        ours = whole.removeprefix(_PREFIX)
        if ours not in new:
            expected[names.get(ours) or source.stored_name(whole)] = parameter.shape
    stored = {name: entry.shape for name, entry in source.stored.items()}
    stored |= {name: headers[ours].shape for ours, name in names.items()}
    described = f"a ConvNeXt of depths {config.depths} and widths {config.hidden_sizes}"
    check_parameters(path, "the model of its config" if source.config else described, expected, stored)


def _described(path: Path, source: _Source, headers: dict[str, Tensor]) -> tuple[ConvNextV2FcmaeConfig, str]:
    """The config and the class (its task) that the config file, or else the parameters, describe."""
    if any(name.startswith("decoder.") for name in headers):
        task = "ForPreTraining"
    elif any(name.startswith("classifier.") for name in headers):
        task = "ForImageClassification"
    elif any(name.startswith("hidden_states_norms.") for name in headers):
        task = "Backbone"
    else:
        task = "Model"
    try:
        if source.config is None:
            config = ConvNextV2FcmaeConfig(**dimensions(headers, source.layout))
            if source.layout == "timm":
                refuse_where_timm_differs(config)
            return config, task
        if source.layout == "timm":
            fields = read_timm_config(path)
            declares_head = fields.keys() & {"id2label", "num_labels"}
            return ConvNextV2FcmaeConfig(**fields), "ForImageClassification" if declares_head else task
        for architecture in source.config.get("architectures") or []:
            if architecture not in _TASK_OF_ARCHITECTURE:
                raise ValueError(f"architectures has {architecture!r}; known are {', '.join(_TASK_OF_ARCHITECTURE)}")
            task = _TASK_OF_ARCHITECTURE[architecture]
        if source.layout == "hf_models":
            return ConvNextV2FcmaeConfig.from_pretrained(path), task
        return _config_of_native(path, source.config["model_type"]), task
    except (StrictDataclassError, ValueError, TypeError, LookupError) as error:
        message = " ".join(str(error).split()).rstrip(".")
        if source.config is None:
            raise ValueError(f"{path} is no ConvNeXt: {message}.") from error
        raise ValueError(f"{path / 'config.json'} is no valid config: {message}.") from error


def _config_of_native(path: Path, model_type: str) -> ConvNextV2FcmaeConfig:
    native = {"convnextv2": ConvNextV2Config, "convnext": ConvNextConfig}[model_type].from_pretrained(path).to_dict()
    fields = {name: value for name, value in native.items() if name not in (*KIND_FIELDS, *_DERIVED_FIELDS)}
    if isinstance(fields["patch_size"], (list, tuple)):
        if len(set(fields["patch_size"])) != 1:
            raise ValueError(f"patch_size is {fields['patch_size']}: only square stems are known here")
        fields["patch_size"] = fields["patch_size"][0]
    fields["use_grn"] = model_type == "convnextv2"
    fields["layer_scale_init_value"] = max(fields.get("layer_scale_init_value", 0.0), 0.0)
    return ConvNextV2FcmaeConfig(**fields)
