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


def anonymous_memory(size: int) -> Tensor:
    """Bytes that forked processes inherit. They have no name and no file system (/dev/shm may be tiny), so nothing can
    be left behind, and a page that is never written costs nothing."""
    return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)


def shared_memory(size: int) -> Tensor:
    """Bytes that can be handed to a process of its own. They go with the last process that has them."""
    storage = torch.UntypedStorage._new_shared(size)  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=torch.uint8).set_(storage)


class Arena:
    """Args: memory: where the trees are written; all processes see one and the same."""

    def __init__(self, memory: Tensor):
        self.size = len(memory)
        self._bytes = memory

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
