"""The two kinds of datatrove step that the pipeline consists of: of documents, and of whole folders.

Both keep a `Tally`. It is in `stage.tally` after a run, and where `tally_folder` is set (`training.prepare_text` sets
it) also in `TALLY_FOLDER/NAME/RANK.json`.
"""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from .tally import Tally

# Where a document has not been extracted yet, its text is empty and the page's bytes are in this entry of its metadata.
RAW = "raw"


def document_bytes(document: Document) -> int:
    raw = document.metadata.get(RAW)
    return len(document.text.encode("utf-8", "surrogatepass")) if raw is None else len(raw)


class TalliedStep(PipelineStep):
    """What both kinds share: a name, and the tally with its file."""

    type = "Text"
    name = ""
    tally_folder: Path | None = None

    def __init__(self):
        super().__init__()
        self.tally = Tally(self.name)

    def save_tally(self, rank: int) -> None:
        """Also tells datatrove's own statistics, which its logs show."""
        self.stat_update("documents_in", value=self.tally.documents_in)
        self.stat_update("documents_out", value=self.tally.documents_out)
        for reason, number in self.tally.dropped.items():
            self.stat_update(f"dropped_{reason}", value=number)
        if self.tally_folder is not None:
            self.tally.save(Path(self.tally_folder) / self.name / f"{rank:05d}.json")


class DocumentStage(TalliedStep):
    """Sees one document at a time: keeps it, changes it, or drops it for a reason."""

    def process(self, document: Document) -> str | None:
        """Changes `document` in place where it has to; returns why it is dropped, in a word or two, or None."""
        raise NotImplementedError

    def begin(self, rank: int, world_size: int) -> None:
        """Before the first document of a task: load what is large here, since a stage is pickled for its workers."""

    def end(self, rank: int, world_size: int) -> None:
        """After the last document of a task; not called where the task fails."""

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        tally = self.tally = Tally(self.name)
        started = time.process_time()
        self.begin(rank, world_size)
        tally.seconds += time.process_time() - started
        for document in data:
            started = time.process_time()
            size, before = document_bytes(document), document.text
            tally.enters(size)
            reason = self.process(document)
            if reason is not None:
                tally.drops(document, size, reason)
            elif document.text is before and RAW not in document.metadata:
                tally.leaves(document, size)
            else:
                tally.leaves(document, document_bytes(document), before or None)
            tally.seconds += time.process_time() - started
            if reason is None:
                yield document
        started = time.process_time()
        self.end(rank, world_size)
        tally.seconds += time.process_time() - started
        self.save_tally(rank)


class FolderStage(TalliedStep):
    """Takes no documents: reads files that earlier steps wrote, and writes others. The first step of its pipeline."""

    def work(self, rank: int, world_size: int) -> None:
        raise NotImplementedError

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> Iterable[Document]:
        self.tally = Tally(self.name)
        started = time.process_time()
        self.work(rank, world_size)
        self.tally.seconds += time.process_time() - started
        self.save_tally(rank)
        return ()
