"""LoRA (arXiv 2106.09685) and its variants by PEFT: made, saved, opened, and matched with the base they belong to.

Notable here:
- which layers are adapted follows from the model, not from a list of names (`add_adapter`);
- PiSSA and OLoRA train the strongest directions of the base's own weights and leave the rest in their place. What is
  saved is the difference, as plain LoRA of twice the rank, so that the adapter applies to the stored base unchanged;
- an adapter is opened with the base it was trained on or not at all: the run recorded the base's hash (`check_base`).
The folders hold nothing but PEFT's own files: anyone's PEFT opens, stacks, switches and merges them.
"""

import itertools
import json
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft import (
    EvaConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    initialize_lora_eva_weights,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer, eva
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from peft.utils.other import TrainableTokensWrapper
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from hf_models.stored_weights import parameters_of_file, some

from .base_model import read_run
from .language_models import load_config, load_language_model, load_tokenizer, stored_fingerprint
from .run_record import portable
from .run_setup import save_whole_model

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
# In a run folder: the adapter as it began, where its beginning was computed from weights or data.
INITIAL = "adapter_initial"
# Of the training rows, how many batches EVA looks at; it goes through them again until its directions stand still.
EVA_BATCHES = 32
AUTO_CLASSES = {"CAUSAL_LM": AutoModelForCausalLM, "SEQ_CLS": AutoModelForSequenceClassification}
NAME_IN_FILE = "base_model.model."  # before the base's own name of a layer


@dataclass
class AdapterArguments:
    use_peft: bool = field(
        default=False,
        metadata={"help": "Train a LoRA adapter: small matrices beside the weights, which stay."},
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter's matrices."})
    lora_alpha: float = field(
        default=32.0,
        metadata={"help": "The adapter's output is multiplied by this, divided by the rank."},
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Share of the adapter's inputs dropped in training."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the layers to adapt, such as q_proj v_proj; by default every one but the head."},
    )
    use_rslora: bool = field(
        default=False, metadata={"help": "Divide by the rank's root, for high ranks (rsLoRA, arXiv 2312.03732)."}
    )
    use_dora: bool = field(
        default=False, metadata={"help": "Train each weight's magnitude beside its direction (DoRA, arXiv 2402.09353)."}
    )
    lora_init: str = field(
        default="default",
        metadata={
            "help": "How the adapter begins: default or gaussian, from noise; pissa, pissa_niter_N (N steps of a fast "
            "SVD, such as 16) or olora, from the weights; eva, from the training rows' activations."
        },
    )

    def __post_init__(self):
        if self.lora_r < 1:
            raise ValueError(f"--lora_r is {self.lora_r}: give a rank of 1 or more.")
        if self.lora_alpha <= 0:
            raise ValueError(f"--lora_alpha is {self.lora_alpha}: give more than 0.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"--lora_dropout is {self.lora_dropout}: give 0 or more, and less than 1.")
        if not re.fullmatch(r"default|gaussian|pissa|pissa_niter_[1-9]\d*|olora|eva", self.lora_init):
            raise ValueError(
                f"--lora_init is {self.lora_init!r}: take default, gaussian, pissa, pissa_niter_N (such as "
                "pissa_niter_16), olora or eva."
            )

    @property
    def splits_base(self) -> bool:
        """Whether part of the base's weights moves into the adapter."""
        return self.lora_init.startswith(("pissa", "olora"))


# ---- making ----


def add_adapter(
    model: PreTrainedModel,
    arguments: AdapterArguments,
    *,
    task_type: str | None,
    base: str,
    added_tokens: bool = False,
    new_tokens: Collection[int] = (),
    batches: Iterable[dict] | Callable[[], Iterable[dict]] | None = None,
    targets: list[str] | None = None,
    whole: Iterable[str] = (),
    output_dir: str | Path | None = None,
) -> PeftModel:
    """`model` with a new adapter, the only part of it that trains, in float32.

    Adapted is every linear layer but the head (arXiv 2106.09685 took the attention's alone; QLoRA, arXiv 2305.14314,
    found that all are needed to come up to full fine-tuning). A sequence classifier's head is trained whole.

    Args:
        task_type: "CAUSAL_LM", "SEQ_CLS", or None for anything else.
        base: the name or folder of `model`, by which the adapter's folder finds it again, relative to the working one.
        added_tokens: whether embeddings and head are trained whole, as new rows in them need. Tied ones stay tied.
        new_tokens: ids of tokens that the base has a place for and never read, such as the marks of a chat: their rows
            of embeddings and head are trained. (Not where parameters are sharded; train these layers whole there.)
        batches: of training rows, the model's arguments, the same ones in every process; read by `eva` alone.
        targets: full names of the layers to adapt by default, for a model whose layers are not a language model's.
        whole: names of further layers that are trained whole.
        output_dir: the run folder. Where an earlier session left the adapter's beginning (`keep_initial_adapter`), it
            is taken from there: computed again, it could come out otherwise.

    Raises ValueError, in one sentence, for layers that are not there and for what does not go together.
    """
    trained_whole = [*whole, *(_embedding_layers(model) if added_tokens else ())]
    initial = None if output_dir is None else Path(output_dir) / INITIAL
    if initial is not None and initial.is_dir():
        adapted = _begin_again(model, initial, arguments.splits_base)
        # Of what is saved, `make_plain` learns from this how it began.
        adapted.peft_config["default"].init_lora_weights = arguments.lora_init
    else:
        names = _target_names(model, arguments, task_type, targets)
        _check_variant(model, arguments, names)
        config = LoraConfig(
            r=arguments.lora_r,
            lora_alpha=arguments.lora_alpha,
            lora_dropout=arguments.lora_dropout,
            target_modules=_short_names(model, names),
            modules_to_save=trained_whole or None,
            use_rslora=arguments.use_rslora,
            use_dora=arguments.use_dora,
            init_lora_weights=True if arguments.lora_init == "default" else arguments.lora_init,
            eva_config=EvaConfig() if arguments.lora_init == "eva" else None,
            ensure_weight_tying=added_tokens and _tied(model),
            trainable_token_indices=_rows(model, new_tokens),
            task_type=task_type,
            fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in names),
        )
        adapted = get_peft_model(model, config)
        if arguments.lora_init == "eva":
            _look_at_activations(adapted, batches)
    adapted.peft_config["default"].base_model_name_or_path = portable(base, "path")
    head = model.get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper):
        head.bias = None  # TRL asks for it, and PEFT answers for the weight only
    _join_dtypes(adapted)
    restore_float32(adapted)
    if arguments.splits_base or arguments.lora_init == "eva":
        state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        state = {name: tensor for name, tensor in state.items() if ".lora_" in name}
        adapted.initial_adapter = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
    return adapted


def _target_names(
    model: PreTrainedModel, arguments: AdapterArguments, task_type: str | None, targets: list[str] | None
) -> list[str]:
    """Full names of the layers to adapt."""
    linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear | Conv1D)}
    head = model.get_output_embeddings()
    heads = {name for name, layer in linear.items() if layer is head}
    if task_type == "SEQ_CLS":
        heads |= {name for name in linear if name in SEQ_CLS_HEAD_NAMES}
    if arguments.lora_target_modules in (None, ["all-linear"]):
        return targets or [name for name in linear if name not in heads]
    known = set(linear) | set(targets or ())
    found: list[str] = []
    for target in arguments.lora_target_modules:
        matching = [name for name in known if f".{name}".endswith(f".{target}")]
        if not matching:
            ends = sorted({name.rsplit(".", 1)[-1] for name in known - heads})
            raise ValueError(
                f"--lora_target_modules names {target!r}, and {type(model).__name__} has no such layer to adapt: take "
                f"from {some(ends, 12)}, or leave it off for all."
            )
        found += matching
    if beheaded := heads & set(found):
        # TRL multiplies by the head's weight without calling the layer, and the head may be the embeddings too.
        raise ValueError(
            f"--lora_target_modules names the head, {beheaded.pop()!r}, which is not adapted here: leave it out."
        )
    return sorted(set(found))


def _short_names(model: PreTrainedModel, names: list[str]) -> list[str]:
    """The last parts of `names`, which other tools expect in an adapter's config, unless they mean more layers."""
    ends = {name.rsplit(".", 1)[-1] for name in names}
    meant = {name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in ends}
    return sorted(ends) if meant == set(names) else names


def _check_variant(model: PreTrainedModel, arguments: AdapterArguments, names: list[str]) -> None:
    layers = {name: model.get_submodule(name) for name in names}
    if not arguments.splits_base and arguments.lora_init != "eva":
        return
    variant = f"--lora_init {arguments.lora_init}"
    unfit = {name: layer for name, layer in layers.items() if not isinstance(layer, nn.Linear | Conv1D)}
    if arguments.lora_init == "olora":  # PEFT takes Conv1D's transposed weight for a Linear's
        unfit |= {name: layer for name, layer in layers.items() if isinstance(layer, Conv1D)}
    if unfit:
        name, layer = next(iter(unfit.items()))
        raise ValueError(f"{variant} cannot begin from a {type(layer).__name__} ({name}): give default or gaussian.")
    if arguments.splits_base:
        rounded = {str(layer.weight.dtype).removeprefix("torch.") for layer in layers.values()} - {"float32"}
        if getattr(model, "is_quantized", False):
            raise ValueError(
                f"{variant} moves part of the weights into the adapter, and weights of 4 bits do not say what is left: "
                "give default, gaussian or eva, or leave --load_in_4bit off."
            )
        if rounded:
            raise ValueError(
                f"{variant} moves part of the weights into the adapter, and {rounded.pop()} would round what is "
                "left: give --dtype float32."
            )
    smallest = min((min(_sides(layer)), name) for name, layer in layers.items())
    rank = arguments.lora_r if arguments.splits_base else round(arguments.lora_r * EvaConfig().rho)
    if rank > smallest[0]:
        raise ValueError(
            f"{variant} with --lora_r {arguments.lora_r} takes {rank} directions, and {smallest[1]} has {smallest[0]}: "
            "give a lower rank."
        )


def _sides(layer: nn.Module) -> tuple[int, int]:
    return (layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else tuple(layer.weight.shape)


def _embedding_layers(model: PreTrainedModel) -> list[str]:
    """Of embeddings and head, the last parts of their names, as PEFT matches them."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [name.rsplit(".", 1)[-1] for name, layer in model.named_modules() if any(layer is end for end in ends)]


def _rows(model: PreTrainedModel, tokens: Collection[int]) -> dict[str, list[int]] | None:
    """Rows to train, by layer; the head's follow by themselves where it is tied."""
    if not tokens:
        return None
    layers = _embedding_layers(model)
    return {layer: sorted(tokens) for layer in (layers[:1] if _tied(model) else layers)}


def _tied(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _look_at_activations(adapted: PeftModel, batches: Iterable[dict] | Callable[[], Iterable[dict]] | None) -> None:
    """EVA (arXiv 2410.07170): the directions in which the training rows' activations vary most, ranks to match."""
    if batches is None:
        raise ValueError("--lora_init eva begins from training rows, and there are none here: take another.")
    least = round(adapted.peft_config["default"].r * EvaConfig().rho)
    # PEFT waits for ever for directions that batches of too few tokens never bring.
    enough = (batch for batch in (batches() if callable(batches) else batches) if _tokens(batch) >= least)
    rows = list(itertools.islice(enough, EVA_BATCHES))
    if not rows:
        raise ValueError(
            f"--lora_init eva takes {least} directions from each batch, and no row has so many trained tokens: give a "
            "lower --lora_r or longer rows."
        )
    # PEFT takes every layer that has a base layer for LoRA's, and rows of tokens are none.
    others = (*eva.UNSUPPORTED_LORA_MODULES, TrainableTokensLayer)
    with patch.object(eva, "UNSUPPORTED_LORA_MODULES", others):
        # Every process reads the same batches.
        initialize_lora_eva_weights(adapted, rows, gather_distributed_inputs=False, show_progress_bar=False)


def _tokens(batch: dict) -> int:
    read = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    return int((read & (batch["labels"] != -100)).sum() if "labels" in batch else read.sum())


def _begin_again(model: PreTrainedModel, initial: Path, splits_base: bool) -> PeftModel:
    """`model` and base as they were when the adapter in `initial` was new."""
    config = LoraConfig.from_pretrained(initial)
    config.inference_mode, config.base_model_name_or_path = False, None
    try:
        adapted = get_peft_model(model, config)
        # What is trained whole, and rows of tokens, began as in the model; PEFT asks for them too.
        began = get_peft_model_state_dict(adapted, save_embedding_layers=False) | load_file(initial / WEIGHTS_FILE)
        set_peft_model_state_dict(adapted, began)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{initial} is not of this model: choose another --output_dir, or delete this one.") from error
    if splits_base:
        _subtract_adapter(adapted)
    return adapted


@torch.no_grad()
def _subtract_adapter(adapted: PeftModel) -> None:
    """Leaves in the base what PEFT left there when the adapter was new, to the bit: by the same operations."""
    for layer in adapted.modules():
        if isinstance(layer, LoraLayer):
            moved = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            weight = layer.get_base_layer().weight
            weight.copy_(weight - (moved.T if getattr(layer, "fan_in_fan_out", False) else moved))


def _join_dtypes(adapted: PeftModel) -> None:
    """Lets layers that are trained whole in float32 stand among layers of fewer bits without autocast."""
    for module in adapted.modules():
        if isinstance(module, ModulesToSaveWrapper) and module.original_module.weight.dtype != torch.float32:
            dtype, trained = module.original_module.weight.dtype, module.modules_to_save["default"]
            if isinstance(trained, nn.Embedding):
                trained.register_forward_hook(lambda _, inputs, output, dtype=dtype: output.to(dtype))
            else:
                trained.register_forward_pre_hook(lambda _, inputs: tuple(x.float() for x in inputs))


def restore_float32(model: nn.Module) -> None:
    """Makes every trained parameter float32 again: TRL turns those of a 4-bit model into bfloat16."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


# ---- saving ----


def keep_initial_adapter(model: nn.Module, output_dir: str | Path) -> None:
    """Writes the adapter's beginning into the run folder, unless it is there: a resumed run goes on from the same one.

    For the main process to call, when the run folder is opened and before the first step. Nothing is written for an
    adapter whose beginning is not needed again.
    """
    folder = Path(output_dir) / INITIAL
    state = getattr(model, "initial_adapter", None) if isinstance(model, PeftModel) else None
    if state is None or folder.is_dir():
        return
    staged = folder.with_name(INITIAL + "_partial")
    shutil.rmtree(staged, ignore_errors=True)
    model.peft_config["default"].save_pretrained(staged)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, staged / WEIGHTS_FILE)
    _edit_config(staged, init_lora_weights=True, eva_config=None)
    staged.rename(folder)


def save_adapter(source: Any, folder: str | Path) -> None:
    """Writes the adapter of `source`, a PeftModel or a trainer of one, so that it applies to the stored base.

    A trainer's is gathered from its shards, and comes with the tokenizer, into the run folder alone.
    """
    if isinstance(source, PeftModel):
        model, writes = source, True
        model.save_pretrained(folder, save_embedding_layers=False)
        (Path(folder) / "README.md").unlink(missing_ok=True)  # PEFT's, a form to fill in
    else:
        model, writes = source.accelerator.unwrap_model(source.model), source.is_world_process_zero()
        if Path(folder).resolve() != Path(source.args.output_dir).resolve():
            raise ValueError(f"A trainer saves into its own folder, {source.args.output_dir}, not into {folder}.")
        save_whole_model(source)
    if writes:
        make_plain(Path(folder), getattr(model, "initial_adapter", None))


def make_plain(folder: Path, initial: dict[str, torch.Tensor] | None) -> None:
    """Rewrites the adapter in `folder`, as training left it, into one whose loading computes nothing.

    PiSSA and OLoRA trained `W0 - s B0 A0 + s B A`, with `W0` the base's weight and A0, B0 (`initial`) the adapter's
    beginning; that is `W0 + s [B, -B0] [A; A0]`, LoRA of twice the rank with the same scale s. (PEFT's own conversion,
    `path_initial_model_for_weight_conversion`, forgets the layers that are trained whole.)
    """
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    if str(config["init_lora_weights"]).startswith(("pissa", "olora")):
        state = load_file(folder / WEIGHTS_FILE)
        for name, tensor in state.items():
            if ".lora_A." in name:
                state[name] = torch.cat([tensor, initial[name]], dim=0)
            elif ".lora_B." in name:
                state[name] = torch.cat([tensor, -initial[name]], dim=1)
        save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        growth = 2**0.5 if config["use_rslora"] else 2
        _edit_config(folder, r=2 * config["r"], lora_alpha=growth * config["lora_alpha"])
    _edit_config(folder, init_lora_weights=True, eva_config=None)


def _edit_config(folder: Path, **fields: Any) -> None:
    path = folder / CONFIG_FILE
    config = json.loads(path.read_text(encoding="utf-8")) | fields
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# ---- opening ----


def is_adapter_folder(path: str | Path) -> bool:
    return (Path(path) / CONFIG_FILE).is_file()


def adapter_run(folder: str | Path) -> dict[str, Any]:
    """The `run.json` of the run that made this adapter, a checkpoint's being its run's; empty where there is none."""
    folder = Path(folder)
    beside = read_run(str(folder.parent)) if folder.name.startswith("checkpoint-") else None
    return read_run(str(folder)) or beside or {}


def check_base(adapter_folder: str | Path, base_path: str) -> None:
    """Raises ValueError unless the adapter was trained on the base at `base_path`.

    Its run recorded the base's hash, which decides, wherever the base lies. Without a run, the name's last part does.
    """
    name = _read_config(adapter_folder)["base_model_name_or_path"] or ""
    recorded = adapter_run(adapter_folder).get("data", {}).get("model", {}).get("fingerprint")
    if recorded is None:
        if Path(name).name != Path(base_path).name:
            raise ValueError(f"{adapter_folder} is an adapter of {name}, not of {base_path}: give its own --base.")
        return
    found = stored_fingerprint(base_path)
    if found != recorded:
        raise ValueError(
            f"{adapter_folder} is an adapter of {name}, whose weights hash to {recorded}, and those of {base_path} to "
            f"{found}: give its own --base."
        )


def open_for_inference(
    path: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    attn_implementation: str = "sdpa",
    quantization_config: Any = None,
    base: str | None = None,
    trust_remote_code: bool = False,
    device: torch.device | str | None = None,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """The model at `path` and its tokenizer, in evaluation mode.

    Args:
        path: a model folder, a Hub id, or an adapter's folder (also a checkpoint), whose base is opened too.
        dtype: of the weights in memory; "auto" for that of the files.
        base: the folder of an adapter's base, where it is not the one that the adapter names.
        device: None for wherever transformers puts it.

    Raises ValueError, in one sentence: nothing there, no base, or another base than the adapter's.
    """
    path = str(path)
    options = {"attn_implementation": attn_implementation, "quantization_config": quantization_config}
    options |= {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if device is not None:
        options["device_map"] = {"": device}
    if not is_adapter_folder(path):
        if base is not None:
            raise ValueError(f"--base is for an adapter, and {path} holds none ({CONFIG_FILE}): leave it off.")
        model, tokenizer = load_language_model(path, **options), load_tokenizer(path, trust_remote_code)
        return model.eval(), tokenizer

    config = _read_config(path)
    base = base_of(path, base, trust_remote_code)
    check_base(path, base)
    if config["task_type"] not in AUTO_CLASSES:
        raise ValueError(f"{path} is an adapter for {config['task_type'] or 'images'}, not for a language model.")
    shapes = {name: stored.shape for name, stored in parameters_of_file(Path(path) / WEIGHTS_FILE).items()}
    if config["task_type"] == "SEQ_CLS":
        heads = [shapes.get(f"{NAME_IN_FILE}{head}.weight") for head in SEQ_CLS_HEAD_NAMES]
        options["num_labels"] = next(shape[0] for shape in heads if shape is not None)
        described = adapter_run(path).get("model", {}).get("config", {})
        if described.get("problem_type"):  # without which a pipeline would squash a reward model's score
            labels = {int(number): label for number, label in described["id2label"].items()}
            options |= {"problem_type": described["problem_type"], "id2label": labels}
            options["label2id"] = {label: number for number, label in labels.items()}
    model = load_language_model(base, auto_class=AUTO_CLASSES[config["task_type"]], **options)
    own_tokenizer = (Path(path) / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(path if own_tokenizer else base, trust_remote_code)
    if tokenizer.pad_token_id is not None:
        model.config.pad_token_id = tokenizer.pad_token_id
    embeddings = model.get_input_embeddings()
    name = next(name for name, layer in model.named_modules() if layer is embeddings)
    rows = shapes.get(f"{NAME_IN_FILE}{name}.weight", embeddings.weight.shape)[0]
    if rows != embeddings.weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)  # the adapter has what is new in them
    if (Path(path) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    with _plain_copy(path) as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT asks for it
        adapted = PeftModel.from_pretrained(model, folder)
    return adapted.eval(), tokenizer


def open_writer(path: str | Path, **options: Any) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """`open_for_inference` of a model that writes text; ValueError where it gives scores."""
    if is_adapter_folder(path) and _read_config(path)["task_type"] == "SEQ_CLS":
        raise ValueError(f"{path} holds the adapter of a reward model, which writes no text: give a language model.")
    return open_for_inference(path, **options)


def base_of(adapter_folder: str | Path, given: str | None = None, trust_remote_code: bool = False) -> str:
    """The adapter's base: `given`, or the one that it names; ValueError where nothing can be opened there."""
    base = given or _read_config(adapter_folder)["base_model_name_or_path"]
    try:
        load_config(base or "", trust_remote_code)
    except ValueError as error:
        raise ValueError(
            f"{adapter_folder} is an adapter of {base}, which is not there: give its folder as --base. {error}"
        ) from error
    return base


def _plain_copy(path: str):
    """A context whose value is the adapter's folder, or, of a PiSSA or OLoRA checkpoint, a converted copy of it."""
    initial = Path(path).parent / INITIAL / WEIGHTS_FILE
    if not str(_read_config(path)["init_lora_weights"]).startswith(("pissa", "olora")) or not initial.is_file():
        return nullcontext(path)
    copy = tempfile.TemporaryDirectory()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        shutil.copyfile(Path(path) / name, Path(copy.name) / name)
    make_plain(Path(copy.name), load_file(initial))
    return copy


def _read_config(folder: str | Path) -> dict[str, Any]:
    return json.loads((Path(folder) / CONFIG_FILE).read_text(encoding="utf-8"))
