"""A saved ConvNeXt folder stands alone: it opens where hf_models cannot be imported, by every Auto class, whoever saved
it, and transformers' image processor and pipelines work on it.
"""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from convnextv2_states import OURS, ours
from folder_edits import rewrite_config
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    ConvNextImageProcessor,
)

from hf_models import ConvNextV2FcmaeConfig

AUTO_CLASSES = {
    "AutoModel": "encoder",
    "AutoModelForPreTraining": "pretraining",
    "AutoModelForImageClassification": "classifier",
    "AutoBackbone": "backbone",
}
FILES = {
    "config.json",
    "configuration_convnextv2_fcmae.py",
    "model.safetensors",
    "modeling_convnextv2_fcmae.py",
    "preprocessor_config.json",
    "visible_cells_convnextv2_fcmae.py",
}
# Runs in a fresh process, in another folder, without this package: opens every folder in `saved` with every Auto class,
# keeps what each computes, trains a step, and saves each model again with what it was given.
STRANGER = """
import pathlib, sys
sys.modules["hf_models"] = None  # importing it is an ImportError
import torch
from PIL import Image
from transformers import (
    AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, AutoModelForPreTraining,
    pipeline,
)

saved, resaved = map(pathlib.Path, sys.argv[1:])
trust = {"trust_remote_code": True}
image = Image.open(saved / "image.png")
outputs = {}
for folder in saved.glob("Auto*"):
    config = AutoConfig.from_pretrained(folder, **trust)
    assert config.model_type == "convnextv2_fcmae"
    backbone = AutoBackbone.from_config(config, **trust)
    processor = AutoImageProcessor.from_pretrained(folder)
    pixel_values = processor(image, return_tensors="pt").pixel_values
    outputs[folder.name, "pixels"] = pixel_values
    for auto_class in AutoModel, AutoModelForPreTraining, AutoModelForImageClassification:
        model = auto_class.from_pretrained(folder, **trust)
        with torch.no_grad():
            if auto_class is AutoModelForPreTraining:
                outputs[folder.name, auto_class.__name__] = model(pixel_values, noise=torch.arange(6.0)[None]).logits
            else:
                outputs[folder.name, auto_class.__name__] = model(pixel_values, return_dict=False)[0]
        if folder.name == auto_class.__name__:
            if auto_class is AutoModelForPreTraining:
                model.train()(pixel_values).loss.backward()
            if auto_class is AutoModelForImageClassification:
                model.train()(pixel_values, labels=torch.tensor([1])).loss.backward()
            model.save_pretrained(resaved / folder.name)
            processor.save_pretrained(resaved / folder.name)
    if folder.name == "AutoBackbone":
        # AutoBackbone.from_pretrained asks the Hub first, even for a local folder.
        backbone = type(backbone).from_pretrained(folder)
        with torch.no_grad():
            outputs[folder.name, folder.name] = backbone(pixel_values).feature_maps[0]
        backbone.save_pretrained(resaved / folder.name)
        processor.save_pretrained(resaved / folder.name)

folder = saved / "AutoModelForImageClassification"
outputs["pipeline", "classification"] = pipeline("image-classification", model=str(folder), **trust)(image, top_k=5)
for pool in False, True:
    features = pipeline("image-feature-extraction", model=str(folder), pool=pool, return_tensors=True, **trust)
    outputs["pipeline", "features", pool] = features(image)
torch.save(outputs, resaved / "outputs.pt")
"""


def processor():
    size = {"shortest_edge": 384}  # from this size on images are resized as they are, without a crop
    return ConvNextImageProcessor(do_resize=False, size=size, image_mean=[0.5] * 3, image_std=[0.25] * 3)


def models():
    return {name: ours(task, out_features=["stage2", "stage4"]) for name, task in AUTO_CLASSES.items()}


def opened_by_a_stranger(saved, resaved, image) -> dict:
    """What each (class saved, class opened) computes in a process that cannot import hf_models."""
    image.save(saved / "image.png")
    resaved.mkdir()
    process = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, saved, resaved], cwd=resaved, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    return torch.load(resaved / "outputs.pt")


def assert_whole(folder):
    assert {file.name for file in folder.iterdir()} == FILES
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"].keys() == {"AutoConfig", *AUTO_CLASSES}


def test_a_folder_opens_without_the_package(tmp_path, monkeypatch):
    # Remote code is imported from a cache under HF_HOME: an old one must not answer for what is saved now.
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf_home"))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8))
    saved, resaved = tmp_path / "saved", tmp_path / "resaved"
    originals = models()
    for name, model in originals.items():
        model.save_pretrained(saved / name)
        processor().save_pretrained(saved / name)
        assert_whole(saved / name)

    outputs = opened_by_a_stranger(saved, resaved, image)
    images = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    images = (images - 0.5) / 0.25
    noise = torch.arange(6.0)[None]
    for name, model in originals.items():
        torch.testing.assert_close(outputs[name, "pixels"], images)
        with torch.no_grad():
            if name == "AutoModelForPreTraining":
                expected = model(images, noise=noise).logits
            elif name == "AutoBackbone":
                expected = model(images).feature_maps[0]
            else:
                expected = model(images)[0]
            torch.testing.assert_close(outputs[name, name], expected)
            if name != "AutoBackbone":
                base = ours("encoder")
                base.load_state_dict(model.base_model.state_dict(), strict=False)
                torch.testing.assert_close(outputs[name, "AutoModel"], base(images).last_hidden_state)
        assert_whole(resaved / name)

    classifier = originals["AutoModelForImageClassification"]
    with torch.no_grad():
        scores = classifier(images).logits[0].softmax(0)
        base = classifier.convnextv2(images)
    found = {answer["label"]: answer["score"] for answer in outputs["pipeline", "classification"]}
    assert found == pytest.approx({classifier.config.id2label[i]: score for i, score in enumerate(scores.tolist())})
    torch.testing.assert_close(outputs["pipeline", "features", False], base.last_hidden_state)
    torch.testing.assert_close(outputs["pipeline", "features", True], base.pooler_output)

    # What the stranger saved opens for the next one.
    again = opened_by_a_stranger(resaved, tmp_path / "resaved_again", image)
    for name in AUTO_CLASSES:
        assert torch.equal(again[name, name], outputs[name, name])


@pytest.mark.parametrize("name", AUTO_CLASSES)
def test_here_the_registered_classes_open_it(tmp_path, name):
    ours(AUTO_CLASSES[name]).save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is ConvNextV2FcmaeConfig
    assert type(AutoImageProcessor.from_pretrained(tmp_path)).__name__.startswith("ConvNextImageProcessor")
    for auto_class in AutoModel, AutoModelForPreTraining, AutoModelForImageClassification:
        assert type(auto_class.from_pretrained(tmp_path)) is OURS[AUTO_CLASSES[auto_class.__name__]]


@pytest.mark.parametrize("fields", [{}, {"use_grn": False, "layer_scale_init_value": 1e-6}], ids=["V2", "V1"])
def test_what_a_pretraining_folder_does_not_hold(tmp_path, fields):
    pretraining = ours("pretraining", **fields)
    pretraining.save_pretrained(tmp_path)
    for auto_class, new in (
        (AutoModel, {"layernorm.weight", "layernorm.bias"}),
        (
            AutoModelForImageClassification,
            {"convnextv2.layernorm.weight", "convnextv2.layernorm.bias", "classifier.weight", "classifier.bias"},
        ),
    ):
        model, report = auto_class.from_pretrained(tmp_path, output_loading_info=True)
        assert set(report["missing_keys"]) == new
        assert not report["mismatched_keys"]
        assert {name.split(".")[0] for name in report["unexpected_keys"]} <= {"decoder"}
        encoder = model.base_model
        for name, tensor in pretraining.convnextv2.state_dict().items():
            assert torch.equal(encoder.state_dict()[name], tensor), name
        # What is new starts as in a new model.
        assert (encoder.layernorm.weight == 1).all()
        assert not encoder.layernorm.bias.any()
        if auto_class is AutoModelForImageClassification:
            assert not model.classifier.bias.any()
            assert 0 < model.classifier.weight.std() < 0.03
        assert model(torch.randn(2, 3, 64, 64))[0].isfinite().all()


def test_an_older_list_of_auto_classes_is_renewed(tmp_path):
    """`save_pretrained` of other code may have written one entry; our code beside the weights answers for all."""
    ours().save_pretrained(tmp_path)
    rewrite_config(tmp_path, auto_map={"AutoModel": "elsewhere.Model"})
    AutoModelForImageClassification.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["auto_map"].keys() == {"AutoConfig", *AUTO_CLASSES}


def test_another_number_of_labels(tmp_path):
    ours("classifier").save_pretrained(tmp_path)
    model, report = AutoModelForImageClassification.from_pretrained(
        tmp_path, num_labels=7, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert model(torch.randn(1, 3, 32, 32)).logits.shape == (1, 7)
    assert {entry[0] for entry in report["mismatched_keys"]} == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_round_trip(tmp_path, dtype):
    model = ours("pretraining").to(dtype)
    model.save_pretrained(tmp_path)
    again = AutoModelForPreTraining.from_pretrained(tmp_path)
    assert again.dtype == dtype
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
