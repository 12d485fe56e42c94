"""llama.cpp opens our GGUF files and computes what we do: logits, greedy texts, tokens, chats.

Set-up: `make llama-cpp` builds llama-cpp-python (about 12 minutes on two cores). `GGUF_RUNS=folder:folder` has run
folders checked in the same way, beside the small models that are made here.
"""

import os
import random
from pathlib import Path

import pytest
import torch
from llama_pair import randomise_norms
from test_bpe_tokenizer import MESSAGES, NUMBERS, random_texts, train_sentencepiece
from transformers import GenerationConfig, PreTrainedTokenizerFast

from hf_models import LlamaStyleConfig, LlamaStyleForCausalLM
from hf_models.bpe_tokenizer import from_sentencepiece, train_bpe
from hf_models.convert import convert
from hf_models.llama_style.checkpoints import load_checkpoint, save_checkpoint
from training.text_data import iterate_texts, load_text_dataset

try:
    import llama_cpp
except ModuleNotFoundError:
    llama_cpp = None
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(llama_cpp is None, reason="llama-cpp-python is not installed: run `make llama-cpp`"),
]

CONTEXT = 128
PROMPTS = [
    "The capital of France is",
    "In 1984,",
    "A river that",
    "def f(x):\n    ",
    "<|user|>What is 3+4?<|end_of_turn|>",
]
KINDS = {"qwen2": "qwen2", "llama-bpe": "llama3", "gpt-2": "gpt2", "llama": None}
ROPES = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32},
    "llama 3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
ROPES["yarn, weighed"] = ROPES["yarn"] | {"attention_factor": 0.8}
MODELS = {name: {"rope_parameters": rope} for name, rope in ROPES.items()} | {
    "tied": {"tie_word_embeddings": True},
    "biases, wide heads": {"attention_bias": True, "mlp_bias": True, "head_dim": 32},
    "many heads": {"num_key_value_heads": 4, "rms_norm_eps": 1e-5},
}


def open_gguf(path: Path):
    """In float32 throughout: the cache is half precision by default."""
    float32 = 0
    return llama_cpp.Llama(
        str(path),
        n_ctx=CONTEXT,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        type_k=float32,
        type_v=float32,
        flash_attn=False,
        verbose=False,
    )


def new_model(**fields) -> LlamaStyleForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = {"vocab_size": 300, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "initializer_range": 0.2}
    model = LlamaStyleForCausalLM(LlamaStyleConfig(**sizes | config | fields)).eval()
    randomise_norms(model)
    return model


@pytest.fixture(scope="module")
def texts():
    return list(iterate_texts(load_text_dataset("wikipedia_leads", "train[:1000]")))


@pytest.fixture(scope="module")
def new_folder(tmp_path_factory, texts):
    """Folders of small models by the kind of tokenizer, which has merges of digits too."""
    made = {}

    def make(kind: str) -> Path:
        if kind not in made:
            style = {"style": "llama"} if kind == "llama" else {"pattern": KINDS[kind]}
            tokenizer = train_bpe(texts + NUMBERS, 2500, **style)
            model = new_model(vocab_size=len(tokenizer) + 2)  # rows without a token
            model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.eot_token_id]
            folder = tmp_path_factory.mktemp(kind)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[kind] = folder
        return made[kind]

    return make


RUNS = [Path(name) for name in os.environ.get("GGUF_RUNS", "").split(":") if name]


@pytest.fixture(scope="module", params=[*KINDS, *RUNS], ids=str)
def folder(request, new_folder):
    return new_folder(request.param) if request.param in KINDS else request.param


@pytest.fixture(scope="module")
def files(folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("gguf")
    for outtype in ("f32", "f16", "q8_0"):
        convert(folder, target / f"{outtype}.gguf", "gguf", outtype)
    return target


@pytest.fixture(scope="module")
def tokenizer(folder):
    return PreTrainedTokenizerFast.from_pretrained(folder)


def greedy(opened, ids: list[int], count: int) -> list[int]:
    opened.reset()
    opened.eval(ids)
    found = []
    for _ in range(count):
        found.append(int(opened.scores[opened.n_tokens - 1].argmax()))
        opened.eval(found[-1:])
    return found


def test_logits_and_greedy_texts_are_ours(folder, files, tokenizer):
    model = load_checkpoint(folder).float()
    # Past the end of a text, too.
    model.generation_config = GenerationConfig(max_new_tokens=30, do_sample=False)
    opened = open_gguf(files / "f32.gguf")
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt)
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0]
            opened.reset()
            opened.eval(ids)
            found = torch.tensor(opened.scores[: len(ids)])
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
            whole = model.generate(torch.tensor([ids]))[0].tolist()
        assert greedy(opened, ids, 30) == whole[len(ids) :]


@pytest.mark.parametrize("outtype", ["f16", "q8_0"])
def test_smaller_files_compute_what_we_read_from_them(files, tokenizer, outtype):
    """Within what half-precision products of llama.cpp leave; the greedy choice after a prompt mostly stays."""
    model = load_checkpoint(files / f"{outtype}.gguf").float()
    opened = open_gguf(files / f"{outtype}.gguf")
    ids = tokenizer.encode(PROMPTS[0])
    opened.eval(ids)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
    found = torch.tensor(opened.scores[: len(ids)])
    assert (found - expected).norm() < (5e-2 if outtype == "q8_0" else 5e-3) * expected.norm()


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_logits_of_every_kind_of_model(tmp_path, fields):
    model = new_model(**fields)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    save_checkpoint(model, tmp_path / "model.gguf", "gguf")
    ids = torch.randint(300, (1, 100))
    opened = open_gguf(tmp_path / "model.gguf")
    opened.eval(ids[0].tolist())
    with torch.no_grad():
        expected = model(ids).logits[0]
    torch.testing.assert_close(torch.tensor(opened.scores[:100]), expected, rtol=0, atol=1e-4)


def strings(tokenizer: PreTrainedTokenizerFast, count: int) -> list[str]:
    """Unicode, digits, white space, and both with the text of added tokens in between, whole and in parts."""
    rng = random.Random(0)
    plain = random_texts(count // 3, seed=5)
    added = list(tokenizer.get_added_vocab())
    mixed = []
    for _ in range(count - len(plain) - len(added) - 1):
        pieces = [rng.choice(plain)[: rng.randint(0, 12)] for _ in range(rng.randint(1, 4))]
        pieces += rng.choices([*added, *(token[:-1] for token in added), "<", "|>", " ", "\n", "2024", "don't"], k=3)
        rng.shuffle(pieces)
        mixed.append("".join(pieces))
    return [*plain, *mixed, *added, "".join(added)]


def test_tokens_are_ours(files, tokenizer):
    opened = open_gguf(files / "f32.gguf")
    differing = []
    for text in [*strings(tokenizer, 3000), *NUMBERS[:50]]:
        found = opened.tokenize(text.encode(), add_bos=True, special=True)
        if found != tokenizer.encode(text):
            differing.append(text)
    assert not differing, (len(differing), differing[:20])


def test_every_token_is_written_as_ours_is(files, tokenizer):
    opened = open_gguf(files / "f32.gguf")
    special = set(tokenizer.all_special_ids)
    for index in range(len(tokenizer)):
        if index in special:
            continue
        expected = tokenizer.decode([index], skip_special_tokens=False)
        if "\ufffd" not in expected and not tokenizer.convert_ids_to_tokens(index).startswith(("▁", "<0x")):
            assert opened.detokenize([index], special=True).decode() == expected


def test_chats_are_rendered_as_ours(files, tokenizer):
    if not tokenizer.chat_template:
        pytest.skip("The tokenizer has no chat template.")
    opened = open_gguf(files / "f32.gguf")
    formatter = llama_cpp.llama_chat_format.Jinja2ChatFormatter(
        opened.metadata["tokenizer.chat_template"],
        eos_token=tokenizer.eos_token,
        bos_token=tokenizer.bos_token,
    )
    for length in (2, 4):
        messages = MESSAGES[:length]
        prompt = formatter(messages=messages).prompt
        assert prompt == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert opened.tokenize(prompt.encode(), add_bos=False, special=True) == expected


def test_generation_stops_at_the_end_of_a_text_and_of_a_turn(files, tokenizer):
    opened = open_gguf(files / "f32.gguf")
    vocab = llama_cpp.llama_model_get_vocab(opened.model)
    stops = [index for index in range(len(tokenizer)) if llama_cpp.llama_vocab_is_eog(vocab, index)]
    assert stops == sorted({tokenizer.eos_token_id, tokenizer.eot_token_id})


@pytest.mark.parametrize("add_dummy_prefix", [True, False])
def test_imported_sentencepiece_models(tmp_path, texts, add_dummy_prefix):
    options = {"byte_fallback": True, "remove_extra_whitespaces": False, "add_dummy_prefix": add_dummy_prefix}
    tokenizer = from_sentencepiece(train_sentencepiece(tmp_path, texts, **options))
    folder = tmp_path / "folder"
    new_model(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    convert(folder, tmp_path / "model.gguf", "gguf")
    opened = open_gguf(tmp_path / "model.gguf")
    runs = ["".join(random.Random(n).choices("aab- ", k=30)) for n in range(500)]
    for text in [*strings(tokenizer, 2000), *runs]:
        assert opened.tokenize(text.encode(), add_bos=True, special=True) == tokenizer.encode(text)
