"""How long does training a byte-level BPE take, ours against the trainer of `tokenizers`?

    python -m benchmarks.tokenizer_training [--dataset FILE] [--vocab_sizes 4096 32768] [--repeats 5]

Same text, split regex and number of entries; both timed from strings in memory to a tokenizer for transformers, so ours
includes the conversion to tokenizer.json. The two take turns within one process, once
on all cores and once on one thread each. The held-out text is encoded with both results.
"""

import argparse
import multiprocessing
import os
import statistics
from concurrent.futures import ProcessPoolExecutor

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from benchmarks import measure
from hf_models.bpe_tokenizer import SPLIT_PATTERNS, train_bpe
from hf_models.bpe_tokenizer.special_tokens import ADDED_TOKENS
from training.text_data import load_text_dataset

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
                measured = process.submit(compare, arguments, vocab_size).result()
                measurements.append({"threads": threads or "default", "vocab_size": vocab_size} | measured)
                print_table(measurements[-1])
    measure.save("tokenizer_training", {"arguments": vars(arguments), "pattern": PATTERN, "measurements": measurements})


def compare(arguments: argparse.Namespace, vocab_size: int) -> dict:
    texts = list(load_text_dataset(arguments.dataset, arguments.split)["text"])
    held_out = list(load_text_dataset(arguments.dataset, arguments.eval_split)["text"])
    trainers = {"hf_models": train_ours, "tokenizers": train_with_tokenizers}
    tokenizers = {}

    def training(name: str):
        return lambda: tokenizers.update({name: trainers[name](texts, vocab_size)})

    seconds = measure.interleave({name: training(name) for name in trainers}, arguments.repeats, warmup=0)
    assert all(tokenizer.get_vocab_size() == vocab_size for tokenizer in tokenizers.values())
    encodings = {}

    def encoding(name: str):
        def encode():
            encodings[name] = tokenizers[name].encode_batch_fast(held_out, add_special_tokens=False)

        return encode

    encoding_seconds = measure.interleave({name: encoding(name) for name in trainers}, arguments.repeats)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    held_out_megabytes = sum(len(text.encode()) for text in held_out) / 1e6
    return {
        "text_megabytes": round(megabytes, 3),
        "speedup": measure.speedup(seconds["tokenizers"], seconds["hf_models"]),
        "trainers": {
            name: {
                "seconds": [round(value, 3) for value in seconds[name]],
                "megabytes_per_second": round(megabytes / statistics.median(seconds[name]), 2),
                "encoding_megabytes_per_second": round(
                    held_out_megabytes / statistics.median(encoding_seconds[name]), 2
                ),
                "held_out_tokens": sum(map(len, encodings[name])),
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
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer).backend_tokenizer


def print_table(measurement: dict) -> None:
    measure.print_table(
        f"{measurement['vocab_size']} entries, {measurement['text_megabytes']} MB, threads {measurement['threads']}: "
        f"{measurement['speedup']['ratio']:.2f} times as fast",
        ["trainer", "median s", "min to max s", "MB/s", "encodes MB/s", "held-out tokens"],
        [
            [
                name,
                f"{statistics.median(figures['seconds']):.3f}",
                f"{min(figures['seconds']):.3f} to {max(figures['seconds']):.3f}",
                f"{figures['megabytes_per_second']:.2f}",
                f"{figures['encoding_megabytes_per_second']:.2f}",
                f"{figures['held_out_tokens']:,}",
            ]
            for name, figures in measurement["trainers"].items()
        ],
    )


if __name__ == "__main__":
    main()
