"""A card's header is what the Hub understands, for every task; the energy and the commands are what they say."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from card_runs import card_text, python_snippets, write_run
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from test_hub_cards import full_run, tokenizer_run
from test_hub_cards_reinforcement import grpo_run, r1_run
from test_hub_cards_tuning import KINDS, TASKS, tuned_run
from test_hub_cards_vision import classifier_run, encoder_run
from transformers.pipelines import SUPPORTED_TASKS

from hub_cards.build_card import build_card, in_lines
from hub_cards.energy import WATTS_PER_CORE, estimate_energy
from hub_cards.metadata import HUB_LICENSES

RUNS = {
    "pretrain_lm": full_run,
    "train_tokenizer": tokenizer_run,
    "pretrain_fcmae": encoder_run,
    "finetune_classifier": classifier_run,
    "grpo": grpo_run,
    "r1": r1_run,
} | {f"{task}_{kind}": lambda task=task, kind=kind: tuned_run(task, kind) for task in TASKS for kind in KINDS}
SAMPLES = Path(__file__).parents[1] / "training/sample_data"
CPU = {"cpu": "Some CPU", "cores": 2, "memory_gib": 23.5, "accelerators": [], "processes": 1}


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Pictures take most of a card's time."""
    for draw in ("draw_stages", "draw_road_by_step"):
        monkeypatch.setattr(f"hub_cards.build_card.{draw}", lambda report, folder: {})
    monkeypatch.setattr("hub_cards.build_card.draw_confusion", lambda labels, counts, folder: None)


def header(folder: Path, run: dict) -> dict:
    """The card's YAML header as any reader of YAML sees it."""
    return yaml.safe_load(card_text(folder, run | {"history": []}).split("---\n")[1])


@pytest.mark.parametrize("name", RUNS)
def test_the_hub_can_read_the_header(tmp_path, name):
    run = RUNS[name]()
    run["metrics"] = run.get("metrics", {}) | {"eval_loss": float("nan")}  # which is no figure
    read = header(tmp_path / "run", run)
    assert read.get("library_name", "transformers") in ("transformers", "peft")
    assert read.get("pipeline_tag") in {*SUPPORTED_TASKS, None}
    assert ("pipeline_tag" in read) == (name not in ("train_tokenizer", "r1"))
    assert read.get("license") in HUB_LICENSES | {None}
    assert all(re.fullmatch("[a-z]{2}", language) for language in read.get("language", []))
    assert all(isinstance(tag, str) and tag for tag in read["tags"])
    if (index := read.get("model-index")) is not None:
        model_name, results = model_index_to_eval_results(index)
        assert model_name == "run"
        assert eval_results_to_model_index(model_name, results) == index
        assert all(result.metric_value == result.metric_value for result in results)
    elif name not in ("train_tokenizer", "r1"):
        pytest.fail("Its results are not in the header.")


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parents[1] / "training/sample_data").glob("*/info.json")), ids=str
)
def test_the_samples_are_described_in_the_hub_s_terms(file):
    info = json.loads(file.read_text(encoding="utf-8"))
    assert info["license"] in HUB_LICENSES
    assert all(re.fullmatch("[a-z]{2}", language) for language in info.get("language", []))


@pytest.mark.parametrize(("kind", "relation"), [("full", "finetune"), ("merged", "finetune"), ("adapter", "adapter")])
def test_a_base_on_the_hub_is_named_with_its_relation(tmp_path, kind, relation):
    run = tuned_run("sft", kind)
    assert not {"base_model", "base_model_relation"} & header(tmp_path / "run", run).keys()
    run["data"]["model"] = {"path": "someone/base", "source": "hub"}
    read = header(tmp_path / "run", run)
    assert (read["base_model"], read["base_model_relation"]) == ("someone/base", relation)


def test_a_licence_that_the_hub_does_not_know_is_other_with_a_name(tmp_path):
    run = full_run()
    run["data"]["train"]["info"]["license"] = "Our Own Licence, 2nd edition"
    read = header(tmp_path / "run", run)
    assert (read["license"], read["license_name"]) == ("other", "our-own-licence-2nd-edition")


def test_the_non_commercial_licence_of_official_weights_goes_with_what_is_tuned_from_them(tmp_path):
    assert header(tmp_path / "run", classifier_run() | {"base_license": "CC-BY-NC-4.0"})["license"] == "cc-by-nc-4.0"


@pytest.mark.parametrize("name", RUNS)
def test_a_card_for_the_hub_knows_its_address_and_no_folder_beside_the_reader(tmp_path, name):
    if name == "r1":
        pytest.skip("It holds no model.")
    folder = write_run(tmp_path / "run", RUNS[name]() | {"history": []})
    card = build_card(folder, hub_id="someone/small-model").read_text(encoding="utf-8")
    assert "\n# small-model\n" in card
    opened = re.findall(r'(?:from_pretrained\(|adapter = )"(.*?)"', python_snippets(card))
    assert set(opened) == {"someone/small-model"}
    if "### In other tools" in card:
        assert "hf download someone/small-model --local-dir small-model\n" in card


def test_an_id_that_the_hub_would_refuse_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Repo id"):
        build_card(write_run(tmp_path / "run", full_run()), hub_id="some one/model")
    assert not (tmp_path / "run" / "README.md").exists()


@pytest.mark.parametrize(
    ("changes", "hours", "watt_hours"),
    [
        ({}, 1, 2 * WATTS_PER_CORE),
        ({"accelerators": ["NVIDIA H100 80GB HBM3"] * 8, "processes": 8}, 2, 2 * 8 * 700),
        ({"accelerators": ["NVIDIA H100 80GB HBM3"] * 8, "processes": 32}, 1, 32 * 700),
        ({"accelerators": ["Tesla T4", "NVIDIA L4"], "processes": 1}, 1, 70 + 72),
        ({"accelerators": ["NVIDIA H100 80GB HBM3 MIG 1g.10gb"]}, 1, None),
        ({"accelerators": ["NVIDIA L4", "An accelerator of tomorrow"]}, 1, None),
    ],
)
def test_energy_is_time_times_rated_power_and_unknown_where_the_power_is(changes, hours, watt_hours):
    energy = estimate_energy(CPU | changes, 3600 * hours)
    assert (energy and energy.watt_hours) == watt_hours


def test_the_card_calls_the_energy_an_estimate_and_gives_its_formula(tmp_path):
    run = full_run() | {"history": [], "wall_time_seconds": 3600.0}
    card = card_text(tmp_path / "run", run)
    assert "| Energy, estimated | about 20 Wh |" in card
    assert "The energy is an estimate: 1 h × 2 cores × 10 W" in card
    del run["wall_time_seconds"]
    assert "nergy" not in card_text(tmp_path / "run", run)


@pytest.mark.parametrize(
    "command",
    [
        'python -m training.grpo --config a.yaml --difficulty \'{"min_terms": 4, "max_terms": 12}\' '
        + "--output_dir runs/a --max_steps 24 --eval_steps 8 --logging_steps 4 --run_name 'a -- name'",
        "python -m training.sft --config quickstart.yaml",
        "python -m training.evaluate 'an open quote",
    ],
)
def test_a_long_command_in_lines_is_the_same_command(command):
    lines = in_lines(command)
    assert max(map(len, lines.splitlines())) <= 92
    if command.count("'") % 2 == 0:
        assert shlex.split(lines.replace("\\\n", " ")) == shlex.split(command)
