"""Not a method: what those that train under a common mask share. They differ in how the mask comes about.

    every step:  g <- g * mask       # so nothing outside the mask ever moves, whatever momentum or decay do

A mask is a tree of bool tensors, 1 = kept. A layer that is kept whole has no entry in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from lamina.errors import expect, is_number
from lamina.layers import Layer, matrices
from lamina.method import Method, Plan, Task
from lamina.tree import Params, cut, top_fraction

KINDS = frozenset({"conv1d", "conv2d", "conv3d", "linear", "lstm", "gru", "rnn", "attention"})
LAYOUTS = ("erk", "uniform")


def prunable(layers: Iterable[Layer]) -> tuple[Layer, ...]:
    """The weights of convolutions, Linear and recurrent layers and of attention's projections, first and last included.
    Embeddings (also where they are tied to a Linear), biases and norm parameters are never masked."""
    return tuple(layer for layer in matrices(layers) if layer.kind in KINDS)


def expect_density(density: float) -> None:
    fine = is_number(density, 0) and 0 < density <= 1
    expect(fine, f"density={density}: expected 0 < density <= 1 (a share, not a percentage)", where="method.density")


def expect_layout(layout: str) -> None:
    expect(layout in LAYOUTS, f"layout={layout!r}: expected one of {', '.join(LAYOUTS)}", where="method.layout")


def partial(mask: Mapping[str, Tensor]) -> Params:
    """The mask without the layers that it keeps whole."""
    return {name: m for name, m in mask.items() if not bool(m.all())}


def split(flat: Tensor, like: Mapping[str, Tensor]) -> Params:
    """A vector cut into tensors of these shapes."""
    parts = torch.split(flat, [x.numel() for x in like.values()])
    return {name: part.reshape(x.shape) for (name, x), part in zip(like.items(), parts, strict=True)}


def counts(layers: Sequence[Layer], density: float, layout: str) -> dict[str, int]:
    """Entries to keep of each layer, at least one.

    Args:
        layout: "uniform" = density * numel; "erk" = Erdos-Renyi with kernels (Evci et al., ICML 2020, arXiv
            1911.11134): proportional to the sum of the layer's dimensions, layers that would exceed their numel whole,
            scaled so that they are density * numel together.
    """
    if layout == "uniform":
        return {layer.name: max(1, round(density * layer.numel)) for layer in layers}
    left = density * sum(layer.numel for layer in layers)
    rest = list(layers)
    scale = 0.0
    while rest:
        scale = left / sum(sum(layer.shape) for layer in rest)
        whole = [layer for layer in rest if scale * sum(layer.shape) >= layer.numel]
        if not whole:
            break
        left -= sum(layer.numel for layer in whole)
        rest = [layer for layer in rest if layer not in whole]
    kept = {layer.name: max(1, round(scale * sum(layer.shape))) for layer in rest}
    return {layer.name: min(layer.numel, kept.get(layer.name, layer.numel)) for layer in layers}


def drawn(layers: Sequence[Layer], kept: Mapping[str, int], source: torch.Generator) -> Params:
    """A random mask with so many entries of each layer."""
    scores = {layer.name: torch.rand(layer.shape, generator=source, dtype=torch.float64) for layer in layers}
    return partial({name: top_fraction(x, kept[name]) for name, x in scores.items()})


class Server(NamedTuple):
    mask: Params


class Masked(Method[Server, tuple[()]]):
    """As it stands, under a mask of everything. Those derived from it set one in `setup` or change it in `step`."""

    def bind(self, task: Task) -> Self:
        expect(
            bool(prunable(task.layers)),
            f"{self!r} masks the weights of convolutions, Linear and recurrent layers: the model has none",
            code="E117",
            where="model",
        )
        return super().bind(task)

    def init(self, params: Params) -> Server:
        return Server({})

    def plan(self, server: Server, plan: Plan) -> Plan:
        return plan.under(server.mask) if server.mask else plan

    def correct(self, client: tuple[()], plan: Plan, step: Tensor, params: Params, grads: Params) -> Params:
        return cut(grads, plan.mask)
