"""LIPS: now and then every client starts its round from a pruned copy of the model, so that middle layers move again.

Xiao et al., *Addressing the Collaboration Dilemma in Low-Data Federated Learning via Transient Sparsity*, 2025
(arXiv 2506.00932).

    after round r with r % every == 0:  d = min(1, density + (1 - density) * r / rounds)       # the shock, which fades
    client, at the start of the next round, in every chosen layer:
           score = |g * w|       # w: the global weight; g: the gradient of its own last minibatch
           w stays on the floor(numel * d) largest scores and is 0 elsewhere
    nothing is frozen: local training is dense, and zeros grow again at once

A shock that is due after a round that left layers waiting falls after the next round in sync, with its own density; a
newer one takes its place. A client that never took part scores by |w|; one that was away scores by the gradient it
has, however old. Small layers may lose everything for a round: floor(numel * d) can be 0.

Differs from the released code, which stops with a KeyError at its first aggregation: norm parameters and biases follow
the server, unless ``norm_sync="local"`` keeps them with the client, as that code means to (its BatchNorm statistics
stay too: ``buffers="keep"``); layers are chosen by kind, not by name and kernel size; clients may be drawn, where
theirs would zero whoever did not train; gradients stay in float32, where theirs are halved and underflow.
With others: the order with FedLAMA does not matter; under a mask only kept entries are counted and compete. The update
is local - global with the whole global model, so where a weight was pruned it begins at -w: server optimisers, sparse
uplinks and error feedback see this burst as it is, and a method that keeps updates for later should leave out a
round whose plan has the number "shock". It prunes what the methods before it start from: after Personal it shocks
personal layers too.
Cost: one number in the plan of a round with a shock; a client keeps a gradient of the chosen layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor

from lamina.errors import expect, is_number, is_whole
from lamina.layers import matrices
from lamina.method import Method, Plan, Task, Work
from lamina.tree import Message, Params, select, top_fraction


class Server(NamedTuple):
    """Densities; 1 where there is no shock, since one of density 1 prunes nothing (and a state holds no None)."""

    due: float  # waits for a round in sync
    falls: float  # at the start of the next round


class Client(NamedTuple):
    grads: Params  # of the chosen layers, from its last participation; {} before
    own: Params  # norm parameters and biases under norm_sync="local"; {} before its first participation


def pruned(w: Tensor, score: Tensor, density: float, mask: Tensor | None) -> Tensor:
    """w on its floor(numel * density) largest scores, 0 elsewhere; under a mask only kept entries are counted."""
    if mask is None:
        stays = top_fraction(score, math.floor(w.numel() * density))
    else:
        stays = torch.zeros_like(mask)
        stays[mask] = top_fraction(score[mask], math.floor(int(mask.sum()) * density))
    return torch.where(stays, w, 0)


@dataclass(frozen=True)
class LIPS(Method[Server, Client]):
    """Args:
    density: share of a layer that the first shock keeps, in (0, 1]; 1 is FedAvg.
    every: rounds between two shocks, >= 1; the first is due after round 0.
    rounds: rounds over which the density rises to 1, >= 1: those of the run.
    score: "saliency" = |g * w|, or "magnitude" = |w|.
    layers: "conv" = every Conv2d weight but the first; "middle" = every weight tensor with ndim > 1 but the first and
        the last; "auto" = "conv" for models with two or more Conv2d, else "middle".
    norm_sync: "global", or "local": norm parameters and all biases are personal.
    """

    density: float = 0.5
    every: int = 5
    rounds: int = 300
    score: Literal["saliency", "magnitude"] = "saliency"
    layers: Literal["auto", "conv", "middle"] = "auto"
    norm_sync: Literal["global", "local"] = "global"

    shocks = True

    def __post_init__(self) -> None:
        fine = is_number(self.density, 0) and 0 < self.density <= 1
        expect(fine, f"density={self.density}: expected 0 < density <= 1 (a share, not a percentage)")
        expect(is_whole(self.every, 1), f"every={self.every}: expected a whole number of rounds >= 1")
        expect(is_whole(self.rounds, 1), f"rounds={self.rounds}: expected a whole number >= 1")
        choices = {"score": ("saliency", "magnitude"), "layers": ("auto", "conv", "middle")}
        for name, known in (choices | {"norm_sync": ("global", "local")}).items():
            value = getattr(self, name)
            expect(value in known, f"{name}={value!r}: expected one of {', '.join(known)}")
        if self.norm_sync == "local":
            object.__setattr__(self, "withholds", "personal")

    def bind(self, task: Task) -> Self:
        found = len(matrices(task.layers))
        expect(
            found >= 3,
            f"LIPS prunes between the first and the last of three or more weight tensors with ndim > 1: "
            f"this model has {found}",
            code="E117",
            where="model",
            remedy="take a deeper model: an mlp has a weight tensor between any two of its widths, so three with "
            '"model.widths=[64,64,64,10]", in Python lamina.models.mlp((64, 64, 64, 10))',
        )
        convs = sum(layer.kind == "conv2d" for layer in matrices(task.layers))
        expect(
            self.layers != "conv" or convs >= 2,
            f"LIPS(layers='conv') prunes every Conv2d but the first: this model has {convs}",
            code="E117",
            where="method.layers",
            remedy="layers='middle' prunes every weight tensor with ndim > 1 but the first and the last",
        )
        return super().bind(task)

    def init(self, params: Params) -> Server:
        return Server(1.0, 1.0)

    def init_client(self, params: Params) -> Client:
        return Client({}, {})

    def plan(self, server: Server, plan: Plan) -> Plan:
        plan = plan.keep(plan.upload - self._personal())
        return plan.set(shock=server.falls) if server.falls < 1 else plan

    def begin(self, client: Client, plan: Plan, params: Params) -> Params:
        params = params | client.own
        if "shock" not in plan.config:
            return params
        density, masks = plan.config["shock"], plan.mask or {}
        start = {}
        for name, w in select(params, self._chosen()).items():
            score = (client.grads[name] * w).abs() if name in client.grads else w.abs()
            start[name] = pruned(w, score, density, masks.get(name))
        return params | start

    def report(self, client: Client, plan: Plan, work: Work, message: Message) -> tuple[Message, Client]:
        grads = select(work.grads, self._chosen()) if self.score == "saliency" else {}
        return message, Client(grads, select(work.params, self._personal()))

    def step(self, server: Server, plan: Plan, mean: Message) -> tuple[Message, Server]:
        due = server.due
        if plan.round % self.every == 0:
            due = min(1.0, self.density + (1 - self.density) * plan.round / self.rounds)
        return mean, Server(1.0, due) if plan.in_sync else Server(due, 1.0)

    def _chosen(self) -> list[str]:
        """The layers that shocks prune, in model order."""
        weights = matrices(self.task.layers)
        convs = [layer.name for layer in weights if layer.kind == "conv2d"]
        if self.layers == "conv" or (self.layers == "auto" and len(convs) >= 2):
            return convs[1:]
        return [layer.name for layer in weights[1:-1]]

    def _personal(self) -> set[str]:
        """Parameters that stay with the client."""
        local = self.norm_sync == "local"
        return {layer.name for layer in self.task.layers if local and (layer.kind == "norm" or layer.role == "bias")}
