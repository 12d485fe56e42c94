"""Trains a language model by reinforcement learning with rewards that can be computed: GRPO (arXiv 2402.03300).

    python -m training.grpo --config training/recipes/llama_style/grpo_quickstart.yaml
    accelerate launch --config_file training/accelerate_configs/ddp.yaml -m training.grpo --config ...

Reads a model (a base, or one that chats), problems with known answers (`training.problems`) and, with --reward_model,
prompts without one; writes a model folder, or with --use_peft an adapter's, with its `run.json` and card. The same
command again goes on from the last checkpoint, or says that the run is finished. Notable here:
- rewards are named (`training.rewards`), or functions of the user's own by their import path; one that fails is named
  with the completion that it failed on, and the steps done until then are kept;
- held-out problems are solved several times each at every evaluation: pass@1 and pass@k with 95 % intervals, strict
  (the answer is right and the format is kept) and lenient (the answer is right);
- what was sampled can be read: `completions/step-N.jsonl`, with every reward and the advantage;
- the known ways to fail are watched for and told when they happen (`training.reward_health`);
- `--dry_run true` predicts the memory of an update, and loads nothing.
Fields are those of the dataclasses below, of `AdapterArguments`, `QuantizationArguments` and TRL's `GRPOConfig`: loss
types, clipping, KL (--beta), several updates a batch (--num_iterations), vLLM (--use_vllm, --vllm_mode) are TRL's own.
"""

import json
import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from trl import GRPOConfig, GRPOTrainer
from trl.models import unwrap_model_for_generation

from .chat_data import describe_rows, load_conversations
from .dense_log_probs import DenseLogProbsMixin
from .exact_match import continue_prompts, prompt_ids
from .language_models import LanguageModelArguments, flops_per_token
from .problems import ProblemArguments, load_problems, parse_difficulty, prompt_of, without
from .quantization import keep_adapter_dtype
from .reward_health import RewardHealth
from .rewards import REWARDS, TAGS, RewardError, checked, reward_by_name, reward_model
from .run_folder_trainer import RunFolderMixin
from .run_setup import evaluate_the_end, final_metrics, finish_run, train_from_command_line
from .solving import check_room, mean_interval, sample_replies, summarise
from .tuning import (
    TuningTrainingArguments,
    check_tuning,
    open_base,
    open_tuned_run,
    parse_tuning,
    predict_memory,
    save_tuned_model,
    with_adapter,
)

# Where --reward_weights is not given: an answer counts most, the format enough to be learnt.
DEFAULT_WEIGHTS = {"format": 0.3}
# The reward model's name among the rewards.
REWARD_MODEL = "reward_model"
PREDICTED_PROMPT = 256  # tokens, for --dry_run


@dataclass
class GrpoArguments(LanguageModelArguments, ProblemArguments):
    eval_dataset: str | None = field(
        default=None, metadata={"help": "Problems to evaluate on. By default another split of --dataset."}
    )
    eval_dataset_split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    eval_difficulty: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Of a generator of held-out problems, as JSON; by default --difficulty."}
    )
    num_eval_problems: int | None = field(
        default=100, metadata={"help": "Held-out problems; more give narrower intervals."}
    )
    eval_samples: int = field(default=8, metadata={"help": "Replies to each held-out problem, the k of pass@k."})
    rewards: list[str] = field(
        default_factory=lambda: ["accuracy", "format"],
        metadata={
            "help": f"Of {', '.join(REWARDS)}; or the import path of a function f(prompts, completions, **columns) "
            "that returns a number for each completion, or None where it has nothing to say."
        },
    )
    reward_timeout: float = field(default=60.0, metadata={"help": "Seconds a reward may take for a batch."})
    reward_model: str | None = field(
        default=None,
        metadata={"help": "A reward model (`training.reward`) for the --prompt_dataset; its weight comes last."},
    )
    prompt_dataset: str | None = field(
        default=None,
        metadata={"help": "Conversations whose last question only the reward model scores, as in --dataset of SFT."},
    )
    prompt_dataset_split: str = field(default="train", metadata={"help": "Its split; slices: train[:500]."})

    def __post_init__(self):
        LanguageModelArguments.__post_init__(self)
        ProblemArguments.__post_init__(self)
        self.eval_difficulty = parse_difficulty("eval_difficulty", self.eval_difficulty)
        if isinstance(self.rewards, str):
            self.rewards = [self.rewards]
        self.rewards = [name for name in self.rewards if name]  # the command line's way to give none
        # "" takes back what a recipe gives.
        self.reward_model, self.prompt_dataset = self.reward_model or None, self.prompt_dataset or None
        if (self.reward_model is None) != (self.prompt_dataset is None):
            raise ValueError("--reward_model scores the replies to --prompt_dataset: give both or neither.")
        if not self.rewards and self.reward_model is None:
            raise ValueError("--rewards is empty: name at least one, or give a --reward_model.")
        if not self.dataset and self.prompt_dataset is None:
            raise ValueError("--dataset is empty: name problems, or give a --prompt_dataset.")
        if self.eval_samples < 1:
            raise ValueError(f"--eval_samples is {self.eval_samples}: give 1 or more.")


@dataclass
class GrpoTrainingArguments(TuningTrainingArguments, GRPOConfig):
    # An adapter's is ten times that for all weights, as for the preferences.
    full_learning_rate: ClassVar[float] = 1e-6
    adapter_learning_rate: ClassVar[float] = 1e-5

    output_dir: str = field(default="runs/grpo", metadata={"help": "The run folder."})
    learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Peak learning rate; by default 1e-6 (DeepSeekMath's) on all weights and 1e-5 on an adapter. "
            "Models of a few million parameters need a hundred times that."
        },
    )

    per_device_eval_batch_size: int = field(
        default=128, metadata={"help": "Replies to held-out problems that are written at once."}
    )

    def __post_init__(self):
        # TRL's own evaluation asks for batches of whole groups; ours samples as many replies as --eval_samples says.
        self.num_generations_eval = 1
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "pass@1"
        super().__post_init__()

    @property
    def steps_a_cycle(self) -> int:
        """Optimizer steps after which a new batch of completions and a new step begin together."""
        generation = self.steps_per_generation * self.num_iterations
        return math.lcm(generation, self.gradient_accumulation_steps) // self.gradient_accumulation_steps


class GrpoTrainer(RunFolderMixin, DenseLogProbsMixin, GRPOTrainer):
    """TRL's trainer that writes down what was sampled, and evaluates by solving held-out problems.

    Args:
        held_out: rows `question`, `answer`, `entry` and `prompt`; of those without an answer the reward model's score
            is taken.
        samples: replies to each.
        score: the reward model's function, where there is one.
    """

    def __init__(
        self,
        *args,
        held_out: list[dict[str, Any]],
        samples: int,
        score: Callable | None = None,
        **kwargs,
    ):
        # Trainer wants an eval_dataset wherever an eval_strategy is set.
        eval_dataset = Dataset.from_list(held_out) if held_out else None
        super().__init__(*args, eval_dataset=eval_dataset, **kwargs)
        self.held_out, self.samples, self.score = held_out, samples, score
        self._tokens_in_step: torch.Tensor | int = 0
        if isinstance(self.model, PeftModel) and "ref" in self.model.peft_config:
            # TRL's copy of the new adapter, which is zero. With the adapter switched off, the base is the reference.
            self.model.delete_adapter("ref")

    # ---- prompts, counts, checkpoints ----

    def _tokenize_prompts(self, prompts: list):
        # A text begins as a document did in pretraining, whatever the tokenizer adds by itself.
        questions = [{"prompt": prompt} for prompt in prompts]
        return prompt_ids(questions, self.processing_class, apply_chat_template=False), None, {}

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        # Of `continue_prompts`' pieces some of what --generation_kwargs may ask for would hold for each piece alone.
        own_way = self.use_vllm or self.use_transformers_continuous_batching or self.args.generation_kwargs
        if own_way or self._sharded:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        # TRL's way goes on for all completions until the last one ends.
        of_its_own = ("max_new_tokens", "eos_token_id", "pad_token_id")
        options = {name: value for name, value in self.generation_kwargs.items() if name not in of_its_own}
        with self._whole_model() as model:
            completions = continue_prompts(
                model,
                prompt_ids,
                self.args.max_completion_length,
                self.eos_token_ids,
                self.processing_class.pad_token_id,
                **options,
            )
        return completions, None

    @property
    def _sharded(self) -> bool:
        """Whether every process has to take part in every forward pass of the others."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _prepare_inputs(self, generation_batch):
        inputs = super()._prepare_inputs(generation_batch)
        self._batch = inputs
        self._tokens_in_step += inputs["prompt_mask"].sum() + inputs["completion_mask"].sum()
        return inputs

    def units_in_step(self, inputs, num_items_in_batch):
        tokens, self._tokens_in_step = self._tokens_in_step, 0
        return self.accelerator.reduce(tokens.to(self.args.device), "sum")

    def _non_finite(self, what, inputs):
        return super()._non_finite(what, self._batch)

    def describe_batch(self, inputs):
        beginning = self.processing_class.decode(inputs["completion_ids"][0, :24])
        return f"whose first completion begins {beginning!r}"

    def create_model_card(self, *args, **kwargs):
        pass  # the card is built at the end, from run.json

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        except RewardError:
            done = self.state.global_step
            if done > 0 and not (Path(self.args.output_dir) / f"checkpoint-{done}").exists():
                self._save_checkpoint(self.model, trial=None)
            self.record.save(history=self.state.log_history, status=f"stopped after step {done}: a reward failed")
            raise

    # ---- what is logged ----

    def log(self, logs, start_time=None):
        for metrics in self._metrics.values():
            metrics.pop("num_tokens", None)  # `tokens_seen` goes on after a resume
        if "loss" in logs and self.is_world_process_zero():
            self._write_completions()
        super().log(logs, start_time)

    def _write_completions(self) -> None:
        """The completions of the last generated batch, a row each, to read."""
        rewards = self._logs["rewards"]
        file = Path(self.args.output_dir) / "completions" / f"step-{self.state.global_step}.jsonl"
        file.parent.mkdir(exist_ok=True)
        with file.open("w", encoding="utf-8") as out:
            for i, (prompt, completion) in enumerate(zip(self._logs["prompt"], self._logs["completion"], strict=True)):
                texts = [part if isinstance(part, str) else part[-1]["content"] for part in (prompt, completion)]
                row = {"step": self.state.global_step, "prompt": texts[0], "completion": texts[1]}
                # Where a reward has nothing to say, it is NaN, which JSON has not.
                values = {name: None if of[i] != of[i] else round(of[i], 4) for name, of in rewards.items()}
                row |= values | {"advantage": round(self._logs["advantages"][i], 4)}
                out.write(json.dumps(row, ensure_ascii=False) + "\n")

    # ---- evaluation ----

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        with self._clock_stopped():
            was_training = self.model.training
            self.model.eval()
            rows, replies = self._answer_held_out()
            metrics: dict[str, float] = {}
            if rows and has_answer(rows[0]):
                measured = summarise(rows, replies, ks=(1, self.samples))
                metrics |= _flat_metrics(measured)
                self._record_samples(measured["examples"])
            elif rows:
                metrics |= _flat_metrics({REWARD_MODEL: mean_interval(self._scores(rows, replies))})
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            self.model.train(was_training)
            self.record.save(history=self.state.log_history)
        return metrics

    def _answer_held_out(self) -> tuple[list[dict], list[list[dict]]]:
        """The held-out rows and the replies to each, of all processes."""
        # Where the processes share a forward pass they all do the same, or one would wait for another that has ended.
        process, processes = (0, 1) if self._sharded else (self.args.process_index, self.args.world_size)
        mine = self.held_out[process::processes]
        replies: list[list[dict]] = []
        if mine:  # there may be fewer rows than processes
            with self._whole_model() as model:
                replies = sample_replies(
                    model,
                    self.processing_class,
                    prompt_ids(mine, self.processing_class, apply_chat_template=False),
                    samples=self.samples,
                    temperature=1.0,
                    max_new_tokens=self.args.max_completion_length,
                    batch_size=self.args.per_device_eval_batch_size,
                    seed=self.args.seed + process,
                )
        return (mine, replies) if processes == 1 else (gather_object(mine), gather_object(replies))

    @contextmanager
    def _whole_model(self):
        """The model as it can generate, put together where it is sharded."""
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
            ) as model,
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
        ):
            yield model

    def _scores(self, rows: list[dict], replies: list[list[dict]]) -> list[float]:
        """The reward model's mean score of each row's replies."""
        scores = []
        for row, of_row in zip(rows, replies, strict=True):
            completions = [[{"role": "assistant", "content": reply["text"]}] for reply in of_row]
            empty = [""] * len(of_row)
            values = self.score([row["prompt"]] * len(of_row), completions, answer=empty, entry=empty)
            scores.append(sum(values) / len(values))
        return scores

    def _record_samples(self, examples: list[dict[str, Any]]) -> None:
        step = self.state.global_step
        kept = [sample for sample in self.record.content["samples"] if sample["step"] < step]
        new = [
            {"step": step, "prompt": one["question"], "text": one["reply"], "right": one["strict"]} for one in examples
        ]
        self.record.save(samples=kept + new)
        for sample in new if self.is_world_process_zero() else []:
            print(f"  {'right' if sample['right'] else 'wrong'} | {sample['prompt']!r} | {sample['text']!r}")


def has_answer(row: dict[str, Any]) -> bool:
    """Whether a row is a problem; else only a reward model has something to say of the replies to it."""
    return bool(row["answer"] or row["entry"])


def _ends(interval: dict[str, float]) -> dict[str, float]:
    return {"": interval["mean"], "_low": interval["low"], "_high": interval["high"]}


def _flat_metrics(summary: dict[str, Any]) -> dict[str, float]:
    """Intervals as three entries of a log, `eval_pass@1`, `eval_pass@1_low` and `eval_pass@1_high`; numbers as one."""
    flat = {}
    for name, value in summary.items():
        if isinstance(value, dict) and "mean" in value:
            flat |= {f"eval_{name}{end}": number for end, number in _ends(value).items()}
        elif name in ("format", "ended", "tokens"):
            flat[f"eval_{name}"] = value
    return flat


# ---- data ------------------------------------------------------------------------------------------------------------


def load_rows(arguments: GrpoArguments, evaluates: bool) -> tuple[list[dict], list[dict], dict[str, Any], dict]:
    """Rows to train on and to evaluate on, the description of both for `run.json`, and counts of the first."""
    train, held_out, data, counts = [], [], {}, {}
    if arguments.dataset:
        train, data["train"] = arguments.load()
        if evaluates:
            held_out, data["eval"] = load_problems(
                arguments.eval_dataset or arguments.dataset,
                arguments.eval_dataset_split,
                arguments.num_eval_problems,
                config=arguments.dataset_config if arguments.eval_dataset is None else None,
                difficulty=arguments.eval_difficulty
                or (arguments.difficulty if arguments.eval_dataset is None else None),
                question_column=arguments.question_column,
                answer_column=arguments.answer_column,
            )
            apart = without(train, held_out)
            counts["left_out"] = len(train) - len(apart)
            train = apart
        for row in train + held_out:
            row["prompt"] = prompt_of(row["question"], arguments.prompt_template, arguments.apply_chat_template)
    if arguments.prompt_dataset is not None:
        prompts, data["prompts"] = _load_prompts(arguments.prompt_dataset, arguments.prompt_dataset_split)
        data.setdefault("train", data["prompts"])
        train = train + prompts
        if evaluates and not held_out:
            held_out, data["eval"] = _load_prompts(
                arguments.prompt_dataset, arguments.eval_dataset_split, arguments.num_eval_problems
            )
    return train, held_out, data, {"rows": len(train) + counts.get("left_out", 0)} | counts


def _load_prompts(dataset: str, split: str, limit: int | None = None) -> tuple[list[dict], dict[str, Any]]:
    """Each conversation up to its first answer."""
    rows = load_conversations(dataset, split)
    if rows.column_names != ["messages"]:
        raise ValueError(f"{dataset} has no conversations of messages: --prompt_dataset needs those.")
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    prompts = []
    for row in rows:
        first = next(i for i, message in enumerate(row["messages"]) if message["role"] == "assistant")
        messages = row["messages"][:first]
        prompts.append({"question": messages[-1]["content"], "answer": "", "entry": "", "prompt": messages})
    return prompts, describe_rows(rows, dataset, split)


def check_lengths(
    rows: list[dict[str, Any]], tokenizer, training: GrpoTrainingArguments, context: int | None
) -> list[dict[str, Any]]:
    """The rows that leave room for a completion; ValueError where too few are left for a step."""
    ids = prompt_ids(rows, tokenizer, apply_chat_template=False)
    room = (context or 2**31) - training.max_completion_length
    fitting = [row for row, prompt in zip(rows, ids, strict=True) if len(prompt) <= room]
    groups = training.generation_batch_size // training.num_generations
    if len(fitting) < groups:
        raise ValueError(
            f"Of {len(rows)} problems {len(fitting)} leave room for {training.max_completion_length} tokens in the "
            f"model's context of {context}, and a batch takes {groups}: give more problems, shorter completions or a "
            "smaller batch."
        )
    return fitting


# ---- rewards ---------------------------------------------------------------------------------------------------------


def open_rewards(arguments: GrpoArguments, training: GrpoTrainingArguments) -> tuple[list[Callable], Callable | None]:
    """The reward functions, checked, with the reward model's last, and that one alone; fills in the weights."""
    by_name = {name: reward_by_name(name, training.max_completion_length) for name in arguments.rewards}
    score = None
    if arguments.reward_model is not None:
        by_name[REWARD_MODEL] = score = reward_model(arguments.reward_model, training.device)
    functions = [
        _failing_together(checked(name, function, arguments.reward_timeout)) for name, function in by_name.items()
    ]
    names = [function.__name__ for function in functions]
    if training.reward_weights is None:
        training.reward_weights = [DEFAULT_WEIGHTS.get(name, 1.0) for name in names]
    if len(training.reward_weights) != len(names):
        raise ValueError(
            f"--reward_weights gives {len(training.reward_weights)} weights and there are {len(names)} rewards "
            f"({', '.join(names)}): give one each."
        )
    return functions, score


def _failing_together(function: Callable) -> Callable:
    """`function`, which fails in every process where it fails in one: all of them have to write the checkpoint."""

    @wraps(function)
    def reward(*args, **kwargs):
        values, fault = None, None
        try:
            values = function(*args, **kwargs)
        except RewardError as error:
            fault = str(error)
        if faults := [text for text in gather_object([fault]) if text is not None]:
            raise RewardError(faults[0])
        return values

    return reward


def check_arguments(
    arguments: GrpoArguments, training: GrpoTrainingArguments, given: dict[str, Any], context: int | None
) -> None:
    """Raises ValueError for what cannot be honoured, before anything is read. `context` is the model's, in tokens."""
    if training.max_completion_length < 1 or (context and training.max_completion_length >= context):
        raise ValueError(
            f"--max_completion_length {training.max_completion_length} does not fit the model's context of {context} "
            "tokens: give less."
        )
    for name, why in {
        "num_generations_eval": "--eval_samples says how often held-out problems are solved",
        "log_completions": "they are always written, into completions/",
        "log_completions_hub_repo": "they are written into completions/",
        "sync_ref_model": "checkpoints do not keep a reference that moves; begin a further run with this one's result",
    }.items():
        if name in given:
            raise ValueError(f"--{name} has no effect here: {why}.")
    steps, cycle = training.save_steps, training.steps_a_cycle
    if training.save_strategy == "steps" and steps >= 1 and int(steps) % cycle:
        raise ValueError(
            f"--save_steps is {steps:g} and completions are new every {cycle} steps: give a multiple of {cycle}, so "
            "that a resumed run samples where the stopped one did."
        )
    measured = [REWARD_MODEL]
    if arguments.dataset:
        measured = ["pass@1", f"pass@{arguments.eval_samples}", "lenient_pass@1", "format", "ended", "tokens"]
    best = training.metric_for_best_model
    if training.load_best_model_at_end and best.removeprefix("eval_") not in measured:
        raise ValueError(f"--metric_for_best_model is {best!r}: take one of {', '.join(measured)}.")
    if arguments.prompt_dataset is not None and not arguments.apply_chat_template:
        raise ValueError("--prompt_dataset holds chats: give --apply_chat_template true, and a model that chats.")


# ---- the command -----------------------------------------------------------------------------------------------------


def prepare() -> tuple[GrpoTrainer, str | None] | None:
    """Everything up to the first step: reads and checks what the user gave, opens model and run folder.

    Returns the trainer and the checkpoint to go on from; None where nothing is left to do.
    """
    tuning, training, given = parse_tuning(GrpoArguments, GrpoTrainingArguments, __doc__)
    arguments = tuning.model
    config = check_tuning(tuning, training, given, "training.grpo")
    context = getattr(config, "max_position_embeddings", None)
    check_arguments(arguments, training, given, context)
    if tuning.dry_run.dry_run:
        length = min(PREDICTED_PROMPT + training.max_completion_length, context or 2**31)
        copied = training.beta != 0 and not tuning.adapter.use_peft  # below an adapter the base is the reference
        predict_memory(config, tuning, training, reference_copy=copied, length=length)
        return None
    train_rows, held_out, data, counts = load_rows(arguments, training.eval_strategy != "no")
    functions, score = open_rewards(arguments, training)
    model, tokenizer, added_tokens = open_base(tuning, training)
    if stripped := sorted(set(TAGS) & set(tokenizer.all_special_tokens)):
        raise ValueError(
            f"{', '.join(stripped)} are special tokens of {arguments.model}, which TRL takes out of completions before "
            "they are rewarded: make them ordinary added tokens."
        )
    fitting = check_lengths(train_rows, tokenizer, training, context)
    counts["too_long"] = len(train_rows) - len(fitting)
    train_rows = fitting
    if held_out:
        held_out_ids = prompt_ids(held_out, tokenizer, apply_chat_template=False)
        check_room(model, held_out_ids, training.max_completion_length)
    model = with_adapter(
        model, tokenizer, tuning, training, added_tokens, lambda: _prompt_batches(train_rows, tokenizer)
    )
    opened = open_tuned_run(
        "grpo",
        model,
        tokenizer,
        tuning,
        training,
        given,
        data,
        {"train": counts},
        (
            "num_generations",
            "max_completion_length",
            "temperature",
            "beta",
            "loss_type",
            "scale_rewards",
            "epsilon",
            "num_iterations",
            "mask_truncated_completions",
        ),
    )
    if opened is None:
        return None
    record, checkpoint, peak = opened
    weights = dict(zip([function.__name__ for function in functions], training.reward_weights, strict=True))
    record.save(training=record.content["training"] | {"rewards": weights, REWARD_MODEL: arguments.reward_model})
    with keep_adapter_dtype(model):
        trainer = GrpoTrainer(
            model=model,
            reward_funcs=functions,
            args=training,
            train_dataset=Dataset.from_list(train_rows),
            held_out=held_out,
            samples=arguments.eval_samples,
            score=score,
            processing_class=tokenizer,
            callbacks=[RewardHealth(record)],
            record=record,
            unit="tokens",
            flops_per_unit=flops_per_token(model) * 4 / 3,  # sampling reads each token once more
            matmul_peak=peak,
        )
    return trainer, checkpoint


def _prompt_batches(rows: list[dict[str, Any]], tokenizer):
    """Prompts, one a batch: for adapters that begin from activations."""
    for ids in prompt_ids(rows, tokenizer, apply_chat_template=False):
        yield {"input_ids": torch.tensor([ids])}


def finish(trainer: GrpoTrainer) -> None:
    """Saves model or adapter into the run folder and writes what came of the run: metrics, the card."""
    evaluate_the_end(trainer)
    save_tuned_model(trainer)
    history = trainer.state.log_history
    rewards = [entry["reward"] for entry in history if "reward" in entry]
    finish_run(trainer, final_metrics(history, "tokens") | {"reward": rewards[-1]})


def main() -> None:
    train_from_command_line(prepare, finish, RewardError)


if __name__ == "__main__":
    main()
