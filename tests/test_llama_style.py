"""The decoder computes what transformers' Llama computes from the same weights (with a sliding window, its Mistral)."""

import pytest
import torch
from llama_pair import TINY, build_pair, padded_batch, random_ids, randomise_norms
from transformers import (
    LlamaForSequenceClassification,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
)

from hf_models import LlamaStyleConfig, LlamaStyleForCausalLM, LlamaStyleForSequenceClassification, LlamaStyleModel
from hf_models.llama_style.modeling_llama_style import LlamaStyleHead
from hf_models.llama_style.sizes import SIZES

SHAPES = {
    "grouped": {},
    "multi-head": {"num_key_value_heads": 4},
    "multi-query": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 16},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "another activation": {"hidden_act": "gelu"},
}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": 24,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "proportional": {"rope_type": "proportional", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_step(model, reference, **inputs):
    """Equal loss and gradients, ours from the loss without logits (training mode)."""
    model.train(), reference.train()
    ours, theirs = model(**inputs), reference(**inputs)
    assert ours.logits is None
    assert_close(ours.loss, theirs.loss)
    ours.loss.backward(), theirs.loss.backward()
    expected = gradients(reference)
    assert expected.keys() == gradients(model).keys()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


class TestEqualsTransformers:
    @pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
    def test_shapes(self, fields):
        model, reference = build_pair(**fields)
        input_ids = random_ids(2, 20)
        ours, theirs = model(input_ids, labels=input_ids), reference(input_ids, labels=input_ids)
        assert_close(ours.logits, theirs.logits)
        assert_close(ours.loss, theirs.loss)
        assert_same_step(model, reference, input_ids=input_ids, labels=input_ids)

    # 20 tokens lie within every original context above, 80 beyond: dynamic and longrope change their frequencies.
    @pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
    def test_ropes(self, rope):
        model, reference = build_pair(rope_parameters=rope)
        for length in (20, 80, 20):
            input_ids = random_ids(2, length)
            assert_close(model(input_ids).logits, reference(input_ids).logits)
        input_ids = random_ids(2, 40)
        assert_same_step(model, reference, input_ids=input_ids, labels=input_ids)

    @pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding(self, side, attention):
        model, reference = build_pair(attention=attention)
        input_ids, mask = padded_batch(side)
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)
        inputs = {"input_ids": input_ids, "attention_mask": mask, "position_ids": position_ids}
        text = mask.bool()
        with torch.no_grad():
            assert_close(model(**inputs).logits[text], reference(**inputs).logits[text])
        if attention != "flex_attention":  # it has no gradients on a CPU
            assert_same_step(model, reference, **inputs, labels=input_ids.masked_fill(~text, -100))

    @pytest.mark.parametrize("attention", ["eager", "flex_attention"])
    def test_attention_implementations_agree(self, attention):
        model, _ = build_pair()
        input_ids, mask = padded_batch("left")
        with torch.no_grad():
            expected = model(input_ids, attention_mask=mask).logits
            model.set_attn_implementation(attention)
            logits = model(input_ids, attention_mask=mask).logits
        assert_close(logits[mask.bool()], expected[mask.bool()])

    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_sliding_window_is_mistrals(self, attention):
        model, reference = build_pair(
            theirs=MistralForCausalLM, their_config=MistralConfig, attention=attention, sliding_window=6
        )
        input_ids = random_ids(2, 20)
        assert_close(model(input_ids).logits, reference(input_ids).logits)
        assert_same_step(model, reference, input_ids=input_ids, labels=input_ids)
        full, _ = build_pair(attention=attention)
        full.load_state_dict(model.state_dict())
        assert not torch.allclose(full(input_ids).logits[:, -1], model.eval()(input_ids).logits[:, -1], atol=1e-3)

    def test_hidden_states_and_attentions(self):
        model, reference = build_pair(attention="eager")
        input_ids = random_ids(2, 10)
        ours, theirs = (m(input_ids, output_hidden_states=True, output_attentions=True) for m in (model, reference))
        for one, other in zip(
            ours.hidden_states + ours.attentions, theirs.hidden_states + theirs.attentions, strict=True
        ):
            assert_close(one, other)

    def test_inputs_embeds_four_dimensional_mask_and_tuples(self):
        model, reference = build_pair()
        input_ids = random_ids(2, 10)
        embeds = model.get_input_embeddings()(input_ids)
        mask = torch.ones(10, 10).tril().bool()[None, None].repeat(2, 1, 1, 1)
        mask[:, :, :, 3] = False
        mask[:, :, 3, 3] = True
        inputs = {"inputs_embeds": embeds, "attention_mask": mask}
        assert_close(model(**inputs).logits, reference(**inputs).logits)
        assert_close(model(**inputs, return_dict=False)[0], reference(**inputs, return_dict=False)[0])

    def test_base_model(self):
        model, reference = build_pair(ours=LlamaStyleModel, theirs=LlamaModel)
        input_ids = random_ids(2, 10)
        assert_close(model(input_ids).last_hidden_state, reference(input_ids).last_hidden_state)

    @pytest.mark.parametrize("kept", [1, 3, torch.tensor([2, 7])], ids=["last", "last three", "two positions"])
    def test_logits_to_keep(self, kept):
        model, reference = build_pair()
        input_ids = random_ids(2, 10)
        logits = model(input_ids, logits_to_keep=kept).logits
        assert logits.shape[1] == (kept if isinstance(kept, int) else len(kept))
        assert_close(logits, reference(input_ids, logits_to_keep=kept).logits)

    def test_bfloat16(self):
        model, reference = build_pair()
        model, reference = model.to(torch.bfloat16), reference.to(torch.bfloat16)
        input_ids = random_ids(2, 20)
        logits = model(input_ids).logits
        assert logits.dtype == torch.bfloat16
        exact = build_pair()[1]
        exact.load_state_dict(reference.state_dict())
        expected = exact(input_ids).logits
        # Rounding differs; ours may be no further from the exact result than theirs is.
        our_error = (logits.float() - expected).pow(2).mean().sqrt()
        their_error = (reference(input_ids).logits.float() - expected).pow(2).mean().sqrt()
        assert our_error < 1.2 * their_error

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("labels", [1, 3])
    def test_sequence_classification(self, side, labels):
        model, reference = build_pair(
            ours=LlamaStyleForSequenceClassification, theirs=LlamaForSequenceClassification, num_labels=labels
        )
        input_ids, mask = padded_batch(side)
        target = torch.rand(3) if labels == 1 else torch.tensor([0, 2, 1])
        inputs = {"input_ids": input_ids, "attention_mask": mask, "labels": target}
        ours, theirs = model(**inputs), reference(**inputs)
        assert ours.logits.shape == (3, labels)
        assert_close(ours.logits, theirs.logits)
        assert_close(ours.loss, theirs.loss)
        # The mask alone and the padding token alone both tell where the text ends.
        model.config.pad_token_id = None
        assert_close(model(**inputs).logits, theirs.logits)
        embeds = model.get_input_embeddings()(input_ids)
        assert_close(model(inputs_embeds=embeds, attention_mask=mask).logits, theirs.logits)
        if side == "right":
            model.config.pad_token_id = TINY["pad_token_id"]
            assert_close(model(input_ids).logits, theirs.logits)


class TestHead:
    """The head's few-row products, split over the threads, are those of a Linear."""

    @torch.no_grad()
    @pytest.mark.parametrize("vocab", [96, 97], ids=["threads divide it", "they do not"])
    @pytest.mark.parametrize("shape", [(1, 1), (3, 1), (64, 1), (2, 4), (65, 1), (0, 1), (5,)])
    def test_equals_a_linear(self, vocab, shape):
        head = LlamaStyleHead(32, vocab)
        states = torch.randn(*shape, 32)
        torch.testing.assert_close(head(states), torch.nn.functional.linear(states, head.weight))

    def test_gradients_flow(self):
        head = LlamaStyleHead(32, 96)
        head(torch.randn(1, 32)).sum().backward()
        assert head.weight.grad.any()

    def test_resized_vocabulary_still_trains_without_logits(self):
        model, _ = build_pair()
        model.resize_token_embeddings(100)
        model.train()
        output = model(random_ids(2, 8), labels=random_ids(2, 8))
        assert output.logits is None
        assert model.eval()(random_ids(1, 3)).logits.shape == (1, 3, 100)


class TestPacking:
    """Documents packed into one row, with positions that restart, do not see each other."""

    @pytest.mark.parametrize("use_cache", [None, False])
    @pytest.mark.parametrize("fields", [{}, {"sliding_window": 4}], ids=["full", "sliding window"])
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_packed_logits_equal_separate_logits(self, use_cache, fields, attention):
        model = LlamaStyleForCausalLM._from_config(LlamaStyleConfig(**TINY | fields), attn_implementation=attention)
        randomise_norms(model.eval())
        documents = [random_ids(1, length) for length in (7, 1, 12)]
        packed = torch.cat(documents, dim=1)
        position_ids = torch.cat([torch.arange(document.shape[1]) for document in documents])[None]
        logits = model(packed, position_ids=position_ids, use_cache=use_cache).logits
        expected = torch.cat([model(document).logits for document in documents], dim=1)
        assert_close(logits, expected)
        assert not torch.allclose(logits, model(packed).logits, atol=1e-3)


class TestTraining:
    def test_gradient_checkpointing_changes_no_gradient(self):
        model, _ = build_pair()
        model.train()
        input_ids = random_ids(2, 20)
        model(input_ids, labels=input_ids).loss.backward()
        expected = gradients(model)
        model.zero_grad()
        model.gradient_checkpointing_enable()
        runs = []
        model.model.layers[0].self_attn.register_forward_hook(lambda *_: runs.append("attention"))
        model(input_ids, labels=input_ids).loss.backward()
        assert len(runs) == 2  # once forward, once more when its gradients are wanted
        for name, gradient in gradients(model).items():
            assert torch.equal(gradient, expected[name]), name

    @pytest.mark.slow
    def test_compiles_to_one_graph(self):
        model, _ = build_pair()
        input_ids = random_ids(2, 20)
        compiled = torch.compile(model, fullgraph=True)
        assert_close(compiled(input_ids, use_cache=False).logits, model(input_ids).logits)

        model.train()
        expected = model(input_ids, labels=input_ids).loss
        expected.backward()
        expected_gradients = gradients(model)
        model.zero_grad()
        loss = compiled(input_ids, labels=input_ids, use_cache=False).loss
        loss.backward()
        assert_close(loss, expected)
        for name, gradient in gradients(model).items():
            assert_close(gradient, expected_gradients[name])

    def test_attention_dropout_is_for_training_only(self):
        model, reference = build_pair(attention_dropout=0.5)
        input_ids = random_ids(2, 20)
        assert_close(model(input_ids).logits, reference(input_ids).logits)
        model.train()
        assert not torch.allclose(model(input_ids).logits, model(input_ids).logits)


class TestConfig:
    @pytest.mark.parametrize(
        ("fields", "sentence"),
        [
            ({"hidden_size": 30}, r"num_attention_heads \(4\) does not divide hidden_size \(30\)"),
            ({"num_key_value_heads": 3}, r"num_key_value_heads \(3\) does not divide num_attention_heads \(4\)"),
            ({"head_dim": 7}, "head_dim is 7: .* give an even number"),
            (
                {"rope_parameters": {"rope_type": "su", "rope_theta": 1e4}},
                "rope_type is 'su': choose one of default, linear",
            ),
            ({"num_attention_heads": 0}, "num_attention_heads is 0: give 1 or more"),
            ({"num_key_value_heads": 0}, "num_key_value_heads is 0: give 1 or more"),
            ({"vocab_size": -1}, "vocab_size is -1: give 1 or more"),
            ({"sliding_window": 0}, "sliding_window is 0: give 1 or more"),
        ],
    )
    def test_an_impossible_shape_is_refused(self, fields, sentence):
        with pytest.raises(ValueError, match=sentence):
            LlamaStyleConfig(**TINY | fields)

    def test_a_wrong_type_is_refused(self):
        with pytest.raises(Exception, match="hidden_size"):
            LlamaStyleConfig(**TINY | {"hidden_size": "wide"})

    def test_both_or_neither_input_is_refused(self):
        model, _ = build_pair()
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model()
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(random_ids(1, 3), inputs_embeds=torch.zeros(1, 3, 32))

    def test_classification_that_cannot_tell_padding_is_refused(self):
        model = LlamaStyleForSequenceClassification(LlamaStyleConfig(**TINY | {"pad_token_id": None}))
        with pytest.raises(ValueError, match="Give a 2-D attention_mask, or set config"):
            model(random_ids(2, 5))
        assert model(random_ids(1, 5)).logits.shape == (1, 2)

    def test_tensor_parallel_plan_names_modules(self):
        """A name that matches nothing would silently leave a matrix whole."""
        model, reference = build_pair()
        modules = {".".join("*" if part.isdigit() else part for part in n.split(".")) for n, _ in model.named_modules()}
        assert model.tp_plan.keys() == reference.tp_plan.keys()
        for name in model.tp_plan:
            assert name in modules


@pytest.mark.parametrize("name", SIZES)
def test_sizes_have_the_stated_number_of_parameters(name):
    parameters, config = SIZES[name]
    with torch.device("meta"):
        model = LlamaStyleForCausalLM(LlamaStyleConfig(**config))
    assert model.num_parameters() == parameters
    if config["hidden_size"] <= 576:  # our own: bitsandbytes quantises blocks of 64
        assert config["hidden_size"] % 64 == config["intermediate_size"] % 64 == 0


@pytest.mark.parametrize(
    ("name", "published_billions"),
    # arXiv 2302.13971, table 2; 2307.09288; the model cards of Llama 3.2.
    [
        ("llama_7b", 6.7),
        ("llama_13b", 13.0),
        ("llama_33b", 32.5),
        ("llama_65b", 65.2),
        ("llama2_70b", 69.0),
        ("llama3_8b", 8.03),
        ("llama3_70b", 70.6),
        ("llama3.2_1b", 1.23),
        ("llama3.2_3b", 3.21),
    ],
)
def test_sizes_are_the_published_ones(name, published_billions):
    assert SIZES[name].parameters / 1e9 == pytest.approx(published_billions, rel=0.006)
