"""A merged folder computes what base and adapter computed, opens without PEFT, and is written whole or not at all."""

import json
import os
import subprocess
import sys

import pytest
import torch
from llama_pair import build_pair
from safetensors.torch import load_file
from training_runs import command
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
)

from hf_models.bpe_tokenizer import train_bpe
from training import merge_adapter
from training.adapters import AdapterArguments, add_adapter, open_for_inference, save_adapter
from training.language_models import load_language_model, stored_fingerprint
from training.merge_adapter import comparison_inputs

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 280}
STRANGER = (
    "import sys\nsys.modules['hf_models'] = sys.modules['training'] = sys.modules['peft'] = None\n"
    "import torch\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
    "model = AutoModelForCausalLM.from_pretrained('merged', trust_remote_code=True)\n"
    "AutoTokenizer.from_pretrained('merged', trust_remote_code=True)\n"
    "inputs, expected = torch.load('expected.pt')\n"
    "assert (model(inputs).logits - expected).abs().max() < 1e-4\n"
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    tokenizer = train_bpe(["the river and the sea", "a boat on the river"] * 20, SHAPE["vocab_size"])
    torch.manual_seed(0)
    for name, tied in (("tied", True), ("untied", False)):
        model, _ = build_pair(**SHAPE, tie_word_embeddings=tied)
        model.save_pretrained(folder / name)
        model.bfloat16().save_pretrained(folder / f"{name}_bfloat16")
    for name in folder.iterdir():
        tokenizer.save_pretrained(name)
    return folder


def adapter_folder(base, folder, task_type="CAUSAL_LM", added_tokens=False, quantization=None, **fields):
    """A run folder with an adapter that changes the logits a lot, and what base and adapter compute in float32."""
    auto_class = AutoModelForCausalLM if task_type == "CAUSAL_LM" else AutoModelForSequenceClassification
    options = {} if task_type == "CAUSAL_LM" else {"num_labels": 1, "auto_class": auto_class}
    config = BitsAndBytesConfig(load_in_4bit=True) if quantization else None
    model = load_language_model(str(base), dtype=torch.float32, quantization_config=config, **options)
    arguments = AdapterArguments(lora_r=4, lora_alpha=8, **fields)
    model = add_adapter(model, arguments, task_type=task_type, base=str(base), added_tokens=added_tokens)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    save_adapter(model, folder)
    AutoTokenizer.from_pretrained(base, trust_remote_code=False).save_pretrained(folder)
    GenerationConfig(eos_token_id=[3, 4], pad_token_id=0).save_pretrained(folder)
    run = {
        "task": "pretrain_lm",
        "data": {"model": {"path": str(base), "fingerprint": stored_fingerprint(str(base))}},
        "arguments": {"load_in_4bit": True, "bnb_4bit_use_double_quant": False} if quantization else {},
        "metrics": {"eval_loss": 2.5},
    }
    (folder / "run.json").write_text(json.dumps(run))
    return folder


def merge(monkeypatch, adapter, output_dir, **options):
    """As `python -m` does, but in this process; without the card, which a whole run's record would be needed for."""
    monkeypatch.setattr("sys.argv", command("merge", {"adapter": adapter, "output_dir": output_dir} | options)[2:])
    monkeypatch.setattr(merge_adapter, "build_card", lambda folder: None)
    merge_adapter.main()
    return json.loads((output_dir / "run.json").read_text())


def logits(model, inputs):
    with torch.no_grad():
        return model.eval()(input_ids=inputs, attention_mask=torch.ones_like(inputs)).logits.float()


def difference(folder, adapter, auto_class=AutoModelForCausalLM):
    separate, _ = open_for_inference(adapter, dtype=torch.float32)
    merged = auto_class.from_pretrained(folder, dtype=torch.float32)
    inputs = comparison_inputs(merged)
    return float((logits(merged, inputs) - logits(separate, inputs)).abs().max())


@pytest.mark.parametrize(
    ("base", "fields"),
    [
        ("tied", {}),
        ("untied", {"use_dora": True}),
        ("tied", {"lora_init": "pissa", "use_rslora": True}),
        ("tied", {"added_tokens": True}),
        ("untied", {"added_tokens": True}),
        ("untied", {"task_type": "SEQ_CLS"}),
    ],
)
def test_the_merged_folder_computes_what_base_and_adapter_do(bases, base, fields, tmp_path, monkeypatch):
    adapter = adapter_folder(bases / base, tmp_path / "adapter", **fields)
    before = (bases / base / "model.safetensors").read_bytes()

    run = merge(monkeypatch, adapter, tmp_path / "merged")

    is_classifier = fields.get("task_type") == "SEQ_CLS"
    auto_class = AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
    assert difference(tmp_path / "merged", adapter, auto_class) < 1e-4
    assert run["merged"]["max_logit_difference"] < 1e-4 < run["merged"]["largest_logit"]
    assert run["merged"]["adapter"] == os.path.relpath(adapter)
    assert run["merged"]["base"] == os.path.relpath(bases / base)
    assert run["metrics"] == {"eval_loss": 2.5}
    assert (bases / base / "model.safetensors").read_bytes() == before
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert not [name for name in weights if "lora" in name or "modules_to_save" in name]
    assert ("lm_head.weight" in weights) == (base == "untied" and not is_classifier)
    assert weights.keys() == set(load_file(bases / base / "model.safetensors")) or is_classifier


def test_the_merged_folder_stands_alone(bases, tmp_path, monkeypatch):
    adapter = adapter_folder(bases / "tied", tmp_path / "adapter", added_tokens=True)
    merge(monkeypatch, adapter, tmp_path / "merged")
    separate, _ = open_for_inference(adapter)
    inputs = comparison_inputs(separate)
    torch.save((inputs, logits(separate, inputs)), tmp_path / "expected.pt")

    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    words = [sys.executable, "-c", STRANGER]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id == [3, 4]
    assert not list((tmp_path / "merged").glob("adapter*"))
    assert not list((tmp_path / "merged").glob("*.bin"))


def test_the_merged_weights_have_the_bases_dtype_unless_another_is_asked(bases, tmp_path, monkeypatch):
    adapter = adapter_folder(bases / "untied_bfloat16", tmp_path / "adapter")

    run = merge(monkeypatch, adapter, tmp_path / "merged")
    merge(monkeypatch, adapter, tmp_path / "wide", dtype="float32")

    stored = {tensor.dtype for tensor in load_file(tmp_path / "merged" / "model.safetensors").values()}
    assert stored == {torch.bfloat16}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    assert run["merged"]["max_logit_difference"] < 1e-4
    as_stored = difference(tmp_path / "merged", adapter)
    assert run["merged"]["max_logit_difference_as_stored"] == pytest.approx(as_stored, rel=1e-3)
    assert difference(tmp_path / "wide", adapter) < 1e-4 < as_stored


def test_an_adapter_of_a_4_bit_base_is_merged_into_the_base_in_full_precision(bases, tmp_path, monkeypatch):
    adapter = adapter_folder(bases / "untied", tmp_path / "adapter", quantization=True)

    run = merge(monkeypatch, adapter, tmp_path / "merged")

    assert difference(tmp_path / "merged", adapter) < 1e-4
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    quantized, _ = open_for_inference(adapter, dtype=torch.float32, quantization_config=nf4)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    inputs = comparison_inputs(merged)
    expected = (logits(merged, inputs) - logits(quantized, inputs)).abs()
    assert run["merged"]["mean_logit_difference_to_quantized"] == pytest.approx(float(expected.mean()), rel=1e-3)
    assert run["merged"]["max_logit_difference_to_quantized"] == pytest.approx(float(expected.max()), rel=1e-3)
    assert expected.mean() > 1e-3  # 4 bits do not hold the weights exactly


def test_the_same_merge_again_only_says_so_and_another_is_refused(bases, tmp_path, monkeypatch, capsys):
    adapter = adapter_folder(bases / "tied", tmp_path / "adapter")
    merge(monkeypatch, adapter, tmp_path / "merged")
    written = (tmp_path / "merged" / "model.safetensors").stat().st_mtime_ns

    merge(monkeypatch, adapter, tmp_path / "merged")

    assert "holds this merge" in capsys.readouterr().out
    assert (tmp_path / "merged" / "model.safetensors").stat().st_mtime_ns == written
    other = adapter_folder(bases / "untied", tmp_path / "other")
    assert "holds a merge of another adapter: choose" in refused(monkeypatch, capsys, other, tmp_path / "merged")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    assert "holds files of something else" in refused(monkeypatch, capsys, adapter, tmp_path / "used")
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["notes.txt"]


def refused(monkeypatch, capsys, adapter, output_dir, **options):
    with pytest.raises(SystemExit) as stopped:
        merge(monkeypatch, adapter, output_dir, **options)
    assert stopped.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("Error: ")
    return message


def test_what_cannot_be_merged_is_refused_before_anything_is_written(bases, tmp_path, monkeypatch, capsys):
    adapter, out = adapter_folder(bases / "tied", tmp_path / "adapter"), tmp_path / "merged"

    assert "tied holds no adapter_config.json" in refused(monkeypatch, capsys, bases / "tied", out)
    assert "whose weights hash to" in refused(monkeypatch, capsys, adapter, out, base=bases / "untied")
    assert "nowhere, which is not there: give" in refused(monkeypatch, capsys, adapter, out, base="nowhere")
    assert "--dtype is 'int8': take one of" in refused(monkeypatch, capsys, adapter, out, dtype="int8")
    assert not out.exists()


def test_a_merge_that_was_killed_leaves_no_folder(bases, tmp_path, monkeypatch):
    adapter = adapter_folder(bases / "tied", tmp_path / "adapter")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(merge_adapter.os, "replace", killed)  # everything is written by then
    with pytest.raises(KeyboardInterrupt):
        merge(monkeypatch, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    monkeypatch.undo()

    merge(monkeypatch, adapter, tmp_path / "merged")

    assert difference(tmp_path / "merged", adapter) < 1e-4
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "merged"}
