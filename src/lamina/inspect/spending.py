"""A budget of bytes up per client and round, and the one setting that keeps an experiment within it.

budget  ->  the setting that decides what a round costs  ->  forecasts  ->  its most expensive value that fits
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from lamina.config import Config, build
from lamina.data import ClientData
from lamina.errors import ConfigError
from lamina.federation import Federation
from lamina.inspect.forecasts import forecast
from lamina.units import SIZES, quantity

_CLOSE = 0.02  # a density is found once it needs this much less than the budget, or nothing
_TRIES = 14
_LEAST = 1e-5  # density
_INTERVALS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


class Knob(NamedTuple):
    """A setting by which a round costs more or less."""

    section: str  # "method" | "uplink"
    member: int  # of the chain of methods
    name: str
    values: tuple[float, ...]  # to try in their order, cheapest last; () for a density


class Fitted(NamedTuple):
    """What was found."""

    config: Config  # without a budget, with the setting
    said: str


def within(config: Config, progress: Callable[[str, str, int, int], None] | None = None) -> Fitted:
    """The same experiment with the one setting that keeps it within `config.budget` bytes up per client and round, by
    forecast: the density of the uplink, else that of the method, else FedLAMA's phi or FedLUAR's recycle.

    Raises:
        ConfigError: E107 where nothing can be set, or where even its cheapest value needs more.
    """
    budget = quantity(config.budget, SIZES, "budget") if config.budget is not None else math.inf
    said = f"budget={config.budget if isinstance(config.budget, str) else format(budget, 'g')}"
    fed = build(config.model_copy(update={"budget": None}), progress)
    knob = _knob(config, fed)
    if knob is None:
        raise ConfigError(
            f"{said}: nothing here has a density or an interval that sets what every round costs",
            code="E107",
            where="budget",
            remedy="uplink=topk with method=errorfeedback, or method=ssfl, fedlama or fedluar",
        )

    def cost(value: float) -> float:
        try:
            return _bytes_up(_with(config, knob, value), fed.data)
        except ConfigError:
            if knob.values:
                raise
            return 0.0  # so low a density that nothing would be left: refused

    value, needed = _density(cost, budget) if not knob.values else _step(cost, knob.values, budget)
    key = _key(config, knob)
    if needed > budget:
        raise ConfigError(
            f"{said}: even {key}={value:g} needs {needed:,.0f} bytes per client and round",
            code="E107",
            where=config.origin("budget"),
            remedy="a larger budget, or a cheaper uplink such as topk",
        )
    made = _with(config, knob, value)
    path = tuple(key.split("."))
    made._origins = {**config._origins, path: said}
    return Fitted(made, f"{key}={value:g} · about {needed:,.0f} of {budget:,.0f} bytes up per client and round")


def _knob(config: Config, fed: Federation) -> Knob | None:
    if "density" in config.uplink.arguments or config.uplink.name in ("topk", "randomk"):
        return Knob("uplink", 0, "density", ())
    for i, part in enumerate(config.method):
        if part.name in ("ssfl", "randommask", "feddst", "magnitudepruning"):
            return Knob("method", i, "density", ())
    for i, part in enumerate(config.method):
        if part.name == "fedlama":
            return Knob("method", i, "phi", tuple(p for p in _INTERVALS if 2 * p <= config.rounds) or (1,))
        if part.name == "fedluar":
            return Knob("method", i, "recycle", tuple(range(len(fed.layers))))
    return None


def _key(config: Config, knob: Knob) -> str:
    if knob.section == "uplink":
        return f"uplink.{knob.name}"
    return ".".join((*config.method_paths[knob.member], knob.name))


def _with(config: Config, knob: Knob, value: float) -> Config:
    """The config with this value, and without a budget."""
    whole: Any = int(value) if knob.values else value
    if knob.section == "uplink":
        parts: dict[str, Any] = {"uplink": config.uplink.model_copy(update={knob.name: whole})}
    else:
        changed = config.method[knob.member].model_copy(update={knob.name: whole})
        parts = {"method": (*config.method[: knob.member], changed, *config.method[knob.member + 1 :])}
    return config.model_copy(update={**parts, "budget": None})


def _bytes_up(config: Config, data: ClientData) -> float:
    fed = build(config, data=data)
    return forecast(fed, config.rounds).up.high / config.rounds / fed.cohort


def _density(cost: Callable[[float], float], budget: float) -> tuple[float, float]:
    """The largest density within the budget, to two per cent of the bytes; with what it needs."""
    if (whole := cost(1.0)) <= budget:
        return 1.0, whole
    low, high, needed = _LEAST, 1.0, cost(_LEAST)
    if needed > budget:
        return low, needed
    least = whole
    for _ in range(_TRIES):
        if needed > (1 - _CLOSE) * budget:
            break
        middle = math.sqrt(low * high)
        if (found := cost(middle)) <= budget:
            low, needed = middle, found
        else:
            high, least = middle, found
    return (low, needed) if needed else (high, least)


def _step(cost: Callable[[float], float], values: tuple[float, ...], budget: float) -> tuple[float, float]:
    """The first value that fits; the cheapest if none does."""
    found = []
    for value in values:
        found.append((cost(value), value))
        if found[-1][0] <= budget:
            break
    needed, value = found[-1] if found[-1][0] <= budget else min(found)
    return value, needed
