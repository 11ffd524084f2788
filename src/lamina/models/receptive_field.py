"""Receptive fields, exact, by following one forward pass from operation to operation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from lamina.errors import expect

_CONV = torch.ops.aten.convolution
_MAX_POOLS = (torch.ops.aten.max_pool2d_with_indices, torch.ops.aten.max_pool3d_with_indices)
_AVG_POOLS = (torch.ops.aten.avg_pool1d, torch.ops.aten.avg_pool2d, torch.ops.aten.avg_pool3d)


class Field(NamedTuple):
    """What one position of a layer's output sees, and how far apart two neighbours look, in pixels of the input."""

    rf: int
    jump: int


def receptive_fields(model: nn.Module, input_size: Sequence[int]) -> dict[str, Field]:
    """Receptive field and total stride behind every convolution, by the name of its weight.

    Where branches meet, the largest counts; padding does not cut anything off, so a field can exceed the input.
    Kernels that are not square count by their longer side. Global pooling and what follows it (linear layers, which
    see all of the map) are not listed; a model without convolutions gives {}. Nothing is computed: the pass runs on
    the meta device and leaves the model as it is.

    Args:
        model: any module that runs on one tensor without looking at its values.
        input_size: of one example, e.g. (3, 32, 32).
    """
    sizes = tuple(input_size)
    expect(
        len(sizes) >= 2 and all(isinstance(size, int) and size >= 1 for size in sizes),
        f"input_size={input_size!r}: expected channels and one or more sides, each >= 1",
        where="input_size",
        remedy="give it without the batch, e.g. (3, 32, 32)",
    )
    dtype = next((p.dtype for p in model.parameters() if p.ndim > 2), None)
    if dtype is None:
        return {}
    parameters = {name: torch.empty_like(tensor, device="meta") for name, tensor in model.named_parameters()}
    buffers = {name: torch.empty_like(tensor, device="meta") for name, tensor in model.named_buffers()}
    image = torch.empty((2, *sizes), dtype=dtype, device="meta")
    trace = _Trace({id(tensor): name for name, tensor in parameters.items()}, image)
    with torch.no_grad(), trace:
        functional_call(model, {**parameters, **buffers}, (image,))
    return trace.found


class _Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Carries a Field along with every tensor that comes from the image."""

    def __init__(self, names: Mapping[int, str], image: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = names
        self.fields = {id(image): Field(1, 1)}
        self.alive: list[Tensor] = [image]  # ids stay unique as long as their tensors live
        self.found: dict[str, Field] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        inputs = [self.fields[id(tensor)] for tensor in _tensors(args) if id(tensor) in self.fields]
        if not inputs:
            return output
        field = Field(max(field.rf for field in inputs), max(field.jump for field in inputs))
        operation = func.overloadpacket
        if operation is _CONV:
            kernel, stride, dilation = args[1].shape[2:], args[3], args[5]
            field = _behind(field, kernel, stride, dilation)
            if id(args[1]) in self.names:
                self.found[self.names[id(args[1])]] = field
        elif operation in _MAX_POOLS or operation in _AVG_POOLS:
            kernel = args[1]
            stride = args[2] if len(args) > 2 and args[2] else kernel
            dilation = args[4] if operation in _MAX_POOLS and len(args) > 4 else [1]
            field = _behind(field, kernel, stride, dilation)
        for tensor in _tensors((output,)):
            self.fields[id(tensor)] = field
            self.alive.append(tensor)
        return output


def _behind(field: Field, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Field:
    longest = max(kernel) - 1
    return Field(field.rf + longest * max(dilation) * field.jump, field.jump * max(stride))


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
