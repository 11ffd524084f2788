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
    mask: Params = {}  # noqa: RUF012 of the round before, where the method moves it


class Books:
    """The accounts of one round: bytes by layer, clients, events."""

    def __init__(self) -> None:
        self.up: Counter[tuple[str, str]] = Counter()
        self.down: Counter[tuple[str, str]] = Counter()
        self.clients: list[ClientRecord] = []
        self.exchanges: dict[str, list[Exchange]] = defaultdict(list)  # by phase
        self.events: list[dict[str, str]] = []
        self.lost: list[dict[str, str]] = []  # those of messages that were needed and could not be used
        self.accepted = 0
        self.skipped = ""  # why, where the round changes nothing
        self._beside: Counter[tuple[str, int]] = Counter()  # bytes beside a client's answer, until there is its record
        self.before: list[float | None] = []  # accuracy of the accepted clients' own models
        self.share = 0.0  # of the accepted messages, by weight
        self.residual: dict[str, float] = defaultdict(float)  # weighted mean |r|^2, by layer
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

    def beside(self, phase: str, name: str, reply: Reply) -> None:
        """What came and is no answer that is owed: a second one, one to another round, one of somebody not asked."""
        came = int(total(size.total for size in reply.sizes.values()))
        self.up[phase, "_unused"] += came
        known = next((i for i, record in enumerate(self.clients) if record.client == reply.client), None)
        if known is None:
            self._beside[phase, reply.client] += came
        else:
            self.clients[known] = self.clients[known]._replace(bytes_up=self.clients[known].bytes_up + came)
        self.events.append(_event(name, reply))

    def skip(self, why: str) -> None:
        """The round changes nothing: what was accepted is not used either."""
        message, remedy = _EVENTS["E306"]
        self.skipped = why
        self.clients = [c._replace(refused=c.refused or "E306") for c in self.clients]
        event = {"event": "skipped", "code": "E306", "client": "", "why": why, "message": message, "remedy": remedy}
        self.events.append(event)

    def client(self, c: int, name: str, examples: int, reply: Reply, up: int, down: int, phase: str) -> None:
        refused = None if reply.refused is None else reply.code
        up += self._beside.pop((phase, c), 0)
        self.exchanges[phase].append(Exchange(c, up, down, reply.steps))
        if phase == "round":
            self.clients.append(ClientRecord(c, name, examples, reply.steps, reply.loss, up, down, refused))
            self.accepted += refused is None
        if reply.again is not None:
            self.events.append(_event(name, reply._replace(refused=reply.again, code="E313", layer="")))
        if reply.refused is not None:
            self.events.append(_event(name, reply))
            self.lost += self.events[-1:] if reply.code != "E302" else []

    def accuracy_before(self) -> float | None:
        known = [accuracy for accuracy in self.before if accuracy is not None]
        return total(known) / len(known) if known else None

    def count(self, entries: Mapping[str, int], residual: Mapping[str, float], share: float) -> None:
        self.share += share
        for name, square in residual.items():
            self.residual[name] += share * square
        for name, n in entries.items():
            self.kept[name] += share * n

    def traffic(self) -> Iterator[Traffic]:
        for direction, rows in (("up", self.up), ("down", self.down)):
            for (phase, layer), n in rows.items():
                yield Traffic(phase, direction, layer, n)

    def layers(
        self, old: Observed, plan: Plan, mean: Message, params: Params, intervals: Mapping[str, float], moves: bool
    ) -> tuple[Observed, dict[str, LayerRecord]]:
        """A row per parameter.

        Args:
            mean: of the accepted messages, before the method's `step`.
            params: the global model after the round.
            intervals: rounds between two aggregations, of the layers that have one other than 1.
            moves: whether the plan's mask changes over the rounds.
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
                density = self.kept[name] / self.share / max(1, params[name].numel()) if self.share else 0.0
                numbers = {"update_norm": norm2**0.5, "density": density}
                if "moments" in mean:
                    second = float(mean["moments"][name])
                    numbers |= _spread(second, norm2, self.accepted, numel, elapsed[name])
            if reference:
                numbers |= _inertia(params[name], reference[name])
            if name in self.residual:
                numbers["residual_norm"] = (self.residual[name] / self.share) ** 0.5
            if kept is not None and plan.round:
                came = int((kept & ~old.mask[name]).sum()) if name in old.mask else 0
                numbers["mask_churn"] = came / max(1, numel)
            rows[name] = LayerRecord(
                uploaded=name in plan.upload,
                interval=int(intervals.get(name, 1)),
                bytes_up=self.up["round", name],
                bytes_down=self.down["round", name],
                **numbers,
            )
        elapsed |= dict.fromkeys(mean["update"], 0.0)
        return Observed(reference, elapsed, dict(plan.mask or {}) if moves else {}), rows


_NOT_USED = "the message is not used, its client keeps the state from before"
_SAME = "run the same lamina with the same settings at its node"
_EVENTS = {  # code -> message, remedy
    "E302": (
        f"not needed, enough others had answered: {_NOT_USED}",
        "nothing; faults.over_select asks more clients than are used",
    ),
    "E307": (
        f"too few clients are left for the secure sum: {_NOT_USED}",
        "see why the others are not there; a lower secure.threshold puts up with more of them",
    ),
    "E319": (
        f"too large for the secure sum: {_NOT_USED}",
        "a higher secure.limit, or lower local.lr or set local.clip; look at this client's data",
    ),
    "E310": (f"not finite: {_NOT_USED}", "lower local.lr or set local.clip; look at this client's data"),
    "E311": (
        "no answer: the client keeps the state from before, and will be sent the whole model",
        "look at its node; set faults.reply_deadline_s and faults.min_replies for clients that come and go",
    ),
    "E312": (f"beyond all bounds: {_NOT_USED}", "lower local.lr or set local.clip; look at this client's data"),
    "E313": (
        "it does not have what it was sent before: it was sent the whole plan",
        "keep its node's folder on a disk that lasts; a client that has lost its state begins as a newcomer",
    ),
    "E314": (
        f"it claims what its registration does not bear out: {_NOT_USED}",
        "register the node again if its data has changed: weights follow from what is registered",
    ),
    "E306": (
        "the round is skipped: the model and its clients stay as they were",
        "see why the others were not used; faults.min_replies says how many must be",
    ),
    "E320": (f"another shape: {_NOT_USED}", _SAME),
    "E321": (f"another type: {_NOT_USED}", _SAME),
    "E322": (f"other layers: {_NOT_USED}", _SAME),
    "E323": (f"its node has other settings: {_NOT_USED}", _SAME),
    "E330": ("an answer in another client's place: it is not used", "look at its node, and at what is between"),
    "E331": ("a second answer: the first one counts", "look at what is between its node and the server"),
    "E336": (
        f"it does not take a step of the secure sum: {_NOT_USED}",
        "see whether its node was started again during the round; else what it was asked for is not the protocol's",
    ),
    "E332": ("an answer to another round: it is not used", "a longer faults.reply_deadline_s, if it is often late"),
}
_BYTES = (
    f"its bytes are not what this round's plan implies: {_NOT_USED}",
    f"{_SAME}; bytes may also have changed on the way",
)


def _event(client: str, reply: Reply) -> dict[str, str]:
    message, remedy = _EVENTS.get(reply.code, _BYTES)
    why = str(reply.refused)
    about = {"layer": reply.layer} if reply.layer else {}
    about |= {"layer": why} if reply.code == "E310" and not about else {} if reply.code == "E310" else {"why": why}
    return {"code": reply.code, "client": client, **about, "message": message, "remedy": remedy}


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
