"""What the laws run on. A new method needs two lines here, in METHODS and NEUTRAL, and every law runs on it.

Models and data are as small as they can be and still hold every kind of tensor: the laws are about bits, not learning.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lamina import (
    DGC,
    EF21,
    FLARE,
    LIPS,
    SSFL,
    STC,
    Chain,
    ClientData,
    ErrorFeedback,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedDST,
    FedDyn,
    Federation,
    FedLAMA,
    FedLUAR,
    FedNova,
    FedProx,
    FedYogi,
    LocalOnly,
    LocalSGD,
    MagnitudePruning,
    Method,
    Params,
    Personal,
    Plan,
    RandomMask,
    RoundRecord,
    Scaffold,
    State,
    wire,
)
from lamina.models import mlp
from lamina.tree import flatten, scale

Factory = Callable[[], Method[Any, Any]]

METHODS: dict[str, Factory] = {
    "fedavg": FedAvg,
    "fedprox": lambda: FedProx(mu=0.1),
    "scaffold": Scaffold,
    "stc": STC,
    "fedavgm": FedAvgM,
    "fedadagrad": FedAdagrad,
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
    "errorfeedback": ErrorFeedback,
    "ef21": EF21,
    "dgc": DGC,
    "flare": lambda: FLARE(steps=2),
    "fedlama": lambda: FedLAMA(phi=3),
    "fedluar": FedLUAR,
    "fednova": FedNova,
    "feddyn": lambda: FedDyn(alpha=0.1),
    "lips": lambda: LIPS(density=0.3, every=2, rounds=5),
    "personal": Personal,
    "ssfl": SSFL,
    "randommask": lambda: RandomMask(density=0.4),
    "feddst": lambda: FedDST(density=0.4, every=2, ratio=0.5, until=10),
    "magnitudepruning": lambda: MagnitudePruning(density=0.3, end=4, every=2),
    "localonly": LocalOnly,
}

NEUTRAL: dict[str, Factory] = {
    "fedavg": FedAvg,
    "fedprox": lambda: FedProx(mu=0.0),
    "fedavgm": lambda: FedAvgM(lr=1.0, momentum=0.0),
    "errorfeedback": ErrorFeedback,
    "dgc": DGC,  # with any momentum
    "flare": FLARE,  # with any pull
    "stc": STC,
    "fedlama": lambda: FedLAMA(phi=1),
    "fedluar": lambda: FedLUAR(recycle=0),
    "lips": lambda: LIPS(density=1.0),
    "ssfl": lambda: SSFL(density=1.0, score="random"),  # by saliency it is FedAvg too, but for the probe
    "randommask": lambda: RandomMask(density=1.0),
    "feddst": lambda: FedDST(density=1.0, every=1),
    "magnitudepruning": lambda: MagnitudePruning(density=1.0, end=2, every=1),
    "fedprox, fedlama": lambda: Chain(FedProx(mu=0.0), FedLAMA(phi=1)),
    "lips, fedlama": lambda: Chain(LIPS(density=1.0), FedLAMA(phi=1)),
    "errorfeedback, fedlama, fedavgm": lambda: Chain(ErrorFeedback(), FedLAMA(phi=1), FedAvgM(lr=1.0, momentum=0.0)),
}

CHAINS: dict[str, Factory] = {
    "ef21, fedadam": lambda: Chain(EF21(), FedAdam()),
    "dgc, fedlama": lambda: Chain(DGC(), FedLAMA(phi=2)),
    "flare, fedlama": lambda: Chain(FLARE(), FedLAMA(phi=2)),
    "fedprox, fedlama": lambda: Chain(FedProx(mu=0.1), FedLAMA(phi=3)),
    "fedluar, fedadam": lambda: Chain(FedLUAR(), FedAdam()),
    "errorfeedback, fedluar": lambda: Chain(ErrorFeedback(), FedLUAR()),
    "fednova, fedluar, fedavgm": lambda: Chain(FedNova(), FedLUAR(), FedAvgM()),
    "fedlama, fedadam": lambda: Chain(FedLAMA(phi=2), FedAdam()),
    "fedlama, stc": lambda: Chain(FedLAMA(phi=2), STC()),
    "fedavgm, stc": lambda: Chain(FedAvgM(), STC()),
    "fedlama, scaffold": lambda: Chain(FedLAMA(phi=3), Scaffold()),
    "fedlama, feddyn": lambda: Chain(FedLAMA(phi=2), FedDyn(alpha=0.1)),
    "lips, fedlama": lambda: Chain(LIPS(density=0.3, every=2, rounds=5), FedLAMA(phi=2)),
    "lips, errorfeedback": lambda: Chain(LIPS(density=0.3, every=2, rounds=5, norm_sync="local"), ErrorFeedback()),
    "personal, fedlama": lambda: Chain(Personal(("norm", "head")), FedLAMA(phi=2)),
    "ssfl, fedlama": lambda: Chain(SSFL(), FedLAMA(phi=2)),
    "ssfl, fedlama, fedadam": lambda: Chain(SSFL(), FedLAMA(phi=2), FedAdam()),
    "ssfl, errorfeedback": lambda: Chain(SSFL(), ErrorFeedback()),
    "ssfl, errorfeedback, fedlama, fedavgm": lambda: Chain(SSFL(), ErrorFeedback(), FedLAMA(phi=2), FedAvgM()),
    "ssfl, flare": lambda: Chain(SSFL(), FLARE(steps=2)),
    "scaffold, ssfl": lambda: Chain(Scaffold(), SSFL(score="random_layerwise")),
    "randommask, fedluar": lambda: Chain(RandomMask(density=0.4), FedLUAR()),
    "fedprox, feddst": lambda: Chain(FedProx(mu=0.1), FedDST(density=0.4, every=2, ratio=0.5, layout="uniform")),
    "fedadam, magnitudepruning": lambda: Chain(
        FedAdam(), MagnitudePruning(density=0.3, start=1, end=3, every=1, scope="global")
    ),
    "errorfeedback, fedavgm": lambda: Chain(ErrorFeedback(), FedAvgM()),
    "fedprox, errorfeedback, fedlama, fedyogi": lambda: Chain(
        FedProx(mu=0.1), ErrorFeedback(), FedLAMA(phi=2, warmup=1), FedYogi()
    ),
}


class Boosted(Method[tuple[()], tuple[()]]):
    """Tells the clients a number and a tree, by which they scale their gradients."""

    neutral = False

    def plan(self, server: tuple[()], plan: Plan) -> Plan:
        return plan.set(boost=1 + 1 / (1 + plan.round)).share(halves={"x": torch.tensor([0.5, float(plan.round // 2)])})

    def correct(self, client: tuple[()], plan: Plan, step: Tensor, params: Params, grads: Params) -> Params:
        return scale(grads, plan.config["boost"] * float(plan.shared["halves"]["x"][0]))


TOYS: dict[str, Factory] = {  # of hooks and parts of the plan that no method in the box uses yet
    "boosted": Boosted,
    "ssfl, boosted, fedavgm": lambda: Chain(SSFL(), Boosted(), FedAvgM()),
}

ALL: dict[str, Factory] = {**METHODS, **CHAINS, **TOYS}

CODECS: dict[str, wire.Codec] = {  # uplinks
    "fp32": wire.Dense(),
    "lossless": wire.Dense("lossless"),
    "fp16": wire.Dense("fp16"),
    "bf16": wire.Dense("bf16"),
    "int8": wire.Dense("int8"),
    "int4": wire.Dense("int4"),
    "sign": wire.Dense("sign"),
    "topk": wire.TopK(0.1),
    "topk, global, int8": wire.TopK(0.1, scope="global", values="int8"),
    "topk, released, sign": wire.TopK(0.2, keep="released", values="sign"),
    "topk, everything": wire.TopK(1.0),
    "randomk": wire.RandomK(0.3),
    "randomk, fp16": wire.RandomK(0.3, values="fp16"),
}

LOSSY = {"errorfeedback", "ef21", "dgc", "flare"}  # they have something to do where something is lost

OPTIONS: dict[str, dict[str, Any]] = {  # of Federation: what a method needs, or needs to have something to do
    "localonly": {"buffers": "keep"},
    "ssfl, fedlama, fedadam": {"uplink": wire.Dense("int8")},
    "personal": {"buffers": "keep"},
    **{name: {"uplink": wire.TopK(0.2)} for name in ALL if {*name.split(", ")} & LOSSY},
    **{
        name: {"uplink": wire.TopK(0.2, values="sign"), "downlink": wire.TopK(0.3, values="sign")}
        for name in ALL
        if "stc" in name
    },
}

LOSSLESS = wire.Dense("lossless")  # as a downlink: distances to what a client holds


def the_rest_slowly(names: Iterable[Any], quick: Container[Any]) -> list[Any]:
    """These as parameters of a test, marked slow but for some."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


SENT_LOSSLESS = ("fedavg", "fedlama, scaffold", "ssfl, fedlama", "feddst", "personal")  # where laws try it

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
    return mlp((64, 6, 5, 4)).double()


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


def federation(
    method: Method[Any, Any] | None = None, model: str = "odd", examples: ClientData | None = None, **options: Any
) -> Federation:
    """Three of the five clients a round, in one process. Further arguments are those of Federation."""
    settings: dict[str, Any] = {"cohort": 3, "seed": 7, "engine": "loop", "local": LocalSGD(lr=0.1, batch_size=8)}
    if examples is None:
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
        "change": None if state.change is None else (state.change.base, bits(state.change.step)),
        "past": [(version.tags, bits(version.params)) for version in state.past],
        "observed": (bits(state.observed.reference), state.observed.elapsed, bits(state.observed.mask)),
        "norms": {name: list(lengths) for name, lengths in state.norms.items()},
        "resting": dict(state.resting),
        "spent": state.spent,
    }


def learned(state: State) -> dict[str, Any]:
    """What was learned, without what it cost: the model, the server's state and the clients'."""
    whole = everything(state)
    return {key: whole[key] for key in ("sha256", "params", "buffers", "server", "rows")}
