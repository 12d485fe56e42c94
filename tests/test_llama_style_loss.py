"""The loss without logits and its gradients are those of the plain cross-entropy, whatever the chunks."""

import pytest
import torch
from llama_pair import TINY, build_pair, random_ids
from peft import LoraConfig, get_peft_model
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_models.llama_style import chunked_loss_llama_style
from hf_models.llama_style.chunked_loss_llama_style import chunked_causal_lm_loss

BATCH, LENGTH, HIDDEN, VOCAB = 3, 14, 8, 50


@pytest.fixture(params=[1, 5, 7, 100], ids=lambda tokens: f"chunks of {tokens}")
def chunk(request, monkeypatch):
    """Tokens in a chunk: one, a remainder at the end (42 = 8 * 5 + 2), none (42 = 6 * 7), all at once."""
    monkeypatch.setattr(chunked_loss_llama_style, "LOGITS_PER_CHUNK_CPU", request.param * VOCAB + 3)


def inputs(ignored: float = 0.3, dtype=torch.float32):
    hidden = torch.randn(BATCH, LENGTH, HIDDEN, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCAB, HIDDEN, dtype=dtype, requires_grad=True)
    labels = torch.randint(VOCAB, (BATCH, LENGTH)).masked_fill(torch.rand(BATCH, LENGTH) < ignored, -100)
    return hidden, weight, labels


def plain_loss(hidden, weight, labels, **kwargs):
    return ForCausalLMLoss(hidden @ weight.t(), labels, vocab_size=VOCAB, **kwargs)


def assert_same_loss_and_gradients(hidden, weight, labels, scale=1.0, rtol=None, atol=None, **kwargs):
    loss, expected = (f(hidden, weight, labels, **kwargs) for f in (chunked_causal_lm_loss, plain_loss))
    torch.testing.assert_close(loss, expected)
    gradients = torch.autograd.grad(loss * scale, (hidden, weight))
    expected_gradients = torch.autograd.grad(expected * scale, (hidden, weight))
    torch.testing.assert_close(gradients, expected_gradients, rtol=rtol, atol=atol)


@pytest.mark.usefixtures("chunk")
class TestEqualsPlainLoss:
    def test_mean_over_kept_labels(self):
        assert_same_loss_and_gradients(*inputs())

    def test_scaled_afterwards(self):
        assert_same_loss_and_gradients(*inputs(), scale=1 / 3)

    @pytest.mark.parametrize("count", [77, torch.tensor(77)])
    def test_num_items_in_batch(self, count):
        assert_same_loss_and_gradients(*inputs(), num_items_in_batch=count)

    def test_other_ignore_index(self):
        hidden, weight, labels = inputs(ignored=0)
        assert_same_loss_and_gradients(hidden, weight, labels, ignore_index=int(labels[0, 3]))

    def test_shifted_labels(self):
        hidden, weight, labels = inputs()
        assert_same_loss_and_gradients(hidden, weight, None, shift_labels=labels)

    def test_whole_rows_ignored(self):
        hidden, weight, labels = inputs()
        labels[1] = -100
        assert_same_loss_and_gradients(hidden, weight, labels)

    def test_extreme_logits(self):
        hidden, weight, labels = inputs()
        with torch.no_grad():
            hidden *= 300  # logits in the thousands: exp would overflow, and their own rounding shows in the gradients
        assert_same_loss_and_gradients(hidden, weight, labels, rtol=1e-3, atol=1e-2)

    def test_frozen_head_and_frozen_body(self):
        hidden, weight, labels = inputs()
        expected = torch.autograd.grad(plain_loss(hidden, weight, labels), (hidden, weight))
        (hidden_grad,) = torch.autograd.grad(chunked_causal_lm_loss(hidden, weight.detach(), labels), hidden)
        (weight_grad,) = torch.autograd.grad(chunked_causal_lm_loss(hidden.detach(), weight, labels), weight)
        torch.testing.assert_close((hidden_grad, weight_grad), expected)

    def test_no_gradient_asked_for(self):
        hidden, weight, labels = inputs()
        with torch.no_grad():
            loss = chunked_causal_lm_loss(hidden, weight, labels)
            torch.testing.assert_close(loss, plain_loss(hidden, weight, labels))
        assert not loss.requires_grad

    def test_float64(self):
        hidden, weight, labels = inputs()
        hidden, weight = hidden.detach().double(), weight.detach().double()
        loss = chunked_causal_lm_loss(hidden.requires_grad_(), weight.requires_grad_(), labels)
        assert loss.dtype == torch.float32
        gradients = torch.autograd.grad(loss, (hidden, weight))
        expected = torch.autograd.grad(plain_loss(hidden, weight, labels), (hidden, weight))
        torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-7)


def test_a_frozen_head_gets_no_gradient_buffer():
    """What a LoRA run saves: no `(vocab, hidden)` matrix beside the weights."""
    hidden, weight, labels = inputs()
    loss = chunked_causal_lm_loss(hidden, weight.detach(), labels)
    hidden_grad, weight_grad, _ = loss.grad_fn.saved_tensors
    assert hidden_grad.shape == (BATCH * LENGTH, HIDDEN)
    assert weight_grad is None


def test_everything_ignored():
    hidden, weight, labels = inputs(ignored=1.0)
    for loss in (chunked_causal_lm_loss, plain_loss):
        value = loss(hidden, weight, labels)
        assert value.isnan()  # a mean over nothing
        assert not any(gradient.any() for gradient in torch.autograd.grad(value, (hidden, weight)))
        # Trainer's count covers the other accumulated batches: this one adds nothing to them.
        value = loss(hidden, weight, labels, num_items_in_batch=torch.tensor(12))
        assert value == 0
        assert not any(gradient.any() for gradient in torch.autograd.grad(value, (hidden, weight)))


def test_bfloat16_autocast_is_as_exact_as_the_plain_loss():
    hidden, weight, labels = inputs()
    exact = torch.autograd.grad(plain_loss(hidden, weight, labels), (hidden, weight))
    errors = []
    for loss in (chunked_causal_lm_loss, plain_loss):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(hidden, weight, labels)
        gradients = torch.autograd.grad(value, (hidden, weight))
        assert all(gradient.dtype == torch.float32 for gradient in gradients)
        errors.append([(g - e).norm() / e.norm() for g, e in zip(gradients, exact, strict=True)])
    for ours, plain in zip(*errors, strict=True):
        assert ours < 0.01
        assert ours < 1.2 * plain


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_over_many_chunks_are_as_exact_as_the_plain_loss(dtype, monkeypatch):
    """With Trainer's count over millions of tokens and a loss scaler's factor, as in a large float16 run."""
    monkeypatch.setattr(chunked_loss_llama_style, "LOGITS_PER_CHUNK_CPU", VOCAB)
    hidden, weight, labels = inputs()
    exact = torch.autograd.grad(plain_loss(hidden, weight, labels, num_items_in_batch=4_000_000), (hidden, weight))
    half = [tensor.detach().to(dtype).requires_grad_() for tensor in (hidden, weight)]
    errors = []
    for loss in (chunked_causal_lm_loss, plain_loss):
        value = loss(*half, labels, num_items_in_batch=4_000_000) * 65536.0
        gradients = torch.autograd.grad(value, half)
        errors.append([(g.float() / 65536.0 - e).norm() / e.norm() for g, e in zip(gradients, exact, strict=True)])
    for ours, plain in zip(*errors, strict=True):
        assert ours < 1.2 * plain


def test_second_derivatives_are_refused_rather_than_wrong():
    hidden, weight, labels = inputs()
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(chunked_causal_lm_loss(hidden, weight, labels), hidden, create_graph=True)


class TestInTheModel:
    def test_a_head_or_a_loss_of_ones_own_is_called(self):
        model, _ = build_pair()
        model.train()
        input_ids, calls = random_ids(2, 12), []
        handle = model.lm_head.register_forward_hook(lambda *_: calls.append("head"))
        assert model(input_ids, labels=input_ids).logits is not None
        assert calls == ["head"]
        handle.remove()
        model.loss_function = lambda **kwargs: kwargs["logits"].sum() * 0 + 42
        assert model(input_ids, labels=input_ids).loss == 42

    def test_accumulated_micro_batches_equal_one_batch(self):
        model, _ = build_pair()
        model.train()
        input_ids, labels = random_ids(4, 12), random_ids(4, 12)
        labels[0, :9] = labels[2] = -100  # uneven counts: a mean of means would differ
        model(input_ids, labels=labels).loss.backward()
        expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        model.zero_grad()
        count = (labels[:, 1:] != -100).sum()
        for row, label in zip(input_ids.split(1), labels.split(1), strict=True):
            model(row, labels=label, num_items_in_batch=count).loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)

    def test_evaluation_returns_logits(self):
        model, _ = build_pair()
        input_ids = random_ids(2, 12)
        evaluated = model(input_ids, labels=input_ids)
        assert evaluated.logits.shape == (2, 12, TINY["vocab_size"])
        model.train()
        trained = model(input_ids, labels=input_ids)
        assert trained.logits is None
        torch.testing.assert_close(trained.loss, evaluated.loss)
        assert model(input_ids).logits is not None  # no labels: TRL computes its own loss

    def test_an_adapter_on_the_head_is_trained(self):
        """The head's own matrix is then not the whole head: it takes the way of the logits."""
        model, reference = build_pair()
        lora = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
        input_ids = random_ids(2, 12)
        steps = []
        for base in (model, reference):
            torch.manual_seed(1)
            adapted = get_peft_model(base, lora).train()
            output = adapted(input_ids=input_ids, labels=input_ids)
            output.loss.backward()
            steps.append((output.loss, {n: p.grad for n, p in adapted.named_parameters() if p.grad is not None}))
        assert any("lm_head.lora_A" in name for name in steps[0][1])
        torch.testing.assert_close(steps[0], steps[1], rtol=1e-4, atol=1e-5)

    def test_an_adapter_elsewhere_keeps_the_chunks(self):
        model, _ = build_pair()
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")).train()
        input_ids = random_ids(2, 12)
        output = adapted(input_ids=input_ids, labels=input_ids)
        assert output.logits is None
        output.loss.backward()
        assert model.lm_head.weight.grad is None
