"""FedLAMA: layers that diverge little per byte are aggregated less often.

Lee, Zhang, Avestimehr, *Layer-wise Adaptive Model Aggregation for Scalable Federated Learning*, AAAI 2023
(arXiv 2110.10302).

    d_l  = E ||u_l - x_l||^2 / (steps since the layer was last aggregated * dim_l)   # (b), measured before overwriting
    every phi rounds, right after a full synchronisation: layers by ascending d,
           delta  = share of sum d*dim in the prefix                                 # (c)
           lambda = share of sum dim in the prefix                                   # (d)
           the prefix up to and including the first layer with 1 - lambda < delta gets interval phi, the rest 1

A layer is one weight tensor with more than one dimension; biases and norm parameters follow every round. Layers that
are not due go on training from the client's own copy, so a cohort stays together for phi rounds.

Which prefix? The paper prints `delta < lambda`, which would relax every layer but one; its text describes where delta
crosses 1 - lambda. We include the crossing layer, as the released code does: only that reading gives the paper's own
costs for the FEMNIST CNN, whose one dense kernel holds 97 % of the parameters and could otherwise never be relaxed.

Differs from the released code: weights p_i are the federation's, not uniform; delta's denominator is over the
scheduled layers alone (theirs adds norm and bias discrepancy, which relaxes more); `warmup` is a parameter (theirs: no
adjustment before round index 6, i.e. warmup=6); buffers follow the federation's policy (theirs never averages them);
momentum starts afresh each round (theirs lives on); the evaluated model is the aggregated one, not one client's.
With others: measures the mean, so it stands before a server optimiser; under a lossy uplink d is the discrepancy of
what was received; under a mask dim_l counts kept entries; layers another method keeps personal take no part.
Cost: one float64 per uploaded tensor (its squared norm); a client keeps its waiting layers for phi rounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor

from lamina.errors import expect, is_whole
from lamina.layers import matrices
from lamina.method import Method, Plan, Task, Work
from lamina.tree import Message, Params, omit, select, squared_norm


class Server(NamedTuple):
    interval: dict[str, int]  # scheduled layer -> rounds between two aggregations, 1 or phi
    discrepancy: dict[str, float]  # d of the layers that arrived in this cycle
    elapsed: dict[str, float]  # mean local steps since the layer was last aggregated


class Client(NamedTuple):
    waiting: Params  # its own copies of layers not yet aggregated
    cycle: Tensor  # 0-d, round // phi in which they wait; those of another cycle are void


def relaxed(discrepancy: Mapping[str, float], dims: Mapping[str, int]) -> list[str]:
    """The layers that get the long interval, by ascending discrepancy (rule B: the crossing layer is included).

    Args:
        discrepancy: d per layer, in model order; ties are taken in this order. All zero: nothing is relaxed.
        dims: entries per layer.
    """
    total = sum(d * dims[name] for name, d in discrepancy.items())
    size = sum(dims[name] for name in discrepancy)
    if not total > 0:
        return []
    chosen: list[str] = []
    delta, lam = 0.0, 0
    for name in sorted(discrepancy, key=discrepancy.__getitem__):
        delta += discrepancy[name] * dims[name]
        lam += dims[name]
        chosen.append(name)
        if (size - lam) * total < delta * size:  # 1 - lambda < delta, without a division to round
            break
    return chosen


@dataclass(frozen=True)
class FedLAMA(Method[Server, Client]):
    """Args:
    phi: the long interval, in rounds, >= 1; 1 is FedAvg.
    warmup: rounds of full synchronisation before intervals may change: they first do at the end of the cycle that
        completes more than `warmup` rounds.
    """

    phi: int = 2
    warmup: int = 0

    needs_moments = True
    withholds = "waiting"

    def __post_init__(self) -> None:
        expect(is_whole(self.phi, 1), f"phi={self.phi}: expected a whole number of rounds >= 1")
        expect(is_whole(self.warmup, 0), f"warmup={self.warmup}: expected a whole number of rounds >= 0")
        object.__setattr__(self, "hold", self.phi)

    def bind(self, task: Task) -> Self:
        expect(bool(matrices(task.layers)), "FedLAMA schedules weight tensors with ndim > 1: the model has none")
        return super().bind(task)

    def init(self, params: Params) -> Server:
        names = [layer.name for layer in matrices(self.task.layers)]
        return Server(dict.fromkeys(names, 1), {}, dict.fromkeys(names, 0.0))

    def init_client(self, params: Params) -> Client:
        return Client({}, torch.tensor(-1))

    def plan(self, server: Server, plan: Plan) -> Plan:
        waiting = {name for name, interval in server.interval.items() if (plan.round + 1) % interval}
        plan = replace(plan, in_sync=plan.in_sync and not waiting & plan.upload)
        return plan.keep(plan.upload - waiting)

    def begin(self, client: Client, plan: Plan, params: Params) -> Params:
        return params | client.waiting if int(client.cycle) == plan.round // self.phi else params

    def report(self, client: Client, plan: Plan, work: Work, message: Message) -> tuple[Message, Client]:
        scheduled = [layer.name for layer in matrices(self.task.layers)]
        waiting = {} if plan.in_sync else omit(select(work.params, scheduled), plan.upload)
        return message, Client(waiting, torch.tensor(plan.round // self.phi))

    def step(self, server: Server, plan: Plan, mean: Message) -> tuple[Message, Server]:
        steps = float(mean["steps"]["steps"])
        elapsed = {name: s + steps for name, s in server.elapsed.items()}
        seen = {} if plan.round % self.phi == 0 else server.discrepancy
        fresh: dict[str, float] = {}
        for name in server.interval:
            if name not in mean["update"]:
                continue
            spread = float(mean["moments"][name]) - squared_norm(mean["update"][name])  # E|u|^2 - |Eu|^2
            fresh[name] = max(0.0, spread) / (elapsed[name] * max(1, plan.kept(name)))
            elapsed[name] = 0.0
        discrepancy = {name: (seen | fresh)[name] for name in server.interval if name in seen or name in fresh}
        interval = server.interval
        if (plan.round + 1) % self.phi == 0 and plan.round + 1 > self.warmup:
            long = relaxed(discrepancy, {name: max(1, plan.kept(name)) for name in discrepancy})
            interval = {name: self.phi if name in long else 1 for name in interval}
        return mean, Server(interval, discrepancy, elapsed)

    def observe(self, server: Server) -> Mapping[str, Mapping[str, float]]:
        return {"interval": server.interval}
