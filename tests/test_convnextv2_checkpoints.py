"""ConvNeXt checkpoints of transformers, timm and the official repositories hold the same model as ours."""

import argparse
import json

import pytest
import timm
import torch
from convnextv2_states import (
    OURS,
    SMALL,
    V1,
    assert_close,
    assert_same_tensors,
    official_state,
    ours,
    pixels,
    randomised,
    sparse_state,
    target,
)
from folder_edits import rewrite_config
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from timm.models.convnext import checkpoint_filter_fn
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    ConvNextBackbone,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextModel,
    ConvNextV2Backbone,
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    ConvNextV2Model,
)

from hf_models.convnextv2_fcmae import (
    ConvNextV2FcmaeBackbone,
    ConvNextV2FcmaeConfig,
    ConvNextV2FcmaeForImageClassification,
    ConvNextV2FcmaeForPreTraining,
    ConvNextV2FcmaeModel,
)
from hf_models.convnextv2_fcmae.checkpoints import load_checkpoint, save_checkpoint
from hf_models.convnextv2_fcmae.key_maps import their_name, to_their_form
from hf_models.convnextv2_fcmae.sizes import SIZES
from hf_models.convnextv2_fcmae.timm_folder import write_timm_config

VARIANTS = {
    "v2": {},
    "v1": V1,
    "v1 without LayerScale": {"use_grn": False},
    "grey, stem of 3": {"num_channels": 1, "patch_size": 3, "image_size": 96},
    "three stages, stem of 2": {"depths": [1, 2, 1], "hidden_sizes": [8, 12, 16], "patch_size": 2, "image_size": 64},
}
LAYOUTS = ("hf_models", "transformers", "timm", "official", "official_sparse")


def cases_that_a_layout_holds():
    """Layout, task and variant; what is left out here is refused (`test_convnextv2_checkpoint_refusals.py`)."""
    for layout in LAYOUTS:
        for task in OURS:
            for name, fields in VARIANTS.items():
                if layout == "timm" and len(fields.get("depths", SMALL["depths"])) != 4:
                    continue
                if layout in ("timm", "official", "official_sparse") and task == "backbone":
                    continue
                if layout == "official_sparse" and (task != "pretraining" or not fields.get("use_grn", True)):
                    continue
                yield pytest.param(layout, task, fields, id=f"{layout}, {task}, {name}")


@pytest.mark.parametrize(("layout", "task", "fields"), cases_that_a_layout_holds())
def test_round_trip_is_bit_equal(tmp_path, layout, task, fields):
    model = ours(task, **fields).to(torch.bfloat16 if fields == V1 else torch.float32)
    model = model.to(memory_format=torch.channels_last)  # as a training run may leave it
    config = model.config
    path = target(tmp_path, layout)
    save_checkpoint(model, path, layout)
    for asked in ("auto", layout):
        again = load_checkpoint(path, asked)
        assert not again.training
        expected = model.state_dict()
        if task == "pretraining" and layout in ("transformers", "timm"):
            # The encoder alone, with a final norm that is new.
            assert type(again) is ConvNextV2FcmaeModel
            expected = {n.removeprefix("convnextv2."): t for n, t in expected.items() if not n.startswith("decoder.")}
            expected["layernorm.weight"] = torch.ones(config.hidden_sizes[-1], dtype=model.dtype)
            expected["layernorm.bias"] = torch.zeros(config.hidden_sizes[-1], dtype=model.dtype)
        else:
            assert type(again) is type(model)
        assert_same_tensors(again.state_dict(), expected)
        for field in ("depths", "hidden_sizes", "num_channels", "patch_size", "use_grn", "layer_scale_init_value"):
            assert getattr(again.config, field) == getattr(config, field)


@pytest.mark.parametrize("name", SIZES)
def test_names_and_shapes_of_every_size_are_timms_and_the_official_ones(tmp_path, name):
    config = ConvNextV2FcmaeConfig(**SIZES[name].config, num_labels=1000)
    with torch.device("meta"):
        model = ConvNextV2FcmaeForImageClassification(config)
    family, size = ("convnext", name.removeprefix("v1_")) if name.startswith("v1_") else ("convnextv2", name)
    reference = timm.create_model(f"{family}_{size}", device="meta").state_dict()
    conv_mlp = write_timm_config(tmp_path, config, "classifier")
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architecture"] == f"{family}_{size}"
    assert written["model_args"] == {}
    state = {name.removeprefix("convnextv2."): tensor for name, tensor in model.state_dict().items()}
    in_timm = {their_name(n, "timm"): to_their_form(n, tensor, "timm", conv_mlp).shape for n, tensor in state.items()}
    assert in_timm == {name: tensor.shape for name, tensor in reference.items()}
    assert {their_name(name, "official") for name in state} == official_state(model).keys()


class TestTransformers:
    @pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
    def test_classifiers_and_back(self, tmp_path, fields):
        fields = SMALL | fields
        use_grn, layer_scale = fields.pop("use_grn", True), fields.pop("layer_scale_init_value", 0.0)
        fields["num_stages"] = len(fields["depths"])
        fields["id2label"] = {number: f"kind {number}" for number in range(fields.pop("num_labels"))}
        if use_grn:
            reference = ConvNextV2ForImageClassification(ConvNextV2Config(**fields))
        else:
            reference = ConvNextForImageClassification(ConvNextConfig(**fields, layer_scale_init_value=layer_scale))
        randomised(reference).save_pretrained(tmp_path / "theirs")
        model = load_checkpoint(tmp_path / "theirs")
        assert type(model) is ConvNextV2FcmaeForImageClassification
        assert model.config.layer_norm_eps == reference.config.layer_norm_eps == 1e-12

        images = pixels(reference, size=96)
        with torch.no_grad():
            expected = reference(images, output_hidden_states=True)
            found = model(images, output_hidden_states=True)
        assert_close(found.logits, expected.logits)
        for one, other in zip(found.hidden_states, expected.hidden_states, strict=True):
            assert_close(one, other)

        save_checkpoint(model, tmp_path / "back", "transformers")
        again = AutoModelForImageClassification.from_pretrained(tmp_path / "back")
        assert type(again) is type(reference)
        assert_same_tensors(again.state_dict(), reference.state_dict())
        theirs, back = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "back"))
        assert theirs == back  # labels, eps, stages: nothing of ours, nothing lost

    @pytest.mark.parametrize(
        ("family", "config_class"), [(ConvNextV2Model, ConvNextV2Config), (ConvNextModel, ConvNextConfig)]
    )
    def test_base_models(self, tmp_path, family, config_class):
        reference = randomised(family(config_class(**SMALL)))
        reference.save_pretrained(tmp_path / "theirs")
        model = load_checkpoint(tmp_path / "theirs", "transformers")
        assert type(model) is ConvNextV2FcmaeModel
        images = pixels()
        with torch.no_grad():
            assert_close(model(images).pooler_output, reference(images).pooler_output)
        save_checkpoint(model, tmp_path / "back", "transformers")
        assert_same_tensors(AutoModel.from_pretrained(tmp_path / "back").state_dict(), reference.state_dict())

    @pytest.mark.parametrize(
        ("family", "config_class"), [(ConvNextV2Backbone, ConvNextV2Config), (ConvNextBackbone, ConvNextConfig)]
    )
    def test_backbones(self, tmp_path, family, config_class):
        reference = randomised(family(config_class(**SMALL, out_features=["stage2", "stage4"])))
        reference.save_pretrained(tmp_path / "theirs")
        model = load_checkpoint(tmp_path / "theirs")
        assert type(model) is ConvNextV2FcmaeBackbone
        images = pixels()
        with torch.no_grad():
            for one, other in zip(model(images).feature_maps, reference(images).feature_maps, strict=True):
                assert_close(one, other)
        save_checkpoint(model, tmp_path / "back", "transformers")
        again = family.from_pretrained(tmp_path / "back")
        assert again.out_features == ["stage2", "stage4"]
        assert_same_tensors(again.state_dict(), reference.state_dict())

    def test_sharded(self, tmp_path):
        reference = randomised(ConvNextV2Model(ConvNextV2Config(**SMALL)))
        reference.save_pretrained(tmp_path, max_shard_size="30KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
        assert_same_tensors(load_checkpoint(tmp_path).state_dict(), reference.state_dict())


class TestTimm:
    REFERENCES = {
        "v2, convolutions": ("convnextv2_atto", {}),
        "v2, linear layers": ("convnextv2_tiny", {}),
        "v1, linear layers": ("convnext_tiny", {}),
        "v1, convolutions": ("convnext_atto", {}),
        "grey, stem of 3": ("convnextv2_atto", {"in_chans": 1, "patch_size": 3}),
        "GRN and LayerScale": ("convnextv2_atto", {"ls_init_value": 1e-4}),
        "neither": ("convnext_atto", {"ls_init_value": None}),
    }

    @staticmethod
    def reference(name="convnextv2_atto", **fields):
        small = {"depths": SMALL["depths"], "dims": SMALL["hidden_sizes"], "num_classes": SMALL["num_labels"]}
        return randomised(timm.create_model(name, **small | fields))

    @pytest.mark.parametrize(("name", "fields"), REFERENCES.values(), ids=REFERENCES)
    def test_classifiers_and_back(self, tmp_path, name, fields):
        reference = self.reference(name, **fields)
        save_for_hf(reference, tmp_path / "theirs", safe_serialization=True)
        model = load_checkpoint(tmp_path / "theirs")
        images = pixels(3 if "in_chans" not in fields else model, size=96)
        with torch.no_grad():
            assert_close(model(images).logits, reference(images))
            assert_close(model.convnextv2(images).last_hidden_state, reference.forward_features(images))
            save_checkpoint(model, tmp_path / "back", "timm")
            again = timm.create_model(f"local-dir:{tmp_path / 'back'}", pretrained=True).eval()
            assert_close(again(images), reference(images))
        for key, tensor in again.state_dict().items():
            # A size without a name gets convolutions, whatever it had.
            assert torch.equal(tensor, reference.state_dict()[key].reshape(tensor.shape))

    def test_a_bare_file_of_weights(self, tmp_path):
        reference = self.reference()
        save_file(reference.state_dict(), tmp_path / "timm.safetensors")
        torch.save(reference.state_dict(), tmp_path / "timm.pth")
        images = pixels()
        for file in ("timm.safetensors", "timm.pth"):
            with torch.no_grad():
                assert_close(load_checkpoint(tmp_path / file)(images).logits, reference(images))

    def test_the_real_atto_keeps_name_and_form(self, tmp_path):
        reference = randomised(timm.create_model("convnextv2_atto"))
        save_for_hf(reference, tmp_path / "theirs", safe_serialization=True)
        save_checkpoint(load_checkpoint(tmp_path / "theirs"), tmp_path / "back", "timm")
        assert_same_tensors(load_file(tmp_path / "back" / "model.safetensors"), reference.state_dict())
        config = json.loads((tmp_path / "back" / "config.json").read_text())
        assert (config["architecture"], config["model_args"]) == ("convnextv2_atto", {})

    def test_features_only_and_another_number_of_classes(self, tmp_path):
        model = ours()
        save_checkpoint(model, tmp_path, "timm")
        tuned = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3).eval()
        images = pixels()
        with torch.no_grad():
            assert tuned(images).shape == (2, 3)
            assert_close(tuned.forward_features(images), model.convnextv2(images).last_hidden_state)

    def test_a_pretrained_encoder_opens_in_timm(self, tmp_path, caplog):
        model = ours("pretraining")
        save_checkpoint(model, tmp_path, "timm")
        assert "has no decoder: left out are decoder.mask_token" in caplog.text
        encoder = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        images = pixels()
        with torch.no_grad():
            assert_close(encoder.forward_features(images), model.convnextv2(images).last_hidden_state)

    def test_a_folder_of_an_older_timm(self, tmp_path):
        """One level, with the labels in it, and no arguments: the sizes are the architecture's."""
        reference = randomised(timm.create_model("convnextv2_atto", num_classes=2))
        save_file(reference.state_dict(), tmp_path / "model.safetensors")
        config = {
            "architecture": "convnextv2_atto",
            "num_classes": 2,
            "input_size": [3, 96, 96],
            "labels": ["a", "b"],
        }
        (tmp_path / "config.json").write_text(json.dumps(config))
        model = load_checkpoint(tmp_path)
        assert model.config.image_size == 96
        assert model.config.id2label == {0: "a", 1: "b"}
        images = pixels()
        with torch.no_grad():
            assert_close(model(images).logits, reference(images))

    def test_label_names(self, tmp_path):
        names = {number: f"kind {number}" for number in range(5)}
        save_checkpoint(ours(id2label=names), tmp_path, "timm")
        config = load_checkpoint(tmp_path).config
        assert config.id2label == names
        assert config.label2id == {name: number for number, name in names.items()}

    def test_labels_with_gaps(self, tmp_path):
        save_checkpoint(ours(), tmp_path, "timm")
        rewrite_config(tmp_path, label_names={"0": "a", "3": "b"})
        assert list(load_checkpoint(tmp_path).config.id2label.values()) == ["a", "LABEL_1", "LABEL_2", "b", "LABEL_4"]


class TestOfficial:
    @pytest.mark.parametrize("fields", [{}, V1], ids=["v2", "v1"])
    @pytest.mark.parametrize("old_format", [False, True])
    def test_dense_names_in_both_directions(self, tmp_path, fields, old_format):
        model = ours(**fields)
        new = not old_format
        torch.save({"model": official_state(model)}, tmp_path / "theirs.pth", _use_new_zipfile_serialization=new)
        torch.save(official_state(model), tmp_path / "bare.pt", _use_new_zipfile_serialization=new)
        for file in ("theirs.pth", "bare.pt"):
            assert_same_tensors(load_checkpoint(tmp_path / file).state_dict(), model.state_dict())
        save_checkpoint(model, tmp_path / "ours.pt", "official")
        written = torch.load(tmp_path / "ours.pt", weights_only=True)
        assert written.keys() == {"model"}
        assert_same_tensors(written["model"], official_state(model))

    @pytest.mark.parametrize("name", ["convnextv2_atto", "convnext_tiny"])
    def test_timms_own_converter_reads_it(self, tmp_path, name):
        model = ours(**({} if name == "convnextv2_atto" else V1))
        save_checkpoint(model, tmp_path / "ours.pt", "official")
        reference = TestTimm.reference(name)
        state = torch.load(tmp_path / "ours.pt", weights_only=True)
        reference.load_state_dict(checkpoint_filter_fn(state, reference))
        images = pixels()
        with torch.no_grad():
            assert_close(model(images).logits, reference(images))

    def test_sparse_in_both_directions(self, tmp_path):
        model = ours("pretraining", decoder_num_hidden_layers=2)
        # As the scripts save it: optimiser and arguments beside the model.
        content = {"model": sparse_state(model), "epoch": 3, "args": argparse.Namespace(lr=1.5e-4, output_dir=None)}
        torch.save(content, tmp_path / "theirs.pth")
        again = load_checkpoint(tmp_path / "theirs.pth", "official_sparse")
        assert type(again) is ConvNextV2FcmaeForPreTraining
        assert_same_tensors(again.state_dict(), model.state_dict())
        noise, images = torch.rand(2, 9), pixels(size=96)
        with torch.no_grad():
            assert torch.equal(again(images, noise=noise).loss, model(images, noise=noise).loss)
        save_checkpoint(model, tmp_path / "ours.pth", "official_sparse")
        assert_same_tensors(torch.load(tmp_path / "ours.pth", weights_only=True)["model"], sparse_state(model))

    @pytest.mark.parametrize("form", [official_state, sparse_state])
    def test_an_encoder_alone_loads_with_its_norm_reported_as_new(self, tmp_path, caplog, form):
        model = ours("pretraining")
        encoder = {name: t for name, t in form(model).items() if "stages." in name or "downsample" in name}
        torch.save({"model": encoder}, tmp_path / "encoder.pt")
        caplog.clear()
        again = load_checkpoint(tmp_path / "encoder.pt")
        assert type(again) is ConvNextV2FcmaeModel
        assert "holds an encoder only: layernorm.weight, layernorm.bias are new" in caplog.text
        images = pixels()
        with torch.no_grad():
            expected = model.convnextv2(images).last_hidden_state
            found = again(images)
        assert torch.equal(found.last_hidden_state, expected)
        pooled = torch.nn.functional.layer_norm(expected.mean((-2, -1)), [32], eps=1e-6)
        assert_close(found.pooler_output, pooled)

    def test_grn_as_the_released_encoders_have_it(self, tmp_path):
        """Dense names and kernels with GRN of (1, channels): some releases were converted half-way."""
        model = ours("encoder")
        state = official_state(model)
        torch.save({n: t.reshape(1, -1) if ".grn." in n else t for n, t in state.items()}, tmp_path / "half.pt")
        assert_same_tensors(load_checkpoint(tmp_path / "half.pt").state_dict(), model.state_dict())

    def test_the_model_outlives_its_file(self, tmp_path):
        model = ours()
        save_checkpoint(model, tmp_path / "model.pt", "official")
        again = load_checkpoint(tmp_path / "model.pt")
        (tmp_path / "model.pt").write_bytes(b"")
        assert_same_tensors(again.state_dict(), model.state_dict())

    def test_mixed_dtypes_lose_nothing(self, tmp_path):
        """A head in half precision, and bfloat16 beside float16: float32 holds all of it."""
        state = official_state(ours())
        for name, tensor in state.items():
            state[name] = tensor.to(torch.bfloat16 if name.startswith("head.") else torch.float16)
        torch.save(state, tmp_path / "mixed.pt")
        found = load_checkpoint(tmp_path / "mixed.pt")
        assert_same_tensors(official_state(found), {name: tensor.float() for name, tensor in state.items()})

    def test_averaged_weights_are_mentioned(self, tmp_path, caplog):
        state = official_state(ours())
        torch.save({"model": state, "model_ema": state}, tmp_path / "both.pt")
        load_checkpoint(tmp_path / "both.pt")
        assert "holds averaged weights (model_ema) too" in caplog.text
