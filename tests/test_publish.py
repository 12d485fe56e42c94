"""A folder is published when a stranger could use it, and what is read back from the Hub is what was trained."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from local_hub_http import Fault
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_hub_cards import full_run
from tiny_chat_model import new_tiny_model, tiny_tokenizer

from hf_models import LlamaStyleForCausalLM
from hub_cards import publish as publishing
from hub_cards import stranger
from hub_cards.build_card import build_card
from hub_cards.hub_upload import UploadError
from hub_cards.publish import PublishError, publish
from training import pretrain_lm

REPO = "user/tiny"
# In a process that knows nothing of us: opens a revision, and prints what the model computes.
READ_BACK = """
import sys
for ours in ("hf_models", "training", "hub_cards"):
    sys.modules[ours] = None
import json, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
repo, revision, text = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(repo, revision=revision, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(repo, revision=revision, trust_remote_code=True)
with torch.no_grad():
    print(json.dumps(model(**tokenizer(text, return_tensors="pt")).logits[0, -1].tolist()))
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run folder as `training.pretrain_lm` leaves it, with a checkpoint, of a tiny model."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    tokenizer = tiny_tokenizer()
    new_tiny_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    run = full_run() | {"outputs": stranger.reference_outputs(folder)}
    (folder / "run.json").write_text(json.dumps(run))
    build_card(folder)
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "optimizer.pt").write_bytes(b"\x80\x04.")
    return folder


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "runs" / "tiny"))


@pytest.fixture
def met(monkeypatch):
    """The stranger's process, left out where it is not what a test is about."""
    findings = {"loaded": ["AutoModelForCausalLM"], "snippets": 2, "outputs": {}, "problem": None, "recorded": {}}
    monkeypatch.setattr(publishing, "_met_by_a_stranger", lambda *arguments: findings)


def change(file: Path, **fields) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_what_is_published_opens_in_a_fresh_process_as_it_was_trained(local_hub, folder, tmp_path):
    said = []
    address = publish(folder, REPO, private=True, say=said.append)
    repo = local_hub.repo(REPO)
    commit = repo.history()[0].oid
    assert address.endswith(commit)
    names = set(repo.resolve("main").files)
    assert {"model.safetensors", "modeling_llama_style.py", "tokenizer.json", "run.json", "README.md"} <= names
    assert not [name for name in names if name.startswith("checkpoint")]
    assert repo.read("model.safetensors") == (folder / "model.safetensors").read_bytes()
    assert "outputs are those that the run recorded" in said

    text = "What is a river?"
    local_hub.api.upload_file(repo_id=REPO, path_or_fileobj=b"{}", path_in_repo="config.json")  # main moves on
    done = subprocess.run(
        [sys.executable, "-c", READ_BACK, REPO, commit, text],
        env=local_hub.environment(tmp_path / "home"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    ids = torch.tensor([tiny_tokenizer()(text)["input_ids"]])
    with torch.no_grad():
        expected = LlamaStyleForCausalLM.from_pretrained(folder)(input_ids=ids).logits[0, -1]
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), expected)


def test_the_card_names_the_repo_and_every_file_with_its_hash(local_hub, folder, met):
    publish(folder, REPO)
    repo = local_hub.repo(REPO)
    text = repo.read("README.md").decode()
    card = ModelCard(text)
    assert card.data.library_name == "transformers"
    assert 'from_pretrained("user/tiny"' in text
    assert 'tokenizer = AutoTokenizer.from_pretrained("user/tiny"' in text
    for name, blob in repo.resolve("main").files.items():
        if name not in ("README.md", ".gitattributes"):
            assert f"| `{name}` | {blob.size:,} | `{blob.sha256}` |" in text
    publish(folder, REPO)
    assert len(repo.history()) == 2  # nothing changed, nothing was committed
    assert "Files" not in (folder / "README.md").read_text()  # the folder stays as the run left it


def test_a_card_that_its_user_edited_is_kept_and_its_code_opens_the_repo(local_hub, folder, met):
    edited = (folder / "README.md").read_text().replace("## Limits", "By our own hands.\n\n## Limits")
    (folder / "README.md").write_text(edited)
    publish(folder, REPO)
    card = local_hub.repo(REPO).read("README.md").decode()
    assert "By our own hands." in card
    assert 'tokenizer = AutoTokenizer.from_pretrained("user/tiny"' in card
    assert 'tokenizer = AutoTokenizer.from_pretrained("./tiny"' not in card


def test_a_dry_run_lists_and_asks_nobody(local_hub, folder, met):
    said = []
    assert publish(folder, REPO, dry_run=True, say=said.append) is None
    assert local_hub.requests == []
    listed = "\n".join(said)
    assert "model.safetensors" in listed
    assert "left out: checkpoint-5/ (for resuming)" in listed


def test_a_page_goes_up_as_a_space_that_names_the_repo(local_hub, folder, met):
    publish(folder, REPO, space=True)
    page = local_hub.repo(REPO, "space")
    assert page.sdk == "gradio"
    assert {"app.py", "requirements.txt", "README.md"} <= set(page.resolve("main").files)
    assert ModelCard(page.read("README.md").decode()).data.to_dict()["models"] == [REPO]


@pytest.mark.parametrize(
    ("plant", "said"),
    [
        (lambda folder: (folder / "old.bin").write_bytes(b"\x80\x04K\x01."), "old.bin: is a pickle"),
        (
            lambda folder: (folder / "modeling_llama_style.py").write_text("import einops\n"),
            "modeling_llama_style.py, line 1: imports einops",
        ),
        (lambda folder: change(folder / "config.json", a="/home/someone/base"), "config.json, line 1: holds a machine"),
        (lambda folder: change(folder / "run.json", key="hf_" + "aB3dE6gH9j" * 4), "run.json, line 1: holds a Hugging"),
        (lambda folder: change(folder / "run.json", status="running"), "holds a run that is not finished"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no weights as safetensors"),
        (lambda folder: (folder / "run.json").write_text("{"), "run.json is not readable as JSON"),
        (lambda folder: (folder / "run.json").write_text('{"data": []}'), "run.json or README.md is not as a run"),
        (lambda folder: (folder / "README.md").write_bytes(b"caf\xe9"), "run.json or README.md is not as a run"),
        (lambda folder: (folder / "notes.txt").symlink_to(__file__), "notes.txt is a link to a file outside"),
        (lambda folder: (folder / "notes").symlink_to(folder.parent), "notes: is a link to nothing, or no file"),
        (lambda folder: [file.unlink() for file in folder.glob("*.json")], "holds no model, adapter or tokenizer"),
    ],
)
def test_what_is_not_fit_is_refused_before_the_hub_is_asked(local_hub, folder, met, plant, said):
    plant(folder)
    with pytest.raises(PublishError, match=said):
        publish(folder, REPO)
    assert local_hub.requests == []


@pytest.mark.parametrize("repo_id", ["tiny", "user/tiny/more", "user/ti ny", "-x/y"])
def test_a_repo_id_that_the_hub_does_not_take_is_refused(folder, repo_id):
    with pytest.raises(PublishError, match="--repo_id"):
        publish(folder, repo_id)


def test_a_failed_upload_leaves_nothing_and_the_same_again_completes_it(local_hub, folder, met, monkeypatch):
    monkeypatch.setattr("hub_cards.hub_upload.time.sleep", lambda seconds: None)
    local_hub.faults.append(Fault("POST", "/commit/", 503, times=1000))
    with pytest.raises(UploadError, match="Nothing was published"):
        publish(folder, REPO)
    assert set(local_hub.repo(REPO).resolve("main").files) == {".gitattributes"}
    sent = len(local_hub.sent("PUT", "/upload/"))
    local_hub.faults.clear()
    publish(folder, REPO)
    assert "model.safetensors" in local_hub.repo(REPO).resolve("main").files
    assert len(local_hub.sent("PUT", "/upload/")) == sent  # what was large had arrived


def test_push_to_hub_of_a_model_goes_the_same_way_and_keeps_the_card_that_is_there(local_hub, folder, met):
    model = LlamaStyleForCausalLM.from_pretrained(folder)
    model.push_to_hub(REPO, private=True, commit_message="By hand")
    repo = local_hub.repo(REPO)
    assert repo.private
    assert repo.history()[0].title == "By hand"
    assert 'AutoModelForCausalLM.from_pretrained("user/tiny"' in repo.read("README.md").decode()
    assert "modeling_llama_style.py" in repo.resolve("main").files

    publish(folder, REPO)
    card = repo.read("README.md").decode().split("## Files")[0]
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    model.push_to_hub(REPO, create_pr=True)
    assert repo.read("README.md", "refs/pr/1").decode().split("## Files")[0] == card
    assert repo.resolve("refs/pr/1").files.keys() == repo.resolve("main").files.keys()  # the tokenizer too
    assert repo.read("model.safetensors", "refs/pr/1") != repo.read("model.safetensors")


def test_a_trainer_publishes_the_finished_run(local_hub, tmp_path, met):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"The river {i} runs to the sea. " * 8}) + "\n" for i in range(40)))
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    options = f"""--dataset {texts} --tokenizer {tmp_path / "tokenizer"} --size 1m --block_size 32 --max_steps 2
        --per_device_train_batch_size 2 --eval_strategy no --save_strategy no --precision fp32 --use_cpu true
        --report_to none --output_dir {tmp_path / "run"} --push_to_hub true --hub_model_id {REPO}
        --hub_private_repo true"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pretrain_lm", *options.split()])
        pretrain_lm.main()
    repo = local_hub.repo(REPO)
    assert repo.private
    assert len(repo.history()) == 2  # one commit, when the run was finished
    assert json.loads(repo.read("run.json"))["status"] == "finished"
    card = repo.read("README.md").decode()
    assert "--dataset texts.jsonl --tokenizer tokenizer " in card  # and not where these lie on this machine
    assert "`hub_model_id`" not in card


# ---- what a stranger finds ----


def check(folder: Path, snippets=(), recorded=None):
    return stranger.check({"folder": str(folder), "snippets": list(snippets), "recorded": recorded})


def test_every_auto_class_that_a_model_declares_opens_it(folder):
    declared = json.loads((folder / "config.json").read_text())["auto_map"]
    findings = check(folder)
    assert findings["problem"] is None
    assert set(findings["loaded"]) == declared.keys() | {"AutoTokenizer"}


def test_other_weights_than_the_runs_are_found(folder):
    recorded = json.loads((folder / "run.json").read_text())["outputs"]
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] *= 3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "log-probability of each token) is" in check(folder, recorded=recorded)["problem"]


def test_another_tokenizer_than_the_runs_is_found(folder):
    recorded = json.loads((folder / "run.json").read_text())["outputs"]
    recorded["input_ids"] = [*recorded["input_ids"][:-1], 0]
    assert "the tokenizer makes" in check(folder, recorded=recorded)["problem"]


def test_weights_that_lack_a_layer_are_found(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lack layers.1.mlp.up_proj.weight" in check(folder)["problem"]


def test_a_snippet_that_fails_is_named_by_the_cards_own_line(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    card = "# Tiny\n\n```python\nx = 1\n```\n\ntext\n\n```python\ny = x\nprint(z)\n```\n"
    snippets = publishing._snippets(card)
    problem = check(folder, snippets)["problem"]
    assert problem == "README.md, the snippet at line 10, line 11: NameError: name 'z' is not defined"


def test_the_strangers_process_has_none_of_our_packages(folder, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (folder / "README.md").write_text("```python\nimport hf_models\n```\n")
    findings = publishing._met_by_a_stranger(folder, scratch, REPO, None)
    assert "No module named 'hf_models'" in findings["problem"]


def test_an_adapter_is_opened_with_its_base_which_it_names_by_its_place_on_the_hub(local_hub, folder, tmp_path):
    adapter = tmp_path / "runs" / "adapter"
    model = get_peft_model(
        LlamaStyleForCausalLM.from_pretrained(folder),
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    model.peft_config["default"].base_model_name_or_path = str(folder)
    model.save_pretrained(adapter)
    tiny_tokenizer().save_pretrained(adapter)
    code = (
        "from peft import AutoPeftModelForCausalLM\n"
        'model = AutoPeftModelForCausalLM.from_pretrained("user/adapter", trust_remote_code=True)\n'
        'assert model.peft_config["default"].base_model_name_or_path == "user/tiny"\n'
    )
    (adapter / "README.md").write_text(f"---\nlibrary_name: peft\n---\n# Adapter\n\n```python\n{code}```\n")
    with pytest.raises(PublishError, match="names its base by a path"):
        publish(adapter, "user/adapter")
    with pytest.raises(UploadError, match="publish it first"):
        publish(adapter, "user/adapter", base_model=REPO)
    local_hub.api.create_repo(REPO)
    publish(adapter, "user/adapter", base_model=REPO)
    repo = local_hub.repo("user/adapter")
    assert json.loads(repo.read("adapter_config.json"))["base_model_name_or_path"] == REPO
    assert str(tmp_path) not in repo.read("README.md").decode()
    assert "model.safetensors" not in repo.resolve("main").files
