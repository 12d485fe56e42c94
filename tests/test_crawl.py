"""The spider, on a site of its own: what it fetches, what it leaves, and that a killed crawl loses nothing."""

import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from training.crawl import CrawlArguments
from training.text_pipeline.reading import ReadArguments, ReadDocuments

CRAWL = """
import json, sys
from training.crawl import CrawlArguments
from training.text_pipeline.spider import crawl
statistics = crawl(CrawlArguments(**json.loads(sys.argv[1])))
print(json.dumps({name: value for name, value in statistics.items() if isinstance(value, int | str)}))
"""


def page(*links, text="Some words."):
    return f"<html><body><p>{text}</p>{''.join(f'<a href={link!r}>x</a>' for link in links)}</body></html>".encode()


class Site:
    """A server in this process; `requests` are (seconds, path, user agent)."""

    def __init__(self, pages, robots="User-agent: *\nDisallow: /private/\n", wait=0.0):
        self.requests, site = [], self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                site.requests.append((time.monotonic(), self.path, self.headers["User-Agent"]))
                time.sleep(wait)
                status, headers, body = 404, {"Content-Type": "text/html"}, page("/from-404", text="Not here.")
                if self.path == "/robots.txt":
                    status, headers, body = 200, {"Content-Type": "text/plain"}, robots.encode()
                elif self.path in pages:
                    status, headers, body = pages[self.path]
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def paths(self):
        return [path for _, path, _ in self.requests if path != "/robots.txt"]


@pytest.fixture
def sites():
    opened = []

    def open_site(*arguments, **options):
        opened.append(Site(*arguments, **options))
        return opened[-1]

    yield open_site
    for site in opened:
        site.server.shutdown()


HTML = {"Content-Type": "text/html; charset=utf-8"}


def start(site, folder, **options):
    options = {
        "start_urls": [site.address + "/"],
        "contact": "tests@example.org",
        "output_dir": str(folder),
        "download_delay": 0.0,
    } | options
    command = [sys.executable, "-c", CRAWL, json.dumps(options)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)


def crawl(site, folder, **options):
    process = start(site, folder, **options)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return json.loads(output.splitlines()[-1])


def archived(folder):
    """{path: page} of all WARC files."""
    files = sorted(map(str, folder.glob("*.warc.gz")))
    documents = ReadDocuments([files], ReadArguments(dataset=str(folder))).run()
    return {"/" + document.metadata["url"].split("/", 3)[3]: document.metadata["raw"] for document in documents}


def test_what_is_fetched_and_what_is_left(sites, tmp_path):
    packed = gzip.compress(page("/deep"))
    other = sites({"/": (200, HTML, page())})
    site = sites(
        {
            "/": (
                200,
                HTML,
                page("/a", "/private/x", "/moved", "/loop", "/image", "/gone", "/away", other.address + "/"),
            ),
            "/a": (200, HTML | {"Content-Encoding": "gzip"}, packed),
            "/deep": (200, HTML, page("/deeper")),
            "/deeper": (200, HTML, page("/deepest")),
            "/private/x": (200, HTML, page()),
            "/moved": (301, {"Location": "/target"}, b""),
            "/target": (200, HTML, page("/", "/a")),
            "/loop": (302, {"Location": "/loop?again"}, b""),
            "/loop?again": (302, {"Location": "/loop"}, b""),
            "/image": (200, {"Content-Type": "image/png"}, b"\x89PNG" * 1000),
            "/away": (302, {"Location": other.address + "/away"}, b""),
        }
    )
    statistics = crawl(site, tmp_path, max_depth=3)
    fetched = archived(tmp_path)
    assert set(fetched) == {"/", "/a", "/target", "/deep", "/deeper"}
    assert fetched["/a"] == page("/deep")
    paths = site.paths()
    assert not {"/private/x", "/deepest", "/from-404"} & set(paths)
    assert len(paths) == len(set(paths))
    assert other.requests == []
    assert {agent for _, _, agent in site.requests} == {"hf_models (+tests@example.org)"}
    assert (statistics["robotstxt/forbidden"], statistics["bounds/no_text"], statistics["bounds/other_host"]) == (
        1,
        1,
        1,
    )
    assert statistics["finish_reason"] == "finished"


def chain(number):
    return {"/": (200, HTML, page("/1"))} | {
        f"/{i}": (200, HTML, page(f"/{i + 1}", text=f"Page {i}.")) for i in range(1, number)
    }


def test_delays_of_the_command_and_of_robots_txt_are_kept(sites, tmp_path):
    quick = sites(chain(4))
    slow = sites(chain(4), robots="User-agent: *\nCrawl-delay: 0.7\n")
    crawls = [
        start(site, tmp_path / str(delay), download_delay=delay, max_pages=3, max_depth=9)
        for site, delay in ((quick, 0.3), (slow, 0.1))
    ]
    for process in crawls:
        process.communicate(timeout=120)
    for site, delay in ((quick, 0.3), (slow, 0.7)):
        assert site.paths() == ["/", "/1", "/2"]
        times = [seconds for seconds, path, _ in site.requests if path != "/robots.txt"]
        assert times[-1] - times[0] > 2 * delay * 0.9  # a busy machine may note the first of them late


def test_killed_crawl_goes_on_and_fetches_nothing_twice(sites, tmp_path):
    pages = chain(12)
    site = sites(pages, wait=0.1)
    options = {"max_depth": 50, "warc_file_bytes": 1500}
    process = start(site, tmp_path, **options)
    while len(site.requests) < 6:
        time.sleep(0.02)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    # As if it had been killed in the middle of a record.
    last = sorted(tmp_path.glob("*.warc.gz"))[-1]
    with last.open("ab") as file:
        file.write(gzip.compress(b"WARC/1.0\r\nWARC-Type: response\r\nContent-Length: 9999\r\n")[:40])
    before = archived(tmp_path)
    assert 2 <= len(before) < len(pages)
    site.requests.clear()
    statistics = crawl(site, tmp_path, **options)
    after = archived(tmp_path)
    assert {path: body for path, (_, _, body) in pages.items()} == after
    assert not set(before) & set(site.paths())
    assert statistics["httpcache/hit"] == len(before)
    reader = ReadDocuments([sorted(map(str, tmp_path.glob("*.warc.gz")))], ReadArguments(dataset=str(tmp_path)))
    list(reader.run())
    assert reader.tally.bad_inputs == []
    assert len(list(tmp_path.glob("*.warc.gz"))) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--start_urls is empty"),
        ({"start_urls": ["example.org"]}, "has 'example.org': give whole addresses"),
        ({"start_urls": ["https://example.org"]}, "--contact is None: give an e-mail address"),
        ({"start_urls": ["https://example.org"], "contact": "me"}, "--contact is 'me'"),
        ({"start_urls": ["https://a.org"], "contact": "a@b.org", "max_pages": 0}, "--max_pages is 0: give 1 or more"),
    ],
)
def test_arguments_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CrawlArguments(**options)
