"""What a crawl has fetched, as WARC files: its output, and at the same time the cache from which it is resumed.

Scrapy asks a cache before the network. Here the cache is the archive itself, so a crawl that was killed, however hard,
begins again at its start URLs, is given what it has already, and goes on where that ends. (Scrapy's own JOBDIR loses
the requests that are under way when its process is killed.) A half-written record at the end of a file is cut off.
"""

import io
from pathlib import Path

import fastwarc.warc as warc
from fastwarc.stream_io import GzipWriter
from scrapy import Request, Spider
from scrapy.http import Headers, Response
from scrapy.responsetypes import responsetypes
from scrapy.settings import BaseSettings

from .warc_files import member_end

# Scrapy hands over the body of a message, not its transfer; its length is written anew.
NOT_KEPT = {b"transfer-encoding", b"content-length", b"connection"}
FILE_PATTERN = "crawl-*.warc.gz"


class WarcStore:
    """Scrapy's HTTPCACHE_STORAGE: writes into WARC_STORE_FOLDER files of about WARC_STORE_FILE_BYTES."""

    def __init__(self, settings: BaseSettings):
        self.folder = Path(settings["WARC_STORE_FOLDER"])
        self.file_bytes = settings.getint("WARC_STORE_FILE_BYTES")
        self.places: dict[str, tuple[Path, int]] = {}
        self.file = self.folder / FILE_PATTERN.replace("*", "00000")

    def open_spider(self, spider: Spider) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(self.folder.glob(FILE_PATTERN)):
            repair(file)
            with file.open("rb") as stream:
                for record in warc.ArchiveIterator(stream, record_types=warc.response, parse_http=False):
                    self.places[record.headers["WARC-Target-URI"]] = (file, record.stream_pos)
            self.file = file

    def close_spider(self, spider: Spider) -> None:
        """Nothing to do: every record is on disk when it is stored."""

    def retrieve_response(self, spider: Spider, request: Request) -> Response | None:
        place = self.places.get(request.url)
        if place is None or request.method != "GET":
            return None
        file, offset = place
        with file.open("rb") as stream:
            stream.seek(offset)
            record = next(iter(warc.ArchiveIterator(stream)))
            headers = Headers()
            for name, value in record.http_headers.items_bytes():
                headers.appendlist(name, value)
            body = record.reader.read()
        kind = responsetypes.from_args(headers=headers, url=request.url, body=body)
        return kind(url=request.url, status=record.http_headers.status_code, headers=headers, body=body)

    def store_response(self, spider: Spider, request: Request, response: Response) -> None:
        if self.file.exists() and self.file.stat().st_size >= self.file_bytes:
            number = int(self.file.name.split("-")[1].split(".")[0]) + 1
            self.file = self.folder / FILE_PATTERN.replace("*", f"{number:05d}")
        answer = record_of(warc.response, request.url, response_bytes(response))
        question = record_of(warc.request, request.url, request_bytes(request))
        question.headers["WARC-Concurrent-To"] = answer.record_id
        with self.file.open("ab") as file:
            offset = file.tell()
            # At once: a killed process leaves at most one record that is cut short.
            file.write(b"".join(map(packed, (answer, question))))
        self.places[request.url] = (self.file, offset)


def record_of(kind: warc.WarcRecordType, url: str, block: bytes) -> warc.WarcRecord:
    record = warc.WarcRecord()
    record.init_headers(kind)
    record.headers["WARC-Target-URI"] = url
    name = "response" if kind == warc.response else "request"
    record.headers["Content-Type"] = f"application/http; msgtype={name}"
    record.set_bytes_content(block)
    return record


def packed(record: warc.WarcRecord) -> bytes:
    """The record as a gzip member of its own."""
    buffer = io.BytesIO()
    writer = GzipWriter(buffer)
    record.write(writer)
    writer.finish()
    return buffer.getvalue()


def response_bytes(response: Response) -> bytes:
    start = b"HTTP/1.1 %d \r\n" % response.status
    length = b"Content-Length: %d\r\n" % len(response.body)
    return start + header_lines(response.headers) + length + b"\r\n" + response.body


def request_bytes(request: Request) -> bytes:
    path = request.url.split("/", 3)[3:] or [""]
    host = request.url.split("/")[2]
    start = f"{request.method} /{path[0]} HTTP/1.1\r\nHost: {host}\r\n".encode()
    return start + header_lines(request.headers) + b"\r\n"


def header_lines(headers: Headers) -> bytes:
    return b"".join(
        b"%b: %b\r\n" % (name, value)
        for name, values in headers.items()
        if name.lower() not in NOT_KEPT
        for value in values
    )


def repair(file: Path) -> None:
    """Cuts off what a killed process has left behind the last whole record."""
    size, end = file.stat().st_size, 0
    with file.open("r+b") as stream:
        while end < size and (after := member_end(stream, end)) is not None:
            end = after
        if end < size:
            stream.truncate(end)
