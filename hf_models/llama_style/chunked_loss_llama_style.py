"""Next-token loss that never holds the `(tokens, vocab)` logits.

The head and the cross-entropy run over chunks of tokens, and each chunk's gradients are taken on the spot: two buffers,
used by every chunk, take its logits and the gradient of the loss with respect to them, which two matrix products turn
into the gradients of the hidden states and of the head. What the backward pass needs is then `(tokens, hidden)` and
`(vocab, hidden)`, not `(tokens, vocab)`. The arithmetic is that of the plain loss: nothing is approximated.

This file is published beside the weights (remote code): it imports nothing of our package.
"""

import torch
from torch import nn

# Logits of a chunk, in elements: on a CPU 64 MiB of float32, 512 tokens of a vocabulary of 32,000; with fewer, the
# products with the head become slower. The figure for GPUs is not measured.
LOGITS_PER_CHUNK_CPU = 2**24
LOGITS_PER_CHUNK_GPU = 2**26


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, denominator, ignore_index):
        """`hidden (tokens, hidden)`, `weight (vocab, hidden)`, `labels (tokens,)`, `denominator ()` -> loss `()`."""
        needs_hidden_grad, needs_weight_grad = ctx.needs_input_grad[:2]
        device = hidden.device.type
        compute_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        budget = LOGITS_PER_CHUNK_CPU if device == "cpu" else LOGITS_PER_CHUNK_GPU
        chunk = max(1, min(hidden.shape[0], budget // weight.shape[0]))

        head = weight.to(compute_dtype)
        kept = labels != ignore_index
        targets = labels.masked_fill(~kept, 0)
        # The division by the denominator waits: in half precision it would take small gradients below what a number
        # can hold, before the loss scaler has lifted them.
        kept_rows = kept.float()[:, None]
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_grad = torch.empty_like(hidden) if needs_hidden_grad else None
        # float32 whatever the weight's dtype: sums over many chunks lose bits in bfloat16.
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if needs_weight_grad else None

        # Both are reused by every chunk: on a CPU, fresh memory of this size costs page faults each time.
        logits_buffer = hidden.new_empty(chunk, weight.shape[0], dtype=compute_dtype)
        probs_buffer = hidden.new_empty(chunk, weight.shape[0], dtype=torch.float32)
        with torch.autocast(device, enabled=False):
            for start in range(0, hidden.shape[0], chunk):
                rows = slice(start, start + chunk)
                states, target, weights = hidden[rows].to(compute_dtype), targets[rows, None], kept_rows[rows]
                logits, probs = logits_buffer[: len(states)], probs_buffer[: len(states)]
                torch.mm(states, head.t(), out=logits)
                torch.log_softmax(logits, dim=-1, dtype=torch.float32, out=probs)
                loss -= (probs.gather(1, target) * weights).sum()
                if not (needs_hidden_grad or needs_weight_grad):
                    continue
                # softmax - one_hot is the gradient of the sum; which rows count, the narrow factors tell.
                probs.exp_().scatter_add_(1, target, torch.full_like(weights, -1.0))
                logits_grad = probs if compute_dtype == torch.float32 else logits.copy_(probs)
                if needs_hidden_grad:
                    hidden_grad[rows] = (logits_grad @ head) * weights
                if needs_weight_grad:
                    kept_states = (states * weights).to(compute_dtype)
                    if compute_dtype == torch.float32:
                        weight_grad.addmm_(logits_grad.t(), kept_states)
                    else:
                        weight_grad += logits_grad.t() @ kept_states

        ctx.save_for_backward(hidden_grad, weight_grad, denominator)
        ctx.weight_dtype = weight.dtype
        return loss / denominator

    @staticmethod
    def backward(ctx, loss_grad):
        if torch.is_grad_enabled():
            raise RuntimeError("The chunked loss has no second derivatives: call model.eval() to take them.")
        hidden_grad, weight_grad, denominator = ctx.saved_tensors
        scale = loss_grad / denominator.clamp(min=1)  # without a kept label the gradients are 0, and the loss is 0 / 0
        return (
            None if hidden_grad is None else hidden_grad * scale,
            None if weight_grad is None else (weight_grad * scale).to(ctx.weight_dtype),
            None,
            None,
            None,
        )


def chunked_causal_lm_loss(
    hidden_states: torch.Tensor,
    head_weight: torch.Tensor,
    labels: torch.Tensor | None,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor:
    """Cross-entropy of the next token, equal to transformers' `ForCausalLMLoss` on `hidden_states @ head_weight.T`.

    Args:
        hidden_states: `(batch, length, hidden)`, the last layer's output after its norm.
        head_weight: `(vocab, hidden)`.
        labels: `(batch, length)` token ids, not shifted; `ignore_index` where there is nothing to predict.
        num_items_in_batch: what the summed loss is divided by (Trainer's count over all accumulated batches); the
            number of kept labels when None.
        shift_labels: `(batch, length)` labels already shifted, in place of `labels`.

    Returns: a float32 scalar.
    """
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=ignore_index)
    targets = shift_labels.reshape(-1).to(hidden_states.device)
    denominator = (targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    denominator = torch.as_tensor(denominator, dtype=torch.float32, device=hidden_states.device)
    flat = hidden_states.reshape(-1, hidden_states.shape[-1])
    return _ChunkedCrossEntropy.apply(flat, head_weight, targets, denominator, ignore_index)
