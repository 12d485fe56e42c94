"""Next-token loss that never holds the `(tokens, vocab)` logits.

The head and the cross-entropy run over chunks of tokens, and each chunk's gradients are taken on the spot: a chunk's
logits become, in place, the gradient of the loss with respect to them, which two matrix products turn into the
gradients of the hidden states and of the head. What the backward pass needs is then `(tokens, hidden)` and
`(vocab, hidden)`, not `(tokens, vocab)`. The arithmetic is that of the plain loss: nothing is approximated.

This file is published beside the weights (remote code): it imports nothing of our package.
"""

import torch
from torch import nn

# Logits of a chunk, in elements. 2**24 are 64 MiB of float32, or 512 tokens of a vocabulary of 32,000. On a CPU the
# head's products are then 8 % faster than with half as many, and doubling again gains 2 %. A GPU needs more to fill up.
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
        scale = kept / denominator  # (tokens,) float32: each token's share of the loss
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
                states, target, share = hidden[rows].to(compute_dtype), targets[rows, None], scale[rows, None]
                logits, probs = logits_buffer[: len(states)], probs_buffer[: len(states)]
                torch.mm(states, head.t(), out=logits)
                torch.log_softmax(logits, dim=-1, dtype=torch.float32, out=probs)
                loss -= (probs.gather(1, target) * share).sum()
                if not (needs_hidden_grad or needs_weight_grad):
                    continue
                # softmax - one_hot is the gradient but for `share`, applied to the narrow side of each product.
                probs.exp_().scatter_add_(1, target, torch.full_like(share, -1.0))
                logits_grad = probs if compute_dtype == torch.float32 else logits.copy_(probs)
                if needs_hidden_grad:
                    hidden_grad[rows] = (logits_grad @ head) * share
                if needs_weight_grad:
                    shared_states = (states * share).to(compute_dtype)
                    if compute_dtype == torch.float32:
                        weight_grad.addmm_(logits_grad.t(), shared_states)
                    else:
                        weight_grad += logits_grad.t() @ shared_states

        ctx.save_for_backward(hidden_grad, weight_grad.to(weight.dtype) if needs_weight_grad else None)
        return loss

    @staticmethod
    def backward(ctx, loss_grad):
        hidden_grad, weight_grad = ctx.saved_tensors
        return (
            None if hidden_grad is None else hidden_grad * loss_grad.to(hidden_grad.dtype),
            None if weight_grad is None else weight_grad * loss_grad.to(weight_grad.dtype),
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
