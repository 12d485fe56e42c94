"""A native Llama folder and ours hold the same model: bit-equal weights, equal logits, and nothing odd is loaded."""

import json
import subprocess
import sys

import pytest
import torch
from folder_edits import rewrite_config, rewrite_weights
from llama_pair import TINY
from safetensors.torch import load_file
from tiny_chat_model import new_tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from hf_models import LlamaStyleConfig, LlamaStyleForCausalLM, LlamaStyleForSequenceClassification
from hf_models.convert import convert
from hf_models.llama_style.checkpoints import load_checkpoint, save_checkpoint

LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LLAMAS = {
    "llama 1": {"num_key_value_heads": 4},
    "llama 2, grouped": {"rms_norm_eps": 1e-5},
    "llama 3.1": {"rope_parameters": LLAMA_3_ROPE, "eos_token_id": [2, 3]},
    "llama 3.2, tied": {"rope_parameters": LLAMA_3_ROPE, "tie_word_embeddings": True},
    "biases, wide heads": {"attention_bias": True, "mlp_bias": True, "head_dim": 16},
}


def native(**fields) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**TINY | fields)).eval()


def ours(**fields) -> LlamaStyleForCausalLM:
    return LlamaStyleForCausalLM(LlamaStyleConfig(**TINY | fields)).eval()


def assert_same_model(one, other):
    one_state, other_state = one.state_dict(), other.state_dict()
    assert one_state.keys() == other_state.keys()
    assert all(torch.equal(one_state[name], other_state[name]) for name in one_state)
    assert one.dtype == other.dtype
    input_ids = torch.randint(TINY["vocab_size"], (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(one(input_ids).logits, other(input_ids).logits)


@pytest.mark.parametrize("fields", LLAMAS.values(), ids=LLAMAS)
def test_native_folder_opens_as_ours(tmp_path, fields):
    reference = native(**fields)
    reference.save_pretrained(tmp_path)
    assert_same_model(load_checkpoint(tmp_path), reference)
    assert_same_model(load_checkpoint(tmp_path, layout="transformers"), reference)


@pytest.mark.parametrize("fields", LLAMAS.values(), ids=LLAMAS)
def test_ours_opens_as_native(tmp_path, fields):
    model = ours(**fields)
    model.generation_config.max_length = 17
    save_checkpoint(model, tmp_path, "transformers")

    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "auto_map" not in config
    assert "sliding_window" not in config
    assert not list(tmp_path.glob("*.py"))
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(reopened) is LlamaForCausalLM
    assert reopened.generation_config.max_length == 17
    assert_same_model(model, reopened)
    assert_same_model(model, load_checkpoint(tmp_path))  # and back


def test_our_own_layout_round_trips(tmp_path):
    model = ours(sliding_window=8)
    save_checkpoint(model, tmp_path, "hf_models")
    assert (tmp_path / "modeling_llama_style.py").is_file()
    reopened = load_checkpoint(tmp_path, layout="hf_models")
    assert reopened.config.sliding_window == 8
    assert_same_model(model, reopened)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_the_files(tmp_path, dtype):
    reference = native().to(dtype)
    reference.save_pretrained(tmp_path)
    rewrite_config(tmp_path, dtype="float32")  # a config may say something else
    model = load_checkpoint(tmp_path)
    assert model.dtype == dtype
    save_checkpoint(model, tmp_path / "back", "transformers")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert load_file(tmp_path / "back" / "model.safetensors")["model.norm.weight"].dtype == dtype


def test_sharded_folder(tmp_path):
    reference = native()
    reference.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert_same_model(load_checkpoint(tmp_path), reference)
    shards[0].unlink()
    with pytest.raises(FileNotFoundError, match=f"names {shards[0].name}, which is not there"):
        load_checkpoint(tmp_path)


def test_config_as_older_transformers_wrote_it(tmp_path):
    reference = native(rope_parameters=LLAMA_3_ROPE)
    reference.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    del config["rope_parameters"], config["head_dim"]
    config |= {"rope_theta": 500000.0, "pretraining_tp": 1}
    config["rope_scaling"] = {name: value for name, value in LLAMA_3_ROPE.items() if name != "rope_theta"}
    file.write_text(json.dumps(config))
    # Rotary frequencies were stored with every layer.
    rewrite_weights(tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert_same_model(load_checkpoint(tmp_path), reference)


def test_tied_head_may_be_stored_twice_but_not_differ(tmp_path):
    reference = native(tie_word_embeddings=True)
    reference.save_pretrained(tmp_path)
    embeddings = reference.model.embed_tokens.weight.detach()
    rewrite_weights(tmp_path, lambda t: t.update({"lm_head.weight": embeddings.clone()}))
    assert_same_model(load_checkpoint(tmp_path), reference)
    rewrite_weights(tmp_path, lambda t: t.update({"lm_head.weight": embeddings + 1}))
    with pytest.raises(ValueError, match="a head that differs from the embeddings"):
        load_checkpoint(tmp_path)


class TestRefusals:
    """What cannot be loaded or saved faithfully is refused, in a sentence that names it."""

    @pytest.fixture
    def folder(self, tmp_path):
        native().save_pretrained(tmp_path)
        return tmp_path

    def test_missing_and_unexpected_parameters(self, folder):
        def change(tensors):
            tensors["model.layers.7.extra"] = tensors.pop("model.layers.1.mlp.up_proj.weight")

        rewrite_weights(folder, change)
        with pytest.raises(
            ValueError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight and holds model\.layers\.7\.extra"
        ):
            load_checkpoint(folder)

    def test_a_long_list_is_cut(self, folder):
        rewrite_config(folder, num_hidden_layers=3)
        with pytest.raises(ValueError, match=r"lacks model\.layers\.2\.input_layernorm\.weight, .* and 4 more"):
            load_checkpoint(folder)

    def test_wrong_shapes(self, folder):
        rewrite_config(folder, vocab_size=50)
        with pytest.raises(ValueError, match=r"in shape: .*embed_tokens\.weight \(96, 32\) instead of \(50, 32\)"):
            load_checkpoint(folder)

    def test_untied_config_without_head(self, folder):
        rewrite_weights(folder, lambda tensors: tensors.pop("lm_head.weight"))
        with pytest.raises(ValueError, match=r"lacks lm_head\.weight"):
            load_checkpoint(folder)

    @pytest.mark.parametrize("kept_bytes", [0, 4, 100, 5000])
    def test_truncated_file(self, folder, kept_bytes):
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:kept_bytes])
        with pytest.raises(ValueError, match="is cut short or is no safetensors file"):
            load_checkpoint(folder)

    def test_pickle(self, folder):
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        with pytest.raises(FileNotFoundError, match="a pickle, which can run code"):
            load_checkpoint(folder)

    def test_no_weights(self, folder):
        (folder / "model.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors"):
            load_checkpoint(folder)

    def test_index_that_is_none(self, folder):
        (folder / "model.safetensors").rename(folder / "model-00001.safetensors")
        (folder / "model.safetensors.index.json").write_text("{}")
        with pytest.raises(ValueError, match="is no index of shards"):
            load_checkpoint(folder)

    def test_no_config(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
            load_checkpoint(tmp_path)

    def test_broken_config(self, folder):
        (folder / "config.json").write_text("{")
        with pytest.raises(ValueError, match="is not valid JSON"):
            load_checkpoint(folder)

    @pytest.mark.parametrize(
        "fields", [{"hidden_size": "wide"}, {"num_key_value_heads": 3}, {"rope_parameters": {"rope_type": "llama3"}}]
    )
    def test_impossible_config(self, folder, fields):
        rewrite_config(folder, **fields)
        with pytest.raises(ValueError, match=r"hidden_size|num_key_value_heads|factor"):
            load_checkpoint(folder)

    def test_another_family(self, folder):
        rewrite_config(folder, model_type="gpt2")
        with pytest.raises(ValueError, match="has model_type 'gpt2'"):
            load_checkpoint(folder)

    def test_another_layout_than_asked_for(self, folder):
        with pytest.raises(ValueError, match="has model_type 'llama', asked for as layout 'hf_models'"):
            load_checkpoint(folder, layout="hf_models")

    def test_another_head(self, tmp_path):
        LlamaForSequenceClassification(LlamaConfig(**TINY)).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="holds a LlamaForSequenceClassification"):
            load_checkpoint(tmp_path)

    def test_quantised(self, folder):
        rewrite_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
        with pytest.raises(ValueError, match="holds quantised weights"):
            load_checkpoint(folder)

    def test_saving_a_sliding_window_as_native(self, tmp_path):
        with pytest.raises(ValueError, match="sliding_window is 8, and native Llama has none"):
            save_checkpoint(ours(sliding_window=8), tmp_path / "out", "transformers")
        assert not (tmp_path / "out").exists()

    def test_saving_another_head(self, tmp_path):
        classifier = LlamaStyleForSequenceClassification(LlamaStyleConfig(**TINY))
        with pytest.raises(ValueError, match="this is a LlamaStyleForSequenceClassification"):
            save_checkpoint(classifier, tmp_path, "transformers")

    def test_saving_in_an_unknown_layout(self, tmp_path):
        with pytest.raises(
            ValueError, match="No layout 'onnx': choose one of hf_models, transformers, gguf, torch_export"
        ):
            save_checkpoint(ours(), tmp_path, "onnx")


class TestConvert:
    @pytest.fixture
    def source(self, tmp_path):
        folder = tmp_path / "source"
        native().save_pretrained(folder)
        (folder / "tokenizer.json").write_text("{}")
        (folder / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": true}')
        return folder

    def test_there_and_back(self, source, tmp_path):
        convert(source, tmp_path / "ours", "hf_models")
        convert(tmp_path / "ours", tmp_path / "native", "transformers")
        for name in ("tokenizer.json", "generation_config.json"):
            assert (tmp_path / "native" / name).read_text() == (source / name).read_text()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["native", "ours", "source"]
        assert not list((tmp_path / "native").glob("*.py"))
        opened = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
        assert_same_model(AutoModelForCausalLM.from_pretrained(source), opened)

    def test_without_our_package_the_native_folder_writes_the_same(self, tmp_path):
        tokenizer = tiny_tokenizer()
        model = new_tiny_model(tokenizer)
        torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.3)  # far from uniform
        model.save_pretrained(tmp_path / "ours")
        tokenizer.save_pretrained(tmp_path / "ours")
        convert(tmp_path / "ours", tmp_path / "native", "transformers")
        script = """
import json, sys
sys.modules["hf_models"] = None  # as if it were not installed
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (auto.from_pretrained("native") for auto in (AutoModelForCausalLM, AutoTokenizer))
prompts = [tokenizer(text, return_tensors="pt") for text in json.loads(sys.argv[1])]
written = [model.generate(**ids, do_sample=False, max_new_tokens=30)[0] for ids in prompts]
print(json.dumps([ids.tolist() for ids in written]))
"""
        texts = ["A river is", "Where does it begin?", "And a lake?"]
        command = [sys.executable, "-c", script, json.dumps(texts)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        prompts = [tokenizer(text, return_tensors="pt") for text in texts]
        expected = [model.generate(**ids, do_sample=False, max_new_tokens=30)[0].tolist() for ids in prompts]
        assert json.loads(done.stdout) == expected
        assert len({tuple(ids[-5:]) for ids in expected}) > 1

    def test_a_failure_leaves_nothing(self, source, tmp_path):
        rewrite_config(source, num_hidden_layers=3)
        with pytest.raises(ValueError, match="lacks"):
            convert(source, tmp_path / "out", "hf_models")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]

    def test_destination_in_use(self, source):
        with pytest.raises(FileExistsError, match="exists and is not an empty folder"):
            convert(source, source, "hf_models")

    def test_command_line(self, source, tmp_path):
        (tmp_path / "ours").mkdir()  # empty: may be written to
        command = [sys.executable, "-m", "hf_models.convert", source, tmp_path / "ours", "--to", "hf_models"]
        first = subprocess.run(command, capture_output=True, text=True)
        assert first.returncode == 0, first.stderr
        assert_same_model(AutoModelForCausalLM.from_pretrained(source), load_checkpoint(tmp_path / "ours"))
        again = subprocess.run(command, capture_output=True, text=True)
        assert again.returncode == 2
        assert again.stderr == f"error: {tmp_path / 'ours'} exists and is not an empty folder: name another one.\n"
