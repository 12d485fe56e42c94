"""Where the visible cells of masked images lie, and the depthwise convolution over them.

Every image keeps equally many patches, so the visible cells of a stage are one tensor `(batch, kept, side, side,
channels)`: no ragged shapes and no sparse library. All layers of ConvNeXt work on such cells as they are, but for the
depthwise convolution, which looks across patches: for it they are laid onto a canvas of zeros and picked up again.

PyTorch's weight gradient of a depthwise convolution is the slowest part of a ConvNeXt step on a CPU. `depthwise` takes
it as one grouped convolution whose kernel is the output's gradient.

This file is published beside the weights (remote code): it imports torch only.
"""

import torch
from torch import nn


class VisibleCells:
    """The visible patches of a batch, and with them the visible cells of every stage.

    Args:
        mask: `(batch, patches)`, True for removed; patches row by row, equally many visible in each image.
        grid: patches in a column and in a row of the image.
        number_kept: of each image. Given rather than counted: a count would wait for the GPU at every step.
    """

    def __init__(self, mask: torch.Tensor, grid: tuple[int, int], number_kept: int):
        self.grid = grid
        self.batch_size = mask.shape[0]
        # (batch, kept), in the order of the image: a stable sort puts the visible ones first.
        self.kept = mask.to(torch.uint8).argsort(dim=1, stable=True)[:, :number_kept]
        self._rows: dict[int, torch.Tensor] = {}

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    def rows(self, side: int) -> torch.Tensor:
        """Rows `(batch * kept * side,)` of a canvas seen as `(batch * height * grid width, side * channels)`.

        A patch's cells are `side` short runs in the memory of a channels-last canvas; these are their numbers.
        """
        if side not in self._rows:
            down, across = self.grid
            images = torch.arange(self.batch_size, device=self.kept.device)[:, None]
            first = (images * down + self.kept // across) * side * across + self.kept % across
            lines = torch.arange(side, device=self.kept.device) * across
            self._rows[side] = (first[:, :, None] + lines).flatten()
        return self._rows[side]

    def scatter(self, cells: torch.Tensor) -> torch.Tensor:
        """`(batch, kept, side, side, channels)` -> `(batch, height, width, channels)`, zero where nothing is seen."""
        side, channels = cells.shape[3:]
        down, across = self.grid
        canvas = cells.new_zeros(self.batch_size * down * side * across, side * channels)
        canvas.index_copy_(0, self.rows(side), cells.reshape(-1, side * channels))
        return canvas.view(self.batch_size, down * side, across * side, channels)

    def gather(self, canvas: torch.Tensor) -> torch.Tensor:
        """The reverse of `scatter`: `(batch, height, width, channels)` -> `(batch, kept, side, side, channels)`."""
        side, channels = canvas.shape[1] // self.grid[0], canvas.shape[3]
        cells = canvas.reshape(-1, side * channels).index_select(0, self.rows(side))
        return cells.view(self.batch_size, -1, side, side, channels)

    def gather_pixels(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(batch, channels, height, width)` -> the visible patches `(batch * kept, channels, patch, patch)`."""
        batch_size, channels, height, width = pixel_values.shape
        down, across = self.grid
        patches = pixel_values.view(batch_size, channels, down, height // down, across, width // across)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
        images = torch.arange(batch_size, device=pixel_values.device)[:, None]
        return patches[images, self.kept].flatten(0, 1)


def depthwise(hidden_states: torch.Tensor, convolution: nn.Conv2d, visible: VisibleCells | None) -> torch.Tensor:
    """A depthwise convolution of stride 1 that keeps the size, with its bias.

    `hidden_states` and the result are `(batch, height, width, channels)`, or, with `visible`, cells `(batch, kept,
    side, side, channels)`, whose removed neighbours count as zero.
    """
    if _trains_on_cpu(hidden_states, convolution) and _is_plain(convolution):
        weight, bias = convolution.weight, convolution.bias
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            hidden_states, weight, bias = hidden_states.to(dtype), weight.to(dtype), bias.to(dtype)
        return _Depthwise.apply(hidden_states, weight, bias, visible)
    canvas = hidden_states if visible is None else visible.scatter(hidden_states)
    canvas = convolution(canvas.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return canvas if visible is None else visible.gather(canvas)


def halve(hidden_states: torch.Tensor, convolution: nn.Conv2d) -> torch.Tensor:
    """A 2x2 convolution of stride 2.

    Of images `(batch, height, width, channels)`, or of cells `(batch, kept, side, side, channels)`, whose windows stay
    within their patch: half the height, width or side.
    """
    if hidden_states.ndim == 4:  # to ask for the size of whole images would bind an export to it
        return convolution(hidden_states.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    batch_size, kept, side = hidden_states.shape[:3]
    if side == 2 and _is_plain(convolution):
        # One product: convolutions of many tiny images are slow on a CPU.
        weight = convolution.weight.permute(0, 2, 3, 1).flatten(1)
        return nn.functional.linear(hidden_states.flatten(2), weight, convolution.bias)[:, :, None, None]
    # The patches of an image stand in one column.
    halved = convolution(hidden_states.flatten(1, 2).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return halved.reshape(batch_size, kept, side // 2, side // 2, -1)


def pointwise(hidden_states: torch.Tensor, convolution: nn.Conv2d) -> torch.Tensor:
    """A 1x1 convolution of `(..., channels)`."""
    if _is_plain(convolution):
        return nn.functional.linear(hidden_states, convolution.weight.flatten(1), convolution.bias)
    cells = hidden_states.flatten(0, -2).view(-1, hidden_states.shape[-1], 1, 1)
    return convolution(cells).view(*hidden_states.shape[:-1], -1)


def _trains_on_cpu(hidden_states: torch.Tensor, convolution: nn.Conv2d) -> bool:
    on_cpu = hidden_states.device.type == "cpu" and not torch.compiler.is_compiling()
    return on_cpu and convolution.training and torch.is_grad_enabled()


def _is_plain(convolution: nn.Conv2d) -> bool:
    """Whether nothing would be passed by when the module is not called: an adapter, a hook, a replaced forward."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooked = "forward" in convolution.__dict__ or any(getattr(convolution, kind) for kind in kinds)
    return type(convolution) is nn.Conv2d and type(convolution.weight) is nn.Parameter and not hooked


def refuse_second_derivative() -> None:
    """For the backward of a function whose gradient is written out, and is not differentiable itself.

    `once_differentiable` would not do: `torch.autograd.grad` of chosen tensors passes by the error that it leaves.
    """
    if torch.is_grad_enabled():  # in a backward pass only with `create_graph`
        raise RuntimeError(
            "Derivatives of gradients are not written out for training mode: call model.eval() for them."
        )


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, weight, bias, visible):
        canvas = hidden_states if visible is None else visible.scatter(hidden_states)
        ctx.save_for_backward(canvas, weight)
        ctx.visible = visible
        canvas = _convolve(canvas, weight, bias)
        return canvas if visible is None else visible.gather(canvas)

    @staticmethod
    def backward(ctx, gradient):
        refuse_second_derivative()
        canvas, weight = ctx.saved_tensors
        visible = ctx.visible
        needs_input, needs_weight, needs_bias, _ = ctx.needs_input_grad
        input_gradient = weight_gradient = bias_gradient = None
        if needs_bias:
            bias_gradient = gradient.flatten(0, -2).sum(0)
        if visible is not None:
            gradient = visible.scatter(gradient)
        if needs_input:
            input_gradient = _convolve(gradient, weight.flip(2, 3), None)
            input_gradient = input_gradient if visible is None else visible.gather(input_gradient)
        if needs_weight:
            weight_gradient = _weight_gradient(canvas, gradient, weight)
        return input_gradient, weight_gradient, bias_gradient, None


def _convolve(canvas: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    padding = weight.shape[2] // 2
    canvas = nn.functional.conv2d(canvas.permute(0, 3, 1, 2), weight, bias, padding=padding, groups=len(weight))
    return canvas.permute(0, 2, 3, 1)


def _weight_gradient(canvas: torch.Tensor, gradient: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Every channel of every image is a group of its own, convolved with its output's gradient."""
    batch_size, height, width, channels = canvas.shape
    images, kernels = (states.permute(0, 3, 1, 2).contiguous() for states in (canvas, gradient))
    groups = batch_size * channels
    by_image = nn.functional.conv2d(
        images.view(1, groups, height, width),
        kernels.view(groups, 1, height, width),
        padding=weight.shape[2] // 2,
        groups=groups,
    )
    by_image = by_image.view(batch_size, *weight.shape)
    return by_image.sum(0, dtype=torch.promote_types(weight.dtype, torch.float32)).to(weight.dtype)


__all__ = ["VisibleCells", "depthwise", "halve", "pointwise", "refuse_second_derivative"]
