import html
import json
import os
import re
from datetime import datetime
from html.parser import HTMLParser

import pytest
from chromium import complaints, open_chromium
from datatrove.data import Document
from huggingface_hub import DatasetCard

from benchmarks.text_projection import ccnet_hours, project
from training.text_pipeline.document_files import ParquetDocuments
from training.text_pipeline.report import WriteReport, bad_inputs, wall_seconds
from training.text_pipeline.report_page import card_metadata, histogram, histograms, visible
from training.text_pipeline.tally import Tally, power_of_two_bin

STAGES = [
    {"stage": "read", "phase": "1_read", "kind": "documents", "what": "Reads rows of text."},
    {"stage": "put_down", "phase": "1_read", "kind": "work", "what": "Writes the documents for the next phase."},
    {"stage": "short_lines", "phase": "2_filter", "kind": "documents", "what": "Drops lines that occurred before."},
    {"stage": "language", "phase": "2_filter", "kind": "documents", "what": "Keeps English."},
    {"stage": "write", "phase": "2_filter", "kind": "documents", "what": "Writes parquet."},
]
HARDWARE = {"cpu": "A processor", "cores": 2, "memory_gib": 7.8, "accelerators": [], "processes": 1}
HOSTILE = [
    "<script>document.title = 'taken'</script>",
    '<img src="http://192.0.2.1/x.png" onerror="document.title = \'taken\'">',
    "</pre></details><h1>Free</h1>{{ 7 * 7 }}{% raw %}",
    "\u202eevil\u2066 \x00\x07\x1b[31m\x85 \udce9",
    "w" * 1000,
    "مرحبا بالعالم\nשלום",
    "\n\nstarts with empty lines",
]


def document(i, text, **metadata):
    return Document(id=f"row-{i}", text=text, metadata={"url": f"https://host{i % 3}.example/{i}"} | metadata)


def size(document):
    return len(document.text.encode("utf-8", "surrogatepass"))


def tallies_of(rank, documents=30):
    """Task `rank` of a run of STAGES: of 30 documents, 5 are too short and 6 in another language."""
    tallies = {stage["stage"]: Tally(stage["stage"]) for stage in STAGES}
    read, lines, language, write = (tallies[name] for name in ("read", "short_lines", "language", "write"))
    read.bytes_in = 10_000
    read.bad(f"crawl/{rank}.warc.gz", 17, "truncated gzip")
    for i in range(rank * documents, (rank + 1) * documents):
        one = document(i, HOSTILE[i % len(HOSTILE)] + f" {i}\nNavigation\n" + "x" * i)
        read.leaves(one, size(one))
        lines.enters(size(one))
        if i % documents < 5:
            lines.drops(one, size(one), "short <b>")
            continue
        before, old = one.text, size(one)
        one.text = one.text.replace("Navigation\n", "")
        assert size(one) < old
        lines.leaves(one, size(one), before)
        language.enters(size(one))
        label = "fr" if i % 5 == 1 or i % documents == 7 else "en"
        language.histograms["languages"][label] += 1
        if label == "fr":
            language.drops(one, size(one), "other language")
            continue
        language.leaves(one, size(one))
        write.enters(size(one))
        write.leaves(one, size(one))
        write.histograms["languages"]["en"] += 1
    for tally in tallies.values():
        tally.seconds = 2.0
    return tallies


def save_tallies(folder):
    """Of a run of two tasks."""
    for rank in range(2):
        for name, tally in tallies_of(rank).items():
            tally.save(folder / "tallies" / name / f"{rank:05d}.json")


@pytest.fixture
def run(tmp_path):
    """The working folder of a run of two tasks, and its output folder."""
    save_tallies(tmp_path / "work")
    return tmp_path / "work", tmp_path / "out"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The output folder of such a run, with its report, which no test changes."""
    folder = tmp_path_factory.mktemp("run")
    save_tallies(folder / "work")
    write_report(folder / "work", folder / "out", execution={"workers": 1})
    return folder / "out"


def read_report(folder):
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def write_report(work, output, stages=STAGES, **facts):
    WriteReport(work, output, stages, {"name": "texts", "input": {"source": "crawl"}} | facts).run()
    return read_report(output)


def test_the_numbers_are_the_sums_over_the_tasks(written):
    report = read_report(written)
    parts = [tallies_of(rank) for rank in range(2)]
    stages = {stage["stage"]: stage for stage in report["stages"]}
    for name in ("short_lines", "language", "write"):
        for field in ("documents_in", "bytes_in", "documents_out", "bytes_out"):
            assert stages[name][field] == sum(getattr(part[name], field) for part in parts), (name, field)
    # 2 tasks x 30 documents, of which 5 are short; of the other 25, one in five and the seventh are French.
    assert (report["documents_in"], report["documents_out"]) == (60, 60 - 10 - 12)
    assert stages["short_lines"]["dropped"]["short <b>"]["documents"] == 10
    assert report["languages"] == {"en": {"identified": 38, "kept": 38}, "fr": {"identified": 12, "kept": 0}}
    assert report["bad_inputs"]["reasons"] == {"truncated gzip": 2}
    assert report["bad_inputs"]["named"][1] == {"file": "crawl/1.warc.gz", "offset": 17, "reason": "truncated gzip"}
    assert "documents_in" not in stages["put_down"]
    timing = report["timing"]
    assert timing["core_seconds"] == 2 * 2.0 * len(STAGES)
    assert timing["stages"]["language"]["documents_per_second"] == 50 / 4.0
    assert timing["documents_per_core_second"] == 60 / 20.0


def test_a_histogram_of_sizes_counts_every_document_in_its_power_of_two(written):
    report = read_report(written)
    for stage in report["stages"]:
        if stage["kind"] == "documents":
            assert sum(stage["histograms"]["bytes_out"].values()) == stage["documents_out"]
            least = sum(int(edge) * n for edge, n in stage["histograms"]["bytes_out"].items())
            assert least <= stage["bytes_out"] < 2 * least
    rows = histogram("Length", {"a": {"0": 1, "4": 2}, "b": {"32": 1}})["rows"]
    assert [edge for edge, _ in rows] == ["0", "1", "2", "4", "8", "16", "32"]
    assert rows[3] == ("4", [2, 0])


def test_all_but_timing_is_the_same_however_fast_the_run(written, run):
    work, output = run
    for file in (work / "tallies").glob("*/*.json"):
        tally = Tally.load(file)
        tally.seconds *= 17
        tally.save(file)
    report, again = read_report(written), write_report(work, output, execution={"workers": 2}, hardware=HARDWARE)
    assert report.pop("timing") != again.pop("timing")
    assert json.dumps(report) == json.dumps(again)
    for picture in ("funnel.png", "length.png"):
        first, second = (folder / "card_assets" / picture for folder in (written, output))
        assert first.read_bytes() == second.read_bytes()


def test_a_document_lost_between_two_stages_is_an_error_with_the_stages_name(run):
    work, output = run
    file = work / "tallies" / "language" / "00001.json"
    tally = Tally.load(file)
    tally.documents_in -= 1
    tally.save(file)
    with pytest.raises(ValueError, match=r"The stage language was given 49 documents, but short_lines .* 50"):
        write_report(work, output)
    tally.documents_in += 1
    tally.documents_out -= 1
    tally.save(file)
    with pytest.raises(ValueError, match=r"The stage language .* 1 are unaccounted for"):
        write_report(work, output)
    file.unlink()
    (work / "tallies" / "language" / "00000.json").unlink()
    with pytest.raises(ValueError, match="The stage language left no tally"):
        write_report(work, output)
    assert not output.exists()


class Elements(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen, self.attributes, self.texts, self.in_pre = [], [], [], False

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attributes]
        if tag == "pre":
            self.in_pre = True
            self.texts.append("")

    def handle_endtag(self, tag):
        self.in_pre = self.in_pre and tag != "pre"

    def handle_data(self, data):
        if self.in_pre:
            self.texts[-1] += data


def test_hostile_texts_are_shown_and_do_nothing(run):
    work, output = run
    evil = document(0, "short", url="javascript:alert(1)")
    file = work / "tallies" / "short_lines" / "00000.json"
    tally = Tally.load(file)
    tally.samples["dropped"][0] |= {"url": evil.metadata["url"], "id": "<i>id</i>"}
    tally.save(file)
    write_report(work, output)
    page = (output / "report.html").read_text(encoding="utf-8")
    elements = Elements()
    elements.feed(page)
    assert not {"script", "img", "a", "iframe", "link", "b"} & set(elements.seen)
    assert not [
        attribute for attribute in elements.attributes if attribute[1].startswith("on") or attribute[1] == "href"
    ]
    assert "javascript:alert(1)" in page
    assert "&lt;i&gt;id&lt;/i&gt;" in page
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", page)
    shown = "\n".join(elements.texts)
    for text in HOSTILE:
        assert visible(text) in shown
    # HTML drops the first line break of a <pre>: the page has one more than the text.
    assert any(text.startswith("\n\n\nstarts with") for text in elements.texts)
    assert html.escape("short <b>") in page


def test_visible_leaves_scripts_of_all_languages_as_they_are():
    for text in ("naïve façade", "מילה", "ภาษาไทย", "क्षेत्र", "👩‍👩‍👧", "a\tb\nc"):
        assert visible(text) == text
    assert visible("a\x00\r\u202eb") == "a␀␍\ufffdb"


def test_every_table_has_headers_and_every_picture_a_text(written):
    page = (written / "report.html").read_text(encoding="utf-8")
    for table in re.findall(r"<table.*?</table>", page, re.DOTALL):
        assert "<thead><tr><th scope=" in table
    assert re.findall(r"!\[[^\]]{20,}\]\(card_assets/\w+\.png\)", (written / "README.md").read_text(encoding="utf-8"))


def test_the_card_loads_on_the_hub_and_shows_no_samples(run):
    work, output = run
    note = "Positives: encyclopedia leads, standing in for pages that an encyclopedia cites."
    model = {"stage": "language", "path": "models/lid.ftz", "note": note}
    write_report(work, output, models=[model], license="cc-by-sa-4.0", arguments={"languages": ["en"]})
    card = DatasetCard.load(output / "README.md")
    assert card.data.license == "cc-by-sa-4.0"
    assert card.data.language == ["en"]
    assert card.data.size_categories == ["n<1K"]
    assert card.data.configs[0]["data_files"] == [{"split": "train", "path": "documents/*.parquet"}]
    assert note in card.text
    assert "Navigation" not in card.text
    assert "host1.example" not in card.text
    for picture in re.findall(r"\((card_assets/.*?)\)", card.text):
        assert (output / picture).stat().st_size < 100_000


def test_an_unknown_licence_is_other_with_a_name(written):
    data = card_metadata(read_report(written) | {"license": "House licence 2"})
    assert (data.license, data.license_name) == ("other", "house-licence-2")


def test_a_run_that_keeps_nothing_is_reported(tmp_path):
    stages = [STAGES[0], STAGES[-1]]
    for stage in stages:
        Tally(stage["stage"]).save(tmp_path / "tallies" / stage["stage"] / "00000.json")
    report = write_report(tmp_path, tmp_path / "out", stages)
    assert report["documents_out"] == 0
    assert (tmp_path / "out" / "report.html").is_file()


def tokenised(stages, sources):
    """The stages with those that make token shards, and their tallies."""
    last, plan = Tally("tokenise"), Tally("plan_mixture")
    last.documents_in = last.documents_out = sum(documents for documents, _ in sources.values())
    last.bytes_in = last.bytes_out = 1000
    for name, (documents, tokens) in sources.items():
        plan.counts |= {f"documents: {name}": documents, f"tokens: {name}": tokens}
    phase = {"phase": "tokens", "what": ""}
    more = [{"stage": "tokenise", "kind": "documents"}, {"stage": "plan_mixture", "kind": "work"}]
    more.append({"stage": "token_shards", "kind": "work"})
    return stages + [stage | phase for stage in more], [last, plan, Tally("token_shards")]


def test_tokens_behind_the_documents_change_no_other_figure(written, run):
    work, output = run
    before = read_report(written)
    stages, tallies = tokenised(STAGES, {"documents": (before["documents_out"], 12_345)})
    for tally in tallies:
        tally.save(work / "tallies" / tally.stage / "00000.json")
    report = write_report(work, output, stages)
    assert report["languages"] == before["languages"]
    lengths = [histograms(one)[0]["rows"] for one in (report, before)]
    assert lengths[0] == lengths[1]
    card = DatasetCard.load(output / "README.md")
    paths = [config["data_files"][0]["path"] for config in card.data.to_dict()["configs"]]
    assert paths == ["documents/*.parquet", "tokens/*.parquet"]
    assert card.data.language == ["en"]
    assert f"| documents | {before['documents_out']} | 12,345 | 100.0% |" in card.text


def test_the_card_of_a_mixture_tells_the_tokens_of_its_sources(tmp_path):
    stages, tallies = tokenised([], {"<b>web": (30, 3000), "books": (10, 1000)})
    for tally in tallies:
        tally.save(tmp_path / "tallies" / tally.stage / "00000.json")
    write_report(tmp_path, tmp_path / "out", stages)
    card = DatasetCard.load(tmp_path / "out" / "README.md")
    assert [config["data_files"][0]["path"] for config in card.data.to_dict()["configs"]] == ["tokens/*.parquet"]
    assert "documents/*.parquet" not in card.text
    assert "4,000 tokens of 2 sources" in card.text
    assert "| books | 10 | 1,000 | 25.0% |" in card.text
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<td>3,000</td><td>75.0%</td>" in page
    assert "<b>web" not in page


def test_the_languages_of_what_is_written_are_counted(tmp_path):
    step = ParquetDocuments(tmp_path / "documents")
    rows = [document(i, "text", language="en" if i % 4 else "de") for i in range(8)]
    list(step.run(rows))
    assert step.tally.histograms["languages"] == {"en": 6, "de": 2}


def test_time_by_the_clock_is_when_any_task_ran(tmp_path):
    """Tasks from 0 s to 10 s, 5 s to 20 s, and after a pause 100 s to 101 s: 21 s."""
    start = 1_700_000_000
    for rank, (began, ended) in enumerate([(0, 10), (5, 20), (100, 101)]):
        log = tmp_path / "logs" / f"task_{rank:05d}.log"
        mark = tmp_path / "completions" / f"{rank:05d}"
        for file in (log, mark):
            file.parent.mkdir(exist_ok=True)
        log.write_text(f"{datetime.fromtimestamp(start + began):%Y-%m-%d %H:%M:%S.000} | INFO | began\nmore\n")
        mark.touch()
        os.utime(mark, (start + ended,) * 2)
    assert wall_seconds(tmp_path) == 21.0
    assert wall_seconds(tmp_path / "none") is None


@pytest.mark.parametrize("value", [0, 0.99, 1, 1.5, 2, 3, 1023, 1024, 1024.5, 2**40 - 1, 2**40])
def test_a_bin_begins_at_its_name_and_ends_at_twice_it(value):
    edge = int(power_of_two_bin(value))
    assert edge <= value < (2 * edge or 1)


def test_bad_inputs_count_all_and_name_the_first():
    tallies = [Tally("read"), Tally("extract")]
    for i in range(150):
        tallies[0].bad("a.warc", i, "malformed HTTP")
    tallies[1].bad("b.html", 0, "wrong charset")
    found = bad_inputs(tallies)
    assert (found["count"], list(found["reasons"].items())) == (151, [("malformed HTTP", 150), ("wrong charset", 1)])
    assert [bad["offset"] for bad in found["named"]] == list(range(100))


def test_a_projection_is_a_rule_of_three(written):
    report = read_report(written)
    report["stages"][2] |= {"stage": "hash_lines", "counts": {"lines": 120}}
    projection = project(report, documents=6_000_000, shards=1600, shards_per_group=16)
    # 60 documents took 4 s of each of five stages; 100,000 times as many take 400,000 s of each.
    assert projection.total_core_hours == pytest.approx(5 * 400_000 / 3600)
    assert projection.wall_hours(100) == pytest.approx(5 * 4000 / 3600)
    assert projection.lines == 12_000_000
    assert projection.group_hashes == 120_000
    assert projection.phase_bytes["1_read"] == pytest.approx(report["stages"][0]["bytes_out"] * 100_000)
    # One stage had one task where the others had two: it is not shared.
    report["stages"][1]["tasks"] = 1
    serial = project(report, documents=6_000_000, shards=1600, shards_per_group=16)
    assert serial.wall_hours(100) == pytest.approx((400_000 + 4 * 4000) / 3600)
    assert ccnet_hours(144_000) == 1.0  # 40 a second
    with pytest.raises(ValueError, match="shards_per_group is 0"):
        project(report, documents=1, shards=2, shards_per_group=0)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (360, "dark")])
def test_the_page_fits_a_browser_and_asks_for_nothing(written, tmp_path, width, scheme):
    browser = open_chromium(tmp_path / "profile", width)
    try:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        browser.get((written / "report.html").as_uri())
        browser.execute_script("document.querySelectorAll('details').forEach(one => one.open = true)")
        assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
        assert browser.title == "texts: report of the text pipeline"
        requests = browser.execute_script("return performance.getEntriesByType('resource').length")
        assert (requests, complaints(browser)) == (0, [])
        page = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (page == "rgb(255, 255, 255)") == (scheme == "light")
    finally:
        browser.quit()
