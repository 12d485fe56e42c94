"""Configuration of the LLaMA-style decoder.

Fields, names and defaults are those of transformers' `LlamaConfig`, so that a native checkpoint's config opens here and
an export is a rewrite of `model_type`; `sliding_window` is Mistral's.

This file is published beside the weights (remote code): it imports nothing of our package.
"""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

# Every Auto class that opens a published folder. `save_pretrained` alone would write only the saved class's entry.
AUTO_MAP = {
    "AutoConfig": "configuration_llama_style.LlamaStyleConfig",
    "AutoModel": "modeling_llama_style.LlamaStyleModel",
    "AutoModelForCausalLM": "modeling_llama_style.LlamaStyleForCausalLM",
    # `transformers serve` (5.23) opens custom code by this class alone.
    "AutoModelForDecision": "modeling_llama_style.LlamaStyleForCausalLM",
    "AutoModelForSequenceClassification": "modeling_llama_style.LlamaStyleForSequenceClassification",
}


@strict
class LlamaStyleConfig(PreTrainedConfig):
    """Shape and constants of a LLaMA-style decoder (arXiv 2302.13971; GQA and RoPE scaling as in Llama 2 and 3).

    Sizes count units of the model's own: `hidden_size`, `intermediate_size` and `head_dim` are features,
    `max_position_embeddings` and `sliding_window` are tokens. `num_key_value_heads` defaults to `num_attention_heads`
    (no grouping), `head_dim` to `hidden_size // num_attention_heads`. `rope_parameters` takes every `rope_type` of
    transformers, for example `{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, ...}`.

    Raises a `ValueError` that names the fields when the heads do not divide what they share.
    """

    model_type = "llama_style"
    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    sliding_window: int | None = None
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_dropout: float | int | None = 0.0
    mlp_bias: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads > 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        # Whole at every save, whatever an older file said: the code lies beside the weights.
        kwargs["auto_map"] = dict(AUTO_MAP)
        super().__post_init__(**kwargs)
        # `@strict` calls this too, but wraps what it raises in an error that is no ValueError.
        self.validate_architecture()

    def validate_architecture(self):
        for field in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
            "sliding_window",
        ):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{field} is {value}: give 1 or more.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) does not divide hidden_size ({self.hidden_size}): "
                "change one of the two."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads ({self.num_key_value_heads}) does not divide num_attention_heads "
                f"({self.num_attention_heads}): each key/value head serves the same number of query heads."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}: rotary embeddings rotate pairs, give an even number.")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act is {self.hidden_act!r}: choose one of {', '.join(ACT2FN)}.")
        if self.pad_token_id is not None and not -self.vocab_size <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"pad_token_id is {self.pad_token_id} and vocab_size is {self.vocab_size}: no such token.")
        rope_type = self.rope_parameters["rope_type"]
        if rope_type not in ("default", *ROPE_INIT_FUNCTIONS):
            raise ValueError(f"rope_type is {rope_type!r}: choose one of default, {', '.join(ROPE_INIT_FUNCTIONS)}.")


__all__ = ["LlamaStyleConfig"]
