"""What comes of a plan: the clients' replies, judged, counted and summed in the schedule's order.

replies -> admission -> bounds -> [privacy] -> [secure sum] -> needed  ->  books, store, means, updates apart
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from lamina.admission import Admission, enough, holds_plan
from lamina.aggregate import Mean, total
from lamina.books import Books
from lamina.client import Setup
from lamina.cohort import Faults
from lamina.downlink import Broadcast
from lamina.engine.base import Engine, Kind, Missing, score_of
from lamina.errors import ConfigError, RunError
from lamina.norms import Bounds
from lamina.privacy.dp import Guard
from lamina.privacy.secure import SecureSum
from lamina.privacy.summing import summed
from lamina.robust import Rule
from lamina.store import ClientStore, Held, Stored
from lamina.tree import Message, Params


class Rules(NamedTuple):
    """What becomes of the replies to any plan.

    Args:
        examples: of each client.
        rule: of the updates; None: their mean.
        secure: makes their sum here; None where what comes is a sum already, or none is asked for.
        enough: messages that are used where more clients are asked; None: all that come.
    """

    setup: Setup
    examples: Sequence[int]
    rule: Rule | None
    privacy: Guard | None
    secure: SecureSum | None
    enough: int | None


class Collected(NamedTuple):
    """What came of a plan."""

    mean: Message  # of the accepted messages
    store: ClientStore  # if they are used
    apart: dict[str, tuple[Params, float]]  # under a rule: client -> its update and weight
    told: dict[int, Held]  # client -> what it holds now, whether it was accepted or not

    def forgotten(self, before: ClientStore) -> ClientStore:
        """The store if nothing is used: clients have the states from before, and what they were sent."""
        writer = before.writing()
        for client, held in self.told.items():
            writer.tell(client, held)
        return writer.done()


def collect(
    rules: Rules, kind: Kind, engine: Engine, broadcast: Broadcast, order: Sequence[int], store: ClientStore,
    books: Books, bounds: Bounds,
) -> Collected:  # fmt: skip
    """Sends the plan, takes the replies in order, and sums what is accepted."""
    setup, plan, names, rule = rules.setup, broadcast.plan, rules.setup.data.names, rules.rule
    uniformly, probing = setup.method.uniform, kind == "probe"
    parts = dict(zip(order, setup.weights_of(order), strict=True))
    whole = total(parts.values())
    shares = {c: parts[c] / whole for c in order}
    even = 1.0 / max(1, len(order))
    mean = Mean(total(shares.values()))
    uniform = Mean(total(even for _ in order))
    phase = "probe" if probing else "round"
    weighing = {"moments": "update"}  # a tree whose weights are those of another
    writer = store.writing()

    def pack(client: int, missing: Missing) -> bytes:
        known = store.entry(client)
        accepted = -1 if missing == "row" else known.accepted
        return broadcast.packed({} if missing else known.held, accepted, client)

    apart: dict[str, tuple[Params, float]] = {}
    nothing: Held = {}  # is what a client counts as holding of which nothing usable came
    told: dict[int, Held] = {}
    judged = Admission(setup, kind, plan, order)
    replies = bounds.through(judged.through(engine.replies(kind, plan, order, store.rows, pack)))
    if rules.privacy is not None:
        replies = rules.privacy.through(replies)
    if rules.secure is not None:
        replies = summed(rules.secure, setup, plan, order, replies)
    root = getattr(rule, "root", None)
    for reply in enough(replies, None if probing else rules.enough, () if root is None else (names.index(root),)):
        c = reply.client
        if reply.beside:
            name = names[c] if 0 <= c < len(names) else f"number {c}"
            books.beside(phase, name, reply)
            continue
        before = store.entry(c)
        down = books.sent(phase, "down", broadcast.sizes(before.held, before.accepted, c) if reply.sent else {})
        if reply.again is not None:
            down += books.sent(phase, "down", broadcast.sizes({}, before.accepted, c))
        down += books.sent(phase, "down", reply.down)
        up = books.sent(phase, "up", reply.sizes)
        books.client(c, names[c], rules.examples[c], reply, up, down, phase)
        if reply.refused is not None:
            told[c] = broadcast.tags if holds_plan(reply) else nothing if reply.sent else before.held
            writer.tell(c, told[c])
            continue
        told[c] = broadcast.tags
        members = reply.members or (c,)
        share = total(shares[member] for member in members)
        for tree, content in reply.message.items():
            if tree == "score":
                finite = bool(torch.isfinite(content["score"]).all())
                books.before.append(score_of(reply).accuracy if finite else None)
            elif weighing.get(tree, tree) in uniformly:
                uniform.add(tree, content, even * len(members))
            else:
                mean.add(tree, content, share)
        if rule is not None and not probing:
            own = {name: x.clone() for name, x in reply.message["update"].items()}
            apart[names[c]] = own, even if "update" in uniformly else share
        if "update" in reply.message:
            books.count(reply.sizes["update"].entries, reply.residual, share)
        writer.put(c, Stored(reply.row, broadcast.tags, -1 if probing else plan.round))
    return Collected(mean.result() | uniform.result(), writer.done(), apart, told)


def used(rule: Rule | None, faults: Faults, came: Collected, books: Books, told: int, cohort: int, t: int) -> Message:
    """The mean of the messages, or what a rule makes of them. Raises RunError where too few were accepted.

    Args:
        told: messages that were lost before this plan.
    """
    if not books.accepted:
        remedy = "training diverged on every client: lower local.lr, or set local.clip"
        raise nobody(f"round {t}: every message was refused", books.lost[told:], remedy, f"round {t}")
    if books.accepted < faults.needed(cohort):
        raise RunError(
            f"round {t}: {books.accepted} of {len(books.clients)} messages were accepted, expected at least "
            f"{faults.needed(cohort)}; the first that was not, of {_first(books.lost[told:])}",
            code="E306",
            where=f"round {t}",
            remedy="the state from before it is kept: go on from there (resume), lower faults.min_replies, or set "
            "faults.on_quorum='skip'",
        )
    if rule is None:
        return came.mean
    return {**came.mean, "update": _combined(rule, came.apart, t)}


def nobody(said: str, lost: Sequence[Mapping[str, str]], remedy: str, where: str | None = None) -> RunError:
    """No message was accepted."""
    lost = [event for event in lost if event["code"] == "E307"] or lost  # others are only why too few were left
    code = lost[0]["code"] if lost else "E311"
    if code not in ("E310", "E312"):
        remedy = "look at the clients' nodes; the state from before is kept, so the run can go on from there (resume)"
    return RunError(f"{said}; the first, of {_first(lost)}", code=code, where=where, remedy=remedy)


def _first(lost: Sequence[Mapping[str, str]]) -> str:
    """The first client whose message was not accepted, and why."""
    if not lost:
        return "nobody"
    who, layer, why = (lost[0].get(key, "") for key in ("client", "layer", "why"))
    if lost[0]["code"] == "E310":
        return f"client {who!r}, has non-finite values in {layer}"
    return f"client {who!r}: {f'{layer}: ' if layer else ''}{why}"


def _combined(rule: Rule, apart: Mapping[str, tuple[Params, float]], t: int) -> Params:
    """Raises RunError E318 where too few clients answered for the rule."""
    try:
        rule.expect(len(apart))
        whole = total(share for _, share in apart.values())
        weights = {name: share / whole for name, (_, share) in apart.items()}
        return rule.combine({name: update for name, (update, _) in apart.items()}, weights)
    except (ConfigError, LookupError) as error:
        said = error.message if isinstance(error, ConfigError) else str(error.args[0])
        remedy = "the state from before it is kept: go on from there (resume), with a larger cohort or another rule"
        raise RunError(f"round {t}: {said}", code="E318", where=f"round {t}", remedy=remedy) from error
