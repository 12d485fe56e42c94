"""Where the time of a step of a ConvNeXt goes: the CPU time of every operation of torch's profiler, by kind.

An operation is of the kind that its name and shapes say; else of the kind of what it is part of: an operation, one of
our autograd functions, a module's forward pass, or, in the backward pass, what its gradient is taken of.
"""

from collections.abc import Callable
from contextlib import ExitStack, contextmanager

from torch import nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

MATRIX = "matrix products, stem, downsampling"
DEPTHWISE = "depthwise convolutions"
ACTIVATION = "activation"
NORMS = "norms"
GRN = "GRN"
LAYOUT = "gather and scatter"
OTHER = "residuals, masks, loss, other"
KINDS = (MATRIX, DEPTHWISE, ACTIVATION, NORMS, GRN, LAYOUT, OTHER)

BACKWARD = "autograd::engine::evaluate_function"
STEPS = 3
# The first pair whose word is in an operation's name decides.
WORDS = (
    ("grn", GRN),
    ("depthwise", DEPTHWISE),
    ("gelu", ACTIVATION),
    ("layer_norm", NORMS),
    ("addmm", MATRIX),
    ("aten::mm", MATRIX),
    ("aten::bmm", MATRIX),
    ("linear", MATRIX),
    ("index", LAYOUT),
    ("sort", LAYOUT),
    ("scatter", LAYOUT),
    ("gather", LAYOUT),
    ("new_zeros", LAYOUT),  # the canvas that cells are laid onto
)


def op_shares(step: Callable[[], object], *models: nn.Module) -> dict[str, float]:
    """Seconds of a `step` by kind of operation, all of `KINDS`: the mean of a few profiled steps."""
    step()  # one that makes what later ones find ready
    with ExitStack() as scopes:
        for model in models:
            for module in model.modules():
                # Hooks on other modules would keep our model from its own way to compute a convolution.
                if type(module).__name__.endswith("GRN"):
                    scopes.enter_context(_scope(module, GRN))
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            for _ in range(STEPS):
                step()
    events = sorted(profiler.events(), key=lambda event: event.time_range.start)
    # The number of a gradient's function is that of the last operation which was begun before it was made.
    made_by = {event.sequence_nr: event for event in events if event.sequence_nr >= 0 and not _is_backward(event)}
    seconds = dict.fromkeys(KINDS, 0.0)
    for event in events:
        seconds[_kind(event, made_by)] += event.self_cpu_time_total / 1e6 / STEPS
    return seconds


@contextmanager
def _scope(module: nn.Module, name: str):
    """Within, whatever the module's forward pass does is recorded as part of `name`."""
    entered = []

    def enter(*_):
        entered.append(record_function(name))
        entered[-1].__enter__()

    handles = [
        module.register_forward_pre_hook(enter),
        module.register_forward_hook(lambda *_: entered.pop().__exit__(None, None, None)),
    ]
    yield
    for handle in handles:
        handle.remove()


def _is_backward(event: FunctionEvent) -> bool:
    while event is not None:
        if event.name.startswith(BACKWARD):
            return True
        event = event.cpu_parent
    return False


def _kind(event: FunctionEvent | None, made_by: dict[int, FunctionEvent]) -> str:
    while event is not None:
        kind = _own_kind(event)
        if kind is not None:
            return kind
        if event.name.startswith(BACKWARD) and event.sequence_nr in made_by:
            return _kind(made_by[event.sequence_nr], made_by)
        event = event.cpu_parent
    return OTHER


def _own_kind(event: FunctionEvent) -> str | None:
    if event.name.startswith("aten::") and "conv" in event.name:
        # A gradient's operands are (gradient, input, weight), those of the others (input, weight).
        weight = event.input_shapes[2 if "backward" in event.name else 1]
        return DEPTHWISE if weight[1] == 1 else MATRIX
    name = event.name.lower()
    return next((kind for word, kind in WORDS if word in name), None)
