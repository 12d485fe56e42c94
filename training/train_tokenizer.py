"""Trains a BPE tokenizer on text and says how well it fits held-out text.

    python -m training.train_tokenizer --config training/recipes/bpe_tokenizer/quickstart.yaml
    python -m training.train_tokenizer --dataset notes.txt --dataset_split train[:95%] \\
        --eval_dataset_split train[95%:] --vocab_size 1000 --output_dir runs/notes/tokenizer

Reads a text data set; writes a folder that `AutoTokenizer` opens, with its `run.json`. The report beside it holds the
figures of `training/tokenizer_report.py`, with `--compare_with_peers` also those of tokenizers by others' settings.
"""

from dataclasses import dataclass, field
from typing import Literal

from hf_models.bpe_tokenizer import train_bpe
from hub_cards.build_card import build_card

from .command_line import parse_arguments, plain_errors
from .recorded_outputs import recorded_outputs
from .run_record import RunRecord
from .text_data import TextDataArguments, describe_texts, iterate_texts, load_text_dataset
from .tokenizer_report import format_table, measure, train_peers

EVAL_BYTES = 10_000_000  # Held-out text that the report reads, at most; more moves its figures by nothing that counts.


@dataclass
class TokenizerArguments(TextDataArguments):
    vocab_size: int = field(default=4096, metadata={"help": "Entries in all, special tokens included."})
    style: Literal["byte_level", "llama"] = field(
        default="byte_level", metadata={"help": "Byte-level as GPT-2 and after, or SentencePiece's way as LLaMA."}
    )
    pattern: Literal["qwen2", "llama3", "gpt2"] = field(
        default="qwen2", metadata={"help": "Split regex of the byte_level style; qwen2 keeps digits apart."}
    )
    model_max_length: int | None = field(
        default=None, metadata={"help": "Tokens that the model will take, recorded for truncation."}
    )
    max_bytes: int = field(
        default=2_000_000_000,
        metadata={
            "help": "Bytes of text to train on, at most: every different word is held in memory, and more text than "
            "this changes few merges."
        },
    )
    eval_dataset_split: str | None = field(
        default="test", metadata={"help": "Held-out split for the report; '' for no report."}
    )
    compare_with_peers: bool = field(
        default=False, metadata={"help": "Also train tokenizers by others' settings and report on them."}
    )
    output_dir: str = field(default="runs/tokenizer", metadata={"help": "Folder of the run, new or of the same run."})


def main() -> None:
    with plain_errors():
        arguments, given = parse_arguments(TokenizerArguments, description="Trains a BPE tokenizer.")
        options = {"text_column": arguments.text_column, "config": arguments.dataset_config}
        texts = load_text_dataset(arguments.dataset, arguments.dataset_split, streaming=arguments.streaming, **options)
        data = {"train": describe_texts(texts, arguments.dataset, arguments.dataset_split)}
        held_out = []
        if split := arguments.eval_dataset_split:
            held_out = load_text_dataset(arguments.dataset, split, streaming=arguments.streaming, **options)
            data["eval"] = describe_texts(held_out, arguments.dataset, split)
            held_out = [text for text in iterate_texts(held_out, EVAL_BYTES) if text.strip()]

        record = RunRecord.start(arguments.output_dir, "train_tokenizer", given, data)
        if record.finished:
            print(f"{arguments.output_dir} holds this tokenizer, finished: only its card is written anew.")
            build_card(arguments.output_dir)
            return
        tokenizer = train_bpe(
            iterate_texts(texts, arguments.max_bytes),
            vocab_size=arguments.vocab_size,
            style=arguments.style,
            pattern=arguments.pattern,
            model_max_length=arguments.model_max_length,
        )
        record.save()
    tokenizer.save_pretrained(arguments.output_dir)

    report = {}
    if held_out:
        report["this tokenizer"] = measure(tokenizer, held_out)
    if held_out and arguments.compare_with_peers:
        peers = train_peers(lambda: iterate_texts(texts, arguments.max_bytes), arguments.vocab_size)
        report |= {name: measure(peer, held_out) for name, peer in peers}
    record.finish(
        metrics=report.get("this tokenizer", {}),
        tokenizer_report=report,
        tokenizer={
            "style": arguments.style,
            "pattern": arguments.pattern if arguments.style == "byte_level" else None,
            "vocab_size": len(tokenizer),
            "special_tokens": tokenizer.special_tokens_map,
        },
        outputs=recorded_outputs(arguments.output_dir),
    )
    build_card(arguments.output_dir)
    if report:
        print(format_table(report))
    print(f"Saved a tokenizer of {len(tokenizer)} entries in {arguments.output_dir}.")


if __name__ == "__main__":
    main()
