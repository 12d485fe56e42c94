"""LLaMA-style decoder (arXiv 2302.13971): pre-RMSNorm, rotary positions, SwiGLU, grouped-query attention.

Parameters carry transformers' Llama names, so native checkpoints load as they are. Notable here:
- in training mode a loss comes from `chunked_causal_lm_loss`: the `(tokens, vocab)` logits never exist;
- `position_ids` that restart isolate packed documents even when a fresh cache is built (transformers' Llama then lets
  them attend across), and no mask is searched for packing when the caller gives no `position_ids`;
- RMSNorm is one call (one kernel on a GPU), and the rotation is a roll and a fused multiply-add;
- a decoding step on a CPU reads the head's matrix with all threads (`LlamaStyleHead`);
- sliding-window attention, as Mistral's, where `config.sliding_window` is set.

This file is published beside the weights (remote code): it imports torch, transformers and its siblings only.
"""

import math
from collections.abc import Callable

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .chunked_loss_llama_style import chunked_causal_lm_loss
from .configuration_llama_style import LlamaStyleConfig


class LlamaStyleRMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467) over the last dimension; float32 inside the kernel."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.eps)


class LlamaStyleRotaryEmbedding(nn.Module):
    """Rotary tables (arXiv 2104.09864), for every `rope_type` of transformers.

    `inv_freq` and `original_inv_freq` are what `PreTrainedModel._init_weights` and `dynamic_rope_update` look for.
    """

    def __init__(self, config: LlamaStyleConfig):
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        rope_init = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
        inv_freq, self.attention_scaling = rope_init(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: LlamaStyleConfig, *args, **kwargs) -> tuple[torch.Tensor, float]:
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`position_ids (batch, length)` -> cosine and signed sine, each `(batch, 1, length, head_dim)`."""
        angles = position_ids[:, None, :, None].float() * self.inv_freq.to(hidden_states.device, torch.float32)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        # The first half of the features is rotated by minus the sine: with the sign here, `rotate` needs no negation.
        cos, signed_sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        return cos.to(hidden_states.dtype), signed_sin.to(hidden_states.dtype)


def rotate(states: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    """Rotates feature pairs `(i, i + head_dim/2)` of `states (batch, heads, length, head_dim)` by their angle."""
    return torch.addcmul(states * cos, states.roll(states.shape[-1] // 2, dims=-1), signed_sin)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out, for `output_attentions` and as the reference of the other implementations.

    `query (batch, heads, length, head_dim)`, `key`/`value (batch, kv_heads, kv_length, head_dim)` ->
    `(batch, length, heads, head_dim)` and the weights `(batch, heads, length, kv_length)`.
    """
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class LlamaStyleAttention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245); plain multi-head when the key/value heads are as many."""

    is_causal = True  # read by the attention functions

    def __init__(self, config: LlamaStyleConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        query_size = config.num_attention_heads * self.head_dim
        key_value_size = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch_and_length = hidden_states.shape[:-1]
        # (batch, length, heads * head_dim) -> (batch, heads, length, head_dim); -1 heads, for tensor parallelism.
        query, key, value = (
            projection(hidden_states).view(*batch_and_length, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotate(query, *position_embeddings), rotate(key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attended, weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=(self.config.attention_dropout or 0.0) if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.config.sliding_window,
            **kwargs,
        )
        return self.o_proj(attended.reshape(*batch_and_length, -1)), weights


class LlamaStyleMLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: LlamaStyleConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class LlamaStyleDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: LlamaStyleConfig, layer_idx: int):
        super().__init__()
        self.self_attn = LlamaStyleAttention(config, layer_idx)
        self.mlp = LlamaStyleMLP(config)
        self.input_layernorm = LlamaStyleRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaStyleRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class LlamaStyleHead(nn.Linear):
    """The language-model head, a Linear without bias, whose few-row products use every thread of a CPU.

    MKL runs a float32 product of few rows on one thread, and the head is the largest matrix that a decoded token reads.
    Batched over equal slices of the vocabulary it is threaded, as far as the threads divide the vocabulary
    (`benchmarks/llama_generate.py` has what it brings). oneDNN's bfloat16 products are threaded already.
    """

    MOST_ROWS = 64  # with more, the plain product is threaded well enough

    def __init__(self, hidden_size: int, vocab_size: int):
        super().__init__(hidden_size, vocab_size, bias=False)

    def forward(self, hidden_states: torch.Tensor, **loss_arguments) -> torch.Tensor:
        """`(..., hidden)` -> logits `(..., vocab)`; with labels, the loss of `chunked_causal_lm_loss` in their place.

        The loss is taken in here because whatever shards or offloads the weight brings it when the head is called.
        """
        if loss_arguments:
            return chunked_causal_lm_loss(hidden_states, self.weight, **loss_arguments)
        *shape, hidden_size = hidden_states.shape
        slices = self._slices(math.prod(shape), hidden_states.dtype)
        if slices == 1:
            return super().forward(hidden_states)
        states = hidden_states.reshape(1, -1, hidden_size).expand(slices, -1, -1)
        logits = torch.bmm(states, self.weight.reshape(slices, -1, hidden_size).transpose(1, 2))
        return logits.transpose(0, 1).reshape(*shape, -1)

    def _slices(self, rows: int, dtype: torch.dtype) -> int:
        # A compiled or exported graph keeps the plain product: the slices depend on the threads of this process.
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or not 0 < rows <= self.MOST_ROWS:
            return 1
        if type(self.weight) is not nn.Parameter or self.weight.device.type != "cpu" or dtype != torch.float32:
            return 1
        return math.gcd(self.weight.shape[0], torch.get_num_threads())


class LlamaStylePreTrainedModel(PreTrainedModel):
    config_class = LlamaStyleConfig
    config: LlamaStyleConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LlamaStyleDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": LlamaStyleDecoderLayer,
        "attentions": LlamaStyleAttention,
    }


class LlamaStyleModel(LlamaStylePreTrainedModel):
    """The decoder without a head: token ids in, normed hidden states out."""

    def __init__(self, config: LlamaStyleConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(LlamaStyleDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaStyleRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LlamaStyleRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids: `(batch, length)`; or `inputs_embeds (batch, length, hidden)`, not both.
            attention_mask: `(batch, past + length)`, 1 for tokens to attend to; or a prepared 4-D mask.
            position_ids: `(batch, length)`. Without an attention mask and without a past, a position that does not
                follow the one before it by 1 begins a new document, which sees none of the others.
            past_key_values: any transformers cache.

        Returns: `last_hidden_state (batch, length, hidden)`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)

        # The mask comes before a fresh cache: with a cache at hand, `create_mask` no longer looks for packed documents.
        create_mask = create_causal_mask if self.config.sliding_window is None else create_sliding_window_causal_mask
        causal_mask = create_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen)[None]

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=causal_mask,
                position_ids=position_ids,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class LlamaStyleForCausalLM(LlamaStylePreTrainedModel, GenerationMixin):
    """The decoder with a language-model head, tied to the embeddings where `config.tie_word_embeddings` says so."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: LlamaStyleConfig):
        super().__init__(config)
        self.model = LlamaStyleModel(config)
        self.lm_head = LlamaStyleHead(config.hidden_size, config.vocab_size)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Arguments of `LlamaStyleModel.forward`, and:

        Args:
            labels: `(batch, length)`, the input ids with -100 where nothing is to be predicted; shifted inside.
            logits_to_keep: the last so many positions, or the positions themselves `(positions,)`; 0 keeps all.
            num_items_in_batch: what the summed loss is divided by; the number of kept labels without it.

        Returns: `logits (batch, kept, vocab)` and, with labels, a float32 `loss`. In training mode with labels,
        `logits` is None: the loss is computed in chunks and they never exist, unless the head is more than a matrix
        (see `_loss_needs_no_logits`). That loss has no second derivatives and no functional transforms.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        has_labels = labels is not None or kwargs.get("shift_labels") is not None
        loss = logits = None
        if self.training and has_labels and self._loss_needs_no_logits():
            loss = self.lm_head(hidden_states, labels=labels, **kwargs)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, kept, :])
            if has_labels:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        if type(new_embeddings) is nn.Linear and new_embeddings.bias is None:  # what resizing the vocabulary brings
            with torch.device("meta"):
                head = LlamaStyleHead(new_embeddings.in_features, new_embeddings.out_features)
            head.weight = new_embeddings.weight
            new_embeddings = head
        self.lm_head = new_embeddings

    def _loss_needs_no_logits(self) -> bool:
        """Whether loss and head are the plain ones. A head that is adapted, quantised, hooked or split by tensor
        parallelism has to give logits, and a replaced loss has to see them. FSDP's shards and hooks are no hindrance.
        """
        head = self.lm_head
        fsdp_sharded = hasattr(head, "unshard")
        return (
            isinstance(head, LlamaStyleHead)
            and (fsdp_sharded or type(head.weight) in (nn.Parameter, torch.Tensor))
            and (fsdp_sharded or not (head._forward_hooks or head._forward_pre_hooks))
            and not hasattr(self, "_loss_function")
        )


class LlamaStyleForSequenceClassification(LlamaStylePreTrainedModel):
    """The decoder with `config.num_labels` scores read at each sequence's last token; a reward model with one label."""

    def __init__(self, config: LlamaStyleConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = LlamaStyleModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> SequenceClassifierOutputWithPast:
        """Arguments of `LlamaStyleModel.forward`, and `labels (batch,)`, or `(batch, num_labels)` for multi-label.

        Returns: `logits (batch, num_labels)` and, with labels, a `loss`.

        Raises ValueError where padding cannot be told from text: several sequences with neither an attention mask nor
        a `config.pad_token_id`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        last = self._last_token(hidden_states, input_ids, attention_mask)
        rows = torch.arange(hidden_states.shape[0], device=hidden_states.device)
        logits = self.score(hidden_states[rows, last])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _last_token(
        self, hidden_states: torch.Tensor, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None
    ) -> torch.Tensor | int:
        """Index `(batch,)` of the rightmost token that is no padding, whichever side the padding is on.

        The mask goes before the padding token, unlike in transformers: where one token is both padding and end of
        text, only the mask can tell them apart.
        """
        length = hidden_states.shape[1]
        if attention_mask is not None and attention_mask.ndim == 2:
            is_text = attention_mask[:, -length:].bool()
        elif input_ids is not None and self.config.pad_token_id is not None:
            is_text = input_ids != self.config.pad_token_id
        elif hidden_states.shape[0] == 1:
            return -1
        else:
            raise ValueError(
                "Give a 2-D attention_mask, or set config.pad_token_id, to classify several sequences at once."
            )
        positions = torch.arange(length, device=hidden_states.device)
        return (positions * is_text.to(hidden_states.device)).argmax(dim=-1)


__all__ = [
    "LlamaStyleForCausalLM",
    "LlamaStyleForSequenceClassification",
    "LlamaStyleModel",
    "LlamaStylePreTrainedModel",
]
