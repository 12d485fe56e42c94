"""The HTTP side of the local Hub: requests with their bodies, answers, and the faults that befall them."""

import io
import json
import re
import socket
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from local_hub_store import HubError, User

CHUNK = 2**20  # bytes

# What a fault does to a request, beside answering with a status.
BEFORE_BODY = "the connection ends before the body is read"
IN_BODY = "the connection ends in the middle of the body"
BEFORE_ANSWER = "the work is done, and the connection ends before the answer"
IN_ANSWER = "the connection ends in the middle of the answer's body"
LET_PASS = "nothing: for faults from the n-th request on"


@dataclass
class Fault:
    """Befalls the next `times` requests of `method` whose path (with its query) the regular expression is found in.

    Of several faults that match, the first in the queue is taken; one that is used up leaves the queue.
    """

    method: str
    path: str
    what: str | int  # one of the sentences above, or a status
    times: int = 1
    retry_after: int | None = None  # seconds


@dataclass
class Request:
    """A request that came in; `status` stays None where the connection ended before the answer began."""

    method: str
    path: str  # with its query, as sent
    headers: dict[str, str]
    status: int | None = None


@dataclass
class Answer:
    """`body` is sent as it is; a path is sent from its byte `start` on, `length` bytes of it."""

    status: int = 200
    body: bytes | Path = b""
    start: int = 0
    length: int = 0
    headers: dict[str, str] = field(default_factory=dict)


def as_json(value, status: int = 200, **headers: str) -> Answer:
    return Answer(status, json.dumps(value).encode(), headers={"Content-Type": "application/json", **headers})


def matches(request: Request, method: str, path: str) -> bool:
    return request.method == method and re.search(path, request.path) is not None


@dataclass
class Call:
    """A request while it is answered: with its body, in memory or, if it is a large file's, in a file."""

    request: Request
    body: bytes
    upload: Path | None
    user: User | None = None

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.request.path).query)

    def json(self) -> dict:
        try:
            return json.loads(self.body)
        except ValueError as error:
            raise HubError(400, "The request's body is not JSON.") from error


class FaultyServer(ThreadingHTTPServer):
    """Lets `answer` answer, except where a fault of the queue comes first.

    Args:
        answer: makes the answer to a request, or raises HubError.
        is_upload: whether a request's body belongs into a file that `new_file` names.

    Attributes:
        faults, requests: as in `LocalHub`.
        failures: tracebacks of what `answer` raised beside HubError; the client saw a status of 500.
    """

    def __init__(
        self, answer: Callable[[Call], Answer], is_upload: Callable[[Request], bool], new_file: Callable[[], Path]
    ):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.is_upload, self.new_file = answer, is_upload, new_file
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.failures: list[str] = []
        self._lock = threading.Lock()

    def next_fault(self, request: Request) -> Fault:
        """Records the request, and takes what befalls it from the queue."""
        with self._lock:
            self.requests.append(request)
            for fault in self.faults:
                if matches(request, fault.method, fault.path):
                    fault.times -= 1
                    if fault.times == 0:
                        self.faults.remove(fault)
                    return fault
        return Fault(request.method, request.path, LET_PASS)


class _Dropped(Exception):
    """The connection is to end here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else an answer's body waits for the acknowledgement of its headers
    server: FaultyServer

    def log_message(self, *arguments):
        pass

    def _serve(self):
        request = Request(self.command, self.path, {name.lower(): value for name, value in self.headers.items()})
        fault = self.server.next_fault(request)
        upload = self.server.new_file() if self.server.is_upload(request) else None
        try:
            call = Call(request, self._read_body(request, fault, upload), upload)
            answer = self._fault_answer(fault) if isinstance(fault.what, int) else self._answer(call)
            if fault.what == BEFORE_ANSWER:
                raise _Dropped
            self._send(request, answer, cut=fault.what == IN_ANSWER)
        except (_Dropped, ConnectionError):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        finally:
            if upload is not None:
                upload.unlink(missing_ok=True)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _read_body(self, request: Request, fault: Fault, upload: Path | None) -> bytes:
        """The body, or `b""` if it went into `upload`."""
        if fault.what == BEFORE_BODY:
            raise _Dropped
        length = int(request.headers.get("content-length", 0))
        left = length // 2 if fault.what == IN_BODY else length
        with io.BytesIO() if upload is None else upload.open("wb") as body:
            while left > 0:
                part = self.rfile.read(min(left, CHUNK))
                if not part:
                    raise _Dropped
                left -= body.write(part)
            if fault.what == IN_BODY:
                raise _Dropped
            return body.getvalue() if upload is None else b""

    def _fault_answer(self, fault: Fault) -> Answer:
        headers = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
        return as_json({"error": "This fault is part of a test."}, fault.what, **headers)

    def _answer(self, call: Call) -> Answer:
        try:
            return self.server.answer(call)
        except HubError as error:
            headers = {"X-Error-Message": error.message.replace("\n", " "), **error.headers}
            if error.code is not None:
                headers["X-Error-Code"] = error.code
            return as_json({"error": error.message}, error.status, **headers)
        except Exception:
            self.server.failures.append(traceback.format_exc())
            return as_json({"error": "The local Hub has failed; its `failures` say how."}, 500)

    def _send(self, request: Request, answer: Answer, cut: bool) -> None:
        length = answer.length if isinstance(answer.body, Path) else len(answer.body)
        request.status = answer.status
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if request.method != "HEAD":
            for part in _parts(answer, length // 2 if cut else length):
                self.wfile.write(part)
        if cut:
            raise _Dropped


def _parts(answer: Answer, length: int) -> Iterator[bytes]:
    if isinstance(answer.body, bytes):
        yield answer.body[:length]
        return
    with open(answer.body, "rb") as file:
        file.seek(answer.start)
        while length > 0:
            part = file.read(min(length, CHUNK))
            length -= len(part)
            yield part
