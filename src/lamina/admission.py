"""Where a reply is judged before it is summed. One that is refused costs its client this round, and nothing else.

    asked -> its round -> first of its client -> what the client says of itself -> trees, shapes, types -> in range:
    finite, not too long -> local steps -> [norms of faults.norm] -> needed

Replies leave here in the schedule's order, so what arrives first makes no difference to a sum.

The whole reply is judged before any of it is added to a sum, so a refused one leaves no trace there. What a message has
to look like follows from the plan and from the method's own hooks, never from the message. Bytes are judged before they
are a reply, where they arrive (`lamina.remote.message`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lamina import wire
from lamina.client import Reply, Setup, compose, known
from lamina.method import Plan, Work
from lamina.tree import Message, Params, zeros_like
from lamina.wire import Schema

LARGEST = 1e12  # Euclidean norm of one layer's update. Adding a longer one to weights near 1 in fp32 erases them.
SCORE: Schema = {"score": wire.Spec((4,), torch.float64)}  # of a client's own model; the server uses it for no sum


class Refusal(NamedTuple):
    """Why a reply is not used."""

    code: str
    why: str
    layer: str = ""  # or tree; "" where it is about the whole reply

    def on(self, reply: Reply) -> Reply:
        return reply._replace(refused=self.why, code=self.code, layer=self.layer)


def unused(client: int, code: str, why: str, length: int = 0, again: str | None = None, layer: str = "") -> Reply:
    """The reply of a client of which nothing usable came.

    Args:
        length: of the frame that did come.
    """
    sizes = {"": wire.Size({}, length, {})} if length else {}
    return Reply(client, {}, None, sizes, math.nan, 0, why, code, again, layer=layer)


def own(reply: Reply) -> Reply:
    """In memory of its own: an engine may overwrite a message once the next reply is asked for."""
    message = {
        tree: {name: x.clone() if isinstance(x, Tensor) else x for name, x in content.items()}
        for tree, content in reply.message.items()
    }
    return reply._replace(message=message)


class Form(NamedTuple):
    """What a plan implies of its messages.

    Args:
        schemas: tree -> schema; of "update", of all that could come.
        upload: the parameters of which updates are asked for.
        open: a method's own trees are not known, because its hooks do not work on an update of zeros.
    """

    kind: str
    schemas: dict[str, Schema]
    upload: frozenset[str]
    open: bool = False

    @classmethod
    def of(cls, setup: Setup, kind: str, plan: Plan) -> Form:
        """The method's own hooks say it, on the model that was sent and a gradient of zeros."""
        nothing = zeros_like(plan.params)
        if kind == "probe":
            message = setup.method.probe(plan.params, nothing)
            return cls(kind, _schemas(message), frozenset(plan.params))
        work = Work(plan.params, plan.buffers, nothing, torch.tensor(1))
        message, _ = compose(setup, plan, known(setup, plan, None), work)
        schemas = _schemas(message) | {"update": wire.schema_of(plan.params)}
        if setup.moments:
            schemas["moments"] = {name: wire.Spec((), torch.float64) for name in plan.upload}
        return cls(kind, schemas, plan.upload)

    @classmethod
    def assumed(cls, setup: Setup, kind: str, plan: Plan) -> Form:
        """The same where a method's hooks may fail on zeros: then only what the engine itself asks for is known."""
        try:
            return cls.of(setup, kind, plan)
        except Exception:
            schemas = {"update": wire.schema_of(plan.params), "buffers": wire.schema_of(plan.buffers)}
            return cls(kind, schemas if kind != "probe" else {}, plan.upload, open=True)

    def refuses(self, message: Message) -> Refusal | None:
        """E320 a shape, E321 a type, E322 a tree or layer that is absent or was not asked for."""
        trees = {tree: content for tree, content in message.items() if tree not in ("steps", "score")}
        if not self.open and trees.keys() != self.schemas.keys():
            return _odd("", trees, self.schemas)
        for tree, content in trees.items():
            schema = self.schemas.get(tree)
            if schema is None:
                other = next((name for name, x in content.items() if not isinstance(x, Tensor) or x.is_complex()), None)
                if other is not None:
                    return Refusal("E321", "expected a tensor of real numbers", f"{tree}/{other}")
                continue
            absent: Container[str] = schema  # of an update, what the client sends is the method's choice
            if tree == "update":
                schema, absent = {name: spec for name, spec in schema.items() if name in self.upload}, ()
            elif tree == "moments" and "update" in trees:
                schema = absent = {name: schema[name] for name in trees["update"] if name in schema}
            missing = {name: spec for name, spec in schema.items() if name in content or name in absent}
            if content.keys() != missing.keys():
                return _odd(tree, content, missing)
            for name, x in content.items():
                wrong = _wrong(x, schema[name])
                if wrong is not None:
                    return Refusal(*wrong, name if tree == "update" else f"{tree}/{name}")
        return _score_refused(message.get("score"))


def _schemas(message: Message) -> dict[str, Schema]:
    return {tree: wire.schema_of(content) for tree, content in message.items() if tree != "steps"}


def _odd(tree: str, got: Mapping[str, Any], expected: Mapping[str, Any]) -> Refusal:
    extra, absent = sorted(map(str, got.keys() - expected.keys())), sorted(expected.keys() - got.keys())
    name = (extra or absent)[0]
    said = f"{'is not one that was asked for' if extra else 'is absent'}: got {listed(got)}"
    layer = name if tree in ("", "update") else f"{tree}/{name}"
    return Refusal("E322", f"{said}, expected {listed(expected)}", layer)


def listed(names: Iterable[Any]) -> str:
    """A few of these names."""
    said = [str(name) for name in names]
    return ", ".join(said[:4]) + (f" and {len(said) - 4} more" if len(said) > 4 else "") or "none"


def _wrong(x: Any, spec: wire.Spec) -> tuple[str, str] | None:
    if not isinstance(x, Tensor) or x.dtype != spec.dtype:
        got = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
        return "E321", f"expected {spec.dtype}, got {got}"
    if tuple(x.shape) != tuple(spec.shape):
        return "E320", f"expected {tuple(spec.shape)}, got {tuple(x.shape)}"
    return None


def _score_refused(score: Params | None) -> Refusal | None:
    if score is None:
        return None
    wrong = _odd("score", score, SCORE) if score.keys() != SCORE.keys() else None
    form = None if wrong else _wrong(score["score"], SCORE["score"])
    return wrong or (None if form is None else Refusal(*form, "score/score"))


def out_of_range(message: Message) -> Refusal | None:
    """E310 for the first tensor with a NaN or an infinity, or else E312 for the first layer whose update is longer than
    any training makes it. A score is left out: it enters no sum. Bounds that a person chooses (`faults.norm`) come
    after this one."""
    longer = None
    for tree, content in message.items():
        if tree in ("steps", "score") or not content:
            continue
        update = tree == "update"
        read = [torch.dot(x.flatten(), x.flatten()) if update else x.sum() for x in content.values()]
        for (name, x), said in zip(content.items(), torch.stack([x.double() for x in read]).tolist(), strict=True):
            if said <= LARGEST**2 if update else math.isfinite(said):  # so every entry is finite
                continue
            if not bool(torch.isfinite(x).all()):
                layer = name if update else f"{tree}/{name}"
                return Refusal("E310", layer, layer)
            norm = float(torch.linalg.vector_norm(x.double())) if update and longer is None else 0.0
            if norm > LARGEST:  # and not only its square more than the type can hold
                longer = Refusal("E312", f"a norm of {norm:.3g}, expected at most {LARGEST:.0e}", name)
    return longer


def steps_refused(setup: Setup, clients: Sequence[int], said: float) -> Refusal | None:
    """E314 unless it made as many local steps as its registered examples make; of several clients, a mean of theirs."""
    due = [setup.local.count(int(n)) for n in setup.data.sizes_of(clients)]
    rounding = 1e-9 * max(due) if len(due) > 1 else 0.0
    if min(due) - rounding <= said <= max(due) + rounding:
        return None
    return Refusal("E314", f"{said:g} local steps, its examples make {due[0]}")


class Admission:
    """Judges the replies to one plan, in the order in which they come.

    Args:
        clients: who was asked.
    """

    def __init__(self, setup: Setup, kind: str, plan: Plan, clients: Sequence[int]):
        self._setup = setup
        self._kind = kind
        self._plan = plan
        self._asked = dict.fromkeys(clients)
        self._form = Form.assumed(setup, "probe" if kind == "probe" else "round", plan)
        self._seen: set[int] = set()
        self._fallen: dict[int, Refusal] = {}  # members of a message that was refused

    def through(self, replies: Iterable[Reply]) -> Iterator[Reply]:
        """The same replies, refused where they must be, in the schedule's order whatever theirs was; those of clients
        of whom none came say so. So sums are made in one order."""
        waiting = deque(self._asked)
        early: dict[int, Reply] = {}
        for reply in replies:
            judged = self._judged(reply)
            if judged.beside:
                yield judged
            elif waiting[0] != reply.client:
                early[reply.client] = own(judged)
            else:
                yield judged
                waiting.popleft()
                while waiting and waiting[0] in early:
                    yield early.pop(waiting.popleft())
        for client in waiting:
            yield early[client] if client in early else unused(client, "E311", "nothing came")

    def _judged(self, reply: Reply) -> Reply:
        if reply.beside:
            return reply
        refusal = self._beside(reply)
        if refusal is not None:
            return refusal.on(reply)._replace(beside=True)
        self._seen.add(reply.client)
        refusal = self._content(reply)
        if refusal is None:
            return reply
        self._fallen |= dict.fromkeys(reply.members[1:], refusal)
        return refusal.on(reply)

    def _beside(self, reply: Reply) -> Refusal | None:
        if reply.client not in self._asked:
            return Refusal("E330", f"client {reply.client} was not asked")
        if reply.round not in (None, self._plan.round):
            return Refusal("E332", f"an answer to round {reply.round}, this is round {self._plan.round}")
        return Refusal("E331", "it has answered already") if reply.client in self._seen else None

    def _content(self, reply: Reply) -> Refusal | None:
        if reply.refused is not None:
            return Refusal(reply.code, reply.refused, reply.layer)
        if reply.within:
            return self._fallen.get(reply.client)
        refusal = self._form.refuses(reply.message) or out_of_range(reply.message)
        if refusal is None and not math.isfinite(reply.loss):
            refusal = Refusal("E310", "loss", "loss")
        if refusal is not None or self._kind == "probe":
            return refusal
        return self._steps(reply)

    def _steps(self, reply: Reply) -> Refusal | None:
        said = reply.message.get("steps", {}).get("steps")
        if not isinstance(said, Tensor) or said.shape != () or not said.is_floating_point():
            return Refusal("E314", "it does not say how many local steps it made")
        return steps_refused(self._setup, reply.members or (reply.client,), float(said))


def enough(replies: Iterable[Reply], needed: int | None, always: Container[int] = ()) -> Iterator[Reply]:
    """The same replies; those that come when so many are used already are not.

    Args:
        always: clients of whom that does not hold.
    """
    used = 0
    for reply in replies:
        if needed is not None and reply.refused is None and used >= needed and reply.client not in always:
            yield Refusal("E302", f"{needed} others had answered").on(reply)
        else:
            used += reply.refused is None
            yield reply


def holds_plan(reply: Reply) -> bool:
    """Whether a client that was refused has surely read the plan: it is known what it answered."""
    return reply.code == "E310" or bool(reply.message)
