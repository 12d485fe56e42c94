"""GGUF files: what is in them, read back with the gguf package; the way home to the bit; what is refused."""

import copy
import itertools
import json
import sys

import gguf
import numpy as np
import pytest
import torch
from folder_edits import rewrite_config
from llama_pair import TINY, randomise_norms
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from hf_models import LlamaStyleConfig, LlamaStyleForCausalLM
from hf_models.bpe_tokenizer import train_bpe
from hf_models.convert import convert, main
from hf_models.llama_style.checkpoints import load_checkpoint, save_checkpoint
from hf_models.llama_style.gguf_tokenizer import tokenizer_metadata

LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
MODELS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    "biases, wide heads": {"attention_bias": True, "mlp_bias": True, "head_dim": 16},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}},
    "yarn": {"rope_parameters": YARN | {"attention_factor": 0.7}},
    "llama 3": {"rope_parameters": LLAMA_3_ROPE, "tie_word_embeddings": True, "eos_token_id": [2, 3]},
}
TEXTS = [
    "the cat sat on the mat, and the dog sat there",
    "In 1984 or 2024, it wasn't theirs",
    "hello there, that is it",
]


def tiny_model(dtype=torch.float32, **fields) -> LlamaStyleForCausalLM:
    model = LlamaStyleForCausalLM(LlamaStyleConfig(**TINY | {"initializer_range": 0.2} | fields)).eval()
    randomise_norms(model)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model.to(dtype)


@pytest.fixture(scope="module")
def tokenizers():
    """One of each kind, by the name that llama.cpp has for it."""
    patterns = {"qwen2": "qwen2", "llama-bpe": "llama3", "gpt-2": "gpt2"}
    made = {pre: train_bpe(TEXTS * 3, 290, pattern=pattern) for pre, pattern in patterns.items()}
    return made | {"llama": train_bpe(TEXTS * 3, 320, style="llama")}


def values(path) -> dict:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def tensors(path) -> dict:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def assert_same_model(one, other):
    one_state, other_state = one.state_dict(), other.state_dict()
    assert one_state.keys() == other_state.keys()
    assert all(torch.equal(one_state[name], other_state[name]) for name in one_state)
    assert one.dtype == other.dtype


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_round_trip_to_the_bit(tmp_path, fields):
    model = tiny_model(**fields)
    save_checkpoint(model, tmp_path / "model.gguf", "gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]
    back = load_checkpoint(tmp_path / "model.gguf")
    assert_same_model(model, back)
    for field in ("rms_norm_eps", "head_dim", "rope_parameters", "tie_word_embeddings", "max_position_embeddings"):
        assert getattr(back.config, field) == getattr(model.config, field), field
    input_ids = torch.randint(TINY["vocab_size"], (2, 40))
    with torch.no_grad():
        assert torch.equal(model(input_ids).logits, back(input_ids).logits)


@pytest.mark.parametrize("name", ["plain", "tied"])
def test_transformers_own_reader_computes_the_same(tmp_path, name):
    """It knows nothing but plain models, and turns the rows of the projections back by code of its own."""
    model = tiny_model(**MODELS[name])
    save_checkpoint(model, tmp_path / "model.gguf", "gguf")
    reference = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf").eval()
    input_ids = torch.randint(TINY["vocab_size"], (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids).logits, reference(input_ids).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": True}])
def test_half_precision_round_trips_to_the_bit(tmp_path, fields):
    model = tiny_model(torch.float16, **fields)
    save_checkpoint(model, tmp_path / "model.gguf", "gguf")  # f16 without being asked
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors(tmp_path / "model.gguf").items()}
    assert {kind for name, kind in kinds.items() if "norm" not in name} == {"F16"}
    assert {kind for name, kind in kinds.items() if "norm" in name} == {"F32"}
    assert_same_model(model, load_checkpoint(tmp_path / "model.gguf"))


def test_norms_beyond_half_precision_keep_the_model_in_float32(tmp_path):
    model = tiny_model()
    save_checkpoint(model, tmp_path / "model.gguf", "gguf", outtype="f16")
    back = load_checkpoint(tmp_path / "model.gguf")
    assert back.dtype == torch.float32
    assert torch.equal(back.model.norm.weight, model.model.norm.weight)
    assert torch.equal(back.lm_head.weight, model.lm_head.weight.half().float())


def test_8_bits_are_within_half_a_step(tmp_path, caplog):
    model = tiny_model(intermediate_size=48)
    with caplog.at_level("WARNING", logger="hf_models"):
        save_checkpoint(model, tmp_path / "model.gguf", "gguf", outtype="q8_0")
    stored = tensors(tmp_path / "model.gguf")
    assert stored["blk.0.attn_q.weight"].tensor_type.name == "Q8_0"
    assert stored["blk.0.ffn_down.weight"].tensor_type.name == "F16"  # rows of 48 are no blocks of 32
    back = load_checkpoint(tmp_path / "model.gguf")
    name = "model.layers.0.mlp.up_proj.weight"
    weight, found = model.state_dict()[name], back.state_dict()[name]
    blocks = weight.reshape(-1, 32)
    step = blocks.abs().amax(1, keepdim=True) / 127
    # Half a step from rounding, and the scale itself in half precision: 127 steps of 2**-11.
    assert ((blocks - found.reshape(-1, 32)).abs() <= step * (0.5 + 127 * 2**-11)).all()
    assert not torch.equal(weight, found)


def test_query_and_key_rows_are_paired_as_llama_cpp_rotates_them(tmp_path):
    """Feature i of the first half of a head and of the second become neighbours; nothing else moves."""
    model = tiny_model(attention_bias=True)
    save_checkpoint(model, tmp_path / "model.gguf", "gguf")
    stored = tensors(tmp_path / "model.gguf")
    config, layer = model.config, model.model.layers[1].self_attn
    for name, projection, heads in (("q", layer.q_proj, config.num_attention_heads), ("k", layer.k_proj, 2)):
        for part, ours in (("weight", projection.weight), ("bias", projection.bias)):
            theirs = torch.tensor(stored[f"blk.1.attn_{name}.{part}"].data)
            for head in range(heads):
                for pair in range(config.head_dim // 2):
                    first = head * config.head_dim
                    assert torch.equal(theirs[first + 2 * pair], ours[first + pair])
                    assert torch.equal(theirs[first + 2 * pair + 1], ours[first + config.head_dim // 2 + pair])
    assert np.array_equal(stored["blk.1.attn_v.weight"].data, layer.v_proj.weight.detach().numpy())


def test_keys_say_the_config(tmp_path):
    model = tiny_model(rope_parameters=YARN, head_dim=16, rms_norm_eps=1e-5)
    save_checkpoint(model, tmp_path / "model.gguf", "gguf")
    found = values(tmp_path / "model.gguf")
    expected = {
        "general.architecture": "llama",
        "general.file_type": 0,
        "llama.vocab_size": 96,
        "llama.context_length": 64,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 48,
        "llama.block_count": 2,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 16,
        "llama.rope.scaling.attn_factor": 1.0,  # beside YaRN's own 1 + 0.1 ln 4
        "tokenizer.ggml.model": "none",
    }
    assert {key: found[key] for key in expected} == expected
    assert found["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)


def test_llama_3_factors_follow_the_formula(tmp_path):
    """Wave lengths under 32/4 tokens stay, those over 32/1 grow eightfold, and between it is interpolated."""
    save_checkpoint(tiny_model(rope_parameters=LLAMA_3_ROPE), tmp_path / "model.gguf", "gguf")
    waves = 2 * np.pi * 500000.0 ** (np.arange(0, 8, 2) / 8)
    share = np.clip((32 / waves - 1) / (4 - 1), 0, 1)
    expected = 1 / ((1 - share) / 8 + share)
    assert tensors(tmp_path / "model.gguf")["rope_freqs.weight"].data == pytest.approx(expected, rel=1e-5)


def test_tokenizer_keys(tmp_path, tokenizers):
    for pre, tokenizer in tokenizers.items():
        model = tiny_model(vocab_size=len(tokenizer) + 3)
        path = tmp_path / f"{pre}.gguf"
        save_checkpoint(model, path, "gguf", metadata=tokenizer_metadata(tokenizer))
        found = values(path)
        tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
        assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        assert types[len(tokenizer) :] == [5, 5, 5]  # unused: rows without a token
        for key, index in (
            ("bos", tokenizer.bos_token_id),
            ("eos", tokenizer.eos_token_id),
            ("padding", tokenizer.pad_token_id),
            ("eot", tokenizer.eot_token_id),
        ):
            assert found[f"tokenizer.ggml.{key}_token_id"] == index
            assert types[index] == 3  # control
        assert types[tokenizer.convert_tokens_to_ids("<think>")] == 4  # user-defined: shown, and found in any text
        assert found["tokenizer.ggml.add_bos_token"] is True
        assert found["tokenizer.ggml.add_eos_token"] is False
        assert found["tokenizer.chat_template"] == tokenizer.chat_template
        if pre == "llama":
            assert found["tokenizer.ggml.model"] == "llama"
            assert types[tokenizer.unk_token_id] == 2
            assert [types[tokens.index(f"<0x{byte:02X}>")] for byte in range(256)] == [6] * 256
        else:
            assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", pre)
            merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
            assert found["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]


def greedy_by_score(text: str, metadata: dict) -> list[str]:
    """SentencePiece's rule: of neighbours that make a piece, join those of the highest score, the leftmost first."""
    scores = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"], strict=True))
    parts = list(text)
    while True:
        pairs = [(scores[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in scores]
        if not pairs:
            return parts
        at = -max(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def test_scores_repeat_the_merges(tokenizers):
    metadata = tokenizer_metadata(tokenizers["llama"])
    words = [*TEXTS, "that hat sat at the theatre", "tttthhhheeee heehee thethethe", "a  d   c1984 2"]
    for text in words:
        expected = tokenizers["llama"].tokenize(text)
        assert greedy_by_score("▁" + text.replace(" ", "▁"), metadata) == expected


class TestConvert:
    @pytest.fixture
    def source(self, tmp_path, tokenizers):
        folder = tmp_path / "tiny-llama"
        tokenizer = tokenizers["qwen2"]
        model = LlamaForCausalLM(LlamaConfig(**TINY | {"vocab_size": len(tokenizer), "eos_token_id": 2})).eval()
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, 5]
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
        return folder

    def test_command_line(self, source, tmp_path, monkeypatch, capsys):
        def run(*arguments):
            monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
            main()

        target = tmp_path / "model.gguf"
        run(source, target, "--to", "gguf", "--outtype", "f16")
        found = values(target)
        assert (found["general.name"], found["general.license"]) == ("tiny-llama", "apache-2.0")
        assert found["general.file_type"] == 1
        assert found["tokenizer.ggml.pre"] == "qwen2"
        assert sorted(p.name for p in tmp_path.iterdir()) == ["model.gguf", "tiny-llama"]
        capsys.readouterr()
        in_the_way = f"error: {target} exists and is not an empty folder: name another one.\n"
        for arguments, message in (
            ((source, target, "--to", "gguf"), in_the_way),
            ((source, tmp_path / "o", "--to", "hf_models", "--outtype", "f16"), "--outtype is of --to gguf only"),
        ):
            with pytest.raises(SystemExit) as stopped:
                run(*arguments)
            assert stopped.value.code == 2
            assert message in capsys.readouterr().err

    def test_there_and_back(self, source, tmp_path, capsys):
        convert(source, tmp_path / "model.gguf", "gguf")
        convert(tmp_path / "model.gguf", tmp_path / "back", "transformers")
        assert "the tokenizer in" in capsys.readouterr().err
        assert_same_model(load_checkpoint(source), load_checkpoint(tmp_path / "back"))

    def test_every_token_that_ends_a_text_is_said(self, source, tmp_path, tokenizers):
        """Beside the end of the text and of a turn, what `generation_config.json` names."""
        convert(source, tmp_path / "model.gguf", "gguf")
        found = values(tmp_path / "model.gguf")
        assert found["tokenizer.ggml.eot_token_id"] == tokenizers["qwen2"].eot_token_id
        assert found["tokenizer.ggml.eom_token_id"] == 5

    def test_refusals_leave_nothing(self, source, tmp_path, tokenizers):
        with pytest.raises(ValueError, match=r"is one file: name it out\.gguf rather than out"):
            convert(source, tmp_path / "out", "gguf")
        convert(source, tmp_path / "model.gguf", "gguf")
        with pytest.raises(ValueError, match="is GGUF already"):
            convert(tmp_path / "model.gguf", tmp_path / "other.gguf", "gguf")
        with pytest.raises(ValueError, match=r"which has no layout .timm.: choose one of hf_models"):
            convert(source, tmp_path / "out", "timm")
        (source / "tokenizer.json").write_text("{}")
        with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
            convert(source, tmp_path / "out.gguf", "gguf")
        (source / "tokenizer.json").rename(source / "tokenizer.model")
        with pytest.raises(ValueError, match=r"holds its tokenizer as tokenizer\.model only"):
            convert(source, tmp_path / "out.gguf", "gguf")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["model.gguf", "tiny-llama"]

    def test_without_the_gguf_package(self, source, tmp_path, monkeypatch):
        for name in [name for name in sys.modules if name.startswith(("gguf", "hf_models.llama_style.gguf"))]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "gguf", None)
        with pytest.raises(ImportError, match=r"pip install 'hf_models\[export\]'"):
            convert(source, tmp_path / "model.gguf", "gguf")


class TestModelRefusals:
    @pytest.mark.parametrize(
        ("fields", "sentence"),
        [
            ({"sliding_window": 8}, "sliding_window is 8, and llama.cpp's llama has none"),
            ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
            ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type is 'dynamic'"),
            ({"rope_parameters": YARN | {"beta_fast": 16.0}}, "beta_fast"),
        ],
    )
    def test_what_llama_cpp_does_not_compute(self, tmp_path, fields, sentence):
        with pytest.raises(ValueError, match=sentence):
            save_checkpoint(tiny_model(**fields), tmp_path / "model.gguf", "gguf")
        assert not list(tmp_path.iterdir())

    def test_numbers_beyond_half_precision(self, tmp_path):
        model = tiny_model(torch.bfloat16)
        with torch.no_grad():
            model.lm_head.weight[3, 4] = 1e5
        with pytest.raises(ValueError, match=r"output\.weight holds numbers beyond 65504.* write f32"):
            save_checkpoint(model, tmp_path / "model.gguf", "gguf")
        assert not list(tmp_path.iterdir())
        save_checkpoint(model, tmp_path / "model.gguf", "gguf", outtype="f32")
        assert torch.equal(load_checkpoint(tmp_path / "model.gguf").lm_head.weight, model.lm_head.weight.float())

    def test_more_tokens_than_rows(self, tmp_path, tokenizers):
        with pytest.raises(ValueError, match="The tokenizer has 290 tokens and the model 96"):
            save_checkpoint(tiny_model(), tmp_path / "m.gguf", "gguf", metadata=tokenizer_metadata(tokenizers["qwen2"]))


class TestTokenizerRefusals:
    @pytest.fixture
    def tokenizer(self):
        return train_bpe(TEXTS * 3, 290)

    def test_unknown_regex(self, tokenizer):
        regex = SPLIT = r"\p{N}{1,2}|\p{L}+|."  # nanochat's digits
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        with pytest.raises(ValueError, match="has no counterpart") as refused:
            tokenizer_metadata(tokenizer)
        assert repr(regex) in str(refused.value)
        assert "'qwen2', 'llama3', 'gpt2'" in str(refused.value)

    def test_gpt_2s_built_in_regex(self, tokenizer):
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        assert tokenizer_metadata(tokenizer)["tokenizer.ggml.pre"] == "gpt-2"
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        with pytest.raises(ValueError, match="puts a space before a text"):
            tokenizer_metadata(tokenizer)

    def test_normalizer(self, tokenizer):
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
        with pytest.raises(ValueError, match=r"normalises text \(NFC\)"):
            tokenizer_metadata(tokenizer)

    def test_added_token_that_eats_spaces(self, tokenizer):
        tokenizer.add_tokens([AddedToken("<mask>", lstrip=True)])
        with pytest.raises(ValueError, match="'<mask>' has lstrip set"):
            tokenizer_metadata(tokenizer)

    def test_no_end_of_text(self, tokenizer):
        tokenizer.eos_token = None
        with pytest.raises(ValueError, match="has no eos_token"):
            tokenizer_metadata(tokenizer)

    def test_words_looked_up_that_merges_do_not_reach(self, tokenizer):
        serialized = json.loads(tokenizer.backend_tokenizer.to_str())
        serialized["model"]["ignore_merges"] = True
        tokenizer._tokenizer = tokenizer.backend_tokenizer.from_str(json.dumps(serialized))
        tokenizer_metadata(tokenizer)  # every word in the vocabulary comes from merges: no difference
        dropped = "".join(serialized["model"]["merges"].pop())
        tokenizer._tokenizer = tokenizer.backend_tokenizer.from_str(json.dumps(serialized))
        with pytest.raises(ValueError, match="ignore_merges") as refused:
            tokenizer_metadata(tokenizer)
        assert repr(dropped) in str(refused.value)

    def test_merges_that_are_in_no_order_of_scores(self, tokenizers):
        """ "abc" from "a" and "bc" where "ab" is joined first: by scores, "ab" and "c" would be joined too."""
        tokenizer = copy.deepcopy(tokenizers["llama"])
        serialized = json.loads(tokenizer.backend_tokenizer.to_str())
        vocab = serialized["model"]["vocab"]
        free = [piece for piece in vocab if piece.startswith("<0x") is False and len(piece) > 2][-3:]
        for piece, new in zip(free, ("zq", "qj", "zqj"), strict=True):
            vocab[new] = vocab.pop(piece)
        kept = [pair for pair in serialized["model"]["merges"] if {*pair, "".join(pair)} <= vocab.keys()]
        for letter in "zqj":
            vocab.setdefault(letter, len(vocab) + 1000)
        serialized["model"]["merges"] = [*kept, ["z", "q"], ["q", "j"], ["z", "qj"]]
        tokenizer._tokenizer = tokenizer.backend_tokenizer.from_str(json.dumps(serialized))
        with pytest.raises(ValueError, match=r"not in the order of scores .*'zqj'"):
            tokenizer_metadata(tokenizer)

    def test_metaspace(self, tokenizers):
        tokenizer = copy.deepcopy(tokenizers["llama"])
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        with pytest.raises(ValueError, match="splits text by Metaspace"):
            tokenizer_metadata(tokenizer)


class TestReadingRefusals:
    @pytest.fixture
    def file(self, tmp_path):
        save_checkpoint(tiny_model(), tmp_path / "model.gguf", "gguf")
        return tmp_path / "model.gguf"

    @pytest.mark.parametrize("kept", [0, 3, 20, 200, 900, 1500, -1])
    def test_cut_short(self, file, kept):
        file.write_bytes(file.read_bytes()[:kept])
        with pytest.raises(ValueError, match=f"{file} is cut short or is no GGUF file"):
            load_checkpoint(file)

    def test_a_web_page(self, file):
        file.write_text("<html>")
        with pytest.raises(ValueError, match="is a web page, not weights"):
            load_checkpoint(file)

    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no\.gguf does not exist"):
            load_checkpoint(tmp_path / "no.gguf")

    def test_another_architecture(self, tmp_path):
        writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen2")
        write(writer, {"token_embd.weight": np.zeros((4, 4), np.float32)})
        with pytest.raises(ValueError, match=r"is of architecture 'qwen2'; only 'llama'"):
            load_checkpoint(tmp_path / "m.gguf")

    def test_tensors_that_are_not_the_models(self, file, tmp_path):
        arrays = {name: tensor.data for name, tensor in tensors(file).items()}
        arrays["blk.7.extra.weight"] = arrays.pop("blk.1.ffn_up.weight")
        rewrite(file, tmp_path / "m.gguf", arrays)
        with pytest.raises(ValueError, match=r"lacks blk\.1\.ffn_up\.weight and holds blk\.7\.extra\.weight"):
            load_checkpoint(tmp_path / "m.gguf")

    def test_another_shape(self, file, tmp_path):
        arrays = {name: tensor.data for name, tensor in tensors(file).items()}
        rewrite(file, tmp_path / "m.gguf", arrays | {"output_norm.weight": np.ones(31, np.float32)})
        with pytest.raises(ValueError, match=r"in shape: output_norm\.weight \(31,\) instead of \(32,\)"):
            load_checkpoint(tmp_path / "m.gguf")

    def test_rotary_factors_of_another_formula(self, file, tmp_path):
        arrays = {name: tensor.data for name, tensor in tensors(file).items()}
        rewrite(file, tmp_path / "m.gguf", arrays | {"rope_freqs.weight": np.array([1, 2, 3, 4], np.float32)})
        with pytest.raises(ValueError, match=r"rope_freqs\.weight that is not LLaMA 3's"):
            load_checkpoint(tmp_path / "m.gguf")


def test_bfloat16_of_another_writer(tmp_path):
    model = tiny_model(torch.bfloat16)
    save_checkpoint(model, tmp_path / "f32.gguf", "gguf", outtype="f32")
    arrays = {
        name: gguf.quants.quantize(tensor.data, gguf.GGMLQuantizationType.BF16) if tensor.data.ndim > 1 else tensor.data
        for name, tensor in tensors(tmp_path / "f32.gguf").items()
    }
    rewrite(tmp_path / "f32.gguf", tmp_path / "bf16.gguf", arrays)
    assert_same_model(model, load_checkpoint(tmp_path / "bf16.gguf"))


def test_llama_3_1_of_another_writer(tmp_path):
    """Whose rotary scaling is told by the factors alone."""
    rope = LLAMA_3_ROPE | {"original_max_position_embeddings": 8192}
    model = tiny_model(rope_parameters=rope, head_dim=16)
    save_checkpoint(model, tmp_path / "ours.gguf", "gguf")
    arrays = {name: tensor.data for name, tensor in tensors(tmp_path / "ours.gguf").items()}
    rewrite(tmp_path / "ours.gguf", tmp_path / "theirs.gguf", arrays, without="hf_models.")
    assert load_checkpoint(tmp_path / "theirs.gguf").config.rope_parameters == rope


def rewrite(source, target, arrays: dict, without: str = "GGUF.") -> None:
    """The keys of `source`, but for those that begin with `without`, and other tensors."""
    writer = gguf.GGUFWriter(target, "llama")
    for key, field in gguf.GGUFReader(source).fields.items():
        if not key.startswith(("GGUF.", "general.architecture", without)):
            writer.add_key_value(key, field.contents(), field.types[0])
    write(writer, arrays)


def write(writer: gguf.GGUFWriter, arrays: dict) -> None:
    for name, array in arrays.items():
        kind = gguf.GGMLQuantizationType.BF16 if array.dtype == np.uint8 else None
        writer.add_tensor(name, np.ascontiguousarray(array), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_peak_memory_stays_under_twice_the_model(tmp_path):
    """Of what Python allocates beside the model: no more than its largest tensor, a few times."""
    import tracemalloc

    model = tiny_model(num_hidden_layers=12, hidden_size=64, intermediate_size=128)
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    tracemalloc.start()
    for outtype in ("f16", "q8_0"):
        save_checkpoint(model, tmp_path / f"{outtype}.gguf", "gguf", outtype=outtype)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < size / 4


def test_rewritten_config_is_read(tmp_path):
    """A folder that says f32 sizes but another rope is exported as it says."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "folder")
    rewrite_config(tmp_path / "folder", rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    convert(tmp_path / "folder", tmp_path / "m.gguf", "gguf")
    assert values(tmp_path / "m.gguf")["llama.rope.freq_base"] == 500000.0
