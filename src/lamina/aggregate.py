"""The weighted mean of the messages, taken one message at a time in the schedule's order."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable

import torch
from torch import Tensor

from lamina.tree import Message, Params


def total(parts: Iterable[float]) -> float:
    """Added one after the other, like the messages. The builtin `sum` compensates from Python 3.12 on."""
    return functools.reduce(operator.add, parts, 0.0)


class Mean:
    """Accumulates sum of p_i * x_i and divides by the p that arrived, tensor by tensor.

    Args:
        full: the sum of all p that are expected, added in the order in which they will come. When all have come
            nothing is divided, so one client's mean is its message, bit for bit.

    Integer tensors, and bool ones among the buffers, take the maximum; other bool tensors (votes) are averaged as 0
    and 1: the share of the weight that says yes. No stack of messages is kept: memory is one message. The sums are made
    on the device where the messages are; the result is on the CPU.
    """

    def __init__(self, full: float):
        self.full = full
        self._sums: Message = {}
        self._weights: dict[str, dict[str, float]] = {}

    def add(self, tree: str, content: Params, p: float) -> None:
        sums = self._sums.setdefault(tree, {})
        weights = self._weights.setdefault(tree, {})
        for name, x in content.items():
            old = sums.get(name)
            if x.dtype == torch.bool and tree != "buffers":
                x = x.to(torch.float64)
            if not x.is_floating_point():
                sums[name] = x.clone() if old is None else torch.maximum(old, x)
            elif old is None:
                sums[name] = x * p
            else:
                old.add_(x, alpha=p)
            weights[name] = weights.get(name, 0.0) + p

    def result(self) -> Message:
        return {
            tree: {name: self._normal(x.cpu(), self._weights[tree][name]) for name, x in sums.items()}
            for tree, sums in self._sums.items()
        }

    def _normal(self, total: Tensor, weight: float) -> Tensor:
        return total if weight == self.full or not total.is_floating_point() else total / weight
