"""Shapes of ConvNeXt V2 and V1, as data: a name, its parameter count, and the config fields that give it.

    ConvNextV2FcmaeConfig(**SIZES["atto"].config)

V2's are those of arXiv 2301.00808 (appendix A); there is no official V2 small. V1's are those of arXiv 2201.03545
(section 3 and table 1), with LayerScale in the place of GRN.
"""

from typing import Any, NamedTuple


class Size(NamedTuple):
    """`parameters` is the exact count of the classifier with 1,000 classes; `config` is keyword arguments."""

    parameters: int
    config: dict[str, Any]


def _v2(parameters: int, depths: tuple[int, ...], width: int) -> Size:
    return Size(parameters, {"depths": list(depths), "hidden_sizes": [width, 2 * width, 4 * width, 8 * width]})


def _v1(parameters: int, depths: tuple[int, ...], width: int) -> Size:
    config = _v2(parameters, depths, width).config
    return Size(parameters, config | {"use_grn": False, "layer_scale_init_value": 1e-6})


SIZES: dict[str, Size] = {
    "atto": _v2(3_708_400, (2, 2, 6, 2), 40),
    "femto": _v2(5_233_240, (2, 2, 6, 2), 48),
    "pico": _v2(9_066_280, (2, 2, 6, 2), 64),
    "nano": _v2(15_623_800, (2, 2, 8, 2), 80),
    "tiny": _v2(28_635_496, (3, 3, 9, 3), 96),
    "base": _v2(88_717_800, (3, 3, 27, 3), 128),
    "large": _v2(197_956_840, (3, 3, 27, 3), 192),
    "huge": _v2(660_289_640, (3, 3, 27, 3), 352),
    "v1_tiny": _v1(28_589_128, (3, 3, 9, 3), 96),
    "v1_small": _v1(50_223_688, (3, 3, 27, 3), 96),
    "v1_base": _v1(88_591_464, (3, 3, 27, 3), 128),
    "v1_large": _v1(197_767_336, (3, 3, 27, 3), 192),
    "v1_xlarge": _v1(350_196_968, (3, 3, 27, 3), 256),
}
