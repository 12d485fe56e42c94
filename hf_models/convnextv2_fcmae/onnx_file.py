"""The dense ConvNeXt as `model.onnx`, for ONNX Runtime and what is built on it (optimum, transformers.js).

Input `pixel_values`, outputs by transformers' names, with a free batch, height and width. In float32 whatever the
model's dtype is: ONNX Runtime's convolutions on a CPU know nothing smaller.
"""

import copy
from pathlib import Path

import torch

from ..exported_program import ImageGraph, refuse_difference

# A protobuf message ends at 2 GiB; the rest is room for the graph. Larger weights go into a file beside it.
LARGEST_WEIGHTS = 2**31 - 2**24


def write_onnx(model: torch.nn.Module, path: Path) -> None:
    """Writes `model.onnx`, and `model.onnx.data` where the weights are over 2 GiB, into the folder `path`.

    The file is checked by `onnx`, and by ONNX Runtime, where that is installed, on images of another number and size
    than it was traced with.

    Raises ImportError without `onnx` and `onnxscript`, and ValueError where ONNX Runtime computes something else.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401 (what torch.onnx.export is written with)
    except ImportError as error:
        raise ImportError(f"The layout 'onnx' needs {error.name}: `pip install 'hf_models[export]'`.") from error

    if model.dtype != torch.float32:
        model = copy.deepcopy(model).float()
    graph = ImageGraph(model)
    inputs, others = graph.examples()
    with torch.no_grad():
        expected = graph(**others)
        program = torch.onnx.export(
            graph,
            kwargs=inputs,
            dynamo=True,
            dynamic_shapes=graph.dynamic_shapes,
            input_names=list(inputs),
            output_names=list(expected),
            verbose=False,
        )
    # With each operation the exporter notes which lines it comes from, with the paths of this machine.
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()
    path.mkdir(parents=True, exist_ok=True)
    file = path / "model.onnx"
    weights = sum(parameter.nbytes for parameter in model.parameters())
    program.save(file, external_data=weights > LARGEST_WEIGHTS)
    onnx.checker.check_model(file)  # by its path, as a file over 2 GiB has to be

    try:
        import onnxruntime
    except ImportError:
        return
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    found = session.run(list(expected), {name: tensor.numpy() for name, tensor in others.items()})
    named = {name: torch.from_numpy(array) for name, array in zip(expected, found, strict=True)}
    refuse_difference("ONNX Runtime", named, expected)
