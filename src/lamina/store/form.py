"""What rows of equal structure have in common: kept once, so that a row is nothing but the bytes of its tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lamina.store.segment import ALIGN


class Leaf(NamedTuple):
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int  # in the body


class Form(NamedTuple):
    """What rows of equal structure have in common."""

    skeleton: Any
    leaves: tuple[Leaf, ...]
    size: int  # of the body


def form_of(skeleton: Any, leaves: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> Form:
    """Args: leaves: name, dtype and shape of each, in the order of the skeleton."""
    laid: list[Leaf] = []
    offset = 0
    for name, dtype, shape in leaves:
        laid.append(Leaf(name, str(dtype).removeprefix("torch."), shape, offset))
        offset = -(-(offset + math.prod(shape) * dtype.itemsize) // ALIGN) * ALIGN
    return Form(skeleton, tuple(laid), offset)


def form_from(document: tuple[Any, list[tuple[str, str, list[int], int]]]) -> Form:
    """Of a form's skeleton and leaves that were JSON."""
    skeleton, leaves = document
    return form_of(skeleton, [(name, _dtype(kind), tuple(shape)) for name, kind, shape, _ in leaves])


def packed(form: Form, leaves: Mapping[str, Tensor]) -> Tensor:
    """The body of a row."""
    body = torch.zeros(form.size, dtype=torch.uint8)
    for leaf, x in zip(form.leaves, leaves.values(), strict=True):
        flat = x.detach().contiguous().reshape(-1).view(torch.uint8)
        body[leaf.offset : leaf.offset + len(flat)] = flat
    return body


def unpacked(form: Form, body: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Views of a body, by name."""
    for name, kind, shape, offset in form.leaves:
        dtype = _dtype(kind)
        yield name, body[offset : offset + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


def _dtype(kind: str) -> torch.dtype:
    found = getattr(torch, kind, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{kind} is no dtype")
    return found


def classes(value: Any) -> str:
    """The classes of a client state in words; what is in a dict differs from round to round."""
    if hasattr(value, "_asdict"):
        inner = ", ".join(f"{key}={classes(x)}" for key, x in value._asdict().items())
        return f"{type(value).__name__}({inner})"
    if isinstance(value, tuple):
        return f"({', '.join(map(classes, value))})"
    return type(value).__name__
