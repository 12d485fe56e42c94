"""A model as a graph: what `torch.export` traces of it, and the `.pt2` file that holds that.

    program = torch.export.load("model.pt2").module()
    logits = program(input_ids=ids, attention_mask=ones)["logits"]  # or program(pixel_values=images)["logits"]

Such a file opens with torch alone, for any batch and length, or height and width. It is for running: a config, labels
and a tokenizer are not in it, and no layout can be made from it again. `convnextv2_fcmae/onnx_file.py` traces the same
graph.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

SUFFIX = ".pt2"
# The most that a graph's outputs may differ from the model's, in units of the largest output, or of 1 below that.
TOLERANCE = 1e-4
HALF_PRECISION_TOLERANCE = 5e-2


class ImageGraph(nn.Module):
    """A dense ConvNeXt of ours as a function from images to plain tensors by name.

    A classifier gives `logits`, an encoder `last_hidden_state` and `pooler_output`, a backbone the feature map of each
    of its `out_features`.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        side = model.config.mask_patch_size  # of the image, for one cell of the last stage
        # A length of 1 is a case of its own to torch.export, so that the last stage has to have two cells.
        shape = {0: Dim("batch"), 2: Dim("height", min=2 * side), 3: Dim("width", min=2 * side)}
        self.dynamic_shapes = {"pixel_values": shape}
        self.eval()

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        outputs = self.model(pixel_values)
        if "feature_maps" in outputs:
            return dict(zip(self.model.out_features, outputs.feature_maps, strict=True))
        return {name: tensor for name, tensor in outputs.items() if isinstance(tensor, Tensor)}

    def examples(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Random images to trace with, and ones of another number and size to compare with."""
        config = self.model.config
        side = config.mask_patch_size
        shapes = (2, config.num_channels, 2 * side, 3 * side), (3, config.num_channels, 3 * side + 1, 2 * side)
        generator = torch.Generator().manual_seed(0)
        first, second = (torch.randn(*shape, generator=generator).to(self.model.dtype) for shape in shapes)
        return {"pixel_values": first}, {"pixel_values": second}


class TokenGraph(nn.Module):
    """A causal language model as a function from token ids and their mask, `(batch, length)`, to `logits`.

    Raises ValueError for rotary frequencies that change with the length of the text.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        rope_type = model.config.rope_parameters["rope_type"]
        if rope_type in ("dynamic", "longrope"):
            raise ValueError(
                f"rope_type is {rope_type!r}, whose frequencies depend on the length of the text: torch.export cannot "
                "trace that. Choose another layout."
            )
        self.model = model
        shape = {0: Dim("batch"), 1: Dim("length")}
        self.dynamic_shapes = {"input_ids": shape, "attention_mask": shape}
        self.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        # A cache in the outputs is refused by torch.export.
        return {"logits": self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits}

    def examples(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Random texts to trace with, and ones of another number and length to compare with, one of them padded."""
        generator = torch.Generator().manual_seed(0)
        first, second = (
            torch.randint(self.model.config.vocab_size, shape, generator=generator) for shape in ((2, 7), (3, 12))
        )
        padded = torch.ones_like(second)
        padded[1, 9:] = 0
        inputs, others = {"input_ids": first}, {"input_ids": second}
        return inputs | {"attention_mask": torch.ones_like(first)}, others | {"attention_mask": padded}


def save_exported_program(graph: ImageGraph | TokenGraph, path: Path) -> None:
    """Writes the graph to the file `path`, in the model's own dtype.

    Raises ValueError where `path` does not end in `.pt2`, and where the traced graph computes something else.
    """
    if path.suffix != SUFFIX:
        raise ValueError(f"The layout 'torch_export' is one file: name it {path.name}{SUFFIX} rather than {path.name}.")
    inputs, others = graph.examples()
    with torch.no_grad():
        program = torch.export.export(graph, (), inputs, dynamic_shapes=graph.dynamic_shapes)
        _forget_source_files(program)
        refuse_difference("The exported program", program.module()(**others), graph(**others))
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.export.save(program, path)


def refuse_difference(what: str, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raises ValueError, with the difference, where the outputs `found` are not the `expected` ones of the model."""
    for name, tensor in expected.items():
        tolerance = HALF_PRECISION_TOLERANCE if tensor.dtype.itemsize < 4 else TOLERANCE
        difference = (found[name].double() - tensor.double()).abs().max() / tensor.abs().max().clamp(min=1)
        if not difference <= tolerance:  # NaN too
            raise ValueError(
                f"{what} computes another {name} than the model: the difference is {difference:.2g} of the largest "
                f"value, and {tolerance:g} at most is taken for rounding. Nothing is written."
            )


def _forget_source_files(program: ExportedProgram) -> None:
    """torch notes with each operation which lines it comes from, with the paths of this machine."""
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)
