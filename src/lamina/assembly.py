"""What a federation is put together from, each part checked against the others before anything is made of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from lamina import wire
from lamina.data.client_data import ClientData
from lamina.downlink import codes_values
from lamina.errors import ConfigError, expect, is_whole, meant
from lamina.method import Chain, Method
from lamina.norms import Policy
from lamina.robust import Rule


def rule_of(aggregate: str | Rule, cohort: int, data: ClientData) -> Rule | None:
    """None: the mean."""
    if aggregate == "mean":
        return None
    if isinstance(aggregate, type) or not isinstance(aggregate, Rule):
        raise ConfigError(
            f"aggregate={aggregate!r}: expected 'mean' or a rule", where="aggregate", remedy="lamina.robust has some"
        )
    root = getattr(aggregate, "root", None)
    if root is not None:
        remedy = meant(str(root), data.names) or None
        known = root in data.names
        expect(known, f"root={root!r}: no such client", code="E115", where="aggregate.root", remedy=remedy)
    aggregate.expect(cohort)
    return aggregate


def expect_separable(method: Method[Any, Any], uplink: wire.Codec, rule: Rule | None, norm: Policy) -> None:
    """Raises ConfigError E115 where an update by itself does not say what its client wants."""
    parts = method.methods if isinstance(method, Chain) else (method,)
    told = next((part for part in parts if part.encodes and part.compensates), None)
    expect(
        told is None or (rule is None and not norm.cuts),
        f"{told!r} sends what has changed since its last message: what a rule leaves out, or a bound cuts off, is "
        "never made up for",
        code="E115",
        where="faults.norm" if rule is None else "aggregate",
        remedy="faults.norm='reject:20x' leaves out a whole message, which its client then keeps",
    )
    density = getattr(uplink, "density", 1.0)
    expect(
        density > 0.5 or not getattr(rule, "entrywise", False),
        f"{rule!r} under {uplink!r}: most clients leave an entry out, so most values of it are 0, and so is the result",
        code="E115",
        where="aggregate",
        remedy="multikrum or geomedian look at updates as a whole; or a dense uplink",
    )


def model_of(model: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """A model of our own."""
    if isinstance(model, nn.Module):
        return copy.deepcopy(model)
    try:
        made = model() if callable(model) else model
    except TypeError as error:
        name = getattr(model, "__name__", "it")
        remedy = f"for example lambda: {name}(...)"
        raise ConfigError(
            f"model: {name} cannot be called without arguments: {error}", where="model", remedy=remedy
        ) from error
    expect(isinstance(made, nn.Module), f"model: expected an nn.Module, got {type(made).__name__}", where="model")
    return made


def expect_a(name: str, value: object, kind: type, example: str) -> None:
    fine = value is None or isinstance(value, kind)
    got = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
    expect(fine, f"{name}: expected a {kind.__name__}, got {got}", where=name, remedy=f"for example {example}")


def cohort_of(cohort: int | str, clients: int) -> int:
    if isinstance(cohort, str) or not is_whole(cohort, 1) or cohort > clients:
        raise ConfigError(
            f"cohort={cohort!r}: expected 'all' or a whole number from 1 to {clients}, the number of clients",
            code="E112",
            where="cohort",
            remedy=f"a cohort is drawn without replacement from the {clients} clients",
        )
    return cohort


def downlink_of(codec: wire.Codec, method: Method[Any, Any] | None) -> wire.Codec:
    coder = not isinstance(codec, type) and hasattr(codec, "transmit")
    if codes_values(codec) or (coder and method is not None and method.has("absorb")):
        return codec
    raise ConfigError(
        f"downlink={codec!r}: expected Dense with values in fp32, lossless, fp16, bf16, int8",
        code="E113",
        where="downlink",
        remedy="the downlink codes parameters, not updates: sparse or one-bit values would replace the model itself. "
        "lamina.STC sends the server's step instead, and keeps what such a codec loses",
    )
