"""A saved folder stands alone: it opens where hf_models cannot be imported, by every Auto class, whoever saved it."""

import json
import subprocess
import sys

import pytest
import torch
from llama_pair import TINY, random_ids
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_models import LlamaStyleConfig, LlamaStyleForCausalLM, LlamaStyleForSequenceClassification, LlamaStyleModel

CLASSES = {
    "AutoModel": LlamaStyleModel,
    "AutoModelForCausalLM": LlamaStyleForCausalLM,
    "AutoModelForSequenceClassification": LlamaStyleForSequenceClassification,
}
FILES = {
    "chunked_loss_llama_style.py",
    "config.json",
    "configuration_llama_style.py",
    "model.safetensors",
    "modeling_llama_style.py",
}
# Runs in a fresh process, in another folder, without this package: opens every folder in `saved` with every Auto class,
# keeps what each computes, generates and trains a step, and saves each model again with what it was given.
STRANGER = """
import pathlib, sys
sys.modules["hf_models"] = None  # importing it is an ImportError
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

saved, resaved = map(pathlib.Path, sys.argv[1:])
input_ids = torch.load(saved / "input_ids.pt")
outputs = {}
for folder in saved.glob("AutoModel*"):
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == "llama_style"
    for auto_class in AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification:
        model = auto_class.from_pretrained(folder, trust_remote_code=True)
        with torch.no_grad():
            outputs[folder.name, auto_class.__name__] = model(input_ids, return_dict=False)[0]
        if auto_class is AutoModelForCausalLM:
            model.generate(input_ids, max_new_tokens=3)
            model.train()(input_ids, labels=input_ids).loss.backward()
        if folder.name == auto_class.__name__:
            model.save_pretrained(resaved / folder.name)
torch.save(outputs, resaved / "outputs.pt")
"""


def opened_by_a_stranger(saved, resaved, input_ids) -> dict:
    """The first output of each (class saved, class opened), computed by a process that cannot import hf_models."""
    torch.save(input_ids, saved / "input_ids.pt")
    resaved.mkdir()
    process = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, saved, resaved], cwd=resaved, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    return torch.load(resaved / "outputs.pt")


def assert_whole(folder):
    assert {file.name for file in folder.iterdir()} - {"generation_config.json"} == FILES
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"].keys() == {"AutoConfig", "AutoModelForDecision", *CLASSES}


def test_a_folder_opens_without_the_package(tmp_path, monkeypatch):
    # Remote code is imported from a cache under HF_HOME: an old one must not answer for what is saved now.
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf_home"))
    input_ids = random_ids(1, 12)
    saved, resaved = tmp_path / "saved", tmp_path / "resaved"
    models = {name: model_class(LlamaStyleConfig(**TINY)).eval() for name, model_class in CLASSES.items()}
    for name, model in models.items():
        model.save_pretrained(saved / name)
        assert_whole(saved / name)

    outputs = opened_by_a_stranger(saved, resaved, input_ids)
    for name, model in models.items():
        with torch.no_grad():
            torch.testing.assert_close(outputs[name, name], model(input_ids, return_dict=False)[0])
            torch.testing.assert_close(outputs[name, "AutoModel"], model.base_model(input_ids).last_hidden_state)
        assert_whole(resaved / name)

    # What the stranger saved opens for the next one.
    again = opened_by_a_stranger(resaved, tmp_path / "resaved_again", input_ids)
    for name in CLASSES:
        assert torch.equal(again[name, name], outputs[name, name])


@pytest.mark.parametrize("name", CLASSES)
def test_here_the_registered_classes_open_it(tmp_path, name):
    CLASSES[name](LlamaStyleConfig(**TINY)).save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is LlamaStyleConfig
    for auto_class in AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification:
        assert type(auto_class.from_pretrained(tmp_path)) is CLASSES[auto_class.__name__]
