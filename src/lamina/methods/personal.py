"""Personal layers: some of the model never leaves the client, the rest is shared as ever.

"norm" is FedBN (Li et al., ICLR 2021, arXiv 2102.07623); "head" is FedPer (Arivazhagan et al. 2019, arXiv 1912.00818)
with the last Linear as its personal layer.

    client, at the start:   personal layers <- its own, from its last participation; the rest <- global
    client, at the end:     keeps the personal layers; sends the update of the rest
    server:                 the mean of what came; its personal layers keep their initial values

What the model is worth stands in `personal_accuracy`: every client's own model on its own test set. The global
model's personal layers were never trained. FedBN's BatchNorm statistics are personal too: ``buffers="keep"``.

With others: layers that FedLAMA schedules are those that come; a method that pulls towards the global weights
(FedProx, FedDyn) pulls personal layers towards their initial values.
Cost: the personal layers' bytes are saved in both directions, but for their initial values to a newcomer; each client
keeps its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple, Self

from lamina.errors import ConfigError, expect, meant
from lamina.layers import Layer
from lamina.method import Method, Plan, Task, Work
from lamina.tree import Message, Params, select


class Client(NamedTuple):
    own: Params  # {} before its first participation


@dataclass(frozen=True)
class Personal(Method[tuple[()], Client]):
    """Args:
    layers: one or several of "norm" (every norm parameter), "head" (weight and bias of the last Linear), or a
        pattern over parameter names such as "layer4.*".
    """

    layers: str | tuple[str, ...] = "norm"

    withholds = "personal"
    neutral = False  # personal layers are never empty

    def __post_init__(self) -> None:
        if isinstance(self.layers, list):  # as a TOML file has it; a list is no part of a frozen value
            object.__setattr__(self, "layers", tuple(self.layers))
        patterns = self._patterns() if isinstance(self.layers, (str, tuple)) else ()
        fine = bool(patterns) and all(isinstance(p, str) and p for p in patterns)
        expect(fine, f"layers={self.layers!r}: expected 'norm', 'head', a pattern such as 'layer4.*', or several")

    def bind(self, task: Task) -> Self:
        bound = super().bind(task)
        expect(
            len(bound._names()) < len(task.layers),
            f"layers={self.layers!r} matches every parameter of the model: nothing would be shared",
            code="E117",
            where="method.layers",
            remedy="to train alone, use LocalOnly()",
        )
        return bound

    def init_client(self, params: Params) -> Client:
        return Client({})

    def plan(self, server: tuple[()], plan: Plan) -> Plan:
        return plan.keep(plan.upload - self._names())

    def begin(self, client: Client, plan: Plan, params: Params) -> Params:
        return params | client.own

    def report(self, client: Client, plan: Plan, work: Work, message: Message) -> tuple[Message, Client]:
        return message, Client(select(work.params, self._names()))

    def _patterns(self) -> tuple[str, ...]:
        return (self.layers,) if isinstance(self.layers, str) else self.layers

    def _names(self) -> set[str]:
        """Parameters that stay with the client."""
        return {name for pattern in self._patterns() for name in matched(pattern, self.task.layers)}


def matched(pattern: str, layers: Sequence[Layer]) -> list[str]:
    """Parameters that "norm", "head" or a pattern over names stands for. Raises ConfigError (E117) when none."""
    names = [layer.name for layer in layers]
    remedy = _near(pattern, names)
    if pattern == "norm":
        found = [layer.name for layer in layers if layer.kind == "norm"]
        remedy = "the model has no norm parameters: name its personal layers by a pattern"
    elif pattern == "head":
        found = _head(layers)
        remedy = "the model has no Linear with a weight of its own that is trained: name its head by a pattern"
    else:
        found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        raise ConfigError(
            f"layers: {pattern!r} matches no parameter of the model", code="E117", where="method.layers", remedy=remedy
        )
    return found


def _head(layers: Sequence[Layer]) -> list[str]:
    """Weight and bias of the last Linear; [] where its weight is frozen, or tied and so listed elsewhere."""
    linear = [layer for layer in layers if layer.kind == "linear"]
    owner = linear[-1].name.rpartition(".")[0] if linear else ""
    head = [layer for layer in linear if layer.name.rpartition(".")[0] == owner]
    return [layer.name for layer in head] if any(layer.role == "weight" for layer in head) else []


def _near(pattern: str, names: Sequence[str]) -> str:
    """What may have been meant by a pattern that matches nothing."""
    if any(name.startswith(f"{pattern}.") for name in names):
        return f"did you mean '{pattern}.*'?"
    modules = dict.fromkeys(f"{name.rpartition('.')[0]}.*" for name in names if "." in name)
    some = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return meant(pattern, (*names, *modules)) or f"its parameters: {some}"
