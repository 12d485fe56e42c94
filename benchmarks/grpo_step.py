"""A GRPO step in parts, our decoder against transformers' Llama in the same trainer, and the memory of three ways.

    python -m benchmarks.grpo_step [--size 1m] [--rounds 7] [--memory_size 15m]
    python -m benchmarks.grpo_step --size 6m --completions 64 --new_tokens 128

TRL's GRPOTrainer on the CPU in float32: one batch of completions, rewards, old log-probabilities, and two updates on
the batch (with one, TRL needs no old log-probabilities). Both models have the same weights, which the learning rate of
0 keeps, and every completion is of full length. A third trainer has our model scored by plain logits, as in
`training.grpo` on a CPU. What is rewarded are written replies to chain sums, every other one right, because a reward
soon has done with random tokens. The three take turns; figures are medians, ratios are by round.

Memory is the most that the process's resident memory grew, from just before the model was loaded, in two steps of full,
LoRA and QLoRA training, each in a fresh process as in `benchmarks.memory_table`; with a KL term (beta 0.04), all
weights need a copy of the model for reference, adapters do not. No gradient checkpointing, as when timed. Writes
`benchmarks/results/grpo_step_SIZE.json`.
"""

import argparse
import copy
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks import measure
from benchmarks.llama_training_step import MODELS
from benchmarks.memory_table import MAPPED_BYTES, METHODS, _held_bytes, _save_model
from hf_models.llama_style.sizes import SIZES
from training.adapters import AdapterArguments, add_adapter
from training.dense_log_probs import DenseLogProbsMixin
from training.language_models import load_language_model
from training.memory_estimate import GIB
from training.problems import load_problems
from training.quantization import QuantizationArguments, keep_adapter_dtype, prepare_quantized, quantization_config
from training.rewards import REWARDS

PROMPT = 32  # tokens; every other prompt has half as many, so that there is padding
GROUP = 8
UPDATES = 2
MICRO_BATCH = 32
PARTS = ("generation", "reward", "old log-probabilities", "the rest", "an update", "whole")
COMPARED = ("generation", "old log-probabilities", "an update", "whole")  # the parts that are up to the model
BETAS = (0.0, 0.04)
OURS, DENSE = next(iter(MODELS)), "plain logits"


class _StepClock(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.seconds["step"] += time.perf_counter() - self.start


class TimingMixin:
    """Adds up the seconds of its parts in `seconds`, and scores written replies in place of its model's."""

    def __init__(self, *args, **kwargs):
        clock = _StepClock()
        super().__init__(*args, callbacks=[clock], **kwargs)
        clock.trainer = self
        self.remove_callback(PrinterCallback)
        self.seconds: Counter[str] = Counter()
        self.rounds: list[dict[str, float]] = []

    @contextmanager
    def _timed(self, part: str):
        start = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - start

    def _generate(self, prompts):
        with self._timed("generation"):
            return super()._generate(prompts)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        replies = [
            f"<think>{row['question']}</think>\n<answer>{row['answer'] if i % 2 else i}</answer>"
            for i, row in enumerate(inputs)
        ]
        with self._timed("reward"):
            return super()._calculate_rewards(inputs, prompts, replies, completion_ids_list)

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        if torch.is_grad_enabled():  # of the update, to which it is counted
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)
        with self._timed("old log-probabilities"):
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _generate_and_score_completions(self, inputs):
        with self._timed("before the updates"):
            return super()._generate_and_score_completions(inputs)

    def time_round(self) -> None:
        """One batch of completions and the updates on it; its parts go to `rounds`."""
        self.seconds.clear()
        self.train()
        seconds = {part: self.seconds[part] for part in PARTS[:3]}
        seconds["the rest"] = self.seconds["before the updates"] - sum(seconds.values())
        seconds["an update"] = (self.seconds["step"] - self.seconds["before the updates"]) / UPDATES
        self.rounds.append(seconds | {"whole": self.seconds["step"]})


class TimedTrainer(TimingMixin, GRPOTrainer):
    """TRL's."""


class DenseTimedTrainer(TimingMixin, DenseLogProbsMixin, GRPOTrainer):
    """TRL's with the scoring of `training.grpo`."""


def build_trainer(
    model,
    vocab_size: int,
    completions: int,
    new_tokens: int,
    folder: str,
    reward_funcs=None,
    trainer_type=TimedTrainer,
    **changes,
) -> TimedTrainer:
    """The trainer of one batch of `completions`, in groups of 8, of `new_tokens` each."""
    micro_batch = min(MICRO_BATCH, completions)
    if completions % GROUP or completions % micro_batch:
        raise SystemExit(
            f"error: --completions is {completions}: give a multiple of {GROUP}, beyond {MICRO_BATCH} of that"
        )
    tokenizer = word_tokenizer(vocab_size)
    config = GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=completions // micro_batch,
        num_generations=GROUP,
        num_iterations=UPDATES,
        max_completion_length=new_tokens,
        generation_kwargs={"min_new_tokens": new_tokens},
        max_steps=UPDATES,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **{"learning_rate": 0.0, "gradient_checkpointing": False} | changes,
    )
    return trainer_type(
        model,
        reward_funcs or [REWARDS["accuracy"], REWARDS["format"]],
        args=config,
        train_dataset=problem_rows(completions // GROUP, vocab_size),
        processing_class=tokenizer,
    )


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def problem_rows(number: int, vocab_size: int) -> Dataset:
    """Problems to be scored by, with prompts of random words in place of their text, for an exact length."""
    problems, _ = load_problems("reasoning_gym:chain_sum", "train", number)
    generator = torch.Generator().manual_seed(0)
    for i, problem in enumerate(problems):
        words = torch.randint(3, vocab_size, (PROMPT // 2 if i % 2 else PROMPT,), generator=generator).tolist()
        problem["prompt"] = " ".join(f"w{word}" for word in words)
    return Dataset.from_list(problems)


# ---- time ------------------------------------------------------------------------------------------------------------


def compare_models(size: str, completions: int, new_tokens: int, rounds: int, folder: str) -> dict[str, Any]:
    """Seconds of each part by round, of both models in TRL's trainer and of ours with plain logits."""
    shape = SIZES[size].config
    trainers = {}
    for name, (config_class, model_class) in MODELS.items():
        torch.manual_seed(0)  # the same weights: parameters are made in the same order
        model = model_class(config_class(**shape))
        trainers[name] = build_trainer(model, model.config.vocab_size, completions, new_tokens, folder)
    model = copy.deepcopy(trainers[OURS].model)
    trainers[DENSE] = build_trainer(
        model, model.config.vocab_size, completions, new_tokens, folder, trainer_type=DenseTimedTrainer
    )
    check_equal(trainers, new_tokens)
    measure.interleave({name: trainer.time_round for name, trainer in trainers.items()}, rounds)
    return {
        name: {part: [seconds[part] for seconds in trainer.rounds[-rounds:]] for part in PARTS}
        for name, trainer in trainers.items()
    }


@torch.no_grad()
def check_equal(trainers: dict[str, TimedTrainer], new_tokens: int) -> None:
    vocab_size = next(iter(trainers.values())).model.config.vocab_size
    ids = torch.randint(3, vocab_size, (GROUP, PROMPT + new_tokens))
    scores = []
    for trainer in trainers.values():
        scores.append(
            trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), new_tokens)[0]
        )
    differences = [float((other - scores[0]).abs().max()) for other in scores[1:]]
    if max(differences) > 1e-4:
        raise SystemExit(f"error: the log-probabilities differ by up to {max(differences):.1e}")


# ---- memory ----------------------------------------------------------------------------------------------------------


def measure_memory(size: str, method: str, beta: float, completions: int, new_tokens: int, threads: int) -> dict:
    """Bytes of weights and adapters, and the peak of two steps, in this process: to be called in a fresh one."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        _save_model("1m", f"{folder}/small")
        _save_model(size, f"{folder}/model")
        # Libraries load code and make buffers at their first use, whatever the model's size.
        _train("1m", f"{folder}/small", method, beta, GROUP, 8, folder)
        before = psutil.Process().memory_info().rss
        return _train(size, f"{folder}/model", method, beta, completions, new_tokens, folder, before)


def _train(
    size: str, path: str, method: str, beta: float, completions: int, new_tokens: int, folder: str, before: int = 0
) -> dict[str, int]:
    adapter: AdapterArguments | None = METHODS[method].get("adapter")
    quantization: QuantizationArguments | None = METHODS[method].get("quantization")
    in_4bit = quantization_config(quantization) if quantization is not None else None
    model = load_language_model(path, dtype=torch.float32, quantization_config=in_4bit)
    for parameter in model.parameters():
        # A tensor of the file's dtype is a view of the mapped file, which would be resident as a whole with it.
        parameter.data = parameter.data.clone()
    if in_4bit is not None:
        prepare_quantized(model)
    vocab_size = model.config.vocab_size
    if adapter is not None:
        model = add_adapter(model, adapter, task_type="CAUSAL_LM", base=path)
    changes = {"beta": beta, "learning_rate": 1e-5, "optim": METHODS[method].get("optimizer", "adamw_torch")}
    with keep_adapter_dtype(model):
        trainer = build_trainer(model, vocab_size, completions, new_tokens, f"{folder}/run", **changes)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak, to what is resident now
    trainer.train()
    return {"held": _held_bytes(model), "peak": measure._status_bytes("VmHWM") - before}


def measure_memory_afresh(*arguments) -> dict[str, int]:
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(MAPPED_BYTES)  # read when a process starts
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure_memory, (*arguments, torch.get_num_threads()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1m", choices=SIZES, help="shape of the models that are timed")
    parser.add_argument("--memory_size", default="15m", choices=SIZES, help="shape of the models that are weighed")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds")
    parser.add_argument("--completions", type=int, default=128, help="of a batch, when timed")
    parser.add_argument("--memory_completions", type=int, default=32, help="of a batch, when weighed")
    parser.add_argument("--new_tokens", type=int, default=64, help="of each completion")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        seconds = compare_models(arguments.size, arguments.completions, arguments.new_tokens, arguments.rounds, folder)
    ours, theirs, dense = (seconds[name] for name in (*MODELS, DENSE))
    dense_speedups = {part: measure.speedup(ours[part], dense[part]) for part in ("old log-probabilities", "an update")}
    speedups = {part: measure.speedup(theirs[part], ours[part]) for part in COMPARED}
    tokens = arguments.completions * arguments.new_tokens
    rates = {name: tokens / statistics.median(seconds[name]["generation"]) for name in MODELS}
    measure.print_table(
        f"GRPO, {arguments.size}, {arguments.completions} completions of {arguments.new_tokens} tokens in groups of "
        f"{GROUP}, {UPDATES} updates: seconds",
        ["part", *MODELS, "times as fast", "quartiles"],
        [
            [part]
            + [f"{statistics.median(seconds[name][part]):.3f}" for name in MODELS]
            + (
                [f"{s['ratio']:.2f}", f"{s['lower']:.2f} to {s['upper']:.2f}"]
                if (s := speedups.get(part))
                else ["", ""]
            )
            for part in PARTS
        ],
    )
    for part, of_part in dense_speedups.items():
        ratio, lower, upper = (of_part[name] for name in ("ratio", "lower", "upper"))
        print(
            f"{part}, with plain logits (`training.grpo` on a CPU): {ratio:.2f} times as fast ({lower:.2f}-{upper:.2f})"
        )
    print("generated tokens/s: " + ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items()))

    memory = {}
    for method in METHODS:
        for beta in BETAS:
            memory[f"{method}, beta {beta:g}"] = measure_memory_afresh(
                arguments.memory_size, method, beta, arguments.memory_completions, arguments.new_tokens
            )
    measure.print_table(
        f"GRPO, {arguments.memory_size}, {arguments.memory_completions} completions of {arguments.new_tokens}: GiB",
        ["way", "weights and adapters", "peak"],
        [[way, f"{sizes['held'] / GIB:.3f}", f"{sizes['peak'] / GIB:.3f}"] for way, sizes in memory.items()],
    )
    measure.save(
        f"grpo_step_{arguments.size}",
        {
            "arguments": vars(arguments),
            "prompt_tokens": PROMPT,
            "group": GROUP,
            "updates": UPDATES,
            "threads": torch.get_num_threads(),
            "seconds": seconds,
            "speedup": speedups,
            "plain_logits_speedup": dense_speedups,
            "generated_tokens_per_second": rates,
            "memory": memory,
        },
        ("torch", "transformers", "trl", "peft", "bitsandbytes", "reasoning-gym"),
    )


if __name__ == "__main__":
    main()
