"""Receptive fields, exact, by following one forward pass from operation to operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from lamina.errors import expect, is_whole
from lamina.models.trace import Step, follow


class Field(NamedTuple):
    """What one position of a layer's output sees, and how far apart two neighbours look, in pixels of the input."""

    rf: int
    jump: int


def receptive_fields(model: nn.Module, input_size: Sequence[int]) -> dict[str, Field]:
    """Receptive field and total stride behind every convolution, by the name of its weight.

    Where branches meet, the largest counts; padding does not cut anything off, so a field can exceed the input.
    Kernels that are not square count by their longer side. Linear layers, which see all of the map, are not listed; a
    model without convolutions gives {}. Nothing is computed, and the model is left as it is: see `trace.follow`.

    Args:
        model: any module that runs on one tensor.
        input_size: of one example, e.g. (3, 32, 32).

    Raises:
        ConfigError: E101 for an impossible size, E121 when the model fails on it.
    """
    sizes = tuple(input_size)
    expect(
        len(sizes) >= 2 and all(is_whole(size, 1) for size in sizes),
        f"input_size={input_size!r}: expected channels and one or more sides, each >= 1",
        where="input_size",
        remedy="give it without the batch, e.g. (3, 32, 32)",
    )
    dtype = next((p.dtype for p in model.parameters() if p.ndim > 2), None)
    if dtype is None:
        return {}
    steps = follow(model, torch.zeros((2, *sizes), dtype=dtype)).steps
    return {
        name: field
        for step, field in zip(steps, fields_of(steps)[1:], strict=True)
        if step.what == "convolution"
        for name in step.weights
    }


def fields_of(steps: Sequence[Step]) -> list[Field]:
    """The field of every value: the example's own, then one per step."""
    fields = [Field(1, 1)]
    for step in steps:
        rf, jump = (max(sizes) for sizes in zip(*(fields[value] for value in step.reads), strict=True))
        fields.append(Field(rf + step.reach * jump, max(1, jump * step.stride // step.up)))
    return fields
