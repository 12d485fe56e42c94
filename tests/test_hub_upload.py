"""A folder reaches the Hub whole or not at all, over real HTTP and whatever befalls the connection."""

import numpy as np
import pytest
from local_hub import READING_TOKEN
from local_hub_http import BEFORE_ANSWER, BEFORE_BODY, IN_BODY, Fault

from hub_cards import hub_upload
from hub_cards.hub_upload import Destination, UploadError, upload

REPO = "user/tiny"
COMMITS = "/api/models/user/tiny/commit/"


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """The seconds that would have been waited between tries."""
    waited = []
    monkeypatch.setattr(hub_upload.time, "sleep", waited.append)
    return waited


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for i in range(2):
        (folder / f"model-{i}.safetensors").write_bytes(np.random.default_rng(i).bytes(2**19))
    (folder / "config.json").write_text("{}")
    write_card(folder)
    return folder


def write_card(folder, more: str = ""):
    rows = "".join(f"| `{file.name}` | 1 | `{'0' * 64}` |\n" for file in sorted(folder.iterdir()))
    (folder / "README.md").write_text(
        f"---\nlicense: mit\n---\n# Tiny\n{more}\n| File | Bytes | SHA-256 |\n|-|-|-|\n{rows}"
    )


def files_of(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def published(hub, revision="main") -> dict[str, bytes]:
    repo = hub.repo(REPO)
    return {path: repo.read(path, revision) for path in repo.resolve(revision).files if path != ".gitattributes"}


def put(hub, folder, message="Publish", **destination) -> str:
    return upload(hub.api, folder, files_of(folder), Destination(REPO, **destination), message, lambda line: None)


def test_everything_arrives_in_one_commit(local_hub, folder):
    address = put(local_hub, folder, private=True)
    repo = local_hub.repo(REPO)
    assert published(local_hub) == files_of(folder)
    assert repo.private
    assert [commit.title for commit in repo.history()] == ["Publish", "initial commit"]
    assert address == f"{local_hub.endpoint}/{REPO}/commit/{repo.history()[0].oid}"


def test_the_same_again_commits_nothing(local_hub, folder):
    first = put(local_hub, folder)
    assert put(local_hub, folder) == first
    assert len(local_hub.repo(REPO).history()) == 2


def test_what_a_former_publication_listed_goes_and_what_others_added_stays(local_hub, folder):
    put(local_hub, folder)
    local_hub.api.upload_file(repo_id=REPO, path_or_fileobj=b"by hand", path_in_repo="LICENSE")
    (folder / "model-1.safetensors").unlink()
    write_card(folder)
    put(local_hub, folder)
    assert published(local_hub) == files_of(folder) | {"LICENSE": b"by hand"}


def test_a_branch_and_a_pull_request_leave_main_alone(local_hub, folder):
    put(local_hub, folder, branch="v2")
    assert published(local_hub, "v2") == files_of(folder)
    assert published(local_hub) == {}
    address = put(local_hub, folder, create_pr=True)
    assert address == f"{local_hub.endpoint}/{REPO}/discussions/1"
    assert published(local_hub, "refs/pr/1") == files_of(folder)
    assert put(local_hub, folder, create_pr=True) == address
    write_card(folder, "new")
    assert put(local_hub, folder, create_pr=True) != address


@pytest.mark.parametrize(
    "fault",
    [
        Fault("POST", "/api/repos/create", 503),
        Fault("POST", COMMITS, 502, times=2),
        Fault("POST", COMMITS, 429, retry_after=7),
        Fault("POST", COMMITS, BEFORE_BODY),
        Fault("POST", COMMITS, IN_BODY),
        Fault("POST", COMMITS, BEFORE_ANSWER),
        Fault("POST", "/info/lfs/objects/batch", 500, times=9),
        Fault("PUT", "/upload/", IN_BODY, times=9),
        Fault("POST", "/preupload/", BEFORE_ANSWER, times=2),
        Fault("GET", "/tree/", 503, times=3),
    ],
    ids=lambda fault: f"{fault.method} {fault.path} {fault.what}",
)
def test_passing_troubles_are_waited_out(local_hub, folder, waits, fault):
    local_hub.faults.append(Fault(fault.method, fault.path, fault.what, fault.times, fault.retry_after))
    put(local_hub, folder)
    assert local_hub.faults == []
    assert published(local_hub) == files_of(folder)
    assert len(local_hub.repo(REPO).history()) == 2
    if fault.retry_after:
        assert 7 in waits


def test_a_lost_answer_opens_no_second_pull_request(local_hub, folder):
    local_hub.faults.append(Fault("POST", COMMITS, BEFORE_ANSWER))
    put(local_hub, folder, create_pr=True)
    assert len(local_hub.repo(REPO).discussions) == 1


@pytest.mark.parametrize("what", [503, BEFORE_BODY, IN_BODY])
@pytest.mark.parametrize("path", ["/upload/", COMMITS])
def test_a_failure_publishes_nothing_and_is_told(local_hub, folder, path, what):
    put(local_hub, folder)
    before = published(local_hub)
    (folder / "model-0.safetensors").write_bytes(np.random.default_rng(7).bytes(2**19))
    write_card(folder, "new")
    local_hub.faults.append(Fault("PUT" if path == "/upload/" else "POST", path, what, times=1000))
    with pytest.raises(UploadError, match="Nothing was published") as raised:
        put(local_hub, folder)
    assert str(raised.value).startswith(REPO)
    assert "\n" not in str(raised.value)
    assert published(local_hub) == before

    local_hub.faults.clear()
    put(local_hub, folder)
    assert published(local_hub) == files_of(folder)


def test_what_arrived_before_a_failure_is_not_sent_again(local_hub, folder):
    local_hub.faults.append(Fault("POST", COMMITS, 503, times=1000))
    with pytest.raises(UploadError):
        put(local_hub, folder)
    sent = len(local_hub.sent("PUT", "/upload/"))
    local_hub.faults.clear()
    put(local_hub, folder)
    assert sent == 2
    assert len(local_hub.sent("PUT", "/upload/")) == 2
    assert published(local_hub) == files_of(folder)


def test_large_files_go_in_parts(local_hub, folder):
    local_hub.multipart_size = 2**17
    put(local_hub, folder)
    assert len(local_hub.sent("PUT", "/upload/")) == 8
    assert published(local_hub) == files_of(folder)


def test_a_repo_that_changed_meanwhile_is_not_overwritten(local_hub, folder, monkeypatch):
    put(local_hub, folder)
    write_card(folder, "ours")
    listed_before = hub_upload._listed_before

    def meanwhile(*arguments):
        local_hub.api.upload_file(repo_id=REPO, path_or_fileobj=b"theirs", path_in_repo="LICENSE")
        return listed_before(*arguments)

    monkeypatch.setattr(hub_upload, "_listed_before", meanwhile)
    with pytest.raises(UploadError, match="changed meanwhile"):
        put(local_hub, folder)
    assert b"ours" not in published(local_hub)["README.md"]


def test_a_private_upload_into_a_public_repo_is_refused(local_hub, folder):
    local_hub.api.create_repo(REPO, private=False)
    with pytest.raises(UploadError, match="is there and public"):
        put(local_hub, folder, private=True)
    assert published(local_hub) == {}


@pytest.mark.parametrize(("token", "said"), [(READING_TOKEN, "may not write"), ("hf_unknown", "`hf auth login`")])
def test_who_may_not_write_is_told(local_hub, folder, token, said):
    local_hub.api.token = token
    with pytest.raises(UploadError, match=said):
        put(local_hub, folder)
    assert ("model", REPO) not in local_hub.repos
