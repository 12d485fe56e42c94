"""What may go to the Hub: planted pickles, paths, tokens and imports are found, by file and line; the rest passes."""

import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hub_cards.folder_checks import list_files, problems_of

CODE = "import json\nimport torch\nfrom transformers import PreTrainedModel\n"
TOKEN = "hf_" + "aB3dE6gH9j" * 4


@pytest.fixture
def folder(tmp_path):
    """A small folder with which nothing is wrong."""
    folder = tmp_path / "model"
    (folder / "card_assets").mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps({"auto_map": {"AutoModel": "modeling_tiny.Tiny", "AutoConfig": "configuration_tiny.TinyConfig"}})
    )
    (folder / "configuration_tiny.py").write_text(CODE)
    (folder / "modeling_tiny.py").write_text(CODE + "from .configuration_tiny import TinyConfig\n")
    (folder / "README.md").write_text("# Tiny\n\nSee https://example.com/home/user/page and runs/tiny/model.\n")
    (folder / "card_assets" / "loss.png").write_bytes(b"\x89PNG\r\n\x1a\n rest")
    save_file({"layer.weight": torch.ones(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def problems(folder: Path) -> list[str]:
    return list(problems_of(folder, list_files(folder).files, folder))


def the_problem(folder: Path) -> str:
    found = problems(folder)
    assert len(found) == 1, found
    return found[0]


def test_a_folder_with_which_nothing_is_wrong_passes(folder):
    assert problems(folder) == []


def test_what_training_keeps_for_itself_is_left_out(folder):
    for name in ("checkpoint-20/optimizer.pt", "adapter_initial/x.safetensors", "runs/events.1", "run.json.partial"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    listing = list_files(folder)
    assert set(listing.left_out) == {"checkpoint-20/", "adapter_initial/", "runs/", "run.json.partial"}
    assert "model.safetensors" in listing.files
    assert "card_assets/loss.png" in listing.files
    assert problems(folder) == []


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "data.npy", "vocab.txt", "model-2.safetensors"])
def test_a_pickle_is_refused_whatever_its_name(folder, name):
    (folder / name).write_bytes(pickle.dumps({"weight": [1.0]}))
    assert the_problem(folder).startswith(f"{name}: is a pickle")


def test_a_pickle_in_an_archive_is_refused(folder):
    torch.save({"weight": torch.ones(1)}, folder / "extra.json")
    assert the_problem(folder).startswith("extra.json: is a pickle")
    assert zipfile.is_zipfile(folder / "extra.json")


def test_optimizer_states_are_refused(folder):
    save_file({"layer.weight.exp_avg": torch.ones(2)}, folder / "other.safetensors")
    assert "layer.weight.exp_avg, which is a state of an optimizer" in the_problem(folder)
    (folder / "other.safetensors").unlink()
    (folder / "optimizer.safetensors").write_bytes(b"x")
    assert the_problem(folder).startswith("optimizer.safetensors: is a state of the training")


@pytest.mark.parametrize(
    "path",
    [
        "/home/someone/models/base",
        "/root/.cache/thing",
        "/Users/someone/run",
        "/mnt/disks/data/corpus",
        "/tmp/xyz/model",
        r"C:\\Users\\someone",
        "file:///srv/data",
    ],
)
def test_a_path_of_a_machine_is_refused_with_file_and_line(folder, path):
    (folder / "tokenizer_config.json").write_text(f'{{\n  "a": 1,\n  "name_or_path": "{path}"\n}}\n')
    assert the_problem(folder).startswith("tokenizer_config.json, line 3: holds a machine's path")


def test_the_folders_own_place_is_refused_also_where_a_path_may_be_a_token(folder):
    (folder / "tokenizer.json").write_text(json.dumps({"vocab": {"/home/someone/x": 0}}))
    assert problems(folder) == []
    (folder / "tokenizer.json").write_text(json.dumps({"vocab": {str(folder.resolve()): 0}}))
    assert the_problem(folder).startswith("tokenizer.json, line 1: holds a path of this machine")


def test_a_path_in_the_header_of_weights_is_refused(folder):
    save_file({"a": torch.ones(1)}, folder / "model.safetensors", metadata={"from": "/home/someone/base"})
    assert the_problem(folder).startswith("model.safetensors: its header holds a machine's path")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (TOKEN, "a Hugging Face token"),
        ("ghp_" + "a1B2" * 9, "a GitHub token"),
        ("sk-proj-" + "a1B2" * 8, "an API key"),
        ("AKIA" + "ABCD1234" * 2, "an AWS key"),
        ("-----BEGIN RSA PRIVATE KEY-----", "a private key"),
        ("https://someone:verysecret@example.com/repo", "a password in an address"),
        ('api_key = "0123456789abcdef"', "a value that is called a secret"),
    ],
)
def test_a_token_is_refused_with_file_and_line_and_not_shown(folder, text, what):
    with (folder / "README.md").open("a") as card:
        card.write(f"last line {text}\n")
    problem = the_problem(folder)
    assert problem == f"README.md, line 4: holds {what}: remove it."
    assert text not in problem


def test_the_users_own_secrets_are_looked_for_everywhere(folder, monkeypatch):
    monkeypatch.setenv("SOME_SERVICE_TOKEN", "plain-looking-value")
    (folder / "tokenizer.json").write_text('{"x": "plain-looking-value"}')
    problem = the_problem(folder)
    assert problem == "tokenizer.json, line 1: holds the value of SOME_SERVICE_TOKEN: remove it."


@pytest.mark.parametrize(
    "line",
    [
        "import einops",
        "from hf_models.llama_style import LlamaStyleModel",
        "    import numpy as np",
        "import importlib; importlib.import_module('timm.layers')",
    ],
)
def test_a_foreign_import_is_refused_with_file_and_line(folder, line):
    body = f"def late():\n{line}\n" if line.startswith(" ") else f"\n{line}\n"
    (folder / "modeling_tiny.py").write_text(CODE + body)
    assert the_problem(folder).startswith("modeling_tiny.py, line 5: imports ")


@pytest.mark.parametrize(
    "line", ["import pickle", "from _pickle import loads", "torch.load('x')", "torch.load('x', weights_only=False)"]
)
def test_code_that_opens_pickles_is_refused(folder, line):
    (folder / "modeling_tiny.py").write_text(f"{CODE}{line}\n")
    assert the_problem(folder).startswith("modeling_tiny.py, line 4: ")


@pytest.mark.parametrize(
    "line",
    [
        "x = __import__('numpy')",
        "exec('import numpy')",
        "import importlib; importlib.import_module(name)",
        "from importlib import import_module as im",
    ],
)
def test_code_that_hides_what_it_imports_is_refused(folder, line):
    (folder / "modeling_tiny.py").write_text(f"{CODE}{line}\n")
    assert the_problem(folder).startswith("modeling_tiny.py, line 4: ")


def test_what_models_and_files_are_evaluated_with_is_no_hidden_import(folder):
    (folder / "modeling_tiny.py").write_text(
        "#!/usr/bin/env python\nimport re\nimport torch\nmodel.eval()\ntorch.compile(model)\nre.compile('x')\n"
        "torch.load('x', weights_only=True)\n"
    )
    assert problems(folder) == []


@pytest.mark.parametrize("name", ["spiece.model", "model.gguf", "model.onnx"])
def test_an_old_pickle_under_a_name_of_weights_is_refused(folder, name):
    (folder / name).write_bytes(pickle.dumps({"weight": [1.0]}, protocol=0))
    assert the_problem(folder).startswith(f"{name}: is ")


def test_tokens_are_found_in_names_pictures_and_vocabularies(folder):
    (folder / f"{TOKEN}.txt").write_text("x")
    assert the_problem(folder).startswith(f"{TOKEN}.txt: its name holds a Hugging Face token")
    (folder / f"{TOKEN}.txt").unlink()
    (folder / "card_assets" / "loss.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00tEXtkey\x00 " + TOKEN.encode())
    assert the_problem(folder).startswith("card_assets/loss.png: holds a Hugging Face token")
    (folder / "card_assets" / "loss.png").unlink()
    (folder / "tokenizer.json").write_text(json.dumps({"vocab": {TOKEN: 0}}))
    assert the_problem(folder).startswith("tokenizer.json, line 1: holds a Hugging Face token")


@pytest.mark.parametrize(
    "spelled", [r"\/home\/alice\/x", r"\u002fhome\u002falice", r"D:\\models\\base", "/projects/me/x"]
)
def test_a_path_is_found_however_json_spells_it(folder, spelled):
    (folder / "run.json").write_text(f'{{\n"status": "finished",\n"_name_or_path": "{spelled}"\n}}')
    assert "run.json" in the_problem(folder)
    assert "machine's path" in the_problem(folder)


def test_what_is_no_secret_passes(folder):
    (folder / "README.md").write_text(
        'The en-sk-translation-model-large-v2, with `api_key = "YOUR_API_KEY_HERE"`, HF_TOKEN=hf_' + "x" * 34 + ".\n\n"
        "```text\ncd /home/someone/project\n```\n"
    )
    (folder / "run.json").write_text(json.dumps({"samples": [{"text": "#!/usr/bin/env python\ncd /home/someone/x"}]}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"prompt": "Q:\nA:\nB:\n", "eos_token": "<|im_end|>"}))
    assert problems(folder) == []


@pytest.mark.parametrize("line", ["from . import configuration_tiny", "from ..up import x", "from .sub.mod import x"])
def test_relative_imports_that_transformers_does_not_follow_are_refused(folder, line):
    (folder / "modeling_tiny.py").write_text(f"{line}\n")
    assert the_problem(folder).startswith("modeling_tiny.py, line 1: a relative import must read")


def test_missing_code_is_named(folder):
    (folder / "configuration_tiny.py").unlink()
    assert problems(folder) == [
        "modeling_tiny.py, line 4: imports .configuration_tiny, and there is no configuration_tiny.py beside it: "
        "add it.",
        "config.json: AutoConfig is in configuration_tiny.py, which is not there: add it, or save the model again.",
    ]


def test_code_of_another_repo_is_refused(folder):
    (folder / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "other/repo--modeling_x.X"}}))
    assert the_problem(folder).startswith("config.json: AutoModel is code of another repo, other/repo")


def test_truncated_weights_and_missing_shards_are_named(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-4])
    assert the_problem(folder).startswith("model.safetensors: cannot be read as safetensors")
    (folder / "model.safetensors").write_bytes(whole)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1-of-2.safetensors"}}))
    assert "names model-1-of-2.safetensors, which is not there" in the_problem(folder)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("extra.json", b'{\n"a": }', "extra.json, line 2: is no JSON"),
        ("extra.json", b"", "extra.json: is empty"),
        ("extra.txt", b"caf\xe9", "extra.txt: is not UTF-8 at byte 3"),
        ("extra.png", b"no picture", "extra.png: is no picture"),
        ("core.dump", b"x", "core.dump: is of no kind that a published model has"),
        ("broken.py", b"def f(:\n", "broken.py, line 1: is no Python"),
    ],
)
def test_files_that_are_not_what_they_should_be_are_named(folder, name, content, said):
    (folder / name).write_bytes(content)
    assert the_problem(folder).startswith(said)
