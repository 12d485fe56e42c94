"""The files of a Space that shows a run's model: an app, its settings, what it needs, and a header for the Hub.

The app is one of the `*_app.py` beside this file, copied as it is: it imports nothing of ours and finds what it shows
in `space.json`. Which one a folder gets follows from its config and its `run.json`.
"""

import importlib.metadata
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import SpaceCardData
from safetensors import safe_open

from ..build_card import OPTIONAL_SECTIONS, result_license
from ..readable_numbers import count

APPS = Path(__file__).parent
SETTINGS = "space.json"
# As in our pyproject.toml; gradio comes with the Space.
REQUIREMENTS = {
    "torch": "torch>=2.9",
    "transformers": "transformers>=5.20,<6",
    "peft": "peft>=0.18",
    "pillow": "pillow>=10.1",
    "timm": "timm>=1.0",
    "torchvision": "torchvision>=0.24",
}
# Of each app: what stands for it in the Hub's lists of Spaces.
EMOJI = {"language_app": "💬", "vision_app": "🖼️", "reward_app": "⚖️", "tokenizer_app": "🔤"}
HAVE_A_PAGE = (
    "Pages are made for language models, image classifiers, FCMAE pretraining models, reward models and tokenizers"
)
CHAT_EXAMPLES = ["Hello! How are you today?", "What is a river?"]
TEXT_EXAMPLES = ["The river", "In mathematics,", "Once upon a time"]
TOKENIZER_EXAMPLES = ["The river was 1,234 km long.", "Überraschung! 😀 naïve café", "def add(a, b):\n    return a + b"]
REWARD_EXAMPLE = [
    "What is a river?",
    "A natural stream of fresh water that flows towards a sea or a lake.",
    "The river of the river is the river.",
]
EXAMPLES = 5


def build_space(folder: Path, destination: Path, repo_id: str | None = None) -> Path:
    """Writes the Space of the model in `folder` into `destination`, whole or not at all; returns `destination`.

    Args:
        folder: a finished run folder, an adapter's folder, or a transformers folder.
        destination: a new or empty folder, or an earlier Space, which is replaced.
        repo_id: under which the model is published, "user/name"; without it, the app asks the environment variable
            MODEL which model to open.

    Raises ValueError, before anything is written, where there is no page for such a folder, and where `destination`
    holds other files.
    """
    folder, destination = Path(folder), Path(destination)
    run = _read_run(folder)
    settings = _describe(folder, run, repo_id)
    if destination.is_dir() and any(destination.iterdir()) and not (destination / SETTINGS).is_file():
        raise ValueError(f"{destination} holds files that are no Space of ours: choose another folder, or empty it.")
    if destination.is_file():
        raise ValueError(f"{destination} is a file: choose another folder.")
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}.") as beside:
        space = Path(beside) / "space"
        space.mkdir()
        app, requirements = settings.pop("app"), settings.pop("requirements")
        shutil.copyfile(APPS / f"{app}.py", space / "app.py")
        (space / "requirements.txt").write_text("".join(f"{REQUIREMENTS[name]}\n" for name in requirements))
        attribution = _write_examples(run, space / "examples") if app == "vision_app" else None
        text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        (space / SETTINGS).write_text(text, encoding="utf-8")
        (space / "README.md").write_text(_readme(app, settings, run, repo_id, attribution), encoding="utf-8")
        if destination.is_dir():
            destination.rename(Path(beside) / "before")
        space.rename(destination)
    return destination


def _read_run(folder: Path) -> dict[str, Any]:
    """The folder's `run.json` with every section that may be absent; without one, these alone."""
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}: give a finished run folder.")
    run = _read_json(folder / "run.json")
    if run.get("status", "finished") != "finished":
        raise ValueError(f"{folder} holds a run that is not finished: give its command again, then build the page.")
    return OPTIONAL_SECTIONS | {key: value for key, value in run.items() if value is not None}


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise ValueError(f"{file} is not readable as JSON ({error}): restore it.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object: restore it.")
    return content


def _describe(folder: Path, run: dict[str, Any], repo_id: str | None) -> dict[str, Any]:
    """What the page shows, by the names that the apps read in `space.json`, with its `app` and `requirements`."""
    adapter, config = _read_json(folder / "adapter_config.json"), _read_json(folder / "config.json")
    settings = {
        "model": repo_id,
        "title": repo_id.split("/")[-1] if repo_id else folder.resolve().name,
        "trust_remote_code": "auto_map" in config,
        "requirements": ["torch", "transformers"],
    }
    if adapter:
        settings |= _describe_adapter(folder, adapter, run, repo_id)
        architecture = {"CAUSAL_LM": "ForCausalLM", "SEQ_CLS": "ForSequenceClassification"}[adapter["task_type"]]
        labels = 1
    elif config:
        architecture = (config.get("architectures") or [""])[0]
        labels = len(config.get("id2label") or {}) or config.get("num_labels", 2)
        settings |= {"adapter": False, "own_generation_config": False}
    elif (folder / "tokenizer.json").is_file():
        what = _sentence("A tokenizer", run, "that cuts text into the pieces which a model reads", repo_id)
        requirements = ["transformers"]
        return settings | _page("tokenizer_app", what, requirements=requirements, examples=TOKENIZER_EXAMPLES)
    elif run.get("task") == "r1":
        raise ValueError(f"{folder} is the report of a road of several models: give the folder of one of them.")
    else:
        raise ValueError(
            f"{folder} holds no config.json, adapter_config.json or tokenizer.json: give a finished run folder."
        )

    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return settings | _describe_language_model(folder, run, repo_id)
    if architecture.endswith("ForSequenceClassification") and labels == 1:
        what = _sentence("A reward model", run, "that scores answers by how people may like them", repo_id)
        return settings | _page("reward_app", what, examples=[REWARD_EXAMPLE])
    vision = _describe_vision(folder, config, architecture, run, repo_id)
    if vision is None:
        what = f"a model of the class {architecture}" if architecture else "a model whose class its config does not say"
        raise ValueError(f"{folder} holds {what}, for which there is no page. {HAVE_A_PAGE}.")
    return settings | vision


def _page(app: str, description: str, **settings: Any) -> dict[str, Any]:
    return {"app": app, "description": description} | settings


def _sentence(what: str, run: dict[str, Any], ability: str, repo_id: str | None, warning: str = "") -> str:
    parameters = run.get("model", {}).get("parameters")
    size = f" of {count(parameters)} parameters" if parameters else ""
    card = f"[Its card](https://huggingface.co/{repo_id})" if repo_id else "Its card, `README.md` in its folder,"
    return f"{what}{size} {ability}. {card} says how it was made and what to expect of it.{warning}"


def _describe_adapter(
    folder: Path, adapter: dict[str, Any], run: dict[str, Any], repo_id: str | None
) -> dict[str, Any]:
    if adapter.get("task_type") not in ("CAUSAL_LM", "SEQ_CLS"):
        raise ValueError(
            f"{folder} holds an adapter of a model that is neither a language model nor a reward model: give the "
            "folder of the model with the adapter merged."
        )
    base = adapter.get("base_model_name_or_path") or ""
    trained_on = run["data"].get("model", {})
    local = trained_on.get("source") != "hub" if trained_on else Path(base).exists()
    if local and repo_id:
        raise ValueError(
            f"{folder} holds an adapter whose base is the folder {base}, which a Space cannot open: merge it "
            f"(python -m training.merge_adapter --adapter {folder} --output_dir DIR) and give the merged model."
        )
    if local and not Path(base).is_dir():
        raise ValueError(
            f"{folder} holds an adapter whose base {base} is not here: work in the folder in which it was trained."
        )
    config = _read_json(Path(base) / "config.json") if local else run.get("model", {}).get("config", {})
    return {
        "adapter": True,
        "own_generation_config": (folder / "generation_config.json").is_file(),
        "trust_remote_code": "auto_map" in config,
        "requirements": ["torch", "transformers", "peft"],
    }


def _describe_language_model(folder: Path, run: dict[str, Any], repo_id: str | None) -> dict[str, Any]:
    task, arguments = run.get("task"), run["arguments"]
    has_template = (folder / "chat_template.jinja").is_file() or "chat_template" in _read_json(
        folder / "tokenizer_config.json"
    )
    # Our tokenizers carry a chat template before a model has learnt to chat.
    chat = has_template and task != "pretrain_lm" and arguments.get("apply_chat_template") is not False
    template = arguments.get("prompt_template")
    if template == "{question}" and chat:
        template = None
    prompts = [sample["prompt"] for sample in run["samples"] if isinstance(sample.get("prompt"), str)]
    examples = list(dict.fromkeys(prompts))[:4] or (CHAT_EXAMPLES if chat else TEXT_EXAMPLES)
    if template:
        ability = "that works on one question at a time, like the examples, with its thoughts folded above its answer"
        placeholder = "Ask a question, or take one of the examples."
    elif chat:
        ability, placeholder = "to talk with", "Say something, or take one of the examples."
    else:
        ability, placeholder = "that continues a text", "The beginning of a text"
    what = _sentence("A language model", run, ability, repo_id, " What it writes may be wrong.")
    return _page(
        "language_app",
        what,
        chat=chat,
        prompt_template=template,
        examples=examples,
        placeholder=placeholder,
        max_new_tokens=run["training"].get("max_completion_length") or 128,
        # Problems have one right answer; talk has many.
        temperature=0.0 if template else 0.7,
    )


def _describe_vision(
    folder: Path, config: dict[str, Any], architecture: str, run: dict[str, Any], repo_id: str | None
) -> dict[str, Any] | None:
    names = set()
    if config.get("model_type") == "convnextv2_fcmae":  # whose folder may hold a decoder and a classifier
        for file in folder.glob("*.safetensors"):
            with safe_open(file, framework="pt") as weights:
                names |= set(weights.keys())
    reconstructs = any(name.startswith("decoder.") for name in names)
    classifies = architecture.endswith("ForImageClassification") or "classifier.weight" in names
    if not reconstructs and not classifies:
        return None
    abilities = ["paints in what is removed from an image"] if reconstructs else []
    if classifies:
        abilities.append(f"tells {len(config.get('id2label') or {}) or 'several'} kinds of image apart")
    what = "An image classifier" if classifies else "An image encoder"
    requirements = ["torch", "transformers", "torchvision", "pillow"]
    if config.get("model_type") == "timm_wrapper":
        requirements.append("timm")
    return _page(
        "vision_app",
        _sentence(what, run, f"that {' and '.join(abilities)}", repo_id),
        requirements=requirements,
        reconstructs=reconstructs,
        classifies=classifies,
    )


def _write_examples(run: dict[str, Any], folder: Path) -> str | None:
    """Some held-out images of a sample data set as PNG files, of one class each; returns to whom they are owed.

    Other data stay where they are: a page is public, and a user's own images may not be.
    """
    from training.dataset_source import sample_names  # Only here: what reads images is not installed everywhere.
    from training.image_data import decode_image, load_image_dataset

    data = run["data"].get("eval") or run["data"].get("train") or {}
    if data.get("dataset") not in sample_names("image"):
        return None
    rows = load_image_dataset(data["dataset"], data["split"])
    labels = rows["label"] if "label" in rows.column_names else list(range(len(rows)))
    # The middle one of a class: its first ones are often of one kind.
    chosen = {label: [i for i, other in enumerate(labels) if other == label] for label in dict.fromkeys(labels)}
    folder.mkdir()
    for number, places in enumerate(list(chosen.values())[:EXAMPLES], start=1):
        image = decode_image(rows[places[len(places) // 2]]["image"])
        image.save(folder / f"example_{number}.png", optimize=True)
    return data.get("info", {}).get("attribution")


def _readme(
    app: str, settings: dict[str, Any], run: dict[str, Any], repo_id: str | None, attribution: str | None
) -> str:
    try:
        gradio = importlib.metadata.version("gradio")
    except importlib.metadata.PackageNotFoundError:
        raise ValueError("A Space names the release of gradio that it was made for: pip install '.[space]'.") from None
    title = settings["title"]
    metadata = SpaceCardData(
        title=title,
        emoji=EMOJI[app],
        colorFrom="blue",
        colorTo="indigo",
        sdk="gradio",
        sdk_version=gradio,
        app_file="app.py",
        license=result_license(run),
        models=[repo_id] if repo_id else None,
        short_description=re.sub(r"\s+", " ", f"Try {title} in the browser")[:60],
    )
    text = f"---\n{metadata.to_yaml()}\n---\n\n# {title}\n\n{settings['description']}\n"
    return text + (f"\nThe examples: {attribution}\n" if attribution else "")
