"""The local Hub is to huggingface_hub's client, and to transformers, what the Hub is.

It keeps what is published, gives it back at every revision, and refuses what the Hub refuses; the client survives its
faults, or tells them.
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from convnextv2_states import OURS, SMALL, ours
from huggingface_hub import _CACHED_NO_EXIST, HfApi, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session
from local_hub import READING_TOKEN, STRANGERS_TOKEN, TOKEN
from local_hub_http import BEFORE_ANSWER, BEFORE_BODY, IN_ANSWER, IN_BODY, LET_PASS, Fault
from PIL import Image
from tiny_chat_model import new_tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, ConvNextImageProcessor

from hf_models import ConvNextV2FcmaeConfig

REPO = "user/tiny"
STAGES = {"out_features": ["stage2", "stage4"]}
# Runs in a fresh process, in another folder, without our packages, and has nothing but the Hub.
STRANGER = """
import sys
for package in ("hf_models", "training", "hub_cards"):
    sys.modules[package] = None  # importing it is an ImportError
import torch
from PIL import Image
from transformers import (
    AutoBackbone, AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer, pipeline
)

revisions, image = sys.argv[2:], Image.open(sys.argv[1])
trust = {"trust_remote_code": True}
found = {}
for revision in revisions:
    where = {"revision": revision, **trust}
    tokens = AutoTokenizer.from_pretrained("user/language", **where)("What is a river?", return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained("user/language", **where)
    with torch.no_grad():
        found[revision] = model(**tokens).logits
generate = pipeline("text-generation", model="user/language", **trust)
found["text"] = generate("What is", max_new_tokens=5, do_sample=False)[0]["generated_text"]

pixels = AutoImageProcessor.from_pretrained("user/vision", **trust)(image, return_tensors="pt").pixel_values
classifier = AutoModelForImageClassification.from_pretrained("user/vision", **trust)
backbone = AutoBackbone.from_pretrained("user/vision", **trust)
with torch.no_grad():
    found["logits"], found["maps"] = classifier(pixels).logits, backbone(pixels).feature_maps
found["labels"] = pipeline(model="user/vision", **trust)(image)  # its task is told by the card
torch.save(found, "found.pt")
"""
CARD = "---\nlicense: apache-2.0\npipeline_tag: text-generation\n---\n# Tiny\n"


def folder_of(path, seed=0, mebibytes=1):
    """A card, a text in a folder and random weights, as a publisher has them."""
    (path / "notes").mkdir(parents=True, exist_ok=True)
    (path / "README.md").write_text(CARD)
    (path / "notes" / "seed.txt").write_text(str(seed))
    weights = np.random.default_rng(seed).bytes(mebibytes * 2**20)
    (path / "model.safetensors").write_bytes(weights)
    return path


def contents(path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def published(hub, revision="main") -> dict[str, bytes]:
    """What the server holds, without the file that the Hub itself adds to a new repository."""
    repo = hub.repo(REPO)
    return {path: repo.read(path, revision) for path in repo.resolve(revision).files if path != ".gitattributes"}


def downloaded(revision=None, **where) -> dict[str, bytes]:
    files = contents(Path(snapshot_download(REPO, revision=revision, **where)))
    return {path: content for path, content in files.items() if path != ".gitattributes"}


@pytest.fixture
def repo_of_a_folder(local_hub, tmp_path):
    """`REPO` with one published folder, which is returned."""
    folder = folder_of(tmp_path / "folder")
    local_hub.api.create_repo(REPO)
    local_hub.api.upload_folder(repo_id=REPO, folder_path=folder, commit_message="Publish")
    return folder


def test_a_published_folder_comes_back(local_hub, tmp_path):
    folder = folder_of(tmp_path / "folder")
    api = HfApi()  # finds the endpoint and the token by itself
    assert api.whoami()["name"] == "user"
    assert api.create_repo(REPO, private=True) == f"{local_hub.endpoint}/{REPO}"
    commit = api.upload_folder(repo_id=REPO, folder_path=folder, commit_message="Publish")
    assert published(local_hub) == contents(folder)
    assert downloaded() == contents(folder)

    info = api.model_info(REPO)
    assert (info.sha, info.private, info.pipeline_tag) == (commit.oid, True, "text-generation")
    assert api.list_repo_files(REPO) == [".gitattributes", "README.md", "model.safetensors", "notes/seed.txt"]
    tree = {entry.path: entry for entry in api.list_repo_tree(REPO, recursive=True)}
    weights = (folder / "model.safetensors").read_bytes()
    assert tree["model.safetensors"].lfs.sha256 == hashlib.sha256(weights).hexdigest()
    assert tree["model.safetensors"].size == len(weights)
    # The hash that `git hash-object` gives the card.
    assert tree["README.md"].blob_id == hashlib.sha1(b"blob %d\0" % len(CARD) + CARD.encode()).hexdigest()
    assert {entry.path for entry in api.list_repo_tree(REPO)} == {
        ".gitattributes",
        "README.md",
        "model.safetensors",
        "notes",
    }
    assert [commit.title for commit in local_hub.repo(REPO).history()] == ["Publish", "initial commit"]


def test_what_is_there_is_not_sent_again(local_hub, repo_of_a_folder):
    first = local_hub.repo(REPO).resolve("main")
    again = local_hub.api.upload_folder(repo_id=REPO, folder_path=repo_of_a_folder)
    assert again.oid == first.oid
    (repo_of_a_folder / "README.md").write_text(CARD + "More.\n")
    local_hub.api.upload_folder(repo_id=REPO, folder_path=repo_of_a_folder)
    assert published(local_hub) == contents(repo_of_a_folder)
    assert len(local_hub.sent("PUT", "/upload/")) == 1


def test_a_large_file_is_sent_in_parts(local_hub, tmp_path):
    local_hub.multipart_size = 3 * 2**20
    folder = folder_of(tmp_path / "folder", mebibytes=10)
    local_hub.api.create_repo(REPO)
    local_hub.faults.append(Fault("PUT", "partNumber=3", IN_BODY))
    local_hub.api.upload_folder(repo_id=REPO, folder_path=folder)
    assert published(local_hub) == contents(folder)
    assert len(local_hub.sent("PUT", "partNumber")) == 4 + 1


def test_branches_pull_requests_and_hashes_are_revisions(local_hub, repo_of_a_folder):
    api, first = local_hub.api, contents(repo_of_a_folder)
    start = api.model_info(REPO).sha
    api.create_branch(REPO, branch="v2")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_branch(REPO, branch="v2")
    second = contents(folder_of(repo_of_a_folder, seed=2))
    api.upload_folder(repo_id=REPO, folder_path=repo_of_a_folder, revision="v2")
    third = contents(folder_of(repo_of_a_folder, seed=3))
    opened = api.upload_folder(
        repo_id=REPO, folder_path=repo_of_a_folder, create_pr=True, delete_patterns=["notes/*"], commit_message="Third"
    )
    assert (opened.pr_num, opened.pr_revision) == (1, "refs/pr/1")
    for revision, expected in {
        None: first,
        "v2": second,
        "refs/pr/1": third,
        start: first,
        opened.oid: third,
    }.items():
        assert downloaded(revision) == expected

    # A pull request is found again and goes on.
    found = list(api.get_repo_discussions(REPO, discussion_type="pull_request", discussion_status="open"))
    assert [(entry.num, entry.title, entry.git_reference) for entry in found] == [(1, "Third", "refs/pr/1")]
    api.upload_file(path_or_fileobj=b"more", path_in_repo="more.txt", repo_id=REPO, revision=found[0].git_reference)
    assert downloaded("refs/pr/1") == third | {"more.txt": b"more"}
    assert api.create_pull_request(REPO, title="Another").status == "draft"
    refs = api.list_repo_refs(REPO, include_pull_requests=True)
    assert {ref.ref for ref in refs.branches} == {"refs/heads/main", "refs/heads/v2"}
    assert {ref.ref for ref in refs.pull_requests} == {"refs/pr/1", "refs/pr/2"}
    assert published(local_hub) == first
    # A stranger opens pull requests too, and writes nothing else.
    stranger = HfApi(token=STRANGERS_TOKEN)
    wish = {"repo_id": REPO, "path_or_fileobj": b"x", "path_in_repo": "x.txt"}
    assert stranger.upload_file(**wish, create_pr=True).pr_num == 3
    with pytest.raises(HfHubHTTPError, match="403"):
        stranger.upload_file(**wish)


def test_spaces_are_repositories_of_their_own(local_hub):
    api = local_hub.api
    api.create_repo(REPO, repo_type="space", space_sdk="gradio")
    api.create_repo(REPO)
    api.upload_file(path_or_fileobj=b"print()", path_in_repo="app.py", repo_id=REPO, repo_type="space")
    assert api.space_info(REPO).sdk == "gradio"
    with open(hf_hub_download(REPO, "app.py", repo_type="space")) as file:
        assert file.read() == "print()"
    assert published(local_hub) == {}
    api.delete_repo(REPO, repo_type="space")
    assert not api.repo_exists(REPO, repo_type="space")


def test_who_may_read_and_write(local_hub, repo_of_a_folder):
    local_hub.api.update_repo_settings(REPO, private=True)
    for token in (False, STRANGERS_TOKEN):
        with pytest.raises(RepositoryNotFoundError):
            HfApi(token=token).model_info(REPO)
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download(REPO, "README.md", token=token)
    hf_hub_download(REPO, "model.safetensors", token=READING_TOKEN)
    reader = HfApi(token=READING_TOKEN)
    with pytest.raises(HfHubHTTPError, match="403"):
        reader.upload_folder(repo_id=REPO, folder_path=folder_of(repo_of_a_folder, seed=1))
    with pytest.raises(HfHubHTTPError, match="403"):
        local_hub.api.create_repo("stranger/name")
    local_hub.api.create_repo("team/name")
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(token="hf_unknown").whoami()
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi(token="hf_unknown").model_info(REPO)
    # Whoever has a signed address has the right already: the storage takes no token, and no address made up.
    to_storage = local_hub.sent("PUT", "/upload/") + local_hub.sent("GET", "/download/")
    assert ["authorization" in request.headers for request in to_storage] == [False, False]
    signed = local_hub.storage + to_storage[1].path
    assert get_session().get(signed, headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 400
    assert get_session().get(f"{local_hub.storage}/download/00/00").status_code == 403


@pytest.mark.parametrize("name", ["a--b", "a..b", "a.git", "-a", "a.", "a b", "x" * 97, ""])
def test_names_that_the_hub_refuses(local_hub, name):
    wish = {"name": name, "organization": "user", "type": "model"}
    session, headers = get_session(), {"Authorization": f"Bearer {TOKEN}"}
    assert session.post(f"{local_hub.endpoint}/api/repos/create", json=wish, headers=headers).status_code == 400
    assert local_hub.repos == {}


def test_an_existing_repository(local_hub, repo_of_a_folder):
    with pytest.raises(HfHubHTTPError, match="409"):
        local_hub.api.create_repo(REPO)
    assert local_hub.api.create_repo(REPO, exist_ok=True).repo_id == REPO
    assert published(local_hub) == contents(repo_of_a_folder)


def test_what_is_not_there(local_hub, repo_of_a_folder):
    with pytest.raises(RepositoryNotFoundError):
        snapshot_download("user/nothing")
    with pytest.raises(RevisionNotFoundError):
        snapshot_download(REPO, revision="v3")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(REPO, "config.json")
    # The answer names the commit at which the file is missing, so that the client need not ask again.
    assert try_to_load_from_cache(REPO, "config.json") is _CACHED_NO_EXIST
    assert not local_hub.api.file_exists(REPO, "config.json")
    with pytest.raises(EntryNotFoundError):
        local_hub.api.delete_file("config.json", REPO)
    with pytest.raises(RevisionNotFoundError):
        local_hub.api.upload_folder(repo_id=REPO, folder_path=repo_of_a_folder, revision="v3")


def commit_of(hub, *lines, **header):
    """The answer to a commit that the client wouldn't send."""
    lines = [{"key": "header", "value": {"summary": "A commit", **header}}, *lines]
    return get_session().post(
        f"{hub.endpoint}/api/models/{REPO}/commit/main",
        content="\n".join(map(json.dumps, lines)),
        headers={"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/x-ndjson"},
    )


TEXT = {"key": "file", "value": {"path": "new.txt", "content": "new", "encoding": "utf-8"}}


@pytest.mark.parametrize(
    "operation",
    [
        {"key": "lfsFile", "value": {"path": "a.bin", "algo": "sha256", "oid": "0" * 64, "size": 3}},
        {"key": "file", "value": {"path": "../a.txt", "content": "", "encoding": "utf-8"}},
        {"key": "file", "value": {"path": "notes", "content": "", "encoding": "utf-8"}},
        {"key": "file", "value": {"path": "large.txt", "content": "x" * (10 * 2**20 + 1), "encoding": "utf-8"}},
        {"key": "file", "value": {"path": "README.md", "content": "---\nlicense: [\n---\n", "encoding": "utf-8"}},
        {"key": "renamed", "value": {"path": "a.txt"}},
    ],
    ids=[
        "an object never uploaded",
        "a path outside",
        "a folder's name",
        "a large text",
        "a broken card",
        "an unknown one",
    ],
)
def test_a_commit_is_made_whole_or_not_at_all(local_hub, repo_of_a_folder, operation):
    answer = commit_of(local_hub, TEXT, operation)
    assert answer.status_code == 400, answer.text
    assert published(local_hub) == contents(repo_of_a_folder)
    assert commit_of(local_hub, TEXT).status_code == 200
    assert published(local_hub) == contents(repo_of_a_folder) | {"new.txt": b"new"}


def test_a_commit_onto_an_older_state_is_refused(local_hub, repo_of_a_folder):
    api, parent = local_hub.api, local_hub.api.model_info(REPO).sha
    api.delete_folder("notes", REPO, parent_commit=parent)
    with pytest.raises(HfHubHTTPError, match="412"):
        api.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id=REPO, parent_commit=parent)
    # A pull request may begin there.
    opened = api.upload_file(
        path_or_fileobj=b"x", path_in_repo="x.txt", repo_id=REPO, parent_commit=parent, create_pr=True
    )
    assert downloaded(opened.pr_revision) == contents(repo_of_a_folder) | {"x.txt": b"x"}
    assert published(local_hub).keys() == {"README.md", "model.safetensors"}


def test_an_upload_has_to_be_what_was_announced(local_hub, repo_of_a_folder):
    headers = {"Authorization": f"Bearer {TOKEN}"}
    good, wish = b"12345678", {"oid": hashlib.sha256(b"12345678").hexdigest(), "size": 8}
    batch = f"{local_hub.endpoint}/{REPO}.git/info/lfs/objects"
    request = {"operation": "upload", "transfers": ["basic"], "objects": [wish]}

    def actions():
        return get_session().post(f"{batch}/batch", json=request, headers=headers).json()["objects"][0].get("actions")

    address = actions()["upload"]["href"]
    for bad in (b"1234567", b"12345679"):
        assert get_session().put(address, content=bad).status_code == 400
        assert get_session().post(f"{batch}/verify", json=wish, headers=headers).status_code == 404
    assert get_session().put(address, content=good).status_code == 200
    assert get_session().post(f"{batch}/verify", json=wish, headers=headers).status_code == 200
    assert actions() is None  # nothing more to do
    assert commit_of(local_hub, {"key": "lfsFile", "value": {"path": "a.bin", **wish}}).status_code == 200
    assert published(local_hub)["a.bin"] == good


def test_a_card_that_the_hub_refuses_is_refused_before_anything_is_sent(local_hub, repo_of_a_folder):
    before = published(local_hub)
    folder_of(repo_of_a_folder, seed=1)
    (repo_of_a_folder / "README.md").write_text("---\nlicense: {name: mit}\n---\n")
    with pytest.raises(ValueError, match="license"):
        local_hub.api.upload_folder(repo_id=REPO, folder_path=repo_of_a_folder)
    assert published(local_hub) == before
    assert len(local_hub.sent("PUT", "/upload/")) == 1


@pytest.mark.parametrize("what", [BEFORE_BODY, IN_BODY, BEFORE_ANSWER, 429, 500, 502, 503, 504])
def test_an_upload_survives(local_hub, tmp_path, what):
    folder = folder_of(tmp_path / "folder")
    local_hub.api.create_repo(REPO)
    local_hub.faults.append(Fault("PUT", "/upload/", what, times=2))
    local_hub.api.upload_folder(repo_id=REPO, folder_path=folder)
    assert published(local_hub) == contents(folder)
    assert not local_hub.faults
    assert len(local_hub.sent("PUT", "/upload/")) == 3
    assert local_hub.waits == [1, 2]


def test_the_client_waits_as_long_as_it_is_told(local_hub, tmp_path):
    local_hub.api.create_repo(REPO)
    local_hub.faults += [
        Fault("POST", "/preupload/", LET_PASS),
        Fault("POST", "/preupload/", 429, retry_after=30),
    ]
    for name in ("a.txt", "b.txt"):
        local_hub.api.upload_file(path_or_fileobj=b"x", path_in_repo=name, repo_id=REPO)
    assert local_hub.waits == [31]  # a second more than it was told


def test_a_client_that_gives_up_leaves_the_repository_as_it_was(local_hub, repo_of_a_folder):
    before = published(local_hub)
    local_hub.faults.append(Fault("PUT", "/upload/", 503, times=6))  # a first try and five more
    folder_of(repo_of_a_folder, seed=1)
    with pytest.raises(RuntimeError, match=r"model\.safetensors"):
        local_hub.api.upload_folder(repo_id=REPO, folder_path=repo_of_a_folder)
    assert published(local_hub) == before
    local_hub.api.upload_folder(repo_id=REPO, folder_path=repo_of_a_folder)
    assert published(local_hub) == contents(repo_of_a_folder)


@pytest.mark.parametrize("what", [BEFORE_BODY, IN_BODY, BEFORE_ANSWER, 503])
def test_a_commit_whose_answer_does_not_come(local_hub, repo_of_a_folder, what):
    """The client doesn't send a commit twice: it might have arrived."""
    before = published(local_hub)
    local_hub.faults.append(Fault("POST", "/commit/", what))
    folder_of(repo_of_a_folder, seed=1)
    with pytest.raises(Exception, match=r"disconnected|reset|Broken pipe|503"):
        local_hub.api.upload_folder(repo_id=REPO, folder_path=repo_of_a_folder)
    assert published(local_hub) == (contents(repo_of_a_folder) if what == BEFORE_ANSWER else before)
    # The same again finds what there is: the weights are sent once, and committed once.
    local_hub.api.upload_folder(repo_id=REPO, folder_path=repo_of_a_folder)
    assert published(local_hub) == contents(repo_of_a_folder)
    assert len(local_hub.sent("PUT", "/upload/")) == 2
    assert len(local_hub.repo(REPO).history()) == 3


def test_a_download_that_breaks_off_goes_on(local_hub, repo_of_a_folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 2**16)
    local_hub.faults += [
        Fault("HEAD", "/resolve/", 503),
        Fault("GET", "/download/", IN_ANSWER),
        Fault("GET", "/download/", BEFORE_ANSWER),
    ]
    assert downloaded() == contents(repo_of_a_folder)
    ranges = [request.headers.get("range") for request in local_hub.sent("GET", "/download/")]
    assert ranges == [None, "bytes=524288-", "bytes=524288-"]
    assert not local_hub.faults


@pytest.mark.slow
def test_transformers_pushes_and_opens(local_hub):
    model = new_tiny_model(tiny_tokenizer())
    model.push_to_hub(REPO, private=True)
    model.push_to_hub(REPO, create_pr=True, commit_message="Again")  # nothing has changed
    assert {"config.json", "model.safetensors", "modeling_llama_style.py"} <= published(local_hub).keys()
    again = AutoModelForCausalLM.from_pretrained(REPO)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_fresh_process_opens_what_was_published(local_hub, tmp_path):
    api, folder = local_hub.api, tmp_path / "language"
    api.create_repo("user/language", private=True)
    tokenizer = tiny_tokenizer()
    models = {}
    for scale, way in enumerate(({}, {}, {"create_pr": True}), start=1):
        model = new_tiny_model(tokenizer)
        with torch.no_grad():
            model.model.norm.weight.mul_(scale)  # the logits follow
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        commit = api.upload_folder(repo_id="user/language", folder_path=folder, **way)
        models[commit.oid] = model
    first, second, third = models
    revisions = {first: first, "main": second, commit.pr_revision: third}

    classifier, backbone = ours(**STAGES), OURS["backbone"](ConvNextV2FcmaeConfig(**SMALL | STAGES)).eval()
    backbone.load_state_dict(classifier.convnextv2.state_dict(), strict=False)  # its norms are new
    classifier.save_pretrained(tmp_path / "vision")
    size = {"shortest_edge": 384}  # from this size on images are resized as they are, without a crop
    ConvNextImageProcessor(do_resize=False, size=size).save_pretrained(tmp_path / "vision")
    (tmp_path / "vision" / "README.md").write_text("---\npipeline_tag: image-classification\n---\n")
    api.create_repo("user/vision")
    api.upload_folder(repo_id="user/vision", folder_path=tmp_path / "vision")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8))
    image.save(tmp_path / "image.png")

    stranger = tmp_path / "stranger"
    stranger.mkdir()
    process = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, tmp_path / "image.png", *revisions],
        cwd=stranger,
        env=local_hub.environment(tmp_path / "home"),
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    found = torch.load(stranger / "found.pt")
    tokens = tokenizer("What is a river?", return_tensors="pt")
    with torch.no_grad():
        for revision, oid in revisions.items():
            torch.testing.assert_close(found[revision], models[oid](**tokens).logits)
    generated = models[second].generate(**tokenizer("What is", return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert found["text"] == tokenizer.decode(generated[0], skip_special_tokens=True)

    pixels = ConvNextImageProcessor(do_resize=False, size=size)(image, return_tensors="pt").pixel_values
    with torch.no_grad():
        logits, maps = classifier(pixels).logits, backbone(pixels).feature_maps
    torch.testing.assert_close(found["logits"], logits)
    torch.testing.assert_close(found["maps"], maps)
    best = logits[0].softmax(0).max().item()
    assert found["labels"][0]["score"] == pytest.approx(best, rel=1e-4)
