"""A card's YAML header: what the Hub indexes and shows beside the card, in the spellings that it knows."""

import math
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from .tuned_models import describe_tuning

# Of each task: its pipeline on the Hub, its tags, and the figures that the Hub's index of models is told, each with
# its type there and its name.
HUB_METADATA = {
    "pretrain_lm": {
        "pipeline_tag": "text-generation",
        "tags": ["pretrained"],
        "metrics": {
            "eval_loss": ("loss", "loss (nats a token)"),
            "eval_perplexity": ("perplexity", "perplexity (per token)"),
            "eval_bits_per_byte": ("bits_per_byte", "bits per byte"),
        },
    },
    "pretrain_fcmae": {
        "pipeline_tag": "image-feature-extraction",
        "tags": ["fcmae", "pretrained"],
        # The loss stays out: it compares with no other model's, for it depends on masks and patches.
        "metrics": {
            "eval_knn_accuracy": ("accuracy", "accuracy of the nearest neighbours, frozen features"),
            "eval_linear_accuracy": ("accuracy", "accuracy of a linear probe, frozen features"),
        },
    },
    "finetune_classifier": {
        "pipeline_tag": "image-classification",
        "tags": [],
        "metrics": {
            "eval_accuracy": ("accuracy", "top-1 accuracy"),
            "eval_top5_accuracy": ("top5_accuracy", "top-5 accuracy"),
        },
    },
    "train_tokenizer": {"tags": ["tokenizer"], "metrics": {}},
    # Figures of one vocabulary, which compare with no other model's.
    "train_perplexity_model": {"library": None, "tags": ["kenlm", "sentencepiece", "perplexity"], "metrics": {}},
    "sft": {
        "pipeline_tag": "text-generation",
        "tags": ["sft", "trl", "conversational"],
        "metrics": {
            "eval_loss": ("loss", "loss (nats a token)"),
            "eval_perplexity": ("perplexity", "perplexity (per token)"),
            "eval_token_accuracy": ("accuracy", "tokens predicted right"),
        },
    },
    "dpo": {
        "pipeline_tag": "text-generation",
        "tags": ["dpo", "trl", "conversational"],
        "metrics": {"eval_accuracy": ("accuracy", "pairs whose preferred answer gained more")},
    },
    "reward": {
        "pipeline_tag": "text-classification",
        "tags": ["reward-model", "trl"],
        "metrics": {"eval_accuracy": ("accuracy", "pairs whose preferred answer scores higher")},
    },
    "grpo": {
        "pipeline_tag": "text-generation",
        "tags": ["grpo", "trl", "reasoning"],
        "metrics": {
            "eval_pass@1": ("pass@1", "pass@1, strict: the right answer in the right format"),
            "eval_pass@8": ("pass@8", "pass@8, strict: the right answer in the right format"),
            "eval_lenient_pass@1": ("pass@1", "pass@1, lenient: the right answer in whatever format"),
        },
    },
    # A folder of models, and itself none.
    "r1": {"library": None, "tags": ["grpo", "trl", "reasoning"], "metrics": {}},
}
# The identifiers at https://huggingface.co/docs/hub/repositories-licenses.
HUB_LICENSES = {
    "afl-3.0", "agpl-3.0", "apache-2.0", "artistic-2.0", "bigcode-openrail-m", "bigscience-bloom-rail-1.0",
    "bigscience-openrail-m", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "bsl-1.0", "c-uda", "cc",
    "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0",
    "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0",
    "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "cdla-sharing-1.0",
    "creativeml-openrail-m", "deepfloyd-if-license", "ecl-2.0", "epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1", "gemma",
    "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "isc", "lgpl", "lgpl-2.1", "lgpl-3.0", "lgpl-lr", "llama2", "llama3",
    "llama3.1", "llama3.2", "llama3.3", "llama4", "lppl-1.3c", "mit", "mpl-2.0", "ms-pl", "ncsa", "odbl", "odc-by",
    "ofl-1.1", "openrail", "openrail++", "osl-3.0", "pddl", "postgresql", "unlicense", "wtfpl", "zlib",
}  # fmt: skip


def card_metadata(run: dict[str, Any], name: str) -> ModelCardData:
    hub, tuning = HUB_METADATA[run["task"]], describe_tuning(run)
    info = run["data"].get("train", {}).get("info", {})
    config = run.get("model", {}).get("config", {})
    tags = [config["model_type"]] if "model_type" in config else []
    tags += hub["tags"] + tuning["tags"] + (["custom_code"] if "auto_map" in config else [])
    # A sample's name or a local file's path would be taken for a data set on the Hub.
    datasets = [data["dataset"] for data in run["data"].values() if data.get("source") == "hub" and "dataset" in data]
    results = _eval_results(run)
    relation = {}
    if tuning["base_on_hub"]:
        # A LoRA that was merged into its base is a fine-tune: by a merge the Hub means one of several models.
        relation = {
            "base_model": base_model(run),
            "base_model_relation": "adapter" if tuning["adapter_only"] else "finetune",
        }
    return ModelCardData(
        library_name="peft" if tuning["adapter_only"] else hub.get("library", "transformers"),
        pipeline_tag=hub.get("pipeline_tag"),
        language=info.get("language"),
        datasets=sorted(set(datasets)) or None,
        tags=tags or None,
        model_name=name if results else None,
        eval_results=results or None,
        **relation,
        **_license_fields(result_license(run)),
    )


def _license_fields(license: str | None) -> dict[str, str]:
    """A licence that the Hub does not know is "other" there, with a name of its own."""
    if license is None:
        return {}
    if license in HUB_LICENSES:
        return {"license": license}
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", license).strip("-")}


def _eval_results(run: dict[str, Any]) -> list[EvalResult]:
    data, hub = run["data"].get("eval"), HUB_METADATA[run["task"]]
    if data is None:
        return []
    # Of a local path, which is no data set on the Hub, the last part.
    dataset = data["dataset"] if data.get("source") == "hub" else Path(data["dataset"]).name
    return [
        EvalResult(
            task_type=hub["pipeline_tag"],
            dataset_type=dataset,
            dataset_name=data.get("info", {}).get("name", dataset),
            dataset_split=data.get("split"),
            metric_type=metric_type,
            metric_name=name,
            metric_value=value,
        )
        for key, (metric_type, name) in hub["metrics"].items()
        if (value := run["metrics"].get(key)) is not None and math.isfinite(value)
    ]


def base_model(run: dict[str, Any]) -> str | None:
    """The model whose weights the run began with; None for new weights."""
    return run["data"].get("model", {}).get("path")


def result_license(run: dict[str, Any]) -> str | None:
    """On what terms the run's result may be passed on, in the Hub's spelling; None where no run knows.

    It is the licence of the text or images, unless the weights that the run began with have their own, which prevails,
    or are under other terms, or were made from data whose terms this run does not know. Problems that a program draws
    are nobody's text and ask for nothing.
    """
    if run.get("base_license"):
        return run["base_license"].lower()
    train, base_run = run["data"].get("train", {}), run.get("base_run", {})
    info = train.get("info", {})
    read = [data for data in (train, run["data"].get("prompts", train)) if data.get("source") != "generator"]
    licenses = {data.get("info", {}).get("license") for data in read}
    if base_run.get("license") or not read:
        licenses.add(base_run.get("license"))
    # One licence for everything, or none that could be told; what is unknown is None.
    spelled = {license and license.lower() for license in licenses}
    license = spelled.pop() if len(spelled) == 1 else None
    if base_run.get("license") or not read:
        return license
    if base_model(run) is None or ("name" in info and base_run.get("data") == info["name"]):
        return license
    return None
