"""LoRA on image classifiers: what trains, what stays, and that the folder holds the merged model."""

import json
import shutil
from io import BytesIO

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from training_runs import command
from transformers import (
    AutoModelForImageClassification,
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    TimmWrapperConfig,
    ViTConfig,
    ViTForImageClassification,
    pipeline,
)

from hf_models import ConvNextV2FcmaeConfig, ConvNextV2FcmaeForImageClassification
from training import finetune_classifier
from training.adapters import AdapterArguments, add_adapter, save_adapter
from training.classifier_models import adapter_layers
from training.image_data import load_image_dataset

TINY = {"depths": [1, 1], "hidden_sizes": [16, 32], "num_labels": 9, "image_size": 32}
OPTIONS = {
    "use_peft": True,
    "lora_r": 2,
    "image_size": 32,
    "precision": "fp32",
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 16,
    "max_steps": 8,
    "learning_rate": 0.003,
    "logging_steps": 4,
    "eval_strategy": "steps",
    "eval_steps": 8,
    "save_strategy": "steps",
    "save_steps": 4,
    "disable_tqdm": True,
    "use_cpu": True,
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for split, kept in (("train", 64), ("test", 27)):
        rows = load_image_dataset("emoji", split)
        rows.select(range(0, len(rows), len(rows) // kept)).select(range(kept)).to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A classifier of nine classes with other names: its head will be new."""
    folder = tmp_path_factory.mktemp("base") / "model"
    torch.manual_seed(0)
    model = ConvNextV2FcmaeForImageClassification(ConvNextV2FcmaeConfig(**TINY))
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm.weight" in name else 0.0, 0.2)
    model.save_pretrained(folder)
    return folder


def run_here(monkeypatch, images, base, output_dir, **changes):
    options = {"model": base, "dataset": images, "output_dir": output_dir} | OPTIONS | changes
    monkeypatch.setattr("sys.argv", ["finetune_classifier", *command("finetune_classifier", options)[3:]])
    finetune_classifier.main()
    return json.loads((output_dir / "run.json").read_text())


def refused(monkeypatch, capsys, images, base, output_dir, **changes):
    with pytest.raises(SystemExit) as stopped:
        run_here(monkeypatch, images, base, output_dir, **changes)
    assert stopped.value.code == 2
    assert not output_dir.exists()
    return capsys.readouterr().err.strip().splitlines()[-1]


def logits(model, side=32):
    torch.manual_seed(1)
    with torch.no_grad():
        return model.eval()(pixel_values=torch.randn(3, 3, side, side)).logits


@pytest.fixture(scope="module")
def finished(images, base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "lora"
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_here(monkeypatch, images, base, folder, mixup=0.4, drop_path_rate=0.1, layer_decay=0.9)
    return folder


def test_pointwise_and_depthwise_layers_and_the_head_change_and_nothing_else(finished, base):
    before, after = load_file(base / "model.safetensors"), load_file(finished / "model.safetensors")

    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    low_rank = (".pwconv1.weight", ".pwconv2.weight", ".downsampling_layer.1.weight", ".patch_embeddings.weight")
    whole = (".dwconv.weight", ".dwconv.bias")
    assert changed == {name for name in before if name.endswith(low_rank + whole) or name.startswith("classifier.")}
    for name in changed:
        if name.endswith(low_rank):
            assert torch.linalg.matrix_rank((after[name] - before[name]).flatten(1), rtol=1e-3) <= OPTIONS["lora_r"] * (
                4 if "downsampling" in name else 1
            )


def test_the_folder_holds_the_merged_classifier(finished, base, images):
    merged = AutoModelForImageClassification.from_pretrained(finished)
    with_base = AutoModelForImageClassification.from_pretrained(base)
    separate = PeftModel.from_pretrained(with_base, finished / "adapter")

    assert (logits(merged) - logits(separate)).abs().max() < 1e-4
    assert (logits(merged) - logits(AutoModelForImageClassification.from_pretrained(base))).abs().max() > 0.01
    assert not list(finished.glob("adapter_*"))
    image = Image.open(BytesIO(load_image_dataset(str(images), "test")[0]["image"]["bytes"])).convert("RGB")
    answers = pipeline("image-classification", str(finished))(image)
    assert {answer["label"] for answer in answers} <= set(merged.config.id2label.values())
    run = json.loads((finished / "run.json").read_text())
    assert run["merged"]["max_logit_difference"] < 1e-4
    assert run["adapter"]["modules_to_save"] == ["classifier", "dwconv"]
    expected = sum(
        tensor.numel() for name, tensor in load_file(finished / "adapter" / "adapter_model.safetensors").items()
    )
    assert run["model"]["trainable_parameters"] == expected
    assert run["model"]["parameters"] == merged.num_parameters()


def test_a_resumed_run_equals_one_that_was_never_stopped(finished, images, base, tmp_path, monkeypatch):
    # As a kill at the sixth step leaves it.
    resumed = shutil.copytree(finished, tmp_path / "resumed", ignore=shutil.ignore_patterns("checkpoint-8", "adapter"))
    (resumed / "model.safetensors").unlink()
    record = json.loads((resumed / "run.json").read_text()) | {"status": "running"}
    record["history"] = [entry for entry in record["history"] if entry["step"] <= 4]
    (resumed / "run.json").write_text(json.dumps(record))

    run = run_here(monkeypatch, images, base, resumed, mixup=0.4, drop_path_rate=0.1, layer_decay=0.9)

    first, second = load_file(finished / "model.safetensors"), load_file(resumed / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert len(run["sessions"]) == 2


MODELS = {
    "transformers": lambda: ConvNextV2ForImageClassification(
        ConvNextV2Config(depths=[1, 1], hidden_sizes=[16, 32], num_stages=2, num_labels=3)
    ),
    "vit": lambda: ViTForImageClassification(
        ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32)
    ),
    # Pointwise layers as 1x1 convolutions, as timm's small ConvNeXt have them.
    "timm": lambda: AutoModelForImageClassification.from_config(
        TimmWrapperConfig(
            architecture="convnextv2_atto", num_labels=3, model_args={"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 32)}
        )
    ),
}


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", MODELS)
def test_adapters_of_other_families_merge_exactly(family, dora, tmp_path):
    model = MODELS[family]()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or "bias" in name:
            torch.nn.init.normal_(parameter, 0.0, 0.2)
    model.save_pretrained(tmp_path / "base")
    targets, whole = adapter_layers(model, 2)
    assert not [name for name in targets if name.endswith(("dwconv", "conv_dw"))]
    arguments = AdapterArguments(lora_r=2, use_dora=dora)
    adapted = add_adapter(model, arguments, task_type=None, base="base", targets=targets, whole=whole)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    expected = logits(adapted)

    save_adapter(adapted, tmp_path / "adapter")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(again, tmp_path / "adapter")

    tolerance = 1e-4 * expected.abs().max().clamp(min=1)
    assert (logits(again) - expected).abs().max() < tolerance
    assert (logits(again.merge_and_unload()) - expected).abs().max() < tolerance


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": "atto"}, "--use_peft adapts weights that are trained, and these are new"),
        ({"from_scratch": True}, "--use_peft adapts weights that are trained, and these are new"),
        ({"freeze_backbone": True}, "changes the backbone that --freeze_backbone keeps"),
        ({"ema_decay": 0.9}, "--ema_decay 0.9 averages whole weights, not an adapter's: give 0."),
        ({"lora_init": "pissa"}, "--lora_init pissa is for linear layers"),
        ({"lora_r": 0}, "--lora_r is 0"),
        ({"lora_target_modules": ["qkv"]}, "names 'qkv', and ConvNextV2FcmaeForImageClassification has no such layer"),
    ],
)
def test_what_does_not_go_with_an_adapter_is_refused(images, base, tmp_path, monkeypatch, capsys, changes, sentence):
    assert sentence in refused(monkeypatch, capsys, images, base, tmp_path / "out", **changes)


def test_a_model_with_batch_norm_is_refused(images, tmp_path, monkeypatch, capsys):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=9)
    ResNetForImageClassification(config).save_pretrained(tmp_path / "resnet")

    message = refused(monkeypatch, capsys, images, tmp_path / "resnet", tmp_path / "out")

    assert "is a batch norm, whose statistics no adapter holds" in message
