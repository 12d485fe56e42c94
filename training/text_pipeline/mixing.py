"""Mixes tokenised sources in given proportions into shards for `pretrain_lm`, as LLaMA's table 1 (arXiv 2302.13971).

A source's `weight` is its share of the mixture's tokens, and the weights add up to 1. With `total_tokens` N a source of
T tokens gives weight * N tokens: weight * N / T epochs. Without, N is the largest for which no source goes past its
`max_epochs` (default 1). Or all sources have `epochs` instead, from which the shares follow. Documents are never cut,
so a source gives less than one document too little. Tokens are counted without bos and eos, which packing adds.

Everything is drawn from the seed: each document of each epoch of each source has a place, a uniform number of 64 bits,
and the mixture is all of them by rising place; shard k of n has the places in [k/n, (k+1)/n). Of an epoch that is not
whole, the first documents of a random order are taken. So the shards are a function of the tokenised files and the
options; which process writes which, and when, makes no difference.

Three phases: `TokeniseDocuments` (a task a file), `PlanMixture` (one), `WriteTokenShards` (a task a shard). Planning
takes 40 bytes of memory a document of the largest file; a shard that, and 80 for each of its own documents.
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .stage import FolderStage
from .tally import partial_path, replace_file
from .token_files import TokenFile

ROW_GROUP = 2**20  # tokens
DRAW_BINS = 2**16
OPEN_FILES = 256  # of tokens at a time: a process may have 1,024 by default
SCHEMA = pa.schema({"input_ids": pa.list_(pa.int32()), "source": pa.string()})


@dataclass(frozen=True)
class Share:
    """What is asked of a source: `weight` (at most `max_epochs`) or `epochs`."""

    source: str
    weight: float | None = None
    epochs: float | None = None
    max_epochs: float = 1.0


@dataclass(frozen=True)
class SourcePlan:
    """What is taken of a source: `whole_epochs`, and of one more the documents whose draw is below `draw_below`.

    `documents` and `tokens` are the source's own, those with `mixed_` what the mixture gets.
    """

    source: str
    documents: int
    tokens: int
    whole_epochs: int
    draw_below: int
    mixed_documents: int
    mixed_tokens: int
    files: list[int] = field(default_factory=list)

    @property
    def epochs(self) -> float:
        return self.mixed_tokens / self.tokens


class PlanMixture(FolderStage):
    """Counts the tokens of each source and settles what each gives: `plan_file`, and `info.json` in `output`.

    Args:
        tokens: folder that `TokeniseDocuments` wrote, in `files` tasks.
        tokenizer: `fingerprint` and `vocab_size`, for `info.json`.
        notices: `license`, `attribution` and `language` (a list) of the sources, where they are known.

    Raises ValueError, in one sentence: a source without documents, with too few for its share, or of so few tokens that
    it would give no document.
    """

    name = "plan_mixture"

    def __init__(
        self,
        shares: list[Share],
        total_tokens: int | None,
        seed: int,
        shards: int,
        tokens: Path,
        files: int,
        plan_file: Path,
        output: Path,
        tokenizer: dict[str, Any],
        notices: dict[str, dict[str, Any]],
    ):
        super().__init__()
        self.shares, self.total_tokens, self.seed, self.shards = shares, total_tokens, seed, shards
        self.tokens, self.files, self.plan_file, self.output = tokens, files, plan_file, output
        self.tokenizer, self.notices = tokenizer, notices

    def work(self, rank: int, world_size: int) -> None:
        files = defaultdict(list)
        for number in range(self.files):
            file = TokenFile(Path(self.tokens), number)
            files[file.summary.source].append(file)
        available = {
            share.source: sum(file.summary.tokens for file in files[share.source])
            for share in sorted(self.shares, key=lambda share: share.source)
        }
        wanted = wanted_tokens(self.shares, available, self.total_tokens)
        plans = [plan_source(source, files[source], tokens, self.seed) for source, tokens in wanted.items()]
        for plan in plans:
            self.tally.counts[f"tokens: {plan.source}"] = plan.mixed_tokens
            self.tally.counts[f"documents: {plan.source}"] = plan.mixed_documents
        digests = [file.summary.sha256 for source in available for file in files[source]]
        content = [asdict(plan) for plan in plans]
        fingerprint = hashlib.sha256(json.dumps([self.seed, self.shards, content, digests]).encode()).hexdigest()[:16]
        replace_file(Path(self.plan_file), json.dumps(content).encode())
        info = json.dumps(self._info(plans, fingerprint), indent=2, ensure_ascii=False)
        replace_file(Path(self.output) / "info.json", (info + "\n").encode())

    def _info(self, plans: list[SourcePlan], fingerprint: str) -> dict[str, Any]:
        total = sum(plan.mixed_tokens for plan in plans)
        sources = {
            plan.source: {
                "tokens": plan.mixed_tokens,
                "documents": plan.mixed_documents,
                "share": round(plan.mixed_tokens / total, 6),
                "epochs": round(plan.epochs, 6),
                "source_tokens": plan.tokens,
                "source_documents": plan.documents,
            }
            | self.notices.get(plan.source, {})
            for plan in plans
        }
        info = {"name": f"Tokens of {', '.join(sources)}", "modality": "tokens"}
        if all("language" in source for source in sources.values()):
            info["language"] = sorted({language for source in sources.values() for language in source["language"]})
        # The mixture has a licence where all its sources have the same one.
        licenses = {source.get("license") for source in sources.values()}
        if len(licenses) == 1 and None not in licenses:
            info["license"] = licenses.pop()
        if attributions := sorted({source["attribution"] for source in sources.values() if "attribution" in source}):
            info["attribution"] = " ".join(attributions)
        return info | {
            "tokens": total,
            "documents": sum(plan.mixed_documents for plan in plans),
            "sources": sources,
            "tokenizer": self.tokenizer,
            "seed": self.seed,
            "shards": self.shards,
            "fingerprint": fingerprint,
        }


def wanted_tokens(shares: list[Share], available: dict[str, int], total_tokens: int | None) -> dict[str, int]:
    """Tokens that each source is to give, by the rule at the module's head, in the order of `available`.

    Args:
        available: tokens in one epoch of each source.

    Raises ValueError, in one sentence: no tokens, or more epochs than `max_epochs`.
    """
    asked = {share.source: share for share in shares}
    for source, tokens in available.items():
        if tokens == 0:
            raise ValueError(f"The source {source!r} has no documents: name other ones, or leave it out.")
    if shares[0].epochs is not None:
        return {source: round(asked[source].epochs * tokens) for source, tokens in available.items()}
    most = {source: asked[source].max_epochs * tokens / asked[source].weight for source, tokens in available.items()}
    if total_tokens is None:
        total_tokens = min(most.values())
    for source, tokens in available.items():
        share = asked[source]
        if total_tokens > most[source] * (1 + 1e-9):
            raise ValueError(
                f"The source {source!r} has {tokens} tokens, and {share.weight:g} of {total_tokens} tokens would be "
                f"{share.weight * total_tokens / tokens:.3g} epochs of it, more than its max_epochs of "
                f"{share.max_epochs:g}: ask for --total_tokens {int(min(most.values()))} at most, or for more epochs."
            )
    return {source: round(asked[source].weight * total_tokens) for source in available}


def plan_source(source: str, files: list[TokenFile], wanted: int, seed: int) -> SourcePlan:
    """The plan that takes as many of `wanted` tokens as whole documents allow."""
    documents = sum(file.summary.documents for file in files)
    tokens = sum(file.summary.tokens for file in files)
    whole, rest = divmod(wanted, tokens)
    draw_below, drawn_documents, drawn_tokens = draw_documents(source, files, whole, rest, seed)
    if whole == 0 and drawn_documents == 0:
        raise ValueError(
            f"The source {source!r} is to give {wanted} tokens, too few for a document of it: ask for more "
            "--total_tokens, more epochs, or a greater weight."
        )
    return SourcePlan(
        source=source,
        documents=documents,
        tokens=tokens,
        whole_epochs=whole,
        draw_below=draw_below,
        mixed_documents=whole * documents + drawn_documents,
        mixed_tokens=whole * tokens + drawn_tokens,
        files=[file.rank for file in files],
    )


def draw_documents(source: str, files: list[TokenFile], epoch: int, wanted: int, seed: int) -> tuple[int, int, int]:
    """The bound below which documents' draws add up to at most `wanted` tokens (less than all), and their sums.

    Returns (bound, documents, tokens). The first pass finds the bin of draws that the bound lies in, the second sorts
    what is in that bin: no list of all documents is needed.
    """

    def draws() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for first, file in numbered(files):
            yield random_numbers("draw", source, epoch, first, file.summary.documents, seed), file.lengths()

    numbers, tokens = np.zeros(DRAW_BINS, np.int64), np.zeros(DRAW_BINS, np.int64)
    for draw, lengths in draws():
        bins = (draw // np.uint64(2**64 // DRAW_BINS)).astype(np.int64)
        numbers += np.bincount(bins, minlength=DRAW_BINS)
        tokens += np.bincount(bins, lengths, minlength=DRAW_BINS).astype(np.int64)
    # The first bin that does not fit; there is one, since `wanted` is less than all.
    last = int(np.searchsorted(tokens.cumsum(), wanted, side="right"))
    inside = [(d[chosen], n[chosen]) for d, n in draws() for chosen in [d // np.uint64(2**64 // DRAW_BINS) == last]]
    draw, lengths = (np.concatenate(parts) for parts in zip(*inside, strict=True))
    order = np.argsort(draw, kind="stable")
    sums = tokens[:last].sum() + lengths[order].cumsum(dtype=np.int64)
    fitting = int(np.searchsorted(sums, wanted, side="right"))
    drawn_tokens = sums[fitting - 1] if fitting else tokens[:last].sum()
    return int(draw[order[fitting]]), int(numbers[:last].sum()) + fitting, int(drawn_tokens)


class WriteTokenShards(FolderStage):
    """Task k writes shard k of `shards`: `output/train-0000k-of-0000n.parquet`, columns `input_ids` and `source`.

    The ids are int32, which every reader takes; in parquet they lie in the same bytes as uint16 would. A shard that
    gets no document is a file without rows.
    """

    name = "token_shards"

    def __init__(self, seed: int, shards: int, tokens: Path, plan_file: Path, output: Path):
        super().__init__()
        self.seed, self.shards, self.tokens, self.plan_file, self.output = seed, shards, tokens, plan_file, output

    def work(self, rank: int, world_size: int) -> None:
        plans = [SourcePlan(**content) for content in json.loads(Path(self.plan_file).read_text(encoding="utf-8"))]
        sources, files, starts, lengths = self._documents(plans, rank)
        names = np.array([plan.source for plan in plans], dtype=object)
        open_ids = lru_cache(OPEN_FILES)(lambda number: TokenFile(Path(self.tokens), number).ids())
        target = shard_file(Path(self.output), rank, self.shards)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = partial_path(target)
        with pq.ParquetWriter(partial, SCHEMA, compression="zstd") as writer:
            groups = lengths.cumsum(dtype=np.int64) // ROW_GROUP
            for rows in np.split(np.arange(len(lengths)), np.flatnonzero(np.diff(groups)) + 1):
                if len(rows):
                    documents = [open_ids(files[row])[starts[row] : starts[row] + lengths[row]] for row in rows]
                    writer.write_table(_table(documents, lengths[rows], names[sources[rows]]))
        os.replace(partial, target)
        for number, plan in enumerate(plans):
            self.tally.counts[f"tokens: {plan.source}"] = int(lengths[sources == number].sum(dtype=np.int64))
            self.tally.counts[f"documents: {plan.source}"] = int((sources == number).sum())

    def _documents(self, plans: list[SourcePlan], shard: int) -> list[np.ndarray]:
        """Of the shard's documents, by rising place: number of the source, file, first token in it, tokens."""
        found = [[np.empty(0, kind)] for kind in (np.uint64, np.uint16, np.uint32, np.int64, np.uint32)]
        for number, plan in enumerate(plans):
            files = [TokenFile(Path(self.tokens), rank) for rank in plan.files]
            for epoch in range(plan.whole_epochs + (plan.draw_below > 0)):
                for first, file in numbered(files):
                    span = (plan.source, epoch, first, file.summary.documents, self.seed)
                    places = random_numbers("place", *span)
                    chosen = shard_of(places, self.shards) == shard
                    if epoch == plan.whole_epochs:
                        chosen &= random_numbers("draw", *span) < np.uint64(plan.draw_below)
                    lengths = file.lengths()
                    starts = lengths.cumsum(dtype=np.int64) - lengths
                    count = int(chosen.sum())
                    row = (places[chosen], number, file.rank, starts[chosen], lengths[chosen])
                    for column, values in zip(found, row, strict=True):
                        column.append(np.broadcast_to(np.asarray(values, column[0].dtype), (count,)))
        places, *columns = map(np.concatenate, found)
        order = np.argsort(places, kind="stable")
        return [column[order] for column in columns]


def _table(documents: list[np.ndarray], lengths: np.ndarray, sources: np.ndarray) -> pa.Table:
    offsets = np.concatenate([[0], lengths.cumsum(dtype=np.int64)]).astype(np.int32)
    ids = pa.ListArray.from_arrays(offsets, np.concatenate(documents).astype(np.int32))
    return pa.table({"input_ids": ids, "source": pa.array(sources, pa.string())}, schema=SCHEMA)


def numbered(files: list[TokenFile]) -> Iterator[tuple[int, TokenFile]]:
    """Each file of a source with the number, in the source, of its first document."""
    first = 0
    for file in files:
        yield first, file
        first += file.summary.documents


def random_numbers(purpose: str, source: str, epoch: int, first: int, number: int, seed: int) -> np.ndarray:
    """`(number,)`, uint64, uniform: those of the documents from `first` on, in this epoch of this source.

    numpy keeps the stream of PCG64 the same from version to version (NEP 19).
    """
    key = hashlib.sha256(json.dumps([seed, purpose, source, epoch]).encode()).digest()
    return np.random.PCG64(int.from_bytes(key, "big")).advance(first).random_raw(number)


def shard_of(places: np.ndarray, shards: int) -> np.ndarray:
    """floor(place / 2**64 * shards), in integers; so exact for up to 2**32 shards."""
    return ((places >> np.uint64(32)) * np.uint64(shards)) >> np.uint64(32)


def shard_file(output: Path, shard: int, shards: int) -> Path:
    return output / f"train-{shard:05d}-of-{shards:05d}.parquet"
