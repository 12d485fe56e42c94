"""Greedy `generate` of our decoder and of transformers' Llama, same weights, one text and sixty-four at once.

    python -m benchmarks.llama_generate [--rounds 7] [--size 6m]

A prompt of 32 tokens, 64 new ones, float32, the default (dynamic) cache; the tokens must be equal. Target: at least as
fast, both.
"""

import argparse
import statistics

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import measure
from hf_models import LlamaStyleConfig, LlamaStyleForCausalLM
from hf_models.llama_style.sizes import SIZES

BATCHES = (1, 64)
PROMPT, NEW = 32, 64


def build(config_class, model_class, shape: dict):
    torch.manual_seed(0)  # the same weights: parameters are made in the same order
    return model_class(config_class(**shape)).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds")
    parser.add_argument("--size", default="6m", choices=SIZES, help="shape, with a vocabulary of 32,000")
    arguments = parser.parse_args()
    shape = SIZES[arguments.size].config | {"vocab_size": 32000}
    models = {
        "hf_models": build(LlamaStyleConfig, LlamaStyleForCausalLM, shape),
        "transformers": build(LlamaConfig, LlamaForCausalLM, shape),
    }

    rows, results = [], {}
    for batch in BATCHES:
        prompt = torch.randint(3, shape["vocab_size"], (batch, PROMPT))

        def generate(model, prompt=prompt):
            return model.generate(prompt, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)

        if not torch.equal(*(generate(model) for model in models.values())):
            raise SystemExit(f"error: the tokens differ at batch {batch}")
        seconds = measure.interleave(
            {name: lambda model=model: generate(model) for name, model in models.items()}, arguments.rounds
        )
        speedup = measure.speedup(seconds["transformers"], seconds["hf_models"])
        results[f"batch_{batch}"] = {"seconds": seconds, "speedup": speedup}
        rates = (f"{batch * NEW / statistics.median(times):.0f}" for times in seconds.values())
        rows.append(
            [str(batch), *rates, f"{speedup['ratio']:.2f}", f"{speedup['lower']:.2f} to {speedup['upper']:.2f}"]
        )

    parameters = models["hf_models"].num_parameters()
    measure.print_table(
        f"generate, {parameters / 1e6:.1f}M parameters, greedy, {PROMPT} + {NEW} tokens: new tokens/s",
        ["batch", *models, "times as fast", "quartiles"],
        rows,
    )
    measure.save(f"llama_generate_{arguments.size}", {"parameters": parameters} | results)


if __name__ == "__main__":
    main()
