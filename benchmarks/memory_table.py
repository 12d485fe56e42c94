"""What full, LoRA and QLoRA fine-tuning take of memory: predicted on fake tensors, and measured.

    python -m benchmarks.memory_table [--sizes 40m 125m] [--precisions fp32 bf16] [--checkpointing]

Measured is a run of TRL's SFTTrainer on the CPU, on made-up tokens, each in a fresh process: weights, adapters,
gradients and optimizer states by their tensors, and the peak by what the process's resident memory grew from just
before the model was loaded to the highest point of three steps. glibc is told to return every freed tensor at once, so
that the resident memory follows the tensors. Writes `benchmarks/results/memory_table.json`.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.measure import _status_bytes, print_table, save
from hf_models.llama_style import LlamaStyleConfig, LlamaStyleForCausalLM
from hf_models.llama_style.sizes import SIZES
from training.adapters import AdapterArguments, add_adapter
from training.language_models import load_language_model
from training.memory_estimate import GIB, TrainingShape, estimate_memory
from training.quantization import (
    QuantizationArguments,
    keep_adapter_dtype,
    prepare_quantized,
    quantization_config,
)

STEPS = 3  # the states of the optimizer are there from the second on
# Blocks of this size and more are mapped by themselves and go back to the system when they are freed.
MAPPED_BYTES = 2**16
METHODS = {
    "full": {},
    "lora": {"adapter": AdapterArguments(use_peft=True)},
    "qlora": {
        "adapter": AdapterArguments(use_peft=True),
        "quantization": QuantizationArguments(load_in_4bit=True),
        "optimizer": "adamw_bnb_8bit",
    },
}


def measure(size: str, shape: TrainingShape, threads: int) -> dict[str, int]:
    """Bytes of each part, and the peak of the steps, of a run in this process: to be called in a fresh one."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        _save_model("1m", f"{folder}/small")
        _save_model(size, f"{folder}/model")
        # Libraries load code and make buffers at their first use, whatever the model's size.
        _train(f"{folder}/small", replace(shape, batch_size=1, length=32), folder)
        before = psutil.Process().memory_info().rss
        return _train(f"{folder}/model", shape, folder, before)


def _save_model(size: str, folder: str) -> None:
    LlamaStyleForCausalLM(LlamaStyleConfig(**SIZES[size].config)).save_pretrained(folder)


class _Parts(TrainerCallback):
    """Notes what gradients and states take, at the end of the last backward pass."""

    def __init__(self):
        self.gradients = self.states = 0

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients = sum(parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None)

    def on_optimizer_step(self, args, state, control, optimizer, **kwargs):
        states = [value for tensors in optimizer.optimizer.state.values() for value in tensors.items()]
        # Each parameter's state names the same code book of the 8-bit values.
        shared = {id(value): value.nbytes for name, value in states if name.startswith("qmap")}
        own = [value for name, value in states if isinstance(value, torch.Tensor) and not name.startswith("qmap")]
        self.states = sum(shared.values()) + sum(value.nbytes for value in own)


def _train(model_folder: str, shape: TrainingShape, folder: str, before: int = 0) -> dict[str, int]:
    in_4bit = quantization_config(shape.quantization) if shape.in_4bit else None
    model = load_language_model(model_folder, dtype=shape.dtype, quantization_config=in_4bit)
    for parameter in model.parameters():
        # A tensor of the file's dtype is a view of the mapped file, which would be resident as a whole with it.
        parameter.data = parameter.data.clone()
    if in_4bit is not None:
        prepare_quantized(model)
    weights = _held_bytes(model)
    if shape.has_adapter:
        model = add_adapter(model, shape.adapter, task_type="CAUSAL_LM", base=model_folder)
    arguments = SFTConfig(
        output_dir=f"{folder}/run",
        per_device_train_batch_size=shape.batch_size,
        max_steps=STEPS,
        max_length=shape.length,
        gradient_checkpointing=shape.gradient_checkpointing,
        optim=shape.optimizer,
        bf16=shape.bf16,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    parts = _Parts()
    with keep_adapter_dtype(model):
        trainer = SFTTrainer(
            model, arguments, train_dataset=_rows(shape), processing_class=_tokenizer(), callbacks=[parts]
        )
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak, to what is resident now
    trainer.train()
    return {
        "weights": weights,
        "adapters": _held_bytes(model) - weights,
        "gradients": parts.gradients,
        "optimizer": parts.states,
        "total": _status_bytes("VmHWM") - before,
    }


def _held_bytes(model: torch.nn.Module) -> int:
    """Parameters, the scales of quantised ones, and buffers."""
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    for parameter in model.parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:
            scales = [
                state.absmax,
                state.code,
                *([state.offset, state.state2.absmax, state.state2.code] * state.nested),
            ]
            tensors |= {id(tensor): tensor for tensor in scales}
    return sum(tensor.nbytes for tensor in tensors.values())


def _rows(shape: TrainingShape) -> Dataset:
    """Rows of random tokens, one in a batch half as long, so that there is padding."""
    generator = torch.Generator().manual_seed(0)
    lengths = [shape.length // 2 if i % shape.batch_size else shape.length for i in range(STEPS * shape.batch_size)]
    ids = [torch.randint(2, 1000, (length,), generator=generator).tolist() for length in lengths]
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def _tokenizer() -> PreTrainedTokenizerFast:
    words = models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def measure_afresh(size: str, shape: TrainingShape) -> dict[str, int]:
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(MAPPED_BYTES)  # read when a process starts
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (size, shape, torch.get_num_threads()))


def compare(size: str, method: str, shape: TrainingShape) -> dict[str, Any]:
    predicted = estimate_memory(LlamaStyleConfig(**SIZES[size].config), shape, auto_class=AutoModelForCausalLM)
    measured = measure_afresh(size, shape)
    return {
        "size": size,
        "method": method,
        "precision": "bf16" if shape.bf16 else "fp32",
        "gradient_checkpointing": shape.gradient_checkpointing,
        "optimizer": shape.optimizer,
        "predicted": predicted._asdict() | {"total": predicted.total},
        "measured": measured,
        "total_ratio": round(predicted.total / measured["total"], 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["40m", "125m"], choices=list(SIZES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--checkpointing", nargs="+", default=["off", "on"], choices=["off", "on"])
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    options = parser.parse_args()
    results = []
    for size in options.sizes:
        for precision in options.precisions:
            for checkpointing in options.checkpointing:
                for method in options.methods:
                    shape = TrainingShape(
                        options.batch_size,
                        options.length,
                        bf16=precision == "bf16",
                        gradient_checkpointing=checkpointing == "on",
                        **METHODS[method],
                    )
                    results.append(compare(size, method, shape))
                    print(json.dumps(results[-1]), flush=True)
    parts = ["weights", "adapters", "gradients", "optimizer", "total"]
    rows = [
        [f"{r['size']} {r['method']} {r['precision']}" + (" checkpointed" if r["gradient_checkpointing"] else "")]
        + [f"{r['predicted'][part] / GIB:.3f} / {r['measured'][part] / GIB:.3f}" for part in parts]
        + [f"{r['total_ratio']:.3f}"]
        for r in results
    ]
    title = f"GiB predicted / measured, {options.batch_size} x {options.length} tokens a step"
    print_table(title, ["run", *parts, "ratio"], rows)
    settings = {"batch_size": options.batch_size, "length": options.length, "threads": torch.get_num_threads()}
    save("memory_table", settings | {"runs": results}, ("torch", "transformers", "trl", "peft", "bitsandbytes"))


if __name__ == "__main__":
    main()
