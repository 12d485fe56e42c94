"""The model card of a run folder, from its `run.json` and nothing else.

    python -m hub_cards.build_card runs/quickstart/language_model

Each task of `training/` has a template, `templates/{task}.md.jinja`. A figure that no run recorded does not appear: a
section whose data are missing is left out, and a card that cannot do without them is refused.
"""

import argparse
import json
import re
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .plots import draw_curves
from .readable_numbers import count, duration, quantity

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
}
HUB_METADATA = {
    "pretrain_lm": {"pipeline_tag": "text-generation", "tags": ["pretrained", "custom_code"]},
    "train_tokenizer": {"tags": ["tokenizer"]},
}
# Arguments about where a run's files are and what it says meanwhile, and what the card shows elsewhere.
NOT_HYPERPARAMETERS = {
    "dataset",
    "dataset_config",
    "dataset_split",
    "disable_tqdm",
    "eval_dataset",
    "eval_dataset_split",
    "eval_steps",
    "eval_strategy",
    "dataloader_num_workers",
    "logging_steps",
    "matmul_peak_gflops",
    "model",
    "output_dir",
    "processes",
    "report_to",
    "run_name",
    "sample_prompts",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "seed",
    "streaming",
    "text_column",
    "tokenizer",
}
EVAL_METRICS = {"eval_loss": "loss", "eval_perplexity": "perplexity", "eval_bits_per_byte": "bits_per_byte"}


def build_card(folder: str | Path) -> Path:
    """Writes `folder/README.md` and its pictures in `folder/card_assets/`; returns the card's path.

    Raises ValueError where `run.json` is missing or no JSON, where its task has no template, and where it lacks what
    the template cannot do without.
    """
    folder = Path(folder)
    run = _read_run(folder)
    template = _template(run["task"])
    # A card is read in many places: where the run has no home on the Hub, the code opens the folder beside the reader.
    name = run["hub_id"].split("/")[-1] if "hub_id" in run else folder.resolve().name
    repo = run.get("hub_id", f"./{name}")
    plots = draw_curves(run["history"], run["metrics"], folder / ASSETS)
    try:
        text = template.render(
            run,
            name=name,
            repo=repo,
            plots={plot: f"{ASSETS}/{file}" for plot, file in plots.items()},
            train_data=run["data"].get("train", {}),
            eval_data=run["data"].get("eval", {}),
            hyperparameters={
                field: value
                for field, value in (run["arguments"] | run["training"]).items()
                if field not in NOT_HYPERPARAMETERS
            },
        )
        metadata = _metadata(run, name)
    except (jinja2.UndefinedError, KeyError) as error:
        raise ValueError(f"{folder / 'run.json'} lacks what a card of {run['task']} needs: {error}.") from error
    card = ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{text}")
    path = folder / "README.md"
    card.save(path)
    return path


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
        "duration": duration,
        "fenced": fenced,
        "inline_code": inline_code,
        "machine": machine,
        "python_string": python_string,
        "quantity": quantity,
    }
    return environment.get_template(f"{task}.md.jinja")


def data_name(data: dict[str, Any]) -> str:
    return data["info"]["name"] if "info" in data else inline_code(data["dataset"])


def machine(hardware: dict[str, Any]) -> str:
    """One line of a run's `hardware`: its accelerators, or its processor where there were none."""
    if accelerators := hardware["accelerators"]:
        line = ", ".join(f"{number} × {name}" for name, number in Counter(accelerators).items())
    else:
        line = f"{hardware['cores']} cores of {hardware['cpu']}, {hardware['memory_gib']:.0f} GiB of memory"
    return line if hardware["processes"] == 1 else f"{line}, {hardware['processes']} processes"


def python_string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def cell(value: Any) -> str:
    """`value` in one cell of a Markdown table."""
    return " ".join(str(value).split()).replace("|", "\\|")


def inline_code(text: str) -> str:
    fence = "`" * (_longest_backticks(text) + 1)
    padding = " " if "`" in text else ""
    return f"{fence}{padding}{text}{padding}{fence}"


def fenced(text: str) -> str:
    """`text` as a Markdown code block, as it is but for long lines, which the Hub would hide behind a scroll bar."""
    fence = "`" * max(3, _longest_backticks(text) + 1)
    wrapper = textwrap.TextWrapper(SAMPLE_WIDTH, expand_tabs=False, replace_whitespace=False, break_on_hyphens=False)
    lines = [part for line in text.split("\n") for part in wrapper.wrap(line) or [""]]
    return "\n".join([fence + "text", *lines, fence])


def _longest_backticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _metadata(run: dict[str, Any], name: str) -> ModelCardData:
    """The card's YAML header, which the Hub searches and shows beside the card."""
    hub = HUB_METADATA[run["task"]]
    info = run["data"].get("train", {}).get("info", {})
    # A sample's name or a local file's path would be taken for a data set on the Hub.
    datasets = [data["dataset"] for data in run["data"].values() if data.get("source") == "hub"]
    model_type = run.get("model", {}).get("config", {}).get("model_type")
    results = _eval_results(run)
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=hub.get("pipeline_tag"),
        # Weights and vocabularies are passed on under the licence of the text that they were made from, unless another
        # model, whose terms no run knows, was their beginning.
        license=None if run["arguments"].get("model") else info.get("license"),
        language=info.get("language"),
        datasets=sorted(set(datasets)) or None,
        tags=[model_type, *hub["tags"]] if model_type else hub["tags"],
        model_name=name if results else None,
        eval_results=results or None,
    )


def _eval_results(run: dict[str, Any]) -> list[EvalResult]:
    data = run["data"].get("eval")
    if data is None:
        return []
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=data["dataset"],
            dataset_name=data.get("info", {}).get("name", data["dataset"]),
            dataset_split=data.get("split"),
            metric_type=metric_type,
            metric_value=run["metrics"][key],
        )
        for key, metric_type in EVAL_METRICS.items()
        if run["metrics"].get(key) is not None
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the README.md of a run folder from its run.json.")
    parser.add_argument("folder", type=Path, help="output folder of a training run")
    try:
        print(build_card(parser.parse_args().folder))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
