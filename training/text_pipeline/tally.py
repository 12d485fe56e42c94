"""What a stage did, counted: the report is the sum of these over all tasks.

A tally adds up in any order to the same sum, samples included: a sample is the documents whose ids hash lowest, which
is as good as a random draw and does not depend on which worker saw which document.
"""

import heapq
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from datatrove.data import Document

SAMPLES = 20
SAMPLE_CHARACTERS = 1000
# Of documents that cannot be read, so many are named a task; all are counted.
NAMED_BAD_INPUTS = 100
COUNTERS = ("dropped", "dropped_bytes", "counts", "sizes_in", "sizes_out", "dropped_domains")


@dataclass
class Tally:
    """Counts of one stage, of one task or of several.

    Attributes:
        seconds: of a core's time (CPU time of the process), spent in the stage itself.
        bytes_in, bytes_out: of UTF-8; of a file as it lies on disk where a stage reads files, of raw HTML before it
            is extracted.
        dropped, dropped_bytes: by reason.
        counts: whatever else a stage counts: masked addresses, dropped lines.
        histograms: name -> bin -> documents; a bin's name is its lower edge, or a label.
        dropped_domains: host name of the URL -> documents.
        samples: "kept" and "dropped", each at most `SAMPLES` rows, by rising `draw`.
        bad_inputs: where input could not be read: `file`, `offset`, `reason`.
        sizes_in, sizes_out: documents by their bytes, in the bins of `power_of_two_bin`.
    """

    stage: str
    documents_in: int = 0
    bytes_in: int = 0
    documents_out: int = 0
    bytes_out: int = 0
    seconds: float = 0.0
    dropped: Counter[str] = field(default_factory=Counter)
    dropped_bytes: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    histograms: dict[str, Counter[str]] = field(default_factory=lambda: Histograms())
    dropped_domains: Counter[str] = field(default_factory=Counter)
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {"kept": [], "dropped": []})
    bad_inputs: list[dict[str, Any]] = field(default_factory=list)
    sizes_in: Counter[str] = field(default_factory=Counter)
    sizes_out: Counter[str] = field(default_factory=Counter)

    def enters(self, size: int) -> None:
        self.documents_in += 1
        self.bytes_in += size
        self.sizes_in[power_of_two_bin(size)] += 1

    def leaves(self, document: Document, size: int, before: str | None = None) -> None:
        """`before` is the text as it came in, where the stage changed it."""
        self.documents_out += 1
        self.bytes_out += size
        self.sizes_out[power_of_two_bin(size)] += 1
        self._sample("kept", document, before)

    def drops(self, document: Document, size: int, reason: str) -> None:
        self.dropped[reason] += 1
        self.dropped_bytes[reason] += size
        if host := url_host(document):
            self.dropped_domains[host] += 1
        self._sample("dropped", document, reason=reason)

    def bad(self, file: str, offset: int, reason: str) -> None:
        """Counts input that was skipped: `offset` in bytes from the start of the file (of its content, if packed)."""
        self.counts[f"bad: {reason}"] += 1
        if len(self.bad_inputs) < NAMED_BAD_INPUTS:
            self.bad_inputs.append({"file": file, "offset": offset, "reason": reason})

    @property
    def bad_input_count(self) -> int:
        return sum(number for name, number in self.counts.items() if name.startswith("bad: "))

    def _sample(self, kind: str, document: Document, before: str | None = None, reason: str | None = None) -> None:
        draw = zlib.crc32(f"{self.stage}/{document.id}".encode())
        rows = self.samples[kind]
        if len(rows) == SAMPLES and draw >= rows[-1]["draw"]:
            return
        row = {"draw": draw, "id": document.id, "url": document.metadata.get("url"), "text": excerpt(document.text)}
        if before is not None:
            row["before"] = excerpt(before)
        if reason is not None:
            row["reason"] = reason
        rows.append(row)
        rows.sort(key=_sample_order)
        del rows[SAMPLES:]

    def save(self, file: Path) -> None:
        content = {name: value for name, value in vars(self).items() if value or name == "stage"}
        replace_file(file, json.dumps(content, ensure_ascii=False).encode("utf-8", "backslashreplace"))

    @classmethod
    def load(cls, file: Path) -> "Tally":
        content = json.loads(file.read_text(encoding="utf-8"))
        for name in COUNTERS:
            content[name] = Counter(content.get(name, {}))
        histograms = content.get("histograms", {})
        content["histograms"] = Histograms({name: Counter(bins) for name, bins in histograms.items()})
        content["samples"] = {"kept": [], "dropped": []} | content.get("samples", {})
        return cls(**content)

    @classmethod
    def total(cls, stage: str, tallies: Iterable["Tally"]) -> "Tally":
        """The sum; `tallies` in the order of their tasks, which is that of `bad_inputs`."""
        total = cls(stage)
        for tally in tallies:
            for name in ("documents_in", "bytes_in", "documents_out", "bytes_out", "seconds"):
                setattr(total, name, getattr(total, name) + getattr(tally, name))
            for name in COUNTERS:
                getattr(total, name).update(getattr(tally, name))
            for name, bins in tally.histograms.items():
                total.histograms[name].update(bins)
            for kind, rows in tally.samples.items():
                total.samples[kind] = heapq.nsmallest(SAMPLES, total.samples[kind] + rows, key=_sample_order)
            total.bad_inputs += tally.bad_inputs[: NAMED_BAD_INPUTS - len(total.bad_inputs)]
        return total


class Histograms(dict):
    """Name -> bins. Not a `defaultdict`: datatrove's record of a pipeline copies dataclasses, and cannot copy that."""

    def __missing__(self, name: str) -> Counter[str]:
        return self.setdefault(name, Counter())


def _sample_order(row: dict[str, Any]) -> tuple[int, str]:
    return row["draw"], row["id"]


def excerpt(text: str) -> str:
    return text if len(text) <= SAMPLE_CHARACTERS else text[:SAMPLE_CHARACTERS] + " …"


def url_host(document: Document) -> str | None:
    url = document.metadata.get("url")
    if not url:
        return None
    try:
        return urlsplit(url).hostname
    except ValueError:  # such as an unclosed bracket of an IPv6 address
        return None


def power_of_two_bin(value: float) -> str:
    """The lower edge of the bin in which a length or a perplexity is counted: 0, 1, 2, 4, 8, ..."""
    return "0" if value < 1 else str(1 << (int(value).bit_length() - 1))


def replace_file(file: Path, content: bytes) -> None:
    """Writes a file beside its place and moves it there, so that a killed process leaves no half of one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(file)
    partial.write_bytes(content)
    os.replace(partial, file)


def partial_path(file: Path) -> Path:
    """Where `file` is written before it is complete; one for each process, since a killed one may be at work still."""
    return file.with_name(f".{file.name}.{os.getpid()}.partial")
