"""From a decoded image to a model's input: the processor that is saved with a model, and the transforms of training."""

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.transforms import v2
from transformers import BaseImageProcessor, ConvNextImageProcessor, ViTImageProcessor
from transformers.image_utils import PILImageResampling

from hf_models.convnextv2_fcmae import ConvNextV2FcmaeConfig


def build_image_processor(config: ConvNextV2FcmaeConfig) -> BaseImageProcessor:
    """What prepares images for the trained model: ImageNet's mean and deviation, bicubic, the middle of the image.

    From 224 pixels on the middle is seven eighths of the image, as in the paper's evaluation; small images are made to
    be seen whole. Images that are not square are stretched.
    """
    mean, std = (list(values) for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    if config.num_channels == 1:
        mean, std = [sum(mean) / 3], [sum(std) / 3]
    options = {"image_mean": mean, "image_std": std, "resample": PILImageResampling.BICUBIC}
    if isinstance(config.image_size, int):
        crop_pct = 224 / 256 if config.image_size >= 224 else 1.0
        return ConvNextImageProcessor(size={"shortest_edge": config.image_size}, crop_pct=crop_pct, **options)
    height, width = config.image_size
    return ViTImageProcessor(size={"height": height, "width": width}, **options)


def training_transform(size: list[int], crop_scale_min: float, processor: BaseImageProcessor) -> v2.Transform:
    """The paper's augmentation: a random crop, resized, and half of the images mirrored."""
    crop = v2.RandomResizedCrop(size, scale=(crop_scale_min, 1.0), interpolation=v2.InterpolationMode.BICUBIC)
    return v2.Compose([crop, v2.RandomHorizontalFlip(), *_to_pixel_values(processor)])


def held_out_transform(size: list[int], processor: BaseImageProcessor) -> v2.Transform:
    """What `processor` does, without its overhead for each call."""
    bicubic = v2.InterpolationMode.BICUBIC
    if not isinstance(processor, ConvNextImageProcessor) or size[0] >= 384:  # from there on ConvNeXt's stretches too
        return v2.Compose([v2.Resize(size, bicubic), *_to_pixel_values(processor)])
    resize = v2.Resize(int(size[0] / processor.crop_pct), bicubic)
    return v2.Compose([resize, v2.CenterCrop(size), *_to_pixel_values(processor)])


def _to_pixel_values(processor: BaseImageProcessor) -> list[v2.Transform]:
    normalize = v2.Normalize(processor.image_mean, processor.image_std)
    return [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), normalize]
