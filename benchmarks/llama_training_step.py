"""One training step (forward, backward) of our decoder and of transformers' Llama, same weights and batch.

    python -m benchmarks.llama_training_step [--rounds 7] [--bf16]

13M parameters, a vocabulary of 32,000, 4 texts of 1,024 tokens; no optimizer, no cache. Reports time, peak memory of
the step beyond weights, and the share of the matrix-multiply peak measured beside them. Targets, in float32: at least
1.2 times as fast, at most 0.45 of the memory.
"""

import argparse
import statistics

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import measure
from hf_models import LlamaStyleConfig, LlamaStyleForCausalLM
from hf_models.llama_style.sizes import SIZES

BATCH, LENGTH = 4, 1024
SHAPE = SIZES["6m"].config | {"vocab_size": 32000}
MODELS = {"hf_models": (LlamaStyleConfig, LlamaStyleForCausalLM), "transformers": (LlamaConfig, LlamaForCausalLM)}


def build_step(name: str, bf16: bool):
    """A function that does one step and returns the loss; it has run once, on a few tokens."""
    config_class, model_class = MODELS[name]
    torch.manual_seed(0)  # the same weights: parameters are made in the same order
    model = model_class(config_class(**SHAPE)).train()
    input_ids = torch.randint(SHAPE["vocab_size"], (BATCH, LENGTH))

    def step(ids=input_ids):
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss.item()

    step(input_ids[:1, :16])
    model.zero_grad(set_to_none=True)
    return step


def step_flops() -> float:
    """Multiply-adds of the matrix products, times two; the backward pass costs twice the forward."""
    config = LlamaStyleConfig(**SHAPE)
    with torch.device("meta"):
        model = LlamaStyleForCausalLM(config)
    matrices = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    # Scores and their weighted sum, for the half of the positions that a causal mask keeps.
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * LENGTH
    return 6.0 * BATCH * LENGTH * (matrices + attention)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds")
    parser.add_argument("--bf16", action="store_true", help="under bfloat16 autocast")
    arguments = parser.parse_args()
    precision = "bfloat16 autocast" if arguments.bf16 else "float32"

    memory = {name: measure.peak_memory(build_step, name, arguments.bf16) for name in MODELS}
    steps = {name: build_step(name, arguments.bf16) for name in MODELS}
    losses = {name: step() for name, step in steps.items()}
    tolerance = 1e-3 if arguments.bf16 else 1e-5
    if abs(losses["hf_models"] - losses["transformers"]) > tolerance * losses["transformers"]:
        raise SystemExit(f"error: the losses differ: {losses}")

    product, product_flops = measure.matmul_flops(torch.bfloat16 if arguments.bf16 else torch.float32)
    seconds = measure.interleave(steps | {"matmul": product}, arguments.rounds)
    peak = product_flops / min(seconds.pop("matmul"))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    share = {name: step_flops() / median / peak for name, median in medians.items()}
    speedup = measure.speedup(seconds["transformers"], seconds["hf_models"])
    memory_ratio = memory["hf_models"] / memory["transformers"]

    measure.print_table(
        f"Training step, {BATCH} x {LENGTH} tokens, {precision} (peak of a matrix product: {peak / 1e9:.0f} GFLOP/s)",
        ["", "ms", "tokens/s", "share of peak", "step memory, MB", "loss"],
        [
            [
                name,
                f"{1e3 * medians[name]:.0f}",
                f"{BATCH * LENGTH / medians[name]:.0f}",
                f"{share[name]:.2f}",
                f"{memory[name] / 1e6:.0f}",
                f"{losses[name]:.5f}",
            ]
            for name in MODELS
        ],
    )
    print(
        f"{speedup['ratio']:.2f} times as fast (quartiles {speedup['lower']:.2f} to {speedup['upper']:.2f}), ", end=""
    )
    print(f"{memory_ratio:.2f} of the memory")
    measure.save(
        "llama_training_step" + ("_bf16" if arguments.bf16 else ""),
        {
            "precision": precision,
            "seconds": seconds,
            "speedup": speedup,
            "step_memory_bytes": memory,
            "memory_ratio": memory_ratio,
            "matmul_peak_flops": peak,
            "share_of_peak": share,
            "losses": losses,
        },
    )


if __name__ == "__main__":
    main()
