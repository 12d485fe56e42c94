"""Reading text: every kind of local source gives the same rows, and bad data is told in a sentence."""

import gzip
import json
import re

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from training.text_data import describe_texts, iterate_texts, load_text_dataset

DOCUMENTS = ["The first.\nTwo lines of it.", "Second: café, 中, 👍🏽", "Third."]


@pytest.fixture(autouse=True)
def _cache_in_a_temporary_folder(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def write_parquet(path, **columns):
    pyarrow.parquet.write_table(pa.table(columns), path)


def write_sources(folder):
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in DOCUMENTS]
    (folder / "a.txt").write_text("\n\n".join(DOCUMENTS), encoding="utf-8")
    (folder / "a.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (folder / "a.json").write_text(f"[{','.join(rows)}]", encoding="utf-8")
    write_parquet(folder / "a.parquet", text=DOCUMENTS, title=["1", "2", "3"])
    (folder / "a.txt.gz").write_bytes(gzip.compress((folder / "a.txt").read_bytes()))
    (folder / "a.jsonl.gz").write_bytes(gzip.compress((folder / "a.jsonl").read_bytes()))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.parquet", "a.txt.gz", "a.jsonl.gz"])
def test_every_kind_of_file_gives_the_same_documents(name, streaming, tmp_path):
    write_sources(tmp_path)
    texts = load_text_dataset(str(tmp_path / name), "train", streaming=streaming)
    assert texts.column_names == ["text"]
    assert list(iterate_texts(texts)) == DOCUMENTS


def test_folder_is_split_by_file_names(tmp_path):
    write_parquet(tmp_path / "train-00000.parquet", text=DOCUMENTS[:1])
    write_parquet(tmp_path / "train-00001.parquet", text=DOCUMENTS[1:2])
    write_parquet(tmp_path / "test.parquet", text=DOCUMENTS[2:])
    (tmp_path / "README.md").write_text("No data.", encoding="utf-8")
    assert list(iterate_texts(load_text_dataset(str(tmp_path), "train"))) == DOCUMENTS[:2]
    assert list(iterate_texts(load_text_dataset(str(tmp_path), "test"))) == DOCUMENTS[2:]
    assert list(iterate_texts(load_text_dataset(str(tmp_path), "train+test"))) == DOCUMENTS


def test_slices_divide_a_single_file(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join("abcdefghij"), encoding="utf-8")
    parts = [
        list(iterate_texts(load_text_dataset(str(tmp_path / "a.txt"), f"train[{part}]"))) for part in (":80%", "80%:")
    ]
    assert parts == [list("abcdefgh"), list("ij")]


def test_another_column_becomes_text(tmp_path):
    write_parquet(tmp_path / "a.parquet", body=DOCUMENTS, text=[1, 2, 3])
    for streaming in (False, True):
        texts = load_text_dataset(str(tmp_path / "a.parquet"), "train", text_column="body", streaming=streaming)
        assert list(texts) == [{"text": text} for text in DOCUMENTS]


def test_sample_has_no_held_out_text_in_its_training_text():
    train, test = (load_text_dataset("wikipedia_leads", split)["text"] for split in ("train", "test"))
    assert len(train) > 9000
    assert not set(train) & set(test)


def test_reading_stops_with_the_document_that_reaches_max_bytes():
    texts = datasets.Dataset.from_dict({"text": ["é" * 10] * 5})  # 20 bytes each
    assert [len(list(iterate_texts(texts, max_bytes))) for max_bytes in (1, 20, 21, 1000, None)] == [1, 1, 2, 5, 5]


def test_fingerprint_tells_contents_and_borders_apart():
    def fingerprint(*documents):
        return describe_texts(datasets.Dataset.from_dict({"text": documents}), "a", "train")["fingerprint"]

    assert fingerprint("ab", "c") == fingerprint("ab", "c")
    assert len({fingerprint("ab", "c"), fingerprint("a", "bc"), fingerprint("c", "ab"), fingerprint("abc")}) == 4


def test_description_counts_documents_and_bytes():
    texts = load_text_dataset("wikipedia_leads", "test")
    description = describe_texts(texts, "wikipedia_leads", "test")
    assert description["documents"] == 501
    assert description["bytes"] == sum(len(text.encode()) for text in texts["text"]) == 246_336


BAD_FILES = {
    "empty.txt": (b"", r"empty\.txt is empty \(0 bytes\)"),
    "blank.txt": (b" \n\n ", r"blank\.txt holds nothing but white space"),
    "binary.txt": (b"MZ\x90"[:2] + b"\0\1", r"binary\.txt is binary: byte 2 is NUL.*iconv"),
    "utf16.txt": ("some text".encode("utf-16"), r"utf16\.txt is binary.*iconv -f UTF-16"),
    "latin1.txt": ("one\ntwo\ncafé".encode("latin-1"), r"latin1\.txt is not UTF-8 at line 3, byte 11.*iconv"),
    "cut_short.txt": ("café".encode()[:-1], r"cut_short\.txt is not UTF-8 at line 1, byte 3"),
    "latin1.jsonl": ('{"text": "caf\xe9"}'.encode("latin-1"), r"latin1\.jsonl is not UTF-8 at line 1, byte 13"),
    "number.jsonl": (b'{"text": "a"}\n{"text": 3}\n', r"number\.jsonl, line 2 has 3 in the field 'text'"),
    "null.jsonl": (b'{"text": "a"}\n\n{"text": null}\n', r"null\.jsonl, line 3 has null in the field 'text'"),
    "other_field.jsonl": (b'{"body": "a", "id": 1}\n', r"line 1 has no field 'text', only body, id: set --text_column"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', r"broken\.jsonl, line 2 is not JSON"),
    "list.jsonl": (b'{"text": "a"}\n["b"]\n', r"list\.jsonl, line 2 is no JSON object"),
    "numbers.json": (b'[{"text": 1}]', r"column 'text' .* holds .*int64.* where strings are expected"),
    "fake.parquet": (b"not parquet at all", r"fake\.parquet is not a parquet file"),
    "table.csv": (b"text\na\n", r"no text data of one kind \(\.csv\)"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_told_with_its_place_and_mend(name, tmp_path):
    contents, sentence = BAD_FILES[name]
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(ValueError, match=sentence):
        load_text_dataset(str(tmp_path / name), "train")


def test_bad_bytes_are_placed_right_in_a_large_file(tmp_path):
    """Also across the borders of the chunks that are read, and inside compressed files."""
    good = "é\n".encode() * 1_000_000  # 3 bytes a line, so that a chunk ends within a character
    for file, contents in (
        (tmp_path / "a.txt", good + b"\xff"),
        (tmp_path / "a.txt.gz", gzip.compress(good + b"\xff", 1)),
    ):
        file.write_bytes(contents)
        with pytest.raises(ValueError, match=r"line 1000001, byte 3000000"):
            load_text_dataset(str(file), "train")


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"body": ["a"], "id": [1]}, "no column 'text', only body, id: set --text_column"),
        ({"text": [1, 2]}, "holds int64 where strings are expected"),
        ({"text": pa.array([], pa.string())}, "has no rows"),
        ({"text": ["a", None]}, "no value in 1 rows"),
    ],
)
def test_bad_parquet_column_is_told(columns, sentence, tmp_path):
    write_parquet(tmp_path / "a.parquet", **columns)
    with pytest.raises(ValueError, match=sentence):
        load_text_dataset(str(tmp_path / "a.parquet"), "train")


def test_split_that_does_not_exist_is_told_with_those_that_do(tmp_path):
    (tmp_path / "a.txt").write_text("a", encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.txt is a single file and has only the split 'train', not 'test'"):
        load_text_dataset(str(tmp_path / "a.txt"), "test")
    with pytest.raises(ValueError, match="has the splits 'train', 'test', not 'dev'"):
        load_text_dataset("wikipedia_leads", "dev")
    with pytest.raises(ValueError, match="a slice, which a stream cannot give"):
        load_text_dataset("wikipedia_leads", "train[:5%]", streaming=True)


@pytest.mark.parametrize("dataset", ["notes.txt", "./nothing", "/nowhere/at/all"])
def test_missing_path_is_told_with_the_samples(dataset):
    with pytest.raises(FileNotFoundError, match=re.escape(repr(dataset)) + r".*wikipedia_leads.*Hub id"):
        load_text_dataset(dataset, "train")


def test_hub_is_not_asked_when_offline():
    with pytest.raises(FileNotFoundError, match=r"'owner/name'.*HF_HUB_OFFLINE is set.*wikipedia_leads"):
        load_text_dataset("owner/name", "train")


def test_empty_folder_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no data files"):
        load_text_dataset(str(tmp_path), "train")
