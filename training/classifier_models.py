"""What `--model` of the fine-tuning may be, and the classifier and image processor that come of it.

- A size of `hf_models.convnextv2_fcmae.sizes`: new weights.
- A folder or file of ConvNeXt V1 or V2 in any layout that `hf_models.convnextv2_fcmae.checkpoints` opens.
- Any other image classifier of transformers, as a folder or Hub id; `timm/NAME` is timm's model of that name.

The head is kept where it has the data's classes, in their order; otherwise it is new, as FCMAE's always is.
"""

import copy
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    TimmWrapperConfig,
)
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

from hf_models.convnextv2_fcmae import ConvNextV2FcmaeConfig, ConvNextV2FcmaeForImageClassification
from hf_models.convnextv2_fcmae.checkpoints import load_checkpoint
from hf_models.convnextv2_fcmae.sizes import SIZES
from hf_models.convnextv2_fcmae.timm_folder import ARCHITECTURES, PREPROCESSING
from hf_models.stored_weights import read_config_fields

from .image_preparation import build_image_processor
from .run_setup import check_config_overrides

CONVNEXTS = ("convnextv2_fcmae", "convnextv2", "convnext")
TIMM = "timm/"
HEAD_STD = 0.02  # of a truncated normal distribution, as ConvNeXt's layers begin


@dataclass
class ClassifierArguments:
    model: str = field(
        default="atto",
        metadata={
            "help": f"What to begin with: a new ConvNeXt of a size ({', '.join(SIZES)}), a folder or file of ConvNeXt "
            "weights (ours, official, timm, transformers), another transformers image classifier (folder or Hub id), "
            "or timm/NAME."
        },
    )
    config_overrides: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'Config fields other than the size\'s, as JSON: {"depths": [2, 4, 2]}.'}
    )
    from_scratch: bool = field(
        default=False, metadata={"help": "Take only the shape of --model, with new weights: what pretraining is worth."}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the images in pixels; by default the model's own."}
    )
    crop_pct: float | None = field(
        default=None,
        metadata={"help": "Share of a resized image's side that evaluation keeps; by default the model's own."},
    )
    drop_path_rate: float | None = field(
        default=None, metadata={"help": "Stochastic depth at the last block, 0 at the first; by default the model's."}
    )
    head_init_scale: float = field(default=1.0, metadata={"help": "Multiplies the weights of a new head."})

    def __post_init__(self):
        described = None if self.model in SIZES else self.model
        self.config_overrides = check_config_overrides(self.config_overrides, ConvNextV2FcmaeConfig, described)
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"--image_size is {self.image_size}: give a number of pixels.")
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise ValueError(f"--crop_pct is {self.crop_pct}: give a share above 0 and up to 1.")
        if self.drop_path_rate is not None and not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"--drop_path_rate is {self.drop_path_rate}: give 0 or more, and less than 1.")


class Classifier(NamedTuple):
    """`new` names the parameters that no checkpoint gave, of a model that was not new as a whole."""

    model: PreTrainedModel
    processor: BaseImageProcessor
    new: list[str]


class ImageFormat(NamedTuple):
    """What a processor makes of an image: `size` is (height, width) in pixels; mean and deviation are a channel's."""

    channels: int
    size: tuple[int, int]
    mean: list[float]
    std: list[float]


def open_classifier(arguments: ClassifierArguments, labels: list[str]) -> Classifier:
    """The classifier of the classes `labels`, in float32, and its image processor.

    Raises ValueError or FileNotFoundError, in one sentence, where there is no such model, or none for such images.
    """
    name = arguments.model
    if name not in SIZES and Path(name).is_dir():
        fields = read_config_fields(Path(name) / "config.json")
        of_ours = fields.get("model_type") in CONVNEXTS or (
            "model_type" not in fields and fields.get("architecture") in ARCHITECTURES
        )
    else:
        of_ours = name in SIZES or Path(name).is_file()
    opened = (_open_convnext if of_ours else _open_foreign)(arguments, labels)
    return opened._replace(model=opened.model.float())


# ---- ConvNeXt ----


def _open_convnext(arguments: ClassifierArguments, labels: list[str]) -> Classifier:
    source = None
    if arguments.model in SIZES:
        try:
            config = ConvNextV2FcmaeConfig(**SIZES[arguments.model].config | arguments.config_overrides)
        except (StrictDataclassError, ValueError) as error:
            raise ValueError(f"--config_overrides: {error}") from error
    else:
        source = load_checkpoint(arguments.model)
        config = copy.deepcopy(source.config)
    had_labels = [config.id2label.get(number) for number in range(config.num_labels)]
    _set_labels(config, labels)
    config.dtype = torch.float32
    config.image_size = arguments.image_size or config.image_size
    if arguments.drop_path_rate is not None:
        config.drop_path_rate = arguments.drop_path_rate
    model = ConvNextV2FcmaeForImageClassification(config)
    processor = _processor_of_convnext(arguments, config)
    if source is None or arguments.from_scratch:
        return Classifier(model, processor, [])
    stored = {name: tensor for name, tensor in source.state_dict().items() if not name.startswith("decoder.")}
    if not any(name.startswith("convnextv2.") for name in stored):  # an encoder alone
        stored = {f"convnextv2.{name}": tensor for name, tensor in stored.items()}
    if had_labels != labels:
        stored = {name: tensor for name, tensor in stored.items() if not name.startswith("classifier.")}
    new = model.load_state_dict(stored, strict=False).missing_keys
    if "classifier.weight" in new:
        new_head(model, arguments.head_init_scale)
    return Classifier(model, processor, new)


def _processor_of_convnext(arguments: ClassifierArguments, config: ConvNextV2FcmaeConfig) -> BaseImageProcessor:
    if (Path(arguments.model) / "preprocessor_config.json").is_file():
        return _sized(AutoImageProcessor.from_pretrained(arguments.model), arguments.image_size, arguments.crop_pct)
    return _sized(build_image_processor(config), None, arguments.crop_pct)


# ---- other families ----


def _open_foreign(arguments: ClassifierArguments, labels: list[str]) -> Classifier:
    config = _foreign_config(arguments)
    had_labels = [config.id2label.get(number) for number in range(config.num_labels)]
    _set_labels(config, labels)
    is_timm = isinstance(config, TimmWrapperConfig)
    if is_timm:
        _configure_timm(config, arguments)
    else:
        if arguments.drop_path_rate is not None:
            if not hasattr(config, "drop_path_rate"):
                raise ValueError(f"--drop_path_rate: a {config.model_type} has no stochastic depth; leave it off.")
            config.drop_path_rate = arguments.drop_path_rate
        if arguments.image_size and hasattr(config, "image_size"):
            config.image_size = arguments.image_size

    new: list[str] = []
    if arguments.from_scratch:
        model = AutoModelForImageClassification.from_config(config)
        if is_timm:  # transformers' wrapper fills it with numbers of its own; timm knows how to begin
            _fill_as_timm_does(model)
    else:
        model, new = _load_foreign(arguments.model, config)
        head = head_parameters(model)
        if had_labels != labels or head.keys() & set(new):
            new_head(model, arguments.head_init_scale)
            new = sorted(head.keys() | set(new))
    if is_timm:
        processor = TimmWrapperImageProcessor(config.pretrained_cfg, architecture=config.architecture)
    else:
        processor = _foreign_processor(arguments, config)
    return Classifier(model, processor, new)


def _foreign_config(arguments: ClassifierArguments) -> PreTrainedConfig:
    name = arguments.model
    if name.startswith(TIMM) and not Path(name).exists():
        architecture = name.removeprefix(TIMM)
        if not timm.is_model(architecture):
            similar = difflib.get_close_matches(architecture, timm.list_models(), n=3)
            raise ValueError(f"timm has no model {architecture!r}; near that name: {', '.join(similar) or 'none'}.")
        if arguments.from_scratch:
            described = timm.get_pretrained_cfg(architecture).to_dict()
            return TimmWrapperConfig(
                architecture=architecture.split(".")[0],
                pretrained_cfg={name: described[name] for name in PREPROCESSING if described.get(name) is not None},
            )
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        scratch = " Without the Hub, timm's shapes are there with --from_scratch true." if name.startswith(TIMM) else ""
        raise ValueError(
            f"--model {name!r} cannot be opened: give a size ({', '.join(SIZES)}), a model folder, a weights file, a "
            f"Hub id or timm/NAME.{scratch} {error}"
        ) from error


def _configure_timm(config: TimmWrapperConfig, arguments: ClassifierArguments) -> None:
    config.label_names = list(config.id2label.values())  # what its config.json has in the place of id2label
    pretrained = dict(config.pretrained_cfg)
    if arguments.crop_pct is not None:
        pretrained["crop_pct"] = arguments.crop_pct
    model_args = dict(config.model_args or {})
    if arguments.drop_path_rate is not None:
        model_args["drop_path_rate"] = arguments.drop_path_rate
    if arguments.image_size is not None:
        resized = pretrained.get("input_size", [3])[0], arguments.image_size, arguments.image_size
        if list(resized) != list(pretrained.get("input_size", ())):
            pretrained["input_size"] = list(resized)
            if arguments.from_scratch:
                # Models with fixed positions are built for a size; the others have no such argument.
                try:
                    timm.create_model(config.architecture, **model_args, img_size=arguments.image_size)
                    model_args["img_size"] = arguments.image_size
                except TypeError:
                    pass
    config.pretrained_cfg, config.model_args = pretrained, model_args or None


def _fill_as_timm_does(model: PreTrainedModel) -> None:
    arguments = model.config.model_args or {}
    fresh = timm.create_model(model.config.architecture, num_classes=model.config.num_labels, **arguments)
    model.timm_model.load_state_dict(fresh.state_dict())


def _load_foreign(name: str, config: PreTrainedConfig) -> tuple[PreTrainedModel, list[str]]:
    try:
        model, loaded = AutoModelForImageClassification.from_pretrained(
            name, config=config, ignore_mismatched_sizes=True, output_loading_info=True, dtype=torch.float32
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise ValueError(f"--model {name!r} cannot be opened as an image classifier: {error}") from error
    head = head_parameters(model)
    differing = [entry[0] for entry in loaded["mismatched_keys"] if entry[0] not in head]
    if differing:
        raise ValueError(
            f"--model {name!r}: {differing[0]} has another shape in its weights than in this model. If --image_size is "
            "given, the model's positions are for its own size: leave it off, or give --from_scratch true."
        )
    new = sorted({*loaded["missing_keys"], *(entry[0] for entry in loaded["mismatched_keys"])})
    body = [key for key, _ in model.named_parameters() if key not in head]
    if 2 * sum(key in new for key in body) > len(body):
        raise ValueError(f"--model {name!r} holds no weights of a {type(model).__name__}: {new[0]} is missing.")
    return model, new


def _foreign_processor(arguments: ClassifierArguments, config: PreTrainedConfig) -> BaseImageProcessor:
    try:
        processor = AutoImageProcessor.from_pretrained(arguments.model)
    except (OSError, ValueError, KeyError):  # a folder with weights and config only
        size = arguments.image_size or getattr(config, "image_size", 224)
        like_ours = ConvNextV2FcmaeConfig(image_size=size, num_channels=getattr(config, "num_channels", 3))
        return _sized(build_image_processor(like_ours), None, arguments.crop_pct)
    return _sized(processor, arguments.image_size, arguments.crop_pct)


def _sized(processor: BaseImageProcessor, image_size: int | None, crop_pct: float | None) -> BaseImageProcessor:
    """`processor` for images of `image_size` pixels; what it resizes to before a crop keeps its proportion."""
    if crop_pct is not None:
        if not hasattr(processor, "crop_pct"):
            raise ValueError(f"--crop_pct: this model's {type(processor).__name__} has none; leave it off.")
        processor.crop_pct = crop_pct
    if image_size is None:
        return processor
    before = _output_size(processor)[0]
    size = {side: round(pixels * image_size / before) for side, pixels in dict(processor.size).items() if pixels}
    processor.size = type(processor.size)(**size)
    if getattr(processor, "do_center_crop", None):
        processor.crop_size = type(processor.crop_size)(height=image_size, width=image_size)
    return processor


# ---- every family ----


def _set_labels(config: PreTrainedConfig, labels: list[str]) -> None:
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in enumerate(labels)}


def head_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The classifying layer's parameters by name; all others are the backbone's."""
    if hasattr(model, "timm_model"):
        head = model.timm_model.get_classifier()
        parts = head if isinstance(head, tuple) else (head,)  # distilled ones have two
        of_head = {id(parameter) for part in parts for parameter in part.parameters()}
        return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in of_head}
    prefix = model.base_model_prefix + "."
    return {name: parameter for name, parameter in model.named_parameters() if not name.startswith(prefix)}


def adapter_layers(model: PreTrainedModel, rank: int) -> tuple[list[str], list[str]]:
    """Names of the layers that an adapter of this rank changes, and of those that are trained whole with it.

    Trained whole are the head, and every convolution whose update would have as many numbers as the kernel itself: a
    depthwise 7x7 has 49 a channel, and its update in PEFT 49 a channel for each unit of the rank; nor can PEFT merge it
    (0.21.2). Of a ConvNeXt, the pointwise layers are adapted, and stem and downsampling unless the rank is high.

    Raises ValueError for batch norm, whose statistics change in training and are in no adapter.
    """
    head = {name.rpartition(".")[0] for name in head_parameters(model)}
    low_rank, whole = [], sorted(head)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"--use_peft: {name} of {type(model).__name__} is a batch norm, whose statistics no adapter holds: "
                "leave it off, or take a model without, such as a ConvNeXt."
            )
        if name in head:
            continue
        if isinstance(layer, nn.Linear):
            low_rank.append(name)
        elif isinstance(layer, nn.Conv2d):
            inputs = layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1]
            saves = layer.groups == 1 and rank * (inputs + layer.out_channels) < layer.weight.numel()
            (low_rank if saves else whole).append(name)
    return low_rank, whole


@torch.no_grad()
def new_head(model: PreTrainedModel, scale: float) -> None:
    for name, parameter in head_parameters(model).items():
        if parameter.ndim > 1:
            nn.init.trunc_normal_(parameter, std=HEAD_STD)
            parameter.mul_(scale)
        else:
            nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)  # 1: of a norm in the head


def image_format(model: PreTrainedModel, processor: BaseImageProcessor) -> ImageFormat:
    if isinstance(processor, TimmWrapperImageProcessor):
        described = processor.data_config
        channels, height, width = described["input_size"]
        return ImageFormat(channels, (height, width), list(described["mean"]), list(described["std"]))
    channels = getattr(model.config, "num_channels", 3)
    normalizes = getattr(processor, "do_normalize", True) and processor.image_mean is not None
    mean, std = (processor.image_mean, processor.image_std) if normalizes else (0.0, 1.0)
    mean, std = ([float(v)] * channels if isinstance(v, int | float) else [float(x) for x in v] for v in (mean, std))
    return ImageFormat(channels, _output_size(processor), mean, std)


def _output_size(processor: BaseImageProcessor) -> tuple[int, int]:
    size = dict(processor.size)
    if getattr(processor, "do_center_crop", None) and processor.crop_size:
        size = dict(processor.crop_size)
    if size.get("shortest_edge"):
        return size["shortest_edge"], size["shortest_edge"]
    return size["height"], size["width"]


def forward_flops(model: PreTrainedModel, images: ImageFormat, name: str) -> int:
    """Floating-point operations of one image through `model`.

    Raises ValueError where the model does not take such images or gives no logits for them.
    """
    if images.channels not in (1, 3):
        raise ValueError(
            f"--model {name!r} takes {images.channels} channels: images are read as grey (1) or colour (3)."
        )
    model.eval()
    pixels = torch.zeros(1, images.channels, *images.size)
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            logits = model(pixel_values=pixels).logits
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"--model {name!r} does not take images of {images.channels} x {images.size[0]} x {images.size[1]} "
            f"(channels, height, width): {error} Give another --image_size."
        ) from error
    if logits.shape != (1, model.config.num_labels):
        raise ValueError(f"--model {name!r} gives no logits for {model.config.num_labels} classes.")
    return counter.get_total_flops()
