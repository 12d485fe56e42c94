"""fastText classifiers (arXiv 1607.01759) as the pipeline uses them: opened with care, given text on one line.

fastText believes what a model file says: a truncated one makes it fill the memory or read beyond it. So the file is
read through here first, by the layout that fastText's `saveModel` has written since version 0.1 (file versions 11 and
12): header, dictionary, input matrix, output matrix, each plain or quantised, and nothing behind.
"""

import itertools
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAGIC, VERSIONS = 793712314, (11, 12)
SUPERVISED = 3  # fastText's `model_name`
LABEL = "__label__"
DICTIONARY_ENTRY = re.compile(
    rb"([^\0]*)\0.{8}(.)", re.DOTALL
)  # its name, its count, and 0 for a word or 1 for a label
CENTROIDS = 256  # of a product quantiser, each a vector of the matrix's width


@dataclass
class ModelFile:
    """What a file holds. `labels` are without fastText's prefix, in the file's order, none where it is unsupervised."""

    labels: list[str]
    words: int
    dimension: int


class Truncated(Exception):
    """The file ends before what its header promises."""


def load_classifier(file: str | Path) -> Any:
    """The `fasttext` model in `file`; raises ValueError as `check_model_file` does."""
    check_model_file(file)
    import fasttext  # here, since the stages that do not use it are imported beside those that do

    try:
        return fasttext.load_model(str(file))
    except (RuntimeError, MemoryError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({error}): copy it again.") from error


def check_model_file(file: str | Path) -> ModelFile:
    """Reads a model file's structure, and not its weights.

    Raises ValueError, a sentence with the file's name, for what fastText could not load or would break on.
    """
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"There is no fastText model {file}: name a .bin or .ftz file.")
    if file.stat().st_size < struct.calcsize("<2i"):
        raise ValueError(f"{file} is no fastText model: it has {file.stat().st_size} bytes.")
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        reader = _Reader(content)
        magic, version = reader.take("2i")
        if magic != MAGIC:
            raise ValueError(f"{file} is no fastText model: it does not begin as one. Name a .bin or .ftz file.")
        if version not in VERSIONS:
            raise ValueError(f"{file} has version {version} of fastText's format, and {VERSIONS} can be read.")
        try:
            found = _read_model(reader)
        except Truncated:
            raise ValueError(f"{file} is damaged: it ends too early, at byte {len(content)}. Copy it again.") from None
        except (ValueError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is damaged ({error}): copy it again.") from error
        if reader.position != len(content):
            surplus = len(content) - reader.position
            raise ValueError(f"{file} is damaged: {surplus} bytes follow its end. Copy it again.")
    return found


def on_one_line(text: str, characters: int | None = None) -> str:
    """What fastText is given of `text`: newlines as spaces, and of a longer one the first `characters` from its first
    visible one on, without a word that is cut in two (unless it is longer than half of them, as where a language
    writes no spaces). Half a surrogate pair, which UTF-8 has no bytes for, becomes a question mark.
    """
    text = text.lstrip()
    shortened = characters is not None and len(text) > characters
    line = text[: characters + 1] if shortened else text
    line = line.replace("\n", " ").encode("utf-8", "replace").decode()
    if not shortened:
        return line
    end = line.rfind(" ", characters // 2)
    return line[: end if end > 0 else characters]


def training_line(label: str, text: str, characters: int | None = None) -> str:
    """A line of fastText's training file. What looks like a label within the text would be taken for one."""
    return f"{LABEL}{label} {on_one_line(text, characters).replace(LABEL, ' ')}\n"


def most_likely(model: Any, line: str, labels: int = 1) -> list[tuple[str, float]]:
    """The `labels` likeliest, without their prefix, and their probabilities (fastText's may exceed 1 by rounding)."""
    names, scores = model.predict(line, k=labels)
    return [(name.removeprefix(LABEL), min(float(score), 1.0)) for name, score in zip(names, scores, strict=True)]


class _Reader:
    def __init__(self, content: mmap.mmap):
        self.content = content
        self.position = 0

    def take(self, layout: str) -> tuple:
        start = self.skip(struct.calcsize("<" + layout))
        return struct.unpack_from("<" + layout, self.content, start)

    def skip(self, size: int) -> int:
        """Returns where what is passed over begins."""
        start, self.position = self.position, self.position + size
        if self.position > len(self.content):
            raise Truncated
        return start

    def labels(self, entries: int) -> list[bytes]:
        """Passes over a dictionary of so many entries, maybe millions, and returns those that are labels."""
        labels, found = [], 0
        for entry in itertools.islice(DICTIONARY_ENTRY.finditer(self.content, self.position), entries):
            found += 1
            if entry[2] != b"\0":
                _expect(entry[2] == b"\1", "an entry of its dictionary is neither word nor label")
                labels.append(entry[1])
        if found < entries:
            raise Truncated
        if found:
            self.position = entry.end()
        return labels


def _read_model(reader: _Reader) -> ModelFile:
    dimension, _, _, _, _, _, _, model, buckets, _, _, _, _ = reader.take("12id")
    entries, words, labels, _, pruned = reader.take("3i2q")
    _expect(min(dimension, entries, words, labels, buckets) >= 0 and words + labels == entries, "its counts disagree")
    names = [name.decode("utf-8").removeprefix(LABEL) for name in reader.labels(entries)]
    _expect(len(names) == labels, "its counts disagree")
    reader.skip(8 * max(pruned, 0))
    (quantised,) = reader.take("?")
    rows = words + (buckets if pruned < 0 else pruned)
    _read_matrix(reader, quantised, rows, dimension)
    (quantised_output,) = reader.take("?")
    supervised = model == SUPERVISED
    _read_matrix(reader, quantised and quantised_output, labels if supervised else words, dimension)
    return ModelFile(names if supervised else [], words, dimension)


def _read_matrix(reader: _Reader, quantised: bool, rows: int, columns: int) -> None:
    (normed,) = reader.take("?") if quantised else (False,)
    found = reader.take("2q")
    _expect(found == (rows, columns), f"a matrix of {found} where {(rows, columns)} belongs")
    if not quantised:
        reader.skip(4 * rows * columns)
        return
    (codes,) = reader.take("i")
    _expect(codes >= 0, "its counts disagree")
    reader.skip(codes)
    _read_quantiser(reader, columns)
    if normed:
        reader.skip(rows)
        _read_quantiser(reader, 1)


def _read_quantiser(reader: _Reader, columns: int) -> None:
    width, parts, _, _ = reader.take("4i")
    _expect(width == columns and 0 < parts <= max(columns, 1), "its quantiser is of another matrix")
    reader.skip(4 * width * CENTROIDS)


def _expect(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)
