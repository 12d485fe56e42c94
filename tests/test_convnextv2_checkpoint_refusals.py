"""ConvNeXt checkpoints that cannot be loaded or saved faithfully are refused, by naming what is wrong."""

import pickle
from pathlib import Path

import pytest
import timm
import torch
from convnextv2_states import SMALL, V1, official_state, ours, target
from folder_edits import rewrite_config, rewrite_weights
from peft import LoraConfig, get_peft_model
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    ConvNextV2Model,
)

from hf_models.convnextv2_fcmae.checkpoints import LAYOUTS, load_checkpoint, save_checkpoint


@pytest.fixture
def official(tmp_path):
    """Writes an official file after `change` edited its state dict."""

    def write(change=lambda state: None, **fields):
        state = dict(official_state(ours(**fields)))
        change(state)
        torch.save({"model": state}, tmp_path / "official.pt")
        return tmp_path / "official.pt"

    return write


@pytest.fixture
def timm_folder(tmp_path):
    save_checkpoint(ours(), tmp_path, "timm")
    return tmp_path


def test_a_missing_block(official):
    def change(state):
        for name in [name for name in state if name.startswith("stages.1.0.")]:
            del state[name]

    with pytest.raises(ValueError, match=r"lacks stages\.1\.0\.dwconv\.weight"):
        load_checkpoint(official(change))


def test_missing_and_unexpected_names(official):
    def change(state):
        state["stages.0.0.extra"] = state.pop("stages.2.0.pwconv1.bias")

    with pytest.raises(
        ValueError,
        match=r"lacks stages\.2\.0\.pwconv1\.bias and holds stages\.0\.0\.extra, which a ConvNeXt of depths",
    ):
        load_checkpoint(official(change))


def test_half_a_head(official):
    with pytest.raises(ValueError, match=r"lacks head\.bias"):
        load_checkpoint(official(lambda state: state.pop("head.bias")))


def test_a_classifier_without_its_final_norm(official):
    with pytest.raises(ValueError, match=r"lacks norm\.weight"):
        load_checkpoint(official(lambda state: state.pop("norm.weight")))


def test_half_a_decoder(tmp_path):
    state = official_state(ours("pretraining"))
    del state["mask_token"]
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(ValueError, match="lacks mask_token"):
        load_checkpoint(tmp_path / "m.pt")


def test_shapes_that_fit_no_model(official):
    def change(state):
        state["stages.1.1.pwconv2.weight"] = torch.zeros(16, 60)

    with pytest.raises(ValueError, match=r"in shape: stages\.1\.1\.pwconv2\.weight \(16, 60\) instead of \(16, 64\)"):
        load_checkpoint(official(change))


def test_the_same_parameter_twice(official):
    def change(state):
        state["encoder.stages.0.0.dwconv.bias"] = state["stages.0.0.dwconv.bias"]

    with pytest.raises(ValueError, match=r"holds both stages\.0\.0\.dwconv\.bias and encoder\.stages"):
        load_checkpoint(official(change))


def test_another_size_than_timms_config_says(timm_folder):
    rewrite_config(timm_folder, model_args={})
    with pytest.raises(ValueError, match=r"lacks stages\.0\.blocks\.1\.conv_dw\.bias, .* more"):
        load_checkpoint(timm_folder)
    rewrite_config(timm_folder, model_args={"depths": SMALL["depths"]})
    with pytest.raises(ValueError, match=r"in shape: stem\.0\.weight \(8, 3, 4, 4\) instead of \(40, 3, 4, 4\)"):
        load_checkpoint(timm_folder)


def test_another_size_than_transformers_config_says(tmp_path):
    ConvNextV2ForImageClassification(ConvNextV2Config(**SMALL)).save_pretrained(tmp_path)
    rewrite_config(tmp_path, hidden_sizes=[8, 16, 32, 32])
    with pytest.raises(ValueError, match=r"in shape: convnextv2\.encoder\.stages\.2\.\S+ \(24, 16, 2, 2\) instead"):
        load_checkpoint(tmp_path)
    rewrite_config(tmp_path, hidden_sizes=SMALL["hidden_sizes"], depths=[1, 2, 2, 1])
    with pytest.raises(ValueError, match=r"lacks convnextv2\.encoder\.stages\.2\.layers\.1\.dwconv\.bias"):
        load_checkpoint(tmp_path)


def test_a_declared_head_that_is_not_there(tmp_path):
    ConvNextForImageClassification(ConvNextConfig(**SMALL)).save_pretrained(tmp_path / "native")
    save_checkpoint(ours(), tmp_path / "timm", "timm")

    def change(tensors):
        for name in [name for name in tensors if name.startswith(("classifier.", "head.fc."))]:
            del tensors[name]

    for folder, name in (("native", "classifier.bias"), ("timm", "head.fc.bias")):
        rewrite_weights(tmp_path / folder, change)
        with pytest.raises(ValueError, match=f"lacks {name}"):
            load_checkpoint(tmp_path / folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm_eps": 1e-5}, "model_args has norm_eps 1e-05"),
        ({"act_layer": "relu"}, "model_args has act_layer 'relu'"),
        ({"stem_type": "overlap"}, "model_args has stem_type 'overlap'"),
        ({"patch_size": 2}, "patch_size is 2"),
        ({"depths": [1, 1, 1]}, "differ in length"),
    ],
)
def test_a_timm_model_that_is_none_of_ours(timm_folder, arguments, message):
    rewrite_config(timm_folder, model_args=arguments)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(timm_folder)


def test_timm_weights_that_timm_computes_otherwise(tmp_path):
    """With a stem of 2 timm's first stage halves the resolution, and only the shapes of a bare file say so."""
    reference = timm.create_model("convnextv2_atto", depths=SMALL["depths"], dims=SMALL["hidden_sizes"], patch_size=2)
    torch.save(reference.state_dict(), tmp_path / "timm.pth")
    with pytest.raises(ValueError, match="is no ConvNeXt: patch_size is 2, and timm's"):
        load_checkpoint(tmp_path / "timm.pth")


def test_another_timm_architecture(timm_folder):
    rewrite_config(timm_folder, architecture="resnet18")
    with pytest.raises(ValueError, match="architecture is 'resnet18'; known are convnext_atto"):
        load_checkpoint(timm_folder)


def test_another_family(timm_folder):
    (timm_folder / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match="has model_type 'vit'; known are convnextv2_fcmae, convnextv2, convnext"):
        load_checkpoint(timm_folder)


def test_another_head(tmp_path):
    ConvNextV2Model(ConvNextV2Config(**SMALL)).save_pretrained(tmp_path)
    rewrite_config(tmp_path, architectures=["ConvNextV2ForObjectDetection"])
    with pytest.raises(ValueError, match="architectures has 'ConvNextV2ForObjectDetection'; known are"):
        load_checkpoint(tmp_path)


def test_another_layout_than_asked_for(official):
    with pytest.raises(ValueError, match="is of layout 'official', asked for as 'timm'"):
        load_checkpoint(official(), "timm")


def test_weights_of_a_folder(tmp_path):
    save_checkpoint(ours(), tmp_path, "hf_models")
    with pytest.raises(ValueError, match="of a model that was saved as a folder, give the folder"):
        load_checkpoint(tmp_path / "model.safetensors")


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist: give a local model folder or a weights file"):
        load_checkpoint(tmp_path / "no.pt")


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is cut short"),
        (b"<!DOCTYPE html><html>", "is a web page, not weights"),
        (b"\n  <html>", "is a web page, not weights"),
        (b'{"error": "Invalid credentials"}', "is a JSON message, not weights"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer, not weights"),
        (b"hello, world", "is cut short"),
        (b"Entry not found", "is cut short"),
        (b"Access to this model is restricted.", "is cut short"),
    ],
)
def test_a_download_that_went_wrong(tmp_path, suffix, content, message):
    file = tmp_path / f"model.{suffix}"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(file)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_a_file_cut_short(official, share):
    file = official()
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match="is cut short"):
        load_checkpoint(file)


@pytest.mark.parametrize("save", [torch.save, lambda content, file: file.write_bytes(pickle.dumps(content))])
def test_a_pickle_with_code_is_not_run(tmp_path, save):
    class Code:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    save({"model": official_state(ours()), "extra": Code()}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match="could run code"):
        load_checkpoint(tmp_path / "code.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [torch.zeros(3), [1, 2], {"state_dict": {"a": torch.zeros(1)}}, {}])
def test_a_file_of_something_else(tmp_path, content):
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match="where a state dict, bare or as 'model', is expected"):
        load_checkpoint(tmp_path / "odd.pt")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights(official, dtype):
    """Some among others would be promoted with them, and their scales be forgotten."""

    def change(state):
        state["head.weight"] = state["head.weight"].to(dtype)

    with pytest.raises(ValueError, match=rf"holds quantised weights, head\.weight \({dtype}\); open"):
        load_checkpoint(official(change))


def test_a_quantised_folder(tmp_path):
    ours().save_pretrained(tmp_path)
    rewrite_config(tmp_path, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(ValueError, match="holds quantised weights"):
        load_checkpoint(tmp_path)


def test_any_length_of_a_header(tmp_path):
    """Writers other than safetensors' own do not pad it: its first byte may be that of a web page, or of JSON."""
    save_checkpoint(ours(), tmp_path, "timm")
    content = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    for first in (ord("<"), ord("{")):
        spaces = (first - length) % 256
        header = (length + spaces).to_bytes(8, "little") + content[8 : 8 + length] + b" " * spaces
        (tmp_path / "other.safetensors").write_bytes(header + content[8 + length :])
        load_checkpoint(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("task", "fields", "layout", "message"),
    [
        ("classifier", {"depths": [1, 1], "hidden_sizes": [8, 16]}, "timm", "timm's ConvNeXt has four stages"),
        ("classifier", {"patch_size": 2}, "timm", "patch_size is 2"),
        ("classifier", {"patch_size": 8}, "timm", "patch_size is 8"),
        ("classifier", {"hidden_act": "relu"}, "timm", "hidden_act is 'relu'"),
        ("classifier", {"hidden_act": "relu"}, "official", "hidden_act is 'relu'"),
        ("classifier", {"layer_scale_init_value": 1e-6}, "transformers", "both GRN and LayerScale"),
        ("classifier", {"layer_scale_init_value": 1e-6}, "official", "both GRN and LayerScale"),
        ("backbone", {}, "timm", "no norms of feature maps"),
        ("backbone", {}, "official", "no norms of feature maps"),
        ("classifier", {}, "official_sparse", "holds a V2 pretraining model only"),
        ("pretraining", V1, "official_sparse", "holds a V2 pretraining model only"),
        ("classifier", {}, "keras", "No layout 'keras': choose one of hf_models, transformers, timm, official"),
    ],
)
def test_saving_what_a_layout_cannot_hold(tmp_path, task, fields, layout, message):
    with pytest.raises(ValueError, match=message):
        save_checkpoint(ours(task, **fields), target(tmp_path, layout), layout)
    assert not target(tmp_path, layout).exists()


def test_saving_an_official_file_under_the_name_of_a_folder(tmp_path):
    with pytest.raises(ValueError, match=r"is one file: name it out\.pt rather than out"):
        save_checkpoint(ours(), tmp_path / "out", "official")


def test_saving_a_foreign_model(tmp_path):
    with pytest.raises(ValueError, match="this is a ConvNextV2Model"):
        save_checkpoint(ConvNextV2Model(ConvNextV2Config(**SMALL)), tmp_path, "timm")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_saving_a_model_with_an_adapter(tmp_path, layout):
    adapted = get_peft_model(ours("pretraining"), LoraConfig(target_modules=["pwconv1"], r=2)).base_model.model
    with pytest.raises(ValueError, match=r"pwconv1\.base_layer\.bias, .*: merge adapters first\.$"):
        save_checkpoint(adapted, target(tmp_path, layout), layout)
    assert not target(tmp_path, layout).exists()
    save_checkpoint(ours("pretraining"), target(tmp_path, layout), layout)
