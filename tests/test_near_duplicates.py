"""Near-duplicates: found at the rate of MinHash's formula; files and clusters are those of references."""

import random
import string
from pathlib import Path

import numpy as np
import pytest
from datatrove.data import Document
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
from datatrove.utils.hashing import HashConfig

from training.text_pipeline.document_files import DocumentReader, DocumentWriter, read_documents
from training.text_pipeline.execution import ExecutionArguments, Phase, run_phases
from training.text_pipeline.local_executor import prepare_process
from training.text_pipeline.near_duplicates import (
    ClusterNearDuplicates,
    DropNearDuplicates,
    FindNearDuplicates,
    NearDuplicateArguments,
    SignDocuments,
    connected_documents,
    shingle_hashes,
)
from training.text_pipeline.words import WORDS

CONFIG = NearDuplicateArguments().config


def random_words(draw: random.Random, number: int) -> list[str]:
    return ["".join(draw.choices(string.ascii_lowercase, k=8)) for _ in range(number)]


def jaccard(first: list[str], second: list[str]) -> float:
    first, second = ({tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in (first, second))
    return len(first & second) / len(first | second)


def pair(draw: random.Random, similarity: float) -> tuple[list[str], list[str]]:
    """Two documents of different words that share their beginning.

    Of n-grams each has t, of which s are shared: s / (2 t - s) is 80 / 100 for t = 90 and 90 / 100 for t = 95.
    """
    t, s = {0.8: (90, 80), 0.9: (95, 90)}[similarity]
    first = random_words(draw, t + 4)
    second = first[: s + 4] + random_words(draw, t - s)
    assert jaccard(first, second) == similarity
    return first, second


def deduplicate(tasks: list[list[Document]], folder: Path, config: MinhashConfig = CONFIG) -> list[str]:
    """The ids that are kept."""
    for rank, task in enumerate(tasks):
        assert list(SignDocuments(folder, config).run(task, rank, len(tasks))) == task
    for rank in range(config.num_buckets):
        FindNearDuplicates(folder, config).run(None, rank, config.num_buckets)
    ClusterNearDuplicates(folder, len(tasks), config).run()
    kept = []
    for rank, task in enumerate(tasks):
        drop = DropNearDuplicates(folder)
        kept += [document.id for document in drop.run(task, rank, len(tasks))]
        assert drop.tally.dropped["near duplicate"] == drop.tally.documents_in - drop.tally.documents_out
    return kept


@pytest.mark.parametrize("similarity", [0.8, 0.9])
def test_near_duplicates_are_found_at_the_rate_of_minhash(tmp_path, similarity):
    draw, pairs = random.Random(1), 200
    originals, copies = [], []
    for i in range(pairs):
        first, second = pair(draw, similarity)
        originals.append(Document(" ".join(first), f"original {i}"))
        copies.append(Document(" ".join(second), f"copy {i}"))
    clean = [Document(" ".join(random_words(draw, 94)), f"clean {i}") for i in range(pairs)]
    kept = deduplicate([[*originals, *clean], copies], tmp_path)
    assert {document.id for document in [*originals, *clean]} <= set(kept)
    rate = 1 - (1 - similarity**8) ** 14  # 0.924 and 0.99975
    missed = sum(id.startswith("copy") for id in kept)
    deviation = (pairs * rate * (1 - rate)) ** 0.5
    assert abs(missed - pairs * (1 - rate)) <= 4 * deviation + 1


def test_the_first_of_a_chain_is_kept(tmp_path):
    """Each document is like the next one, the first and the last are not alike."""
    words = random_words(random.Random(2), 700)
    chain = [Document(" ".join(words[i : i + 300]), str(i)) for i in range(0, 400, 8)]  # 288 of 304 n-grams in common
    assert jaccard(words[:300], words[392:]) == 0
    assert deduplicate([chain[:20], [], chain[20:]], tmp_path / "in order") == ["0"]
    random.Random(3).shuffle(chain)
    assert deduplicate([chain], tmp_path / "shuffled") == [chain[0].id]


def test_does_not_depend_on_how_documents_are_split_into_tasks(tmp_path):
    draw = random.Random(4)
    documents = []
    for i in range(8):
        first, second = pair(draw, draw.choice([0.8, 0.9]))
        documents += [Document(" ".join(first), f"{i} first"), Document(" ".join(second), f"{i} second")]
    draw.shuffle(documents)
    splits = [[documents], [documents[:6], [], documents[6:]], [[document] for document in documents]]
    kept = [deduplicate(split, tmp_path / str(i)) for i, split in enumerate(splits)]
    assert kept[0] == kept[1] == kept[2]
    assert len(kept[0]) < 12


def test_documents_without_an_ngram_are_kept(tmp_path):
    texts = ["", "...", "two words", "two words", "one two three four", "one two three four", "a b c d e", "a b c d e"]
    documents = [Document(text, str(i)) for i, text in enumerate(texts)]
    assert deduplicate([documents, []], tmp_path) == ["0", "1", "2", "3", "4", "5", "6"]


def test_nothing_to_do(tmp_path):
    assert deduplicate([[], []], tmp_path / "no document") == []
    documents = [Document(" ".join(random_words(random.Random(5), 50)), "one")]
    assert deduplicate([documents], tmp_path / "no pair") == ["one"]


def test_signatures_are_datatroves_of_the_same_ngrams(tmp_path, monkeypatch):
    draw = random.Random(6)
    documents = [Document(" ".join(random_words(draw, draw.choice([3, 10, 5000]))), str(i)) for i in range(8)]
    documents += documents[:4]  # equal signatures
    monkeypatch.setattr(
        MinhashDedupSignature, "get_shingles", lambda self, text: shingle_hashes(text, self.config.n_grams)[:, None]
    )
    reference = MinhashDedupSignature(str(tmp_path / "reference"), CONFIG, language=WORDS)
    for rank, task in enumerate([documents, []]):
        reference.run(task, rank)
        list(SignDocuments(tmp_path / "ours", CONFIG).run(task, rank))
    expected = files(tmp_path / "reference")
    assert len(expected) == 2 * 14
    assert files(tmp_path / "ours" / "signatures") == expected


def test_ngrams_are_datatroves():
    """Two of them are the same for us where they are for datatrove, which hashes their text."""
    texts = [
        f"Ça coûte 12,50 € -- l'été, “dit-il” {string.punctuation} un_deux\tTrois\x00quatre\r\ncinq 3.14 çà",
        "ca coute 99 € l ete dit il un deux trois quatre cinq 7 ca",
        "日本語の文章です。日本語の文章です。 한국어 문장 입니다 하나 둘 셋 넷",
        "नमस्ते दुनिया यह एक वाक्य है और यह दूसरा वाक्य है",
    ]
    config = MinhashConfig(hash_config=HashConfig(hash_fc="sha1"))
    reference = MinhashDedupSignature("unused", config, language=WORDS)
    ours = np.concatenate([shingle_hashes(text, 5) for text in texts])
    theirs = np.concatenate([reference.get_shingles(text)[:, 0] for text in texts])
    assert len(ours) > 30
    np.testing.assert_array_equal(ours[:, None] == ours, theirs[:, None] == theirs)
    assert len(set(ours.tolist())) < len(ours)


def test_components_are_those_of_a_search():
    draw = random.Random(7)
    for nodes in (2, 10, 40):
        edges = [(draw.randrange(nodes) << 32, draw.randrange(nodes) << 32) for _ in range(nodes // 2)]
        found, component = connected_documents(np.array(edges, np.uint64))
        assert found.tolist() == sorted({node for edge in edges for node in edge})
        for node, of_node in zip(found.tolist(), component.tolist(), strict=True):
            reached = {node}
            while more := {b for a, b in [*edges, *((b, a) for a, b in edges)] if a in reached} - reached:
                reached |= more
            assert {n for n, c in zip(found.tolist(), component.tolist(), strict=True) if c == of_node} == reached


def test_refuses_other_documents_and_other_tasks(tmp_path):
    documents = [Document(" ".join(random_words(random.Random(8), 9)), str(i)) for i in range(3)]
    deduplicate([documents], tmp_path)
    with pytest.raises(ValueError, match="near_duplicates are 2, and SignDocuments saw 3: put both behind the same"):
        list(DropNearDuplicates(tmp_path).run(documents[:2]))
    with pytest.raises(ValueError, match="run SignDocuments on the same tasks first"):
        list(DropNearDuplicates(tmp_path).run(documents, rank=1))
    with pytest.raises(ValueError, match="FindNearDuplicates has 3 tasks: give one a bucket, 14"):
        FindNearDuplicates(tmp_path, CONFIG).run(None, 0, 3)
    with pytest.raises(ValueError, match="ClusterNearDuplicates has 2 tasks: give it one"):
        ClusterNearDuplicates(tmp_path, 1, CONFIG).run(None, 0, 2)
    deduplicate([documents, documents], tmp_path)
    with pytest.raises(ValueError, match="has signatures of more than 1 tasks, from an earlier run"):
        ClusterNearDuplicates(tmp_path, 1, CONFIG).run()
    with pytest.raises(ValueError, match="--near_duplicate_buckets is 0: give 1 or more"):
        NearDuplicateArguments(near_duplicate_buckets=0)


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_bytes_do_not_depend_on_workers_or_on_a_task_that_is_run_again(tmp_path):
    prepare_process()
    config = NearDuplicateArguments(near_duplicate_buckets=3, near_duplicate_hashes=2).config
    draw = random.Random(9)
    tasks = [[Document(" ".join(words), f"{i} {j}") for j, words in enumerate(pair(draw, 0.9))] for i in range(3)]

    def run(folder: Path, workers: int) -> dict[str, dict[str, bytes]]:
        read, signed = DocumentReader("read", folder / "input"), folder / "signed"
        write = DocumentWriter("write", folder / "output")
        phases = [
            Phase("sign", [read, SignDocuments(signed, config)], len(tasks)),
            Phase("find", [FindNearDuplicates(signed, config)], config.num_buckets),
            Phase("cluster", [ClusterNearDuplicates(signed, len(tasks), config)], 1),
            Phase("drop", [read, DropNearDuplicates(signed), write], len(tasks)),
        ]
        run_phases(phases, ExecutionArguments(workers=workers), folder / "logs")
        written = {kind: files(folder / kind) for kind in ("signed", "output")}
        return {kind: {n: c for n, c in content.items() if "partial" not in n} for kind, content in written.items()}

    for name in "ab":
        for rank, task in enumerate(tasks):
            list(DocumentWriter("input", tmp_path / name / "input").run(task, rank))
    first = run(tmp_path / "a", 1)
    assert first == run(tmp_path / "b", 2)
    kept = [
        document.id for rank in range(3) for document in read_documents(tmp_path / f"a/output/{rank:05d}.jsonl.zst")
    ]
    assert kept == ["0 0", "1 0", "2 0"]

    # Killed while it wrote: some files are missing, some cut short, and the tasks have no marks.
    for file in (tmp_path / "a/signed").rglob("*.*"):
        if file.name.startswith("00001"):
            file.write_bytes(file.read_bytes()[:10])
    (tmp_path / "a/signed/.000-00001.minhash.sig.1.partial").write_bytes(b"half")
    for mark in (tmp_path / "a/logs").rglob("completions/*"):
        mark.unlink()
    assert run(tmp_path / "a", 1) == first
