"""run.json says what was asked and what came of it, and guards its folder."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from training.run_record import RunRecord, portable


def start(folder, **changes):
    arguments = {"learning_rate": 1e-3, "report_to": "none"} | changes
    record = RunRecord.start(folder, "pretrain_lm", arguments, {"train": {"fingerprint": "a"}})
    if not record.finished:
        record.save()
    return record


def test_a_stopped_run_goes_on_in_its_folder_and_its_time_adds_up(tmp_path):
    first = start(tmp_path / "run")
    first.save(history=[{"step": 1, "loss": 2.0}])
    second = start(tmp_path / "run", report_to="tensorboard")
    assert second.content["history"] == [{"step": 1, "loss": 2.0}]
    assert len(second.content["sessions"]) == 2
    assert second.content["wall_time_seconds"] == pytest.approx(sum(s["seconds"] for s in second.content["sessions"]))


def test_a_finished_run_stays_as_it_is(tmp_path):
    start(tmp_path / "run").finish(metrics={"eval_loss": 3.0})
    before = (tmp_path / "run" / "run.json").read_text()
    assert start(tmp_path / "run").finished
    assert (tmp_path / "run" / "run.json").read_text() == before


def test_another_run_in_the_folder_is_refused_with_the_difference(tmp_path):
    start(tmp_path / "run")
    with pytest.raises(ValueError, match=r"holds another run: learning_rate was 0\.001 and is now 0\.002"):
        start(tmp_path / "run", learning_rate=2e-3)
    with pytest.raises(ValueError, match="made by pretrain_lm, this is sft"):
        RunRecord.start(tmp_path / "run", "sft", {}, {})


def test_another_number_of_processes_is_another_run(tmp_path, monkeypatch):
    start(tmp_path / "run")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="processes was 1 and is now 2"):
        start(tmp_path / "run")


def test_a_folder_takes_one_process_at_a_time_and_is_free_when_that_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("training.run_record.SECONDS_FOR_THE_FOLDER", 0)
    start(tmp_path / "run")
    monkeypatch.setattr("training.run_record._held", {})  # as if this were another process
    with pytest.raises(ValueError, match=r"Another process is at work in .*run"):
        start(tmp_path / "run")

    writing = "import sys, time; from training.run_record import *; r = RunRecord.start(sys.argv[1], 'a', {}, {})"
    other = subprocess.Popen(
        [sys.executable, "-c", f"{writing}; r.save(); print(flush=True); time.sleep(60)", str(tmp_path / "other")],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
    )
    assert other.stdout.readline() == b"\n"
    with pytest.raises(ValueError, match=r"Another process is at work in .*other"):
        RunRecord.start(tmp_path / "other", "a", {}, {})
    other.kill()
    other.wait()
    assert RunRecord.start(tmp_path / "other", "a", {}, {}).content["status"] == "running"


def test_other_files_in_the_folder_are_refused(tmp_path):
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(ValueError, match=r"holds files but no run\.json \(holiday\.jpg"):
        start(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]


def test_a_half_written_record_is_never_the_one_that_is_read(tmp_path):
    start(tmp_path / "run")
    (tmp_path / "run" / "run.json.partial").write_text('{"task": "pre')
    assert start(tmp_path / "run").content["status"] == "running"
    assert json.loads((tmp_path / "run" / "run.json").read_text())["task"] == "pretrain_lm"


def test_no_path_of_a_machine_is_recorded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert portable({"train": {"dataset": str(tmp_path / "a")}, "n": [1]}) == {"train": {"dataset": "a"}, "n": [1]}
    assert portable({"dataset": "user/texts", "sample_prompts": ["/think about it"]}) == {
        "dataset": "user/texts",
        "sample_prompts": ["/think about it"],
    }
    monkeypatch.setattr(
        "sys.argv", ["x", "--config", str(tmp_path / "a.yaml"), f"--dataset={tmp_path}/b", "--seed", "1"]
    )
    assert start(tmp_path / "run").content["command"].endswith("--config a.yaml --dataset=b --seed 1")
