"""Work on large arrays in a few threads: zstd and numpy let go of the interpreter lock while they run.

What is computed, and so every byte, is the same with any number of threads: items are cut by size alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import torch

X = TypeVar("X")
Y = TypeVar("Y")

PIECE = 1 << 16  # entries worked on at a time, so that temporaries stay in the cache; a multiple of every block
WORTH = 1 << 21  # bytes from which on threads are worth starting
MOST = 4  # threads: a float32 has four planes


class Span(NamedTuple):
    """Entries start to stop of vector i; the first of them is entry `at` of all vectors joined."""

    i: int
    start: int
    stop: int
    at: int

    @property
    def joined(self) -> slice:
        return slice(self.at, self.at + self.stop - self.start)


def spans(counts: Sequence[int]) -> list[Span]:
    """Vectors of these lengths, a piece at a time."""
    cut, at = [], 0
    for i, count in enumerate(counts):
        cut += [Span(i, start, min(start + PIECE, count), at + start) for start in range(0, count, PIECE)]
        at += count
    return cut


def each(work: Callable[[X], Y], items: Sequence[X], size: int) -> list[Y]:
    """[work(x) for x in items], which handles about `size` bytes in all.

    As many threads as torch has, so that a worker process with one thread stays with one. They end with the call: none
    is left for a fork to lose.
    """
    workers = min(len(items), torch.get_num_threads(), MOST) if size >= WORTH else 1
    if workers < 2:
        return [work(x) for x in items]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(work, items))
