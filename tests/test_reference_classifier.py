"""The reference classifier: the stage, its trainer with its figures, and the addresses that Wikipedia cites."""

import bz2
import json
import random
import sys
from fractions import Fraction
from itertools import pairwise

import datasets
import numpy as np
import pytest
from datatrove.data import Document

from training import train_reference_classifier
from training.text_pipeline import cited_urls
from training.text_pipeline.fasttext_models import load_classifier
from training.text_pipeline.reference_classifier import (
    ReferenceArguments,
    ScoreReference,
    check_reference_model,
    score_bin,
)
from training.train_reference_classifier import balanced_split, evaluate

PROSE = "the history of this old town begins with a church that monks built near the river in the twelfth century"
SHOP = "buy cheap now click here best price free shipping order today sale discount cart login share like follow"


def sentences(words, seed, count):
    draw = random.Random(seed)
    return [" ".join(draw.choices(words.split(), k=30)) + f"\nnumber {i}" for i in range(count)]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """The folder of a classifier of prose against shops, trained by the command."""
    folder = tmp_path_factory.mktemp("reference")
    for name, words in (("prose", PROSE), ("shop", SHOP)):
        lines = (json.dumps({"text": text}) + "\n" for text in sentences(words, 1, 400 if name == "prose" else 300))
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    train(folder, folder / "run")
    return folder / "run"


def train(folder, output_dir):
    options = {
        "positives": folder / "prose.jsonl",
        "negatives": folder / "shop.jsonl",
        "positives_are": "old prose",
        "negatives_are": "shop pages",
        "output_dir": output_dir,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
        patch.setattr(sys, "argv", ["train", *(f"--{name}={value}" for name, value in options.items())])
        train_reference_classifier.main()


def stage_on(folder, texts, **options):
    stage = ScoreReference(ReferenceArguments(reference_model=str(folder / "reference.bin"), **options))
    documents = [Document(text, str(i)) for i, text in enumerate(texts)]
    return list(stage.run(iter(documents))), documents, stage.tally


def test_shop_pages_are_dropped_and_prose_passes(classifier):
    prose, shop = sentences(PROSE, 2, 50), sentences(SHOP, 3, 50)
    kept, documents, tally = stage_on(classifier, prose + shop)
    assert [document.text for document in kept] == prose
    assert tally.dropped == {"low reference score": 50}
    assert sum(tally.histograms["reference_scores"].values()) == 100
    assert all(0 <= document.metadata["reference_score"] <= 1 for document in documents)


def test_score_is_fasttexts_probability_of_the_reference_label(classifier):
    model = load_classifier(classifier / "reference.bin")
    texts = ["buy the old church\ntoday", *sentences(f"{PROSE} {SHOP}", 4, 20)]
    _, documents, _ = stage_on(classifier, texts, min_reference_score=0.0)
    for text, document in zip(texts, documents, strict=True):
        labels, scores = model.predict(text.replace("\n", " "), k=-1)
        assert document.metadata["reference_score"] == pytest.approx(
            dict(zip(labels, scores, strict=True))["__label__reference"], abs=6e-5
        )


def test_blank_and_odd_texts_are_scored_without_an_error(classifier):
    texts = ["", " \n\t ", "\0", "__label__reference", "old \ud800 town", "漢字" * 50_000]
    _, documents, tally = stage_on(classifier, texts)
    assert documents[0].metadata["reference_score"] == documents[1].metadata["reference_score"] == 0
    assert tally.documents_in == len(texts)


def test_training_gives_the_same_bytes_again(classifier):
    # The C library hands out other memory the second time.
    train(classifier.parent, classifier.parent / "again")
    for name in ("reference.bin", "README.md", "precision_recall.png"):
        assert (classifier.parent / "again" / name).read_bytes() == (classifier / name).read_bytes()


def test_record_and_readme_say_what_the_pages_are(classifier):
    run = json.loads((classifier / "run.json").read_text(encoding="utf-8"))
    assert (run["data"]["positives"]["are"], run["data"]["negatives"]["are"]) == ("old prose", "shop pages")
    readme = (classifier / "README.md").read_text(encoding="utf-8")
    assert "old prose" in readme
    assert "shop pages" in readme
    # 300 of each kind, of which a tenth is held out.
    assert (run["evaluation"]["trained_on"], run["evaluation"]["documents"]) == (540, 60)


def test_split_is_balanced_by_document_and_without_what_is_of_both_kinds():
    arguments = train_reference_classifier.ReferenceClassifierArguments(
        positives="a", negatives="b", positives_are="a", negatives_are="b", held_out_share=0.25, max_documents=20
    )
    texts = {
        "positives": [f"p{i % 40}" for i in range(120)] + ["both", " "],
        "negatives": ["both", *(f"n{i}" for i in range(30))],
    }
    rows = {name: datasets.Dataset.from_dict({"text": values}) for name, values in texts.items()}
    training, held_out = balanced_split(rows["positives"], rows["negatives"], arguments)
    trained = [texts[name][row] for name, row in training]
    kept_out = [texts[name][row] for name, indices in held_out.items() for row in indices]
    assert len(set(trained)) == 30
    assert sum(text.startswith("p") for text in trained) == 15
    assert len(set(kept_out)) == 10
    assert not set(trained) & set(kept_out)
    assert not {"both", " "} & {*trained, *kept_out}
    # In random order: neither kind comes in one piece.
    assert sum(a[0] != b[0] for a, b in pairwise(trained)) > 5


def test_figures_equal_their_definitions_with_ties():
    draw = np.random.default_rng(0)
    positives, negatives = draw.integers(3, 11, 40) / 10, draw.integers(0, 8, 60) / 10
    figures = evaluate(positives, negatives)
    area, last = Fraction(0), Fraction(0)
    for level in sorted({*positives, *negatives}, reverse=True):
        true, false = int((positives >= level).sum()), int((negatives >= level).sum())
        area += (Fraction(true, 40) - last) * Fraction(true, true + false)
        last = Fraction(true, 40)
    assert figures["average_precision"] == pytest.approx(float(area), abs=5e-5)
    at_half = next(row for row in figures["thresholds"] if row["min_reference_score"] == 0.5)
    true, false = int((positives >= 0.5).sum()), int((negatives >= 0.5).sum())
    assert at_half["precision"] == pytest.approx(true / (true + false), abs=5e-5)
    assert at_half["negatives_dropped"] == pytest.approx(1 - false / 60, abs=5e-5)
    assert sum(row["documents"] for row in figures["calibration"]) == 100


def test_perfect_scores_have_area_one_and_equal_scores_the_share_of_positives():
    assert evaluate(np.full(5, 0.9), np.full(5, 0.1))["average_precision"] == 1
    assert evaluate(np.full(5, 0.5), np.full(5, 0.5))["average_precision"] == 0.5


def test_a_score_is_in_the_bin_that_holds_it():
    for i in range(10_001):
        edge, exact = Fraction(score_bin(i / 10_000)), Fraction(i, 10_000)
        assert edge <= exact
        assert exact < edge + Fraction(1, 20) or (exact, edge) == (1, Fraction(19, 20))


def test_a_model_of_other_labels_is_refused(tmp_path):
    (tmp_path / "notes.bin").write_text("no model at all")
    with pytest.raises(ValueError, match=r"notes\.bin is no fastText model"):
        check_reference_model(ReferenceArguments(reference_model=str(tmp_path / "notes.bin")))
    with pytest.raises(ValueError, match="min_reference_score is 25"):
        ReferenceArguments(min_reference_score=25)
    check_reference_model(ReferenceArguments())


@pytest.mark.parametrize(
    ("wikitext", "urls"),
    [
        ("A.<ref>{{cite web |url=https://a.org/x?y=1&z=2|title=T}}</ref>", ["https://a.org/x?y=1&z=2"]),
        ('B.<ref name="n">[http://b.org/page The page]. Seen.</ref>', ["http://b.org/page"]),
        ("C.<ref>See http://c.org/one. And (http://c.org/two).</ref>", ["http://c.org/one", "http://c.org/two"]),
        ("D [http://outside.org link]<ref name=x />[http://also.outside.org] <ref>no address</ref>", []),
        ("E<ref>https://en.wikipedia.org/wiki/Tea_(meal)</ref>", ["https://en.wikipedia.org/wiki/Tea_(meal)"]),
        ("F<ref>url=http://f.org |archive-url=https://web.archive.org/web/2019/http://f.org</ref>", ["http://f.org"]),
        ("G<!-- <ref>http://hidden.org</ref> --><REF>http://g.org</REF><ref>http://g.org</ref>", ["http://g.org"]),
        ("H<references /><ref>ftp://h.org '''http://h.org/bold'''</ref>", ["http://h.org/bold"]),
    ],
)
def test_cited_urls_of_a_page(wikitext, urls):
    assert cited_urls.cited_urls(wikitext) == urls


PAGE = "<page><title>T</title><ns>{}</ns><revision><text>&lt;ref&gt;http://{}&lt;/ref&gt;</text></revision></page>"


def dump_of(*pages):
    return ('<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/">' + "".join(pages) + "</mediawiki>").encode()


def test_cited_urls_of_a_dump_are_those_of_articles_once(tmp_path):
    pages = [
        PAGE.format(0, "one.org"),
        PAGE.format(1, "talk.org"),
        PAGE.format(0, "two.org"),
        PAGE.format(0, "one.org"),
    ]
    (tmp_path / "dump.xml.bz2").write_bytes(bz2.compress(dump_of(*pages)))
    assert cited_urls.write_cited_urls(tmp_path / "dump.xml.bz2", tmp_path / "urls.txt") == 2
    assert (tmp_path / "urls.txt").read_text() == "http://one.org\nhttp://two.org\n"


@pytest.mark.parametrize(
    "content",
    [b"no bz2", bz2.compress(b"no xml"), bz2.compress(b"<html></html>"), bz2.compress(dump_of(PAGE))[:60]],
    ids=["not packed", "not XML", "other XML", "truncated"],
)
def test_a_broken_dump_is_refused_by_name(tmp_path, content):
    (tmp_path / "dump.xml.bz2").write_bytes(content)
    with pytest.raises(ValueError, match=r"dump\.xml\.bz2"):
        cited_urls.write_cited_urls(tmp_path / "dump.xml.bz2", tmp_path / "urls.txt")
    assert not (tmp_path / "urls.txt").exists()
