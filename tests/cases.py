"""What the laws run on. A new method needs two lines here, in METHODS and NEUTRAL, and every law runs on it.

Models and data are as small as they can be and still hold every kind of tensor: the laws are about bits, not learning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lamina import (
    Chain,
    ClientData,
    ErrorFeedback,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    Federation,
    FedLAMA,
    FedProx,
    FedYogi,
    LocalOnly,
    LocalSGD,
    Message,
    Method,
    Params,
    Plan,
    RoundRecord,
    Scaffold,
    State,
    wire,
)
from lamina.models import mlp
from lamina.tree import flatten, top_fraction

Factory = Callable[[], Method[Any, Any]]

METHODS: dict[str, Factory] = {
    "fedavg": FedAvg,
    "fedprox": lambda: FedProx(mu=0.1),
    "scaffold": Scaffold,
    "fedavgm": FedAvgM,
    "fedadagrad": FedAdagrad,
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
    "errorfeedback": ErrorFeedback,
    "fedlama": lambda: FedLAMA(phi=3),
    "localonly": LocalOnly,
}

NEUTRAL: dict[str, Factory] = {
    "fedavg": FedAvg,
    "fedprox": lambda: FedProx(mu=0.0),
    "fedavgm": lambda: FedAvgM(lr=1.0, momentum=0.0),
    "errorfeedback": ErrorFeedback,
    "fedlama": lambda: FedLAMA(phi=1),
    "fedprox, fedlama": lambda: Chain(FedProx(mu=0.0), FedLAMA(phi=1)),
    "errorfeedback, fedlama, fedavgm": lambda: Chain(ErrorFeedback(), FedLAMA(phi=1), FedAvgM(lr=1.0, momentum=0.0)),
}

CHAINS: dict[str, Factory] = {
    "fedprox, fedlama": lambda: Chain(FedProx(mu=0.1), FedLAMA(phi=3)),
    "fedlama, fedadam": lambda: Chain(FedLAMA(phi=2), FedAdam()),
    "fedlama, scaffold": lambda: Chain(FedLAMA(phi=3), Scaffold()),
    "errorfeedback, fedavgm": lambda: Chain(ErrorFeedback(), FedAvgM()),
    "fedprox, errorfeedback, fedlama, fedyogi": lambda: Chain(
        FedProx(mu=0.1), ErrorFeedback(), FedLAMA(phi=2, warmup=1), FedYogi()
    ),
}


class Kept(NamedTuple):
    mask: Params


class HalfKept(Method[Kept, tuple[()]]):
    """Stands in for the sparse methods to come: a probe of all clients, a mask from their mean saliency, half of every
    weight tensor kept, values of the kept entries alone on the wire. And a number and a tree for the clients."""

    neutral = False

    def init(self, params: Params) -> Kept:
        return Kept({})

    def probe(self, params: Params, grads: Params) -> Message:
        return {"saliency": {name: (g * params[name]).abs() for name, g in grads.items() if g.dim() > 1}}

    def setup(self, server: Kept, params: Params, mean: Message) -> tuple[Params, Kept]:
        mask = {name: top_fraction(s, s.numel() // 2) for name, s in mean["saliency"].items()}
        return {name: x * mask[name] if name in mask else x for name, x in params.items()}, Kept(mask)

    def plan(self, server: Kept, plan: Plan) -> Plan:
        plan = plan.set(boost=1 + 1 / (1 + plan.round)).share(halves={"x": torch.tensor([0.5, float(plan.round // 2)])})
        return replace(plan, mask=server.mask)

    def correct(self, client: tuple[()], plan: Plan, step: Tensor, params: Params, grads: Params) -> Params:
        assert plan.mask is not None
        scale = plan.config["boost"] * plan.shared["halves"]["x"][0]
        return {name: g * scale * plan.mask[name] if name in plan.mask else g for name, g in grads.items()}


TOYS: dict[str, Factory] = {  # of hooks and parts of the plan that no method in the box uses yet
    "halfkept": HalfKept,
    "halfkept, errorfeedback, fedlama, fedavgm": lambda: Chain(HalfKept(), ErrorFeedback(), FedLAMA(phi=2), FedAvgM()),
}

ALL: dict[str, Factory] = {**METHODS, **CHAINS, **TOYS}

CODECS: dict[str, wire.Codec] = {  # uplinks
    "fp32": wire.Dense(),
    "lossless": wire.Dense("lossless"),
    "fp16": wire.Dense("fp16"),
    "bf16": wire.Dense("bf16"),
    "int8": wire.Dense("int8"),
    "sign": wire.Dense("sign"),
    "topk": wire.TopK(0.1),
    "topk, global, int8": wire.TopK(0.1, scope="global", values="int8"),
    "topk, released, sign": wire.TopK(0.2, keep="released", values="sign"),
    "topk, everything": wire.TopK(1.0),
    "randomk": wire.RandomK(0.3),
    "randomk, fp16": wire.RandomK(0.3, values="fp16"),
}

OPTIONS: dict[str, dict[str, Any]] = {  # of Federation: what a method needs, or needs to have something to do
    "localonly": {"buffers": "keep"},
    **{name: {"uplink": wire.TopK(0.2)} for name in ALL if "errorfeedback" in name},
}

# ---- models


class Odd(nn.Module):
    """One of each: convolution, BatchNorm (float and integer buffers), a frozen layer, a weight tied to two places,
    dropout, an integer buffer that counts examples, and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.frozen = nn.Linear(16, 6)
        self.frozen.requires_grad_(False)
        self.first = nn.Linear(6, 6, bias=False)
        self.second = nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(6, 4)
        self.seen: Tensor
        self.register_buffer("seen", torch.tensor(0))
        self.last: Tensor
        self.register_buffer("last", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += len(x)
        x = torch.relu(self.norm(self.conv(x)))
        x = self.frozen(nn.functional.max_pool2d(x, 2).flatten(1)) + self.last  # its value must not outlive a client
        self.last.copy_(x.detach().abs().mean())
        return self.head(self.dropout(self.second(torch.relu(self.first(x)))))


def odd() -> nn.Module:
    return Odd()


def double() -> nn.Module:
    """A float64 model."""
    return mlp((64, 5, 4)).double()


def dropout() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 4))


def small() -> nn.Module:
    """Three weight matrices and their biases: enough for FedLAMA to choose among."""
    return mlp((64, 7, 5, 4))


MODELS: dict[str, Callable[[], nn.Module]] = {"odd": odd, "double": double, "dropout": dropout, "small": small}

# ---- data

SIZES = {"ann": 26, "bob": 12, "cyd": 19, "dan": 8, "eve": 31}  # with batches of 8: 4, 2, 3, 1 and 4 steps


@cache
def data(dtype: torch.dtype = torch.float32) -> ClientData:
    """Five clients of unequal sizes; 8x8 images of four classes, each a bright quarter under noise."""
    source = torch.Generator().manual_seed(5)

    def draw(n: int) -> tuple[Tensor, Tensor]:
        y = torch.randint(4, (n,), generator=source)
        x = torch.randn(n, 1, 8, 8, generator=source, dtype=torch.float64)
        for image, label in zip(x, y.tolist(), strict=True):
            row, column = 4 * (label // 2), 4 * (label % 2)
            image[0, row : row + 4, column : column + 4] += 1.5
        return x.to(dtype), y

    clients = {name: draw(n) for name, n in SIZES.items()}
    return ClientData.from_clients(clients, test=draw(40), client_tests={"ann": draw(10), "eve": draw(6)})


# ---- federations

ROUNDS = 5  # beyond a cycle of three, and not at the end of one


def federation(method: Method[Any, Any] | None = None, model: str = "odd", **options: Any) -> Federation:
    """Three of the five clients a round, in one process. Further arguments are those of Federation."""
    settings: dict[str, Any] = {"cohort": 3, "seed": 7, "engine": "loop", "local": LocalSGD(lr=0.1, batch_size=8)}
    examples = data(torch.float64) if model == "double" else data()
    return Federation(MODELS[model], examples, method=method, **settings | options)


def case(name: str, **options: Any) -> Federation:
    """The federation of a method or chain by name, with the options that it asks for."""
    return federation(ALL[name](), **OPTIONS.get(name, {}) | options)


def states(fed: Federation, rounds: int = ROUNDS, state: State | None = None, **options: Any) -> list[State]:
    return [s for s, _ in fed.run(rounds, state, **options)]


def finish(fed: Federation, rounds: int = ROUNDS, state: State | None = None) -> tuple[State, list[RoundRecord]]:
    """The last state and all records, without the seconds that they took."""
    pairs = list(fed.run(rounds, state))
    return pairs[-1][0], [untimed(record) for _, record in pairs]


def untimed(record: RoundRecord) -> RoundRecord:
    return replace(record, seconds=0.0)


# ---- comparing


def leaves(value: Any) -> Iterator[tuple[str, Any]]:
    """Everything in a state, tensors as (dtype, shape, bytes)."""
    for path, x in flatten(value).items():
        if isinstance(x, Tensor):
            flat = x.detach().contiguous().reshape(-1)
            yield path, (x.dtype, tuple(x.shape), flat.view(torch.uint8).numpy().tobytes() if x.numel() else b"")
        else:
            yield path, x


def bits(value: Any) -> dict[str, Any]:
    """A tree or state as plain values: equal if and only if every bit is."""
    return dict(leaves(value))


def everything(state: State) -> dict[str, Any]:
    """All that a State holds, to the bit: what two runs must agree in."""
    clients = {c: state.clients.get(c) for c in state.clients}
    return {
        "sha256": state.sha256(),
        "params": bits(state.params),
        "buffers": bits(state.buffers),
        "server": bits(state.server),
        "rows": {c: bits(stored.row) for c, stored in clients.items()},
        "held": {c: stored.held for c, stored in clients.items()},
        "accepted": {c: stored.accepted for c, stored in clients.items()},
        "bytes": (state.bytes_up, state.bytes_down),
        "round": state.round,
        "observed": (bits(state.observed.reference), state.observed.elapsed),
    }


def learned(state: State) -> dict[str, Any]:
    """What was learned, without what it cost: the model, the server's state and the clients'."""
    whole = everything(state)
    return {key: whole[key] for key in ("sha256", "params", "buffers", "server", "rows")}
