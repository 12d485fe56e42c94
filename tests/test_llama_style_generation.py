"""Generation with every cache gives transformers' tokens, alone, in a left-padded batch, and by beam search."""

import pytest
import torch
from llama_pair import build_pair, padded_batch, random_ids
from transformers import CompileConfig, DynamicCache, MistralConfig, MistralForCausalLM, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer

GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
PAIRS = {
    "full": {},
    "multi-head": {"num_key_value_heads": 4},
    "dynamic rope": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    "sliding window": {"theirs": MistralForCausalLM, "their_config": MistralConfig, "sliding_window": 5},
}


@pytest.fixture(params=PAIRS.values(), ids=PAIRS)
def pair(request):
    return build_pair(**request.param)


@torch.no_grad()
def test_cached_logits_equal_uncached(pair):
    model, reference = pair
    input_ids = random_ids(2, 20)
    expected = reference(input_ids, use_cache=False).logits
    cache = DynamicCache(config=model.config)
    parts = [model(part, past_key_values=cache).logits for part in input_ids.split([7, 1, 1, 8, 3], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-5)
    assert cache.get_seq_length() == 20


@torch.no_grad()
@pytest.mark.parametrize(
    "cache",
    [{}, {"cache_implementation": "static", "disable_compile": True}, {"use_cache": False}],
    ids=["dynamic", "static", "none"],
)
def test_greedy_tokens_are_transformers(pair, cache):
    model, reference = pair
    input_ids = random_ids(2, 9)
    assert torch.equal(model.generate(input_ids, **GREEDY | cache), reference.generate(input_ids, **GREEDY))


@pytest.mark.slow
@torch.no_grad()
def test_compiled_generation_gives_the_same_tokens():
    model, reference = build_pair()
    input_ids = random_ids(2, 9)
    compile_config = CompileConfig(fullgraph=True)
    compile_config._compile_all_devices = True  # transformers compiles on GPUs only, unless told
    tokens = model.generate(input_ids, cache_implementation="static", compile_config=compile_config, **GREEDY)
    assert torch.equal(tokens, reference.generate(input_ids, **GREEDY))


@torch.no_grad()
@pytest.mark.parametrize(
    "settings", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"do_sample": True}]
)
def test_beams_and_samples_are_transformers(pair, settings):
    input_ids, mask = padded_batch("left")
    outputs = []
    for model in pair:
        torch.manual_seed(3)
        outputs.append(model.generate(input_ids, attention_mask=mask, **GREEDY | settings))
    assert torch.equal(*outputs)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_left_padded_batch_generates_what_each_text_does_alone(pair, attention):
    model, _ = pair
    model.set_attn_implementation(attention)
    input_ids, mask = padded_batch("left")
    batch = model.generate(input_ids, attention_mask=mask, **GREEDY)[:, 20:]
    for row in range(len(input_ids)):
        text = input_ids[row, mask[row].bool()][None]
        alone = model.generate(text, attention_mask=torch.ones_like(text), **GREEDY)[0, text.shape[1] :]
        assert torch.equal(batch[row], alone)


@torch.no_grad()
def test_static_cache_by_hand():
    model, reference = build_pair()
    input_ids = random_ids(2, 10)
    cache = StaticCache(config=model.config, max_cache_len=16)
    parts = [model(part, past_key_values=cache).logits for part in input_ids.split([6, 1, 1, 2], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), reference(input_ids).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_sliding_window_bounds_the_cache():
    model, _ = build_pair(theirs=MistralForCausalLM, their_config=MistralConfig, sliding_window=5)
    cache = model(random_ids(1, 30)).past_key_values
    assert all(isinstance(layer, DynamicSlidingWindowLayer) for layer in cache.layers)
    assert cache.layers[0].keys.shape[2] < 30


@torch.no_grad()
def test_speculative_and_continued_generation():
    """The cache can be cropped and handed on."""
    model, reference = build_pair()
    input_ids = random_ids(1, 9)
    expected = reference.generate(input_ids, **GREEDY)
    assert torch.equal(model.generate(input_ids, assistant_model=model, **GREEDY), expected)
    first = model.generate(input_ids, return_dict_in_generate=True, **GREEDY | {"max_new_tokens": 5})
    sequences = first.sequences
    rest = model.generate(
        sequences,
        attention_mask=torch.ones_like(sequences),  # or a generated padding token would be masked
        past_key_values=first.past_key_values,
        **GREEDY | {"max_new_tokens": 7},
    )
    assert torch.equal(rest, expected)
