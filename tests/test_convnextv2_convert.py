"""`hf_models.convert` carries a ConvNeXt with its preprocessing through every layout."""

import json
import subprocess
import sys

import pytest
import timm
import torch
from convnextv2_states import V1, assert_close, assert_same_tensors, ours, pixels, target
from folder_edits import rewrite_config
from PIL import Image
from transformers import AutoImageProcessor

from hf_models.convert import convert, main
from hf_models.convnextv2_fcmae.checkpoints import load_checkpoint

PROCESSOR = {
    "image_processor_type": "ConvNextImageProcessor",
    "size": {"shortest_edge": 32},
    "crop_pct": 0.8,
    "resample": 3,
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.2, 0.3, 0.4],
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
}


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    model = ours(image_size=32)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


def test_through_every_layout_and_home(source, tmp_path, capsys):
    stations = ["transformers", "timm", "official", "hf_models"]
    path = source
    for number, layout in enumerate(stations):
        following = target(tmp_path / str(number), layout)
        convert(path, following, layout)
        path = following
    assert_same_tensors(load_checkpoint(path).state_dict(), load_checkpoint(source).state_dict())
    assert sorted(p.name for p in (tmp_path / "2").iterdir()) == ["model.pt"]
    assert "model.pt describes no preprocessing of images" in capsys.readouterr().err


def test_preprocessing_is_the_same_in_timm(source, tmp_path, capsys):
    convert(source, tmp_path / "timm", "timm")
    convert(tmp_path / "timm", tmp_path / "back", "transformers")
    assert "note:" not in capsys.readouterr().err
    assert json.loads((tmp_path / "back" / "preprocessor_config.json").read_text()) == PROCESSOR

    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    settings = timm.data.resolve_model_data_config(model)
    photo = (torch.rand(5, 7, 3) * 255).byte().repeat_interleave(12, 0).repeat_interleave(12, 1)
    image = Image.fromarray(photo.numpy())
    theirs = timm.data.create_transform(**settings)(image)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "back")
    assert type(processor).__name__.startswith("ConvNextImageProcessor")
    found = processor(image, return_tensors="pt").pixel_values[0]
    # Two resampling codes that round to whole grey levels, of 1 / 255 / std each.
    torch.testing.assert_close(found, theirs, rtol=0, atol=2.01 / 255 / 0.2)


def test_large_images_are_warped_in_both(source, tmp_path):
    processor = PROCESSOR | {"size": {"shortest_edge": 384}, "crop_pct": 1.0}
    (source / "preprocessor_config.json").write_text(json.dumps(processor))
    convert(source, tmp_path / "timm", "timm")
    described = json.loads((tmp_path / "timm" / "config.json").read_text())["pretrained_cfg"]
    assert (described["crop_mode"], described["input_size"]) == ("squash", [3, 384, 384])
    convert(tmp_path / "timm", tmp_path / "back", "hf_models")
    assert json.loads((tmp_path / "back" / "preprocessor_config.json").read_text()) == processor


def test_preprocessing_without_a_counterpart_is_left_out_with_a_note(source, tmp_path, capsys):
    (source / "preprocessor_config.json").write_text('{"image_processor_type": "ViTImageProcessor"}')
    convert(source, tmp_path / "timm", "timm")
    assert "has no counterpart in the layout of timm" in capsys.readouterr().err
    convert(source, tmp_path / "native", "transformers")  # the same file there
    assert "ViT" in (tmp_path / "native" / "preprocessor_config.json").read_text()


def test_a_file_in_the_way(source, tmp_path):
    (tmp_path / "model.pt").write_text("mine")
    with pytest.raises(FileExistsError):
        convert(source, tmp_path / "model.pt", "official")
    assert (tmp_path / "model.pt").read_text() == "mine"


def test_a_failure_leaves_nothing(source, tmp_path):
    with pytest.raises(ValueError, match="is one file"):
        convert(source, tmp_path / "out", "official")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_exports_open_where_our_package_is_not(source, tmp_path):
    """V2 and V1 in transformers by the Auto classes and by a pipeline, and in timm."""
    v1 = tmp_path / "source_v1"
    ours(**V1, image_size=32).save_pretrained(v1)
    (v1 / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    sources = {"v2": source, "v1": v1}
    for name, folder in sources.items():
        for layout in ("transformers", "timm"):
            convert(folder, tmp_path / f"{layout}_{name}", layout)
    images = pixels()
    torch.save(images, tmp_path / "images.pt")
    photo = Image.fromarray((torch.rand(45, 60, 3) * 255).byte().numpy())
    photo.save(tmp_path / "photo.png")
    script = """
import sys
sys.modules["hf_models"] = None  # as if it were not installed
import timm, torch
from transformers import AutoModelForImageClassification, pipeline
images = torch.load("images.pt")
for name in ("v2", "v1"):
    with torch.no_grad():
        native = AutoModelForImageClassification.from_pretrained(f"transformers_{name}")(images).logits
        other = timm.create_model(f"local-dir:timm_{name}", pretrained=True).eval()(images)
    answers = pipeline("image-classification", f"transformers_{name}")("photo.png", top_k=5)
    torch.save([native, other, {answer["label"]: answer["score"] for answer in answers}], f"{name}.pt")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, folder in sources.items():
        model, (native, other, scores) = load_checkpoint(folder), torch.load(tmp_path / f"{name}.pt")
        processed = AutoImageProcessor.from_pretrained(folder)(photo, return_tensors="pt").pixel_values
        with torch.no_grad():
            expected = model(images).logits
            [probabilities] = model(processed).logits.softmax(-1)
        assert_close(native, expected)
        assert_close(other, expected)
        assert_close(torch.tensor([scores[label] for label in model.config.id2label.values()]), probabilities)


def test_command_line(source, tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
        main()

    run(source, tmp_path / "ours.pt", "--to", "official")
    assert_same_tensors(load_checkpoint(tmp_path / "ours.pt").state_dict(), load_checkpoint(source).state_dict())
    (tmp_path / "page.pt").write_bytes(b"<html>")
    capsys.readouterr()
    for bad, message in (
        (tmp_path / "page.pt", f"{tmp_path / 'page.pt'} is a web page, not weights: fetch the file itself."),
        (tmp_path / "no", f"{tmp_path / 'no'} does not exist: give a local model folder or a weights file."),
    ):
        with pytest.raises(SystemExit) as stopped:
            run(bad, tmp_path / "out", "--to", "timm")
        assert stopped.value.code == 2
        assert capsys.readouterr().err == f"error: {message}\n"


def test_another_family(source, tmp_path):
    rewrite_config(source, model_type="vit")
    with pytest.raises(ValueError, match="has model_type 'vit'; known are llama_style, llama, convnextv2_fcmae"):
        convert(source, tmp_path / "out", "transformers")
