"""A GRPO step of TRL's trainer against the papers' formulas, computed directly in numpy from plain logits.

- GRPO: DeepSeekMath, arXiv 2402.03300, equations 3 and 4: rewards normalised in the group of a question, a mean over
  the tokens of a reply and then over replies, clipping, and the k3 estimate of the KL divergence inside the loss.
- DAPO, arXiv 2503.14476, equations 8 to 12: a mean over tokens, a wider upper bound of the clipping, no KL.
- Dr. GRPO, arXiv 2503.20783: no division by the standard deviation, and a constant in place of the replies' lengths.

What the papers leave open, and TRL decides: the standard deviation is the sample's (n - 1) and 1e-4 is added to it;
DAPO's token mean is over all groups of a batch, not over each; Dr. GRPO's constant is --max_completion_length. What TRL
adds unless told not to (`use_bias_correction_kl`): the KL is weighted by the ratio (DeepSeek-V3.2, arXiv 2512.02556).
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny_chat_model import new_tiny_model, tiny_tokenizer
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from training.dense_log_probs import DenseLogProbsMixin
from training.language_models import load_language_model

PROMPTS = ["A river", "Where does it begin?", "And", "A lake is water that"]  # of different lengths: they are padded
TIED, HALF_SCORED = PROMPTS[1:3]
REWARD_WEIGHTS = [1.0, 0.5]
GENERATIONS = 6
LENGTH = 12
TEMPERATURE = 0.7
MICRO_BATCHES = 2  # of an optimizer step

CLIP_HIGHER = {"epsilon": 0.2, "epsilon_high": 0.28, "beta": 0.0}
VARIANTS = {
    "grpo": {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": False},
    "grpo_without_truncated": {"loss_type": "grpo", "beta": 0.0, "mask_truncated_completions": True},
    "grpo_with_weighted_kl": {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": True},
    "dapo": {"loss_type": "dapo", **CLIP_HIGHER},
    "dapo_on_policy": {"loss_type": "dapo", "num_iterations": 1, **CLIP_HIGHER},
    "dapo_without_truncated": {"loss_type": "dapo", "mask_truncated_completions": True, **CLIP_HIGHER},
    "dapo_over_two_steps": {"loss_type": "dapo", "steps_per_generation": 2 * MICRO_BATCHES, **CLIP_HIGHER},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.0},
    "bnpo": {"loss_type": "bnpo", "scale_rewards": "batch", "beta": 0.0},
}


def fixed_random(completion_ids, salt):
    """A number between 0 and 1 that only the reply decides."""
    return np.random.default_rng([salt, *completion_ids]).random()


def main_reward(prompts, completion_ids, **kwargs):
    values = []
    for prompt, ids in zip(prompts, completion_ids, strict=True):
        value = 0.5 if prompt == TIED else fixed_random(ids, salt=1)
        values.append(None if prompt == HALF_SCORED else value)
    return values


def side_reward(prompts, completion_ids, **kwargs):
    return [
        0.25 if prompt == TIED else fixed_random(ids, salt=2)
        for prompt, ids in zip(prompts, completion_ids, strict=True)
    ]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """Of a model with random but decided opinions: a temperature does nothing to a uniform distribution."""
    model = new_tiny_model(tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter *= 5
    # So many ends that about half of the replies end by themselves.
    model.generation_config.eos_token_id = list(range(40, 70))
    path = tmp_path_factory.mktemp("grpo") / "model"
    model.save_pretrained(path)
    return path


def disturb(model, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)


class StepRecorder(TrainerCallback):
    """Makes updates off-policy, and notes the weights and the gradient of each."""

    def __init__(self):
        self.steps = []

    def on_step_begin(self, args, state, control, model, **kwargs):
        if state.global_step > 0:  # the replies are generated in the first step
            disturb(model, scale=0.01, seed=state.global_step)
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.steps.append(SimpleNamespace(weights=weights, micro_batches=[]))

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.steps[-1].gradient = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


class RecordingMixin:
    def _compute_loss(self, model, inputs):
        self.recorder.steps[-1].micro_batches.append(inputs)
        return super()._compute_loss(model, inputs)


class FusedTrainer(RecordingMixin, GRPOTrainer):
    """As on a GPU."""


class DenseTrainer(RecordingMixin, DenseLogProbsMixin, GRPOTrainer):
    """As on a CPU."""


def make_trainer(trainer_type, folder, tokenizer, output_dir, **changes):
    model = load_language_model(str(folder), dtype=torch.float32)
    disturb(model, scale=0.01, seed=99)  # the policy is no longer the reference, which is opened from the folder
    arguments = {
        "gradient_accumulation_steps": MICRO_BATCHES,
        "steps_per_generation": MICRO_BATCHES,
        "num_iterations": 2,
        "num_generations": GENERATIONS,
        "max_completion_length": LENGTH,
        "temperature": TEMPERATURE,
        "reward_weights": REWARD_WEIGHTS,
        "learning_rate": 1e-3,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    } | changes
    arguments["per_device_train_batch_size"] = len(PROMPTS) * GENERATIONS // arguments["steps_per_generation"]
    config = GRPOConfig(output_dir=str(output_dir), **arguments)
    steps_per_batch = config.num_iterations * config.steps_per_generation // config.gradient_accumulation_steps
    config.max_steps = steps_per_batch
    recorder = StepRecorder()
    trainer = trainer_type(
        model,
        [main_reward, side_reward],
        args=config,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tokenizer,
        callbacks=[recorder],
    )
    trainer.recorder = recorder
    return trainer


def unpadded_rows(inputs):
    """A batch of TRL's as a list of replies: ids without padding, and what TRL has computed of each."""
    rows = []
    for i, mask in enumerate(inputs["completion_mask"].bool()):
        counted = bool(mask.any())  # a truncated reply that is left out has lost its mask, and is of full length
        length = int(mask.sum()) if counted else LENGTH
        rows.append(
            SimpleNamespace(
                prompt_ids=inputs["prompt_ids"][i][inputs["prompt_mask"][i].bool()].tolist(),
                ids=inputs["completion_ids"][i, :length].tolist(),
                counted=counted,
                trl={
                    name: inputs[name][i].numpy()
                    for name in ("advantages", "old_per_token_logps", "ref_per_token_logps")
                    if name in inputs
                },
            )
        )
    return rows


def log_distributions(model, prompt_ids, ids, temperature):
    """`(tokens, vocabulary)` of a reply, from the plain logits of the one text."""
    logits = model(input_ids=torch.tensor([prompt_ids + ids])).logits[0, len(prompt_ids) - 1 : -1]
    return (logits / temperature).log_softmax(-1)


def log_probs(model, row):
    """`(tokens,)` of a reply, at the temperature it was sampled with."""
    return log_distributions(model, row.prompt_ids, row.ids, TEMPERATURE).gather(1, torch.tensor(row.ids)[:, None])[
        :, 0
    ]


def in_float64(folder, weights=None):
    model = load_language_model(str(folder), dtype=torch.float64)
    if weights is not None:
        model.load_state_dict(weights)
    return model


def advantages(rows, scale_rewards):
    """Of the replies of a generated batch: equation 3's normalised rewards, Dr. GRPO's, or by the batch's deviation."""
    prompts = {tuple(row.prompt_ids): [] for row in rows}
    for row in rows:
        prompts[tuple(row.prompt_ids)].append(row.reward)
    groups = {prompt: np.array(rewards) for prompt, rewards in prompts.items()}
    assert [len(group) for group in groups.values()] == [GENERATIONS] * len(groups)
    deviation_of_all = np.std([row.reward for row in rows], ddof=1)
    found = []
    for row in rows:
        group = groups[tuple(row.prompt_ids)]
        scale = {"group": np.std(group, ddof=1) + 1e-4, "batch": deviation_of_all + 1e-4, "none": 1.0}[scale_rewards]
        found.append((row.reward - group.mean()) / scale)
    return np.array(found)


def weight_of_token(loss_type, row, update, batch):
    """By which a token's loss is multiplied before all are summed: what sets the losses apart.

    Args:
        update: micro-batches of the optimizer step, as lists of replies.
        batch: all replies that were generated together.
    """
    replies = sum(len(micro_batch) for micro_batch in update)
    if loss_type == "grpo":
        return 1 / (replies * len(row.ids))
    if loss_type == "dr_grpo":
        return 1 / (replies * LENGTH)
    if loss_type == "dapo":  # of an update on a part of the batch, the part's share
        return len(batch) / replies / sum(len(other.ids) for other in batch if other.counted)
    (own,) = [micro_batch for micro_batch in update if row in micro_batch]
    return 1 / (len(update) * sum(len(other.ids) for other in own))


def token_losses(row, config):
    """Of one reply, `(tokens,)` each: its terms of the loss, unweighted, and their slope by the log-probabilities."""
    low, high = 1 - config.epsilon, 1 + (config.epsilon_high or config.epsilon)
    ratio = np.exp(row.new - row.old)
    loss = -np.minimum(ratio * row.advantage, np.clip(ratio, low, high) * row.advantage)
    row.clipped_high = (ratio > high) & (row.advantage > 0)
    row.clipped_low = (ratio < low) & (row.advantage < 0)
    slope = np.where(row.clipped_high | row.clipped_low, 0.0, -ratio * row.advantage)
    if config.beta:
        to_reference = np.exp(row.reference - row.new)
        kl, kl_slope = to_reference - (row.reference - row.new) - 1, 1 - to_reference
        if config.use_bias_correction_kl:
            kl, kl_slope = ratio * kl, ratio * (kl + kl_slope)
        loss, slope = loss + config.beta * kl, slope + config.beta * kl_slope
    return loss, slope


def reward_by_hand(row, tokenizer):
    prompt = tokenizer.decode(row.prompt_ids, skip_special_tokens=True)
    given = [
        function(prompts=[prompt], completion_ids=[row.ids], completions=[""])[0]
        for function in (main_reward, side_reward)
    ]
    return sum(weight * value for weight, value in zip(REWARD_WEIGHTS, given, strict=True) if value is not None)


@pytest.mark.parametrize(
    ("variant", "trainer_type"),
    [*((variant, DenseTrainer) for variant in VARIANTS), *((variant, FusedTrainer) for variant in list(VARIANTS)[:3])],
)
def test_advantages_loss_and_gradient_are_the_papers(variant, trainer_type, folder, tokenizer, tmp_path):
    trainer = make_trainer(trainer_type, folder, tokenizer, tmp_path, **VARIANTS[variant])
    config = trainer.args
    trainer.train()
    recorded = trainer.recorder.steps
    updates = [[unpadded_rows(inputs) for inputs in step.micro_batches] for step in recorded]

    # Later iterations read the same replies again.
    once = updates[: len(updates) // config.num_iterations]
    batch = [row for update in once for micro_batch in update for row in micro_batch]
    old, reference = in_float64(folder, recorded[0].weights), in_float64(folder)
    for row in batch:
        row.reward = reward_by_hand(row, tokenizer)
    expected = advantages(batch, config.scale_rewards)
    assert np.array([row.trl["advantages"] for row in batch]) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert np.sum(np.abs(expected) < 1e-9) == GENERATIONS  # of the question whose replies are all as good
    assert 0.2 < np.mean([len(row.ids) == LENGTH for row in batch]) < 0.8
    assert all(row.counted for row in batch) == (not config.mask_truncated_completions)

    known = {}
    with torch.no_grad():
        for row, advantage in zip(batch, expected, strict=True):
            row.advantage = advantage
            row.old, row.reference = (log_probs(model, row).numpy() for model in (old, reference))
            known[tuple(row.prompt_ids), tuple(row.ids)] = row
            for name, values in (("old_per_token_logps", row.old), ("ref_per_token_logps", row.reference)):
                if row.counted and name in row.trl:
                    assert row.trl[name][: len(row.ids)] == pytest.approx(values, abs=2e-5)
    assert ("ref_per_token_logps" in batch[0].trl) == (config.beta > 0)
    assert ("old_per_token_logps" in batch[0].trl) == (len(recorded) > 1)

    for number, (step, update) in enumerate(zip(recorded, updates, strict=True)):
        update = [[known[tuple(row.prompt_ids), tuple(row.ids)] for row in rows] for rows in update]
        model = in_float64(folder, step.weights)
        loss, clipped = 0.0, []
        for row in (row for rows in update for row in rows if row.counted):
            current = log_probs(model, row)
            row.new = current.detach().numpy()
            weight = weight_of_token(config.loss_type, row, update, batch)
            losses, slopes = token_losses(row, config)
            loss += weight * losses.sum()
            (torch.from_numpy(weight * slopes) * current).sum().backward()
            clipped.append((row.clipped_low.mean(), row.clipped_high.mean()))
        if number == 0:
            assert not np.any(clipped)  # on-policy
        else:
            assert np.mean(clipped, axis=0).min() > 0.01
        assert trainer.state.log_history[number]["loss"] == pytest.approx(loss, rel=1e-4, abs=1e-5)
        gradient = dict(model.named_parameters())
        assert gradient.keys() == step.gradient.keys()
        difference = math.sqrt(sum((gradient[name].grad - step.gradient[name]).square().sum() for name in gradient))
        assert difference < 1e-4 * math.sqrt(sum(value.grad.square().sum() for value in gradient.values()))


@pytest.mark.parametrize(
    ("temperature", "trainer_type"),
    [(0.5, FusedTrainer), (1.0, DenseTrainer), (1.6, FusedTrainer), (1.6, DenseTrainer)],
)
def test_the_policy_that_is_scored_is_the_one_that_is_sampled(temperature, trainer_type, folder, tokenizer, tmp_path):
    trainer = make_trainer(trainer_type, folder, tokenizer, tmp_path, temperature=temperature)
    model = trainer.model
    # What a base may bring with it must not bend the samples.
    model.generation_config.update(top_k=3, top_p=0.5, repetition_penalty=2.0)
    torch.manual_seed(0)
    prompts = tokenizer(PROMPTS)["input_ids"]
    copies = [prompt for prompt in prompts for _ in range(100)]
    replies, _ = trainer._generate_single_turn(copies, None, {}, 100)

    rows = list(zip(copies, replies, strict=True))[::50]
    width, longest = max(map(len, prompts)), max(len(reply) for _, reply in rows)
    ids = torch.full((len(rows), width + longest), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for i, (prompt, reply) in enumerate(rows):
        taken = slice(width - len(prompt), width + len(reply))
        ids[i, taken], mask[i, taken] = torch.tensor(prompt + reply), 1
    with torch.no_grad():
        scored, entropies, _ = trainer._get_per_token_logps_and_entropies(
            model, ids, mask, longest, compute_entropy=True
        )
        every = [log_distributions(model, *row, temperature) for row in zip(copies, replies, strict=True)]
    for i, (_, reply) in enumerate(rows):
        plain = every[50 * i]
        torch.testing.assert_close(scored[i, : len(reply)], plain.gather(1, torch.tensor(reply)[:, None])[:, 0])
        torch.testing.assert_close(entropies[i, : len(reply)], -(plain.exp() * plain).sum(-1))

    # The surprise at a sample is the entropy on average: a sampler that is sharper or flatter would be off.
    every, sampled = torch.cat(every), torch.tensor([token for reply in replies for token in reply])
    surprise = -every.gather(1, sampled[:, None])[:, 0] + (every.exp() * every).sum(-1)
    assert surprise.mean().abs() < 4 * surprise.std() / math.sqrt(len(surprise))
