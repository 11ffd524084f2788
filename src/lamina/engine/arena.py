"""Trees of tensors in memory that several processes share."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from lamina.tree import Message, Params

Entry: TypeAlias = tuple[str, str, str, tuple[int, ...], int]  # tree, name, dtype, shape, offset
_ALIGN = 64
_DTYPES = {str(d).removeprefix("torch."): d for d in (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
)}  # fmt: skip


class Full(Exception):
    """The arena is too small; `needed` bytes would do."""

    def __init__(self, needed: int):
        super().__init__(needed)
        self.needed = needed


class Arena:
    """Anonymous shared memory, inherited by forked workers. It has no name, so nothing can be left behind, and a page
    that is never written costs nothing."""

    def __init__(self, size: int):
        self.size = size
        self._map = mmap.mmap(-1, size)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def write(self, trees: Mapping[str, Params], start: int, end: int) -> tuple[list[Entry], int]:
        """Copies the trees in, between these offsets; returns where everything lies and the first free offset.

        Raises Full when they do not fit, before anything is written.
        """
        entries, offset = layout(trees, start)
        if offset > end:
            raise Full(offset - start)
        for (*_, at), x in zip(entries, (x for tree in trees.values() for x in tree.values()), strict=True):
            if x.numel():
                self._view(at, x.dtype, x.shape).copy_(x)
        return entries, offset

    def read(self, entries: list[Entry]) -> Message:
        """Views, not copies."""
        trees: Message = {}
        for tree, name, dtype, shape, at in entries:
            trees.setdefault(tree, {})[name] = self._view(at, _DTYPES[dtype], torch.Size(shape))
        return trees

    def _view(self, at: int, dtype: torch.dtype, shape: torch.Size) -> Tensor:
        size = shape.numel() * dtype.itemsize
        return self._bytes[at : at + size].view(dtype).view(shape)


def layout(trees: Mapping[str, Params], start: int = 0) -> tuple[list[Entry], int]:
    """Where the tensors of these trees lie when written at `start`, and the first free offset after them."""
    entries: list[Entry] = []
    offset = start
    for tree, content in trees.items():
        for name, x in content.items():
            offset = -(-offset // _ALIGN) * _ALIGN
            entries.append((tree, name, str(x.dtype).removeprefix("torch."), tuple(x.shape), offset))
            offset += x.numel() * x.dtype.itemsize
    return entries, -(-offset // _ALIGN) * _ALIGN
