"""Fine-tuning as a user runs it: killed and resumed, on two processes, from many models, with bad input."""

import json
import random
import shutil
import subprocess
import sys
from io import BytesIO

import numpy as np
import pytest
import timm
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Pillow
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader
from training_runs import REPOSITORY, command, kill_when_there, losses, run, two_processes
from transformers import (
    AutoModelForImageClassification,
    ConvNextImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from hf_models import ConvNextV2FcmaeConfig, ConvNextV2FcmaeForImageClassification, ConvNextV2FcmaeForPreTraining
from hf_models.convnextv2_fcmae.checkpoints import save_checkpoint
from training import finetune_classifier
from training.classification_report import confusion_counts, per_class_table
from training.classifier_inputs import AugmentationArguments, ClassifierCollator, HeldOutImages, TrainingItem
from training.classifier_models import ImageFormat
from training.command_line import parse_arguments
from training.finetune_classifier import FinetuneArguments, OptimizationArguments, check_arguments
from training.image_data import ImageDataset, decode_image, load_image_dataset
from training.image_draws import DrawnImages
from training.weight_averaging import FILE_NAME as AVERAGE

MODULE = "training.finetune_classifier"
TINY = {"depths": [1, 1], "hidden_sizes": [8, 16]}
OPTIONS = {
    "model": "atto",
    "config_overrides": json.dumps(TINY),
    "image_size": 32,
    "precision": "fp32",
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 16,
    "max_steps": 24,  # a pass over the images is 15
    "learning_rate": 0.003,
    "logging_steps": 4,
    "eval_strategy": "steps",
    "eval_steps": 12,
    "save_strategy": "steps",
    "save_steps": 6,
    "disable_tqdm": True,
    "use_cpu": True,
}
EVERYTHING = {
    "mixup": 0.8,
    "cutmix": 1.0,
    "drop_path_rate": 0.2,
    "label_smoothing_factor": 0.1,
    "layer_decay": 0.9,
    "ema_decay": 0.9,
    "warmup_steps": 4,
}
UNMIXED = {"ema_decay": 0.9, "max_steps": 12, "eval_steps": 6, "save_strategy": "no"}
SHORT = {"max_steps": 2, "eval_steps": 2, "save_strategy": "no"}
OTHER_MODEL = {"config_overrides": None}
FORMAT = ImageFormat(3, (32, 32), [0.5] * 3, [0.5] * 3)
PLAIN = {"crop_scale": [1.0, 1.0], "horizontal_flip": 0.0, "auto_augment": "", "random_erasing": 0.0}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Emoji of all nine classes: 120 to train on, and 45, which no batch divides, to judge by."""
    folder = tmp_path_factory.mktemp("images")
    for split, kept in (("train", 120), ("test", 45)):
        rows = load_image_dataset("emoji", split)
        rows.select(range(0, len(rows), len(rows) // kept)).select(range(kept)).to_parquet(folder / f"{split}.parquet")
    return folder


def options(images, output_dir, **changes):
    return {"dataset": images, "output_dir": output_dir} | OPTIONS | changes


def run_here(monkeypatch, images, output_dir, **changes):
    """As `python -m` does, but in this process, which has everything imported already."""
    words = command(MODULE, options(images, output_dir, **changes))[3:]
    monkeypatch.setattr("sys.argv", ["finetune_classifier", *words])
    finetune_classifier.main()
    return json.loads((output_dir / "run.json").read_text())


def refused(monkeypatch, capsys, images, output_dir, **changes):
    with pytest.raises(SystemExit) as stopped:
        run_here(monkeypatch, images, output_dir, **changes)
    assert stopped.value.code == 2
    assert not output_dir.exists()
    return capsys.readouterr().err.strip().splitlines()[-1]


def equal_weights(first, second, names=None):
    first, second = load_file(first), load_file(second)
    return all(torch.equal(first[name], second[name]) for name in names or second)


def untrained(weights, before, names=None):
    """Whether steps of a learning rate of next to nothing can have led from `before` to `weights`."""
    return all((weights[name] - before[name]).abs().max() < 1e-20 for name in names or before)


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    ended = run(command(MODULE, options(images, folder, **EVERYTHING)))
    assert ended.returncode == 0, ended.stderr
    return folder


# ---- a run and what it leaves ----


def test_the_run_learns_and_records_what_it_did(finished):
    record = json.loads((finished / "run.json").read_text())
    metrics = record["metrics"]
    train = [value for _, name, value in losses(finished) if name == "loss"]
    assert train[-1] < train[0]
    assert record["status"] == "finished"
    # Also what was not asked for, because it is the default.
    assert record["training"]["random_erasing"] == 0.25
    assert "| `auto_augment` | rand-m9-mstd0.5-inc1 |" in (finished / "README.md").read_text()
    assert metrics["images_seen"] == 24 * 8
    assert 0 <= metrics["eval_accuracy"] <= metrics["eval_top5_accuracy"] <= 1
    labels, counts = record["confusion"]["labels"], np.array(record["confusion"]["counts"])
    assert labels == list(load_image_dataset("emoji", "test").features["label"].names)
    assert counts.sum() == 45
    assert counts.trace() / 45 == pytest.approx(metrics["eval_accuracy"])
    assert [row["images"] for row in record["per_class"]] == counts.sum(1).tolist()
    assert sum(row["correct"] for row in record["per_class"]) == counts.trace()


STRANGER = """
import json, sys
sys.modules["hf_models"] = None
from pathlib import Path
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
folder, pictures = sys.argv[1], sorted(Path(sys.argv[2]).glob("*.png"))
classify = pipeline("image-classification", folder, trust_remote_code=True)
answers = [answer[0]["label"] for answer in classify([str(picture) for picture in pictures])]
labels = [picture.stem.split("_", 1)[1] for picture in pictures]
processor = AutoImageProcessor.from_pretrained(folder)
model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
from PIL import Image
with torch.no_grad():
    logits = model(**processor([Image.open(picture) for picture in pictures], return_tensors="pt")).logits
numbers = torch.tensor([model.config.label2id[label] for label in labels])
print(json.dumps({
    "accuracy": sum(answer == label for answer, label in zip(answers, labels)) / len(labels),
    "loss": torch.nn.functional.cross_entropy(logits, numbers).item(),
}))
"""


@pytest.fixture(scope="module")
def pictures(images, tmp_path_factory):
    """The held-out images as files that say their class."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = load_image_dataset(str(images), "test", class_names=None)
    names = rows.features["label"].names
    for number, row in enumerate(rows):
        decode_image(row["image"]).save(folder / f"{number:03}_{names[row['label']]}.png")
    return folder


def as_a_stranger(folder, pictures, elsewhere):
    """What the pipeline makes of the published folder in a fresh process without our package."""
    words = [sys.executable, "-c", STRANGER, str(folder), str(pictures)]
    ended = subprocess.run(words, cwd=elsewhere, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.strip().splitlines()[-1])


def test_the_published_folder_has_in_the_pipeline_the_accuracy_that_was_measured(finished, pictures, tmp_path):
    metrics = json.loads((finished / "run.json").read_text())["metrics"]
    theirs = as_a_stranger(finished, pictures, tmp_path)
    assert theirs["accuracy"] == pytest.approx(metrics["eval_accuracy"])
    assert theirs["loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)


def test_what_is_published_is_the_average(finished):
    last = finished / "checkpoint-24"
    assert equal_weights(finished / "model.safetensors", last / AVERAGE)
    assert not equal_weights(finished / "model.safetensors", last / "model.safetensors")
    assert not list(finished.glob("*.bin"))


def test_the_average_is_the_recursion_of_the_weights(finished, monkeypatch, images, tmp_path):
    """From the saved weights of every step: a_1 = w_1, a_t = d_t a + (1 - d_t) w_t with timm's warm-up of d_t."""
    changes = {"max_steps": 5, "save_steps": 1, "save_total_limit": 10, "eval_strategy": "no", "ema_decay": 0.5}
    run_here(monkeypatch, images, tmp_path / "run", **changes)
    average = None
    for step in range(1, 6):
        weights = load_file(tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors")
        decay = min(0.5, 1 - step ** (-2 / 3)) if step > 1 else 0.0
        average = {name: decay * (average or weights)[name] + (1 - decay) * weights[name] for name in weights}
        stored = load_file(tmp_path / "run" / f"checkpoint-{step}" / AVERAGE)
        torch.testing.assert_close(stored, average)


# ---- the same run, otherwise ----


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_it_gives_the_same_to_the_bit(images, finished, tmp_path):
    folder = tmp_path / "killed"
    words = command(MODULE, options(images, folder, **EVERYTHING))
    kill_when_there(words, folder / "checkpoint-18", delay=0.02)
    assert not (folder / "model.safetensors").exists()
    ended = run(words)
    assert ended.returncode == 0, ended.stderr
    assert losses(folder) == losses(finished)
    assert equal_weights(folder / "model.safetensors", finished / "model.safetensors")
    first, second = (json.loads((path / "run.json").read_text()) for path in (folder, finished))
    assert first["confusion"] == second["confusion"]
    assert len(first["sessions"]) == 2


def test_resumed_after_its_last_step_it_still_knows_its_classes(images, finished, monkeypatch, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(finished, folder)
    record = json.loads((folder / "run.json").read_text())
    left = {name: value for name, value in record.items() if name not in ("confusion", "per_class")}
    (folder / "run.json").write_text(json.dumps(left | {"status": "running"}))
    (folder / "model.safetensors").unlink()
    again = run_here(monkeypatch, images, folder, **EVERYTHING)
    assert losses(folder) == losses(finished)
    assert again["confusion"] == record["confusion"]
    assert equal_weights(folder / "model.safetensors", finished / "model.safetensors")


@pytest.fixture(scope="module")
def unmixed(images, tmp_path_factory):
    """A run whose batches do not depend on how they are split: mixing and dropped paths do."""
    folder = tmp_path_factory.mktemp("runs") / "unmixed"
    with pytest.MonkeyPatch.context() as patch:
        run_here(patch, images, folder, **UNMIXED)
    return folder


def same_losses(folder, reference):
    assert [entry[:2] for entry in losses(folder)] == [entry[:2] for entry in losses(reference)]
    for (_, name, ours), (_, _, theirs) in zip(losses(folder), losses(reference), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-2 if name == "grad_norm" else 1e-4)


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one_and_count_every_image_once(images, unmixed, tmp_path):
    words = options(images, tmp_path / "two", **UNMIXED, per_device_train_batch_size=4)
    ended = run(command(MODULE, words, two_processes()))
    assert ended.returncode == 0, ended.stderr
    same_losses(tmp_path / "two", unmixed)
    two, one = (json.loads((folder / "run.json").read_text()) for folder in (tmp_path / "two", unmixed))
    assert two["confusion"] == one["confusion"]
    assert np.sum(two["confusion"]["counts"]) == 45
    assert two["metrics"]["eval_accuracy"] == pytest.approx(one["metrics"]["eval_accuracy"])


def test_accumulation_gives_the_losses_of_the_whole_batch(images, unmixed, monkeypatch, tmp_path):
    changes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    run_here(monkeypatch, images, tmp_path / "run", **UNMIXED, **changes)
    same_losses(tmp_path / "run", unmixed)


# ---- augmentation ----


def drawn(images, **changes):
    item = TrainingItem(AugmentationArguments(**changes), FORMAT)
    return DrawnImages(ImageDataset(load_image_dataset(str(images), "train")), item, seed=1)


def test_an_item_depends_on_seed_epoch_and_image_alone(images):
    dataset = drawn(images)
    first = [dataset[number]["pixel_values"] for number in (5, 6, 5 + len(dataset))]
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    again = [drawn(images)[number]["pixel_values"] for number in (5 + len(dataset), 6, 5)][::-1]
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], first[2])  # the same image in another epoch
    assert states[:2] == (random.getstate(), np.random.get_state()[1].tolist())
    assert torch.equal(states[2], torch.get_rng_state())


def test_without_augmentation_an_item_is_what_the_processor_makes(images):
    dataset = drawn(images, **PLAIN)
    held_out = HeldOutImages(
        load_image_dataset(str(images), "train"),
        ViTImageProcessor(size={"height": 32, "width": 32}, resample=3, image_mean=[0.5] * 3, image_std=[0.5] * 3),
        FORMAT,
    )
    # Pillow and torchvision resize alike but for rounding to whole grey values.
    torch.testing.assert_close(dataset[7]["pixel_values"], held_out[7]["pixel_values"], rtol=0, atol=2.1 * 2 / 255)


@pytest.mark.parametrize("changes", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_mixed_labels_say_how_much_of_each_image_is_there(images, changes):
    """Two images in one grey value each: the mixed pixels' mean tells the shares that the labels must have."""
    collate = ClassifierCollator(AugmentationArguments(**changes), 2, label_smoothing=0.0)

    def batch(draw):
        values = (0.0, 1.0)
        return collate(
            [
                {"pixel_values": torch.full((3, 64, 64), value), "labels": torch.tensor(int(value)), "draw": draw}
                for value in values
            ]
        )

    shares = set()
    for number in range(20):
        mixed, again = batch(torch.tensor(number)), batch(torch.tensor(number))
        assert torch.equal(mixed["pixel_values"], again["pixel_values"])
        torch.testing.assert_close(mixed["labels"][:, 1], mixed["pixel_values"].mean((1, 2, 3)))
        torch.testing.assert_close(mixed["labels"].sum(1), torch.ones(2))
        shares.add(round(mixed["labels"][0, 1].item(), 3))
    assert len(shares) > 10


def test_smoothed_labels_give_torch_s_smoothed_loss(images):
    collate = ClassifierCollator(AugmentationArguments(), 9, label_smoothing=0.1)
    batch = next(iter(DataLoader(drawn(images), batch_size=6, collate_fn=collate)))
    logits = torch.randn(6, 9)
    labels = batch["labels"].argmax(1)
    expected = nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(nn.functional.cross_entropy(logits, batch["labels"]), expected)


def test_workers_of_a_data_loader_change_nothing(images):
    dataset = drawn(images)
    collate = ClassifierCollator(AugmentationArguments(mixup=0.8), 9, 0.1)
    alone, helped = (next(iter(DataLoader(dataset, 4, collate_fn=collate, num_workers=n))) for n in (0, 1))
    assert all(torch.equal(alone[name], helped[name]) for name in alone)


# ---- models ----


def names_of(images):
    return load_image_dataset(str(images), "train").features["label"].names


def test_an_fcmae_run_is_fine_tuned_and_shown(images, monkeypatch, tmp_path):
    base = tmp_path / "base"
    pretrained = ConvNextV2FcmaeForPreTraining(ConvNextV2FcmaeConfig(**TINY, image_size=32, decoder_hidden_size=8))
    pretrained.save_pretrained(base)
    (base / "reconstructions").mkdir()
    for step in (100, 400):
        (base / "reconstructions" / f"step_{step:06}.png").write_bytes(f"picture {step}".encode())
    about = {
        "task": "pretrain_fcmae",
        "status": "finished",
        "data": {"train": {"dataset": "emoji", "info": {"name": "Noto emoji"}}},
        "metrics": {"images_seen": 4000, "eval_loss": 0.4},
        "samples": [{"step": s, "picture": f"reconstructions/step_{s:06}.png"} for s in (100, 400)],
        "wall_time_seconds": 12.5,
    }
    (base / "run.json").write_text(json.dumps(about))
    changes = SHORT | OTHER_MODEL | {"model": base, "image_size": None, "head_init_scale": 0.001}
    record = run_here(monkeypatch, images, tmp_path / "tuned", **changes, learning_rate=1e-30)
    assert record["base_run"]["data"] == "Noto emoji"
    assert record["base_run"]["images_seen"] == 4000
    assert (tmp_path / "tuned" / record["base_run"]["picture"]).read_bytes() == b"picture 400"
    new = ["classifier.bias", "classifier.weight", "convnextv2.layernorm.bias", "convnextv2.layernorm.weight"]
    assert sorted(record["model"]["new_parameters"]) == new
    assert record["image"]["size"] == [32, 32]
    # A learning rate of next to nothing: the encoder is the pretrained one, the head small.
    tuned = load_file(tmp_path / "tuned" / "model.safetensors")
    before = {name: tensor for name, tensor in pretrained.state_dict().items() if not name.startswith("decoder.")}
    assert untrained(tuned, before)
    assert tuned["classifier.weight"].std() == pytest.approx(0.02 * 0.001, rel=0.3)

    scratch = run_here(monkeypatch, images, tmp_path / "scratch", **changes, from_scratch=True)
    assert "base_run" not in scratch
    assert scratch["model"]["config"]["hidden_sizes"] == TINY["hidden_sizes"]
    weight = "convnextv2.encoder.stages.0.layers.0.pwconv1.weight"
    assert not torch.allclose(load_file(tmp_path / "scratch" / "model.safetensors")[weight], tuned[weight], atol=1e-3)


@pytest.mark.parametrize("layout", ["official", "transformers", "timm"])
def test_foreign_convnext_weights_carry_their_licence(images, monkeypatch, tmp_path, layout):
    depths = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 8, 8]}
    source = ConvNextV2FcmaeForImageClassification(ConvNextV2FcmaeConfig(**depths, num_labels=9, image_size=32))
    path = tmp_path / ("weights.pt" if layout == "official" else "folder")
    save_checkpoint(source, path, layout)
    changes = SHORT | OTHER_MODEL | {"model": path, "learning_rate": 1e-30}
    record = run_here(monkeypatch, images, tmp_path / "tuned", **changes)
    assert record["base_license"] == "CC-BY-NC-4.0"
    assert sorted(record["model"]["new_parameters"]) == ["classifier.bias", "classifier.weight"]
    before = {name: tensor for name, tensor in source.state_dict().items() if not name.startswith("classifier.")}
    assert untrained(load_file(tmp_path / "tuned" / "model.safetensors"), before)


def test_a_head_of_the_same_classes_is_kept(images, finished, monkeypatch, tmp_path):
    changes = SHORT | OTHER_MODEL | {"model": finished, "learning_rate": 1e-30, "image_size": None}
    record = run_here(monkeypatch, images, tmp_path / "tuned", **changes)
    assert record["model"]["new_parameters"] == []
    assert untrained(load_file(tmp_path / "tuned" / "model.safetensors"), load_file(finished / "model.safetensors"))
    before = json.loads((finished / "run.json").read_text())["metrics"]
    assert record["metrics"]["eval_accuracy"] == before["eval_accuracy"]


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    """A model with batch statistics, whose processor crops the middle."""
    folder = tmp_path_factory.mktemp("resnet")
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=9)
    ResNetForImageClassification(config).save_pretrained(folder)
    ConvNextImageProcessor(size={"shortest_edge": 64}).save_pretrained(folder)
    return folder


def test_a_linear_probe_changes_the_head_and_nothing_else(images, resnet, monkeypatch, tmp_path):
    changes = SHORT | OTHER_MODEL | {"model": resnet, "freeze_backbone": True}
    record = run_here(monkeypatch, images, tmp_path / "run", **changes)
    before, after = load_file(resnet / "model.safetensors"), load_file(tmp_path / "run" / "model.safetensors")
    head = {name for name in before if name.startswith("classifier.")}
    assert equal_weights(resnet / "model.safetensors", tmp_path / "run" / "model.safetensors", before.keys() - head)
    assert all(not torch.equal(before[name], after[name]) for name in head)
    assert record["model"]["trainable_parameters"] == sum(before[name].numel() for name in head)
    # Nine unnamed classes are not the data's nine: the head was new.
    assert set(record["model"]["new_parameters"]) == head


def test_another_transformers_model_is_published_with_its_own_processor(images, pictures, monkeypatch, tmp_path):
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTForImageClassification(ViTConfig(**shape, image_size=32, patch_size=8)).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    changes = SHORT | OTHER_MODEL | {"model": tmp_path / "vit", "image_size": None}
    record = run_here(monkeypatch, images, tmp_path / "run", **changes)
    assert sorted(record["model"]["new_parameters"]) == ["classifier.bias", "classifier.weight"]
    assert json.loads((tmp_path / "run" / "preprocessor_config.json").read_text())["size"] == {
        "height": 32,
        "width": 32,
    }
    theirs = as_a_stranger(tmp_path / "run", pictures, tmp_path)
    assert theirs["accuracy"] == pytest.approx(record["metrics"]["eval_accuracy"])
    assert theirs["loss"] == pytest.approx(record["metrics"]["eval_loss"], rel=1e-5)


def test_a_timm_model_begins_as_timm_begins_it_and_is_published(images, pictures, monkeypatch, tmp_path):
    changes = SHORT | OTHER_MODEL | {"model": "timm/test_resnet", "from_scratch": True, "ema_decay": 0.9}
    record = run_here(monkeypatch, images, tmp_path / "run", **changes, learning_rate=1e-30)
    ours = load_file(tmp_path / "run" / "model.safetensors")
    theirs = timm.create_model("test_resnet", num_classes=9).state_dict()
    for name, tensor in theirs.items():
        if tensor.ndim == 4:
            assert ours[f"timm_model.{name}"].std() == pytest.approx(tensor.std(), rel=0.25), name
    answers = as_a_stranger(tmp_path / "run", pictures, tmp_path)
    assert answers["accuracy"] == pytest.approx(record["metrics"]["eval_accuracy"])
    assert answers["loss"] == pytest.approx(record["metrics"]["eval_loss"], rel=1e-5)
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "run")
    assert list(again.config.id2label.values()) == names_of(images)


def test_grey_images_train_a_model_of_one_channel(images, monkeypatch, tmp_path):
    overrides = json.dumps(TINY | {"num_channels": 1})
    record = run_here(monkeypatch, images, tmp_path / "run", **SHORT, config_overrides=overrides)
    assert record["image"]["channels"] == 1


# ---- data and comparisons ----


def write_images(folder, split, labels, names, broken=None):
    """One picture of noise a label, as a parquet file; the one numbered `broken` is cut short."""
    buffer = BytesIO()
    Pillow.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(buffer, "PNG")
    pictures = [buffer.getvalue()[: 20 if number == broken else None] for number in range(len(labels))]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    rows = {"image": [{"bytes": picture, "path": None} for picture in pictures], "label": labels}
    Dataset.from_dict(rows, features).to_parquet(folder / f"{split}.parquet")


def test_an_unreadable_held_out_image_does_not_count(monkeypatch, tmp_path):
    write_images(tmp_path, "train", [0, 1] * 4, ["a", "b"])
    write_images(tmp_path, "test", [0, 1] * 60, ["a", "b"], broken=7)
    record = run_here(monkeypatch, tmp_path, tmp_path / "run", **SHORT)
    assert [row["images"] for row in record["per_class"]] == [60, 59]
    assert record["skipped_images"] == {"count": 1, "names": ["row 7"]}
    assert "eval_top5_accuracy" not in record["metrics"]


def test_too_many_unreadable_held_out_images_stop_the_run(monkeypatch, capsys, tmp_path):
    write_images(tmp_path, "train", [0, 1] * 4, ["a", "b"])
    write_images(tmp_path, "test", [0, 1] * 10, ["a", "b"], broken=7)
    with pytest.raises(SystemExit):
        run_here(monkeypatch, tmp_path, tmp_path / "run", **SHORT)
    assert "1 of 20 held-out images cannot be read (row 7), more than one in a hundred" in capsys.readouterr().err


def test_runs_on_the_same_held_out_images_are_compared(images, finished, monkeypatch, capsys, tmp_path):
    record = run_here(monkeypatch, images, tmp_path / "run", **SHORT, compare_with=finished)
    [other] = record["comparisons"]
    assert other["name"] == "undisturbed"
    assert other["metrics"] == json.loads((finished / "run.json").read_text())["metrics"]
    error = refused(
        monkeypatch, capsys, images, tmp_path / "other", **SHORT, eval_dataset_split="train", compare_with=finished
    )
    assert "was evaluated on other images" in error
    error = refused(monkeypatch, capsys, images, tmp_path / "none", **SHORT, compare_with=images)
    assert "holds no finished run" in error


def test_the_rate_follows_the_batch_unless_it_is_given(images, monkeypatch, tmp_path):
    changes = {"learning_rate": None, "base_learning_rate": 0.008, "warmup_epochs": 0.4, "max_steps": 20}
    words = command(MODULE, options(images, tmp_path / "run", **changes, gradient_accumulation_steps=2))[3:]
    monkeypatch.setattr("sys.argv", ["finetune_classifier", *words])
    trainer, _ = finetune_classifier.prepare()
    assert trainer.args.learning_rate == pytest.approx(0.008 * 16 / 256)
    assert trainer.args.warmup_steps == 3  # 0.4 of 7 steps, of 112 images
    assert len(trainer.train_dataset) == 120
    assert len(trainer._get_train_sampler()) == 112


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mixup": 0.8, "per_device_train_batch_size": 7}, "give an even one"),
        ({"per_device_train_batch_size": 500}, "There are 120 images and a batch takes 500"),
        ({"model": "nano2", **OTHER_MODEL}, "--model 'nano2' cannot be opened: give a size (atto"),
        ({"model": "timm/test_resnett", **OTHER_MODEL}, "near that name: test_resnet"),
        ({"config_overrides": '{"dephts": [1]}'}, "names dephts, which ConvNextV2FcmaeConfig has not"),
        ({"model": "timm/test_resnet", "from_scratch": True, "layer_decay": 0.9, "layer_decay_type": "group"}, None),
        ({"label_smoothing_factor": 1.5}, "--label_smoothing_factor is 1.5"),
        ({"image_size": 2}, "does not take images of 3 x 2 x 2"),
        ({"from_scratch": True, "freeze_backbone": True}, "would keep the random weights"),
        ({"warmup_steps": 2, "warmup_epochs": 1.0}, "both say how long the warm-up is"),
        ({"crop_scale": 0.5}, "give two shares"),
        ({"image_size": [32, 64]}, "'64' on the command line belongs to no field"),
        ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps is 0: give 1 or more"),
        ({"max_steps": None, "num_train_epochs": 0}, "--num_train_epochs is 0.0: give more than 0"),
        ({"warmup_epochs": -1}, "--warmup_epochs is -1.0"),
        ({"config_overrides": json.dumps(TINY | {"num_channels": 2})}, "images are read as grey (1) or colour (3)"),
        ({"eval_dataset_split": "validation"}, "not 'validation'"),
        ({"auto_augment": "rend-m9"}, "--auto_augment 'rend-m9' is not known to timm"),
    ],
)
def test_bad_input_is_refused_in_one_sentence_before_anything_is_written(
    images, monkeypatch, capsys, tmp_path, changes, sentence
):
    if sentence is None:
        changes, sentence = changes | OTHER_MODEL, "a timm model knows single alone"
    assert sentence in refused(monkeypatch, capsys, images, tmp_path / "run", **changes)


def held_out(folder):
    return SHORT | {"eval_dataset": folder / "test.parquet", "eval_dataset_split": "train"}


@pytest.mark.parametrize(
    ("train", "test", "sentence"),
    [(["a"], ["a"], "has the one class 'a'"), (["a", "b"], ["b", "c"], "is of the class 'c', which is none of the 2")],
)
def test_classes_that_cannot_be_judged_are_refused(monkeypatch, capsys, tmp_path, train, test, sentence):
    for split, names in (("train", train), ("test", test)):
        write_images(tmp_path, split, list(range(len(names))) * 4, names)
    assert sentence in refused(monkeypatch, capsys, tmp_path / "train.parquet", tmp_path / "run", **held_out(tmp_path))


def test_held_out_classes_in_another_order_are_told_by_name(monkeypatch, capsys, tmp_path):
    write_images(tmp_path, "train", [0, 1] * 4, ["a", "b", "c"])
    write_images(tmp_path, "test", [0, 0, 1], ["c", "a"])
    record = run_here(monkeypatch, tmp_path / "train.parquet", tmp_path / "run", **held_out(tmp_path))
    assert [(row["label"], row["images"]) for row in record["per_class"]] == [("a", 1), ("b", 0), ("c", 2)]
    assert "No training image is of the classes c." in capsys.readouterr().out


def test_a_confusion_matrix_by_hand():
    counts = confusion_counts(np.array([0, 0, 1, 2]), np.array([0, 1, 1, 1]), 3)
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [0, 1, 0]]
    rows = per_class_table(counts, ["a", "b", "c"])
    assert rows[1] == {"label": "b", "images": 1, "correct": 1, "precision": 0.3333, "recall": 1.0}
    assert rows[2] == {"label": "c", "images": 1, "correct": 0, "precision": None, "recall": 0.0}


RECIPES = sorted((REPOSITORY / "training" / "recipes" / "convnextv2_fcmae").glob("finetune_*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_one_that_the_script_takes(monkeypatch, recipe):
    monkeypatch.setattr("sys.argv", ["finetune_classifier", "--config", str(recipe), "--use_cpu", "true"])
    arguments, training, _ = parse_arguments(FinetuneArguments, OptimizationArguments)
    check_arguments(arguments, training)
    TrainingItem(arguments, FORMAT)
    if arguments.dataset == "ILSVRC/imagenet-1k":  # the papers': 1,024 or 4,096 images on 8 GPUs
        images = 8 * training.per_device_train_batch_size * training.gradient_accumulation_steps
        assert images == (4096 if arguments.model.startswith("v1") else 1024)
