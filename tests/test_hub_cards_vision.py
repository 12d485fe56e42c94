"""The cards of an encoder and of a classifier: what run.json says and nothing more, on the right terms, working."""

import copy
import json
import math
import re
import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from card_runs import card_text, pictures, python_snippets, run_as_stranger, write_run
from huggingface_hub import ModelCard
from matplotlib.colors import to_rgb
from PIL import Image
from transformers import ConvNextImageProcessor

from hf_models import ConvNextV2FcmaeConfig, ConvNextV2FcmaeForImageClassification, ConvNextV2FcmaeForPreTraining
from hub_cards.build_card import build_card
from hub_cards.confusion import CELLS, PICTURED_CLASSES, _letter_color, draw_confusion, most_confused

SAMPLE_INFO = Path(__file__).parents[1] / "training/sample_data/emoji/info.json"
LABELS = ["Smileys & Emotion", "People | Body", "<b>Flags</b>"]
COUNTS = [[30, 8, 2], [5, 30, 5], [0, 4, 16]]


def tiny_config(**changes) -> ConvNextV2FcmaeConfig:
    shape = {"depths": [1, 1], "hidden_sizes": [8, 16], "decoder_hidden_size": 16, "image_size": 32}
    return ConvNextV2FcmaeConfig(**shape | changes)


def history(**evaluated) -> list[dict]:
    entries = []
    for step in range(5, 65, 5):
        loss = 0.4 + 0.6 * math.exp(-step / 20)
        entries.append({"step": step, "loss": loss, "learning_rate": 1e-3 / step, "images_seen": 64 * step})
        if step % 20 == 0:
            entries.append({"step": step, "eval_loss": loss} | dict.fromkeys(evaluated, 0.5 + step / 500))
    return entries


def shared_sections() -> dict:
    info = json.loads(SAMPLE_INFO.read_text(encoding="utf-8"))
    sample_data = {"dataset": "emoji", "fingerprint": "0123456789abcdef", "info": info, "classes": 3}
    return {
        "status": "finished",
        "arguments": {"image_size": 32, "output_dir": "runs/model", "dataset": "emoji"},
        "data": {
            "train": sample_data | {"split": "train", "images": 1504},
            "eval": sample_data | {"split": "test", "images": 100},
        },
        "command": "python -m training.some_script --config quickstart.yaml",
        "git_revision": "0123abcd+changes",
        "libraries": {"torch": "2.14.1", "transformers": "5.23.0"},
        "hardware": {"cpu": "Some CPU", "cores": 2, "memory_gib": 23.5, "accelerators": [], "processes": 1},
        "wall_time_seconds": 151.3,
    }


def encoder_run() -> dict:
    """A finished run as training/pretrain_fcmae.py records it."""
    return shared_sections() | {
        "task": "pretrain_fcmae",
        "model": {"parameters": 1860912, "encoder_parameters": 1072944, "config": tiny_config().to_dict()},
        "training": {"seed": 42, "precision": "bf16", "image_size": [32, 32], "mask_ratio": 0.6, "images_per_step": 64},
        "metrics": {
            "eval_loss": 0.6301,
            "eval_knn_accuracy": 0.5412,
            "knn_accuracy_at_start": 0.4201,
            "images_seen": 40608,
            "images_per_second": 280.0,
        },
        "history": history(eval_knn_accuracy=True),
        "samples": [
            {"step": 0, "picture": "reconstructions/step_000000.png"},
            {"step": 60, "picture": "reconstructions/step_000060.png"},
        ],
        "skipped_images": {"count": 2, "names": ["a.png", "b.png"]},
    }


def classifier_run() -> dict:
    """A finished run as training/finetune_classifier.py records it, of an encoder that pretrain_fcmae.py made."""
    run = shared_sections()
    run["data"]["model"] = {"path": "runs/encoder", "fingerprint": "0123456789abcdef"}
    return run | {
        "task": "finetune_classifier",
        "model": {"parameters": 1075065, "trainable_parameters": 1075065, "config": tiny_config().to_dict()},
        "image": {"channels": 3, "size": [32, 32], "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]},
        "training": {"seed": 42, "precision": "bf16", "ema_decay": 0.99, "label_smoothing": 0.1},
        "metrics": {"eval_accuracy": 0.76, "eval_top5_accuracy": 0.97, "eval_loss": 1.1, "images_seen": 22080},
        "history": history(eval_accuracy=True, eval_top5_accuracy=True),
        "comparisons": [
            {
                "name": "from_scratch",
                "path": "runs/from_scratch",
                "model": "runs/encoder",
                "from_scratch": True,
                "metrics": {"eval_accuracy": 0.705, "eval_top5_accuracy": 0.95},
                "wall_time_seconds": 60.0,
            }
        ],
        "base_run": {
            "path": "runs/encoder",
            "task": "pretrain_fcmae",
            "data": "Noto emoji",
            "metrics": {"eval_knn_accuracy": 0.5412},
            "wall_time_seconds": 151.3,
            "images_seen": 40608,
            "picture": "card_assets/base_reconstruction.png",
        },
        "confusion": {"labels": LABELS, "counts": COUNTS},
        "per_class": [
            {"label": label, "images": sum(COUNTS[i]), "correct": COUNTS[i][i], "precision": 0.7, "recall": 0.8}
            for i, label in enumerate(LABELS)
        ],
    }


RUNS = {"encoder": encoder_run, "classifier": classifier_run}


def without_pictures(run: dict) -> dict:
    """They take most of a card's time."""
    return {name: section for name, section in run.items() if name not in ("history", "confusion")}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A run folder with the pictures that the scripts leave."""
    for name in ("reconstructions/step_000060.png", "card_assets/base_reconstruction.png"):
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True)
        Image.new("RGB", (64, 32), "red").save(path)
    return tmp_path / "run"


def test_metadata_is_what_the_run_recorded(folder):
    encoder = ModelCard.load(build_card(write_run(folder, without_pictures(encoder_run())))).data
    assert (encoder.library_name, encoder.pipeline_tag) == ("transformers", "image-feature-extraction")
    assert {"convnextv2_fcmae", "fcmae", "custom_code"} <= set(encoder.tags)
    assert (encoder.license, encoder.datasets) == ("apache-2.0", None)
    assert [result.metric_value for result in encoder.eval_results] == [0.5412]
    classifier = ModelCard.load(build_card(write_run(folder, without_pictures(classifier_run())))).data
    assert classifier.pipeline_tag == "image-classification"
    results = {result.metric_type: result for result in classifier.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == {"accuracy": 0.76, "top5_accuracy": 0.97}
    assert {(result.task_type, result.dataset_split) for result in results.values()} == {
        ("image-classification", "test")
    }


@pytest.mark.parametrize("kind", RUNS)
def test_the_card_is_whole_and_its_pictures_are_there_and_small(folder, kind):
    card = card_text(folder, RUNS[kind]())
    for heading in ("Use", "Results", "Model", "Data and licence", "Training", "Limits", "Reproduce", "Citation"):
        assert f"\n\n## {heading}\n\n" in card
    assert str(folder.parent) not in card
    assert "\n\n\n" not in card
    assert "None" not in card
    assert "2 min 31 s" in card
    assert "1,504" in card
    assert len(pictures(card)) == {"encoder": 4, "classifier": 5}[kind]
    for picture in pictures(card):
        Image.open(folder / picture).verify()
        assert (folder / picture).stat().st_size <= 100_000


@pytest.mark.parametrize(
    ("kind", "section"),
    [(kind, name) for kind, run in RUNS.items() for name in sorted(run().keys() - {"task", "model", "history"})],
)
def test_no_section_leans_on_another(folder, kind, section):
    run = RUNS[kind]()
    del run[section], run["history"]
    card = card_text(folder, run)
    assert "\n\n\n" not in card
    assert "None" not in card


@pytest.mark.parametrize("task", ["pretrain_fcmae", "finetune_classifier"])
def test_missing_sections_vanish(tmp_path, task):
    card = card_text(tmp_path / "run", {"task": task, "model": {"parameters": 1000}})
    assert not {"Results", "Training", "Reproduce"} & set(re.findall(r"^## (.*)", card, flags=re.MULTILINE))
    assert pictures(card) == []
    assert "%" not in card.replace(":.1%}", "").replace("most of", "")
    assert "model-index" not in card


def test_the_last_reconstruction_stays_with_the_card(folder):
    run = without_pictures(encoder_run())
    card = card_text(folder, run)
    assert "Held-out images at step 60:" in card
    assert "true mean\nand deviation" in card
    Image.open(folder / "card_assets/reconstruction.png").verify()
    shutil.rmtree(folder / "reconstructions")  # as on the Hub
    assert card_text(folder, run) == card
    run["model"]["config"]["norm_pix_loss"] = False
    assert "true mean" not in card_text(folder, run)


def terms(folder: Path, run: dict) -> tuple[str | None, str]:
    card = ModelCard.load(build_card(write_run(folder, without_pictures(run))))
    return card.data.license, card.text


def test_the_licence_of_the_weights_that_a_run_began_with_prevails(folder):
    run = classifier_run() | {"base_license": "CC-BY-NC-4.0"}
    license, text = terms(folder, run)
    assert license == "cc-by-nc-4.0"
    assert "under `cc-by-nc-4.0`, the licence of the weights that the run began with, `runs/encoder`" in text
    assert "prevails over that of those images, `apache-2.0`" in text


def test_a_run_claims_no_terms_that_it_does_not_know(folder):
    own = classifier_run()
    assert terms(folder, own)[0] == "apache-2.0"  # its encoder was made from the same images
    others = copy.deepcopy(own)
    others["base_run"]["data"] = "photographs of somebody"
    license, text = terms(folder, others)
    assert license is None
    assert "The weights are under" not in text
    assert "`runs/encoder`, has a licence of its own" in text
    others["base_license"] = "CC-BY-NC-4.0"
    del others["data"]["train"]["info"]
    assert "recorded no licence of those images" in terms(folder, others)[1]  # which may be stricter still
    foreign = copy.deepcopy(own)
    del foreign["base_run"]
    assert terms(folder, foreign)[0] is None
    new = copy.deepcopy(foreign)
    del new["data"]["model"]
    license, text = terms(folder, new)
    assert license == "apache-2.0"
    assert "trained from scratch" in text


def test_runs_are_compared_in_points_beside_the_standard_error(folder):
    card = card_text(folder, classifier_run())
    assert "| from_scratch | new weights | 70.5% | +5.5 points | 95.0% | 1 min |" in card
    # 100 images, of which 76 were right
    assert f"**{100 * math.sqrt(0.76 * 0.24 / 100):.1f} points**" in card
    worse = classifier_run()
    worse["comparisons"][0]["metrics"]["eval_accuracy"] = 0.8
    assert "| −4.0 points |" in card_text(folder, worse)


def test_the_card_says_which_weights_its_figures_are_of(folder):
    run = without_pictures(classifier_run())
    assert "exponential moving average" in card_text(folder, run)
    run["training"]["ema_decay"] = 0.0
    assert "moving average" not in card_text(folder, run)
    run["model"]["trainable_parameters"] = 1737
    assert "only the 1,737 of its head were trained" in card_text(folder, run)


def test_a_model_of_another_family_needs_no_trust_and_cites_no_convnext(folder):
    run = without_pictures(classifier_run())
    run["model"]["config"] = {"model_type": "timm_wrapper", "architecture": "test_vit"}
    card = card_text(folder, run)
    assert ": `test_vit` with" in card
    assert "custom_code" not in card
    assert "trust_remote_code" not in card
    assert "ConvNeXt" not in card
    assert "Apache-2.0" not in card.split("## Data and licence")[1].split("\n\nThe weights")[1]


def test_names_of_classes_are_shown_as_they_are(folder):
    """Sorted, a pipe does not end a cell, and a tag is no markup; in the picture a dollar begins no formula."""
    card = card_text(folder, classifier_run())
    rows = [line for line in card.splitlines() if line.endswith("| 80.0% | 70.0% |")]
    assert [row.split(" | 4")[0].split(" | 2")[0] for row in rows] == [
        "| \\<b>Flags\\</b>",
        "| People \\| Body",
        "| Smileys & Emotion",
    ]
    assert draw_confusion([r"$\no$", "$", "_a_"], COUNTS, folder) == "confusion.png"


def many_classes(classes: int, images: int = 40) -> dict:
    counts = np.random.default_rng(0).multinomial(images, np.full(classes, 1 / classes), size=classes)
    labels = [f"class number {i:04} with a name of its own" for i in range(classes)]
    rows = [
        {"label": label, "images": images, "correct": int(counts[i, i]), "precision": 0.5, "recall": i / classes}
        for i, label in enumerate(labels)
    ]
    return {"confusion": {"labels": labels, "counts": counts.tolist()}, "per_class": rows}


def test_of_many_classes_the_card_has_the_best_the_worst_and_the_pairs(folder):
    run = classifier_run() | many_classes(1000)
    del run["history"]
    run["per_class"][0]["recall"] = None  # it had no image
    card = card_text(folder, run)
    listed = re.findall(r"^\| class number (\d+) with a name of its own \| 40", card, flags=re.MULTILINE)
    assert listed == [f"{i:04}" for i in [*range(999, 989, -1), *range(1, 11)]]
    assert "confusion.png" not in card
    assert "| Is | Was called | Images | Of |" in card
    assert len(card) < 20_000


def test_most_confused_pairs_are_the_largest_counts_off_the_diagonal():
    pairs = most_confused(["a", "b", "c"], [[9, 3, 0], [7, 1, 0], [0, 5, 50]], number=2)
    assert [(pair["is"], pair["called"], pair["images"], pair["of"]) for pair in pairs] == [
        ("b", "a", 7, 8),
        ("c", "b", 5, 55),
    ]
    assert most_confused(["a", "b"], [[3, 0], [0, 4]]) == []


@pytest.mark.parametrize("classes", [2, PICTURED_CLASSES])
def test_the_confusion_picture_stays_small_whatever_the_classes(tmp_path, classes):
    confusion = many_classes(classes, images=1000)["confusion"]
    confusion["counts"][0] = [0] * classes  # a class without images
    file = draw_confusion(**confusion, folder=tmp_path)
    picture = Image.open(tmp_path / file)
    assert picture.width == picture.height <= 1200
    assert (tmp_path / file).stat().st_size <= 120_000
    assert draw_confusion(**many_classes(PICTURED_CLASSES + 1)["confusion"], folder=tmp_path) is None


def test_counts_can_be_read_on_every_shade():
    """WCAG 2.1 asks for a contrast of 4.5; computed by its own formula."""

    def luminance(color):
        return np.dot(
            [0.2126, 0.7152, 0.0722], [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in color]
        )

    assert matplotlib.colormaps["Blues"](1.0) == CELLS(1.0)
    for share in np.linspace(0, 1, 101):
        levels = sorted(luminance(color) for color in (CELLS(share)[:3], to_rgb(_letter_color(CELLS(share)))))
        assert (levels[1] + 0.05) / (levels[0] + 0.05) >= 4.5


def save_model(folder: Path, model: torch.nn.Module) -> None:
    channels = model.config.num_channels
    processor = ConvNextImageProcessor(
        size={"shortest_edge": 32}, crop_pct=1.0, image_mean=[0.5] * channels, image_std=[0.2] * channels
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def test_snippets_run_where_our_packages_are_not(tmp_path):
    """Those of an encoder and a classifier, in colour and in grey, beside the folders."""
    cards = ""
    for channels in (3, 1):
        config = tiny_config(num_channels=channels, id2label=dict(enumerate(LABELS)))
        for kind, model_class in (
            ("encoder", ConvNextV2FcmaeForPreTraining),
            ("classifier", ConvNextV2FcmaeForImageClassification),
        ):
            name = f"{kind}_{channels}"
            save_model(tmp_path / name, model_class(config))
            run = without_pictures(RUNS[kind]()) | {"samples": [], "image": {}}
            run["model"]["config"] = config.to_dict()
            cards += card_text(tmp_path / name, run)
    snippets = python_snippets(cards)
    assert snippets.count("from transformers import") == 7  # the pipeline takes colour only
    printed = run_as_stranger(cards, tmp_path)
    assert len([line for line in printed.splitlines() if line.split(" 3")[0].split(" 4")[0] in LABELS]) == 2
    assert Image.open(tmp_path / "reconstruction.png").size == (3 * 34 + 2, 36)  # torchvision's grid of three images
