"""`python -m training.train_tokenizer`: the folder it leaves, its report, and how it ends on mistakes."""

import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from transformers import AutoTokenizer

from hf_models.bpe_tokenizer import train_bpe
from training import train_tokenizer
from training.text_data import load_text_dataset
from training.tokenizer_report import measure

RECIPE = Path(__file__).parents[1] / "training/recipes/bpe_tokenizer/quickstart.yaml"


@pytest.fixture(autouse=True)
def _cache_in_a_temporary_folder(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    datasets.disable_progress_bars()  # They would fill stderr, which the tests read.
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command in this process; gives its exit status, stdout and stderr."""

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["train_tokenizer", *map(str, words)])
        try:
            train_tokenizer.main()
            status = 0
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return command


def test_quickstart_recipe_makes_a_tokenizer_that_opens(run, tmp_path):
    status, _, _ = run("--config", RECIPE, "--output_dir", tmp_path / "out")
    assert status == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(tokenizer) == 4096
    record = json.loads((tmp_path / "out/run.json").read_text(encoding="utf-8"))
    assert record["status"] == "finished"
    assert record["data"]["eval"]["bytes"] == 246_336
    assert record["metrics"]["texts_not_round_tripped"] == 0
    assert record["metrics"]["bytes_per_token"] > 3


def test_single_file_with_slices_and_peers(run, tmp_path):
    leads = load_text_dataset("wikipedia_leads", "train[:200]")["text"]
    (tmp_path / "notes.txt").write_text("\n\n".join(leads), encoding="utf-8")
    status, out, _ = run(
        *("--dataset", tmp_path / "notes.txt", "--dataset_split", "train[:90%]", "--eval_dataset_split", "train[90%:]"),
        *("--style", "llama", "--vocab_size", 700, "--compare_with_peers", "--output_dir", tmp_path / "out"),
    )
    assert status == 0
    report = json.loads((tmp_path / "out/run.json").read_text(encoding="utf-8"))["tokenizer_report"]
    assert next(iter(report)) == "this tokenizer"
    assert len(report) == 4  # The text has too few merges for one of GPT-2's size.
    assert all(figures["vocab_size"] == 700 and not figures["texts_not_round_tripped"] for figures in report.values())
    assert all(name in out for name in report)


def test_figures_follow_from_their_definitions():
    """With no merges, byte-level has a token a byte, and so has LLaMA style for ASCII and its leading spaces."""
    for style, extra in (("byte_level", 0), ("llama", 1)):
        smallest = {"byte_level": 267, "llama": 268 + len("▁abc")}[style]
        figures = measure(train_bpe(["ab c"], smallest, style=style), ["ab c", "é"])
        tokens = len("ab c") + len("é".encode()) + 2 * extra
        assert figures["single_byte_share"] == 1.0
        assert figures["bytes_per_token"] == pytest.approx(6 / tokens, abs=1e-4)
        assert figures["tokens_per_word"] == pytest.approx(tokens / 3, abs=1e-4)


def test_same_command_again_does_nothing_and_another_is_refused(run, tmp_path):
    command = ("--vocab_size", 300, "--output_dir", tmp_path / "out")
    run(*command)
    before = (tmp_path / "out/tokenizer.json").stat().st_mtime_ns
    status, out, _ = run(*command)
    assert (status, "finished" in out) == (0, True)
    status, _, err = run("--vocab_size", 400, "--output_dir", tmp_path / "out")
    assert status == 2
    assert "another run" in err
    assert (tmp_path / "out/tokenizer.json").stat().st_mtime_ns == before


def test_refused_vocab_size_leaves_the_folder_free(run, tmp_path):
    status, _, err = run("--vocab_size", 100, "--output_dir", tmp_path / "out")
    assert (status, "ask for 267 or more" in err) == (2, True)
    status, _, _ = run("--vocab_size", 267, "--output_dir", tmp_path / "out")
    assert status == 0


def test_max_bytes_bounds_what_is_read(run, tmp_path):
    status, _, err = run("--max_bytes", 1000, "--vocab_size", 4096, "--output_dir", tmp_path / "out")
    assert (status, "too little" in err) == (2, True)


@pytest.mark.parametrize(
    ("recipe", "words", "sentence"),
    [
        ("vocab_sise: 300", [], "Unknown field 'vocab_sise' in RECIPE: did you mean 'vocab_size'?"),
        ("", ["--vocab", "300"], "Unknown field 'vocab' in the command line: did you mean 'vocab_size'?"),
        ("", ["stray"], "'stray' on the command line belongs to no field: remove it, or name its field"),
        ("- a list", [], "must contain a YAML mapping"),
        ("dataset: [", [], "RECIPE is not valid YAML"),
        ("dataset: nowhere.txt", [], "no file or folder 'nowhere.txt'"),
        ("dataset: owner/name", [], "HF_HUB_OFFLINE"),
        ("eval_dataset_split: dev", [], "has the splits 'train', 'test'"),
        ("style: word", [], "The style 'word' is unknown"),
        ("pattern: nanochat", [], "The pattern 'nanochat' is unknown"),
    ],
)
def test_mistakes_end_in_one_line_and_status_2(recipe, words, sentence, run, tmp_path):
    (tmp_path / "recipe.yaml").write_text(recipe or "vocab_size: 300", encoding="utf-8")
    status, _, err = run("--config", tmp_path / "recipe.yaml", *words, "--output_dir", tmp_path / "out")
    assert status == 2
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert sentence.replace("RECIPE", str(tmp_path / "recipe.yaml")) in err
    assert not (tmp_path / "out/run.json").exists()


def test_module_runs_as_documented(tmp_path):
    command = [sys.executable, "-m", "training.train_tokenizer", "--config", str(tmp_path / "none.yaml")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=RECIPE.parents[3])
    assert ended.returncode == 2
    assert ended.stderr.splitlines() == [f"Error: [Errno 2] No such file or directory: '{tmp_path}/none.yaml'"]
