"""Bytes per method and codec for one model: the rounds of small federations whose clients are stood in for."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from torch import nn

from lamina import wire
from lamina.data import ClientData
from lamina.errors import ConfigError
from lamina.federation import Federation
from lamina.inspect.forecasts import count, decides, fixed
from lamina.inspect.stand_in import CLIENTS, Sample, StandIn, sampled
from lamina.layers import layer_table, matrices
from lamina.method import FedAvg, Method, Plan
from lamina.methods import SSFL, FedLAMA, FedLUAR, Scaffold
from lamina.preflight import ready
from lamina.training import LocalSGD, Loss, Trainer

CODECS = ("fp32", "lossless", "fp16", "int8", "topk:0.01")
_ROUNDS = 6  # that are gone through; later ones are taken to be like the last of these
_COHORT = 4
_DECAY = 0.25
LARGE = 5_000_000  # parameters above which the table is made only when asked for


class Cell(NamedTuple):
    """Bytes of one client in one round, on average over a run."""

    method: str
    codec: str  # of the uplink
    downlink: str
    up: float
    down: float
    exact: bool  # nothing in it depends on values, but for rounding the mean


class Budget(NamedTuple):
    cells: tuple[Cell, ...]
    left_out: dict[str, str]  # method -> why
    seconds_per_step: float
    rounds: int
    cohort: int
    chosen: bool = True  # those two are an experiment's; else they stand for one


def methods_for(model: nn.Module) -> dict[str, Method[Any, Any]]:
    """One of each kind: all, layers that wait, layers that are recycled, a mask, control variates."""
    half = max(1, len(matrices(layer_table(model))) // 2)
    return {
        "fedavg": FedAvg(),
        "fedlama phi=4": FedLAMA(phi=4),
        f"fedluar recycle={half}": FedLUAR(recycle=half),
        "ssfl density=0.5": SSFL(density=0.5),
        "scaffold": Scaffold(),
    }


def budget(
    model: nn.Module,
    data: ClientData,
    *,
    local: LocalSGD,
    loss: Literal["cross_entropy"] | Loss = "cross_entropy",
    buffers: Literal["average", "keep", "skip"] = "average",
    seed: int = 0,
    rounds: int | None = None,
    cohort: int | None = None,
    methods: Mapping[str, Method[Any, Any]] | None = None,
    codecs: Sequence[str] = CODECS,
) -> Budget:
    """The table. Two clients are really trained, once.

    Args:
        rounds, cohort: of the run that it is for; None: 200, and ten clients if there are so many.

    Raises:
        ConfigError: E121 for a model that fails on a batch of the data.
    """

    chosen = rounds is not None and cohort is not None
    rounds, cohort = rounds or 200, min(cohort or 10, len(data))

    def federation(method: Method[Any, Any], codec: str) -> Federation:
        return Federation(
            model,
            data,
            method=method,
            uplink=wire.parse(codec),
            downlink=wire.Dense("lossless" if codec == "lossless" else "fp32"),
            local=local,
            cohort=min(_COHORT, len(data)),
            loss=loss,
            buffers=buffers,
            seed=seed,
            engine="loop",
        )

    plain = federation(FedAvg(), "fp32")
    trainer = ready(plain.model, plain.loss, data, local, seed)
    samples = sampled(trainer, plain.setup, _first(plain), 1)
    cells: list[Cell] = []
    left_out: dict[str, str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, method in (methods_for(model) if methods is None else methods).items():
            try:
                cells += [_cell(federation(method, codec), name, codec, trainer, samples, rounds) for codec in codecs]
            except ConfigError as error:
                left_out[name] = error.message
    return Budget(tuple(cells), left_out, samples[-1].seconds, rounds, cohort, chosen)


def _first(fed: Federation) -> Plan:
    params, buffers = fed.initial
    return Plan(round=0, seed=0, params=params, buffers=buffers, upload=frozenset(params), lr=fed.local.lr)


def _cell(fed: Federation, name: str, codec: str, trainer: Trainer, samples: Sequence[Sample], rounds: int) -> Cell:
    stand_in = StandIn(trainer, fed.setup, samples, 1, _DECAY, 0)
    totals = count(fed, rounds, stand_in, most=max(_ROUNDS, 2 * fed.method.hold), each=CLIENTS)
    messages = rounds * fed.cohort
    exact = not decides(fed.method) and fixed(fed.uplink, samples[0])
    down = "lossless" if codec == "lossless" else "fp32"
    return Cell(name, codec, down, totals.up / messages, totals.down / messages, exact)
