"""Drops near-duplicates of documents: MinHash with locality-sensitive hashing (Broder 1997), on datatrove's engine.

Four steps, each with as many tasks as are given in brackets:

    SignDocuments(folder, config)                [tasks]             the last to see these documents ...
    FindNearDuplicates(folder, config)           [config.num_buckets]
    ClusterNearDuplicates(folder, tasks, config) [1]
    DropNearDuplicates(folder)                   [tasks]             ... before this, in the same order

- Two documents whose sets of word n-grams have the Jaccard similarity s are found with probability
  1 - (1 - s^hashes)^buckets: 0.92 at 0.8 and 0.9997 at 0.9 with the defaults.
- Of documents that are connected by such pairs the first in order is kept. datatrove's step keeps the one that its
  union-find made the root, which may be any; hence our own.
- Signing is datatrove's but for the hash of an n-gram, which is made of its words' hashes in numpy: datatrove hashes
  each n-gram's text, which takes most of the time, and with xxhash 4 not at all. The files are in datatrove's format.
- A document of fewer words than an n-gram has none, and is kept.
"""

import json
import os
import unicodedata
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha1
from pathlib import Path

import numpy as np
import regex
from datatrove.data import Document
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets, MinhashDedupSignature
from datatrove.utils.text import TextNormConfig, simplify_text

from .places import PLACE, read_places, write_places
from .stage import DocumentStage, FolderStage
from .tally import partial_path, replace_file
from .words import WORDS

CHUNK = 2048  # n-grams that are permuted at a time: 2 MB for each of numpy's temporaries
RECORDS_TO_BUFFER = 1000
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd; 2^64 over the golden ratio, as in Fibonacci hashing
MARKS = regex.compile(r"\p{Mn}+")
WITHOUT_MARKS = TextNormConfig(norm_unicode_diacritics=False)


@dataclass
class NearDuplicateArguments:
    near_duplicates: bool = field(
        default=True, metadata={"help": "Drop all but the first of documents that are nearly the same."}
    )
    near_duplicate_ngrams: int = field(
        default=5, metadata={"help": "Words in an n-gram; documents are compared by theirs. datatrove's default."}
    )
    near_duplicate_buckets: int = field(
        default=14,
        metadata={
            "help": "Groups of hashes of which one must agree: more find less similar ones. datatrove's default."
        },
    )
    near_duplicate_hashes: int = field(
        default=8,
        metadata={
            "help": "Hashes in a group; more find only more similar ones. Documents are likely to be found above a "
            "similarity of (1 / buckets)^(1 / hashes), 0.72 with the defaults, which are datatrove's."
        },
    )

    def __post_init__(self):
        for name in ("near_duplicate_ngrams", "near_duplicate_buckets", "near_duplicate_hashes"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}: give 1 or more.")

    @property
    def config(self) -> MinhashConfig:
        return MinhashConfig(
            n_grams=self.near_duplicate_ngrams,
            num_buckets=self.near_duplicate_buckets,
            hashes_per_bucket=self.near_duplicate_hashes,
        )


class SignDocuments(DocumentStage):
    """Writes the MinHash signature of each document and passes it on.

    `signatures/bucket_BUCKET/RANK.minhash.sig` has the records of datatrove's first stage, sorted: the hashes of the
    bucket (64 bits each) and the document's number in the task (32 bits). `counts/RANK.json` is of all documents.
    """

    name = "sign_documents"

    def __init__(self, folder: Path, config: MinhashConfig):
        super().__init__()
        self.folder, self.config = Path(folder), config

    def begin(self, rank: int, world_size: int) -> None:
        self.minhash = MinhashDedupSignature(str(self.folder), self.config, language=WORDS)
        self.signatures = bytearray()  # of (buckets, hashes) each
        self.signed = []

    def process(self, document: Document) -> None:
        shingles = shingle_hashes(document.text, self.config.n_grams)
        if len(shingles):
            chunks = [shingles[i : i + CHUNK, None] for i in range(0, len(shingles), CHUNK)]
            signature = np.min([np.array(self.minhash.get_signature(chunk), np.uint64) for chunk in chunks], axis=0)
            self.signatures += signature.tobytes()
            self.signed.append(self.tally.documents_in - 1)

    def end(self, rank: int, world_size: int) -> None:
        shape = (len(self.signed), self.config.num_buckets, self.config.hashes_per_bucket)
        signatures = np.frombuffer(self.signatures, np.uint64).reshape(shape)
        records = np.empty(len(self.signed), [("hashes", "<u8", shape[2:]), ("document", PLACE)])
        for bucket in range(self.config.num_buckets):
            hashes = signatures[:, bucket]
            order = np.lexsort(hashes.T[::-1])  # stable, so equal ones stay in the documents' order
            records["hashes"], records["document"] = hashes[order], np.array(self.signed, PLACE)[order]
            self.write(records.tobytes(), bucket, rank)
        counts = {"documents": self.tally.documents_in}
        replace_file(counts_file(self.folder, rank), json.dumps(counts).encode())
        self.tally.counts["documents too short to compare"] = self.tally.documents_in - len(self.signed)
        del self.minhash, self.signatures, self.signed

    def write(self, content: bytes, bucket: int, rank: int) -> None:
        file = self.folder / "signatures" / f"bucket_{bucket:03d}" / f"{rank:05d}.minhash.sig"
        file.parent.mkdir(parents=True, exist_ok=True)
        # Not beside the file: datatrove takes every file of that folder for signatures.
        partial = partial_path(self.folder / f"{bucket:03d}-{file.name}")
        partial.write_bytes(content)
        os.replace(partial, file)


class FindNearDuplicates(FolderStage):
    """datatrove's second stage: the pairs of documents that agree in a bucket; its tasks are the buckets."""

    name = "find_near_duplicates"

    def __init__(self, folder: Path, config: MinhashConfig):
        super().__init__()
        self.folder, self.config = Path(folder), config

    def work(self, rank: int, world_size: int) -> None:
        if world_size != self.config.num_buckets:
            raise ValueError(
                f"FindNearDuplicates has {world_size} tasks: give one a bucket, {self.config.num_buckets}."
            )
        signatures, pairs = str(self.folder / "signatures"), str(self.folder / "pairs")
        MinhashDedupBuckets(signatures, pairs, config=self.config, lines_to_buffer=RECORDS_TO_BUFFER).run(
            None, rank, world_size
        )


class ClusterNearDuplicates(FolderStage):
    """Chooses the documents to drop: of each connected component of the pairs, all but the first.

    Args:
        folder: of the steps before.
        tasks: of `SignDocuments`.
        config: of the steps before.
    """

    name = "cluster_near_duplicates"

    def __init__(self, folder: Path, tasks: int, config: MinhashConfig):
        super().__init__()
        self.folder, self.tasks, self.config = Path(folder), tasks, config

    def work(self, rank: int, world_size: int) -> None:
        if world_size != 1:
            raise ValueError(f"ClusterNearDuplicates has {world_size} tasks: give it one, since it needs all pairs.")
        files = [self.folder / "pairs" / f"{bucket:05d}_00.dups" for bucket in range(self.config.num_buckets)]
        pairs = np.concatenate([np.fromfile(file, "<u4").reshape(-1, 4) for file in files]).astype(np.uint64)
        documents, cluster = connected_documents(pairs[:, [0, 2]] << np.uint64(32) | pairs[:, [1, 3]])
        if len(documents) and documents[-1] >> np.uint64(32) >= self.tasks:
            raise ValueError(
                f"{self.folder} has signatures of more than {self.tasks} tasks, from an earlier run: empty it first."
            )
        _, first = np.unique(cluster, return_index=True)
        drop = np.delete(documents, first)
        ends = np.searchsorted(drop >> np.uint64(32), np.arange(1, self.tasks, dtype=np.uint64))
        write_places(self.folder, "drop", np.split(drop.astype(PLACE), ends))
        self.tally.counts["pairs"] = len(pairs)
        self.tally.counts["clusters"] = len(first)
        self.tally.counts["documents in clusters"] = len(documents)


class DropNearDuplicates(DocumentStage):
    """Drops the documents that were chosen, as "near duplicate".

    Raises:
        ValueError: these are not the documents that `SignDocuments` saw, by their number.
    """

    name = "near_duplicates"

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = Path(folder)

    def begin(self, rank: int, world_size: int) -> None:
        file = counts_file(self.folder, rank)
        if not file.exists():
            raise ValueError(f"{file} is not there: run SignDocuments on the same tasks first.")
        self.expected = json.loads(file.read_text())["documents"]
        self.drop = set(read_places(self.folder, "drop", rank).tolist())

    def process(self, document: Document) -> str | None:
        return "near duplicate" if self.tally.documents_in - 1 in self.drop else None

    def end(self, rank: int, world_size: int) -> None:
        if self.tally.documents_in != self.expected:
            raise ValueError(
                f"The documents of near_duplicates are {self.tally.documents_in}, and SignDocuments saw "
                f"{self.expected}: put both behind the same steps, and sign again what changed."
            )


def connected_documents(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nodes of a graph, sorted, and the number of the component of each: both of shape (nodes,).

    `pairs`: its edges, of shape (pairs, 2).
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    nodes, edges = np.unique(pairs, return_inverse=True)
    start, end = edges.reshape(-1, 2).T
    graph = coo_array((np.ones(len(pairs), bool), (start, end)), shape=(len(nodes), len(nodes)))
    return nodes, connected_components(graph, directed=False)[1]


def shingle_hashes(text: str, n: int) -> np.ndarray:
    """64-bit hashes of the n-grams of words: of shape (n-grams,), none where there are fewer words.

    The text is simplified as datatrove does (lower case, numbers to 0, neither punctuation nor diacritics). An n-gram's
    hash is the polynomial sum(hash(word i) * m^i) modulo 2^64, as of Rabin and Karp, by Horner's rule.
    """
    text = simplify_text(text, WITHOUT_MARKS)
    if not text.isascii():
        text = MARKS.sub("", unicodedata.normalize("NFD", text))
    # ASCII without punctuation has words between spaces only.
    words = text.split() if text.isascii() else WORDS.word_tokenize(text)
    number = len(words) - n + 1
    if number < 1:
        return np.empty(0, np.uint64)
    hashes = np.fromiter(map(word_hash, words), np.uint64, len(words))
    total = np.zeros(number, np.uint64)
    for i in reversed(range(n)):
        total = total * MULTIPLIER + hashes[i : i + number]
    return total


@lru_cache(maxsize=2**17)
def word_hash(word: str) -> int:
    return int.from_bytes(sha1(word.encode("utf-8", "surrogatepass")).digest()[:8], "little")


def counts_file(folder: Path, rank: int) -> Path:
    return folder / "counts" / f"{rank:05d}.json"
