"""A card says what its run.json says, all of it works as written, and what no run recorded is not in it."""

import json
import math
import random
import re
from pathlib import Path

import pytest
from card_runs import card_text, pictures, python_snippets, run_as_stranger, write_run
from huggingface_hub import ModelCard
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_models import LlamaStyleConfig, LlamaStyleForCausalLM
from hub_cards.build_card import build_card
from hub_cards.plots import draw_curves
from hub_cards.readable_numbers import count, duration, quantity

SAMPLE_INFO = Path(__file__).parents[1] / "training/sample_data/wikipedia_leads/info.json"


def history(steps: int, eval_steps: int) -> list[dict]:
    entries = []
    for step in range(1, steps + 1):
        loss = 3.7 + 4.6 * math.exp(-step / 90) + random.gauss(0, 0.05)
        entries.append({"step": step, "loss": loss, "learning_rate": 3e-3 / step, "tokens_seen": 8100 * step})
        if step % eval_steps == 0:
            entries.append({"step": step, "eval_loss": loss, "eval_bits_per_byte": loss / 2.4})
    return entries


def full_run() -> dict:
    """A finished run as training/pretrain_lm.py records it."""
    info = json.loads(SAMPLE_INFO.read_text(encoding="utf-8"))
    sample_data = {"dataset": "wikipedia_leads", "fingerprint": "0123456789abcdef", "info": info}
    return {
        "task": "pretrain_lm",
        "status": "finished",
        "arguments": {"size": "6m", "learning_rate": 0.003, "max_steps": 600, "output_dir": "runs/quickstart/model"},
        "data": {
            "train": sample_data | {"split": "train", "documents": 9532, "bytes": 4639199},
            "eval": sample_data | {"split": "test", "documents": 501, "bytes": 246336},
        },
        "command": "python -m training.pretrain_lm --config quickstart.yaml",
        "git_revision": "0123abcd+changes",
        "libraries": {"torch": "2.14.1", "transformers": "5.23.0"},
        "hardware": {"cpu": "Some CPU", "cores": 2, "memory_gib": 23.5, "accelerators": [], "processes": 1},
        "wall_time_seconds": 251.3,
        "model": {"parameters": 5868800, "config": {"model_type": "llama_style", "hidden_size": 256}},
        "tokenizer": {"path": "runs/quickstart/tokenizer", "vocab_size": 4096},
        "training": {"seed": 42, "precision": "bf16", "block_size": 256, "matmul_peak_gflops": 350.0},
        "metrics": {
            "eval_loss": 3.9012,
            "eval_perplexity": 49.46,
            "eval_bits_per_byte": 1.6034,
            "tokens_seen": 4900000,
            "tokens_per_second": 17000.0,
            "matmul_share": 0.41,
            "gzip_bits_per_byte": 3.1,
            "xz_bits_per_byte": 2.68,
        },
        "history": history(steps=60, eval_steps=20),
        "samples": [
            {"step": 20, "prompt": "The ", "text": "The the of"},
            {"step": 60, "prompt": "The ", "text": "The ```river``` | is\n\n# not a heading <b>"},
        ],
        "example": {"prompt": 'The "river"\n', "text": "The river is"},
    }


def tokenizer_run() -> dict:
    figures = {"vocab_size": 4096, "bytes_per_token": 3.61, "tokens_per_word": 1.72}
    figures |= {"single_byte_share": 0.041, "vocabulary_used": 0.98, "texts_not_round_tripped": 0}
    report = {"this tokenizer": figures, "GPT-2's regex": figures}
    return {"task": "train_tokenizer", "data": full_run()["data"], "metrics": figures, "tokenizer_report": report}


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, one to end a text, and the least of a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<eos>",
        pad_token="<eos>",
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
        model_input_names=["input_ids", "attention_mask"],
    )


def test_metadata_is_what_the_run_recorded(tmp_path):
    run = full_run()
    data = ModelCard.load(build_card(write_run(tmp_path / "model", run))).data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert (data.license, data.language) == ("cc-by-sa-4.0", ["en"])
    assert "llama_style" in data.tags
    results = {result.metric_type: result for result in data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == {
        "loss": run["metrics"]["eval_loss"],
        "perplexity": run["metrics"]["eval_perplexity"],
        "bits_per_byte": run["metrics"]["eval_bits_per_byte"],
    }
    assert results["loss"].dataset_split == "test"


def test_a_model_trained_further_claims_nothing_for_its_beginning(tmp_path):
    run = full_run()
    run["data"]["model"] = {"path": "models/base", "fingerprint": "0123456789abcdef"}
    card = ModelCard.load(build_card(write_run(tmp_path / "model", run)))
    assert card.data.license is None
    assert "further from `models/base`" in card.text
    assert "The weights are under" not in card.text
    assert "tokens a parameter" not in card.text


def test_only_data_sets_of_the_hub_are_linked(tmp_path):
    run = full_run()
    assert ModelCard.load(build_card(write_run(tmp_path / "sample", run))).data.datasets is None
    for data in run["data"].values():
        del data["info"]
        data["dataset"] = "texts/notes.txt"
    card = ModelCard.load(build_card(write_run(tmp_path / "local", run)))
    assert card.data.datasets is None
    assert card.data.license is None
    assert "recorded no licence" in card.text
    run["data"]["train"] |= {"dataset": "user/texts", "source": "hub"}
    assert ModelCard.load(build_card(write_run(tmp_path / "hub", run))).data.datasets == ["user/texts"]


def test_every_section_is_there_and_no_path_of_this_machine(tmp_path):
    card = card_text(tmp_path / "model", full_run())
    for heading in ("Use", "Samples", "Results", "Model", "Data and licence", "Training", "Limits", "Reproduce"):
        assert f"\n\n## {heading}\n\n" in card
    assert "| – the same text in `xz -9` | 2.680 |" in card
    assert "**5.87 M parameters**" in card
    assert "4 min 11 s" in card
    assert "with changes that were not committed" in card
    assert str(tmp_path) not in card
    assert "\n\n\n" not in card


def test_missing_sections_vanish(tmp_path):
    card = card_text(tmp_path / "model", {"task": "pretrain_lm", "model": {"parameters": 1000}})
    assert re.findall(r"^## (.*)", card, flags=re.MULTILINE) == ["Use", "Model", "Limits", "Citation"]
    assert "![" not in card
    assert not (tmp_path / "model" / "card_assets").exists()
    assert "model-index" not in card


@pytest.mark.parametrize("section", sorted(full_run().keys() - {"task", "model", "history"}))
def test_no_section_leans_on_another(tmp_path, section):
    run = full_run()
    del run[section], run["history"]  # without its pictures, which take most of a card's time
    card = card_text(tmp_path / "model", run)
    assert "\n\n\n" not in card
    assert "None" not in card


def test_pictures_that_the_card_shows_exist(tmp_path):
    card = card_text(tmp_path / "model", full_run())
    assert len(pictures(card)) == 3
    for picture in pictures(card):
        Image.open(tmp_path / "model" / picture).verify()


def test_pictures_of_a_long_run_stay_small(tmp_path):
    for file in draw_curves(history(5000, 100), {"gzip_bits_per_byte": 3.1}, tmp_path, "loss").values():
        assert (tmp_path / file).stat().st_size <= 100_000


def test_samples_of_the_last_step_are_shown_verbatim(tmp_path):
    card = card_text(tmp_path / "model", full_run())
    assert "````text\nThe ```river``` | is\n\n# not a heading <b>\n````" in card
    assert "The the of" not in card


def test_an_unfinished_run_says_so(tmp_path):
    assert "This run is not finished" in card_text(tmp_path / "model", full_run() | {"status": "running"})


def test_a_published_model_is_called_by_its_hub_id(tmp_path):
    write_run(tmp_path / "model", full_run())
    card = build_card(tmp_path / "model", hub_id="someone/small-llama").read_text(encoding="utf-8")
    assert "# small-llama\n" in card
    assert 'from_pretrained("someone/small-llama"' in card


def test_snippets_run_where_our_packages_are_not(tmp_path):
    """Those of both cards, in one process, beside the folders."""
    tokenizer = bytes_tokenizer()
    config = LlamaStyleConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaStyleForCausalLM(config).save_pretrained(tmp_path / "model")
    for folder in ("model", "tokenizer"):
        tokenizer.save_pretrained(tmp_path / folder)
    cards = card_text(tmp_path / "model", full_run()) + card_text(tmp_path / "tokenizer", tokenizer_run())
    snippets = python_snippets(cards)
    assert snippets.count("from transformers import") == 3
    printed = run_as_stranger(cards, tmp_path)
    assert 'The "river"' in printed
    assert "Where do rivers run?" in printed


def test_a_tokenizer_card_holds_its_report(tmp_path):
    card = card_text(tmp_path / "tokenizer", tokenizer_run())
    assert "| this tokenizer | 4,096 | 3.61 | 1.72 | 4.1% | 98.0% | 0 |" in card
    assert "pipeline_tag" not in card


def test_a_folder_that_has_no_card_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        build_card(tmp_path)
    (tmp_path / "run.json").write_text('{"task": "pretr', encoding="utf-8")
    with pytest.raises(ValueError, match="not readable as JSON"):
        build_card(tmp_path)
    with pytest.raises(ValueError, match="names no task"):
        build_card(write_run(tmp_path, {}))
    with pytest.raises(ValueError, match=r"'juggling': the templates are .*pretrain_lm, .*train_tokenizer"):
        build_card(write_run(tmp_path, {"task": "juggling"}))
    with pytest.raises(ValueError, match=r"lacks what a card of pretrain_lm needs: .*model"):
        build_card(write_run(tmp_path, {"task": "pretrain_lm"}))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (count(9532), "9,532"),
        (count(5_868_800), "5.87 M"),
        (count(999_999_999), "1 B"),
        (count(1.4e12), "1.4 T"),
        (quantity(246_336, "B"), "246 kB"),
        (quantity(350e9, "FLOP/s"), "350 GFLOP/s"),
        (quantity(12, "B"), "12 B"),
        (duration(0.52), "0.5 s"),
        (duration(9.97), "10 s"),
        (duration(251.3), "4 min 11 s"),
        (duration(3600), "1 h"),
        (duration(3599.9), "1 h"),
        (duration(2 * 86400 + 5 * 3600), "2 d 5 h"),
    ],
)
def test_numbers_as_people_read_them(text, expected):
    assert text == expected
