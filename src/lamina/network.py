"""A virtual network: how long a round takes over given links. It follows from the ledger; no clock is read.

of a client    2 latency + 8 bytes_down / down + steps * step + 8 bytes_up / up
of a round     its slowest client's
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from lamina.errors import expect
from lamina.per_client import rows
from lamina.random import generator
from lamina.units import RATES, TIMES, quantity


class Link(NamedTuple):
    """Of one client."""

    up: float  # bits per second
    down: float
    latency: float  # seconds, one way
    step: float  # seconds of one local step


class Exchange(NamedTuple):
    """What one client sent and was sent."""

    client: int
    bytes_up: int
    bytes_down: int
    steps: int


@dataclass(frozen=True)
class Network:
    """The links between the clients and the server.

    Each value is a number with a unit, or a range "1Mbit..20Mbit" from which every client draws its own, once, evenly
    on a logarithmic scale.

    Args:
        up, down: bits per second, > 0: bit, kbit, Mbit, Gbit, or bytes as kB, MB, GB.
        latency: one way: us, ms, s.
        step: time of one local step on a client.
        clients: a CSV file with a column `client` and any of `up`, `down`, `latency`, `step`: these clients' own links.

    Raises:
        ConfigError: a value that is none of these, a file that cannot be read.
    """

    up: float | str = "10Mbit"
    down: float | str = "50Mbit"
    latency: float | str = "20ms"
    step: float | str = "0ms"
    clients: str | None = None

    def __post_init__(self) -> None:
        for name in Link._fields:
            _span(getattr(self, name), name, f"network.{name}")

    def links(self, names: Sequence[str], seed: int) -> Links:
        """Raises ConfigError for a file that names a client that is none of these."""
        own = {} if self.clients is None else _read(Path(self.clients), names)
        return Links(self, names, own, seed)


class Links:
    """Every client's link. A client that is not asked for costs nothing."""

    def __init__(self, network: Network, names: Sequence[str], own: Mapping[str, Mapping[str, str]], seed: int):
        self._network = network
        self._names = names
        self._own = own
        self._seed = seed

    def of(self, client: int) -> Link:
        source = generator(self._seed, "network", 0, client)
        drawn = torch.rand(len(Link._fields), generator=source, dtype=torch.float64).tolist()
        said = self._own.get(self._names[client], {})
        values = []
        for name, at in zip(Link._fields, drawn, strict=True):
            low, high = _span(said.get(name, getattr(self._network, name)), name, f"network.{name}")
            values.append(low if low == high else math.exp(math.log(low) + at * (math.log(high) - math.log(low))))
        return Link(*values)

    def seconds(self, exchanges: Sequence[Exchange]) -> float:
        """Until the last client has answered."""
        return max((_time(self.of(exchange.client), exchange) for exchange in exchanges), default=0.0)


def _time(link: Link, exchange: Exchange) -> float:
    travelled = 8 * exchange.bytes_down / link.down + 8 * exchange.bytes_up / link.up
    return 2 * link.latency + travelled + exchange.steps * link.step


def _span(value: float | str, name: str, where: str) -> tuple[float, float]:
    """The ends of a range; equal for one value."""
    units = RATES if name in ("up", "down") else {"s": 1.0, **TIMES}
    ends = value.split("..") if isinstance(value, str) else [value]
    expect(len(ends) <= 2, f"{value!r}: expected one number, or two with .. between", code="E103", where=where)
    low, high = quantity(ends[0], units, where), quantity(ends[-1], units, where)
    least = "> 0" if name in ("up", "down") or low != high else ">= 0"
    fine = low <= high and (low > 0 or least == ">= 0")
    expect(fine, f"{value!r}: expected numbers {least}, the smaller one first", code="E103", where=where)
    return low, high


def _read(path: Path, names: Sequence[str]) -> dict[str, dict[str, str]]:
    own = {}
    for where, client, row in rows(path, names, "network.clients", Link._fields):
        for key, value in row.items():
            _span(value, key, f"{where}, {key}")
        own[client] = row
    return own
