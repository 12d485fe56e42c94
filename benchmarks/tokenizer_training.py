"""How long does training a byte-level BPE take, ours against the trainer of `tokenizers`?

    python -m benchmarks.tokenizer_training [--dataset FILE] [--vocab_sizes 4096 32768] [--repeats 5]

Same text, split regex and number of entries; both timed from strings in memory to a tokenizer that encodes, so ours
includes the conversion to tokenizer.json and the wrapping for transformers. The two take turns within one process, once
on all cores and once on one thread each. The held-out text is encoded with both results.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from hf_models.bpe_tokenizer import SPLIT_PATTERNS, train_bpe
from hf_models.bpe_tokenizer.special_tokens import ADDED_TOKENS
from training.run_record import hardware
from training.text_data import load_text_dataset

RESULTS = Path(__file__).parent / "results" / "tokenizer_training.json"
PATTERN = "qwen2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="wikipedia_leads", help="Sample, local file or folder, or Hub id.")
    parser.add_argument("--split", default="train", help="Split to train on.")
    parser.add_argument("--eval_split", default="test", help="Split to encode.")
    parser.add_argument("--vocab_sizes", type=int, nargs="+", default=[4096, 32768], help="Entries in all.")
    parser.add_argument("--repeats", type=int, default=5, help="Trainings of each kind, taking turns.")
    arguments = parser.parse_args()

    measurements = []
    for threads in (None, 1):
        # Rayon reads the number of threads once a process, so each setting has a process of its own.
        os.environ.pop("RAYON_NUM_THREADS", None)
        if threads:
            os.environ["RAYON_NUM_THREADS"] = str(threads)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            for vocab_size in arguments.vocab_sizes:
                measured = process.submit(measure, arguments, vocab_size).result()
                measurements.append({"threads": threads or "default", "vocab_size": vocab_size} | measured)
                print_table(measurements[-1])
    RESULTS.parent.mkdir(exist_ok=True)
    record = {
        "arguments": vars(arguments),
        "pattern": PATTERN,
        "hardware": hardware(on_cpu=True),
        "measurements": measurements,
    }
    RESULTS.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def measure(arguments: argparse.Namespace, vocab_size: int) -> dict:
    texts = list(load_text_dataset(arguments.dataset, arguments.split)["text"])
    held_out = list(load_text_dataset(arguments.dataset, arguments.eval_split)["text"])
    trainers = {"ours": train_ours, "tokenizers": train_with_tokenizers}
    seconds = {name: [] for name in trainers}
    encoding_seconds = {name: [] for name in trainers}
    tokens = {}
    for _ in range(arguments.repeats):
        for name, train in trainers.items():
            start = time.perf_counter()
            tokenizer = train(texts, vocab_size)
            seconds[name].append(time.perf_counter() - start)
            assert tokenizer.get_vocab_size() == vocab_size
            start = time.perf_counter()
            encodings = tokenizer.encode_batch_fast(held_out, add_special_tokens=False)
            encoding_seconds[name].append(time.perf_counter() - start)
            tokens[name] = sum(map(len, encodings))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    held_out_megabytes = sum(len(text.encode()) for text in held_out) / 1e6
    return {
        "text_megabytes": round(megabytes, 3),
        "times_as_fast": round(medians["tokenizers"] / medians["ours"], 2),
        "trainers": {
            name: {
                "seconds": [round(value, 3) for value in seconds[name]],
                "megabytes_per_second": round(megabytes / medians[name], 2),
                "encoding_megabytes_per_second": round(
                    held_out_megabytes / statistics.median(encoding_seconds[name]), 2
                ),
                "held_out_tokens": tokens[name],
            }
            for name in trainers
        },
    }


def train_ours(texts: list[str], vocab_size: int) -> Tokenizer:
    return train_bpe(texts, vocab_size, pattern=PATTERN).backend_tokenizer


def train_with_tokenizers(texts: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERNS[PATTERN]), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=ADDED_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def print_table(measurement: dict) -> None:
    print(
        f"\n{measurement['vocab_size']} entries, {measurement['text_megabytes']} MB, threads {measurement['threads']}: "
        f"ours is {measurement['times_as_fast']} times as fast (ratio of medians)"
    )
    print("trainer      median s   min - max s       MB/s   encodes MB/s   held-out tokens")
    for name, figures in measurement["trainers"].items():
        seconds = figures["seconds"]
        print(
            f"{name:<10}  {statistics.median(seconds):9.3f}   {min(seconds):.3f} - {max(seconds):.3f}  "
            f"{figures['megabytes_per_second']:9.2f}  {figures['encoding_megabytes_per_second']:13.2f}  "
            f"{figures['held_out_tokens']:16,}"
        )


if __name__ == "__main__":
    main()
