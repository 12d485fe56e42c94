"""`push_to_hub` of our models: checked and uploaded as `hub_cards.publish` does it with a run folder."""

import shutil
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from transformers import PreTrainedModel

from . import stranger
from .folder_checks import WEIGHTS, list_files
from .hub_upload import patiently
from .publish import publish

PIPELINE_TAGS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForPreTraining": "image-feature-extraction",
}


def push_model(
    model: PreTrainedModel,
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
    tags: list[str] | None = None,
) -> str:
    """Publishes a model of ours in `repo_id`, with its code; returns the address of the commit or pull request.

    The card and the other files in the repo stay; without a card, a short one says how the model is opened, and that
    nobody recorded how it was trained. A run folder, which knows that, is published by `python -m hub_cards.publish`.

    Args:
        revision: the branch; by default main.
        tags: for the card, where it is made here.

    The others are `PreTrainedModel.push_to_hub`'s. Raises PublishError and UploadError as `publish` does.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / repo_id.split("/")[-1]
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        _bring_what_is_there(folder, repo_id, revision, token)
        if not (folder / "README.md").is_file():
            (folder / "README.md").write_text(_short_card(model, folder, repo_id, tags), encoding="utf-8")
        return publish(
            folder,
            repo_id,
            private=private,
            branch=revision,
            create_pr=create_pr,
            commit_message=commit_message or f"Upload {type(model).__name__}",
            delete=False,
            token=token,
        )


def _bring_what_is_there(folder: Path, repo_id: str, revision: str | None, token: str | None) -> None:
    """Copies the repo's card, and what its snippets may need beside a model, into `folder`, where that has it not.

    `run.json` stays away: what a run recorded is not of this model.
    """
    api = HfApi(token=token)

    def newest(wanted: str | None) -> str | None:
        try:
            return api.repo_info(repo_id, revision=wanted).sha
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return None

    head = patiently("asking for the repo's state", lambda: newest(revision) or newest(None), repo_id, print)
    if head is None:
        return
    left_out = [f"*{end}" for end in WEIGHTS] + ["*.safetensors.index.json", "run.json", ".gitattributes"]
    with tempfile.TemporaryDirectory() as scratch:
        patiently(
            "reading the repo",
            lambda: api.snapshot_download(repo_id, revision=head, local_dir=scratch, ignore_patterns=left_out),
            repo_id,
            print,
        )
        for name in list_files(Path(scratch)).files:
            if not (folder / name).exists():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(Path(scratch) / name, folder / name)


def _short_card(model: PreTrainedModel, folder: Path, repo_id: str, tags: list[str] | None) -> str:
    auto_class = stranger.main_auto_class(folder) or "AutoModel"
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=PIPELINE_TAGS.get(auto_class),
        tags=[model.config.model_type, "custom_code", *(tags or [])],
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return str(
        ModelCard(
            f"---\n{data.to_yaml()}\n---\n\n# {repo_id.split('/')[-1]}\n\n"
            f"A `{type(model).__name__}` of {parameters:,} parameters. How it was trained was not recorded.\n\n"
            "## Use\n\n"
            f"```python\nfrom transformers import {auto_class}\n\n"
            f'model = {auto_class}.from_pretrained("{repo_id}", trust_remote_code=True)\n```\n\n'
            "The modelling code lies beside the weights, hence `trust_remote_code=True`.\n"
        )
    )
