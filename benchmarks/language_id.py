"""How many documents a second does language identification read, ours against datatrove's LanguageFilter?

    python -m benchmarks.language_id --language_model lid.176.ftz --html_folder FOLDER [--rounds 7]

Both are datatrove steps that are given the same documents in memory and the same model on one core, and take turns;
ours loads the model anew in each of them.
Long documents are the main text of the pages in a folder of HTML, short ones a text data set. Ours looks at the
beginning of a document only; the share of documents that it calls the same is told beside its speed, and what it would
be without that.
"""

import argparse
import statistics
import time
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.filters import LanguageFilter
from resiliparse.extract.html2text import extract_plain_text

from benchmarks import measure
from training.text_data import load_text_dataset
from training.text_pipeline.fasttext_models import load_classifier
from training.text_pipeline.language_id import IdentifyLanguage, LanguageArguments

WHOLE = 10**9  # characters: no document is longer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language_model", required=True, help="fastText model, such as lid.176.ftz.")
    parser.add_argument("--html_folder", type=Path, required=True, help="Folder of HTML pages: the long documents.")
    parser.add_argument("--dataset", default="wikipedia_leads", help="Text data set: the short documents.")
    parser.add_argument("--documents", type=int, default=600, help="Long documents, at most.")
    parser.add_argument(
        "--short_documents", type=int, default=5000, help="Short ones: enough that loading the model counts little."
    )
    parser.add_argument("--rounds", type=int, default=7, help="Rounds, in which all take turns.")
    arguments = parser.parse_args()

    kinds = {
        "long": read_pages(arguments.html_folder, arguments.documents),
        "short": load_text_dataset(arguments.dataset, "train")["text"][: arguments.short_documents],
    }
    measurements = {kind: compare(arguments, texts) for kind, texts in kinds.items()}
    for kind, measured in measurements.items():
        print_table(kind, measured)
    shown = {name: value.name if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    shown["language_model"] = Path(arguments.language_model).name
    measure.save(
        "language_id", {"arguments": shown, "documents": measurements}, ("datatrove", "fasttext-numpy2", "resiliparse")
    )


def read_pages(folder: Path, documents: int) -> list[str]:
    """The main text of so many pages, spread evenly over the folder's."""
    files = sorted(folder.rglob("*.html"))
    texts = []
    for file in files[:: max(1, len(files) // documents)]:
        text = extract_plain_text(file.read_bytes().decode("utf-8", "replace"), main_content=True)
        if text:
            texts.append(text)
    return texts[:documents]


def compare(arguments: argparse.Namespace, texts: list[str]) -> dict:
    """Seconds a round and labels of each candidate; `same_label` is the share on which it agrees with datatrove."""
    candidates = {
        "datatrove": datatrove_filter(arguments.language_model),
        "hf_models": stage_of(arguments, LanguageArguments.language_characters),
    }
    if max(map(len, texts)) > 2 * LanguageArguments.language_characters:
        candidates["hf_models, whole documents"] = stage_of(arguments, WHOLE)
    labels, seconds = {}, {}

    def reading(name: str):
        def read():
            documents = [Document(text, str(i)) for i, text in enumerate(texts)]
            started = time.process_time()  # of this process alone, however busy the machine is
            for _ in candidates[name].run(iter(documents)):
                pass
            seconds.setdefault(name, []).append(time.process_time() - started)
            labels[name] = [document.metadata.get("language") for document in documents]

        return read

    measure.interleave({name: reading(name) for name in candidates}, arguments.rounds, warmup=1)
    timed = {name: times[1:] for name, times in seconds.items()}
    characters = sorted(map(len, texts))
    return {
        "documents": len(texts),
        "megabytes": round(sum(len(text.encode()) for text in texts) / 1e6, 3),
        "median_characters": statistics.median(characters),
        "longer_than_read": round(sum(n > LanguageArguments.language_characters for n in characters) / len(texts), 4),
        "candidates": {
            name: {
                "seconds": [round(value, 4) for value in times],
                "documents_per_second": round(len(texts) / statistics.median(times), 1),
                "speedup": measure.speedup(timed["datatrove"], times),
                "same_label": round(
                    sum(a == b for a, b in zip(labels["datatrove"], labels[name], strict=True)) / len(texts), 4
                ),
            }
            for name, times in timed.items()
        },
    }


def datatrove_filter(language_model: str) -> LanguageFilter:
    """With the model put into it: its own road there is a download, after a check that one distribution of several that
    hold the module `fasttext` is installed."""
    LanguageFilter._requires_dependencies = []
    language_filter = LanguageFilter(language_threshold=0.5)
    language_filter.model._model = load_classifier(language_model)
    return language_filter


def stage_of(arguments: argparse.Namespace, characters: int) -> IdentifyLanguage:
    return IdentifyLanguage(LanguageArguments(language_model=arguments.language_model, language_characters=characters))


def print_table(kind: str, measured: dict) -> None:
    measure.print_table(
        f"{measured['documents']} {kind} documents, {measured['megabytes']} MB, median {measured['median_characters']} "
        f"characters, {measured['longer_than_read']:.1%} longer than what is read",
        ["language identification", "documents/s", "times as fast (quartiles)", "same label as datatrove's"],
        [
            [
                name,
                f"{figures['documents_per_second']:,.0f}",
                "{ratio:.2f} ({lower:.2f} to {upper:.2f})".format(**figures["speedup"]),
                f"{figures['same_label']:.2%}",
            ]
            for name, figures in measured["candidates"].items()
        ],
    )


if __name__ == "__main__":
    main()
