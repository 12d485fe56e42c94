"""`push_to_hub` of our models: checked and uploaded as `hub_cards.publish` does it with a run folder."""

import tempfile
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import PreTrainedModel

from . import stranger
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

    A card in the repo stays; without one, a short card says how the model is opened, and that nobody recorded how it
    was trained. A run folder, which knows that, is published by `python -m hub_cards.publish`.

    Args:
        revision: the branch; by default main.
        tags: for the card, where it is made here.

    The others are `PreTrainedModel.push_to_hub`'s. Raises PublishError and UploadError as `publish` does.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / repo_id.split("/")[-1]
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        card = _card_of(repo_id, revision, token) or _short_card(model, folder, repo_id, tags)
        (folder / "README.md").write_text(card, encoding="utf-8")
        return publish(
            folder,
            repo_id,
            private=private,
            branch=revision,
            create_pr=create_pr,
            commit_message=commit_message or f"Upload {type(model).__name__}",
            token=token,
        )


def _card_of(repo_id: str, revision: str | None, token: str | None) -> str | None:
    """The card that lies in the repo; None where there is none."""
    try:
        path = HfApi(token=token).hf_hub_download(repo_id, "README.md", revision=revision)
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
        return None
    return Path(path).read_text(encoding="utf-8")


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
