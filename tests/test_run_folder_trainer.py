"""Checkpoints that can be resumed from, and no others."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from training.run_folder_trainer import STAGING, check_disk_space, last_good_checkpoint, prepare_to_resume


@pytest.fixture
def run_folder(tmp_path):
    for step in (5, 10, 20):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        save_file({"weight": torch.ones(100)}, folder / "model.safetensors")
        torch.save({"state": torch.ones(100)}, folder / "optimizer.pt")
        torch.save({"cpu": torch.ones(100)}, folder / "rng_state.pth")
    return tmp_path


def test_the_newest_checkpoint_is_taken_by_number_not_by_name(run_folder):
    shutil.copytree(run_folder / "checkpoint-5", run_folder / "checkpoint-100")
    assert last_good_checkpoint(run_folder) == str(run_folder / "checkpoint-100")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_a_truncated_file_makes_the_one_before_the_last_good(run_folder, name, kept):
    path = run_folder / "checkpoint-20" / name
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    assert last_good_checkpoint(run_folder) == str(run_folder / "checkpoint-10")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"])
def test_a_damaged_checkpoint_makes_room_for_the_one_that_comes(run_folder, name):
    (run_folder / "checkpoint-20" / name).unlink()
    assert prepare_to_resume(run_folder) == str(run_folder / "checkpoint-10")
    assert not (run_folder / "checkpoint-20").exists()


def test_a_truncated_config_of_an_adapter_is_damage_too(run_folder):
    (run_folder / "checkpoint-20" / "adapter_config.json").write_text('{"r": 4,')
    assert last_good_checkpoint(run_folder) == str(run_folder / "checkpoint-10")


def test_what_a_killed_save_left_behind_is_cleared(run_folder):
    shutil.copytree(run_folder / "checkpoint-20", run_folder / STAGING / "checkpoint-30")
    assert prepare_to_resume(run_folder) == str(run_folder / "checkpoint-20")
    assert not (run_folder / STAGING).exists()


def test_a_folder_without_checkpoints_starts_afresh(tmp_path):
    assert prepare_to_resume(tmp_path) is None


def test_a_full_disk_is_told_before_the_work(tmp_path):
    with pytest.raises(OSError, match="GiB for checkpoints and the disk has"):
        check_disk_space(tmp_path / "not" / "there" / "yet", 2**60)
