"""What is known of the model that a run begins with: the run that made it, and the licence of its weights."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from hf_models.convnextv2_fcmae import ConvNextV2FcmaeConfig
from hf_models.convnextv2_fcmae.sizes import SIZES
from hf_models.stored_weights import read_config_fields
from hub_cards.metadata import result_license

# ConvNeXt V2's released weights, in every layout in which they are passed on.
RELEASED_V2_LICENSE = "CC-BY-NC-4.0"


def read_run(folder: str) -> dict[str, Any] | None:
    """The `run.json` of a run folder; None for anything else."""
    path = Path(folder) / "run.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def base_entry(path: str, fingerprint: str) -> dict[str, str]:
    """The entry `model` of a run's data, which says whether `path` is an id of the Hub."""
    description = {"path": path, "fingerprint": fingerprint}
    # timm's models are on the Hub under their full names alone: timm/resnet50.a1_in1k, and not timm/resnet50.
    local = Path(path).exists() or (path.startswith("timm/") and "." not in path)
    return description if local else description | {"source": "hub"}


def base_run_section(path: str) -> dict[str, Any]:
    """The section `base_run` of `run.json`: what the run that made the model at `path` was; {} where none is known."""
    run = read_run(path)
    if run is None:
        return {}
    train = run["data"]["train"]
    return {
        "base_run": {
            "path": path,
            "task": run["task"],
            "data": train.get("info", {}).get("name") or train["dataset"],
            "license": result_license(run),
            "metrics": run["metrics"],
            "wall_time_seconds": run["wall_time_seconds"],
        }
    }


def base_license(path: str, config: PreTrainedConfig) -> str | None:
    """The licence that the weights at `path` carry: what their run says, or that of ConvNeXt V2's released weights.

    A file in a layout in which those come may be anybody's, and so may be a folder of ours without a run that has a
    released shape, for `hf_models.convert` leaves no trace of where weights come from: this says the stricter licence,
    for its owner to correct.
    """
    # A checkpoint belongs to the run in whose folder it lies.
    run = read_run(path) or (read_run(str(Path(path).parent)) if Path(path).name.startswith("checkpoint-") else None)
    if run is not None:
        return run.get("base_license")
    if config.model_type == ConvNextV2FcmaeConfig.model_type:
        folder = Path(path)
        of_ours = folder.is_dir() and read_config_fields(folder / "config.json").get("model_type") == config.model_type
        released = config.use_grn and (not of_ours or _has_released_shape(config))
    else:
        released = getattr(config, "architecture", config.model_type).split("_")[0] == "convnextv2"
    return RELEASED_V2_LICENSE if released else None


def _has_released_shape(config: PreTrainedConfig) -> bool:
    shape = list(config.depths), list(config.hidden_sizes)
    return any(shape == (size.config["depths"], size.config["hidden_sizes"]) for size in SIZES.values())
