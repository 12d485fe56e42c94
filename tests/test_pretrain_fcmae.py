"""Masked pretraining as a user runs it: killed and resumed, on two processes, with bad input, opened by a stranger."""

import io
import json
import math
import shutil
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from training_runs import REPOSITORY, command, kill_when_there, losses, run, two_processes

from hf_models import ConvNextV2FcmaeConfig, ConvNextV2FcmaeForPreTraining
from hf_models.convnextv2_fcmae.sizes import SIZES
from training import pretrain_fcmae
from training.command_line import parse_arguments
from training.image_data import ImageDataset, load_image_dataset
from training.image_draws import DrawnImages, EpochSampler
from training.image_preparation import build_image_processor, held_out_transform
from training.image_probe import knn_accuracy, linear_accuracy
from training.pretrain_fcmae import (
    HELD_OUT_SEED,
    OptimizationArguments,
    PretrainArguments,
    flops_per_image,
    make_item,
)
from training.reconstruction_pictures import MAX_BYTES, reconstruction_picture
from training.run_setup import examples_per_step

TINY_MODEL = {"depths": [1, 1], "hidden_sizes": [16, 32], "decoder_hidden_size": 32, "norm_pix_loss_eps": 0.01}
RECIPES = sorted((REPOSITORY / "training" / "recipes" / "convnextv2_fcmae").glob("pretrain_*.yaml"))
OPTIONS = {
    "config_overrides": json.dumps(TINY_MODEL),
    "image_size": 32,  # 4 x 4 mask patches of 8 pixels
    "precision": "fp32",
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,  # the held-out images fill two batches and a part
    "max_steps": 30,  # a pass over the images is 13
    "learning_rate": 0.003,
    "logging_steps": 5,
    "eval_steps": 15,
    "save_steps": 10,
    "disable_tqdm": True,
    "use_cpu": True,
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """104 emoji of all classes to train on and 21 to evaluate on."""
    folder = tmp_path_factory.mktemp("images")
    for split, number in (("train", 104), ("test", 21)):
        rows = load_image_dataset("emoji", split)
        rows.select([i * len(rows) // number for i in range(number)]).to_parquet(folder / f"{split}.parquet")
    return folder


def pretrain(images, output_dir, launcher=(), **changes):
    return command(
        "training.pretrain_fcmae", {"dataset": images, "output_dir": output_dir} | OPTIONS | changes, launcher
    )


@pytest.fixture
def pretrain_here(images, tmp_path, monkeypatch):
    """Runs the command within this process, which saves the seconds that importing takes; returns the run folder."""

    def start(folder=tmp_path / "run", **changes):
        monkeypatch.setattr("sys.argv", ["pretrain_fcmae", *pretrain(images, folder, **changes)[3:]])
        pretrain_fcmae.main()
        return folder

    return start


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    ended = run(pretrain(images, folder))
    assert ended.returncode == 0, ended.stderr
    return folder


def test_the_run_learns_and_records_what_it_did(finished):
    record = json.loads((finished / "run.json").read_text())
    held_out = {step: value for step, name, value in losses(finished) if name == "eval_loss"}
    assert held_out.keys() == {0, 15, 30}
    assert held_out[0] == pytest.approx(1, abs=0.1)  # the variance of the normalised target
    assert held_out[30] < held_out[0] - 0.05
    assert record["status"] == "finished"
    assert record["training"]["images_per_step"] == 8
    assert record["metrics"]["images_seen"] == 30 * 8
    assert 0 < record["metrics"]["matmul_share"] < 1
    assert 0 < record["model"]["encoder_parameters"] < record["model"]["parameters"]
    at_start, at_end = (record["metrics"][name] for name in ("knn_accuracy_at_start", "eval_knn_accuracy"))
    assert all(value * 21 == pytest.approx(round(value * 21)) for value in (at_start, at_end))
    for sample in record["samples"]:
        assert Image.open(finished / sample["picture"]).format == "PNG"
    assert [sample["step"] for sample in record["samples"]] == [0, 15, 30]


def test_the_held_out_loss_is_the_mean_over_images_each_on_its_own(finished):
    """Of the saved model, image by image, with masks that no other run has otherwise."""
    record = json.loads((finished / "run.json").read_text())
    model = ConvNextV2FcmaeForPreTraining.from_pretrained(finished).eval()
    held_out = held_out_images(record["data"]["eval"]["dataset"], model.config)
    with torch.no_grad():
        by_image = [
            model(item["pixel_values"][None], noise=item["noise"][None]).loss.item()
            for item in (held_out[i] for i in range(21))
        ]
    assert record["metrics"]["eval_loss"] == pytest.approx(sum(by_image) / 21, rel=1e-5)


def test_the_probe_learns_from_the_training_images_alone(finished):
    """Of the saved model, with every image on its own: nothing of the held-out labels is known to the neighbours."""
    record = json.loads((finished / "run.json").read_text())
    model = ConvNextV2FcmaeForPreTraining.from_pretrained(finished).eval()
    transform = held_out_transform([32, 32], build_image_processor(model.config))
    known = {}
    for split in ("train", "test"):
        images = ImageDataset(load_image_dataset(record["data"]["train"]["dataset"], split), transform)
        with torch.no_grad():
            states = [model.convnextv2(image["pixel_values"][None]).last_hidden_state.mean((2, 3)) for image in images]
        known[split] = torch.cat(states), torch.tensor([image["labels"] for image in images])
    assert record["metrics"]["eval_knn_accuracy"] == pytest.approx(knn_accuracy(*known["train"], *known["test"]))


EVERY_CLASS = """
import sys
sys.modules["hf_models"] = None
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForPreTraining
folder, trust = sys.argv[1], {"trust_remote_code": True}
pixels = AutoImageProcessor.from_pretrained(folder)(Image.new("RGB", (50, 40), "red"), return_tensors="pt")
assert pixels["pixel_values"].shape == (1, 3, 32, 32)
model = AutoModelForPreTraining.from_pretrained(folder, **trust)
assert torch.isfinite(model(**pixels).loss)
encoder = AutoModel.from_pretrained(folder, **trust)
states = encoder(**pixels).last_hidden_state
torch.testing.assert_close(states, model.convnextv2(**pixels).last_hidden_state)
"""


def test_the_folder_opens_where_hf_models_is_not_installed(finished, tmp_path):
    ended = subprocess.run(
        [sys.executable, "-c", EVERY_CLASS, str(finished)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    assert {path.suffix for path in finished.iterdir() if path.is_file()} == {".json", ".py", ".safetensors", ".md"}


def test_killed_at_any_moment_and_resumed_it_gives_the_same_losses_to_the_bit(images, finished, tmp_path):
    """Crops, flips and masks included, and with the images read by two workers that live through all epochs."""
    folder = tmp_path / "killed"
    workers = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}
    kill_when_there(pretrain(images, folder, **workers), folder / "checkpoint-20", delay=0.02)
    ended = run(pretrain(images, folder, **workers))
    assert ended.returncode == 0, ended.stderr
    assert losses(folder) == losses(finished)
    ours, theirs = load_file(folder / "model.safetensors"), load_file(finished / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_two_processes_resumed_give_the_losses_of_one_with_the_same_global_batch(images, finished, tmp_path):
    folder = tmp_path / "two"
    words = pretrain(images, folder, two_processes(), per_device_train_batch_size=4)
    kill_when_there(words, folder / "checkpoint-20")
    ended = run(words)
    assert ended.returncode == 0, ended.stderr
    one, two = losses(finished), losses(folder)
    assert [entry[:2] for entry in one] == [entry[:2] for entry in two]
    for (_, name, ours), (_, _, theirs) in zip(two, one, strict=True):
        # Sums in another order, through 30 steps; a norm feels it more than a loss.
        assert ours == pytest.approx(theirs, rel=1e-2 if name == "grad_norm" else 1e-4)
    ours, theirs = (json.loads((run / "run.json").read_text())["metrics"] for run in (folder, finished))
    assert ours["knn_accuracy_at_start"] == theirs["knn_accuracy_at_start"]  # from the same weights
    assert ours["eval_knn_accuracy"] == pytest.approx(theirs["eval_knn_accuracy"], abs=1.1 / 21)


def test_gradient_accumulation_gives_the_losses_of_the_whole_batch(finished, pretrain_here):
    folder = pretrain_here(per_device_train_batch_size=2, gradient_accumulation_steps=4, eval_strategy="no")
    accumulated = [value for _, name, value in losses(folder) if name == "loss"]
    assert accumulated == pytest.approx([value for _, name, value in losses(finished) if name == "loss"], rel=1e-4)
    # Without evaluations there is nothing to picture or probe.
    assert json.loads((folder / "run.json").read_text())["samples"] == []


def test_a_stream_resumed_gives_the_same_losses_to_the_bit(pretrain_here, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    options = {"streaming": True, "max_steps": 20, "save_steps": 15, "eval_steps": 10, "lr_scheduler_type": "constant"}
    folder = pretrain_here(**options)
    whole = losses(folder)
    assert json.loads((folder / "run.json").read_text())["skipped_images"]["count"] is None  # nobody counted
    (folder / "checkpoint-20").rename(tmp_path / "set_aside")
    content = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(content | {"status": "running"}))
    pretrain_here(**options)
    assert losses(folder) == whole


@pytest.mark.slow
def test_a_stream_is_read_by_workers_however_they_are_started(pretrain_here, monkeypatch):
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    options = {"streaming": True, "max_steps": 2, "eval_strategy": "no", "dataloader_num_workers": 1}
    folder = pretrain_here(**options, dataloader_multiprocessing_context="spawn")
    assert json.loads((folder / "run.json").read_text())["metrics"]["images_seen"] == 16


def test_a_classifier_is_pretrained_further_from_its_own_encoder(pretrain_here, tmp_path):
    from hf_models import ConvNextV2FcmaeForImageClassification

    config = ConvNextV2FcmaeConfig(depths=[1, 1], hidden_sizes=[8, 16], decoder_hidden_size=16, num_labels=3)
    classifier = ConvNextV2FcmaeForImageClassification(config)
    classifier.to(torch.bfloat16).save_pretrained(tmp_path / "classifier")
    folder = pretrain_here(
        model=tmp_path / "classifier", config_overrides=None, max_steps=1, learning_rate=1e-12, probe="linear"
    )
    weights = load_file(folder / "model.safetensors")
    kernels = {
        name: value for name, value in classifier.state_dict().items() if "embeddings" in name or "dwconv" in name
    }
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    for name, value in kernels.items():
        torch.testing.assert_close(weights[name], value.float(), rtol=0, atol=1e-9)
    assert "eval_linear_accuracy" in json.loads((folder / "run.json").read_text())["metrics"]


def test_grey_rectangles_without_labels_train_too(images, pretrain_here, tmp_path):
    for split in ("train", "test"):
        folder = tmp_path / "photos" / split
        folder.mkdir(parents=True)
        for i in range(20):
            pixels = np.random.default_rng(i).integers(0, 256, (30 + i, 70), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    overrides = json.dumps(TINY_MODEL | {"num_channels": 1})
    folder = pretrain_here(dataset=tmp_path / "photos", config_overrides=overrides, image_size=[16, 32], max_steps=2)
    record = json.loads((folder / "run.json").read_text())
    assert record["model"]["config"]["image_size"] == [16, 32]
    assert not any("accuracy" in name for name in record["metrics"])


def damage(images, folder, rows):
    """The images with empty files in these rows."""
    shutil.copytree(images, folder)
    train = load_image_dataset(str(images), "train")
    damaged = [row | {"image": {"bytes": b"", "path": f"{i}.png"}} if i in rows else row for i, row in enumerate(train)]
    Dataset.from_list(damaged, features=train.features).to_parquet(folder / "train.parquet")
    return folder


def test_an_image_that_cannot_be_read_is_skipped_counted_and_named(images, pretrain_here, tmp_path):
    folder = pretrain_here(dataset=damage(images, tmp_path / "damaged", rows=[7]), max_steps=13, probe="none")
    assert json.loads((folder / "run.json").read_text())["skipped_images"] == {"count": 1, "names": ["7.png"]}


def test_too_many_of_them_stop_the_run_by_name(images, pretrain_here, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        pretrain_here(dataset=damage(images, tmp_path / "damaged", rows=[7, 8]), max_steps=13)
    assert ended.value.code == 2
    assert "2 of 104 images cannot be read (7.png, 8.png)" in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_finished_run_is_not_trained_again(images, finished, pretrain_here, capsys):
    pretrain_here(folder=finished)
    assert "holds this run, finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"image_size": 36}, "mask patches of 8 pixels: take 32 or 40 for 36"),
        ({"image_size": 4}, "mask patches of 8 pixels: take 8 for 4"),
        ({"mask_ratio": 0.99}, "--mask_ratio 0.99 keeps 0 of the 16 patches"),
        ({"mask_ratio": 0.0}, "--mask_ratio 0.0 keeps 16 of the 16 patches"),
        ({"mask_ratio": 1.5}, "--mask_ratio 1.5 keeps"),
        ({"size": "v2_small"}, "--size 'v2_small' is not known: take one of atto"),
        ({"config_overrides": '{"depth": [1]}'}, "names depth, which ConvNextV2FcmaeConfig has not"),
        ({"config_overrides": '{"depths": [1]}'}, "--config_overrides: depths [1] and hidden_sizes"),
        ({"probe": "svm"}, "--probe 'svm' is not known: take none, knn or linear"),
        ({"probe": "knn", "label_column": "none"}, "--probe knn needs labels"),
        ({"streaming": True, "max_steps": None}, "A stream has no known length: give --max_steps"),
        ({"per_device_train_batch_size": 105}, "104 images and a batch takes 105"),
        ({"dataset": "nowhere/at/all"}, "There is no file or folder 'nowhere/at/all'"),
        ({"model": "nowhere"}, "--config_overrides is for a new model"),
        ({"crop_scale_min": 0}, "--crop_scale_min is 0.0: give a share above 0"),
    ],
)
def test_bad_input_is_refused_in_one_sentence_before_anything_is_written(
    pretrain_here, tmp_path, capsys, changes, sentence
):
    with pytest.raises(SystemExit) as ended:
        pretrain_here(**changes)
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "run").exists()


def held_out_images(dataset, config):
    processor = build_image_processor(config)
    make = partial(make_item, transform=held_out_transform([32, 32], processor), patches=16)
    return DrawnImages(ImageDataset(load_image_dataset(dataset, "test")), make, HELD_OUT_SEED)


# ---- parts ----


def test_a_draw_depends_on_its_number_and_the_seed_only():
    pictures = [
        {"image": Image.fromarray(np.random.default_rng(i).integers(0, 256, (9, 9, 3), np.uint8))} for i in range(4)
    ]
    crop = v2.Compose([v2.RandomCrop(5), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    draws = DrawnImages(pictures, _CropAndNoise(crop), seed=1)
    before = torch.get_rng_state()
    items = {number: draws[number] for number in range(12)}
    assert torch.equal(torch.get_rng_state(), before)
    loader = DataLoader(draws, batch_size=2, sampler=[11, 0, 5, 3], num_workers=2, persistent_workers=True)
    for _ in range(2):
        numbers = iter([11, 0, 5, 3])
        for batch in loader:
            for pixels, noise in zip(batch["pixel_values"], batch["noise"], strict=True):
                expected = items[next(numbers)]
                assert torch.equal(pixels, expected["pixel_values"])
                assert torch.equal(noise, expected["noise"])
    # The same image in other epochs, other images, another seed.
    others = [items[4], items[8], items[1], DrawnImages(pictures, draws.make_item, seed=2)[0]]
    assert all(not torch.equal(items[0]["noise"], other["noise"]) for other in others)


class _CropAndNoise:
    def __init__(self, transform):
        self.transform = transform

    def __call__(self, row):
        return {"pixel_values": self.transform(row["image"]), "noise": torch.rand(3)}


def test_the_sampler_shuffles_each_epoch_anew_and_says_which_it_is():
    state = SimpleNamespace(epoch=0)
    sampler = EpochSampler(range(50), batch=5, seed=0, epoch=lambda: state.epoch)
    first = list(sampler)
    assert list(sampler) == first
    state.epoch = 3
    fourth = list(sampler)
    assert sorted(fourth) == list(range(150, 200))
    assert [number % 50 for number in fourth] != first


def test_each_epoch_leaves_out_other_images_than_the_one_before():
    state = SimpleNamespace(epoch=0)
    sampler = EpochSampler(range(50), batch=32, seed=0, epoch=lambda: state.epoch)
    seen = set()
    for state.epoch in range(20):
        drawn = [number % 50 for number in sampler]
        assert len(drawn) == len(set(drawn)) == len(sampler) == 32
        seen |= set(drawn)
    assert seen == set(range(50))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_describes_a_run(recipe, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["x", "--config", str(recipe), "--use_cpu", "true", "--output_dir", str(tmp_path)])
    arguments, training, _ = parse_arguments(PretrainArguments, OptimizationArguments)
    shape = SIZES[arguments.size].config | arguments.config_overrides
    config = ConvNextV2FcmaeConfig(**shape, image_size=arguments.image_size)
    pretrain_fcmae.check_arguments(arguments, training, config)
    if recipe.stem.removeprefix("pretrain_") in SIZES:  # the paper's
        assert 8 * examples_per_step(training) == 4096
        assert training.get_warmup_steps(800) == 40


def test_only_kernels_decay():
    model = ConvNextV2FcmaeForPreTraining(ConvNextV2FcmaeConfig(**TINY_MODEL))
    decayed = set(pretrain_fcmae.PretrainTrainer.get_decay_parameter_names(None, model))
    kernels = (
        "patch_embeddings.weight",
        "dwconv.weight",
        "pwconv1.weight",
        "pwconv2.weight",
        "downsampling_layer.1.weight",
    )
    kernels += ("decoder.proj.weight", "decoder.pred.weight")
    assert decayed == {name for name, _ in model.named_parameters() if name.endswith(kernels)}


def test_the_learning_rate_follows_from_the_batch_unless_given(tmp_path):
    options = {"output_dir": str(tmp_path), "use_cpu": True, "per_device_train_batch_size": 64}
    by_batch = OptimizationArguments(**options, gradient_accumulation_steps=8)
    assert by_batch.learning_rate == pytest.approx(1.5e-4 * 2)
    assert OptimizationArguments(**options, learning_rate=1e-3).learning_rate == 1e-3
    assert by_batch.get_warmup_steps(800) == 40
    assert (by_batch.adam_beta1, by_batch.adam_beta2, by_batch.weight_decay, by_batch.max_grad_norm) == (
        0.9,
        0.95,
        0.05,
        0,
    )


def test_a_step_costs_three_times_the_multiply_adds_of_the_visible_cells():
    model = ConvNextV2FcmaeForPreTraining(ConvNextV2FcmaeConfig(**TINY_MODEL, image_size=32))
    kept, patches = 6, 16
    stem = kept * 4 * (4 * 4 * 3) * 16
    first = patches * 4 * 49 * 16 + kept * 4 * 2 * 16 * 64  # the depthwise convolution sees the whole canvas
    second = kept * (2 * 2 * 16) * 32 + patches * 49 * 32 + kept * 2 * 32 * 128
    decoder = kept * 32 * 32 + patches * (49 * 32 + 2 * 32 * 128 + 32 * 8 * 8 * 3)
    assert flops_per_image(model, [32, 32]) == 3 * 2 * (stem + first + second + decoder)


@pytest.mark.parametrize("size", [32, 224, 384, [64, 96]])
def test_held_out_images_look_as_the_saved_processor_makes_them(size):
    processor = build_image_processor(ConvNextV2FcmaeConfig(image_size=size))
    x, y = np.meshgrid(np.linspace(0, 6, 310), np.linspace(0, 4, 270))
    image = Image.fromarray(np.stack([127 + 120 * np.sin(x + i) * np.cos(y) for i in range(3)], -1).astype(np.uint8))
    ours = held_out_transform([size, size] if isinstance(size, int) else size, processor)(image)
    theirs = processor(image, return_tensors="pt")["pixel_values"][0]
    # Both round to whole grey levels, one in Pillow and one in torch.
    assert (ours - theirs).abs().max() <= 2.01 / 255 / min(processor.image_std)


def test_the_neighbours_vote_by_similarity():
    generator = torch.Generator().manual_seed(0)
    train, held_out = (torch.randn(n, 5, generator=generator) for n in (40, 9))
    labels, held_out_labels = (torch.randint(0, 3, (n,), generator=generator) for n in (40, 9))
    right = 0
    for query, label in zip(held_out.numpy(), held_out_labels.tolist(), strict=True):
        cosine = train.numpy() @ query / np.linalg.norm(train, axis=1) / np.linalg.norm(query)
        votes = [0.0, 0.0, 0.0]
        for i in np.argsort(-cosine)[:10]:
            votes[labels[i]] += math.exp(cosine[i] / 0.07)
        right += int(np.argmax(votes) == label)
    assert knn_accuracy(train, labels, held_out, held_out_labels) == pytest.approx(right / 9)
    assert knn_accuracy(train[:2], labels[:2], train[:2] * 7, labels[:2]) == 1.0  # fewer than ten, other lengths


def test_the_linear_probe_separates_what_a_line_separates():
    points = torch.randn(600, 4) * torch.tensor([1e-3, 1.0, 1e3, 0.0]) + torch.tensor([5.0, 0.0, -1e4, 2.0])
    labels = ((points[:, 0] - 5.0) * 1e3 + (points[:, 2] + 1e4) / 1e3 > 0).long()  # neither axis alone
    assert linear_accuracy(points[:500], labels[:500], points[500:], labels[500:]) > 0.96


def test_the_picture_shows_the_images_as_they_are_and_stays_small():
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.25]
    pixels = torch.randint(0, 256, (8, 3, 64, 64))
    normalised = (pixels / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    picture = np.asarray(Image.open(io.BytesIO(reconstruction_picture(*[normalised[:1]] * 3, mean, std))))
    assert np.array_equal(picture[:128:2, :128:2], pixels[0].permute(1, 2, 0).numpy())  # twice as large
    large = torch.rand(8, 1, 224, 160)
    file = reconstruction_picture(large, large, large, [0.0], [1.0])
    assert len(file) < MAX_BYTES
    assert Image.open(io.BytesIO(file)).width > 3 * 4 * 60
