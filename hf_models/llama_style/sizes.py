"""Shapes of LLaMA-style decoders, as data: a name, its parameter count, and the config fields that give it.

    LlamaStyleConfig(**SIZES["6m"].config | {"vocab_size": 8192})

What an entry leaves out is `LlamaStyleConfig`'s default. Our own small ones (1m to 40m) are narrow for their depth and
tie their embeddings, because the vocabulary would otherwise outweigh the layers; their hidden and intermediate sizes
are multiples of 64, the block that bitsandbytes quantises by, and their heads are 64 wide. The vocabulary is part of a
count: another `vocab_size` changes it by `hidden_size` a token (twice that where the head is not tied).
"""

from typing import Any, NamedTuple


class Size(NamedTuple):
    """`parameters` is the exact count, a tied head counted once; `config` is keyword arguments of LlamaStyleConfig."""

    parameters: int
    config: dict[str, Any]


def _shape(hidden, intermediate, layers, heads, key_value_heads, **other) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        **other,
    }


# Llama 1, 2: the SentencePiece vocabulary of 32,000, which is LlamaStyleConfig's default, as is Llama 1's epsilon.
_LLAMA_1 = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
_LLAMA_2 = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
_LLAMA_3 = {
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}


def _llama_3_long(factor: float) -> dict[str, Any]:
    """Llama 3.1 and 3.2: Llama 3 stretched from 8,192 positions to 131,072."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return _LLAMA_3 | {"max_position_embeddings": 131072, "rope_parameters": rope}


SIZES: dict[str, Size] = {
    # Ours. 1m for tests and demonstrations, 6m for the quickstart: minutes on two CPU cores.
    "1m": Size(
        1_164_160, _shape(128, 384, 3, 2, 2, vocab_size=4096, max_position_embeddings=1024, tie_word_embeddings=True)
    ),
    "6m": Size(
        5_868_800, _shape(256, 704, 6, 4, 4, vocab_size=4096, max_position_embeddings=1024, tie_word_embeddings=True)
    ),
    "15m": Size(15_735_168, _shape(384, 1024, 8, 6, 2, vocab_size=8192, tie_word_embeddings=True)),
    "40m": Size(40_840_704, _shape(512, 1408, 11, 8, 4, vocab_size=16384, tie_word_embeddings=True)),
    # MobileLLM-125M's shape (arXiv 2402.14905 and the released config): thirty thin layers, tied.
    "125m": Size(124_635_456, _shape(576, 1536, 30, 9, 3, tie_word_embeddings=True)),
    # LLaMA (arXiv 2302.13971, table 2); the intermediate sizes are those of the released weights.
    "llama_7b": Size(6_738_415_616, _shape(4096, 11008, 32, 32, 32, **_LLAMA_1)),
    "llama_13b": Size(13_015_864_320, _shape(5120, 13824, 40, 40, 40, **_LLAMA_1)),
    "llama_33b": Size(32_528_943_616, _shape(6656, 17920, 60, 52, 52, **_LLAMA_1)),
    "llama_65b": Size(65_285_660_672, _shape(8192, 22016, 80, 64, 64, **_LLAMA_1 | {"rms_norm_eps": 1e-5})),
    # Llama 2 (arXiv 2307.09288, table 1, and the released configs).
    "llama2_7b": Size(6_738_415_616, _shape(4096, 11008, 32, 32, 32, **_LLAMA_2)),
    "llama2_13b": Size(13_015_864_320, _shape(5120, 13824, 40, 40, 40, **_LLAMA_2)),
    "llama2_70b": Size(68_976_648_192, _shape(8192, 28672, 80, 64, 8, **_LLAMA_2)),
    # Llama 3, 3.1 (arXiv 2407.21783, table 3) and 3.2 (the released configs).
    "llama3_8b": Size(8_030_261_248, _shape(4096, 14336, 32, 32, 8, **_LLAMA_3)),
    "llama3_70b": Size(70_553_706_496, _shape(8192, 28672, 80, 64, 8, **_LLAMA_3)),
    "llama3.1_8b": Size(8_030_261_248, _shape(4096, 14336, 32, 32, 8, **_llama_3_long(factor=8.0))),
    "llama3.1_70b": Size(70_553_706_496, _shape(8192, 28672, 80, 64, 8, **_llama_3_long(factor=8.0))),
    "llama3.2_1b": Size(
        1_235_814_400, _shape(2048, 8192, 16, 32, 8, **_llama_3_long(factor=32.0), tie_word_embeddings=True)
    ),
    "llama3.2_3b": Size(
        3_212_749_824, _shape(3072, 8192, 28, 24, 8, **_llama_3_long(factor=32.0), tie_word_embeddings=True)
    ),
}
