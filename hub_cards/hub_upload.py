"""Puts a folder on the Hub in one commit, or not at all; again after a failure, and only what is not there yet.

Large files are uploaded before the commit, by their content: what arrived before a failure is not sent again. The
commit is one request, so a reader finds the old files or the new ones and never some of each.
"""

import contextlib
import hashlib
import random
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

try:
    import httpx2 as httpx  # what huggingface_hub 2 speaks through
except ImportError:
    import httpx

TRIES = 6
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds
TEMPORARY = {408, 425, 429, 500, 502, 503, 504}

Result = TypeVar("Result")


class UploadError(ValueError):
    """Nothing was published."""


class Destination(NamedTuple):
    """Where to: a repo of `repo_type`, its main branch or another, or a pull request against it."""

    repo_id: str
    repo_type: str = "model"
    branch: str | None = None
    create_pr: bool = False
    private: bool | None = None
    space_sdk: str | None = None

    @property
    def name(self) -> str:
        branch = f", branch {self.branch}" if self.branch else ""
        return f"{'Space ' if self.repo_type == 'space' else ''}{self.repo_id}{branch}"


def upload(
    api: HfApi,
    folder: Path,
    files: Iterable[str],
    destination: Destination,
    message: str,
    say: Callable = print,
    delete: bool = True,
) -> str:
    """Publishes `files` of `folder`; returns the commit's address, or the pull request's.

    The repo is made if it is not there. Of a former publication, files that its card lists and that are gone from the
    folder are deleted; whatever else lies in the repo stays. Where nothing differs from what is there, nothing is
    committed.

    Args:
        message: the commit's, in one line.
        say: is told, in a line, of what is waited for.
        delete: whether what a former publication listed, and is not among `files`, goes.

    Raises UploadError, in one sentence, where the Hub refuses, cannot be reached after several tries, or changed
    meanwhile; the repo is then as it was (or new, and empty).
    """
    repo = {"repo_id": destination.repo_id, "repo_type": destination.repo_type}

    def wait_for(what: str, action: Callable[[], Result]) -> Result:
        return patiently(what, action, destination.name, say)

    url = wait_for(
        "making the repo",
        lambda: api.create_repo(**repo, private=destination.private, exist_ok=True, space_sdk=destination.space_sdk),
    )
    repo["repo_id"] = url.repo_id  # with the user's name where it was left off
    if destination.branch:
        wait_for("making the branch", lambda: api.create_branch(**repo, branch=destination.branch, exist_ok=True))
    revision = {"revision": destination.branch or "main"}
    info = wait_for("asking for the repo's state", lambda: api.repo_info(**repo, **revision))
    if destination.private and not info.private:
        raise UploadError(
            f"{destination.name} is there and public: make it private on the Hub, or leave off --private."
        )
    head = info.sha
    files = sorted(files)
    present = wait_for("listing the repo", lambda: _listing(api, repo, head))
    # Each reads its file once, for its hash: everything below goes by that.
    additions = [CommitOperationAdd(name, folder / name) for name in files]
    marker = content_hash(additions)
    if destination.create_pr and (open_one := wait_for("listing pull requests", lambda: _same_pr(api, repo, marker))):
        return open_one

    for addition in additions:  # one by one: each has all its tries
        wait_for(
            f"uploading {addition.path_in_repo}",
            lambda addition=addition: api.preupload_lfs_files(
                **repo, **revision, additions=[addition], create_pr=destination.create_pr, free_memory=False
            ),
        )
    gone = []
    if delete:
        listed = wait_for("reading the former card", lambda: _listed_before(api, repo, head, present))
        gone = sorted((listed & present.keys()) - set(files))
    operations = additions + [CommitOperationDelete(name) for name in gone]

    def commit():
        if destination.create_pr and (found := _same_pr(api, repo, marker)):  # the answer to a former try was lost
            return found
        if not destination.create_pr and _is_published(additions, gone, _listing(api, repo, **revision)):
            sha = api.repo_info(**repo, **revision).sha
            return f"{url}/commit/{sha}"
        made = api.create_commit(
            **repo,
            **revision,
            operations=operations,
            commit_message=message,
            commit_description=f"Content: {marker}",
            create_pr=destination.create_pr,
            parent_commit=None if destination.create_pr else head,
        )
        return made.pr_url or made.commit_url

    try:
        return wait_for("committing", commit)
    except UploadError:
        with contextlib.suppress(Exception):  # the last try may have arrived, and its answer been lost
            if not destination.create_pr and _is_published(additions, gone, _listing(api, repo, **revision)):
                return f"{url}/commit/{api.repo_info(**repo, **revision).sha}"
        raise


def content_hash(additions: Iterable[CommitOperationAdd]) -> str:
    """A hash over the names and contents of files, by which a pull request is found again."""
    digest = hashlib.sha256()
    for addition in additions:
        digest.update(f"{addition.path_in_repo}\0{addition.upload_info.sha256.hex()}\n".encode())
    return digest.hexdigest()


def sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def patiently(what: str, action: Callable[[], Result], name: str, say: Callable) -> Result:
    """Does `action`, again after a while where the connection broke or the Hub has a passing trouble."""
    for tries_left in range(TRIES - 1, -1, -1):
        try:
            return action()
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise UploadError(f"{name}: the Hub knows no such repo or branch, or your token may not see it.") from error
        except (httpx.TransportError, OSError, RuntimeError) as raised:
            # huggingface_hub puts a RuntimeError around what ends an upload; Xet's own has nothing inside.
            error = (raised.__cause__ or raised) if type(raised) is RuntimeError else raised
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
            if status is not None and (status not in TEMPORARY or not tries_left):
                raise UploadError(_refusal(what, name, status, error)) from raised
            if not isinstance(error, httpx.TransportError | OSError) and error is not raised:
                raise
            if not tries_left:
                raise UploadError(
                    f"{name}: {what} failed {TRIES} times, the last time by {type(error).__name__} "
                    f"({error}). Nothing was published; give the same command again."
                ) from raised
            wait = _asked_wait(error) if status else None
            reason = f"the Hub answered {status}" if status else f"{type(error).__name__}: {error}"
        wait = wait or random.uniform(0.5, 1) * min(LONGEST_WAIT, FIRST_WAIT * 2 ** (TRIES - 1 - tries_left))
        say(f"{what}: {reason}; again in {wait:.0f} s")
        time.sleep(wait)
    raise AssertionError("unreachable")


def _asked_wait(error: HfHubHTTPError) -> float | None:
    seconds = error.response.headers.get("Retry-After", "")
    return min(LONGEST_WAIT, float(seconds)) if seconds.isdigit() else None


def _refusal(what: str, name: str, status: int, error: Exception) -> str:
    said = " ".join(str(getattr(error, "server_message", None) or error).split())[:300]
    if status == 401:
        mend = "your token is not known: `hf auth login` with one that may write"
    elif status == 403:
        mend = "your token may not write there: take another one, or another repo"
    elif status in (409, 412):
        mend = "the repo changed meanwhile: look at it, and give the same command again"
    else:
        mend = "give the same command again"
    return f"{name}: {what} was refused ({status}: {said}). Nothing was published; {mend}."


def _listing(api: HfApi, repo: dict[str, str], revision: str) -> dict[str, RepoFile]:
    entries = api.list_repo_tree(**repo, revision=revision, recursive=True)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _is_published(additions: list[CommitOperationAdd], gone: list[str], present: dict[str, RepoFile]) -> bool:
    if any(name in present for name in gone):
        return False
    return all(
        addition.path_in_repo in present and _holds(present[addition.path_in_repo], addition) for addition in additions
    )


def _holds(file: RepoFile | None, addition: CommitOperationAdd) -> bool:
    if file is None:
        return False
    if file.lfs:
        return file.lfs.sha256 == addition.upload_info.sha256.hex()
    with addition.as_file() as opened:
        data = opened.read()
    return file.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()  # git's


def _listed_before(api: HfApi, repo: dict[str, str], head: str, present: dict[str, RepoFile]) -> set[str]:
    """The files that the card of a former publication lists."""
    if "README.md" not in present:
        return set()
    card = Path(api.hf_hub_download(**repo, filename="README.md", revision=head)).read_text(encoding="utf-8")
    return set(LISTED.findall(card))


def _same_pr(api: HfApi, repo: dict[str, str], marker: str) -> str | None:
    """The address of an open pull request with this very content."""
    for discussion in api.get_repo_discussions(**repo, discussion_type="pull_request", discussion_status="open"):
        details = api.get_discussion_details(**repo, discussion_num=discussion.num)
        if any(marker in (getattr(event, "content", None) or "") for event in details.events):
            return discussion.url
    return None


# A line of the card's table of files, as `publish` writes it.
LISTED = re.compile(r"^\| `([^`]+)` \| [^|]+ \| `[0-9a-f]{64}` \|$", flags=re.MULTILINE)
