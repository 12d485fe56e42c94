"""Adapters leave the base as it is, come back from disk as they were trained, and refuse what is not their base."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from llama_pair import TINY, build_pair
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)
from trl.trainer.utils import add_fused_lm_head

from hf_models.bpe_tokenizer import train_bpe
from training.adapters import (
    AdapterArguments,
    add_adapter,
    check_base,
    keep_initial_adapter,
    open_for_inference,
    restore_float32,
    save_adapter,
)
from training.language_models import load_language_model, stored_fingerprint

LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 280}  # layers of whole 4-bit blocks
VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "gaussian": {"lora_init": "gaussian"},
    "pissa": {"lora_init": "pissa"},
    "pissa_niter": {"lora_init": "pissa_niter_4", "use_rslora": True},
    "pissa_dora": {"lora_init": "pissa", "use_dora": True},
    "olora": {"lora_init": "olora"},
    "eva": {"lora_init": "eva"},
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 280, "n_positions": 64}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0}


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["the river and the sea", "a boat on the river"] * 20, SHAPE["vocab_size"])


@pytest.fixture(scope="module")
def bases(tmp_path_factory, tokenizer):
    """Folders of small models: ours, tied and untied and in bfloat16, transformers' Llama and GPT-2."""
    folder = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    for tied in (True, False):
        model, _ = build_pair(**SHAPE, tie_word_embeddings=tied)
        name = "tied" if tied else "untied"
        model.save_pretrained(folder / name)
        model.bfloat16().save_pretrained(folder / f"{name}_bfloat16")
    LlamaForCausalLM(LlamaConfig(**TINY | SHAPE)).save_pretrained(folder / "llama")
    GPT2LMHeadModel(GPT2Config(**GPT2)).save_pretrained(folder / "gpt2")
    for name in folder.iterdir():
        tokenizer.save_pretrained(name)
    return folder


def opened(base, **options):
    return load_language_model(str(base), **{"dtype": torch.float32} | options)


def adapted(base, model=None, task_type="CAUSAL_LM", added_tokens=False, new_tokens=(), output_dir=None, **fields):
    """A base opened from its folder, with an adapter of rank 4 around it."""
    arguments = AdapterArguments(use_peft=True, **{"lora_r": 4, "lora_alpha": 8} | fields)
    model = opened(base) if model is None else model
    options = {"task_type": task_type, "base": str(base), "added_tokens": added_tokens, "output_dir": output_dir}
    return add_adapter(model, arguments, batches=batches, new_tokens=new_tokens, **options)


def batches():
    torch.manual_seed(1)
    return [{"input_ids": ids, "labels": ids} for ids in (torch.randint(0, 200, (2, 24)) for _ in range(3))]


def train(model, steps=3, learning_rate=0.01):
    """Far enough for every difference to show in the logits."""
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    for batch in (batches() * steps)[:steps]:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def logits(model, length=12):
    torch.manual_seed(2)
    with torch.no_grad():
        return model.eval()(torch.randint(0, 200, (2, length))).logits.float()


def assert_same_logits(first, second, tolerance=1e-4):
    assert (logits(first) - logits(second)).abs().max() < tolerance


def trained_names(model):
    return {name.removeprefix("base_model.model.") for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("base", ["tied", "untied", "llama"])
def test_every_linear_layer_but_the_head_is_adapted(bases, base):
    layers = {name.split(".lora_")[0] for name in trained_names(adapted(bases / base))}

    assert {layer.rsplit(".", 1)[-1] for layer in layers} == LAYERS
    assert len(layers) == 2 * len(LAYERS)


def test_layers_of_gpt2_are_adapted_too(bases):
    layers = {name.split(".lora_")[0] for name in trained_names(adapted(bases / "gpt2"))}

    assert {layer.split(".", 3)[-1] for layer in layers} == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}


@pytest.mark.parametrize(("base", "variant"), [*(("tied", v) for v in VARIANTS), ("gpt2", "plain"), ("gpt2", "pissa")])
def test_a_variant_begins_at_the_base_and_comes_back_from_disk_as_it_was_trained(bases, base, variant, tmp_path):
    before = (bases / base / "model.safetensors").read_bytes()
    model = adapted(bases / base, **VARIANTS[variant])
    assert_same_logits(model, opened(bases / base))

    train(model)
    save_adapter(model, tmp_path)

    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases / base), tmp_path)
    assert (logits(model) - logits(opened(bases / base))).abs().max() > 0.1
    assert_same_logits(plain, model)
    with plain.disable_adapter():
        assert_same_logits(plain, opened(bases / base), tolerance=1e-6)
    assert_same_logits(open_for_inference(tmp_path)[0], model)
    assert_same_logits(plain.merge_and_unload(), model)
    assert (bases / base / "model.safetensors").read_bytes() == before


def test_only_the_adapter_changes(bases):
    model = adapted(bases / "untied")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    train(model)

    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if ".lora_" in name}


@pytest.mark.parametrize("variant", ["plain", "pissa_niter", "pissa_dora", "olora", "eva"])
def test_a_resumed_run_equals_one_that_was_never_stopped(bases, variant, tmp_path):
    rows = [{"input_ids": row, "labels": row} for batch in batches() for row in batch["input_ids"]]

    def trainer(folder, seed):
        torch.manual_seed(seed)
        model = adapted(bases / "tied", output_dir=folder, **VARIANTS[variant])
        keep_initial_adapter(model, folder)
        arguments = TrainingArguments(
            output_dir=folder, use_cpu=True, max_steps=4, save_steps=2, per_device_train_batch_size=2, seed=0,
            learning_rate=0.003, report_to="none", disable_tqdm=True,
        )  # fmt: skip
        return Trainer(model=model, args=arguments, train_dataset=rows)

    never_stopped = trainer(tmp_path / "a", seed=0)
    never_stopped.train()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoint-4")
    resumed = trainer(tmp_path / "b", seed=1)  # another process draws other numbers
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))

    first, second = never_stopped.model.state_dict(), resumed.model.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    # A checkpoint opens as an adapter too, and is itself not yet plain LoRA.
    assert_same_logits(open_for_inference(tmp_path / "a" / "checkpoint-4")[0], never_stopped.model)


@pytest.mark.parametrize(("base", "lora_init"), [("tied", "default"), ("tied", "pissa"), ("untied", "default")])
def test_added_tokens_train_embeddings_and_head_which_stay_tied_where_they_were(bases, base, lora_init, tmp_path):
    model = opened(bases / base)
    model.resize_token_embeddings(283)
    model = adapted(bases / base, model, added_tokens=True, lora_init=lora_init)

    train(model)
    save_adapter(model, tmp_path)

    again = open_for_inference(tmp_path)[0]
    assert_same_logits(again, model)
    merged = again.merge_and_unload()
    assert_same_logits(merged, model)
    embeddings, head = merged.get_input_embeddings().weight, merged.get_output_embeddings().weight
    assert embeddings.shape[0] == 283
    assert (head is embeddings) == (base == "tied")
    saved = load_file(tmp_path / "adapter_model.safetensors")
    # Against the base's rows, and not only the new ones.
    for name, tensor in opened(bases / base).named_parameters():
        if "embed_tokens" in name or "lm_head" in name:
            assert not torch.equal(saved[f"base_model.model.{name}"][:280], tensor)


@pytest.mark.parametrize("base", ["tied", "untied"])
def test_rows_of_tokens_that_the_base_never_read_are_trained_alone(bases, base, tmp_path):
    """In embeddings and head, the head's counting in TRL's loss, which multiplies by its weight."""
    tokens = [277, 279]
    model = adapted(bases / base, new_tokens=tokens)
    add_fused_lm_head(model.get_base_model())
    ids = torch.arange(2, 12)[None]
    loss = model(input_ids=ids, labels=ids, fused_lm_head=True).loss
    assert loss.item() == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-5)
    loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and "trainable_tokens" in name}
    assert len({id(p) for p in trained.values()}) == (1 if base == "tied" else 2)
    # None of the tokens is read: what gradient there is comes through the head.
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())

    train(model)
    save_adapter(model, tmp_path)

    again = open_for_inference(tmp_path)[0]
    assert_same_logits(again, model)
    merged = again.merge_and_unload()
    assert_same_logits(merged, model)
    for layer in (merged.get_input_embeddings(), merged.get_output_embeddings()):
        fresh = opened(bases / base)
        is_head = layer is merged.get_output_embeddings()
        before = (fresh.get_output_embeddings() if is_head else fresh.get_input_embeddings()).weight
        changed = (layer.weight != before).any(dim=1).nonzero().flatten().tolist()
        assert set(changed) <= set(tokens)
        assert changed or not is_head  # batches do not have them to read


@pytest.mark.parametrize("base", ["tied", "untied"])
def test_what_trains_is_float32_in_a_model_of_bfloat16(bases, base, tmp_path):
    folder = bases / f"{base}_bfloat16"
    model = adapted(folder, opened(folder, dtype="auto"), added_tokens=True)

    train(model)  # without autocast

    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    model.to(torch.bfloat16)  # as TRL does to 4-bit models
    restore_float32(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    save_adapter(model, tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float32}
    assert_same_logits(open_for_inference(tmp_path)[0], model, tolerance=0.05 * logits(model).abs().max())


def test_a_sequence_classifiers_head_is_trained_whole(bases, tokenizer, tmp_path):
    model = opened(bases / "tied", auto_class=AutoModelForSequenceClassification, num_labels=1)
    model.config.pad_token_id = tokenizer.pad_token_id
    model = adapted(bases / "tied", model, task_type="SEQ_CLS")
    assert {name for name in trained_names(model) if ".lora_" not in name} == {"score.modules_to_save.default.weight"}

    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for batch in batches():
        (-model(input_ids=batch["input_ids"]).logits.sum()).backward()
        optimizer.step()
    save_adapter(model, tmp_path)

    again, its_tokenizer = open_for_inference(tmp_path)
    assert_same_logits(again, model)
    assert again.config.num_labels == 1
    assert its_tokenizer.get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("variant", "trained_besides"),
    [
        ("pissa", {"added_tokens": True}),
        ("eva", {"added_tokens": True}),
        ("pissa", {"new_tokens": [5, 7]}),
        ("eva", {"new_tokens": [5, 7]}),
        ("pissa", {"task_type": "SEQ_CLS"}),
    ],
)
def test_an_adapter_begins_again_with_what_is_trained_besides(bases, variant, trained_besides, tmp_path):
    def begun():
        classifies = "task_type" in trained_besides
        torch.manual_seed(0)
        auto_class = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
        model = opened(bases / "tied", auto_class=auto_class, **({"num_labels": 1} if classifies else {}))
        return adapted(bases / "tied", model, output_dir=tmp_path, **trained_besides, **VARIANTS[variant])

    first = begun()
    keep_initial_adapter(first, tmp_path)
    state, again = first.state_dict(), begun().state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(state[name], again[name]) for name in state)


def test_a_4_bit_base_keeps_its_bytes(bases, tmp_path):
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    stored = (bases / "tied" / "model.safetensors").read_bytes()
    model = opened(bases / "tied", quantization_config=nf4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if torch.is_tensor(tensor)}
    model = adapted(bases / "tied", model)

    train(model)
    save_adapter(model, tmp_path)

    after = {name.replace(".base_layer", ""): tensor for name, tensor in model.base_model.model.state_dict().items()}
    assert any(tensor.dtype == torch.uint8 for tensor in before.values())
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert (bases / "tied" / "model.safetensors").read_bytes() == stored
    again, _ = open_for_inference(tmp_path, quantization_config=nf4, dtype=torch.float32)
    assert_same_logits(again, model, tolerance=1e-2)


def test_adapters_stack_switch_combine_and_merge(bases, tmp_path):
    for name, lora_init in (("first", "default"), ("second", "pissa")):
        model = adapted(bases / "untied", lora_init=lora_init)
        save_adapter(train(model), tmp_path / name)
    alone = {name: logits(open_for_inference(tmp_path / name)[0]) for name in ("first", "second")}

    both, _ = open_for_inference(tmp_path / "first")
    both.load_adapter(tmp_path / "second", "second")
    for name in ("default", "second"):
        both.set_adapter(name)
        assert (logits(both) - alone["first" if name == "default" else name]).abs().max() < 1e-4
    both.base_model.set_adapter(["default", "second"])
    stacked = logits(both)
    both.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum", combination_type="cat")
    both.set_adapter("sum")
    assert (logits(both) - stacked).abs().max() < 1e-4
    assert (stacked - alone["first"]).abs().max() > 0.1
    assert (logits(both.merge_and_unload()) - stacked).abs().max() < 1e-4


def test_a_stranger_opens_an_adapter_by_its_base_relative_to_the_working_folder(bases, tmp_path, monkeypatch):
    shutil.copytree(bases / "tied", tmp_path / "runs" / "base")
    monkeypatch.chdir(tmp_path)
    model = train(adapted("runs/base", added_tokens=True, lora_init="pissa"))
    save_adapter(model, tmp_path / "runs" / "adapter")
    torch.save(logits(model), tmp_path / "expected.pt")
    stranger = (
        "import sys\nsys.modules['hf_models'] = sys.modules['training'] = None\n"
        "import torch\nfrom peft import AutoPeftModelForCausalLM\n"
        "model = AutoPeftModelForCausalLM.from_pretrained('runs/adapter', trust_remote_code=True).eval()\n"
        "torch.manual_seed(2)\nlogits = model(torch.randint(0, 200, (2, 12))).logits\n"
        "assert (logits - torch.load('expected.pt')).abs().max() < 1e-4\n"
        "assert (model.merge_and_unload()(torch.zeros(1, 3, dtype=int)).logits).isfinite().all()\n"
    )

    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    words = [sys.executable, "-c", stranger]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr


# ---- refusals ----


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"lora_r": 0}, "--lora_r is 0: give a rank of 1 or more."),
        ({"lora_alpha": 0}, "--lora_alpha is 0: give more than 0."),
        ({"lora_dropout": 1.0}, "--lora_dropout is 1.0: give 0 or more, and less than 1."),
        ({"lora_init": "pisa"}, "--lora_init is 'pisa': take default, gaussian, pissa, pissa_niter_N"),
        ({"lora_init": "pissa_niter_0"}, "--lora_init is 'pissa_niter_0'"),
        ({"lora_target_modules": ["q_proj", "query"]}, "names 'query', and LlamaStyleForCausalLM has no such layer"),
        ({"lora_target_modules": ["lm_head"]}, "names the head, 'lm_head', which is not adapted here"),
        ({"lora_init": "pissa", "lora_r": 40}, "k_proj has 32: give a lower rank."),
        ({"lora_init": "eva", "lora_r": 17}, "takes 34 directions, and model.layers.0.self_attn.k_proj has 32"),
    ],
)
def test_what_cannot_be_an_adapter_is_refused_in_a_sentence(bases, fields, sentence):
    with pytest.raises(ValueError, match="--lora") as refusal:
        adapted(bases / "tied", **fields)

    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_splitting_a_base_that_would_be_rounded_is_refused(bases):
    with pytest.raises(ValueError, match="bfloat16 would round what is left: give --dtype float32"):
        adapted(bases / "tied", opened(bases / "tied", dtype=torch.bfloat16), lora_init="pissa")
    quantised = opened(bases / "tied", quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    with pytest.raises(ValueError, match="weights of 4 bits do not say what is left"):
        adapted(bases / "tied", quantised, lora_init="olora")
    with pytest.raises(ValueError, match="--lora_init olora cannot begin from a Conv1D"):
        adapted(bases / "gpt2", lora_init="olora")


def test_eva_without_enough_tokens_is_refused_rather_than_waited_for(bases):
    model, arguments = opened(bases / "tied"), AdapterArguments(lora_r=4, lora_init="eva")
    short = {"input_ids": torch.zeros(1, 9, dtype=int), "labels": torch.full((1, 9), -100)}

    with pytest.raises(ValueError, match="takes 8 directions from each batch, and no row has so many trained tokens"):
        add_adapter(model, arguments, task_type="CAUSAL_LM", base="base", batches=[short])


@pytest.fixture
def adapter(bases, tmp_path):
    """The folder of an adapter of `tied`, as a training run leaves it."""
    save_adapter(adapted(bases / "tied"), tmp_path / "run")
    fingerprint = stored_fingerprint(str(bases / "tied"))
    run = {"task": "sft", "data": {"model": {"path": str(bases / "tied"), "fingerprint": fingerprint}}}
    (tmp_path / "run" / "run.json").write_text(json.dumps(run))
    return tmp_path / "run"


def test_the_base_is_known_by_its_hash_wherever_it_lies(bases, adapter, tmp_path):
    shutil.copytree(bases / "tied", tmp_path / "moved")
    checkpoint = shutil.copytree(adapter, adapter / "checkpoint-3", ignore=lambda *_: ["run.json"])

    named = os.path.relpath(bases / "tied")
    for folder in (adapter, checkpoint):
        check_base(folder, str(tmp_path / "moved"))
        with pytest.raises(ValueError, match=f"is an adapter of {named}, whose weights hash to") as refusal:
            open_for_inference(folder, base=str(bases / "untied"))
        assert stored_fingerprint(str(bases / "untied")) in str(refusal.value)
        assert stored_fingerprint(str(bases / "tied")) in str(refusal.value)


def test_without_a_run_the_base_is_known_by_its_name(bases, adapter, tmp_path):
    (adapter / "run.json").unlink()
    shutil.copytree(bases / "tied", tmp_path / "elsewhere" / "tied")

    check_base(adapter, str(tmp_path / "elsewhere" / "tied"))
    with pytest.raises(ValueError, match=f"is an adapter of .*tied, not of {bases / 'untied'}"):
        check_base(adapter, str(bases / "untied"))


def test_a_base_that_is_gone_is_named(adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "runs/gone"}))

    with pytest.raises(ValueError, match="is an adapter of runs/gone, which is not there: give its folder"):
        open_for_inference(adapter)


def test_a_base_is_refused_for_what_is_no_adapter(bases):
    with pytest.raises(ValueError, match=r"--base is for an adapter, and .*tied holds none"):
        open_for_inference(bases / "tied", base=str(bases / "untied"))


def test_the_beginning_of_another_adapter_in_the_folder_is_refused(bases, tmp_path):
    keep_initial_adapter(adapted(bases / "tied", lora_init="pissa"), tmp_path)

    with pytest.raises(ValueError, match="adapter_initial is not of this model: choose another --output_dir"):
        adapted(bases / "gpt2", lora_init="pissa", output_dir=tmp_path)
