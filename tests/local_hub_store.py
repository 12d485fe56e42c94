"""What the local Hub keeps: repositories of refs, immutable commits, and blobs that are named by their content.

A file is told by two hashes, as on the Hub: git's SHA-1 of the blob (of the pointer, for a file in Git LFS) and the
SHA-256 of the content. Contents lie on disk, so that a server in the tests' own process adds nothing to its memory.
"""

import base64
import fnmatch
import hashlib
import json
import os
import re
import shutil
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

import yaml

MAIN = "refs/heads/main"
# The Hub keeps a file outside git if one of these patterns says so, if it is not text, or if it is larger than this.
LFS_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.onnx", "*.npz", "*.parquet", "*.pkl", "*.gz", "*.zip")
LFS_SIZE = 10 * 2**20
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
HASH_CHUNK = 2**20


class HubError(Exception):
    """What the Hub refuses: an HTTP status, a sentence, and the code by which huggingface_hub tells errors apart."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class User:
    name: str
    role: str = "write"
    organisations: tuple[str, ...] = ()

    def owns(self, namespace: str) -> bool:
        return namespace in (self.name, *self.organisations)


@dataclass(frozen=True)
class Blob:
    """A file's content; `oid` is git's hash of what git holds: the content, or an LFS pointer to it."""

    sha256: str
    size: int
    oid: str
    lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    description: str
    author: str
    date: str
    files: dict[str, Blob]


@dataclass
class Discussion:
    num: int
    title: str
    description: str
    author: str
    date: str
    status: str
    is_pull_request: bool


class BlobStore:
    """Contents by their SHA-256, in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True)

    def path(self, sha256: str) -> Path:
        return self.folder / sha256

    def new_file(self) -> Path:
        """Where a content is written until its hash is known."""
        return self.folder / f"incoming-{uuid.uuid4().hex}"

    def keep(self, file: Path, sha256: str, size: int) -> None:
        """Takes `file` in under its hash; raises HubError, and keeps nothing, if it isn't what was announced."""
        with open(file, "rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if (found, file.stat().st_size) != (sha256, size):
            raise HubError(400, f"The upload has {file.stat().st_size} bytes with SHA-256 {found}, not {sha256}.")
        os.replace(file, self.path(sha256))

    def keep_regular(self, content: bytes) -> Blob:
        sha256 = hashlib.sha256(content).hexdigest()
        file = self.new_file()
        file.write_bytes(content)
        os.replace(file, self.path(sha256))
        return Blob(sha256, len(content), git_hash(content), lfs=False)

    def join(self, parts: list[Path]) -> Path:
        whole = self.new_file()
        with open(whole, "wb") as target:
            for part in parts:
                with open(part, "rb") as source:
                    shutil.copyfileobj(source, target, HASH_CHUNK)
        return whole


def lfs_blob(sha256: str, size: int) -> Blob:
    return Blob(sha256, size, git_hash(LFS_POINTER.format(sha256=sha256, size=size).encode()), lfs=True)


def pointer_size(blob: Blob) -> int:
    return len(LFS_POINTER.format(sha256=blob.sha256, size=blob.size))


def upload_mode(path: str, size: int, sample: bytes) -> str:
    """`lfs` or `regular`, from a file's name, its size in bytes and its first 512 bytes."""
    named = any(fnmatch.fnmatch(PurePosixPath(path).name, pattern) for pattern in LFS_PATTERNS)
    return "lfs" if named or b"\0" in sample or size > LFS_SIZE else "regular"


def card_metadata(text: str) -> dict:
    """The YAML block at the head of a README.md, `{}` without one; raises HubError if the Hub would refuse it."""
    block = re.match(r"---\r?\n(.*?)^---\s*$", text, flags=re.DOTALL | re.MULTILINE)
    if block is None:
        return {}
    try:
        metadata = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        raise HubError(400, f"Invalid metadata in README.md: {error}") from error
    if metadata is None:
        return {}
    if not isinstance(metadata, dict):
        raise HubError(400, "Invalid metadata in README.md: it has to be a mapping.")
    for name in ("tags", "datasets", "language", "license", "pipeline_tag", "library_name", "base_model"):
        values = metadata.get(name, [])
        several = name not in ("license", "pipeline_tag", "library_name")
        entries = values if several and isinstance(values, list) else [values]
        if name in metadata and not all(isinstance(entry, str) for entry in entries):
            kind = "a string or a list of strings" if several else "a string"
            raise HubError(400, f'Invalid metadata in README.md: "{name}" must be {kind}.')
    return metadata


def check_repo_id(repo_id: str) -> None:
    name_is_fine = re.fullmatch(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_]([\w.-]*[A-Za-z0-9_])?", repo_id, flags=re.ASCII)
    if not name_is_fine or len(repo_id) > 96 or "--" in repo_id or ".." in repo_id or repo_id.endswith(".git"):
        raise HubError(400, f"Invalid repo name: {repo_id}")


def check_path(path: str) -> None:
    parts = path.split("/")
    if not path or any(part in ("", ".", "..", ".git") for part in parts):
        raise HubError(400, f"Invalid path in a commit: {path!r}")


@dataclass
class Repo:
    """One repository; `refs` names commits, a commit never changes, and only `commit` moves a ref."""

    kind: str  # "model" or "space"
    id: str
    private: bool
    blobs: BlobStore
    owner: str
    sdk: str | None = None
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    discussions: list[Discussion] = field(default_factory=list)
    uploaded: dict[str, int] = field(default_factory=dict)  # sizes of the LFS objects, by SHA-256

    def __post_init__(self):
        attributes = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS)
        files = {".gitattributes": self.blobs.keep_regular(attributes.encode())}
        self.refs[MAIN] = self._add_commit(None, "initial commit", "", self.owner, files).oid

    @property
    def namespace(self) -> str:
        return self.id.split("/")[0]

    def resolve(self, revision: str) -> Commit:
        """The commit of a branch, a ref's full name or a hash (or its first seven digits or more)."""
        oid = self.refs.get(f"refs/heads/{revision}") or self.refs.get(revision)
        if oid is None and re.fullmatch(r"[0-9a-f]{7,40}", revision):
            oid = next((commit for commit in self.commits if commit.startswith(revision)), None)
        if oid is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def history(self, revision: str = "main") -> list[Commit]:
        """The commits of a revision, newest first."""
        commits = [self.resolve(revision)]
        while commits[-1].parent is not None:
            commits.append(self.commits[commits[-1].parent])
        return commits

    def read(self, path: str, revision: str = "main") -> bytes:
        return self.blobs.path(self.blob(self.resolve(revision), path).sha256).read_bytes()

    def blob(self, commit: Commit, path: str) -> Blob:
        if path not in commit.files:
            message = f"{path} does not exist at {commit.oid}"
            raise HubError(404, message, "EntryNotFound", **{"X-Repo-Commit": commit.oid})
        return commit.files[path]

    def writable_ref(self, revision: str) -> str:
        """The ref that a commit moves: a branch or a pull request's."""
        for ref in (f"refs/heads/{revision}", revision):
            if ref in self.refs:
                return ref
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def open_discussion(
        self, title: str, description: str, author: str, status: str, start: str | None = None
    ) -> Discussion:
        """A new discussion, or with `start`, a commit's hash, a pull request whose ref begins there."""
        number = len(self.discussions) + 1
        opened = Discussion(number, title, description, author, now(), status, is_pull_request=start is not None)
        if start is not None:
            self.refs[f"refs/pr/{number}"] = start
        self.discussions.append(opened)
        return opened

    def commit(
        self, lines: list[dict], revision: str, author: str, create_pr: bool
    ) -> tuple[Commit, Discussion | None]:
        """Applies a commit as the client describes it, all of it or nothing.

        Args:
            lines: the decoded lines of the request: `{"key": …, "value": …}`, the header first.

        Raises:
            HubError: 404 for an unknown revision or a file to delete that is not there, 412 if the parent named isn't
                the newest commit, 400 for anything malformed and for an LFS file that was never uploaded.
        """
        if not lines or lines[0].get("key") != "header" or not lines[0]["value"].get("summary"):
            raise HubError(400, "A commit begins with a header that has a summary.")
        header = lines[0]["value"]
        head = self.resolve(revision)
        if not create_pr:
            head = self.commits[self.refs[self.writable_ref(revision)]]
        if header.get("parentCommit"):
            parent = self.resolve(header["parentCommit"])
            if not create_pr and parent is not head:
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            head = parent
        files = dict(head.files)
        for line in lines[1:]:
            self._apply(files, line["key"], line["value"])
        for path in files:
            if any(str(parent) in files for parent in PurePosixPath(path).parents):
                raise HubError(400, f"{path} lies in a folder that has the name of a file.")
        commit = self._add_commit(head.oid, header["summary"], header.get("description", ""), author, files)
        if create_pr:
            return commit, self.open_discussion(commit.title, commit.description, author, "open", commit.oid)
        self.refs[self.writable_ref(revision)] = commit.oid
        return commit, None

    def _apply(self, files: dict[str, Blob], key: str, value: dict) -> None:
        path = value["path"].rstrip("/") if key == "deletedFolder" else value["path"]
        check_path(path)
        if key == "file":
            encoded = value.get("encoding") == "base64"
            content = base64.b64decode(value["content"]) if encoded else value["content"].encode()
            if len(content) > LFS_SIZE:
                raise HubError(400, f"{path} has more than {LFS_SIZE} bytes and has to go through LFS.")
            if path == "README.md":
                card_metadata(content.decode())
            files[path] = self.blobs.keep_regular(content)
        elif key == "lfsFile":
            size = self.uploaded.get(value["oid"])
            if size is None:
                raise HubError(400, f"{path}: no LFS object {value['oid']} was uploaded to {self.id}.")
            if value.get("size", size) != size:
                raise HubError(400, f"{path}: the LFS object {value['oid']} has {size} bytes, not {value['size']}.")
            files[path] = lfs_blob(value["oid"], size)
        elif key == "deletedFile":
            if path not in files:
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            del files[path]
        elif key == "deletedFolder":
            inside = [name for name in files if name.startswith(f"{path}/")]
            if not inside:
                raise HubError(404, f"A folder with this name doesn't exist: {path}", "EntryNotFound")
            for name in inside:
                del files[name]
        else:
            raise HubError(400, f"Unknown operation in a commit: {key!r}")

    def _add_commit(
        self, parent: str | None, title: str, description: str, author: str, files: dict[str, Blob]
    ) -> Commit:
        date = now()
        tree = sorted((path, blob.oid) for path, blob in files.items())
        text = json.dumps([self.kind, self.id, parent, title, description, author, date, len(self.commits), tree])
        commit = Commit(hashlib.sha1(text.encode()).hexdigest(), parent, title, description, author, date, files)
        self.commits[commit.oid] = commit
        return commit


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
