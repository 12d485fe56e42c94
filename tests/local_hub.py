"""A Hub on this machine, over real HTTP, for tests of what is published and of what is read back.

It answers what huggingface_hub's own client asks for when it makes a repository, uploads to it (preupload, Git LFS in
one part or several, commits, pull requests), lists it and downloads from it, and it refuses what the Hub refuses. Large
files come from a second origin ("localhost" beside "127.0.0.1") by signed addresses that take no token, as from the
Hub's storage. Models and Spaces only; Xet, tags, .gitignore and paging of long listings are not here.

    def test_it(local_hub):  # a fixture of conftest.py
        local_hub.api.create_repo("user/name")
        local_hub.faults.append(Fault("PUT", "/upload/", 503, times=2))  # from local_hub_http import Fault
        ...
        subprocess.run([...], env=local_hub.environment(tmp_path))

A client of this server needs `HF_HUB_DISABLE_XET`: the fixture and `environment` see to it.
"""

import base64
import json
import os
import re
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import HfApi
from local_hub_http import (
    Answer,
    Call,
    FaultyServer,
    Request,
    as_json,
    matches,
)
from local_hub_store import (
    MAIN,
    Blob,
    BlobStore,
    Discussion,
    HubError,
    Repo,
    User,
    card_metadata,
    check_repo_id,
    pointer_size,
    upload_mode,
)

TOKEN = "hf_owner"  # of "user", a member of "team"
STRANGERS_TOKEN = "hf_stranger"  # of "stranger"
READING_TOKEN = "hf_reader"  # of "user" again, with the right to read only
DISCUSSIONS_A_PAGE = 10


@dataclass
class Upload:
    """What a signed address takes: an LFS object of a repository, or numbered parts of it."""

    repo: Repo
    sha256: str
    size: int
    part_size: int | None
    parts: dict[int, Path] = field(default_factory=dict)

    def expected_size(self, part: int) -> int:
        return self.size if self.part_size is None else min(self.part_size, self.size - (part - 1) * self.part_size)


KINDS = {"models": "model", "spaces": "space"}
API_REPO = r"/api/(?P<kind>models|spaces)/(?P<repo>[^/]+/[^/]+)"
PAGE_REPO = r"/((?P<kind>spaces)/)?(?P<repo>[^/]+/[^/]+)"
ROUTES: list[tuple[str, re.Pattern, str]] = []  # method, path, name of the method of LocalHub


def route(method: str, path: str):
    def register(function):
        ROUTES.append((method, re.compile(path), function.__name__))
        return function

    return register


class LocalHub:
    """The server; a context manager that serves from entry to exit.

    Attributes:
        endpoint: its address.
        api: an `HfApi` for it, as the owner.
        faults: the queue of faults to come.
        requests: every request so far, in the order of arrival.
        failures: tracebacks of failures of this server itself; the fixture lets no test pass with one.
        multipart_size: LFS objects of more bytes are asked for in parts of so many; None for single parts.
        waits: seconds that this process's client would have slept between its tries (the fixture lets it go on).
    """

    def __init__(self, folder: Path):
        self.blobs = BlobStore(folder)
        self.repos: dict[tuple[str, str], Repo] = {}
        self.users = {
            TOKEN: User("user", organisations=("team",)),
            READING_TOKEN: User("user", role="read"),
            STRANGERS_TOKEN: User("stranger"),
        }
        self.waits: list[float] = []
        self.multipart_size: int | None = None
        self._lock = threading.Lock()
        self._uploads: dict[str, Upload] = {}
        self._downloads: dict[str, Blob] = {}
        self._server = FaultyServer(
            self.answer, lambda request: request.path.startswith("/upload/"), self.blobs.new_file
        )
        self.faults, self.requests, self.failures = self._server.faults, self._server.requests, self._server.failures
        port = self._server.server_port
        self.endpoint, self.storage = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
        self.api = HfApi(endpoint=self.endpoint, token=TOKEN)

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self._server.shutdown()
        self._server.server_close()

    # What tests look at.

    def repo(self, repo_id: str, kind: str = "model") -> Repo:
        return self.repos[kind, repo_id]

    def sent(self, method: str, path: str) -> list[Request]:
        """The requests of `method` whose path the regular expression is found in."""
        return [request for request in list(self.requests) if matches(request, method, path)]

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """For a fresh process: this server as its Hub, caches and remote code under `home`, `token` logged in."""
        left_out = ("HF_HUB_CACHE", "HF_MODULES_CACHE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "TRANSFORMERS_OFFLINE")
        environment = {name: value for name, value in os.environ.items() if name not in left_out}
        environment |= {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        return environment | ({"HF_TOKEN": token} if token else {})

    # Who may do what.

    def user(self, headers: dict[str, str]) -> User | None:
        authorization = headers.get("authorization")
        if authorization is None:
            return None
        user = self.users.get(authorization.removeprefix("Bearer "))
        if user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return user

    def visible_repo(self, call: Call, kind: str, repo_id: str) -> Repo:
        """The repository, or the same error whether it doesn't exist or isn't shown to this user."""
        repo = self.repos.get((kind, repo_id))
        if repo is None or (repo.private and not (call.user and call.user.owns(repo.namespace))):
            if call.user is None:
                raise HubError(401, "Invalid username or password.", "RepoNotFound")
            raise HubError(404, "Repository not found", "RepoNotFound")
        return repo

    def check_writer(self, call: Call, namespace: str, own: bool = True) -> User:
        """Refuses a user without the right to write, and with `own`, one to whom the namespace doesn't belong."""
        if call.user is None:
            raise HubError(401, "Invalid username or password.")
        if call.user.role != "write" or (own and not call.user.owns(namespace)):
            raise HubError(403, f'You don\'t have the rights to write under the namespace "{namespace}".')
        return call.user

    # What it answers.

    def answer(self, call: Call) -> Answer:
        path = urlsplit(call.request.path).path
        for method, pattern, name in ROUTES:
            match = pattern.fullmatch(path)
            if match and method == call.request.method:
                parts = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                with self._lock:
                    if not name.startswith("storage_"):
                        call.user = self.user(call.request.headers)
                    elif "authorization" in call.request.headers:
                        raise HubError(400, "Only one way of authorization is allowed: the address is signed.")
                    if "repo" in parts:
                        kind = KINDS[parts.pop("kind", "models")]
                        parts["repo"] = self.visible_repo(call, kind, parts["repo"])
                    return getattr(self, name)(call, **parts)
        raise HubError(404, f"Nothing answers {call.request.method} {path} here.")

    @route("GET", "/api/whoami-v2")
    def whoami(self, call):
        if call.user is None:
            raise HubError(401, "Invalid username or password.")
        return as_json(
            {
                "type": "user",
                "name": call.user.name,
                "fullname": call.user.name,
                "orgs": [{"type": "org", "name": name} for name in call.user.organisations],
                "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": call.user.role}},
            }
        )

    @route("POST", "/api/repos/create")
    def create_repo(self, call):
        wish = call.json()
        namespace = wish.get("organization") or (call.user and call.user.name)
        repo_id, kind = f"{namespace}/{wish['name']}", wish.get("type") or "model"
        user = self.check_writer(call, namespace)
        check_repo_id(repo_id)
        if kind == "space" and wish.get("sdk") not in ("gradio", "docker", "static"):
            raise HubError(400, "A Space needs an sdk.")
        prefix = "" if kind == "model" else f"{kind}s/"
        where = {"url": f"{self.endpoint}/{prefix}{repo_id}", "name": repo_id}
        if (kind, repo_id) in self.repos:
            return as_json({"error": f"You already created this {kind} repo", **where}, 409)
        private = wish.get("visibility") == "private" or bool(wish.get("private"))
        self.repos[kind, repo_id] = Repo(kind, repo_id, private, self.blobs, user.name, wish.get("sdk"))
        return as_json(where)

    @route("DELETE", "/api/repos/delete")
    def delete_repo(self, call):
        wish = call.json()
        namespace = wish.get("organization") or (call.user and call.user.name)
        repo = self.visible_repo(call, wish.get("type") or "model", f"{namespace}/{wish['name']}")
        self.check_writer(call, namespace)
        del self.repos[repo.kind, repo.id]
        return as_json({})

    @route("PUT", API_REPO + "/settings")
    def change_settings(self, call, repo):
        self.check_writer(call, repo.namespace)
        wish = call.json()
        repo.private = wish.get("visibility") == "private" or bool(wish.get("private"))
        return as_json({})

    @route("POST", "/api/validate-yaml")
    def validate_card(self, call):
        try:
            metadata = card_metadata(call.json()["content"])
        except HubError as error:
            return as_json({"errors": [{"message": error.message}], "warnings": []}, 400)
        warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        return as_json({"errors": [], "warnings": warnings})

    @route("GET", API_REPO)
    @route("GET", API_REPO + "/revision/(?P<revision>[^/]+)")
    def repo_info(self, call, repo, revision="main"):
        commit = repo.resolve(revision)
        card, described = {}, {}
        if "README.md" in commit.files:
            card = card_metadata(repo.read("README.md", revision).decode())
        if "config.json" in commit.files and b"model_type" in repo.read("config.json", revision):
            described["library_name"] = "transformers"  # as the Hub concludes, unless the card names one
        described |= {name: card[name] for name in ("pipeline_tag", "library_name", "model-index") if name in card}
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        if "blobs" in call.query:
            for sibling in siblings:
                entry = tree_entry(sibling["rfilename"], commit.files[sibling["rfilename"]])
                sibling |= {"size": entry["size"], "blobId": entry["oid"]}
                if "lfs" in entry:
                    lfs = entry["lfs"]
                    sibling["lfs"] = {"sha256": lfs["oid"], "size": lfs["size"], "pointerSize": lfs["pointerSize"]}
        return as_json(
            {
                "id": repo.id,
                "author": repo.namespace,
                "sha": commit.oid,
                "private": repo.private,
                "gated": False,
                "disabled": False,
                "lastModified": commit.date,
                "createdAt": repo.history()[-1].date,
                "downloads": 0,
                "likes": 0,
                "tags": card.get("tags", []),
                "cardData": card,
                "siblings": siblings,
                **({"sdk": repo.sdk} if repo.kind == "space" else {}),
                **described,
            }
        )

    @route("GET", API_REPO + "/refs")
    def refs(self, call, repo):
        def references(prefix: str, shown: str):
            return [
                {"name": shown + ref.removeprefix(prefix), "ref": ref, "targetCommit": oid}
                for ref, oid in repo.refs.items()
                if ref.startswith(prefix)
            ]

        listed = {"branches": references("refs/heads/", ""), "converts": [], "tags": []}
        if "include_prs" in call.query:
            listed["pullRequests"] = references("refs/pr/", "refs/pr/")
        return as_json(listed)

    @route("POST", API_REPO + "/branch/(?P<branch>[^/]+)")
    def create_branch(self, call, repo, branch):
        self.check_writer(call, repo.namespace)
        if f"refs/heads/{branch}" in repo.refs:
            raise HubError(409, f"Reference already exists: {branch}")
        repo.refs[f"refs/heads/{branch}"] = repo.resolve(call.json().get("startingPoint", "main")).oid
        return as_json({})

    @route("DELETE", API_REPO + "/branch/(?P<branch>[^/]+)")
    def delete_branch(self, call, repo, branch):
        self.check_writer(call, repo.namespace)
        ref = f"refs/heads/{branch}"
        if ref == MAIN or ref not in repo.refs:
            raise HubError(403 if ref == MAIN else 404, f"Cannot delete the branch {branch}.")
        del repo.refs[ref]
        return as_json({})

    @route("GET", API_REPO + "/tree/(?P<revision>[^/]+)(/(?P<path>.+))?")
    def tree(self, call, repo, revision, path=""):
        commit = repo.resolve(revision)
        prefix = f"{path}/" if path else ""
        inside = [name for name in sorted(commit.files) if name.startswith(prefix)]
        if path and not inside:
            repo.blob(commit, path)  # raises
        recursive = call.query.get("recursive", ["false"])[0].lower() == "true"
        entries, folders = [], set()
        for name in inside:
            below = name.removeprefix(prefix).split("/")
            for depth in range(1, len(below) if recursive else min(len(below), 2)):
                folders.add(prefix + "/".join(below[:depth]))
            if recursive or len(below) == 1:
                entries.append(tree_entry(name, commit.files[name]))
        listed = [{"type": "directory", "path": folder, "oid": "0" * 40, "size": 0} for folder in sorted(folders)]
        return as_json(listed + entries)

    @route("POST", API_REPO + "/preupload/(?P<revision>[^/]+)")
    def preupload(self, call, repo, revision):
        self.check_writer(call, repo.namespace, own="create_pr" not in call.query)
        files = []
        commit = repo.resolve(revision)
        for wish in call.json()["files"]:
            known = commit.files.get(wish["path"])
            mode = upload_mode(wish["path"], wish["size"], base64.b64decode(wish["sample"]))
            files.append({"path": wish["path"], "uploadMode": mode, "shouldIgnore": False})
            if known is not None:
                files[-1]["oid"] = known.etag
        return as_json({"files": files, "commitOid": commit.oid})

    @route("POST", PAGE_REPO + r"\.git/info/lfs/objects/batch")
    def lfs_batch(self, call, repo):
        wish = call.json()
        self.check_writer(call, repo.namespace, own="ref" in wish)
        if "ref" in wish:
            repo.writable_ref(wish["ref"]["name"])
        multipart = self.multipart_size is not None and "multipart" in wish["transfers"]
        prefix = "" if repo.kind == "model" else f"{repo.kind}s/"
        objects = []
        for thing in wish["objects"]:
            objects.append({"oid": thing["oid"], "size": thing["size"]})
            if thing["oid"] in repo.uploaded:
                continue
            part_size = self.multipart_size if multipart and thing["size"] > self.multipart_size else None
            signature = secrets.token_hex(16)
            self._uploads[signature] = Upload(repo, thing["oid"], thing["size"], part_size)
            address = f"{self.storage}/upload/{signature}/{thing['oid']}"
            upload = {"href": address}
            if part_size is not None:
                numbers = range(1, ceil(thing["size"] / part_size) + 1)
                parts = {str(number): f"{address}?partNumber={number}" for number in numbers}
                upload = {
                    "href": f"{self.endpoint}/api/complete_multipart/{signature}",
                    "header": {"chunk_size": str(part_size), **parts},
                }
            verify = {"href": f"{self.endpoint}/{prefix}{repo.id}.git/info/lfs/objects/verify"}
            objects[-1]["actions"] = {"upload": upload, "verify": verify}
        return as_json({"transfer": "multipart" if multipart else "basic", "objects": objects})

    @route("PUT", "/upload/(?P<signature>[0-9a-f]+)/(?P<sha256>[0-9a-f]+)")
    def storage_upload(self, call, signature, sha256):
        upload = self._uploads.get(signature)
        if upload is None or upload.sha256 != sha256:
            raise HubError(403, "SignatureDoesNotMatch")
        number = int(call.query.get("partNumber", ["0"])[0])
        if (number == 0) != (upload.part_size is None):
            raise HubError(400, "This object is uploaded in parts.")
        size = call.upload.stat().st_size
        if size != upload.expected_size(number):
            raise HubError(400, f"{size} bytes came, {upload.expected_size(number)} were announced.")
        if number == 0:
            self.blobs.keep(call.upload, sha256, upload.size)
            upload.repo.uploaded[sha256] = upload.size
        else:
            upload.parts[number] = self.blobs.new_file()
            os.replace(call.upload, upload.parts[number])
        return Answer(headers={"ETag": f'"{signature}-{number}"'})

    @route("POST", "/api/complete_multipart/(?P<signature>[0-9a-f]+)")
    def complete_multipart(self, call, signature):
        upload, wish = self._uploads.get(signature), call.json()
        if upload is None or upload.sha256 != wish["oid"]:
            raise HubError(403, "SignatureDoesNotMatch")
        expected = ceil(upload.size / upload.part_size)
        named = [(part["partNumber"], part["etag"]) for part in wish["parts"]]
        if named != [(number, f'"{signature}-{number}"') for number in range(1, expected + 1)]:
            raise HubError(400, "The parts are not those that were uploaded.")
        if upload.sha256 not in upload.repo.uploaded:  # else the answer to an earlier completion was lost
            whole = self.blobs.join([upload.parts[number] for number in range(1, expected + 1)])
            self.blobs.keep(whole, upload.sha256, upload.size)
            upload.repo.uploaded[upload.sha256] = upload.size
        return as_json({"success": True})

    @route("POST", PAGE_REPO + r"\.git/info/lfs/objects/verify")
    def lfs_verify(self, call, repo):
        self.check_writer(call, repo.namespace, own=False)
        wish = call.json()
        if repo.uploaded.get(wish["oid"]) != wish["size"]:
            raise HubError(404, f"No LFS object {wish['oid']} of {wish['size']} bytes was uploaded.")
        return as_json({})

    @route("POST", API_REPO + "/commit/(?P<revision>[^/]+)")
    def commit(self, call, repo, revision):
        create_pr = "create_pr" in call.query
        user = self.check_writer(call, repo.namespace, own=not create_pr)
        if call.request.headers.get("content-type") != "application/x-ndjson":
            raise HubError(400, "A commit is sent as application/x-ndjson.")
        lines = [json.loads(line) for line in call.body.splitlines()]
        commit, opened = repo.commit(lines, revision, user.name, create_pr)
        address = f"{self.endpoint}/{'' if repo.kind == 'model' else f'{repo.kind}s/'}{repo.id}"
        answer = {"success": True, "commitOid": commit.oid, "commitUrl": f"{address}/commit/{commit.oid}"}
        if opened is not None:
            answer["pullRequestUrl"] = f"{address}/discussions/{opened.num}"
        return as_json(answer)

    @route("POST", API_REPO + "/discussions")
    def open_discussion(self, call, repo):
        user = self.check_writer(call, repo.namespace, own=False)
        wish = call.json()
        if len(wish["title"]) < 3:
            raise HubError(400, "A title has three characters or more.")
        start, status = (repo.refs[MAIN], "draft") if wish["pullRequest"] else (None, "open")
        opened = repo.open_discussion(wish["title"], wish["description"], user.name, status, start)
        return as_json({"num": opened.num, "pullRequest": opened.is_pull_request})

    @route("GET", API_REPO + "/discussions")
    def list_discussions(self, call, repo):
        wanted = {name: values[0] for name, values in call.query.items()}
        found = [
            discussion
            for discussion in reversed(repo.discussions)
            if wanted.get("type") in (None, "all", "pull_request" if discussion.is_pull_request else "discussion")
            # A draft is open until it is merged or closed.
            and wanted.get("status") in (None, "all", "open" if discussion.status in ("open", "draft") else "closed")
            and wanted.get("author") in (None, discussion.author)
        ]
        start = int(wanted.get("p", 0)) * DISCUSSIONS_A_PAGE
        page = [discussion_entry(repo, discussion) for discussion in found[start : start + DISCUSSIONS_A_PAGE]]
        return as_json({"count": len(found), "start": start, "discussions": page})

    @route("GET", API_REPO + r"/discussions/(?P<num>\d+)")
    def discussion_details(self, call, repo, num):
        if not 0 < int(num) <= len(repo.discussions):
            raise HubError(404, "Discussion not found")
        discussion = repo.discussions[int(num) - 1]
        by = {"createdAt": discussion.date, "author": {"name": discussion.author}}
        comment = {"edited": False, "hidden": False, "latest": {"raw": discussion.description}}
        entry = discussion_entry(repo, discussion) | {"events": [{"id": "0", "type": "comment", "data": comment, **by}]}
        if discussion.is_pull_request:
            entry |= {"changes": {"base": MAIN}, "filesWithConflicts": [], "diff": ""}
        return as_json(entry)

    @route("GET", PAGE_REPO + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    @route("HEAD", PAGE_REPO + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def resolve(self, call, repo, revision, path):
        commit = repo.resolve(revision)
        blob = repo.blob(commit, path)
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.etag}"'}
        if not blob.lfs:
            return self.send_blob(call, blob, headers)
        signature = secrets.token_hex(16)
        self._downloads[signature] = blob
        headers |= {"X-Linked-Size": str(blob.size), "X-Linked-ETag": f'"{blob.sha256}"'}
        return Answer(302, headers=headers | {"Location": f"{self.storage}/download/{signature}/{blob.sha256}"})

    @route("GET", "/download/(?P<signature>[0-9a-f]+)/(?P<sha256>[0-9a-f]+)")
    def storage_download(self, call, signature, sha256):
        blob = self._downloads.get(signature)
        if blob is None or blob.sha256 != sha256:
            raise HubError(403, "SignatureDoesNotMatch")
        return self.send_blob(call, blob, {"ETag": f'"{blob.sha256}"'})

    def send_blob(self, call: Call, blob: Blob, headers: dict[str, str]) -> Answer:
        headers |= {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", call.request.headers.get("range", ""))
        if wanted is None:
            return Answer(200, self.blobs.path(blob.sha256), 0, blob.size, headers)
        start, end = int(wanted[1]), min(int(wanted[2] or blob.size), blob.size - 1)
        if start > end:
            raise HubError(416, "Range Not Satisfiable", **{"Content-Range": f"bytes */{blob.size}"})
        headers["Content-Range"] = f"bytes {start}-{end}/{blob.size}"
        return Answer(206, self.blobs.path(blob.sha256), start, end + 1 - start, headers)


def tree_entry(path: str, blob: Blob) -> dict:
    entry = {"type": "file", "path": path, "oid": blob.oid, "size": blob.size}
    if blob.lfs:
        entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": pointer_size(blob)}
    return entry


def discussion_entry(repo: Repo, discussion: Discussion) -> dict:
    return {
        "num": discussion.num,
        "title": discussion.title,
        "author": {"name": discussion.author},
        "createdAt": discussion.date,
        "status": discussion.status,
        "isPullRequest": discussion.is_pull_request,
        "repo": {"name": repo.id, "type": repo.kind},
    }


@pytest.fixture
def local_hub(tmp_path, monkeypatch) -> Iterator[LocalHub]:
    """A Hub of this test's own, which this process's huggingface_hub and transformers take for the Hub.

    The owner is logged in, files are cached under `tmp_path`, and the client doesn't sleep before it tries again: what
    it would have slept is in `waits`.
    """
    constants = huggingface_hub.constants
    with LocalHub(tmp_path / "local_hub") as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.endpoint)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        clock = SimpleNamespace(**{name: getattr(time, name) for name in dir(time)} | {"sleep": hub.waits.append})
        monkeypatch.setattr("huggingface_hub.utils._http.time", clock)
        monkeypatch.setattr("huggingface_hub.file_download.time", clock)
        huggingface_hub.close_session()
        yield hub
        huggingface_hub.close_session()
        assert not hub.failures, hub.failures[0]
