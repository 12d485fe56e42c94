"""A tiny decoder of ours and the transformers model that it must equal, with the same random weights."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_models import LlamaStyleConfig, LlamaStyleForCausalLM

TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    # Wide enough for attention to be far from uniform, so that a wrong mask or rotation shows.
    "initializer_range": 0.2,
}


def randomise_norms(model: PreTrainedModel) -> None:
    """Norm weights start at 1, at which a wrong one would not show."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)


def build_pair(
    ours=LlamaStyleForCausalLM, theirs=LlamaForCausalLM, their_config=LlamaConfig, attention="sdpa", **fields
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Our model and theirs, in eval mode and float32, for `TINY` and `fields` as config."""
    reference = theirs._from_config(their_config(**TINY | fields), attn_implementation=attention).eval()
    randomise_norms(reference)
    model = ours._from_config(LlamaStyleConfig(**TINY | fields), attn_implementation=attention).eval()
    model.load_state_dict(reference.state_dict())
    return model, reference


def random_ids(*shape: int) -> torch.Tensor:
    """Token ids without the padding token."""
    return torch.randint(1, TINY["vocab_size"], shape)


def padded_batch(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask `(3, 20)`, of 20, 13 and 5 tokens, padded on `side`."""
    input_ids, mask = random_ids(3, 20), torch.ones(3, 20, dtype=torch.long)
    for row, length in ((1, 13), (2, 5)):
        padding = slice(None, 20 - length) if side == "left" else slice(length, None)
        input_ids[row, padding] = TINY["pad_token_id"]
        mask[row, padding] = 0
    return input_ids, mask
