"""Clients that lie, to see what an experiment makes of them: `attacked(fed, "sign_flip", 0.2, seed)`.

Most attacks turn what the server has decoded of the attackers' messages, update and a method's own trees alike;
buffers, losses and bytes stay as they were, and `moments` fit the lie. Two attacks change the attackers' examples
instead, and leave them to train. All attackers are of one mind, and lie in every round; in a probe before round 0 they
do not.

    nan        every value is NaN
    scale      the update times 100
    sign_flip  the update times -10
    gaussian   numbers from N(0, 3^2) instead of it
    one_layer  the last layer's weights times -30, the rest as it is
    alie       mean - 1 standard deviation of the honest messages, entry by entry (Baruch et al. 2019)
    ipm        -0.5 times the mean of the honest messages (Xie et al. 2020)
    label_flip label y of their examples is classes - 1 - y
    backdoor   half of their examples have a mark, and label 0; `fooled` says how often the model then sees a 0

In `alie` and `ipm` the attackers know all honest messages of the round, which real ones would have to guess.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from lamina.admission import own
from lamina.client import RESERVED, Reply, non_finite
from lamina.data.client_data import ClientData
from lamina.engine.base import Engine, Kind, Pack
from lamina.errors import ConfigError, expect, is_number, meant
from lamina.federation import Federation
from lamina.method import Plan
from lamina.random import generator
from lamina.state import State
from lamina.store import Row
from lamina.tree import Message, Params, scale, squared_norms, tmap

TARGET = 0  # the label that a backdoor asks for

Turn = Callable[[Params, Sequence[Params], torch.Generator], Params]  # own tree, those of the honest -> what is sent


def _nan(own: Params, honest: Sequence[Params], source: torch.Generator) -> Params:
    return tmap(lambda x: torch.full_like(x, torch.nan), own)


def _scale(own: Params, honest: Sequence[Params], source: torch.Generator) -> Params:
    return scale(own, 100.0)


def _sign_flip(own: Params, honest: Sequence[Params], source: torch.Generator) -> Params:
    return scale(own, -10.0)


def _gaussian(own: Params, honest: Sequence[Params], source: torch.Generator) -> Params:
    return tmap(lambda x: 3.0 * torch.randn(x.shape, generator=source, dtype=x.dtype), own)


def _one_layer(own: Params, honest: Sequence[Params], source: torch.Generator) -> Params:
    weights = [name for name, x in own.items() if x.dim() > 1] or list(own)
    return own | scale({name: own[name] for name in weights[-1:]}, -30.0)


def _alie(own: Params, honest: Sequence[Params], source: torch.Generator) -> Params:
    each = honest or [own]
    return {name: _stacked(each, name).mean(0) - _stacked(each, name).std(0, correction=0) for name in own}


def _ipm(own: Params, honest: Sequence[Params], source: torch.Generator) -> Params:
    return {name: -0.5 * _stacked(honest or [own], name).mean(0) for name in own}


def _stacked(trees: Sequence[Params], name: str) -> Tensor:
    return torch.stack([tree[name] for tree in trees])


TURNS: Mapping[str, Turn] = {
    "nan": _nan, "scale": _scale, "sign_flip": _sign_flip, "gaussian": _gaussian, "one_layer": _one_layer,
    "alie": _alie, "ipm": _ipm,
}  # fmt: skip
_INFORMED = ("alie", "ipm")
ATTACKS = (*TURNS, "label_flip", "backdoor")


def attacked(fed: Federation, name: str, share: float, seed: int = 0) -> Federation:
    """The same federation, some of whose clients attack it.

    Args:
        name: one of `ATTACKS`.
        share: of all clients, 0 < share < 1, rounded, at least one.
        seed: who they are, and their random numbers.

    Raises:
        ConfigError: E103 for another name or share, E118 for an attack that the data does not allow.
    """
    expect_attack(name, share)
    liars = attackers(fed.data, share, seed)
    if name == "label_flip":
        return fed.on(_changed(fed.data, liars, _flipped))
    if name == "backdoor":
        return fed.on(_changed(fed.data, liars, _marked))
    return fed.through(lambda engine: Liars(engine, name, liars, seed))


def attackers(data: ClientData, share: float, seed: int = 0) -> tuple[int, ...]:
    """Positions of the clients that attack, ascending."""
    order = torch.randperm(len(data), generator=generator(seed, "attackers")).tolist()
    return tuple(sorted(order[: max(1, round(share * len(data)))]))


def expect_attack(name: str, share: float) -> None:
    """Raises ConfigError E103."""
    remedy = meant(name, ATTACKS) or None
    expect(
        name in ATTACKS, f"{name!r}: expected one of {', '.join(ATTACKS)}", code="E103", where="attack", remedy=remedy
    )
    fine = is_number(share, 0, 1) and 0 < share < 1
    expect(fine, f"{share}: expected a share of the clients, 0 < share < 1", code="E103", where="attackers")


class Liars:
    """An engine some of whose clients do not send what they have.

    Args:
        engine: of all clients.
        turn: name of what they send instead.
    """

    def __init__(self, engine: Engine, turn: str, liars: Sequence[int], seed: int):
        self.name, self.reason, self.workers = engine.name, engine.reason, engine.workers
        self._engine = engine
        self._turn = turn
        self._liars = frozenset(liars)
        self._seed = seed

    def replies(
        self, kind: Kind, plan: Plan, clients: Sequence[int], rows: Mapping[int, Row], pack: Pack | None = None
    ) -> Iterator[Reply]:
        replies = self._engine.replies(kind, plan, clients, rows, pack)
        if kind not in ("round", "judged"):
            yield from replies
        elif self._turn not in _INFORMED:
            for reply in replies:
                yield self._lie(reply, plan, ()) if reply.client in self._liars else reply
        else:
            every = [own(reply) for reply in replies]
            honest = [r.message for r in every if r.client not in self._liars and r.refused is None]
            for reply in every:
                yield self._lie(reply, plan, honest) if reply.client in self._liars else reply

    def close(self) -> None:
        self._engine.close()

    @property
    def pids(self) -> tuple[int, ...]:
        """Of its engine's worker processes."""
        return tuple(getattr(self._engine, "pids", ()))

    def _lie(self, reply: Reply, plan: Plan, honest: Sequence[Message]) -> Reply:
        if reply.refused is not None:
            return reply
        source = generator(self._seed, f"attack {self._turn}", plan.round, reply.client)
        message = dict(reply.message)
        for tree, content in reply.message.items():
            if tree not in RESERVED and all(x.is_floating_point() for x in content.values()):
                others = [other[tree] for other in honest if other.get(tree, {}).keys() == content.keys()]
                whole = self._turn != "one_layer" or tree == "update"
                message[tree] = TURNS[self._turn](content, others, source) if whole else content
        if "moments" in message:
            squares = squared_norms(message["update"])
            message["moments"] = {name: torch.tensor(x, dtype=torch.float64) for name, x in squares.items()}
        return reply._replace(message=message, refused=non_finite(message, None))


# ---- attacks by examples


def _changed(
    data: ClientData, liars: Sequence[int], change: Callable[[ClientData, Tensor], tuple[Tensor, Tensor]]
) -> ClientData:
    """Examples of these clients are replaced by changed copies; who shares one with them keeps the true one."""
    if not isinstance(data.x, Tensor) or not isinstance(data.y, Tensor) or data.classes is None:
        said = "the attack changes pictures and labels: the data has others"
        raise ConfigError(said, code="E118", where="attack", remedy="an attack on the messages, e.g. sign_flip")
    theirs = torch.cat([data.indices_of(client) for client in liars])
    x, y = change(data, theirs)
    indices, at = data.indices.clone(), len(data.y)
    for client in liars:
        span = slice(int(data.offsets[client]), int(data.offsets[client + 1]))
        n = span.stop - span.start
        indices[span] = torch.arange(at, at + n)
        at += n
    return replace(data, x=torch.cat([data.x, x]), y=torch.cat([data.y, y]), indices=indices, check=False)


def _pictures(data: ClientData, indices: Tensor) -> tuple[Tensor, Tensor]:
    return cast("tuple[Tensor, Tensor]", data.examples(indices))  # `_changed` has looked


def _flipped(data: ClientData, indices: Tensor) -> tuple[Tensor, Tensor]:
    x, y = _pictures(data, indices)
    return x, int(data.classes or 0) - 1 - y


def _marked(data: ClientData, indices: Tensor) -> tuple[Tensor, Tensor]:
    x, y = (part.clone() for part in _pictures(data, indices))
    x[::2], y[::2] = marked(x[::2], data), TARGET
    return x, y


def marked(x: Tensor, data: ClientData) -> Tensor:
    """The pictures with their last values, 4 or a hundredth of them, as bright as anything in the data."""
    flat = x.reshape(len(x), -1).clone()
    flat[:, -max(4, flat.shape[1] // 100) :] = cast("Tensor", data.x).max()
    return flat.view(x.shape)


def fooled(fed: Federation, state: State) -> float | None:
    """Share of the test examples of other labels that the model takes for the backdoor's once they are marked."""
    x, y = fed.data.test or (None, None)
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return None
    others = x[y != TARGET]
    with torch.inference_mode():
        output = fed.module(state)(fed.data.transform(marked(others, fed.data), None))
    return float((output.argmax(1) == TARGET).double().mean())
