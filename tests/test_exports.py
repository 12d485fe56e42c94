"""Graphs to run: ONNX files and exported programs compute what the model does, for any batch and size."""

import json
import re
import subprocess
import sys
import zipfile

import pytest
import torch
from convnextv2_states import V1, assert_close, ours
from llama_pair import build_pair, padded_batch, random_ids
from transformers import AutoConfig

import hf_models.convnextv2_fcmae.onnx_file as onnx_file
from hf_models.convert import convert, main
from hf_models.convnextv2_fcmae.checkpoints import save_checkpoint
from hf_models.exported_program import refuse_difference
from hf_models.llama_style.checkpoints import save_checkpoint as save_language_model

# Tracing takes a second or two a layer. Mask patches are of 8 and 4 pixels.
SHALLOW = {"depths": [1, 1], "hidden_sizes": [8, 16], "image_size": 32}
ONE_STAGE = {"depths": [1], "hidden_sizes": [8], "image_size": 32}
SIZES = ((1, 16, 16), (2, 32, 24), (5, 19, 47), (1, 64, 65))
MACHINE_PATH = re.compile(rb"/[\w.-]+/[\w./-]*\.py")
PROCESSOR = {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 32}, "crop_pct": 0.875}
# Opens every exported program of its folder, runs it on what lies beside it, and keeps what comes out.
STRANGER = """
import sys
sys.modules["hf_models"] = sys.modules["transformers"] = None  # as if they were not installed
import torch
from pathlib import Path
for file in sorted(Path().glob("*.pt2")):
    program = torch.export.load(file).module()
    inputs = torch.load(file.with_suffix(".inputs"))
    torch.save([program(**arguments) for arguments in inputs], file.with_suffix(".outputs"))
"""


def images_of(sizes=SIZES):
    return [torch.randn(batch, 3, height, width) for batch, height, width in sizes]


def run_onnx(folder, images, *names):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_inputs()] == ["pixel_values"]
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    assert [one.name for one in session.get_outputs()] == list(names)
    return [torch.from_numpy(array) for array in session.run(None, {"pixel_values": images.numpy()})]


@pytest.fixture(scope="module")
def classifier():
    return ours(**SHALLOW, id2label={number: f"kind {number}" for number in range(5)})


@pytest.fixture(scope="module")
def classifier_folders(classifier, tmp_path_factory):
    """Where it lies in our layout, and what convert makes of that for ONNX."""
    pytest.importorskip("onnxscript")
    source = tmp_path_factory.mktemp("classifier") / "ours"
    classifier.save_pretrained(source)
    (source / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    convert(source, source.with_name("onnx"), "onnx")
    return source, source.with_name("onnx")


class TestOnnx:
    def test_a_classifier_gives_our_logits(self, classifier, classifier_folders):
        _, folder = classifier_folders
        # A last stage of one cell too: there are no guards in an ONNX file.
        for images in images_of((*SIZES, (1, 8, 8))):
            [logits] = run_onnx(folder, images, "logits")
            with torch.no_grad():
                assert_close(logits, classifier(images).logits)

    def test_the_folder_holds_what_users_of_onnx_read(self, classifier_folders):
        _, folder = classifier_folders
        assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.onnx", "preprocessor_config.json"]
        assert json.loads((folder / "preprocessor_config.json").read_text()) == PROCESSOR
        config = AutoConfig.from_pretrained(folder)
        assert (config.model_type, config.architectures) == ("convnextv2", ["ConvNextV2ForImageClassification"])
        assert config.id2label[3] == "kind 3"
        assert not MACHINE_PATH.search((folder / "model.onnx").read_bytes())

    def test_large_weights_lie_beside_the_graph(self, tmp_path, monkeypatch, caplog):
        """Of a pretraining model the encoder, in float32; its pooled output has a norm without weights."""
        monkeypatch.setattr(onnx_file, "LARGEST_WEIGHTS", 1000)
        model = ours("pretraining", **ONE_STAGE | V1).to(torch.bfloat16).train()
        save_checkpoint(model, tmp_path / "first", "onnx")
        assert model.training
        assert model.dtype == torch.bfloat16
        assert "The layout 'onnx' has no decoder: left out are decoder.mask_token" in caplog.text
        (tmp_path / "first").rename(tmp_path / "moved")
        assert (tmp_path / "moved" / "model.onnx.data").is_file()
        assert AutoConfig.from_pretrained(tmp_path / "moved").architectures == ["ConvNextModel"]
        images = torch.randn(1, 3, 20, 36)
        last, pooled = run_onnx(tmp_path / "moved", images, "last_hidden_state", "pooler_output")
        with torch.no_grad():
            expected = model.float().eval().convnextv2(images).last_hidden_state
        assert_close(last, expected)
        assert_close(pooled, torch.nn.functional.layer_norm(expected.mean((-2, -1)), [8], eps=1e-6))

    def test_without_onnx_it_says_what_to_install(self, classifier_folders, tmp_path, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "onnxscript", None)
        monkeypatch.setattr(sys, "argv", ["convert", str(classifier_folders[0]), str(tmp_path / "out"), "--to", "onnx"])
        with pytest.raises(SystemExit):
            main()
        assert "The layout 'onnx' needs onnxscript: `pip install 'hf_models[export]'`." in capsys.readouterr().err
        assert not list(tmp_path.iterdir())


def test_programs_run_where_neither_we_nor_transformers_are(classifier, tmp_path):
    """The one of images, and that of text with and without padding; the weights of a tied head are stored once."""
    language_model, _ = build_pair(tie_word_embeddings=True)
    ids, mask = padded_batch("right")
    texts = [{"input_ids": ids, "attention_mask": mask}]
    for shape in ((1, 1), (4, 30), (1, 64)):
        texts.append({"input_ids": random_ids(*shape), "attention_mask": torch.ones(shape, dtype=torch.long)})
    pictures = [{"pixel_values": images} for images in images_of()]
    save_checkpoint(classifier, tmp_path / "images.pt2", "torch_export")
    save_language_model(language_model, tmp_path / "text.pt2", "torch_export")
    torch.save(pictures, tmp_path / "images.inputs")
    torch.save(texts, tmp_path / "text.inputs")

    done = subprocess.run([sys.executable, "-c", STRANGER], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, model, inputs in (("images", classifier, pictures), ("text", language_model, texts)):
        for arguments, outputs in zip(inputs, torch.load(tmp_path / f"{name}.outputs"), strict=True):
            with torch.no_grad():
                expected = model(**arguments).logits
            assert outputs.keys() == {"logits"}
            if name == "text":  # what stands at a padding token means nothing
                kept = arguments["attention_mask"].bool()
                assert_close(outputs["logits"][kept], expected[kept])
            else:
                assert_close(outputs["logits"], expected)
        with zipfile.ZipFile(tmp_path / f"{name}.pt2") as archive:
            content = {entry: archive.read(entry) for entry in archive.namelist()}
        assert not any(MACHINE_PATH.search(data) for data in content.values())
    embeddings = language_model.model.embed_tokens.weight.detach().numpy().tobytes()
    assert sum(data == embeddings for data in content.values()) == 1


def test_a_backbones_program_gives_its_feature_maps(tmp_path):
    model = ours("backbone", **ONE_STAGE, out_features=["stem", "stage1"])
    save_checkpoint(model, tmp_path / "maps.pt2", "torch_export")
    images = torch.randn(2, 3, 40, 24)
    with torch.no_grad():
        found = torch.export.load(tmp_path / "maps.pt2").module()(pixel_values=images)
        expected = model(images).feature_maps
    assert list(found) == ["stem", "stage1"]
    for one, other in zip(found.values(), expected, strict=True):
        assert_close(one, other)


class TestRefusals:
    def test_what_is_no_file(self, classifier, tmp_path):
        with pytest.raises(ValueError, match=r"'torch_export' is one file: name it model\.pt2 rather than model\."):
            save_checkpoint(classifier, tmp_path / "model", "torch_export")

    def test_frequencies_that_depend_on_the_length(self, tmp_path):
        model, _ = build_pair(rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
        with pytest.raises(ValueError, match=r"rope_type is 'dynamic', whose frequencies depend on the length"):
            save_language_model(model, tmp_path / "text.pt2", "torch_export")

    def test_a_language_model_as_onnx(self, tmp_path):
        build_pair()[0].save_pretrained(tmp_path / "source")
        (tmp_path / "source" / "model.safetensors").write_bytes(b"")  # refused before it is read
        with pytest.raises(ValueError, match="is a language model, which has no layout 'onnx': choose one of"):
            convert(tmp_path / "source", tmp_path / "out", "onnx")

    @pytest.mark.parametrize("name", ["model.pt2", "model.onnx"])
    def test_a_graph_as_source(self, tmp_path, name):
        file = tmp_path / "source" / name
        file.parent.mkdir()
        file.write_bytes(b"")
        (file.parent / "config.json").write_text('{"model_type": "convnextv2"}')
        for source in (file, file.parent):
            with pytest.raises(ValueError, match=rf"{file} is a graph to run, and no model can be made of it"):
                convert(source, tmp_path / "out", "hf_models")

    def test_another_result_than_the_models(self):
        expected = {"logits": torch.tensor([[1.0, -400.0]])}
        refuse_difference("It", {"logits": expected["logits"] + 0.03}, expected)
        for wrong in (expected["logits"] + 0.05, expected["logits"] * torch.nan):
            with pytest.raises(ValueError, match="It computes another logits than the model: the difference is"):
                refuse_difference("It", {"logits": wrong}, expected)
