"""Watches a run of reinforcement learning for the ways in which it is known to fail, and says so when it happens."""

from typing import Any

from transformers import TrainerCallback

from .run_record import RunRecord

# A policy of which this little of its entropy is left samples one reply over and over.
COLLAPSED_ENTROPY = 0.05
# Log lines in a row before a warning: one batch may come out so by chance.
PATIENCE = 3
# By this much has the mean reward risen where held-out accuracy has not; a right answer's is about 1.
RISEN_REWARD = 0.1


class RewardHealth(TrainerCallback):
    """Writes warnings into the section `warnings` of the run's record, each kind once, and prints them."""

    def __init__(self, record: RunRecord):
        self.record = record

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or not state.is_world_process_zero:
            return
        steps = [entry for entry in state.log_history if "reward" in entry and "loss" in entry]
        for kind, text in _faults(steps, state.log_history):
            warnings = self.record.content.get("warnings", [])
            if kind not in [warning["kind"] for warning in warnings]:
                print(f"Warning at step {state.global_step}: {text}", flush=True)
                self.record.save(warnings=[*warnings, {"step": state.global_step, "kind": kind, "text": text}])


def _faults(steps: list[dict[str, Any]], history: list[dict[str, Any]]) -> list[tuple[str, str]]:
    found = []
    last = steps[-PATIENCE:]
    if len(last) == PATIENCE:
        if all(entry["frac_reward_zero_std"] == 1.0 for entry in last):
            found.append(
                (
                    "equal_rewards",
                    "in every group all completions have the same reward, so that nothing is learnt. Take problems "
                    "that are solved now and then (neither always nor never), more --num_generations, or a reward "
                    "of parts.",
                )
            )
        if all(entry["completions/clipped_ratio"] == 1.0 for entry in last):
            found.append(
                (
                    "all_truncated",
                    "every completion was cut at --max_completion_length before its end. Raise it, or teach the model "
                    "to stop first (`training.sft`).",
                )
            )
        first_entropy = steps[0].get("entropy")
        if first_entropy and all((entry.get("entropy") or 0.0) < COLLAPSED_ENTROPY * first_entropy for entry in last):
            found.append(
                (
                    "entropy_collapse",
                    f"the entropy of the policy has fallen below {COLLAPSED_ENTROPY:.0%} of what it began with: it "
                    "explores no longer. Lower --learning_rate, raise --epsilon_high or --beta, or stop here.",
                )
            )
    evaluations = [entry for entry in history if "eval_lenient_pass@1" in entry]
    if len(evaluations) >= 2 and len(steps) >= 2 * PATIENCE:
        rewards = [entry["reward"] for entry in steps if entry["reward"] is not None]
        rise = sum(rewards[-PATIENCE:]) / PATIENCE - sum(rewards[:PATIENCE]) / PATIENCE
        gain = evaluations[-1]["eval_lenient_pass@1"] - evaluations[0]["eval_lenient_pass@1"]
        if rise > RISEN_REWARD and gain <= 0:
            found.append(
                (
                    "reward_without_accuracy",
                    f"the reward rose by {rise:.2f} while held-out accuracy went from "
                    f"{evaluations[0]['eval_lenient_pass@1']:.3f} to {evaluations[-1]['eval_lenient_pass@1']:.3f}: the "
                    "policy serves the reward rather than the task. Read completions/, and reward answers more.",
                )
            )
    return found
