"""The known failures of reinforcement learning are told once each, when they happen, and no sooner."""

from types import SimpleNamespace

import pytest

from training.reward_health import RewardHealth

SOUND = {"loss": 0.1, "reward": 0.5, "frac_reward_zero_std": 0.2, "completions/clipped_ratio": 0.1, "entropy": 0.8}


class Record:
    def __init__(self):
        self.content = {}

    def save(self, **sections):
        self.content |= sections


def warnings_of(history):
    record, state = Record(), SimpleNamespace(log_history=[], is_world_process_zero=True, global_step=0)
    callback = RewardHealth(record)
    for entry in history:
        state.global_step += 5
        state.log_history.append(entry)
        callback.on_log(None, state, None, logs=entry)
    return record.content.get("warnings", [])


@pytest.mark.parametrize(
    ("fault", "kind", "word"),
    [
        ({"frac_reward_zero_std": 1.0}, "equal_rewards", "the same reward"),
        ({"completions/clipped_ratio": 1.0}, "all_truncated", "--max_completion_length"),
        ({"entropy": 0.01}, "entropy_collapse", "explores no longer"),
    ],
)
def test_three_times_in_a_row_is_told_once(fault, kind, word, capsys):
    assert warnings_of([SOUND] + [SOUND | fault] * 2 + [SOUND] + [SOUND | fault] * 2) == []
    [warning] = warnings_of([SOUND] + [SOUND | fault] * 6)
    assert warning["kind"] == kind
    assert warning["step"] == 20
    assert word in warning["text"]
    assert capsys.readouterr().out.count("Warning at step 20") == 1


def test_a_reward_that_rises_without_accuracy():
    def history(end):
        evaluations = [{"eval_lenient_pass@1": 0.3}, {"eval_lenient_pass@1": end}]
        return [evaluations[0], *[SOUND] * 3, *[SOUND | {"reward": 0.8}] * 3, evaluations[1]]

    assert warnings_of(history(0.5)) == []
    [warning] = warnings_of(history(0.3))
    assert warning["kind"] == "reward_without_accuracy"
    assert "0.30" in warning["text"]


def test_a_sound_run_has_no_warnings():
    assert warnings_of([SOUND] * 20) == []
