"""The model card of a run folder, from its `run.json` and nothing else.

    python -m hub_cards.build_card runs/quickstart/language_model

Each task of `training/` has a template, `templates/{task}.md.jinja`. A figure that no run recorded does not appear: a
section whose data are missing is left out, and a card that cannot do without them is refused.
"""

import argparse
import hashlib
import json
import re
import shlex
import shutil
import textwrap
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id

from .confusion import PICTURED_CLASSES, draw_confusion, most_confused, side
from .energy import estimate_energy
from .metadata import base_model, card_metadata, result_license
from .plots import WIDE, draw_curves
from .readable_numbers import count, duration, quantity, rounded
from .reinforcement import describe_reinforcement, describe_road
from .reinforcement_plots import draw_reinforcement, draw_road_by_step, draw_stages
from .tuned_models import describe_tuning

TEMPLATES = Path(__file__).parent / "templates"
ASSETS = "card_assets"
SAMPLE_WIDTH = 88  # Characters: what fits into the text column of a Hub page.
# What a template may ask for without its being there. Everything else that it names has to be recorded.
OPTIONAL_SECTIONS = {
    "status": "finished",
    "arguments": {},
    "data": {},
    "command": None,
    "git_revision": None,
    "libraries": {},
    "hardware": {},
    "wall_time_seconds": None,
    "tokenizer": {},
    "training": {},
    "metrics": {},
    "tokenizer_report": {},
    "history": [],
    "samples": [],
    "example": {},
    "image": {},
    "base_license": None,
    "base_run": {},
    "adapter": {},
    "quantization": {},
    "merged": {},
    "counts": {},
    "evaluations": [],
    "comparisons": [],
    "confusion": {},
    "per_class": [],
    "skipped_images": {"count": 0},
    "warnings": [],
    "road": {},
}
LOSS_LABELS = {
    # Of one step it is about 0 however good the model is, for the advantages of a group add up to 0.
    "grpo": None,
    "dpo": "DPO loss",
    "reward": "Bradley-Terry loss (nats a pair)",
    "pretrain_fcmae": "mean squared error, removed patches",
    "finetune_classifier": "cross-entropy (nats an image)",
}
# Of what a curve of accuracy is a share, where that is not images.
ACCURACY_OF = {"sft": "tokens", "dpo": "pairs", "reward": "pairs"}
# A card's table of classes is whole up to so many; beyond, it has the best and the worst.
LISTED_CLASSES, EXTREME_CLASSES = 50, 10
# Arguments about where a run's files are and what it says meanwhile, and what the card shows elsewhere.
NOT_HYPERPARAMETERS = {
    "answer_column",
    "apply_chat_template",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "compare_with",
    "dataset",
    "dataset_config",
    "dataset_split",
    "dataloader_persistent_workers",
    "device_memory_gib",
    "difficulty",
    "disable_tqdm",
    "dry_run",
    "eval_dataset",
    "eval_dataset_split",
    "eval_difficulty",
    "eval_samples",
    "eval_steps",
    "eval_strategy",
    "dataloader_num_workers",
    "from_scratch",
    "hub_model_id",
    "hub_private_repo",
    "hub_revision",
    "image_column",
    "label_column",
    "label_smoothing_factor",
    "load_in_4bit",
    "logging_steps",
    "lora_alpha",
    "lora_dropout",
    "lora_init",
    "lora_r",
    "lora_target_modules",
    "matmul_peak_gflops",
    "model",
    "num_eval_problems",
    "num_problems",
    "output_dir",
    "per_device_eval_batch_size",
    "probe",
    "probe_images",
    "probed_images",
    "processes",
    "prompt_dataset",
    "prompt_dataset_split",
    "prompt_template",
    "push_to_hub",
    "question_column",
    "report_to",
    "reward_model",
    "reward_timeout",
    "reward_weights",
    "rewards",
    "run_name",
    "sample_prompts",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "seed",
    "streaming",
    "text_column",
    "tokenizer",
    "trust_remote_code",
    "use_cpu",
    "use_dora",
    "use_peft",
    "use_rslora",
}

# At the end of a card, where no reader sees it: by this, `publish` tells an edited card, which it keeps.
SEAL = "<!-- built from run.json: {} -->"


def build_card(folder: str | Path, hub_id: str | None = None) -> Path:
    """Writes `folder/README.md` and its pictures in `folder/card_assets/`; returns the card's path.

    Args:
        hub_id: `user/name` of the repository on the Hub in which the folder is to be published: the card is then
            written for who reads it there. Without it, the card's code opens the folder beside the reader.

    Raises ValueError where `run.json` is missing or no JSON, where its task has no template, where it lacks what the
    template cannot do without, and where `hub_id` is none.
    """
    folder = Path(folder)
    if hub_id is not None:
        validate_repo_id(hub_id)
    run = _read_run(folder)
    template = _template(run["task"])
    name = hub_id.split("/")[-1] if hub_id else folder.resolve().name
    tuning = describe_tuning(run)
    # An adapter names its base by a path from the folder in which it was trained: so then does the code its folder.
    from_there = tuning["adapter_only"] and not tuning["base_on_hub"] and "output_dir" in run["arguments"]
    repo = hub_id or (run["arguments"]["output_dir"] if from_there else f"./{name}")
    try:
        # Of the whole road: in its own folder's run, or in that of a model to which it led.
        road = run["report" if run["task"] == "r1" else "road"]
        plots = _draw(run, road, folder)
        text = template.render(
            run,
            name=name,
            repo=repo,
            hub_id=hub_id,
            plots={plot: f"{ASSETS}/{file}" for plot, file in plots.items()},
            train_data=run["data"].get("train", {}),
            eval_data=run["data"].get("eval", {}),
            base_model=base_model(run),
            tuning=tuning,
            reinforcement=describe_reinforcement(run) if run["task"] == "grpo" else {},
            road=road,
            road_figures=describe_road(road),
            custom_code="auto_map" in run.get("model", {}).get("config", {}),
            license=result_license(run),
            energy=estimate_energy(run["hardware"], run["wall_time_seconds"]),
            hyperparameters={
                field: value
                for field, value in (run["arguments"] | run["training"]).items()
                if field not in NOT_HYPERPARAMETERS and value not in (None, "")
            },
            **_class_figures(run),
        )
        metadata = card_metadata(run, name)
    except (jinja2.UndefinedError, KeyError) as error:
        raise ValueError(f"{folder / 'run.json'} lacks what a card of {run['task']} needs: {error}.") from error
    card = str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{text}")).rstrip("\n") + "\n"
    path = folder / "README.md"
    path.write_text(f"{card}\n{SEAL.format(_digest(card))}\n", encoding="utf-8")
    return path


def is_as_built(card: str) -> bool:
    """Whether nobody edited `card`, the text of a README.md, since `build_card` wrote it."""
    text, _, seal = card.rstrip("\n").rpartition("\n\n")
    return seal == SEAL.format(_digest(text + "\n"))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _draw(run: dict[str, Any], road: dict[str, Any], folder: Path) -> dict[str, str]:
    """Draws or copies the card's pictures into `folder/card_assets/`; returns the file's name of each."""
    assets = folder / ASSETS
    loss_label = LOSS_LABELS.get(run["task"], "cross-entropy (nats a token)")
    accuracy_of = ACCURACY_OF.get(run["task"], "images")
    plots = draw_curves(run["history"], run["metrics"], assets, loss_label, run["comparisons"], accuracy_of)
    if run["task"] == "grpo":
        plots |= draw_reinforcement(run["history"], assets)
    if run["task"] == "r1":
        plots |= draw_road_by_step(road, assets)
    plots |= draw_stages(road, assets)
    if run["confusion"] and (file := draw_confusion(run["confusion"]["labels"], run["confusion"]["counts"], assets)):
        plots["confusion"] = file
    pictures = [sample["picture"] for sample in run["samples"] if "picture" in sample]
    reconstruction = assets / "reconstruction.png"
    if pictures and (folder / pictures[-1]).is_file():
        assets.mkdir(exist_ok=True)
        shutil.copyfile(folder / pictures[-1], reconstruction)
    # The card may be built again where only its own pictures came along.
    if pictures and reconstruction.is_file():
        plots["reconstruction"] = reconstruction.name
    return plots


def _class_figures(run: dict[str, Any]) -> dict[str, Any]:
    """What a classifier's card says of its classes and of how sure its accuracy is, as far as the run recorded it."""
    metrics, confusion = run["metrics"], run["confusion"]
    figures: dict[str, Any] = {"classes": sorted(run["per_class"], key=lambda row: row["label"])}
    if len(run["per_class"]) > LISTED_CLASSES:
        ranked = sorted(
            (row for row in figures["classes"] if row["recall"] is not None), key=lambda row: -row["recall"]
        )
        figures |= {"classes": [], "best_classes": ranked[:EXTREME_CLASSES]}
        figures["worst_classes"] = ranked[: -EXTREME_CLASSES - 1 : -1]
    if confusion:
        images = sum(map(sum, confusion["counts"]))
        figures["evaluated_images"] = images
        # As a share of the text's width, so that its letters are of the size of the other pictures'.
        figures["confusion_width"] = round(100 * side(len(confusion["labels"])) / WIDE[0])
        if images and "eval_accuracy" in metrics:
            accuracy = metrics["eval_accuracy"]
            figures["standard_error"] = (accuracy * (1 - accuracy) / images) ** 0.5
        if len(confusion["labels"]) > PICTURED_CLASSES:
            figures["confused"] = most_confused(confusion["labels"], confusion["counts"])
    return figures


def _read_run(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no run.json: give the output folder of a training run.")
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise ValueError(f"{path} is not readable as JSON ({error}): restore it, or run the training again.") from error
    if not isinstance(run, dict) or "task" not in run:
        raise ValueError(f"{path} names no task: it was not written by a training script of ours.")
    return OPTIONAL_SECTIONS | {key: value for key, value in run.items() if value is not None}


def _template(task: str) -> jinja2.Template:
    tasks = sorted(path.name.removesuffix(".md.jinja") for path in TEMPLATES.glob("*.md.jinja"))
    if task not in tasks:
        raise ValueError(f"There is no card for the task {task!r}: the templates are {', '.join(tasks)}.")
    return _environment().get_template(f"{task}.md.jinja")


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "cell": cell,
        "count": count,
        "data_name": data_name,
        "difficulty": difficulty,
        "duration": duration,
        "fenced": fenced,
        "in_lines": in_lines,
        "inline_code": inline_code,
        "machine": machine,
        "plain": plain,
        "python_string": python_string,
        "quantity": quantity,
        "rounded": rounded,
        "shell": shlex.quote,
        "signed": signed,
    }
    return environment


def data_name(data: dict[str, Any]) -> str:
    return data["info"]["name"] if "info" in data else inline_code(data["dataset"])


def difficulty(fields: dict[str, Any]) -> str:
    """A generator's settings, each as `name` value."""
    return ", ".join(f"`{name}` {cell(value)}" for name, value in fields.items())


def machine(hardware: dict[str, Any]) -> str:
    """One line of a run's `hardware`: its accelerators, or its processor where there were none."""
    if accelerators := hardware["accelerators"]:
        line = ", ".join(f"{number} × {name}" for name, number in Counter(accelerators).items())
    else:
        line = f"{hardware['cores']} cores of {hardware['cpu']}, {hardware['memory_gib']:.0f} GiB of memory"
    return line if hardware["processes"] == 1 else f"{line}, {hardware['processes']} processes"


def signed(points: float) -> str:
    return f"{points:+.1f}".replace("-", "−")


def python_string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def cell(value: Any) -> str:
    """`value` in one cell of a Markdown table."""
    if isinstance(value, dict):
        value = [f"{name}: {item}" for name, item in value.items()]
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return " ".join(text.split()).replace("|", "\\|")


def plain(text: str) -> str:
    """`text` as it stands, whatever Markdown would make of its characters."""
    return re.sub(r"[\\`*<\[]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)


def inline_code(text: str) -> str:
    fence = "`" * (_longest_backticks(text) + 1)
    padding = " " if "`" in text else ""
    return f"{fence}{padding}{text}{padding}{fence}"


def fenced(text: str) -> str:
    """`text` as a Markdown code block, as it is but for control characters, and long lines, which the Hub would hide
    behind a scroll bar."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)
    fence = "`" * max(3, _longest_backticks(text) + 1)
    wrapper = textwrap.TextWrapper(SAMPLE_WIDTH, expand_tabs=False, replace_whitespace=False, break_on_hyphens=False)
    lines = [part for line in text.split("\n") for part in wrapper.wrap(line) or [""]]
    return "\n".join([fence + "text", *lines, fence])


def in_lines(command: str) -> str:
    """A shell command in lines that need no scroll bar, broken where an option begins."""
    try:
        words = shlex.split(command)
    except ValueError:  # an open quote, which no run of ours records
        return command
    lines = [""]
    for i, word in enumerate(words):
        option = shlex.join(words[i : i + 2])
        if word.startswith("--") and lines[-1] and len(lines[-1]) + len(option) + 3 > SAMPLE_WIDTH:
            lines.append("   ")
        lines[-1] += (" " if lines[-1] else "") + shlex.quote(word)
    return " \\\n".join(lines)


def _longest_backticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the README.md of a run folder from its run.json.")
    parser.add_argument("folder", type=Path, help="output folder of a training run")
    try:
        print(build_card(parser.parse_args().folder))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
