"""Language identification: the stage, the look at a model file before it is opened, and the trainer."""

import json
import pickle
import random
import subprocess
import sys
from pathlib import Path

import datasets
import fasttext
import pytest
from datatrove.data import Document

from training import train_language_id
from training.fasttext_training import train_classifier
from training.text_pipeline.fasttext_models import check_model_file, load_classifier, on_one_line, training_line
from training.text_pipeline.language_id import IdentifyLanguage, LanguageArguments, check_language_model
from training.train_language_id import LanguageIdArguments, evaluate, split_rows

# The most frequent words of each language and some others.
WORDS = {
    "en": "the of and to in a is that for it as was with be by on not he his but at are this have from or had an "
    "they which one you were all her she there would their we him been has when who will no more if out so "
    "what up said its about than into them can only other time new some could these two may first then do any "
    "like my now over such our man me even most made after also did many off before must well back through "
    "years much where your way down should",
    "fr": "le la les de des du un une et est en que qui dans pour sur pas au aux avec par plus ce cette ces il elle "
    "ils elles nous vous je tu son sa ses leur leurs mais ou donc car ne se été être avoir fait faire comme "
    "tout tous toute aussi bien entre deux même après avant sans sous peut encore très où depuis chez contre "
    "vers pendant année années homme femme jour monde pays ville grand petit premier dernière autre autres "
    "quelques beaucoup toujours jamais rien",
    "es": "el la los las de del un una y es en que no se por con para como más pero sus le ya o este sí porque esta "
    "entre cuando muy sin sobre también me hasta hay donde quien desde todo nos durante todos uno les ni "
    "contra otros ese eso ante ellos esto mí antes algunos qué unos yo otro otras otra él tanto esa estos "
    "mucho quienes nada muchos cual poco ella estar estas algunas algo nosotros año años hombre mujer día "
    "mundo país ciudad grande pequeño primero",
    "de": "der die das und ist in den von zu mit sich des auf für nicht ein eine als auch es an werden aus er hat "
    "dass sie nach wird bei einer um am sind noch wie einem über einen so zum war haben nur oder aber vor zur "
    "bis mehr durch man sein wurde sei hatte kann gegen vom können schon wenn habe seine ihre dann unter wir "
    "soll ich eines jahr jahre zwei jahren diese dieser wieder keine uhr seiner worden will zwischen im immer "
    "was sagte mann frau tag welt land",
}

# As few and narrow vectors as can be quantised, since that takes seconds.
QUANTISED = {"quantize": "true", "dimension": 2, "buckets": 256, "epochs": 1}


def documents_of(language, seed, count, words=40):
    draw = random.Random(f"{language} {seed}")
    return [" ".join(draw.choices(WORDS[language].split(), k=words)) for _ in range(count)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs the trainer in this process, on a folder with one file a language."""
    folder = tmp_path_factory.mktemp("language_id")
    (folder / "texts").mkdir()
    for language in WORDS:
        texts = documents_of(language, "training", 120)
        (folder / f"texts/{language}.txt").write_text("\n\n".join(texts), encoding="utf-8")

    def run(name, **options):
        options = {"dataset": folder / "texts", "min_word_count": 1, "buckets": 2000} | options
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
            words = [f"--{key}={value}" for key, value in (options | {"output_dir": folder / name}).items()]
            patch.setattr(sys, "argv", ["train_language_id", *words])
            train_language_id.main()
        return folder / name

    return run


@pytest.fixture(scope="module")
def model_file(runs):
    return runs("model") / "language_id.bin"


def identify(model_file, texts, **options):
    stage = IdentifyLanguage(LanguageArguments(language_model=str(model_file), **options))
    documents = [Document(text, str(i)) for i, text in enumerate(texts)]
    return list(stage.run(iter(documents))), documents, stage.tally


def test_planted_foreign_documents_are_caught(model_file):
    english = documents_of("en", "test", 300)
    foreign = [text for language in ("fr", "es", "de") for text in documents_of(language, "test", 20)]
    kept, _, tally = identify(model_file, english + foreign, languages=["en"])
    kept = {document.text for document in kept}
    assert len(kept & set(english)) >= 0.99 * 300
    assert len(kept & set(foreign)) <= 0.01 * 60
    assert tally.histograms["languages"].total() == 360
    assert set(tally.histograms["languages_kept"]) == {"en"}
    assert sum(tally.dropped.values()) == 360 - tally.documents_out


def test_language_and_score_are_fasttexts(model_file):
    texts = [text for language in WORDS for text in documents_of(language, "score", 5, words=6)]
    model = fasttext.load_model(str(model_file))
    _, documents, _ = identify(model_file, [text.replace(" ", "\n", 1) for text in texts])
    for text, document in zip(texts, documents, strict=True):
        (label,), (score,) = model.predict(text)
        assert document.metadata["language"] == label.removeprefix("__label__")
        assert document.metadata["language_score"] == pytest.approx(min(score, 1), abs=6e-5)


def test_a_document_is_kept_from_the_threshold_on(model_file):
    texts = [" ".join(pair) for pair in zip(documents_of("en", 1, 40, 3), documents_of("fr", 1, 40, 3), strict=True)]
    _, documents, _ = identify(model_file, texts, min_language_score=0.0)
    scores = sorted(document.metadata["language_score"] for document in documents)
    threshold = scores[20]
    kept, _, tally = identify(model_file, texts, min_language_score=threshold)
    assert len(kept) == sum(score >= threshold for score in scores)
    assert set(tally.dropped) == {"low language score"}


def test_a_stage_goes_to_a_worker_before_and_after_a_run(model_file):
    stage = IdentifyLanguage(LanguageArguments(language_model=str(model_file)))
    for _ in range(2):
        stage = pickle.loads(pickle.dumps(stage))
        (document,) = stage.run(iter([Document(documents_of("es", 1, 1)[0], "1")]))
        assert document.metadata["language"] == "es"


def test_odd_texts_do_not_stop_the_stage(model_file):
    texts = ["", " \n\t\n", "\0\0", "__label__fr", "the \ud800 of", "漢" * 100_000, "x" * 10_000_000]
    _, documents, tally = identify(model_file, texts)
    assert tally.dropped["no text"] == 2
    assert "language" not in documents[0].metadata
    assert all("language" in document.metadata for document in documents[2:])


def test_the_beginning_of_a_long_document_is_looked_at(model_file):
    english, french = documents_of("en", 1, 1, 200)[0], documents_of("fr", 1, 1, 2000)[0]
    _, (document,), _ = identify(model_file, [f"{english} {french}"], language_characters=500)
    assert document.metadata["language"] == "en"
    _, (document,), _ = identify(model_file, [f"{english} {french}"], language_characters=100_000)
    assert document.metadata["language"] == "fr"
    assert document.text == f"{english} {french}"


@pytest.mark.parametrize(
    ("text", "characters", "line"),
    [
        ("one two three", 13, "one two three"),
        ("one two three", 12, "one two"),
        ("one two three", 7, "one two"),
        ("one two three", 8, "one two"),
        ("one\ntwo\nthree", 9, "one two"),
        ("  \n one two", 3, "one"),
        ("abcdefgh", 3, "abc"),
        ("a bcdefghijk", 8, "a bcdefg"),
        ("漢 字漢字漢字漢字", 6, "漢 字漢字漢"),
        ("one two", None, "one two"),
    ],
)
def test_rule_of_what_fasttext_is_given(text, characters, line):
    assert on_one_line(text, characters) == line


def test_a_training_line_has_one_label_whatever_its_text():
    line = training_line("en", "a __label__fr b\n__label__de")
    assert line.count("__label__") == 1
    assert line.count("\n") == 1


@pytest.mark.parametrize("kind", ["bin", "ftz"])
def test_truncated_models_are_refused_and_never_opened(runs, model_file, kind, tmp_path):
    file = model_file if kind == "bin" else runs("quantised", **QUANTISED) / "language_id.ftz"
    content = file.read_bytes()
    assert sorted(check_model_file(file).labels) == sorted(WORDS)
    for size in [*range(0, 400, 7), *range(400, len(content), len(content) // 50), len(content) - 1]:
        (tmp_path / "cut").write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"cut is (damaged|no fastText model)"):
            load_classifier(tmp_path / "cut")
    (tmp_path / "long").write_bytes(content + b"\0")
    with pytest.raises(ValueError, match="1 bytes follow"):
        check_model_file(tmp_path / "long")


def test_a_model_with_changed_bytes_is_refused_or_opens(model_file, tmp_path):
    # In a process of its own: what passes the check must not end it.
    content = model_file.read_bytes()
    draw = random.Random(0)
    for i in range(60):
        changed = bytearray(content)
        for _ in range(3):
            changed[draw.randrange(600)] = draw.randrange(256)
        (tmp_path / f"{i}.bin").write_bytes(changed)
    code = (
        "import pathlib, sys\n"
        "from training.text_pipeline.fasttext_models import load_classifier, most_likely\n"
        "for file in sorted(pathlib.Path(sys.argv[1]).glob('*.bin')):\n"
        "    try:\n"
        "        most_likely(load_classifier(file), 'the of and')\n"
        "    except ValueError as error:\n"
        "        assert file.name in str(error), error\n"
        "print('through')\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.stdout == "through\n", done.stderr


def test_models_that_tell_no_languages_are_refused(tmp_path):
    lines = tmp_path / "lines.txt"
    lines.write_text("".join(f"__label__{('good', 'bad')[i % 2]} word{i % 9}\n" for i in range(50)))
    train_classifier(lines, seed=0, dim=2, epoch=1).save_model(str(tmp_path / "quality.bin"))
    fasttext.train_unsupervised(str(lines), dim=2, bucket=10, minCount=1, thread=1, verbose=0, epoch=1, lr=0.0)
    with pytest.raises(ValueError, match=r"quality\.bin tells no languages: .*'(good|bad)'"):
        check_language_model(LanguageArguments(language_model=str(tmp_path / "quality.bin")))
    with pytest.raises(ValueError, match=r"There is no fastText model .*none\.bin"):
        check_language_model(LanguageArguments(language_model=str(tmp_path / "none.bin")))


def test_a_language_that_the_model_does_not_know_is_named(model_file):
    with pytest.raises(ValueError, match=r"'eng'.*did you mean en"):
        check_language_model(LanguageArguments(language_model=str(model_file), languages=["fr", "eng"]))
    check_language_model(LanguageArguments(language_model=str(model_file), languages=["fr", "en"]))
    check_language_model(LanguageArguments())


@pytest.mark.parametrize(
    "options",
    [
        {"min_language_score": 50},
        {"language_characters": 0},
        {"languages": ["en"]},
        {"languages": [], "language_model": "lid.176.ftz"},
    ],
)
def test_arguments_out_of_range_are_refused_by_their_field(options):
    with pytest.raises(ValueError, match=f"--{next(iter(options))}"):
        LanguageArguments(**options)


@pytest.mark.parametrize(
    ("file", "options"), [("language_id.bin", {"epochs": 2}), ("language_id.ftz", QUANTISED)], ids=["bin", "ftz"]
)
def test_training_gives_the_same_bytes_again(runs, file, options):
    first, second = (runs(f"{file}_{i}", **options) for i in range(2))
    for name in (file, "README.md"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_run_holds_what_was_measured(model_file):
    run = json.loads((model_file.parent / "run.json").read_text(encoding="utf-8"))
    assert run["status"] == "finished"
    assert run["data"]["train"]["languages"] == dict.fromkeys(sorted(WORDS), 120)
    evaluation = run["evaluation"]
    assert evaluation["documents"] + evaluation["trained_on"] == 480
    assert evaluation["accuracy"] > 0.98
    assert evaluation["thresholds"][0]["kept"] == 1
    assert "held-out documents" in (model_file.parent / "README.md").read_text(encoding="utf-8")


class Told:
    """Stands for a model: what it says is in the text."""

    def predict(self, line, k):
        label, score = line.split()
        return (f"__label__{label}",), (float(score),)


def test_figures_of_an_evaluation():
    told = {"en": ["en 0.9", "en 0.6", "fr 0.4"], "fr": ["fr 0.99", "fr 0.2"]}
    rows = datasets.Dataset.from_list([{"label": label, "text": text} for label in told for text in told[label]])
    figures = evaluate(Told(), rows, 100)
    assert (figures["accuracy"], figures["documents"]) == (0.8, 5)
    assert figures["confusion"] == {"en": {"en": 2, "fr": 1}, "fr": {"fr": 2}}
    assert figures["languages"]["en"] == {"documents": 3, "precision": 1.0, "recall": 0.6667}
    assert figures["languages"]["fr"] == {"documents": 2, "precision": 0.6667, "recall": 1.0}
    at = {row["min_language_score"]: row for row in figures["thresholds"]}
    assert (at[0.5]["kept"], at[0.5]["accuracy"]) == (0.6, 1.0)
    assert (at[0.3]["kept"], at[0.3]["accuracy"]) == (0.8, 0.75)


def test_split_keeps_equal_texts_together_and_leaves_out_what_has_two_labels():
    texts = [f"text {i % 200}" for i in range(600)] + ["home page", "home page", ""]
    labels = ["en", "fr"] * 300 + ["en", "fr", "fr"]
    rows = datasets.Dataset.from_dict({"text": texts, "label": labels})
    for seed in range(10):
        arguments = LanguageIdArguments(dataset="x", held_out_share=0.2, seed=seed)
        training, held_out = split_rows(rows, arguments)
        assert sorted([*training, *held_out]) == list(range(600))
        assert not {texts[i] for i in training} & {texts[i] for i in held_out}
        # Of 200 different texts, each three times, a fifth: four standard deviations are 23.
        assert abs(len(held_out) / 3 - 40) < 23


@pytest.mark.parametrize(
    ("rows", "words", "message"),
    [
        ([{"text": "a", "language": "english"}], [], "label 'english', which is no language code"),
        ([{"text": "a", "language": "en"}], [], "one language only, en"),
        ([{"text": "a", "lang": "en"}], [], "has no column 'language', only text, lang: set --label_column"),
        ([{"text": "a", "language": "en"}], ["--text_column=body"], "has no field 'body'"),
        ([{"text": "a", "language": 3}], [], "strings are expected"),
        ([{"text": "a", "language": "en"}], ["--held_out_share=1"], "--held_out_share is 1"),
    ],
)
def test_mistakes_are_told_in_one_line(rows, words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = [f"--dataset={tmp_path / 'texts.jsonl'}", f"--output_dir={tmp_path / 'out'}", *words]
    monkeypatch.setattr(sys, "argv", ["train_language_id", *words])
    with pytest.raises(SystemExit) as stop:
        train_language_id.main()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
