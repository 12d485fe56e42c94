"""A folder as one meets it who has never heard of us: does it load, do the card's snippets run, what does it compute?

`hub_cards.publish` runs this file as a script in a clean process, from another folder; it therefore imports nothing of
ours. Training uses `reference_outputs` to record what a finished model computes, which the script then compares with.

    python -P hub_cards/stranger.py JOB.json     # see `check` for what the job holds; writes its findings into it
"""

import gc
import json
import sys
import traceback
from pathlib import Path
from typing import Any

OURS = ("hf_models", "training", "hub_cards")
TEXT = "The river rises in 1,204 small springs; naïve maps show 3 of them. What is 7 + 5? 北京"
# How far outputs may be from the recorded ones, absolutely and in proportion, by the weights' dtype: another processor
# sums in another order.
TOLERANCES = {"float32": 2e-4, "float64": 2e-4, "float16": 0.05, "bfloat16": 0.2}
RECORDED_VALUES = 16
LONGEST_TEXT = 32  # tokens
# The Auto class that opens an architecture without code of its own, by the end of its name.
AUTO_CLASSES = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForImageClassification": "AutoModelForImageClassification",
    "ForPreTraining": "AutoModelForPreTraining",
    "Backbone": "AutoBackbone",
}

# Masked pretraining has no final norm, which the encoder then begins with (`hf_models/convnextv2_fcmae`).
NEW_NORM = {"layernorm.weight", "layernorm.bias"}
ADAPTER_CLASSES = {"CAUSAL_LM": "AutoPeftModelForCausalLM", "SEQ_CLS": "AutoPeftModelForSequenceClassification"}


def reference_outputs(folder: str | Path) -> dict[str, Any]:
    """What the model and the tokenizer in `folder` make of inputs that are always the same, for a later comparison.

    Returns `kind` (what `values` are), `dtype` (of the weights) and `values`, at most 32 numbers:

    - causal LM: the log-probability, in nats, of each token of a text, given those before it;
    - sequence classifier: its logits for that text;
    - image classifier: its first logits for a picture that is drawn here;
    - masked autoencoder (one that takes `noise`): its loss on that picture, with the patches removed in a fixed order;
    - other image models: the first numbers of the pooled output;

    and `input_ids`, the text's, where there is a tokenizer. A folder with a tokenizer alone has these alone.
    Custom code in the folder is run.
    """
    import torch
    from transformers import AutoTokenizer

    folder = Path(folder)
    outputs: dict[str, Any] = {}
    if has_tokenizer(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        outputs["input_ids"] = tokenizer(TEXT)["input_ids"][:LONGEST_TEXT]
    auto_class = main_auto_class(folder)
    if auto_class is None:
        return outputs
    model = open_model(auto_class, folder)
    with torch.no_grad():
        kind, values = _computed(model.eval(), folder, outputs.get("input_ids"))
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return outputs | {"kind": kind, "dtype": dtype, "values": [float(f"{value:.7g}") for value in values]}


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json"))


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text(encoding="utf-8")) if (folder / name).is_file() else {}


def main_auto_class(folder: Path) -> str | None:
    """Which Auto class, transformers' or PEFT's, opens the very model that `folder` holds; None without a model."""
    import transformers

    if adapter := read_config(folder, "adapter_config.json"):
        return ADAPTER_CLASSES.get(adapter.get("task_type"), "AutoPeftModel")
    config = read_config(folder)
    if not config:
        return None
    architecture = (config.get("architectures") or [""])[0]
    for auto_class, reference in (config.get("auto_map") or {}).items():
        is_model = auto_class.startswith("AutoModel") and hasattr(transformers, auto_class)
        if is_model and isinstance(reference, str) and reference.split(".")[-1] == architecture:
            return auto_class
    return next((auto for end, auto in AUTO_CLASSES.items() if architecture.endswith(end)), "AutoModel")


def open_model(auto_class: str, folder: Path, **options):
    import transformers

    if auto_class.startswith("AutoPeft"):
        import peft

        if auto_class == ADAPTER_CLASSES["SEQ_CLS"]:
            options["num_labels"] = _outputs_of_head(folder)
        return getattr(peft, auto_class).from_pretrained(folder, trust_remote_code=True, dtype="auto", **options)
    chosen = getattr(transformers, auto_class)
    if auto_class == "AutoBackbone":
        # It asks the Hub for a local folder's config (transformers 5.23), so that weights are not loaded here.
        return chosen.from_config(
            transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True), trust_remote_code=True
        )
    return chosen.from_pretrained(folder, trust_remote_code=True, dtype="auto", **options)


def _outputs_of_head(adapter: Path) -> int:
    """How many outputs the head has that an adapter of a classifier brings along."""
    from safetensors import safe_open

    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as stored:
        heads = [name for name in list(stored.keys()) if name.endswith(("score.weight", "classifier.weight"))]
        return stored.get_slice(heads[0]).get_shape()[0] if heads else 2


def _computed(model, folder: Path, input_ids: list[int] | None) -> tuple[str, list[float]]:
    import inspect

    import torch

    parameters = inspect.signature(model.forward).parameters
    if "pixel_values" in parameters:
        pixels = _pixels(model, folder)
        if "noise" in parameters:
            patches = _patches(model, pixels)
            noise = torch.arange(patches).mul(7).remainder(patches).float()[None] / patches
            return "loss, patches removed in a fixed order", [model(pixel_values=pixels, noise=noise).loss.item()]
        output = model(pixel_values=pixels)
        for name in ("logits", "pooler_output", "last_hidden_state"):
            if getattr(output, name, None) is not None:
                return name, getattr(output, name)[0].flatten()[:RECORDED_VALUES].float().tolist()
        return "feature map", output.feature_maps[-1][0].flatten()[:RECORDED_VALUES].float().tolist()

    if input_ids is None:
        input_ids = [i % model.config.vocab_size for i in range(3, 3 + LONGEST_TEXT)]
    ids = torch.tensor([input_ids])
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    logits = getattr(output, "logits", None)
    if logits is None:
        return "last_hidden_state", output.last_hidden_state[0].flatten()[:RECORDED_VALUES].float().tolist()
    if logits.dim() == 2:
        return "logits", logits[0, :RECORDED_VALUES].float().tolist()
    log_probs = logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])
    return "log-probability of each token", log_probs[:, 0].tolist()


def _pixels(model, folder: Path):
    """The drawn picture as the folder's image processor gives it to the model."""
    from transformers import AutoImageProcessor

    picture = _draw()
    if getattr(model.config, "num_channels", 3) == 1:
        picture = picture.convert("L")
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    pixels = processor(picture, return_tensors="pt")["pixel_values"]
    return pixels.to(next(model.parameters()).dtype)


def _draw():
    """A picture of slopes and rings, 256 × 256 pixels."""
    from PIL import Image

    slope, rings = Image.linear_gradient("L"), Image.radial_gradient("L")
    return Image.merge("RGB", (slope, rings, slope.rotate(90)))


def _patches(model, pixels) -> int:
    """How many patches a masked autoencoder sees: as many as the mask that it returns has places."""
    import torch

    with torch.random.fork_rng():
        return model(pixel_values=pixels).mask.shape[1]


def compare(recorded: dict[str, Any], found: dict[str, Any]) -> str | None:
    """In what the outputs `found` differ from the `recorded` ones; None where they agree."""
    if recorded.get("input_ids") != found.get("input_ids"):
        return f"the tokenizer makes {found.get('input_ids')} of a text, and made {recorded.get('input_ids')}"
    if recorded.get("kind") != found.get("kind"):
        return f"the model gives {found.get('kind')!r}, and gave {recorded.get('kind')!r}"
    before, now = recorded.get("values", []), found.get("values", [])
    if len(before) != len(now):
        return f"the model gives {len(now)} values ({found['kind']}), and gave {len(before)}"
    tolerance = TOLERANCES.get(found.get("dtype", "float32"), TOLERANCES["bfloat16"])
    for i, (was, is_now) in enumerate(zip(before, now, strict=True)):
        if not abs(is_now - was) <= tolerance * max(1.0, abs(was)):  # written so that a NaN differs
            return f"value {i} ({found['kind']}) is {is_now:.6g}, and was {was:.6g} when the run ended"
    return None


def check(job: dict[str, Any]) -> dict[str, Any]:
    """Goes through a folder; returns `loaded` (what opened it), `problem` (the first one, or None) and `outputs`.

    Args:
        job: `folder`, its path; `snippets`, pairs of a line in the card and Python code, run in this order, each that
            opens a model on its own; `recorded`, the outputs that the run recorded, or None.
    """
    folder = Path(job["folder"])
    findings: dict[str, Any] = {"loaded": [], "snippets": 0, "outputs": None, "problem": None}
    what = ""
    try:
        for what in _loaders(folder):
            _load(what, folder)
            findings["loaded"].append(what)
            gc.collect()
        what = "reference outputs"
        findings["outputs"] = reference_outputs(folder)
        gc.collect()
        if job["recorded"] and (difference := compare(job["recorded"], findings["outputs"])):
            findings["problem"] = f"what it computes is not what the run recorded: {difference}."
            return findings
        namespace: dict[str, Any] = {}
        if job["snippets"]:
            _draw().save("photo.jpg")  # the reader's own, which the cards of image models ask for
        for line, code in job["snippets"]:
            what = f"README.md, the snippet at line {line}"
            if "from_pretrained(" in code or "pipeline(" in code:
                # It opens a model of its own: the one before it would take as much memory again.
                namespace = {"__name__": "__main__"}
                gc.collect()
            # Moved down, so that a traceback has the card's own lines.
            exec(compile("\n" * (line - 1) + code, "README.md", "exec"), namespace)
            findings["snippets"] += 1
    except BaseException as error:  # a snippet may do anything, and what it does is the finding
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "README.md"]
        where = f", line {lines[-1]}" if lines else ""
        findings["problem"] = f"{what}{where}: {type(error).__name__}: {' '.join(str(error).split())[:600]}"
    return findings


def _loaders(folder: Path) -> list[str]:
    """Names of every Auto class that the folder declares, and of those for what lies beside the model."""
    loaders = []
    if has_tokenizer(folder):
        loaders.append("AutoTokenizer")
    if (folder / "preprocessor_config.json").is_file() or (folder / "processor_config.json").is_file():
        loaders.append("AutoImageProcessor")
    if (main := main_auto_class(folder)) is None:
        return loaders
    if main.startswith("AutoPeft"):
        return [*loaders, main]
    declared = read_config(folder).get("auto_map") or {}
    return [*loaders, "AutoConfig", *sorted({name for name in declared if name != "AutoConfig"} | {main})]


def _load(what: str, folder: Path) -> None:
    import transformers

    if what == "AutoBackbone" or what.startswith("AutoPeft"):
        open_model(what, folder)
        return
    if not what.startswith("AutoModel"):
        getattr(transformers, what).from_pretrained(folder, trust_remote_code=True)
        return
    model, info = open_model(what, folder, output_loading_info=True)
    # A class with another head than the stored one has a new one, and the base model has none.
    if type(model).__name__ == (read_config(folder).get("architectures") or [None])[0]:
        unlike = [*sorted(info["missing_keys"]), *sorted(info["unexpected_keys"]), *map(str, info["mismatched_keys"])]
        if unlike:
            raise ValueError(f"weights and model differ in {', '.join(unlike[:4])}")
    elif what == "AutoModel" and info["missing_keys"] - NEW_NORM:
        raise ValueError(f"the weights lack {', '.join(sorted(info['missing_keys'])[:4])}")


class _NobodyKnowsUs:
    """Put first among the importers: whatever is installed here, our packages are not to be had."""

    @staticmethod
    def find_spec(name: str, path=None, target=None):
        if name.split(".")[0] in OURS:
            raise ModuleNotFoundError(f"No module named {name!r} (a stranger has none)", name=name)


if __name__ == "__main__":
    sys.meta_path.insert(0, _NobodyKnowsUs)
    job_file = Path(sys.argv[1])
    job_file.write_text(json.dumps(check(json.loads(job_file.read_text(encoding="utf-8")))), encoding="utf-8")
