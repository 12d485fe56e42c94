"""Perplexity: what the models see, what they score, and where the buckets are cut.

Without KenLM's Python module (`make kenlm`), what needs it is skipped.
"""

import itertools
import json
import math
import pickle
import random
import shutil
import sys
from collections import Counter
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import sentencepiece
from card_runs import card_text, python_snippets
from datatrove.data import Document

from hub_cards.build_card import build_card
from training import train_perplexity_model
from training.command_line import parse_arguments
from training.text_pipeline.perplexity import (
    BUCKETS,
    AssignBucket,
    MeasureCutoffs,
    PerplexityArguments,
    ScorePerplexity,
    check_perplexity,
    choose_bucket,
    read_cutoffs,
    scores_file,
)
from training.text_pipeline.perplexity_model import PerplexityModel, check_models, find_models, normalize
from training.train_perplexity_model import find_program, measure, train_ngrams, train_pieces

RECIPE = Path(__file__).parents[1] / "training/recipes/text_pipeline/perplexity_quickstart.yaml"
SAMPLE = Path(__file__).parents[1] / "training/sample_data/wikipedia_leads"
needs_kenlm = pytest.mark.skipif(find_spec("kenlm") is None, reason="KenLM is not installed: run `make kenlm`")


def leads(split):
    return pyarrow.parquet.read_table(SAMPLE / f"{split}.parquet")["text"].to_pylist()


# What the models see


def test_punctuation_is_that_of_ccnet_s_own_test():
    seen = normalize("，。、„”“«»」「《》´∶：？！（）；–—．～’…━〈〉【】％")
    assert seen == ",.," + 9 * '"' + "'::?!();- - . ~'...-<>[]%"


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("Crème BRÛLÉE, Ωμέγα, Ñandú", "creme brulee, ωμεγα, nandu"),
        ("in 1984, ٣ and ７ and 𝟗", "in 0000, 0 and 0 and 0"),
        ("x² ½", "x² ½"),  # numbers, but no decimal digits
        ("a\tb\x07c\x7fd\x85e\r\nf", "abcde\nf"),
        ("İstanbul ‘so’", "istanbul ‘so'"),
        ("half \ud83d pair", "half \ufffd pair"),
    ],
)
def test_case_accents_digits_and_control_characters_are_gone(text, seen):
    assert normalize(text) == seen


# Scores

UNIGRAMS = {"<unk>": -2.0, "</s>": -0.9, "▁a": -0.5, "▁b": -0.7, "▁c": -1.1}
BIGRAMS = {("<s>", "▁a"): -0.2, ("▁a", "▁b"): -0.3, ("▁b", "</s>"): -0.4}
BACKOFFS = {"<s>": -0.25, "▁a": -0.15, "▁b": -0.35, "▁c": -0.45}


def arpa():
    lines = ["\\data\\", f"ngram 1={len(UNIGRAMS) + 1}", f"ngram 2={len(BIGRAMS)}", "", "\\1-grams:"]
    lines += [f"{value}\t{word}\t{BACKOFFS.get(word, 0)}" for word, value in {"<s>": -99, **UNIGRAMS}.items()]
    lines += ["", "\\2-grams:"] + [f"{value}\t{' '.join(words)}" for words, value in BIGRAMS.items()]
    return "\n".join([*lines, "", "\\end\\", ""])


def reference_score(pieces):
    """By the definition of a back-off model."""
    words, total = ["<s>", *pieces, "</s>"], 0.0
    words = [word if word == "<s>" or word in UNIGRAMS else "<unk>" for word in words]
    for pair in itertools.pairwise(words):
        total += BIGRAMS[pair] if pair in BIGRAMS else BACKOFFS.get(pair[0], 0.0) + UNIGRAMS[pair[1]]
    return total


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a model of English, whose words are a, b and c, and of "xx", the same."""
    folder = tmp_path_factory.mktemp("models")
    rng = random.Random(0)
    sentences = [" ".join(rng.choices("abc", k=6)) for _ in range(200)]
    content = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=content, model_type="word", vocab_size=6, minloglevel=2
    )
    for language, name in (("en", "en.arpa"), ("xx", "xx.bin")):
        (folder / f"{language}.sp.model").write_bytes(content.getvalue())
        (folder / name).write_text(arpa(), encoding="utf-8")
    return folder


TEXT = "A b\n\n  \nb À z, c\nc" + "\n" + "a b " * 30


@needs_kenlm
def test_a_score_is_that_of_the_definition(models):
    model = PerplexityModel(*find_models(models)["en"])
    lines = [["▁a", "▁b"], ["▁b", "▁a", "▁z,", "▁c"], ["▁c"], ["▁a", "▁b"] * 30]
    assert list(model.sentences(TEXT)) == lines
    log_probability, tokens = model.score(TEXT)
    assert log_probability == pytest.approx(sum(map(reference_score, lines)), rel=1e-5)
    assert tokens == 2 + 4 + 1 + 60 + 4
    assert model.perplexity(TEXT) == pytest.approx(10 ** (-log_probability / tokens))
    assert model.perplexity(" \n\t\n") is None


def test_models_of_a_folder_are_paired_by_language(models, tmp_path):
    assert {language: [file.name for file in files] for language, files in find_models(models).items()} == {
        "en": ["en.sp.model", "en.arpa"],
        "xx": ["xx.sp.model", "xx.bin"],
    }
    (tmp_path / "fr.sp.model").touch()
    with pytest.raises(ValueError, match=r"holds fr.sp.model but no fr.arpa.bin"):
        find_models(tmp_path)
    (tmp_path / "fr.arpa.bin").touch()
    (tmp_path / "de.binary").touch()
    with pytest.raises(ValueError, match=r"holds de.binary but no de.sp.model"):
        find_models(tmp_path)
    for folder in (tmp_path / "none", tmp_path / "fr.sp.model"):
        with pytest.raises(ValueError, match="there is no folder"):
            find_models(folder)


@needs_kenlm
def test_files_that_are_no_models_are_named(models, tmp_path):
    pieces, ngrams = find_models(models)["en"]
    for name in ("en.sp.model", "en.arpa"):
        (tmp_path / "en.sp.model").write_bytes(pieces.read_bytes())
        (tmp_path / "en.arpa").write_bytes(ngrams.read_bytes())
        check_models(tmp_path)
        for content in ((tmp_path / name).read_bytes()[:-20], b"", b"<html>"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ValueError, match=rf"{name} is no (SentencePiece|KenLM) model .*train it again"):
                check_models(tmp_path)
    (tmp_path / "en.sp.model").write_bytes(pieces.read_bytes())
    (tmp_path / "en.arpa").write_text(arpa().replace("▁", ""), encoding="utf-8")
    with pytest.raises(ValueError, match=r"knows only 33% .*trained together"):
        check_models(tmp_path)


def test_without_kenlm_the_mend_is_told(models, monkeypatch):
    monkeypatch.setitem(sys.modules, "kenlm", None)
    with pytest.raises(ImportError, match="make kenlm"):
        check_perplexity(PerplexityArguments(perplexity_models=str(models)))


# Cut-offs and buckets


def documents(scores):
    return [
        Document(text="", id=f"{language}/{i}", metadata={"language": language, "perplexity": score})
        for language, of_language in scores.items()
        for i, score in enumerate(of_language)
    ]


@pytest.fixture
def scored(tmp_path):
    """Scores of three tasks: of "en" in all, of "de" in one."""
    rng = np.random.default_rng(0)
    scores = [{"en": rng.lognormal(5, 1, size).round(1)} for size in (100, 7, 1000)]
    scores[1]["de"] = rng.lognormal(6, 1, 50).round(1)
    for rank, of_task in enumerate(scores):
        scores_file(tmp_path, rank).parent.mkdir(exist_ok=True)
        np.savez(scores_file(tmp_path, rank), **of_task)
    return tmp_path, scores


def test_cutoffs_are_the_percentiles_over_all_tasks(scored):
    folder, scores = scored
    stage = MeasureCutoffs(folder, 3, [25, 70], folder / "cutoffs.json")
    list(stage.run())
    cutoffs = read_cutoffs(folder / "cutoffs.json")
    everything = {"en": np.concatenate([task["en"] for task in scores]), "de": scores[1]["de"]}
    assert cutoffs == {language: list(np.percentile(all_, [25, 70])) for language, all_ in everything.items()}
    assert stage.tally.counts == {"documents, en": 1107, "documents, de": 50}
    assign = AssignBucket(folder / "cutoffs.json", ["head", "tail"])
    kept = [document.metadata["bucket"] for document in assign.run(documents(everything))]
    shares = {bucket: sum(assign.tally.histograms[f"bucket, {x}"][bucket] for x in everything) for bucket in BUCKETS}
    assert shares["head"] / 1157 == pytest.approx(0.25, abs=0.005)
    assert shares["tail"] / 1157 == pytest.approx(0.30, abs=0.005)
    assert assign.tally.dropped == {"middle": shares["middle"]}
    assert len(kept) == shares["head"] + shares["tail"]


@pytest.mark.parametrize(
    ("perplexity", "bucket"), [(99.9, "head"), (100, "middle"), (199.9, "middle"), (200, "tail"), (math.inf, "tail")]
)
def test_a_cutoff_belongs_to_the_bucket_above(perplexity, bucket):
    assert choose_bucket(perplexity, [100, 200]) == bucket
    assert choose_bucket(perplexity, None) == "all"


def test_documents_without_perplexity_or_cutoffs_are_in_all():
    given = [*documents({"fr": [10.0]}), Document(text="", id="x", metadata={"language": "en"})]
    given.append(Document(text="", id="y", metadata={}))
    assign = AssignBucket({"en": [100, 200]}, list(BUCKETS))
    assert [document.metadata["bucket"] for document in assign.run(given)] == ["all"] * 3


def test_ccnet_s_table_is_read(tmp_path):
    file = tmp_path / "cutoff.csv"
    rows = [f"{row},{row * 10}.5,{row * 20}" for row in range(0, 101, 5)]
    file.write_text("\n".join([",en,fr", *rows]) + "\n", encoding="utf-8")
    assert read_cutoffs(file, [30, 60]) == {"en": [300.5, 600.5], "fr": [600, 1200]}
    with pytest.raises(ValueError, match=r"cutoff.csv has no row .* percentile 33"):
        read_cutoffs(file, [33, 66])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "cannot be read"),
        ("a.json", "[]", "holds no cut-offs"),
        ("a.json", '{"en": [2, 1]}', r"\[2, 1\] for the language 'en'"),
        ("a.json", '{"en": [NaN, 1]}', "for the language 'en'"),
        ("a.json", '{"en": 3}', "for the language 'en'"),
        ("a.csv", "", "no row"),
        ("a.csv", ",en\n30,1\n60,x\n", r"\['1', 'x'\] for the language 'en'"),
        ("a.csv", ",en,fr\n30,1\n60,2,3\n", "no row of 3 columns for the percentile 30"),
    ],
)
def test_tables_that_cannot_be_used_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_cutoffs(tmp_path / name, [30, 60])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"perplexity_percentiles": [60, 30]}, "two rising numbers"),
        ({"perplexity_percentiles": [30]}, "two rising numbers"),
        ({"keep_buckets": ["best"]}, "'best': choose among head"),
        ({"keep_buckets": []}, "keep_buckets is empty"),
        ({"keep_buckets": ["head"]}, "--perplexity_models"),
        ({"perplexity_models": "nowhere"}, "there is no folder nowhere"),
        ({"perplexity_models": "nowhere", "perplexity_cutoffs": "no.csv"}, "there is no file no.csv"),
        ({"perplexity_models": "nowhere", "perplexity_cutoffs": {"en": [3, 2]}}, "for the language 'en'"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        check_perplexity(PerplexityArguments(**options))


def test_options_come_from_recipes_and_the_command_line(tmp_path, monkeypatch):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("perplexity_cutoffs: {en: [10, 20]}\nkeep_buckets: [head, middle, tail, all]\n", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["x", "--config", str(recipe), "--perplexity_percentiles", "33.3", "66.7"])
    arguments, _ = parse_arguments(PerplexityArguments)
    assert arguments.given_cutoffs() == {"en": [10, 20]}
    assert arguments.perplexity_percentiles == [33.3, 66.7]
    monkeypatch.setattr(sys, "argv", ["x", "--perplexity_cutoffs", "measured"])
    assert parse_arguments(PerplexityArguments)[0].given_cutoffs() is None


def test_a_run_without_scores_has_no_cutoffs_and_one_bucket(tmp_path):
    """Such as one of text in languages that have no model."""
    np.savez(scores_file(tmp_path, 0))
    list(MeasureCutoffs(tmp_path, 1, [30, 60], tmp_path / "cutoffs.json").run())
    assign = AssignBucket(tmp_path / "cutoffs.json", list(BUCKETS))
    given = [Document(text="", id="x", metadata={"language": "fr"}), Document(text="", id="y", metadata={})]
    assert [document.metadata["bucket"] for document in assign.run(given)] == ["all"] * 2
    with pytest.raises(ValueError, match="holds no cut-offs"):
        PerplexityArguments(
            perplexity_models="models", perplexity_cutoffs=str(tmp_path / "cutoffs.json")
        ).given_cutoffs()


# The stages together


@needs_kenlm
def test_text_of_unknown_language_is_of_the_only_model(models, tmp_path):
    (tmp_path / "models").mkdir()
    for file in find_models(models)["en"]:
        shutil.copy(file, tmp_path / "models")
    texts = ["a b\nc", "b b a", "c c c c", "c a", "b"]
    buckets = {}
    for language in ("en", None):
        given = [
            Document(text=text, id=str(i), metadata={"language": language} if language else {})
            for i, text in enumerate(texts)
        ]
        scored = list(ScorePerplexity(tmp_path / "models", tmp_path).run(given))
        list(MeasureCutoffs(tmp_path, 1, [30, 60], tmp_path / "cutoffs.json").run())
        assigned = list(AssignBucket(tmp_path / "cutoffs.json", list(BUCKETS), "en").run(scored))
        assert all(document.metadata.get("language") == language for document in assigned), "it is not identified so"
        buckets[language] = [(document.metadata["perplexity"], document.metadata["bucket"]) for document in assigned]
    assert buckets[None] == buckets["en"]
    assert {bucket for _, bucket in buckets[None]} == {"head", "middle", "tail"}
    other = Document(text="a b", id="x", metadata={"language": "de"})
    list(ScorePerplexity(tmp_path / "models", tmp_path).run([other]))
    assert "perplexity" not in other.metadata


@needs_kenlm
def test_scores_are_written_for_each_language_and_equal_when_run_again(models, tmp_path):
    texts = {"en": ["a b\nc", "b b a", " "], "xx": ["c c c"], "de": ["a b"], None: ["a b"]}
    given = [
        Document(text=text, id=f"{language}{i}", metadata={"language": language} if language else {})
        for language, of_language in texts.items()
        for i, text in enumerate(of_language)
    ]
    contents = []
    for _ in range(2):
        stage = pickle.loads(pickle.dumps(ScorePerplexity(models, tmp_path)))
        scored = list(stage.run(iter(given), rank=3))
        contents.append(scores_file(tmp_path, 3).read_bytes())
        pickle.dumps(stage)
    assert contents[0] == contents[1]
    assert [document.id for document in scored] == [document.id for document in given]
    model = PerplexityModel(*find_models(models)["en"])
    expected = {"en": [round(model.perplexity(text), 1) for text in texts["en"][:2]]}
    expected["xx"] = [round(model.perplexity("c c c"), 1)]
    assert [document.metadata.get("perplexity") for document in scored] == [
        *expected["en"], None, *expected["xx"], None, None,
    ]  # fmt: skip
    with np.load(scores_file(tmp_path, 3)) as arrays:
        assert {language: list(arrays[language]) for language in arrays.files} == expected
    assert stage.tally.counts == {"no model of the language": 2, "no text to score": 1}
    assert sum(stage.tally.histograms["perplexity, en"].values()) == 2


def test_a_task_without_scores_is_none_of_the_measure(scored):
    folder, _ = scored
    np.savez(scores_file(folder, 3))
    results = []
    for tasks in (3, 4):
        list(MeasureCutoffs(folder, tasks, [30, 60], folder / "cutoffs.json").run())
        results.append((folder / "cutoffs.json").read_bytes())
    assert results[0] == results[1]


def shuffled_letters(text, rng):
    letters = [character for character in text if not character.isspace()]
    rng.shuffle(letters)
    rest = iter(letters)
    return "".join(character if character.isspace() else next(rest) for character in text)


def keyword_list(text, rng):
    words = [word for word in (word.strip(".,;()") for word in text.split()) if len(word) > 3]
    rng.shuffle(words)
    return "\n".join(" ".join(words[i : i + 3]).title() for i in range(0, len(words), 3))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a small model of English, of the sample."""
    pytest.importorskip("kenlm")
    try:
        programs = {name: find_program(name) for name in ("lmplz", "build_binary")}
    except FileNotFoundError:
        pytest.skip("KenLM's programs are not installed: run `make kenlm`")
    folder = tmp_path_factory.mktemp("trained")
    lines = [line for text in leads("train")[:700] for line in normalize(text).split("\n") if line]
    processor = train_pieces(iter(lines), 1500)
    (folder / "en.sp.model").write_bytes(processor.serialized_model_proto())
    sentences = [" ".join(processor.encode_as_pieces(line)) for line in lines]
    for name, memory in (("en.arpa.bin", "100M"), ("again", "40M")):
        figures = train_ngrams(sentences, folder / name, 1500, memory, programs)
    assert figures["order"] == len(figures["ngrams"]) == 5
    return folder


def test_the_n_gram_model_does_not_depend_on_the_memory_to_sort_in(trained):
    assert (trained / "en.arpa.bin").read_bytes() == (trained / "again").read_bytes()


def test_the_probabilities_of_a_trained_model_add_up_to_one(trained):
    """Also after contexts that back off: lmplz errs there where the last line is not ended."""
    import kenlm

    model = PerplexityModel(trained / "en.sp.model", trained / "en.arpa.bin")
    # The words are the pieces but for those of the end and the unknown, and single characters that are no piece.
    characters = {character for text in leads("train")[:700] for character in normalize(text)}
    vocabulary = {model.processor.id_to_piece(i) for i in range(model.processor.vocab_size())} | characters
    vocabulary = [word for word in vocabulary - {"<s>", "<unk>"} if word in model.ngrams] + ["<unk>"]
    for context in leads("train")[3:400:80]:
        pieces = next(model.sentences(context))
        for length in (1, 3, 10):
            state, after = kenlm.State(), kenlm.State()
            model.ngrams.BeginSentenceWrite(state)
            for piece in pieces[:length]:
                model.ngrams.BaseScore(state, piece, after)
                state, after = after, state
            total = sum(10 ** model.ngrams.BaseScore(state, word, after) for word in vocabulary)
            assert total == pytest.approx(1, abs=0.01)


def test_gibberish_and_keyword_lists_are_tail_and_held_out_wikipedia_is_not(trained, tmp_path):
    """60 % leads of Wikipedia and 40 % of what is no prose, at CCNet's percentiles."""
    rng = random.Random(0)
    clean, others = leads("test")[:180], leads("test")[180:300]
    texts = {"clean": clean, "gibberish": [shuffled_letters(text, rng) for text in others[:60]]}
    texts["keywords"] = [keyword_list(text, rng) for text in others[60:]]
    given = [
        Document(text=text, id=f"{kind}/{i}", metadata={"language": "en"})
        for kind, of_kind in texts.items()
        for i, text in enumerate(of_kind)
    ]
    scored = list(ScorePerplexity(trained, tmp_path).run(given))
    list(MeasureCutoffs(tmp_path, 1, [30, 60], tmp_path / "cutoffs.json").run())
    in_tail = Counter()
    for document in AssignBucket(tmp_path / "cutoffs.json", list(BUCKETS)).run(scored):
        in_tail[document.id.split("/")[0]] += document.metadata["bucket"] == "tail"
    tail = {kind: in_tail[kind] / len(of_kind) for kind, of_kind in texts.items()}
    assert tail["gibberish"] == 1
    assert tail["keywords"] >= 0.95
    assert tail["clean"] <= 0.03


def test_held_out_figures_are_those_of_all_texts_together(trained):
    model = PerplexityModel(trained / "en.sp.model", trained / "en.arpa.bin")
    texts = leads("test")[:20]
    figures = measure(model, texts)
    together = "\n".join(texts)
    assert figures["eval_perplexity"] == pytest.approx(model.perplexity(together), rel=1e-6)
    bits = -model.score(together)[0] * math.log2(10)
    characters = sum(len(line) for line in normalize(together).split("\n"))
    assert figures["eval_bits_per_character"] == pytest.approx(bits / characters, rel=1e-6)
    assert figures["eval_documents"] == 20


# Training


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["train_perplexity_model", *map(str, words)])
        try:
            train_perplexity_model.main()
            status = 0
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    yield command
    datasets.enable_progress_bars()


def test_the_recipe_s_command_leaves_models_figures_and_a_card(run, trained, tmp_path):
    folder = tmp_path / "en"
    words = ["--config", RECIPE, "--dataset_split", "train[:200]", "--vocab_size", 800, "--output_dir", folder]
    assert run(*words)[0] == 0
    assert list(find_models(folder)) == ["en"]
    assert {file.name for file in folder.iterdir()} == {"en.sp.model", "en.arpa.bin", "run.json", "README.md"}
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    expected = measure(PerplexityModel(*find_models(folder)["en"]), leads("test"))
    assert record["metrics"] == pytest.approx(expected)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"| {expected['eval_perplexity']:.1f} |" in card
    status, out, _ = run(*words)
    assert (status, "finished" in out) == (0, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--language", "en.wiki"), "--language is 'en.wiki': give a code"),
        (("--vocab_size", 20), "SentencePiece finds no --vocab_size 20"),
        (("--sort_memory", "many"), "lmplz failed with status"),
    ],
)
def test_mistakes_end_with_one_line(run, trained, tmp_path, words, message):
    options = ("--dataset_split", "train[:30]", "--vocab_size", 300, "--output_dir", tmp_path / "out")
    status, _, err = run(*options, *words)
    assert (status, len(err.splitlines())) == (2, 1)
    assert message in err


def test_without_lmplz_the_mend_is_told(run, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    status, _, err = run("--output_dir", tmp_path / "out")
    assert (status, "make kenlm" in err, (tmp_path / "out").exists()) == (2, True, False)


def test_a_card_tells_the_figures_and_opens_what_it_describes(tmp_path):
    figures = {"perplexity": 101.66, "bits_per_character": 1.5317, "unknown_pieces": 0.0004}
    figures |= {"median_document_perplexity": 109.4, "documents": 501, "tokens": 56_482}
    run = {
        "task": "train_perplexity_model",
        "metrics": {f"eval_{name}": value for name, value in figures.items()},
        "perplexity_model": {
            "language": "fr", "vocab_size": 8000, "order": 5, "ngrams": [8271, 266689, 662933, 876177, 955767],
            "fallback_discounts": True,
        },
    }  # fmt: skip
    card = card_text(tmp_path / "fr", run)
    assert "| 5 | 955,767 |" in card
    assert "| 101.7 |" in card
    assert "no estimate" in card
    assert python_snippets(card).count("fr.") == 2
    hub_card = build_card(tmp_path / "fr", hub_id="someone/french").read_text(encoding="utf-8")
    assert 'snapshot_download("someone/french")' in python_snippets(hub_card)
