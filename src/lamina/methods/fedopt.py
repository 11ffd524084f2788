"""FedOpt: the mean update as a pseudo-gradient for a server optimiser.

Reddi et al., *Adaptive Federated Optimization*, ICLR 2021 (arXiv 2003.00295), Algorithms 1 and 2; FedAvgM is Hsu et
al. 2019 (arXiv 1909.06335).

    D = mean update                                      # the pseudo-gradient is -D
    FedAvgM:     m <- momentum * m + D                   x <- x + lr * m
    FedAdagrad:  v <- v + D^2                            x <- x + lr * D / (sqrt(v) + eps)
    FedAdam:     m <- b1 m + (1-b1) D;  v <- b2 v + (1-b2) D^2
    FedYogi:     m as FedAdam;          v <- v - (1-b2) D^2 sign(v - D^2)
                                                         x <- x + lr * m / (sqrt(v) + eps)

v starts at eps^2 (the paper asks v_{-1} >= eps^2), and there is no bias correction, as in the paper's algorithms.
With others: last in a chain. A parameter absent from the mean (a layer that waits) is left alone, moments included.
Cost: no bytes; one or two models of server state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lamina.errors import expect, is_number
from lamina.method import Method, Plan
from lamina.tree import Message, Params, tmap, zeros_like


class Velocity(NamedTuple):
    m: Params


class Moments(NamedTuple):
    m: Params
    v: Params


def _check(name: str, value: float, low: float, high: float) -> None:
    expect(is_number(value, low, high), f"{name}={value}: expected {low:g} <= {name} < {high:g}")


@dataclass(frozen=True)
class FedAvgM(Method[Velocity, tuple[()]]):
    """Args: lr: server learning rate; momentum: in [0, 1); lr=1, momentum=0 is FedAvg."""

    lr: float = 1.0
    momentum: float = 0.9
    optimises = True

    def __post_init__(self) -> None:
        _check("lr", self.lr, 0, float("inf"))
        _check("momentum", self.momentum, 0, 1)

    def init(self, params: Params) -> Velocity:
        return Velocity(zeros_like(params))

    def step(self, server: Velocity, plan: Plan, mean: Message) -> tuple[Message, Velocity]:
        m = tmap(lambda d, m: self.momentum * m + d, mean["update"], server.m)
        return mean | {"update": tmap(lambda x: self.lr * x, m)}, Velocity(server.m | m)


class _Adaptive(Method[Moments, tuple[()]]):
    """What the three adaptive rules share: x + lr * m / (sqrt(v) + eps), v from eps^2 on. As it stands, Adagrad's."""

    optimises = True
    neutral = False  # no setting makes the division vanish
    lr: float
    eps: float

    def first(self, d: Tensor, m: Tensor) -> Tensor:
        return d

    def second(self, d: Tensor, v: Tensor) -> Tensor:
        return v + d * d

    def init(self, params: Params) -> Moments:
        return Moments(zeros_like(params), tmap(lambda x: torch.full_like(x, self.eps**2), params))

    def step(self, server: Moments, plan: Plan, mean: Message) -> tuple[Message, Moments]:
        m = tmap(self.first, mean["update"], server.m)
        v = tmap(self.second, mean["update"], server.v)
        update = tmap(lambda m, v: self.lr * m / (v.sqrt() + self.eps), m, v)
        return mean | {"update": update}, Moments(server.m | m, server.v | v)


@dataclass(frozen=True)
class FedAdagrad(_Adaptive):
    """Args: lr: server learning rate; eps: degree of adaptivity (the paper's tau)."""

    lr: float = 1e-2
    eps: float = 1e-3

    def __post_init__(self) -> None:
        _check("lr", self.lr, 0, float("inf"))
        expect(is_number(self.eps, 0) and self.eps > 0, f"eps={self.eps}: expected a number > 0")


@dataclass(frozen=True)
class FedAdam(_Adaptive):
    """Args: lr: server learning rate; b1, b2: decay of the moments, in [0, 1); eps: degree of adaptivity."""

    lr: float = 1e-2
    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-3

    def __post_init__(self) -> None:
        _check("lr", self.lr, 0, float("inf"))
        _check("b1", self.b1, 0, 1)
        _check("b2", self.b2, 0, 1)
        expect(is_number(self.eps, 0) and self.eps > 0, f"eps={self.eps}: expected a number > 0")

    def first(self, d: Tensor, m: Tensor) -> Tensor:
        return self.b1 * m + (1 - self.b1) * d

    def second(self, d: Tensor, v: Tensor) -> Tensor:
        return self.b2 * v + (1 - self.b2) * d * d


@dataclass(frozen=True)
class FedYogi(FedAdam):
    """Args: as FedAdam; its v moves by a bounded step, in the direction of D^2."""

    def second(self, d: Tensor, v: Tensor) -> Tensor:
        return v - (1 - self.b2) * d * d * torch.sign(v - d * d)
