"""Reads web archives: pages from WARC files, text from WET files; packed with gzip or zstd, or not.

FastWARC reads the records. What it does not do is to go on after damage, so here a damaged record is counted and
reading begins again at the next member of the archive (or the next record header, where the file is not packed). It
also takes the end of a truncated file for a proper end; here the lengths in the headers are compared with what came.
The offset that is told of a record is the one that archive indexes use: of its member in the file, as it lies on disk.
"""

import io
import re
import zlib
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import BinaryIO

import fastwarc.warc as warc
from datatrove.data import Document
from fastwarc.stream_io import BrotliReader, ChunkedReader, GzipReader

from .stage import RAW
from .tally import Tally

HTML_TYPES = {"text/html", "application/xhtml+xml"}
CHUNK = 1 << 20  # bytes
MAX_HEADER = 32 << 10  # bytes: FastWARC's own limit
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5"
PACKINGS = {".gz": GZIP, ".zst": ZSTD}
# How a record begins, by the first two bytes of the file; the last is that of files that are not packed.
RECORD_STARTS = {
    GZIP: rb"\x1f\x8b\x08[\x00\x04\x08]",
    ZSTD: rb"\x28\xb5\x2f\xfd",
    b"": rb"(?<=\r\n\r\n)WARC/1\.\d\r\n",
}
CONTENT_DECODERS = {
    "gzip": GzipReader,
    "x-gzip": GzipReader,
    "deflate": lambda stream: GzipReader(stream, zlib=True),
    "br": BrotliReader,
    "chunked": ChunkedReader,
}


def read_warc(path: Path, name: str, max_record_bytes: int, tally: Tally) -> Iterator[Document]:
    """HTML pages of `response` records with status 200, as bytes, and the texts of `conversion` records.

    Other records are counted as `other records`, damaged ones as bad, at the offset of their member.
    """
    for offset, record, block in read_records(path, name, max_record_bytes, tally):
        if record.record_type == warc.response and record.is_http:
            document = page(record, block, max_record_bytes)
        elif record.record_type == warc.conversion:
            document = converted_text(record, block)
        else:
            document = None
        if isinstance(document, str):
            tally.bad(name, offset, document)
        elif document is None:
            tally.counts["other records"] += 1
        else:
            document.metadata |= {"file": name, "offset": offset}
            document.id = record.record_id or f"{name}/{offset}"
            yield document


def page(record: warc.WarcRecord, block: bytes, max_record_bytes: int) -> Document | str | None:
    """The page of a `response` record; why it cannot be read; or None where it is no page."""
    headers = warc.HeaderMap()
    try:
        body = block[headers.parse(io.BytesIO(block)) :]
    except OSError:
        return "malformed HTTP header"
    if headers.status_code is None or (not body and b"\r\n\r\n" not in block):
        return "malformed HTTP header"
    content_type = Message()
    content_type["Content-Type"] = headers.get("Content-Type") or ""
    if headers.status_code != 200 or not is_html(record, headers, content_type.get_content_type(), body):
        return None
    if record.content_length > len(block):
        return "record above max_record_bytes"
    try:
        raw = decode_content(body, headers, max_record_bytes + 1)
    except OSError:
        return "damaged content encoding"
    if len(raw) > max_record_bytes:
        return "record above max_record_bytes"
    metadata = record_metadata(record) | {RAW: raw}
    if charset := content_type.get_param("charset"):
        metadata["charset"] = str(charset)
    if language := headers.get("Content-Language"):
        metadata["language_hint"] = language.split(",")[0].strip()
    return Document(text="", id="", metadata=metadata)


def is_html(record: warc.WarcRecord, headers: warc.HeaderMap, content_type: str, body: bytes) -> bool:
    if identified := record.headers.get("WARC-Identified-Payload-Type"):  # Common Crawl's, from the content itself
        return identified.lower() in HTML_TYPES
    if headers.get("Content-Type"):
        return content_type in HTML_TYPES
    return re.search(rb"<(?:!doctype\s+html|html)\b", body[:1024], re.IGNORECASE) is not None


def decode_content(body: bytes, headers: warc.HeaderMap, size: int) -> bytes:
    """The first `size` bytes of the page, unpacked as its HTTP headers say; OSError where they do not say the truth."""
    encodings = headers.get("Content-Encoding") or ""
    transfer = headers.get("Transfer-Encoding") or ""
    decoders = [CONTENT_DECODERS.get(name.strip().lower()) for name in f"{encodings},{transfer}".split(",")]
    if not any(decoders):
        return body
    stream = io.BytesIO(body)
    for decoder in reversed(list(filter(None, decoders))):  # applied in the order in which they are named
        stream = decoder(stream)
    return stream.read(size)


def converted_text(record: warc.WarcRecord, block: bytes) -> Document | str:
    if record.content_length > len(block):
        return "record above max_record_bytes"
    try:
        text = block.decode("utf-8")
    except UnicodeDecodeError:
        return "not UTF-8"
    if "\0" in text:
        return "NUL bytes"
    metadata = record_metadata(record)
    if language := record.headers.get("WARC-Identified-Content-Language"):
        metadata["language_hint"] = language.split(",")[0].strip()
    return Document(text=text, id="", metadata=metadata)


def record_metadata(record: warc.WarcRecord) -> dict[str, str]:
    values = {"url": record.headers.get("WARC-Target-URI"), "date": record.headers.get("WARC-Date")}
    return {name: value.strip("<>") for name, value in values.items() if value}


def read_records(
    path: Path, name: str, max_record_bytes: int, tally: Tally
) -> Iterator[tuple[int, warc.WarcRecord, bytes]]:
    """(offset, record, its block) of every record that is whole; of a longer block the first `max_record_bytes`."""
    counted = -1  # the offset of the damage counted last: what is tried again and fails again is one
    with path.open("rb") as file:
        # Also by the name, since it may be the first bytes that are damaged.
        packing = PACKINGS.get(path.suffix.lower()) or file.read(2)
        packing = packing if packing in RECORD_STARTS else b""
        start: int | None = 0
        while start is not None:
            file.seek(start)
            offset, whole, ended, reason = start, None, False, "damaged record"
            try:
                for record in warc.ArchiveIterator(file, parse_http=False):
                    offset, whole = record.stream_pos, None
                    block = record.reader.read(min(record.content_length, max_record_bytes))
                    if problem := check_record(record, block, max_record_bytes):
                        reason = problem
                        break
                    whole = record.content_length
                    yield offset, record, block
                else:
                    ended, reason = True, "truncated record"
            except OSError:
                pass
            # Where the record at `offset` was read to its end, the damage is behind it.
            place = offset if whole is None else record_end(file, packing, offset, whole)
            start = find(file, re.compile(RECORD_STARTS[packing]), max(place, offset + 1))
            if ended and whole is not None and start is None:
                return
            if place != counted:
                tally.bad(name, place, reason)
                counted = place


def check_record(record: warc.WarcRecord, block: bytes, max_record_bytes: int) -> str | None:
    if record.headers.get("Content-Length") != str(record.content_length) or not record.headers.get("WARC-Type"):
        return "malformed WARC record"
    return "truncated record" if len(block) < min(record.content_length, max_record_bytes) else None


def record_end(file: BinaryIO, packing: bytes, offset: int, content_length: int) -> int:
    """Where the record ends that begins at `offset`; where that cannot be told, an offset in it."""
    if packing == GZIP:
        return member_end(file, offset) or offset
    if packing == ZSTD:
        return find(file, re.compile(RECORD_STARTS[ZSTD]), offset + 1) or offset
    file.seek(offset)
    header = file.read(MAX_HEADER).find(b"\r\n\r\n") + 4
    return offset + header + content_length + 4


def member_end(file: BinaryIO, offset: int) -> int | None:
    """Where the gzip member that begins at `offset` ends; None where the file ends before, or none begins there."""
    unpacker = zlib.decompressobj(16 + zlib.MAX_WBITS)
    file.seek(offset)
    packed = b""
    try:
        while not unpacker.eof:
            packed = unpacker.unconsumed_tail or file.read(CHUNK)
            if not packed:
                return None
            unpacker.decompress(packed, CHUNK)
    except zlib.error:
        return None
    return file.tell() - len(unpacker.unused_data)


def find(file: BinaryIO, pattern: re.Pattern[bytes], start: int) -> int | None:
    """The offset at which `pattern` matches next, from `start` on; it may look back four bytes."""
    skip = min(start, 4)
    file.seek(start - skip)
    overlap = b""
    while chunk := file.read(CHUNK):
        window = overlap + chunk
        if match := pattern.search(window, skip):
            return file.tell() - len(window) + match.start()
        overlap = window[-16:]
        skip = min(len(overlap), 4)
    return None
