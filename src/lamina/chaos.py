"""What goes wrong with replies, done on purpose: `fed.through(lambda engine: Chaotic(engine, Chaos(drop=0.3)))`.

An engine between clients and their server: it loses replies, keeps them for a round, gives them out twice or in another
order, and changes what is in them. What happens to a client in a round follows from the seed and their address, so the
same chaos comes again whatever the engine, the workers, or a round that is made a second time.
"""

from __future__ import annotations

import math
import os
import re
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lamina.admission import own
from lamina.client import Reply
from lamina.engine.base import Engine, Kind, Pack
from lamina.errors import ConfigError, expect, is_number, is_whole
from lamina.method import Plan
from lamina.random import generator
from lamina.store import Row
from lamina.tree import Params

FAR = 1e20  # factor of an update that is scaled


class Kill(NamedTuple):
    """SIGKILL to a process in the middle of a round."""

    what: str  # "worker" or "run"
    round: int

    @classmethod
    def of(cls, text: str) -> Kill:
        """Raises ConfigError E103."""
        found = re.fullmatch(r"(worker|run)@r?(\d{1,6})", text)
        if found is None:
            raise ConfigError(f"--kill {text}: expected worker@rN or run@rN, a round from 0", code="E103", where="kill")
        return cls(found[1], int(found[2]))

    def __str__(self) -> str:
        return f"{self.what}@r{self.round}"


@dataclass(frozen=True)
class Chaos:
    """What goes wrong, as shares of all replies; each of them meets at most one of the first group.

    Args:
        drop: nothing comes.
        late: it comes in the next round.
        delay: mean seconds on a virtual clock, exponential; beyond `deadline` a reply is late.
        nan: one value of its update is NaN.
        scale: its update is multiplied by 1e20.
        shape: one layer is transposed, or has a dimension more.
        type: one layer is float64, in a model of float64 float32.
        layer: it has a layer that nobody asked for.
        claim: it claims a million times its local steps.
        duplicate: it comes twice; of all replies that come.
        reorder: all replies of a round come in another order.
        kill: processes that are killed, e.g. "worker@r3" or "run@r7".
        attack: what some clients do in every round, see `lamina.attacks`; "": nothing.
        attackers: their share of all clients.
        seed: of whom it meets.
    """

    drop: float = 0.0
    late: float = 0.0
    delay: float = 0.0
    nan: float = 0.0
    scale: float = 0.0
    shape: float = 0.0
    type: float = 0.0
    layer: float = 0.0
    claim: float = 0.0
    duplicate: float = 0.0
    reorder: bool = False
    kill: tuple[str, ...] = ()
    attack: str = ""
    attackers: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (*GROUP, "duplicate"):
            share = getattr(self, name)
            fine = is_number(share, 0) and share <= 1
            expect(fine, f"{name}={share}: expected a share, 0 <= {name} <= 1", code="E103", where=name)
        whole = sum(getattr(self, name) for name in GROUP)
        expect(whole <= 1 + 1e-9, f"{', '.join(GROUP)}: {whole:g} together, expected at most 1", code="E103")
        fine = is_number(self.delay, 0) and self.delay < math.inf
        expect(fine, f"delay={self.delay}: expected a number of seconds >= 0", code="E103", where="delay")
        expect(is_whole(self.seed, 0), f"seed={self.seed}: expected a whole number >= 0", code="E103", where="seed")
        for text in self.kill:
            Kill.of(text)

    @property
    def kills(self) -> tuple[Kill, ...]:
        return tuple(Kill.of(text) for text in self.kill)

    def fate(self, round: int, client: int, deadline: float | None = None) -> Fate:
        """What becomes of this client's reply in this round."""
        source = generator(self.seed, "chaos", round, client)
        point, twice, wait, where = torch.rand(4, generator=source, dtype=torch.float64).tolist()
        meets = ""
        for name in GROUP:
            point -= getattr(self, name)
            if point < 0:
                meets = name
                break
        seconds = -self.delay * math.log1p(-wait) if self.delay else 0.0
        if not meets and deadline is not None and seconds > deadline:
            meets = "late"
        return Fate(meets, twice < self.duplicate, seconds, where)

    def said(self) -> dict[str, Any]:
        """What is not as in a run without chaos."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if self.attack or f.name != "attackers"}
        return {name: value for name, value in given.items() if value and name != "seed"} | {"seed": self.seed}


GROUP = ("drop", "late", "nan", "scale", "shape", "type", "layer", "claim")


class Fate(NamedTuple):
    """Of a reply.

    Args:
        meets: one of `GROUP`, or "".
        seconds: until it comes.
        where: which layer, as a share of all.
    """

    meets: str
    twice: bool
    seconds: float
    where: float


class Chaotic:
    """An engine whose replies meet a chaos.

    Args:
        engine: of all clients.
        deadline: seconds on the virtual clock after which a reply is late.
    """

    def __init__(self, engine: Engine, chaos: Chaos, deadline: float | None = None):
        self.name, self.reason, self.workers = engine.name, engine.reason, engine.workers
        self._engine = engine
        self._chaos = chaos
        self._deadline = deadline
        self._late: list[Reply] = []

    def replies(
        self, kind: Kind, plan: Plan, clients: Sequence[int], rows: Mapping[int, Row], pack: Pack | None = None
    ) -> Iterator[Reply]:
        replies = self._engine.replies(kind, plan, clients, rows, pack)
        if kind not in ("round", "judged"):
            yield from replies
            return
        late, self._late = self._late, []
        yield from late
        come = self._met(replies, plan)
        if not self._chaos.reorder:
            yield from come
            return
        held = [own(reply) for reply in come]
        order = generator(self._chaos.seed, "chaos order", plan.round)
        yield from (held[i] for i in torch.randperm(len(held), generator=order).tolist())

    def close(self) -> None:
        self._engine.close()

    def _met(self, replies: Iterator[Reply], plan: Plan) -> Iterator[Reply]:
        for number, reply in enumerate(replies):
            if number == 0:  # the others are being trained
                self._kill(plan.round)
            fate = self._chaos.fate(plan.round, reply.client, self._deadline)
            if fate.meets == "drop":
                continue
            if fate.meets == "late":
                self._late.append(own(reply)._replace(round=plan.round))
                continue
            met = CONTENTS[fate.meets](reply, fate.where) if fate.meets in CONTENTS and reply.message else reply
            if fate.twice:  # the second is by itself, wherever the first one's memory goes
                met = own(met)
                yield met
            yield met

    def _kill(self, round: int) -> None:
        for kill in self._chaos.kills:
            if kill.round == round and kill.what == "run":
                os.kill(os.getpid(), signal.SIGKILL)
            elif kill.round == round:
                pids = tuple(getattr(self._engine, "pids", ()))
                said = f"--kill {kill}: engine {self.name!r} has no worker processes"
                expect(bool(pids), said, code="E118", where="kill", remedy="engine=processes workers=2")
                os.kill(pids[round % len(pids)], signal.SIGKILL)


# ---- what is in a reply


def changed(reply: Reply, tree: str, change: Callable[[Params], Params]) -> Reply:
    """With another content of one tree."""
    return reply._replace(message={**reply.message, tree: change(dict(reply.message[tree]))})


def at(update: Params, where: float) -> str:
    """One of its layers with entries."""
    names = [name for name, x in update.items() if x.numel()]
    return names[min(int(where * len(names)), len(names) - 1)] if names else ""


def layered(turn: Callable[[Tensor], Any]) -> Callable[[Reply, float], Reply]:
    """A change of one layer's update."""

    def change(reply: Reply, where: float) -> Reply:
        name = at(reply.message["update"], where)
        return changed(reply, "update", lambda update: update | {name: turn(update[name])}) if name else reply

    return change


def one_is(value: float) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        made = x.clone(memory_format=torch.contiguous_format)
        made.view(-1)[made.numel() // 2] = value
        return made

    return change


def transposed(x: Tensor) -> Tensor:
    """Another shape of as many numbers, whatever the shape was."""
    flipped = x.permute(*reversed(range(x.dim()))).contiguous()
    return flipped if flipped.shape != x.shape else x.unsqueeze(0)


def _other_type(x: Tensor) -> Tensor:
    return x.double() if x.dtype != torch.float64 else x.float()


def _extra(reply: Reply, where: float) -> Reply:
    return changed(reply, "update", lambda update: update | {"somebody.else": torch.ones(3)})


def _scaled(reply: Reply, where: float) -> Reply:
    return changed(reply, "update", lambda update: {name: x * FAR for name, x in update.items()})


def claims(steps: float) -> Callable[[Reply, float], Reply]:
    said = {"steps": torch.tensor(steps, dtype=torch.float64)}
    return lambda reply, where: reply._replace(message={**reply.message, "steps": said})


def _boasts(reply: Reply, where: float) -> Reply:
    return claims(1e6 * max(1, reply.steps))(reply, where)


CONTENTS: Mapping[str, Callable[[Reply, float], Reply]] = {
    "nan": layered(one_is(math.nan)),
    "scale": _scaled,
    "shape": layered(transposed),
    "type": layered(_other_type),
    "layer": _extra,
    "claim": _boasts,
}
