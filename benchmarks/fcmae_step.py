"""One training step (forward, backward) of sparse FCMAE against computing every cell, same weights, images and mask.

    python -m benchmarks.fcmae_step [--size atto] [--batch_size 16] [--rounds 7] [--bf16]

Compared are: `sparse`, our path over visible cells; `own dense`, our masked-dense path with our own depthwise
backward; `stock dense`, the same from transformers' layers, in the memory format that is the faster for it. Weights,
GRN's and biases among them, are random, and outputs, losses and all gradients must be equal, or nothing is reported.
The encoder alone is timed over mask ratios, its loss a fixed random projection of the visible cells; the whole model,
with the 512-wide dense decoder, at 0.6. The bound is patches / visible patches. No optimizer. Targets for the encoder
at 0.6, in float32: 2.6 times as fast as stock, 0.95 of the bound against our own, half of the activation memory.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from benchmarks import measure
from benchmarks.op_shares import KINDS, op_shares
from benchmarks.stock_fcmae import StockFcmae
from hf_models.convnextv2_fcmae import ConvNextV2FcmaeConfig, ConvNextV2FcmaeForPreTraining
from hf_models.convnextv2_fcmae.sizes import SIZES
from hf_models.convnextv2_fcmae.visible_cells_convnextv2_fcmae import VisibleCells

PATHS = ("sparse", "own dense", "stock dense")
PARTS = ("encoder", "whole model")
RATIO = 0.6  # of memory, profile and the whole model
TOLERANCE = 1e-5  # of losses, outputs and gradients, in float32
BF16_TOLERANCE = 2e-2  # of losses


class Setting(NamedTuple):
    """What a step is built from, in this process or in a fresh one."""

    size: str
    batch_size: int
    image_size: int
    bf16: bool
    stock_format: torch.memory_format = torch.contiguous_format


class Batch(NamedTuple):
    """`pixel_values`, the patches' `mask` `(batch, patches)`, 1 for removed, and the encoder's loss in two layouts."""

    pixel_values: torch.Tensor
    mask: torch.Tensor
    kept: torch.Tensor  # (batch, grid height, grid width, 1), 1 for kept
    visible_projection: torch.Tensor  # (batch, kept patches, 1, 1, hidden)
    projection: torch.Tensor  # (batch, grid height, grid width, hidden), 0 where removed


def build_config(size: str) -> ConvNextV2FcmaeConfig:
    return ConvNextV2FcmaeConfig(**SIZES[size].config)


def make_batch(config: ConvNextV2FcmaeConfig, batch_size: int, image_size: int, ratio: float) -> Batch:
    generator = torch.Generator().manual_seed(1)
    pixel_values = torch.randn(batch_size, config.num_channels, image_size, image_size, generator=generator)
    side = image_size // config.mask_patch_size
    number_kept = config.number_kept(side * side, ratio)
    order = torch.rand(batch_size, side * side, generator=generator).argsort(dim=1)
    mask = torch.ones(batch_size, side * side).scatter_(1, order[:, :number_kept], 0)
    kept = 1 - mask.view(batch_size, side, side, 1)
    projection = torch.randn(batch_size, side, side, config.hidden_sizes[-1], generator=generator) * kept
    visible = VisibleCells(mask.bool(), (side, side), number_kept)
    return Batch(pixel_values, mask, kept, visible.gather(projection), projection)


def build_model(path: str, setting: Setting) -> nn.Module:
    """Our model, or the one of transformers' layers, with the same random weights, none of them zero throughout."""
    torch.manual_seed(0)
    config = build_config(setting.size)
    model = ConvNextV2FcmaeForPreTraining(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "grn" in name:
            nn.init.normal_(parameter, std=0.5 if "grn" in name else 0.1)
    if path == "stock dense":
        weights = model.state_dict()
        model = StockFcmae(config)
        model.load_state_dict(weights)
        model.to(memory_format=setting.stock_format)
    return model.train()


def encoder_output(path: str, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The encoder's last hidden states, and the projection of them, that is the loss, in their layout."""
    if path == "stock dense":
        kept = batch.kept.permute(0, 3, 1, 2)
        return model.encode(batch.pixel_values, kept).permute(0, 2, 3, 1), batch.projection
    embeddings, encoder = model.convnextv2.embeddings, model.convnextv2.encoder
    if path == "own dense":
        return encoder(embeddings(batch.pixel_values), mask=batch.kept)[-1], batch.projection
    visible = VisibleCells(batch.mask.bool(), tuple(batch.kept.shape[1:3]), batch.visible_projection.shape[1])
    cells = embeddings(visible.gather_pixels(batch.pixel_values))
    return encoder(cells.view(len(batch.mask), -1, *cells.shape[1:]), visible)[-1], batch.visible_projection


def compute_loss(path: str, part: str, model: nn.Module, batch: Batch) -> torch.Tensor:
    if part == "encoder":
        output, projection = encoder_output(path, model, batch)
        return (output * projection).sum()
    if path == "stock dense":
        return model(batch.pixel_values, batch.kept.permute(0, 3, 1, 2))
    return model(batch.pixel_values, mask=batch.mask, masked_dense=path == "own dense").loss


def forward_backward(path: str, part: str, model: nn.Module, batch: Batch, bf16: bool) -> float:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        loss = compute_loss(path, part, model, batch)
    loss.backward()
    return loss.item()


def build_step(path: str, part: str, model: nn.Module, batch: Batch, setting: Setting) -> Callable[[], float]:
    if path == "stock dense":
        pixel_values = batch.pixel_values.contiguous(memory_format=setting.stock_format)
        batch = batch._replace(pixel_values=pixel_values)

    def step() -> float:
        model.zero_grad(set_to_none=True)
        return forward_backward(path, part, model, batch, setting.bf16)

    return step


def build_memory_step(path: str, part: str, setting: Setting) -> Callable[[], float]:
    """A step whose gradients have their memory already: beyond weights and gradients, what it takes is activations."""
    model = build_model(path, setting)
    small, whole = (make_batch(model.config, size, setting.image_size, RATIO) for size in (1, setting.batch_size))
    build_step(path, part, model, small, setting)()
    if path == "stock dense":
        whole = whole._replace(pixel_values=whole.pixel_values.contiguous(memory_format=setting.stock_format))
    return partial(forward_backward, path, part, model, whole, setting.bf16)


def check_equal(part: str, models: dict[str, nn.Module], batch: Batch) -> float:
    """Raises SystemExit where a dense path differs from the sparse one, in float32; returns the largest difference.

    Compared are the loss, the encoder's visible cells and every parameter's gradient, each by its largest difference as
    a share of its largest value.
    """
    found, scales = {}, {}
    for path, model in models.items():
        model.zero_grad(set_to_none=True)  # of what was run before
        tensors = {}
        if part == "encoder":
            output, projection = encoder_output(path, model, batch)
            loss = (output * projection).sum()
            visible = output if path == "sparse" else output[batch.kept[..., 0].bool()]
            tensors["output"] = visible.detach().flatten(0, -2)
            scales["loss"] = tensors["output"].norm()  # the size of a random projection of it, which may be near 0
        else:
            loss = compute_loss(path, part, model, batch)
        loss.backward()
        tensors["loss"] = loss.detach()
        found[path] = tensors | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
    differences = {}
    for path in PATHS[1:]:
        if found[path].keys() != found["sparse"].keys():
            raise SystemExit(f"error: {part}: {path} has gradients of other parameters than sparse")
        for name, tensor in found[path].items():
            difference = (found["sparse"][name] - tensor).abs().max() / scales.get(name, tensor.abs().max())
            differences[path, name] = difference.item()
    for (path, name), difference in differences.items():
        if not difference <= TOLERANCE:
            raise SystemExit(f"error: {part}: {name} of sparse and {path} differ by {difference:.1e} of its size")
    return max(differences.values())


def check_losses(part: str, losses: dict[str, float], scale: float) -> None:
    """Raises SystemExit where losses under autocast are further apart than bfloat16's digits explain."""
    for path in PATHS[1:]:
        if not abs(losses[path] - losses["sparse"]) <= BF16_TOLERANCE * scale:
            raise SystemExit(f"error: {part}: the losses differ under autocast: {losses}")


def choose_stock_format(setting: Setting) -> tuple[torch.memory_format, dict[str, float]]:
    """The memory format in which a step of the stock encoder is the faster, and the seconds of both."""
    steps = {}
    for name, memory_format in measure.MEMORY_FORMATS.items():
        setting = setting._replace(stock_format=memory_format)
        model = build_model("stock dense", setting)
        batch = make_batch(model.config, setting.batch_size, setting.image_size, RATIO)
        steps[name] = build_step("stock dense", "encoder", model, batch, setting)
    medians = measure.medians(steps)
    return measure.MEMORY_FORMATS[min(medians, key=medians.get)], medians


def time_part(part: str, models: dict[str, nn.Module], ratio: float, setting: Setting, rounds: int) -> dict:
    """Seconds of every path's step, after the check that they compute the same."""
    batch = make_batch(models["sparse"].config, setting.batch_size, setting.image_size, ratio)
    difference = check_equal(part, models, batch)
    steps = {path: build_step(path, part, model, batch, setting) for path, model in models.items()}
    losses = {path: step() for path, step in steps.items()}
    if setting.bf16:
        scale = losses["stock dense"]
        if part == "encoder":
            with torch.no_grad():
                scale = encoder_output("stock dense", models["stock dense"], batch)[0].norm().item()
        check_losses(part, losses, scale)
    seconds = measure.interleave(steps, rounds)
    patches, kept = batch.mask.shape[1], int((1 - batch.mask[0]).sum())
    return {
        "mask_ratio": ratio,
        "patches": patches,
        "kept": kept,
        "bound": patches / kept,
        "largest_difference": difference,
        "losses": losses,
        "seconds": seconds,
        "speedup": {path: measure.speedup(seconds[path], seconds["sparse"]) for path in PATHS[1:]},
    }


def profile_encoder(models: dict[str, nn.Module], setting: Setting) -> dict[str, dict[str, float]]:
    """Seconds by kind of operation of a step of the encoder, by path."""
    shares = {}
    for path, model in models.items():
        batch = make_batch(model.config, setting.batch_size, setting.image_size, RATIO)
        shares[path] = op_shares(build_step(path, "encoder", model, batch, setting), model)
    return shares


def print_times(title: str, measured: list[dict]) -> None:
    rows = []
    for entry in measured:
        medians = [f"{1e3 * statistics.median(entry['seconds'][path]):.0f}" for path in PATHS]
        ratios = [
            f"{speedup['ratio']:.2f} ({speedup['lower']:.2f} to {speedup['upper']:.2f})"
            for speedup in (entry["speedup"]["stock dense"], entry["speedup"]["own dense"])
        ]
        share = entry["speedup"]["own dense"]["ratio"] / entry["bound"]
        kept = f"{entry['kept']} of {entry['patches']}"
        rows.append([f"{entry['mask_ratio']:.2f}", kept, *medians, *ratios, f"{entry['bound']:.2f}", f"{share:.2f}"])
    names = [f"{path}, ms" for path in PATHS]
    header = ["ratio", "kept", *names, "times stock (quartiles)", "times own dense (quartiles)", "bound", "of it"]
    measure.print_table(title, header, rows)


def print_memory(memory: dict[str, dict[str, int]]) -> None:
    rows = []
    for part, by_path in memory.items():
        shares = [f"{by_path['sparse'] / by_path[path]:.2f}" for path in ("stock dense", "own dense")]
        rows.append([part, *(f"{by_path[path] / 1e6:.0f}" for path in PATHS), *shares])
    header = ["", *(f"{path}, MB" for path in PATHS), "share of stock", "share of own dense"]
    measure.print_table("Peak memory of a step beyond weights and gradients", header, rows)


def print_shares(shares: dict[str, dict[str, float]]) -> None:
    totals = {path: sum(by_kind.values()) for path, by_kind in shares.items()}
    rows = [
        [kind, *(f"{1e3 * shares[path][kind]:.0f} ({shares[path][kind] / totals[path]:.0%})" for path in PATHS)]
        for kind in KINDS
    ]
    rows.append(["all", *(f"{1e3 * totals[path]:.0f}" for path in PATHS)])
    measure.print_table("Where the encoder's time goes: ms (share) of a profiled step", ["", *PATHS], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="atto", choices=[name for name in SIZES if not name.startswith("v1")])
    parser.add_argument("--batch_size", type=int, default=16, help="images in a step")
    parser.add_argument("--image_size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--mask_ratios", type=float, nargs="+", default=[0.4, 0.5, 0.6, 0.7, 0.8])
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds")
    parser.add_argument("--bf16", action="store_true", help="under bfloat16 autocast")
    arguments = parser.parse_args()
    setting = Setting(arguments.size, arguments.batch_size, arguments.image_size, arguments.bf16)
    precision = "bfloat16 autocast" if arguments.bf16 else "float32"

    stock_format, format_seconds = choose_stock_format(setting)
    setting = setting._replace(stock_format=stock_format)
    models = {path: build_model(path, setting) for path in PATHS}
    parameters = {
        "encoder": models["sparse"].convnextv2.num_parameters(),
        "whole model": models["sparse"].num_parameters(),
    }
    print(f"{arguments.size}, {arguments.batch_size} images of {arguments.image_size} pixels, {precision}")
    formats = ", ".join(f"{name} {1e3 * seconds:.0f} ms" for name, seconds in format_seconds.items())
    print(f"the stock encoder's memory formats: {formats}; the faster is used")

    encoder = [time_part("encoder", models, ratio, setting, arguments.rounds) for ratio in arguments.mask_ratios]
    print_times(f"The encoder alone, {parameters['encoder'] / 1e6:.1f}M parameters", encoder)
    whole = time_part("whole model", models, RATIO, setting, arguments.rounds)
    print_times(f"With the decoder, {parameters['whole model'] / 1e6:.1f}M parameters", [whole])
    largest = max(entry["largest_difference"] for entry in [*encoder, whole])
    print(f"losses and gradients in float32 are equal, to {largest:.1e} of the largest value")
    memory = {
        part: {path: measure.peak_memory(build_memory_step, path, part, setting) for path in PATHS} for part in PARTS
    }
    print_memory(memory)
    shares = profile_encoder(models, setting)
    print_shares(shares)
    measure.save(
        f"fcmae_step_{arguments.size}" + ("_bf16" if arguments.bf16 else ""),
        {
            "arguments": vars(arguments),
            "parameters": parameters,
            "encoder": encoder,
            "whole_model": whole,
            "step_memory_bytes": memory,
            "encoder_seconds_by_kind": shares,
            "stock_format_seconds": format_seconds,
        },
        libraries=("torch", "transformers"),
    )


if __name__ == "__main__":
    main()
