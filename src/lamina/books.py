"""The accounts of a round: bytes by layer and direction, clients, events, and what every layer did."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import Tensor

from lamina import wire
from lamina.aggregate import total
from lamina.client import Reply
from lamina.method import Plan
from lamina.network import Exchange
from lamina.record import ClientRecord, LayerRecord, Traffic
from lamina.tree import Message, Params, squared_norm

_REFERENCE_ROUND = 2  # inertia is measured from the global model after this round


class Observed(NamedTuple):
    """What the records must remember from round to round. Nothing else reads it."""

    reference: Params
    elapsed: dict[str, float]  # mean local steps since each parameter was last aggregated


class Books:
    """The accounts of one round: bytes by layer, clients, events."""

    def __init__(self) -> None:
        self.up: Counter[tuple[str, str]] = Counter()
        self.down: Counter[tuple[str, str]] = Counter()
        self.clients: list[ClientRecord] = []
        self.exchanges: dict[str, list[Exchange]] = defaultdict(list)  # by phase
        self.events: list[dict[str, str]] = []
        self.accepted = 0
        self.before: list[float | None] = []  # accuracy of the accepted clients' own models
        self.share = 0.0  # of the accepted messages, by weight
        self.kept: dict[str, float] = defaultdict(float)  # weighted mean number of entries that travelled, by layer

    def sent(self, phase: str, direction: str, sizes: Mapping[str, wire.Size]) -> int:
        rows = self.up if direction == "up" else self.down
        total = 0
        for tree, size in sizes.items():
            if tree in ("update", "params", "change"):
                for layer, n in size.rows.items():
                    rows[phase, layer] += n
                rows[phase, "_shared"] += size.shared
            else:
                rows[phase, f"_{tree}" if tree else "_shared"] += size.total
            total += size.total
        return total

    def client(self, c: int, name: str, examples: int, reply: Reply, up: int, down: int, phase: str) -> None:
        refused = None if reply.refused is None else reply.code
        self.exchanges[phase].append(Exchange(c, up, down, reply.steps))
        if phase == "round":
            self.clients.append(ClientRecord(c, name, examples, reply.steps, reply.loss, up, down, refused))
            self.accepted += refused is None
        if reply.again is not None:
            self.events.append(_event("E313", name, reply.again))
        if reply.refused is not None:
            self.events.append(_event(reply.code, name, reply.refused))

    def accuracy_before(self) -> float | None:
        known = [accuracy for accuracy in self.before if accuracy is not None]
        return total(known) / len(known) if known else None

    def count(self, entries: Mapping[str, int], share: float) -> None:
        self.share += share
        for name, n in entries.items():
            self.kept[name] += share * n

    def traffic(self) -> Iterator[Traffic]:
        for direction, rows in (("up", self.up), ("down", self.down)):
            for (phase, layer), n in rows.items():
                yield Traffic(phase, direction, layer, n)

    def layers(
        self, old: Observed, plan: Plan, mean: Message, params: Params, intervals: Mapping[str, float]
    ) -> tuple[Observed, dict[str, LayerRecord]]:
        """A row per parameter.

        Args:
            mean: of the accepted messages, before the method's `step`.
            params: the global model after the round.
            intervals: rounds between two aggregations, of the layers that have one other than 1.
        """
        steps = float(mean["steps"]["steps"])
        elapsed = {name: old.elapsed.get(name, 0.0) + steps for name in params}
        reference = params if plan.round == _REFERENCE_ROUND else old.reference
        rows = {}
        for name in params:
            u = mean["update"].get(name)
            kept = plan.mask.get(name) if plan.mask else None
            numel = params[name].numel() if kept is None else int(kept.sum())
            numbers: dict[str, float | None] = {}
            if u is not None:
                norm2 = squared_norm(u)
                density = self.kept[name] / self.share / max(1, params[name].numel())
                numbers = {"update_norm": norm2**0.5, "density": density}
                if "moments" in mean:
                    second = float(mean["moments"][name])
                    numbers |= _spread(second, norm2, self.accepted, numel, elapsed[name])
            if reference:
                numbers |= _inertia(params[name], reference[name])
            rows[name] = LayerRecord(
                uploaded=name in plan.upload,
                interval=int(intervals.get(name, 1)),
                bytes_up=self.up["round", name],
                bytes_down=self.down["round", name],
                **numbers,
            )
        elapsed |= dict.fromkeys(mean["update"], 0.0)
        return Observed(reference, elapsed), rows


_EVENTS = {  # code -> message, remedy
    "E310": (
        "not finite: the message is not used, its client keeps the state from before",
        "lower local.lr or set local.clip; look at this client's data",
    ),
    "E311": (
        "no answer: the client keeps the state from before, and will be sent the whole model",
        "look at its node; set faults.reply_deadline_s and faults.min_replies for clients that come and go",
    ),
    "E312": (
        "its bytes are not what this round's plan implies: the message is not used, its client keeps the state from "
        "before",
        "run the same lamina with the same settings at its node; bytes may also have changed on the way",
    ),
    "E313": (
        "it does not have what it was sent before: it was sent the whole plan",
        "keep its node's folder on a disk that lasts; a client that has lost its state begins as a newcomer",
    ),
}


def _event(code: str, client: str, why: str) -> dict[str, str]:
    message, remedy = _EVENTS[code]
    about = {"layer": why} if code == "E310" else {"why": why}
    return {"code": code, "client": client, **about, "message": message, "remedy": remedy}


def _spread(second: float, norm2: float, m: int, numel: int, steps: float) -> dict[str, float | None]:
    """Divergence figures from E|u|^2 and |Eu|^2, over m messages of so many entries."""
    spread = max(0.0, second - norm2)
    return {
        "divergence": (spread / norm2) ** 0.5 if norm2 > 0 else None,
        "divergence_std": (m * spread / (m * numel - 1)) ** 0.5 if m * numel > 1 else None,
        "alignment": norm2 / second if second > 0 else None,
        "discrepancy": spread / (steps * numel) if steps * numel else None,
    }


def _inertia(x: Tensor, start: Tensor) -> dict[str, float | None]:
    """How far a layer has moved from where it was."""
    moved, now, then = squared_norm(x - start) ** 0.5, squared_norm(x) ** 0.5, squared_norm(start) ** 0.5
    return {
        "inertia": moved / then if then else None,
        "inertia_l2": moved,
        # x . start = (|x|^2 + |start|^2 - |x - start|^2) / 2, from what is known already
        "inertia_cosine": (now**2 + then**2 - moved**2) / (2 * now * then) if now and then else None,
    }
