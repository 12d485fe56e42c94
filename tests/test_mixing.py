"""Token shards: the ids that packing computes, the shares that were asked for, the same bytes however made."""

import hashlib
import json
import random
import re

import datasets
import multiprocess
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from datatrove.data import Document
from tokenizers import Tokenizer, models
from training_runs import REPOSITORY

from hf_models.bpe_tokenizer import train_bpe
from training.language_models import load_tokenizer
from training.packing import pack_documents
from training.text_data import load_text_dataset
from training.text_pipeline.document_files import ParquetDocuments
from training.text_pipeline.execution import ExecutionArguments, run_phases
from training.text_pipeline.mixing import Share, draw_documents, random_numbers, shard_of, wanted_tokens
from training.text_pipeline.mixture_inputs import MixArguments, document_phases, mixture_phases, read_sources
from training.text_pipeline.token_files import SourceFile, TokenFile, TokeniseDocuments, open_tokenizer

SHARDS = 3


def some_texts(number, seed):
    draw = random.Random(seed)
    words = ["river", "mathematics", "über", "naïve", "東京", "x = 12;", "\n", "<s>", "</s>", "The"]
    return [" ".join(draw.choices(words, k=draw.randint(1, 40))) + f" {seed}-{i}" for i in range(number)]


def write_documents(folder, texts, files):
    for rank in range(files):
        documents = (Document(text=text, id=str(i)) for i, text in enumerate(texts[rank::files]))
        list(ParquetDocuments(folder).run(documents, rank))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Two sources of several files each, and a tokenizer."""
    folder = tmp_path_factory.mktemp("inputs")
    write_documents(folder / "web", some_texts(120, 1), 3)
    write_documents(folder / "books", some_texts(40, 2), 2)
    tokenizer = train_bpe(some_texts(50, 3), 300)
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def tokenizer(inputs):
    return load_tokenizer(str(inputs / "tokenizer"))


def run_here(phases):
    for phase in phases:
        for rank in range(phase.tasks):
            [step] = phase.steps
            step.run(rank=rank, world_size=phase.tasks)


def mix(inputs, folder, sources, run=run_here, **options):
    """Returns the folder with the shards."""
    sources = {name: {"documents": str(inputs / name)} | entry for name, entry in sources.items()}
    options = {"tokenizer": str(inputs / "tokenizer"), "token_shards": SHARDS} | options
    arguments = MixArguments(sources=sources, **options)
    run(mixture_phases(arguments, read_sources(arguments), folder / "work", folder / "tokens"))
    return folder / "tokens"


def rows_of(tokens):
    return [row for file in sorted(tokens.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def info_of(tokens):
    return json.loads((tokens / "info.json").read_text())


def files_of(folder):
    return {file.relative_to(folder): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def expected_ids(inputs, tokenizer, source):
    texts = pa.concat_tables([pq.read_table(file) for file in sorted((inputs / source).glob("*.parquet"))])
    return tokenizer(texts["text"].to_pylist(), add_special_tokens=False, split_special_tokens=True)["input_ids"]


def test_whole_epochs_hold_each_document_as_often_as_asked(inputs, tokenizer, tmp_path):
    tokens = mix(inputs, tmp_path, {"web": {"epochs": 1}, "books": {"epochs": 2}})
    rows = rows_of(tokens)
    for source, epochs in (("web", 1), ("books", 2)):
        found = sorted(row["input_ids"] for row in rows if row["source"] == source)
        assert found == sorted(expected_ids(inputs, tokenizer, source) * epochs)
    info = info_of(tokens)
    assert info["tokens"] == sum(len(row["input_ids"]) for row in rows)
    assert info["documents"] == len(rows) == 120 + 2 * 40
    assert info["sources"]["books"]["epochs"] == 2


@pytest.mark.parametrize("total", [1000, 2345, None])
def test_each_source_gives_its_share_of_the_tokens_to_within_one_document(inputs, tokenizer, tmp_path, total):
    weights = {"web": 0.7, "books": 0.3}
    sources = {name: {"weight": weight, "max_epochs": 2.5} for name, weight in weights.items()}
    tokens = mix(inputs, tmp_path, sources, total_tokens=total)
    rows, info = rows_of(tokens), info_of(tokens)
    documents = {name: expected_ids(inputs, tokenizer, name) for name in weights}
    available = {name: sum(map(len, ids)) for name, ids in documents.items()}
    if total is None:  # the source that is used up first decides
        total = min(2.5 * available[name] / weights[name] for name in weights)
    for name, weight in weights.items():
        given = sum(len(row["input_ids"]) for row in rows if row["source"] == name)
        longest = max(map(len, documents[name]))
        assert weight * total - longest < given <= weight * total + 0.5
        assert info["sources"][name]["tokens"] == given
        assert info["sources"][name]["epochs"] == pytest.approx(given / available[name], abs=1e-6)


def test_a_part_of_an_epoch_repeats_no_document_and_is_the_first_of_a_random_order(inputs, tokenizer, tmp_path):
    tokens = mix(inputs, tmp_path, {"web": {"epochs": 0.4}, "books": {"epochs": 1.3}})
    web = [tuple(row["input_ids"]) for row in rows_of(tokens) if row["source"] == "web"]
    books = [tuple(row["input_ids"]) for row in rows_of(tokens) if row["source"] == "books"]
    assert len(set(web)) == len(web)
    assert {books.count(document) for document in books} == {1, 2}
    assert len(set(books)) == 40
    # Brute force: documents by their draw, as long as they fit.
    documents = expected_ids(inputs, tokenizer, "web")
    order = np.argsort(random_numbers("draw", "web", 0, 0, len(documents), seed=0))
    room, chosen = round(0.4 * sum(map(len, documents))), []
    for number in order:
        room -= len(documents[number])
        if room < 0:
            break
        chosen.append(tuple(documents[number]))
    assert sorted(chosen) == sorted(web)


def test_the_order_is_that_of_the_places_of_all_documents(inputs, tokenizer, tmp_path):
    tokens = mix(inputs, tmp_path, {"web": {"epochs": 1}, "books": {"epochs": 2}}, mix_seed=7)
    placed = []
    for source, epochs in (("books", 2), ("web", 1)):
        documents = expected_ids(inputs, tokenizer, source)
        for epoch in range(epochs):
            places = random_numbers("place", source, epoch, 0, len(documents), seed=7).tolist()
            placed += [(place, source, ids) for place, ids in zip(places, documents, strict=True)]
    placed.sort()
    assert [(row["source"], row["input_ids"]) for row in rows_of(tokens)] == [(s, ids) for _, s, ids in placed]
    for shard, file in enumerate(sorted(tokens.glob("*.parquet"))):
        inside = [ids for place, _, ids in placed if place * SHARDS // 2**64 == shard]
        assert pq.read_table(file)["input_ids"].to_pylist() == inside


def test_places_are_uniform_and_independent_of_how_documents_are_split_into_files():
    whole = random_numbers("place", "web", 1, 0, 100_000, seed=3)
    parts = [random_numbers("place", "web", 1, first, 25_000, seed=3) for first in range(0, 100_000, 25_000)]
    assert np.array_equal(whole, np.concatenate(parts))
    assert len(set(whole.tolist())) == 100_000
    counts = np.bincount(shard_of(whole, 10).astype(int), minlength=10)
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 27.9  # chi-square with 9 degrees of freedom, p = 0.001
    for other in (("draw", "web", 1), ("place", "books", 1), ("place", "web", 2)):
        assert abs(np.corrcoef(whole, random_numbers(*other, 0, 100_000, seed=3))[0, 1]) < 0.02
    places = [0, 2**64 - 1, 2**63, 2**64 // 3, 2**64 // 3 + 2**32]
    assert shard_of(np.array(places, np.uint64), 3).tolist() == [0, 2, 1, 0, 1]


def test_draws_are_bounded_as_by_brute_force(tmp_path):
    generator = np.random.default_rng(0)
    lengths = [generator.integers(1, 50, 700).astype(np.uint32) for _ in range(2)]
    for rank, part in enumerate(lengths):
        file = TokenFile(tmp_path, rank)
        np.save(file.lengths_path, part)
        summary = {"source": "a", "documents": 700, "tokens": int(part.sum()), "bytes": 0, "dtype": "uint16"}
        file.summary_path.write_text(json.dumps(summary | {"sha256": ""}))
    files, joined = [TokenFile(tmp_path, rank) for rank in range(2)], np.concatenate(lengths)
    draws = random_numbers("draw", "a", 4, 0, 1400, seed=0)
    for wanted in (0, 1, 50, 12_345, int(joined.sum()) - 1):
        bound, documents, tokens = draw_documents("a", files, 4, wanted, seed=0)
        sums = joined[np.argsort(draws)].cumsum()
        assert documents == (sums <= wanted).sum() == (draws < np.uint64(bound)).sum()
        assert tokens == joined[draws < np.uint64(bound)].sum() <= wanted


def test_llamas_table_gives_its_epochs():
    """Table 1 of arXiv 2302.13971: with tokens of the sizes that follow from it, the epochs are those of the table."""
    recipe = REPOSITORY / "training" / "recipes" / "text_pipeline" / "llama_mixture.yaml"
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    shares = MixArguments(sources=content["sources"], tokenizer="any").shares()
    total = 1_400_000_000_000
    available = {share.source: round(share.weight * total / share.max_epochs) for share in shares}
    wanted = wanted_tokens(shares, available, None)
    assert sum(wanted.values()) == pytest.approx(total, rel=1e-9)
    assert {share.source: wanted[share.source] / available[share.source] for share in shares} == pytest.approx(
        {share.source: share.max_epochs for share in shares}, rel=1e-9
    )
    assert wanted["common_crawl"] / total == pytest.approx(0.67)


def test_workers_kills_and_the_order_of_sources_make_no_difference(inputs, tmp_path):
    sources = {"web": {"weight": 0.6}, "books": {"weight": 0.4, "max_epochs": 1.7}}
    once = mix(inputs, tmp_path / "once", sources)

    def run_broken(phases):
        """As after a kill: half-written files lie about, and tasks run again, in another order."""
        for phase in phases:
            for rank in [*range(phase.tasks), *reversed(range(phase.tasks))]:
                phase.steps[0].run(rank=rank, world_size=phase.tasks)
                for folder in (tmp_path / "killed" / "tokens", tmp_path / "killed" / "work" / "token_files"):
                    if folder.is_dir():
                        (folder / f".{rank}.123.partial").write_bytes(b"half")
        for partial in (tmp_path / "killed").rglob("*.partial"):
            partial.unlink()

    killed = mix(inputs, tmp_path / "killed", dict(reversed(sources.items())), run=run_broken)
    assert files_of(once) == files_of(killed)
    other_seed = mix(inputs, tmp_path / "seed", sources, mix_seed=1)
    assert files_of(once) != files_of(other_seed)
    assert info_of(once)["fingerprint"] != info_of(other_seed)["fingerprint"]


def test_two_worker_processes_write_the_same_bytes(inputs, tmp_path):
    def run_executor(phases):
        multiprocess.set_forkserver_preload(["training.text_pipeline.mixing"])
        run_phases(phases, ExecutionArguments(workers=2), tmp_path / "logs")

    sources = {"web": {"epochs": 1}, "books": {"epochs": 1.5}}
    two = mix(inputs, tmp_path / "two", sources, run=run_executor, token_shards=2)
    assert files_of(two) == files_of(mix(inputs, tmp_path / "one", sources, token_shards=2))


@pytest.mark.parametrize("style", ["byte_level", "llama"])
def test_ids_are_those_that_packing_computes(style, tmp_path):
    texts = load_text_dataset("wikipedia_leads", "test")["text"][:200]
    texts += ["", "a </s> b", "<s>", "  leading", "tab\tand\r\nnul \0", "\u2028 é e\u0301 𝔘", "<unk><pad>"]
    tokenizer = train_bpe(texts[:200], 600, style=style)
    texts += [" ".join(tokenizer.all_special_tokens), *tokenizer.all_special_tokens]
    pq.write_table(pa.table({"text": texts}), tmp_path / "texts.parquet")
    (tmp_path / "tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str())
    step = TokeniseDocuments([SourceFile("a", str(tmp_path / "texts.parquet"))], tmp_path / "tokenizer.json", tmp_path)
    step.run()
    file = TokenFile(tmp_path, 0)
    found = np.split(file.ids(), file.lengths().cumsum()[:-1])
    packed = pack_documents(datasets.Dataset.from_dict({"text": [text for text in texts if text]}), tokenizer, 5000)
    pieces = []
    for row in packed:
        for end, length in zip(np.cumsum(row["seq_lengths"]), row["seq_lengths"], strict=True):
            pieces.append(row["input_ids"][end - length + 1 : end - 1])  # without bos and eos
    assert sorted(pieces) == sorted(ids.tolist() for ids in found)
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    assert not special & set(file.ids().tolist())
    assert step.tally.dropped == {"empty": 1}
    assert step.tally.documents_in == len(texts)
    assert step.tally.bytes_in == file.summary.bytes == sum(len(text.encode()) for text in texts)
    assert step.tally.counts["tokens: a"] == file.summary.tokens == len(file.ids())


def test_ids_that_need_it_are_written_with_32_bits(tmp_path):
    Tokenizer(models.WordLevel({"a": 0, "[UNK]": 65_535}, "[UNK]")).save(str(tmp_path / "small.json"))
    Tokenizer(models.WordLevel({"a": 0, "[UNK]": 65_536}, "[UNK]")).save(str(tmp_path / "large.json"))
    assert open_tokenizer(tmp_path / "small.json")[1] == np.uint16
    assert open_tokenizer(tmp_path / "large.json")[1] == np.uint32


def test_shards_without_a_document_are_read_all_the_same(inputs, tmp_path):
    tokens = mix(inputs, tmp_path, {"web": {"epochs": 0.05}, "books": {"epochs": 0.1}}, token_shards=30)
    rows = rows_of(tokens)
    assert len(rows) < 30
    assert len(list(tokens.glob("*.parquet"))) == 30
    for streaming in (False, True):
        assert list(datasets.load_dataset(str(tokens), split="train", streaming=streaming)) == rows


def test_other_texts_than_parquet_are_mixed_and_notices_kept(inputs, tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "b.txt").write_text("three\n\nfour")
    sample = {"name": "C", "modality": "text", "license": "cc-by-4.0", "attribution": "By C.", "language": ["en"]}
    write_documents(tmp_path / "c", ["five"], 1)
    (tmp_path / "c" / "00000.parquet").rename(tmp_path / "c" / "train.parquet")
    (tmp_path / "c" / "test.parquet").write_bytes((tmp_path / "c" / "train.parquet").read_bytes())  # is left alone
    (tmp_path / "c" / "info.json").write_text(json.dumps(sample))
    places = {name: tmp_path / name for name in ("a.jsonl", "b.txt", "c")}
    sources = {place.stem: {"documents": str(place), "epochs": 1} for place in places.values()}
    tokens = mix(inputs, tmp_path / "all", sources)
    assert sorted(tokenizer.decode(row["input_ids"]) for row in rows_of(tokens)) == sorted(
        ["one", "two", "three", "four", "five"]
    )
    info = info_of(tokens)
    assert info["sources"]["c"].items() >= {"license": "cc-by-4.0", "attribution": "By C.", "documents": 1}.items()
    assert info["attribution"] == "By C."
    assert not {"license", "language"} & info.keys()  # of the others they are unknown
    alone = info_of(mix(inputs, tmp_path / "alone", {"c": sources["c"]}))
    assert (alone["license"], alone["language"]) == ("cc-by-4.0", ["en"])


def test_documents_of_the_same_run_need_not_be_there_beforehand(inputs, tokenizer, tmp_path):
    arguments = MixArguments(tokenizer=str(inputs / "tokenizer"), token_shards=1)
    phases = document_phases(arguments, tmp_path / "documents", 3, tmp_path / "work", tmp_path / "tokens")
    write_documents(tmp_path / "documents", ["the only one"], 3)  # no file where there is no document
    run_here(phases)
    assert [tokenizer.decode(row["input_ids"]) for row in rows_of(tmp_path / "tokens")] == ["the only one"]


GOOD = {"documents": "x", "weight": 1.0}


@pytest.mark.parametrize(
    ("sources", "options", "sentence"),
    [
        ({"a": {"documents": "x", "weight": 0.5}}, {}, "add up to 0.5: make them add up to 1"),
        ({"a": {"documents": "x", "weight": 67}}, {}, "add up to 67"),
        ({"a": GOOD | {"wieght": 1}}, {}, "unknown key 'wieght': did you mean 'weight'?"),
        ({"a": {"weight": 1.0}}, {}, "needs either 'documents' or 'recipe'"),
        ({"a": GOOD | {"recipe": "y"}}, {}, "needs either 'documents' or 'recipe'"),
        ({"a": {"documents": "x"}}, {}, "needs either 'weight' or 'epochs'"),
        ({"a": {"documents": "x", "weight": -1}}, {}, "has weight -1: give a number above 0"),
        ({"a": {"documents": "x", "epochs": float("nan")}}, {}, "has epochs nan"),
        ({"a": {"documents": 5, "weight": 1}}, {}, "has documents 5: give a path"),
        ({"a": GOOD, "b": {"documents": "y", "epochs": 1}}, {}, "Some of the sources have a weight and some"),
        ({"a": {"documents": "y", "epochs": 1}}, {"total_tokens": 5}, "follows from the sources' epochs"),
        ({"a": {"documents": "y", "epochs": 1, "max_epochs": 2}}, {}, "which belongs to a weight"),
        ({"a": "x"}, {}, "The source 'a' is 'x': give a mapping"),
        ({}, {}, "no mapping of names to sources"),
        ("{not json", {}, "--sources is no JSON"),
        ({"a": GOOD}, {"tokenizer": None}, "give the --tokenizer"),
        (None, {"token_shards": 0}, "--token_shards is 0"),
        (None, {"total_tokens": 0}, "--total_tokens is 0"),
    ],
)
def test_wrong_options_are_refused_in_one_sentence(sources, options, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)) as refusal:
        MixArguments(sources=sources, **{"tokenizer": "t"} | options)
    assert "\n" not in str(refusal.value)


def test_sources_that_cannot_give_their_share_are_refused(inputs, tmp_path):
    with pytest.raises(ValueError, match=r"more than its max_epochs of 1: ask for --total_tokens \d+ at most"):
        mix(inputs, tmp_path / "1", {"web": {"weight": 0.5}, "books": {"weight": 0.5}}, total_tokens=10**6)
    with pytest.raises(ValueError, match="'books' is to give 1 tokens, too few for a document"):
        mix(inputs, tmp_path / "2", {"web": {"weight": 0.999}, "books": {"weight": 0.001}}, total_tokens=1000)
    pq.write_table(pa.table({"text": ["", ""]}), tmp_path / "empty.parquet")
    empty = {"documents": str(tmp_path / "empty.parquet"), "weight": 0.5}
    with pytest.raises(ValueError, match="'none' has no documents"):
        mix(inputs, tmp_path / "3", {"web": {"weight": 0.5}, "none": empty})
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        mix(inputs, tmp_path / "4", {"web": {"documents": "./nowhere", "weight": 1}})
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "body.parquet")
    with pytest.raises(ValueError, match="no column 'text', only body"):
        mix(inputs, tmp_path / "5", {"web": {"documents": str(tmp_path / "body.parquet"), "weight": 1}})
    assert not (tmp_path / "5").exists()


def test_a_recipe_leads_to_its_documents_or_says_how_to_make_them(inputs, tmp_path):
    recipe = tmp_path / "web.yaml"
    recipe.write_text(f"output_dir: {tmp_path / 'run'}\n")
    arguments = MixArguments(sources={"web": {"recipe": str(recipe), "weight": 1}}, tokenizer=str(inputs / "tokenizer"))
    with pytest.raises(FileNotFoundError, match=r"run `python -m training.prepare_text --config .*web.yaml` first"):
        mixture_phases(arguments, read_sources(arguments), tmp_path / "work", tmp_path / "tokens")
    write_documents(tmp_path / "run" / "documents", ["made by the recipe"], 1)
    run_here(mixture_phases(arguments, read_sources(arguments), tmp_path / "work", tmp_path / "tokens"))
    assert info_of(tmp_path / "tokens")["sources"]["web"]["documents"] == 1
    recipe.write_text("- a list\n")
    with pytest.raises(ValueError, match=r"no recipe of training\.prepare_text"):
        mixture_phases(arguments, read_sources(arguments), tmp_path / "work", tmp_path / "tokens")


def test_shares_follow_from_epochs_and_epochs_from_shares():
    available = {"a": 1000, "b": 500}
    shares = [Share("a", weight=0.5, max_epochs=1), Share("b", weight=0.5, max_epochs=3)]
    assert wanted_tokens(shares, available, None) == {"a": 1000, "b": 1000}
    assert wanted_tokens(shares, available, 600) == {"a": 300, "b": 300}
    assert wanted_tokens([Share("a", epochs=0.5), Share("b", epochs=2)], available, None) == {"a": 500, "b": 1000}


def test_the_fingerprint_is_of_the_tokens(inputs, tmp_path):
    """Another text of the same length in tokens gives another fingerprint."""
    first = mix(inputs, tmp_path / "1", {"web": {"epochs": 1}})
    texts = pq.read_table(inputs / "web" / "00000.parquet")["text"].to_pylist()
    changed = [texts[1], texts[0], *texts[2:]]
    assert hashlib.sha256("".join(texts).encode()).digest() != hashlib.sha256("".join(changed).encode()).digest()
    write_documents(tmp_path / "web", changed, 1)
    for name in ("00001", "00002"):
        (tmp_path / "web" / f"{name}.parquet").write_bytes((inputs / "web" / f"{name}.parquet").read_bytes())
    documents = {"documents": str(tmp_path / "web"), "epochs": 1}
    second = mix(inputs, tmp_path / "2", {"web": documents})
    assert info_of(first)["tokens"] == info_of(second)["tokens"]
    assert info_of(first)["fingerprint"] != info_of(second)["fingerprint"]
