"""SCAFFOLD: control variates that cancel the drift of local training.

Karimireddy et al., *SCAFFOLD: Stochastic Controlled Averaging for Federated Learning*, ICML 2020 (arXiv 1910.06378),
Algorithm 1 with option II.

    client, each step:   g   <- g - c_i + c                          # line 10
    client, at the end:  c_i+ = c_i - c + (x - y_i) / (K * lr)       # line 12, option II
    server:              c   <- c + |S|/N * mean_S(c_i+ - c_i)       # line 17, mean uniform over accepted messages

Option II equals the mean local gradient only under plain SGD, so momentum, weight decay and clipping are refused
unless ``approximate=True``.
With others: a layer that waits (FedLAMA) keeps its control until it is due, and its K * lr then counts every local
step since the layer was last aggregated, for which option II is exact, since neither c nor c_i moved meanwhile.
Cost: one model more in each direction; one model of state per client and one at the server.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from lamina.errors import ConfigError
from lamina.method import Method, Plan, Task, Work
from lamina.tree import Message, Params, add, scale, sub, tmap, zeros_like


class Server(NamedTuple):
    control: Params


class Client(NamedTuple):
    control: Params
    travelled: Params  # name -> 0-d: sum of K * lr over the rounds in which the layer waited
    cycle: Tensor  # 0-d, round // hold in which it did; waiting ends with the cycle


@dataclass(frozen=True)
class Scaffold(Method[Server, Client]):
    """Args: approximate: allow momentum, weight decay and clipping, under which option II is not exact."""

    approximate: bool = False

    sends = frozenset({"update", "control"})
    uniform = frozenset({"control"})
    neutral = False  # no setting switches the control off
    controls = True

    def bind(self, task: Task) -> Self:
        used = [k for k in ("momentum", "weight_decay", "clip") if getattr(task, k)]
        if used and not self.approximate:
            raise ConfigError(
                f"Scaffold with local.{used[0]}={getattr(task, used[0])}: option II assumes plain SGD",
                code="E117",
                where=f"local.{used[0]}",
                remedy=f"set local.{used[0]} to 0, or say Scaffold(approximate=True)",
            )
        return super().bind(task)

    def init(self, params: Params) -> Server:
        return Server(zeros_like(params))

    def init_client(self, params: Params) -> Client:
        return Client(zeros_like(params), {}, torch.tensor(-1))

    def plan(self, server: Server, plan: Plan) -> Plan:
        return plan.share(control=server.control)

    def correct(self, client: Client, plan: Plan, step: Tensor, params: Params, grads: Params) -> Params:
        return tmap(lambda g, c_i, c: g - c_i + c, grads, client.control, plan.shared["control"])  # Alg. 1, line 10

    def report(self, client: Client, plan: Plan, work: Work, message: Message) -> tuple[Message, Client]:
        c = plan.shared["control"]
        travelled = work.steps.double() * plan.lr  # K * lr
        cycle = plan.round // self.task.hold
        before = client.travelled if int(client.cycle) == cycle else {}
        since = {name: before.get(name, torch.zeros_like(travelled)) + travelled for name in work.params}
        fresh = {
            name: client.control[name] - c[name] + ((x - work.params[name]) / since[name]).to(x.dtype)  # line 12
            for name, x in plan.params.items()
            if name in plan.upload
        }
        waiting = {name: t for name, t in since.items() if name not in plan.upload}
        control = client.control | fresh
        return message | {"control": sub(fresh, client.control)}, Client(control, waiting, torch.tensor(cycle))

    def step(self, server: Server, plan: Plan, mean: Message) -> tuple[Message, Server]:
        change = scale(mean["control"], plan.participation)  # line 17
        return mean, Server(server.control | add(change, server.control))
