"""Decontamination: what overlaps an evaluation item is dropped, as a search through all n-grams would tell."""

import json
import pickle
import random
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datatrove.data import Document

from training.dataset_source import SAMPLE_DATA
from training.text_pipeline.decontamination import Decontaminate, DecontaminationArguments, found_items

LEADS = pq.read_table(SAMPLE_DATA / "wikipedia_leads/test.parquet")["text"].to_pylist()


def write_jsonl(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def run(texts, files, found_folder=None, tasks=1, **options):
    """The ids of the dropped, the documents, and the stages of all tasks; document i goes to task i modulo `tasks`."""
    arguments = DecontaminationArguments(decontaminate=files, **options)
    documents = [Document(text=text, id=str(number)) for number, text in enumerate(texts)]
    kept, stages = set(), []
    for rank in range(tasks):
        stages.append(pickle.loads(pickle.dumps(Decontaminate(arguments, found_folder))))
        kept |= {document.id for document in stages[-1].run(documents[rank::tasks], rank, tasks)}
    return [number for number, document in enumerate(documents) if document.id not in kept], documents, stages


def brute_force_overlap(text, items, n, shortest=8):
    """Whether a string of n words of an item, or a whole item of at least `shortest`, is in the text."""

    def normalised(string):
        return re.findall(r"[a-z0-9]+", string.lower())

    haystack = f" {' '.join(normalised(text))} "
    for words in map(normalised, items):
        if len(words) >= shortest:
            length = min(n, len(words))
            for start in range(len(words) - length + 1):
                if f" {' '.join(words[start : start + length])} " in haystack:
                    return True
    return False


@pytest.mark.parametrize("n", [8, 13])
def test_dropped_are_the_overlapping_as_brute_force_finds_them(n, tmp_path):
    """Texts of few different words, so that n-grams agree in part, wholly, and at their edges."""
    generator = random.Random(n)

    def text(length):
        return " ".join(generator.choices(["one", "Two", "3", "four."], k=length))

    items = [text(generator.randint(0, 20)) for _ in range(40)]
    texts = [text(generator.randint(0, 60)) for _ in range(300)]
    for _ in range(150):  # pieces of items, of which some are a word too short
        words = generator.choice(items).split()
        start, length = generator.randint(0, 5), generator.randint(n - 3, n + 2)
        texts.append(f"{text(9)} zero {' '.join(words[start : start + length])} zero {text(9)}")
    file = write_jsonl(tmp_path / "items.jsonl", [{"question": item} for item in items])
    expected = [number for number, text in enumerate(texts) if brute_force_overlap(text, items, n)]
    assert 20 < len(expected) < 400
    assert run(texts, [file], decontamination_ngrams=n)[0] == expected


def test_planted_items_are_found_and_clean_pages_pass(tmp_path):
    """A tenth of the pages quotes an item in other case and punctuation; the rest shares no n-gram by chance."""
    items, pages = LEADS[:40], LEADS[100:300]
    file = write_jsonl(tmp_path / "items.jsonl", [{"id": "a", "text": item} for item in items])
    for number in range(20):
        quoted = re.sub(r"[,.]", " –", items[number].upper())
        pages[10 * number] += f"\n{quoted}\n"
    dropped, documents, (stage,) = run(pages, [file], tmp_path / "found")
    assert dropped == list(range(0, 200, 10))
    assert stage.tally.dropped == {"contaminated: items.jsonl": 20}
    assert documents[50].metadata["contaminated_by"] == "items.jsonl:5"
    words = re.findall(r"[a-z0-9]+", items[5].lower())
    assert re.findall(r"[a-z0-9]+", documents[50].metadata["contaminated_ngram"])[:5] == words[:5]
    assert [(row["file"], row["item"], row["documents"]) for row in found_items(tmp_path / "found")] == [
        ("items.jsonl", number, 1) for number in range(20)
    ]


def test_items_found_do_not_depend_on_the_tasks(tmp_path):
    file = write_jsonl(tmp_path / "items.jsonl", [{"text": lead} for lead in LEADS[:30]])
    texts = LEADS[20:60] * 3
    expected = run(texts, [file], tmp_path / "one")[0]
    assert run(texts, [file], tmp_path / "three", tasks=3)[0] == expected
    assert found_items(tmp_path / "three") == found_items(tmp_path / "one")
    assert {row["documents"] for row in found_items(tmp_path / "one")} == {3}


def test_short_items_are_looked_for_as_a_whole_and_shorter_ones_counted(tmp_path):
    items = ["a b c d e f g", "h i j k l m n o", "p q r s t u v w x"]
    file = tmp_path / "items.txt"
    file.write_text("\n".join(items), encoding="utf-8")
    texts = ["z a b c d e f g z", "z h i j k l m n o z", "z p q r s t u v w z", "P, q r s t u v w x!"]
    dropped, _, stages = run(texts, [str(file)], tasks=2)
    assert dropped == [1, 3]
    assert sum((stage.tally.counts for stage in stages), start=type(stages[0].tally.counts)()) == {
        "items too short to be found: items.txt": 1
    }


def test_every_kind_of_file_and_nested_strings(tmp_path):
    rows = [
        {"id": 1, "choices": ["no", "this choice has as many words as are needed here"], "answer": None},
        {"id": 2, "answer": {"text": "and this answer has them as well as the choice"}},
    ]
    jsonl = write_jsonl(tmp_path / "items.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "items.parquet")
    texts = [rows[0]["choices"][1], rows[1]["answer"]["text"], "another text that is in neither of the two files"]
    for file in (jsonl, str(tmp_path / "items.parquet")):
        assert run(texts, [file])[0] == [0, 1]
        assert run(texts, [file], decontamination_column="answer")[0] == [1]


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path):
    for folder in ("arc", "mmlu"):
        (tmp_path / folder).mkdir()
        write_jsonl(tmp_path / folder / "test.jsonl", [{"text": f"{folder} has a text of eight words or so"}])
    files = [str(tmp_path / folder / "test.jsonl") for folder in ("arc", "mmlu")]
    *_, (stage,) = run(["mmlu has a text of eight words or so"], files)
    assert stage.tally.dropped == {"contaminated: mmlu/test.jsonl": 1}
    with pytest.raises(ValueError, match="names a file twice"):
        run([], [files[0], files[0]])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text"', r"a\.jsonl, line 2 is not JSON"),
        ("a.jsonl", b'["a"]\n', r"a\.jsonl, line 1 is list, not an object"),
        ("a.jsonl", b'{"n": 1}\n', r"a\.jsonl of --decontaminate has no text"),
        ("a.txt", b"\xff\xfe", r"a\.txt of --decontaminate cannot be read"),
        ("a.parquet", b"PAR", r"a\.parquet of --decontaminate cannot be read"),
        ("a.csv", b"a", r"a\.csv: give a file that ends in \.jsonl"),
        ("a.txt", None, r"no such file"),
    ],
)
def test_bad_files_are_told_before_any_work(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Decontaminate(DecontaminationArguments(decontaminate=[str(tmp_path / name)]))


def test_a_column_that_is_not_there_is_told(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    with pytest.raises(ValueError, match="no text in a column 'question'"):
        Decontaminate(DecontaminationArguments(decontaminate=[file], decontamination_column="question"))


def test_too_few_words_are_refused():
    with pytest.raises(ValueError, match="decontamination_ngrams is 5: give 8"):
        DecontaminationArguments(decontamination_ngrams=5)
