"""What a card says of a tuned model: by which method it was trained, and how sure its accuracy over pairs is."""

import math
from typing import Any, NamedTuple

LORA = ("LoRA", "2106.09685")
QLORA = ("QLoRA and NF4", "2305.14314")
DORA = ("DoRA", "2402.09353")
RSLORA = ("rsLoRA, the scale α / √r", "2312.03732")
# What an adapter's two factors begin with, by the first part of the name in --lora_init, and the paper.
INITIALIZATIONS = {
    "pissa": ("PiSSA: the weight's largest singular vectors", ("PiSSA", "2404.02948")),
    "eva": ("EVA: the singular vectors of the layer's inputs", ("EVA", "2410.07170")),
    "olora": ("OLoRA: a QR decomposition of the weight", ("OLoRA", "2406.01775")),
    "gaussian": ("random numbers from a normal distribution, and zeros", None),
}


class Method(NamedTuple):
    """How an adapter was trained; `papers` are pairs of what and an arXiv number."""

    name: str
    long_name: str
    initialization: str | None
    papers: list[tuple[str, str]]


def describe_tuning(run: dict[str, Any]) -> dict[str, Any]:
    """What the templates of tuned models ask for beside the run's own sections, as far as it follows from them."""
    adapter, metrics = run["adapter"], run["metrics"]
    counted = run["counts"].get("eval", {})
    evaluated = counted["rows"] - counted["left_out"] if {"rows", "left_out"} <= counted.keys() else None
    if run["task"] == "grpo":  # which leaves no problem out
        evaluated = run["data"].get("eval", {}).get("rows")
    figures = {
        "adapter_only": bool(adapter) and not run["merged"],
        "base_on_hub": run["data"].get("model", {}).get("source") == "hub",
        "tags": [],
        # PiSSA and OLoRA are stored with their beginning beside them (`training.adapters.make_plain`).
        "stored_ranks": 2 if adapter.get("init", "").startswith(("pissa", "olora")) else 1,
        "method": _method(adapter, run["quantization"]) if adapter else None,
        "quantized": _quantized(run["quantization"]),
        "evaluated": evaluated,
        "measured_before": any(name.endswith("_before") for name in metrics),
    }
    if run["task"] == "grpo" and run["arguments"].get("apply_chat_template") is not False:
        figures["tags"].append("conversational")
    if adapter:
        names = {"lora": True, "qlora": run["quantization"], "dora": adapter.get("use_dora")}
        figures["tags"] += [name for name, used in names.items() if used]
    accuracy = metrics.get("eval_accuracy")
    if (
        evaluated and accuracy is not None and 0 < accuracy < 1
    ):  # where all are right, or none, the formula says nothing
        figures["standard_error"] = math.sqrt(accuracy * (1 - accuracy) / evaluated)
    return figures


def _method(adapter: dict[str, Any], quantization: dict[str, Any]) -> Method:
    name = "DoRA" if adapter.get("use_dora") else "LoRA"
    long_name = "DoRA: weights parted into length and direction, LoRA on the direction" if name == "DoRA" else name
    papers = [LORA]
    if quantization:
        name, long_name = f"Q{name}", f"{long_name}, on a base in 4 bits (Q{name})"
        papers.append(QLORA)
    papers += [DORA] * bool(adapter.get("use_dora")) + [RSLORA] * bool(adapter.get("use_rslora"))
    beginning = adapter.get("init", "").split("_")[0]
    initialization, paper = INITIALIZATIONS.get(beginning, (None, None))
    return Method(name, long_name, initialization, papers + [paper] * bool(paper))


def _quantized(quantization: dict[str, Any]) -> str | None:
    if not quantization:
        return None
    kind = f"{quantization['bits']} bits ({quantization['type'].upper()}"
    double = " with double quantisation" if quantization.get("double_quantization") else ""
    return f"{kind}{double}), computing in {quantization['compute_dtype']}"
