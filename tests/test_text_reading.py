"""Reading: every kind of input gives its documents, and damage costs the damaged records only."""

import gzip
import json
import os
import pickle
import random
import subprocess
import sys
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from training.text_pipeline.reading import BadInputError, ReadArguments, ReadDocuments, check_bad_share, plan_tasks
from training.text_pipeline.tally import Tally

PAGE = "<html><body><p>Seite {}: Käse</p></body></html>"


def http_record(number, body=None, header=None, length=None, **fields):
    """A WARC response record, as bytes."""
    body = PAGE.format(number).encode() if body is None else body
    header = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=UTF-8" if header is None else header
    block = header + b"\r\n\r\n" + body
    fields = {
        "WARC-Type": "response",
        "WARC-Record-ID": f"<urn:uuid:{number}>",
        "WARC-Target-URI": f"http://example.org/{number}",
        "WARC-Date": "2024-05-06T07:08:09Z",
        "Content-Type": "application/http; msgtype=response",
        "Content-Length": str(len(block) if length is None else length),
    } | fields
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return b"WARC/1.0\r\n" + lines.encode() + b"\r\n" + block + b"\r\n\r\n"


def read(dataset, **options):
    """All documents, and the sum of the tallies."""
    arguments = ReadArguments(dataset=str(dataset), **options)
    tasks, _ = plan_tasks(arguments)
    documents, tallies = [], []
    for rank in range(len(tasks)):
        reader = pickle.loads(pickle.dumps(ReadDocuments(tasks, arguments)))
        documents += reader.run(rank=rank, world_size=len(tasks))
        tallies.append(reader.tally)
    return documents, Tally.total("read", tallies)


def numbers(documents):
    return [int(document.metadata["url"].rsplit("/", 1)[1]) for document in documents]


def bad(tally):
    return [(entry["file"], entry["offset"], entry["reason"]) for entry in tally.bad_inputs]


PACKINGS = {
    "a.warc": lambda records: b"".join(records),
    "a.warc.gz": lambda records: b"".join(map(gzip.compress, records)),
    "b.warc.gz": lambda records: gzip.compress(b"".join(records)),
    "a.warc.zst": lambda records: b"".join(map(zstandard.ZstdCompressor().compress, records)),
}


@pytest.mark.parametrize("name", PACKINGS)
def test_pages_of_a_web_archive(name, tmp_path):
    request = http_record(7, **{"WARC-Type": "request"})
    image = http_record(8, b"\x89PNG", b"HTTP/1.1 200 OK\r\nContent-Type: image/png")
    missing = http_record(9, header=b"HTTP/1.1 404 Not Found\r\nContent-Type: text/html")
    dns = http_record(6, **{"Content-Type": "text/dns"})
    records = [http_record(0), request, image, missing, dns, http_record(1)]
    (tmp_path / name).write_bytes(PACKINGS[name](records))
    documents, tally = read(tmp_path / name)
    assert [document.id for document in documents] == ["<urn:uuid:0>", "<urn:uuid:1>"]
    assert [document.metadata["raw"].decode() for document in documents] == [PAGE.format(0), PAGE.format(1)]
    first = documents[0].metadata
    assert (first["url"], first["date"]) == ("http://example.org/0", "2024-05-06T07:08:09Z")
    assert (first["charset"], first["file"], documents[0].text) == ("UTF-8", name, "")
    assert tally.counts == {"other records": 4}
    assert tally.bytes_in == (tmp_path / name).stat().st_size
    assert tally.documents_out == 2
    assert tally.bytes_out == 2 * len(PAGE.format(0).encode())


def test_pages_are_unpacked_as_their_headers_say(tmp_path):
    page = PAGE.format(1).encode()
    bodies = {
        "Content-Encoding: gzip": gzip.compress(page),
        "Content-Encoding: deflate": zlib.compress(page),
        "Transfer-Encoding: chunked": b"5\r\n"
        + page[:5]
        + b"\r\n%x\r\n" % (len(page) - 5)
        + page[5:]
        + b"\r\n0\r\n\r\n",
        "Content-Encoding: identity": page,
        "content-encoding: GZIP": gzip.compress(page)[:-6] + b"broken",
    }
    head = "HTTP/1.1 200 OK\r\nContent-Language: de, en\r\nContent-Type: text/html\r\n"
    records = [http_record(i, body, (head + line).encode()) for i, (line, body) in enumerate(bodies.items())]
    (tmp_path / "a.warc.gz").write_bytes(b"".join(map(gzip.compress, records)))
    documents, tally = read(tmp_path / "a.warc.gz")
    assert [document.metadata["raw"] for document in documents] == [page] * 4
    assert documents[0].metadata["language_hint"] == "de"
    assert [reason for _, _, reason in bad(tally)] == ["damaged content encoding"]


def test_texts_of_a_wet_file(tmp_path):
    fields = {"WARC-Type": "conversion", "Content-Type": "text/plain", "WARC-Identified-Content-Language": "deu,eng"}
    texts = ["Käse\n", "zwei"]
    records = []
    for number, text in enumerate(texts):
        record = http_record(number, b"", b"", length=len(text.encode()), **fields)
        records.append(gzip.compress(record.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" + text.encode() + b"\r\n\r\n"))
    (tmp_path / "a.warc.wet.gz").write_bytes(b"".join(records))
    documents, _ = read(tmp_path / "a.warc.wet.gz")
    assert [document.text for document in documents] == texts
    assert documents[0].metadata["language_hint"] == "deu"


@pytest.mark.parametrize("name", ["a.warc", "a.warc.gz", "a.warc.zst"])
def test_any_truncation_keeps_the_records_before_it_and_is_counted(name, tmp_path):
    records = [PACKINGS[name]([http_record(number)]) for number in range(3)]
    whole = b"".join(records)
    ends = [sum(map(len, records[:number])) for number in range(4)]
    # Of the last record's end, nothing is missed: line breaks, and the checksum of its packing.
    tail = {"a.warc": 4, "a.warc.gz": 14, "a.warc.zst": 8}[name]
    for length in range(ends[1] + 1, ends[3], 7):
        (tmp_path / name).write_bytes(whole[:length])
        documents, tally = read(tmp_path / name)
        complete = sum(length >= end for end in ends[1:])
        assert numbers(documents)[:complete] == list(range(complete))
        rest = length - ends[complete]
        near_end = length >= ends[complete + 1] - tail
        if rest > 4 and not near_end:
            assert len(documents) == complete
        if rest > 4 and not near_end and name != "a.warc.zst":
            assert bad(tally) == [(name, ends[complete], bad(tally)[0][2])]


@pytest.mark.parametrize("name", ["a.warc", "a.warc.gz", "a.warc.zst"])
def test_damage_in_the_middle_costs_one_record(name, tmp_path):
    noise = random.Random(0)
    bodies = [PAGE.format(noise.randbytes(3000).hex()).encode() for _ in range(9)]
    records = [PACKINGS[name]([http_record(number, body)]) for number, body in enumerate(bodies)]
    starts = [sum(map(len, records[:number])) for number in range(9)]
    for place in (0, 20, 40, 700):  # in the start of the member, in the headers, in the page
        damaged = bytearray(b"".join(records))
        damaged[starts[4] + place : starts[4] + place + 16] = bytes(16)
        (tmp_path / name).write_bytes(damaged)
        documents, tally = read(tmp_path / name)
        lost = [number for number in range(9) if number not in numbers(documents)]
        if name == "a.warc" and place > 0:  # without a checksum, nothing shows it
            assert lost in ([], [4])
        else:
            assert lost == [4]
            # Where no member begins any more, the damage is told of the next one that does.
            expected = starts[5] if name == "a.warc.zst" and place == 0 else starts[4]
            assert [entry[:2] for entry in bad(tally)] == [(name, expected)]


@pytest.mark.parametrize("name", ["a.warc.gz", "a.warc.zst"])
def test_damage_at_the_very_start_costs_one_record(name, tmp_path):
    records = [PACKINGS[name]([http_record(number)]) for number in range(3)]
    (tmp_path / name).write_bytes(bytes(4) + records[0][4:] + records[1] + records[2])
    documents, tally = read(tmp_path / name)
    assert numbers(documents) == [1, 2]
    assert [entry[:2] for entry in bad(tally)] == [(name, 0)]


def test_malformed_records_are_counted_at_their_offset_and_left_out(tmp_path):
    malformed = {
        "malformed HTTP header": http_record(1, b"", b"no HTTP at all"),
        "malformed WARC record": http_record(1, length="many"),
        "truncated record": http_record(1, length=100_000),
        "record above max_record_bytes": http_record(1, b"<p>" * 20_000),
    }
    for reason, record in malformed.items():
        parts = [gzip.compress(http_record(0)), gzip.compress(record), gzip.compress(http_record(2))]
        (tmp_path / "a.warc.gz").write_bytes(b"".join(parts))
        documents, tally = read(tmp_path / "a.warc.gz", max_record_bytes=50_000)
        assert numbers(documents) == [0, 2]
        assert bad(tally) == [("a.warc.gz", len(parts[0]), reason)]


def test_page_that_unpacks_to_more_than_a_record_may_hold_is_skipped(tmp_path):
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Encoding: gzip"
    (tmp_path / "a.warc").write_bytes(http_record(0, gzip.compress(bytes(5_000_000)), head) + http_record(1))
    documents, tally = read(tmp_path / "a.warc", max_record_bytes=1_000_000)
    assert numbers(documents) == [1]
    assert bad(tally) == [("a.warc", 0, "record above max_record_bytes")]


def test_folder_of_pages(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.html", "a.htm", "sub/c.xhtml", "style.css", "notes.txt", "more.txt"):
        (tmp_path / name).write_text(f"<p>{name}</p>", encoding="utf-8")
    (tmp_path / "empty.html").touch()
    documents, tally = read(tmp_path)
    assert {document.id: document.metadata["raw"] for document in documents} == {
        name: f"<p>{name}</p>".encode() for name in ("a.htm", "b.html", "sub/c.xhtml")
    }
    assert bad(tally) == [("empty.html", 0, "empty file")]
    assert plan_tasks(ReadArguments(dataset=str(tmp_path)))[1] == {".css": 1, ".txt": 2}


ROWS = [
    {"text": "one", "url": "http://a.org/1", "n": 1},
    {"text": "two: Käse", "timestamp": "2024"},
    {"text": "", "id": 7},
]


def write_rows(path):
    content = "\n".join(json.dumps(row) for row in ROWS).encode()
    if path.suffix == ".parquet":
        pq.write_table(
            pa.Table.from_pylist(
                ROWS,
                pa.schema(
                    {
                        "text": pa.string(),
                        "url": pa.string(),
                        "n": pa.int64(),
                        "timestamp": pa.string(),
                        "id": pa.int64(),
                    }
                ),
            ),
            path,
        )
        return
    pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(path.suffix, bytes)
    path.write_bytes(pack(content))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_rows(name, tmp_path):
    write_rows(tmp_path / name)
    documents, tally = read(tmp_path / name)
    assert [document.text for document in documents] == [row["text"] for row in ROWS]
    assert documents[0].metadata | {"n": 1, "url": "http://a.org/1", "file": name} == documents[0].metadata
    assert documents[1].metadata["date"] == "2024"
    assert documents[2].id == "7"
    assert len({document.id for document in documents}) == 3
    assert tally.bad_inputs == []


def test_fields_of_a_row_that_stages_write_are_renamed(tmp_path):
    row = {"text": "t", "raw": "x", "file": "y", "language_score": "high", "url": 5, "language": "de", "date": None}
    (tmp_path / "a.jsonl").write_text(json.dumps(row), encoding="utf-8")
    (document,), _ = read(tmp_path / "a.jsonl")
    assert document.metadata == {
        "source_raw": "x",
        "source_file": "y",
        "source_language_score": "high",
        "url": "5",
        "language": "de",
        "file": "a.jsonl",
    }


def test_json_array_and_another_column(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"body": "one"}, {"body": "two"}], indent=1), encoding="utf-8")
    documents, _ = read(tmp_path / "a.json", text_column="body")
    assert [document.text for document in documents] == ["one", "two"]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_paragraphs_of_text(name, tmp_path):
    content = "\ufeffone\r\nline two\r\n\r\n\r\ntwo: Käse\n \n\nthree".encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    documents, _ = read(tmp_path / name)
    assert [document.text for document in documents] == ["one\nline two", "two: Käse", "three"]
    assert [document.id for document in documents] == [f"{name}/0", f"{name}/22", f"{name}/36"]


def test_bad_lines_are_counted_at_their_offset_and_left_out(tmp_path):
    lines = [
        (b'{"text": "good"}', None),
        (b'{"text": "a"', "not JSON"),
        (b'["a"]', "not a JSON object"),
        (b'"a"', "not a JSON object"),
        (b'{"words": "a"}', "no string in the field 'text'"),
        (b'{"text": 5}', "no string in the field 'text'"),
        (b'{"text": "a\\u0000"}', "NUL bytes"),
        (b'{"text": "\x00"}', "NUL bytes"),
        ('{"text": "Käse"}'.encode("latin-1"), "not UTF-8"),
        (json.dumps({"text": "x" * 3000}).encode(), "record above max_record_bytes"),
        (b"", None),
        (b'{"text": "good too"}', None),
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(line for line, _ in lines))
    documents, tally = read(tmp_path / "a.jsonl", max_record_bytes=2000)
    assert [document.text for document in documents] == ["good", "good too"]
    offsets = [sum(len(line) + 1 for line, _ in lines[:number]) for number in range(len(lines))]
    expected = [("a.jsonl", offset, reason) for offset, (_, reason) in zip(offsets, lines, strict=True) if reason]
    assert bad(tally) == expected
    assert tally.documents_in == len(expected) + 2


def test_bad_paragraphs_are_counted_at_their_offset_and_left_out(tmp_path):
    paragraphs = [
        b"good",
        b"NUL \0 byte",
        "Käse".encode("latin-1"),
        b"line\n" * 600,
        b"x" * 3000 + b"\nshort",
        b"good too",
    ]
    (tmp_path / "a.txt").write_bytes(b"\n\n".join(paragraphs))
    documents, tally = read(tmp_path / "a.txt", max_record_bytes=2000)
    assert [document.text for document in documents] == ["good", "good too"]
    offsets = [sum(len(paragraph) + 2 for paragraph in paragraphs[:number]) for number in range(1, 5)]
    large = "record above max_record_bytes"
    assert [entry[1] for entry in bad(tally)] == offsets
    assert [entry[2] for entry in bad(tally)] == ["NUL bytes", "not UTF-8", large, large]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.txt.gz"])
def test_packed_text_is_read_up_to_where_it_is_damaged(name, tmp_path):
    pack = gzip.compress if name.endswith("gz") else zstandard.ZstdCompressor(write_checksum=True).compress
    noise = random.Random(0)
    texts = [noise.randbytes(50).hex() for _ in range(20_000)]
    content = "\n".join(json.dumps({"text": text}) for text in texts) if "json" in name else "\n\n".join(texts)
    packed = pack(content.encode())
    truncated = packed[: len(packed) * 3 // 4]
    corrupt = bytearray(packed)
    corrupt[len(packed) // 2 : len(packed) // 2 + 64] = bytes(64)
    for damaged, reason in ((truncated, "truncated compression"), (bytes(corrupt), None)):
        (tmp_path / name).write_bytes(damaged)
        documents, tally = read(tmp_path / name, max_bad_share=1)
        read_texts = [document.text for document in documents]
        if reason:
            assert [entry["reason"] for entry in tally.bad_inputs] == [reason]
            assert len(read_texts) > 12_000
            assert read_texts == texts[: len(read_texts)]
        else:
            assert read_texts[:5000] == texts[:5000]
            assert tally.bad_input_count >= 1


def test_damaged_parquet_costs_its_row_group(tmp_path):
    table = pa.table({"text": [random.Random(number).randbytes(500).hex() for number in range(40)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=10, compression="zstd", use_dictionary=False)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    start = pq.read_metadata(tmp_path / "a.parquet").row_group(1).column(0).data_page_offset
    content[start : start + 64] = bytes(64)
    (tmp_path / "b.parquet").write_bytes(content)
    (tmp_path / "c.parquet").write_bytes(content[: len(content) // 2])
    documents, tally = read(tmp_path)
    texts = table["text"].to_pylist()
    assert [document.text for document in documents] == texts + texts[:10] + texts[20:]
    assert bad(tally) == [("b.parquet", 10, "damaged parquet"), ("c.parquet", 0, "damaged parquet")]


def test_parquet_rows_that_are_not_utf8_cost_only_themselves(tmp_path):
    texts = [b"good", "café".encode("latin-1"), b"good too"]
    offsets = pa.py_buffer(np.cumsum([0, *map(len, texts)]).astype(np.int32))
    column = pa.StringArray.from_buffers(len(texts), offsets, pa.py_buffer(b"".join(texts)))  # unchecked
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    documents, tally = read(tmp_path)
    assert [(document.text, document.id) for document in documents] == [
        ("good", "a.parquet/0"), ("good too", "a.parquet/2"),
    ]  # fmt: skip
    assert bad(tally) == [("a.parquet", 1, "not UTF-8")]


MEMORY_OF_A_LONG_LINE = """
import resource
from training.text_pipeline.reading import ReadArguments, ReadDocuments

def read(name):
    return [document.text for document in ReadDocuments([[name]], ReadArguments(dataset=name)).run()]

read("short.jsonl.gz")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert read("long.jsonl.gz") == ["before", "after"]
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_line_of_100_megabytes_is_skipped_in_constant_memory(tmp_path):
    before, after = b'{"text": "before"}\n', b'{"text": "after"}\n'
    (tmp_path / "short.jsonl.gz").write_bytes(gzip.compress(before))
    with gzip.open(tmp_path / "long.jsonl.gz", "wb", compresslevel=1) as file:
        file.write(before + b'{"text": "')
        for _ in range(100):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\n' + after)
    command = [sys.executable, "-c", MEMORY_OF_A_LONG_LINE]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 40  # MiB: the limit of a record, 16 MiB, and a few chunks


def test_sample_is_read_by_its_name():
    from training.text_data import load_text_dataset

    documents, tally = read("wikipedia_leads", dataset_split="test")
    assert [document.text for document in documents] == load_text_dataset("wikipedia_leads", "test")["text"]
    assert documents[0].metadata["file"] == "test.parquet"
    assert tally.documents_out == len(documents)


def test_hub_data_set_is_read_in_parts(monkeypatch):
    import datasets

    from training import dataset_source

    rows = datasets.Dataset.from_list(
        [{"text": f"text {number}", "url": f"http://a.org/{number}"} for number in range(10)]
    )
    monkeypatch.setattr(dataset_source, "load_from_hub", lambda *arguments: rows.to_iterable_dataset(num_shards=3))
    arguments = ReadArguments(dataset="user/name")
    tasks, _ = plan_tasks(arguments)
    assert tasks == [["hub:0/3"], ["hub:1/3"], ["hub:2/3"]]
    documents, _ = read("user/name")
    assert sorted(document.text for document in documents) == sorted(rows["text"])
    assert len({document.id for document in documents}) == 10
    with pytest.raises(ValueError, match="user/name has no column 'words', only text, url"):
        plan_tasks(ReadArguments(dataset="user/name", text_column="words"))


def test_pattern_reads_what_it_matches(tmp_path):
    for name in ("a.txt", "b.txt", "sub/c.txt", "a.jsonl", "a.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "x"}', encoding="utf-8")
    documents, _ = read(tmp_path / "*.txt")
    assert [document.id for document in documents] == ["a.txt/0", "b.txt/0"]
    documents, _ = read(tmp_path / "**" / "*.txt")
    assert {document.metadata["file"] for document in documents} == {"a.txt", "b.txt", "sub/c.txt"}


def test_tasks_depend_on_names_and_sizes_only(tmp_path):
    for number in (3, 1, 0, 2):
        (tmp_path / f"{number}.txt").write_text("x" * 40, encoding="utf-8")
    (tmp_path / "4.txt").write_text("x" * 500, encoding="utf-8")
    tasks, _ = plan_tasks(ReadArguments(dataset=str(tmp_path), task_bytes=100))
    assert tasks == [[str(tmp_path / f"{number}.txt") for number in group] for group in ((0, 1), (2, 3), (4,))]


def test_fewer_workers_than_tasks_read_everything(tmp_path):
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text(str(number), encoding="utf-8")
    arguments = ReadArguments(dataset=str(tmp_path), task_bytes=1)
    reader = ReadDocuments(plan_tasks(arguments)[0], arguments)
    texts = [document.text for rank in range(2) for document in reader.run(rank=rank, world_size=2)]
    assert sorted(texts) == list("01234")


def test_too_large_a_share_of_bad_records_stops_the_task(tmp_path):
    good, broken = b'{"text": "good"}', b"broken"
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([good] * 189 + [broken] * 11))
    with pytest.raises(BadInputError, match=r"11 of 200 records .*not JSON: 11.* of a.jsonl, first at offset 3213"):
        read(tmp_path / "a.jsonl", max_bad_share=0.05)
    assert len(read(tmp_path / "a.jsonl", max_bad_share=0.06)[0]) == 189
    # A few are let pass, whatever their share.
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([good] * 10 + [broken] * 10))
    documents, tally = read(tmp_path / "a.jsonl")
    assert len(documents) == 10
    with pytest.raises(BadInputError, match="20 of 40"):
        check_bad_share([tally, tally], 0.05)
    check_bad_share([tally, tally], 0.5)


def test_long_task_stops_early(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n' * 900 + b"broken\n" * 2000)
    reader = ReadDocuments([[str(tmp_path / "a.jsonl")]], ReadArguments(dataset=str(tmp_path / "a.jsonl")))
    with pytest.raises(BadInputError):
        list(reader.run())


def test_input_of_which_nothing_can_be_read_is_refused(tmp_path):
    (tmp_path / "a.html").touch()
    (tmp_path / "b.html").write_text("x", encoding="utf-8")
    _, tally = read(tmp_path, max_record_bytes=10)
    check_bad_share([tally], 0.05)
    (tmp_path / "b.html").write_text("x" * 100, encoding="utf-8")
    _, tally = read(tmp_path, max_record_bytes=10)
    with pytest.raises(BadInputError, match="Nothing could be read"):
        check_bad_share([tally], 0.05)


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({}, {}, "holds no files to read, none: give .warc"),
        ({"a.md": "x", "b.pdf": "x"}, {}, r"only 1 .md, 1 .pdf: give"),
        ({"a.txt": "", "b.txt": ""}, {}, "are empty"),
        ({"a.jsonl": '{"words": "x"}'}, {}, r"a.jsonl has no column 'text', only words: set --text_column"),
        ({"a.txt": "x"}, {"dataset_split": "test"}, "has the splits 'train', not 'test'"),
        ({"a.txt": "x"}, {"dataset_split": "train[:5]"}, "is a slice"),
        ({"a.txt": "x"}, {"max_bad_share": 5}, "--max_bad_share is 5"),
        ({"a.txt": "x"}, {"task_bytes": 0}, "--task_bytes is 0"),
    ],
)
def test_what_cannot_be_read_is_refused_before_any_work(files, options, message, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        plan_tasks(ReadArguments(dataset=str(tmp_path), **options))


def test_missing_input_is_told(tmp_path):
    for dataset in (tmp_path / "nothing.warc.gz", tmp_path / "*.txt"):
        with pytest.raises((FileNotFoundError, ValueError), match="no file"):
            plan_tasks(ReadArguments(dataset=str(dataset)))
