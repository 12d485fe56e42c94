"""Trains a small fastText language identifier from labelled text, and says how well it does on held-out text.

    python -m training.train_language_id --dataset texts.jsonl --label_column lang --output_dir runs/language_id
    python -m training.train_language_id --dataset FOLDER --quantize true --output_dir runs/language_id

FOLDER may hold a file for each language, en.txt, fr.txt, with a document a paragraph. The model is of the kind of
fastText's own lid.176: words and their character n-grams, and a hierarchical softmax; with fewer vectors, for fewer
languages. The same text gives the same bytes. Writes `language_id.bin` or `.ftz`, for `--language_model` of
`training.prepare_text`, with the run's `run.json` and a README of its figures.
"""

import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets

from .command_line import parse_arguments, plain_errors
from .fasttext_training import (
    MIN_ROWS_QUANTISED,
    draw,
    save_classifier,
    train_classifier,
    zeroed_memory,
)
from .labelled_texts import load_labelled_texts
from .markdown import markdown_table, percent
from .run_record import RunRecord, replace_file
from .text_data import TextDataArguments, describe_texts
from .text_pipeline.fasttext_models import most_likely, on_one_line, training_line
from .text_pipeline.language_id import LANGUAGE_CODE, LanguageArguments

THRESHOLDS = (0.0, 0.3, 0.5, 0.65, 0.8, 0.9, 0.95)  # CCNet's is 0.5, datatrove's 0.65
CONFUSIONS_SHOWN = 20


@dataclass
class LanguageIdArguments(TextDataArguments):
    dataset: str = field(
        default="",
        metadata={
            "help": "Labelled text: a local file or folder (parquet, jsonl, json; also .gz) or a Hub id, with the "
            "columns --text_column and --label_column; or a folder with one .txt file a language."
        },
    )
    label_column: str = field(
        default="language", metadata={"help": "Column that holds the language of a document, as its code: en, fr."}
    )
    held_out_share: float = field(
        default=0.1, metadata={"help": "Share of the documents that are kept from training, for the figures."}
    )
    min_ngram: int = field(default=2, metadata={"help": "Characters of the shortest n-grams; lid.176's 2."})
    max_ngram: int = field(default=4, metadata={"help": "Characters of the longest n-grams; lid.176's 4."})
    dimension: int = field(default=16, metadata={"help": "Width of the n-grams' vectors; lid.176's 16."})
    buckets: int = field(
        default=100_000,
        metadata={"help": "Vectors that the n-grams share by their hash: 4 x dimension bytes each (lid.176: 2M)."},
    )
    min_word_count: int = field(
        default=5, metadata={"help": "Occurrences from which on a word has a vector of its own; lid.176's 1000."}
    )
    loss: Literal["hs", "softmax"] = field(
        default="hs", metadata={"help": "hs, the hierarchical softmax, as lid.176, or softmax."}
    )
    epochs: int = field(default=10, metadata={"help": "Passes over the text."})
    learning_rate: float = field(default=0.5, metadata={"help": "Learning rate at the start; it falls to zero."})
    characters: int = field(
        default=LanguageArguments.language_characters,
        metadata={"help": "Characters of a document that are read; as --language_characters of prepare_text."},
    )
    quantize: bool = field(
        default=False, metadata={"help": "Write language_id.ftz, product-quantised, about a sixth as large."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the split, the order and the first weights."})
    output_dir: str = field(default="runs/language_id", metadata={"help": "Folder of the run, new or of the same run."})

    def __post_init__(self):
        if not self.dataset:
            raise ValueError("--dataset is missing: name labelled text, a file or folder.")
        if self.streaming:
            raise ValueError("--streaming is not possible here: the documents are put into a random order.")
        if not 0 < self.held_out_share < 1:
            raise ValueError(f"--held_out_share is {self.held_out_share}: give a share between 0 and 1.")
        if not 0 < self.min_ngram <= self.max_ngram:
            raise ValueError(
                f"--min_ngram is {self.min_ngram} and --max_ngram {self.max_ngram}: give 1 or more, rising."
            )
        for name, least in {"dimension": 1, "min_word_count": 1, "epochs": 1, "characters": 1, "seed": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"--{name} is {getattr(self, name)}: give {least} or more.")
        # Fewer vectors could not be quantised; more are no small model.
        if self.buckets < MIN_ROWS_QUANTISED:
            raise ValueError(f"--buckets is {self.buckets}: give {MIN_ROWS_QUANTISED} or more.")
        if self.learning_rate <= 0:
            raise ValueError(f"--learning_rate is {self.learning_rate}: give a positive number, such as 0.5.")


def main() -> None:
    with plain_errors():
        arguments, given = parse_arguments(LanguageIdArguments, description="Trains a language identifier.")
        rows = load_labelled_texts(
            arguments.dataset,
            arguments.dataset_split,
            arguments.text_column,
            arguments.label_column,
            arguments.dataset_config,
        )
        languages = check_languages(rows["label"], arguments.dataset)
        data = describe_texts(rows, arguments.dataset, arguments.dataset_split) | {"languages": languages}
        record = RunRecord.start(arguments.output_dir, "train_language_id", given, {"train": data})
        file = Path(arguments.output_dir) / f"language_id.{'ftz' if arguments.quantize else 'bin'}"
        if record.finished:
            print(f"{arguments.output_dir} holds this model, finished.")
            return
        training, held_out = split_rows(rows, arguments)
        record.save()
        model = train(rows, training, arguments)
    save_classifier(model, file)
    figures = {"trained_on": len(training)} | evaluate(model, rows.select(held_out), arguments.characters)
    size = file.stat().st_size
    metrics = {"accuracy": figures["accuracy"], "documents": figures["documents"], "model_bytes": size}
    replace_file(file.with_name("README.md"), readme(file, arguments, data, figures, size))
    record.finish(metrics=metrics, evaluation=figures)
    print(f"{figures['accuracy']:.2%} of {figures['documents']} held-out documents are told right.")
    print(f"Saved a model of {len(languages)} languages, {size / 1e6:.1f} MB, in {arguments.output_dir}.")


def check_languages(labels: Iterable[str], dataset: str) -> dict[str, int]:
    """Documents by language, sorted; ValueError where the labels are no language codes, or are all the same."""
    counts = Counter(labels)
    for label in counts:
        if not LANGUAGE_CODE.fullmatch(label):
            raise ValueError(
                f"{dataset} has the label {label!r}, which is no language code: write en, fr, zh-TW or eng_Latn."
            )
    if len(counts) < 2:
        raise ValueError(f"{dataset} has one language only, {', '.join(counts)}: give text in two or more.")
    return dict(sorted(counts.items()))


def split_rows(rows: datasets.Dataset, arguments: LanguageIdArguments) -> tuple[list[int], list[int]]:
    """Row numbers to train on, in random order, and those held out.

    A text is on one side however often it occurs; on neither where it is blank, or has several labels, as the pages of
    a site have that nobody has translated yet. Raises ValueError where a language has no document to train on.
    """
    labels = rows["label"][:]
    drawn: list[tuple[float, int]] = []
    label_of: dict[float, str | None] = {}
    for index, text in enumerate(text for batch in rows.iter(1000) for text in batch["text"]):
        if text.strip():
            number = draw(text, arguments.seed)
            drawn.append((number, index))
            label_of[number] = labels[index] if label_of.get(number, labels[index]) == labels[index] else None
    drawn = [(number, index) for number, index in drawn if label_of[number] is not None]
    held_out = sorted(index for number, index in drawn if number < arguments.held_out_share)
    training = [index for number, index in sorted(drawn) if number >= arguments.held_out_share]
    if missing := sorted(set(labels) - {labels[index] for index in training}):
        raise ValueError(f"No document is left to train {', '.join(missing)} on: give more of that language.")
    if not held_out:
        raise ValueError("No document is held out: give more text, or a larger --held_out_share.")
    return training, held_out


def train(rows: datasets.Dataset, training: list[int], arguments: LanguageIdArguments) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "lines.txt"
        with lines.open("w", encoding="utf-8") as target:
            for row in rows.select(training):
                target.write(training_line(row["label"], row["text"], arguments.characters))
        model = train_classifier(
            lines,
            arguments.seed,
            lr=arguments.learning_rate,
            dim=arguments.dimension,
            epoch=arguments.epochs,
            minCount=arguments.min_word_count,
            minn=arguments.min_ngram,
            maxn=arguments.max_ngram,
            bucket=arguments.buckets,
            loss=arguments.loss,
        )
        if arguments.quantize:
            with zeroed_memory():
                model.quantize(qnorm=True, thread=1)
    return model


def evaluate(model: Any, held_out: datasets.Dataset, characters: int) -> dict[str, Any]:
    """What `model` tells of labelled documents.

    Returns:
        accuracy: share told right; `documents` in all.
        languages: precision, recall and documents of each language.
        confusion: language -> what it is told to be -> documents; only those that occur.
        thresholds: for each minimum score, the share of documents `kept` and the `accuracy` among them.
    """
    told = [(row["label"], *most_likely(model, on_one_line(row["text"], characters))[0]) for row in held_out]
    confusion: dict[str, Counter[str]] = {}
    for label, language, _ in told:
        confusion.setdefault(label, Counter())[language] += 1
    called = Counter(language for _, language, _ in told)
    thresholds = []
    for threshold in THRESHOLDS:
        kept = [label == language for label, language, score in told if score >= threshold]
        thresholds.append(
            {
                "min_language_score": threshold,
                "kept": round(len(kept) / len(told), 4),
                "accuracy": round(sum(kept) / len(kept), 4) if kept else None,
            }
        )
    return {
        "accuracy": thresholds[0]["accuracy"],
        "documents": len(told),
        "languages": {
            label: {
                "documents": counts.total(),
                "precision": round(counts[label] / called[label], 4) if called[label] else None,
                "recall": round(counts[label] / counts.total(), 4),
            }
            for label, counts in sorted(confusion.items())
        },
        "confusion": {label: dict(sorted(counts.items())) for label, counts in sorted(confusion.items())},
        "thresholds": thresholds,
    }


def readme(file: Path, arguments: LanguageIdArguments, data: dict[str, Any], figures: dict[str, Any], size: int) -> str:
    confused = Counter(
        {
            (label, other): count
            for label, counts in figures["confusion"].items()
            for other, count in counts.items()
            if other != label
        }
    )
    pairs = [[*pair, str(count)] for pair, count in confused.most_common(CONFUSIONS_SHOWN)]
    languages = [
        [
            language,
            f"{data['languages'][language]:,}",
            str(row["documents"]),
            percent(row["precision"]),
            percent(row["recall"]),
        ]
        for language, row in figures["languages"].items()
    ]
    thresholds = [
        [str(row["min_language_score"]), percent(row["kept"]), percent(row["accuracy"])]
        for row in figures["thresholds"]
    ]
    return f"""# A language identifier of {len(data["languages"])} languages

`{file.name}` ({size / 1e6:.1f} MB) is a fastText classifier of words and character n-grams, trained by
`training.train_language_id` on {figures["trained_on"]:,} of {data["documents"]:,} documents: not on those held out, the
blank ones, and those that occur under several languages. Its labels are `__label__en` and so on; it is given the first
{arguments.characters:,} characters of a document, newlines as spaces.

On {figures["documents"]:,} held-out documents {percent(figures["accuracy"])} are told right.
`run.json` has the command, the data's fingerprint and all figures.

{markdown_table(["language", "documents in all", "held out", "precision", "recall"], languages)}

What a minimum score keeps, and how much of it is told right:

{markdown_table(["minimum score", "kept", "right"], thresholds)}

What is taken for what most often:

{markdown_table(["language", "told to be", "documents"], pairs) if pairs else "Nothing."}
"""


if __name__ == "__main__":
    main()
