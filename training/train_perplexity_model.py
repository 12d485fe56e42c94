"""Trains what `training.text_pipeline.perplexity` scores by: SentencePiece and a KenLM 5-gram, on reference text.

    make kenlm
    python -m training.train_perplexity_model --config training/recipes/text_pipeline/perplexity_quickstart.yaml
    python -m training.train_perplexity_model --dataset wikipedia_fr.jsonl --dataset_split train[:98%] \\
        --eval_dataset_split train[98%:] --language fr --output_dir runs/perplexity_fr

As CCNet's (arXiv 1911.00359): unigram pieces that cover 99.95 % of the characters, modified Kneser-Ney without pruning,
the binary as a hash table. CCNet takes the opening paragraphs of a million articles. Equal text gives equal files.

`make kenlm` compiles the programs `lmplz` and `build_binary`; see the Makefile for the packages that they need. lmplz
sorts on disk what does not fit into `--sort_memory`, in the folder that TMPDIR names.
"""

import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import sentencepiece

from hub_cards.build_card import build_card

from .command_line import parse_arguments, plain_errors
from .run_record import RunRecord
from .text_data import TextDataArguments, describe_texts, iterate_texts, load_text_dataset
from .text_pipeline.perplexity_model import PIECES_SUFFIX, PerplexityModel, normalize
from .text_pipeline.tally import partial_path, replace_file

ORDER = 5  # the paper's
CHARACTER_COVERAGE = 0.9995  # CCNet's Makefile
NGRAMS_SUFFIX = ".arpa.bin"


@dataclass
class PerplexityModelArguments(TextDataArguments):
    language: str = field(
        default="en", metadata={"help": "Code of the text's language, as the documents have it: names the files."}
    )
    vocab_size: int = field(
        default=65536,
        metadata={"help": "Pieces at most (CCNet's number); of little text, fewer are found. 8000 suit a few MB."},
    )
    sort_memory: str = field(
        default="2G",
        metadata={"help": "Memory that lmplz may sort in, such as 8G (CCNet's) or 50%%; what does not fit is on disk."},
    )
    eval_dataset_split: str | None = field(
        default="test", metadata={"help": "Held-out split for the figures; '' for none."}
    )
    output_dir: str = field(
        default="runs/perplexity_model", metadata={"help": "Folder of the run, new or of the same run."}
    )

    def __post_init__(self):
        if not self.language or set(self.language) & set("./\\"):
            raise ValueError(f"--language is {self.language!r}: give a code such as en, which becomes a file's name.")


def main() -> None:
    with plain_errors():
        arguments, given = parse_arguments(PerplexityModelArguments, description="Trains a model of perplexity.")
        programs = {name: find_program(name) for name in ("lmplz", "build_binary")}
        options = {"text_column": arguments.text_column, "config": arguments.dataset_config}
        texts = load_text_dataset(arguments.dataset, arguments.dataset_split, streaming=arguments.streaming, **options)
        data = {"train": describe_texts(texts, arguments.dataset, arguments.dataset_split)}
        held_out = []
        if split := arguments.eval_dataset_split:
            held_out = load_text_dataset(arguments.dataset, split, streaming=arguments.streaming, **options)
            data["eval"] = describe_texts(held_out, arguments.dataset, split)
            held_out = iterate_texts(held_out)
        record = RunRecord.start(arguments.output_dir, "train_perplexity_model", given, data)
        if record.finished:
            print(f"{arguments.output_dir} holds this model, finished: only its card is written anew.")
            build_card(arguments.output_dir)
            return
        record.save()

        folder = Path(arguments.output_dir)
        pieces, ngrams = (folder / f"{arguments.language}{suffix}" for suffix in (PIECES_SUFFIX, NGRAMS_SUFFIX))
        processor = train_pieces(normalized_lines(iterate_texts(texts)), arguments.vocab_size)
        replace_file(pieces, processor.serialized_model_proto())
        sentences = (" ".join(processor.encode_as_pieces(line)) for line in normalized_lines(iterate_texts(texts)))
        figures = train_ngrams(sentences, ngrams, processor.vocab_size(), arguments.sort_memory, programs)
        metrics = measure(PerplexityModel(pieces, ngrams), held_out) if held_out else {}
    record.finish(
        metrics=metrics,
        perplexity_model={"language": arguments.language, "vocab_size": processor.vocab_size()} | figures,
    )
    build_card(folder)
    if metrics:
        print("\n".join(f"{name}: {value:,.5g}" for name, value in metrics.items()))
    if figures["fallback_discounts"]:
        print("lmplz took fixed discounts for some orders: the text is too small or too regular to estimate them.")
    print(f"Saved {pieces} and {ngrams}.")


def find_program(name: str) -> str:
    """The path of one of KenLM's programs, beside this Python or in PATH. Raises FileNotFoundError."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if (found := shutil.which(name, path=path)) is None:
        raise FileNotFoundError(
            f"KenLM's program {name} is not beside {Path(sys.executable).name}, nor in PATH: run `make kenlm`."
        )
    return found


def normalized_lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in normalize(text).split("\n"):
            if line and not line.isspace():
                yield line


def train_pieces(lines: Iterator[str], vocab_size: int) -> sentencepiece.SentencePieceProcessor:
    """A unigram model of at most `vocab_size` pieces.

    It holds all text in memory, several times over, and does not read lines over 4,192 bytes.
    """
    model = BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=CHARACTER_COVERAGE,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise ValueError(f"SentencePiece finds no --vocab_size {vocab_size} pieces in this text: {error}.") from error
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def train_ngrams(
    sentences: Iterable[str], file: Path, vocab_size: int, memory: str, programs: dict[str, str]
) -> dict[str, object]:
    """Writes KenLM's binary; returns the number of n-grams by order, and whether discounts could not be estimated.

    Kneser-Ney estimates its discounts from how many n-grams occur once to four times; where those counts admit none, as
    of single pieces when the text shows every piece often, lmplz takes 0.5, 1 and 1.5 for that order.
    """
    with tempfile.TemporaryDirectory(prefix="lmplz_") as temporary:
        arpa, binary = Path(temporary) / "arpa", Path(temporary) / "binary"
        estimate = [programs["lmplz"], "--order", str(ORDER), "--memory", memory, "--temp_prefix", f"{temporary}/sort_"]
        # Where a text spells `<s>`, that is a space.
        estimate += ["--vocab_estimate", str(vocab_size), "--skip_symbols", "--discount_fallback", "--arpa", str(arpa)]
        messages = _run(estimate, sentences)
        _run([programs["build_binary"], "-T", f"{temporary}/sort_", "probing", str(arpa), str(binary)], [])
        with arpa.open(encoding="utf-8") as lines:
            next(lines)  # \data\
            counts = [int(next(lines).split("=")[1]) for _ in range(ORDER)]
        partial = partial_path(file)
        shutil.copyfile(binary, partial)
        os.replace(partial, file)
    return {"order": ORDER, "ngrams": counts, "fallback_discounts": "Substituting fallback discounts" in messages}


def _run(command: list[str], lines: Iterable[str]) -> str:
    """What the program says; raises ValueError with its last words where it fails."""
    with tempfile.TemporaryFile() as messages:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=messages, stderr=messages)
        try:
            with process.stdin as stdin:
                # After an unterminated last line, lmplz gives wrong backoffs to a tenth of all n-grams.
                for line in lines:
                    stdin.write(line.encode() + b"\n")
        except BrokenPipeError:
            pass  # it ended, and has said why
        status = process.wait()
        messages.seek(0)
        said = messages.read().decode(errors="replace")
    if status:
        raise ValueError(f"{Path(command[0]).name} failed with status {status}: {' '.join(said.split())[-500:]}")
    return said


def measure(model: PerplexityModel, texts: Iterable[str]) -> dict[str, float]:
    """Of all `texts` together: perplexity a token, the ends of lines included; bits a character of normalised text; the
    share of pieces that the n-gram model does not know. And the median perplexity of a document."""
    log_probability, tokens, characters, unknown = 0.0, 0, 0, 0
    documents = []
    for text in texts:
        score, length = model.score(text)
        if not length:
            continue
        log_probability += score
        tokens += length
        documents.append(10 ** (-score / length))
        characters += sum(map(len, normalized_lines([text])))
        unknown += sum(piece not in model.ngrams for pieces in model.sentences(text) for piece in pieces)
    if not tokens:
        return {}
    return {
        "eval_perplexity": 10 ** (-log_probability / tokens),
        "eval_bits_per_character": -log_probability * math.log2(10) / characters,
        "eval_unknown_pieces": unknown / tokens,
        "eval_median_document_perplexity": sorted(documents)[len(documents) // 2],
        "eval_documents": len(documents),
        "eval_tokens": tokens,
    }


if __name__ == "__main__":
    main()
