"""All that goes into one sum: how the numbers of a reply become elements of rings, how these travel, and what the sum
of them stands for. The server and its clients make it from the same plan, each for itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lamina import wire
from lamina.aggregate import total
from lamina.client import Reply, Setup, compose, known
from lamina.errors import WireError
from lamina.method import Plan, Work
from lamina.privacy.fixed import WIDE, Ring, exponent, fits, from_ring, to_ring
from lamina.privacy.protocol import Vectors
from lamina.privacy.secure import SecureSum
from lamina.tree import Message, Params, squared_norms, zeros_like
from lamina.wire import frame

_LOSS = 2.0**20  # a loss above it has diverged


def of_reply(reply: Reply) -> Message:
    """What of a reply goes into the sum. The number of local steps does not: it follows from what is registered."""
    trees = {tree: content for tree, content in reply.message.items() if tree != "steps"}
    return {**trees, "loss": {"loss": torch.tensor(reply.loss, dtype=torch.float64)}}


def implied(setup: Setup, kind: str, plan: Plan) -> Message:
    """What a plan implies of it: the method's own hooks say it, of the model that was sent and a gradient of zeros."""
    nothing = zeros_like(plan.params)
    loss = {"loss": {"loss": torch.zeros((), dtype=torch.float64)}}
    if kind == "probe":
        return {**setup.method.probe(plan.params, nothing), **loss}
    message, _ = compose(
        setup, plan, known(setup, plan, None), Work(plan.params, plan.buffers, nothing, torch.tensor(1))
    )
    message.pop("steps", None)
    if setup.moments:
        norms = squared_norms(message["update"])
        message["moments"] = {name: torch.tensor(x, dtype=torch.float64) for name, x in norms.items()}
    return {**message, **loss}


class _Tree(NamedTuple):
    """How the entries of a tree become elements of a ring, and how these travel."""

    bits: int
    limits: dict[str, float]  # by tensor
    exponents: dict[str, int]
    like: wire.Schema  # of the tensors that it has
    context: wire.Context
    kept: dict[str, Tensor]  # masks of those that have one

    @classmethod
    def of(cls, tree: str, content: Params, secure: SecureSum, plan: Plan, clients: int) -> _Tree:
        update = tree == "update"
        bits = secure.bits if update else WIDE
        limits = dict.fromkeys(content, secure.limit)
        if tree == "moments":  # |u|^2 <= limit^2 * entries
            limits = {name: secure.limit**2 * max(1, plan.kept(name)) for name in content}
        if tree == "loss":
            limits = {"loss": _LOSS}
        exponents = {name: exponent(bits, clients, limit) for name, limit in limits.items()}
        mask = plan.mask if update else None
        of = plan.params if update else content
        schema = {name: wire.Spec(tuple(x.shape), torch.int64) for name, x in of.items()}
        kept = {name: m for name, m in (mask or {}).items() if name in content}
        return cls(bits, limits, exponents, wire.schema_of(content), wire.Context(schema, mask), kept)

    @property
    def codec(self) -> wire.Dense:
        return wire.Dense(f"ring:{self.bits}")

    @property
    def numel(self) -> int:
        """Elements."""
        return sum(int(self.kept[name].sum()) if name in self.kept else spec.numel for name, spec in self.like.items())

    def refuses(self, content: Params) -> str | None:
        """The first tensor that does not fit."""
        if wire.schema_of(content) != self.like:
            return next(iter({**content, **self.like}), "")
        return next((name for name, x in content.items() if not fits(x, self.limits[name])), None)

    def elements(self, content: Params, weight: float) -> Ring:
        parts = [
            to_ring(self._entries(name, x), weight, self.exponents[name], self.bits) for name, x in content.items()
        ]
        return np.concatenate(parts) if parts else np.empty(0, np.uint64)

    def tensors(self, elements: Ring) -> Params:
        """In the shapes of the model, 0 outside the mask."""
        flat = torch.from_numpy(elements.view(np.int64))
        return {name: self._whole(name, part) for name, part in self._parts(flat)}

    def numbers(self, elements: Ring, over: float) -> Params:
        """What the elements of a sum stand for, divided by this, in the tensors' own types."""
        made = {}
        for name, part in self._parts(torch.from_numpy(elements.view(np.int64))):
            real = torch.from_numpy(from_ring(part.numpy().view(np.uint64), self.exponents[name], self.bits)) / over
            made[name] = self._whole(name, real).to(self.like[name].dtype)
        return made

    def flat(self, tensors: Params) -> Ring:
        """The elements again, as they came."""
        parts = [self._entries(name, tensors[name]).reshape(-1).numpy() for name in self.like]
        return np.concatenate(parts).view(np.uint64) if parts else np.empty(0, np.uint64)

    def _entries(self, name: str, x: Tensor) -> Tensor:
        return x[self.kept[name]] if name in self.kept else x

    def _parts(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        at = 0
        for name, spec in self.like.items():
            count = int(self.kept[name].sum()) if name in self.kept else spec.numel
            yield name, flat[at : at + count]
            at += count

    def _whole(self, name: str, part: Tensor) -> Tensor:
        shape = self.like[name].shape
        if name not in self.kept:
            return part.reshape(shape)
        whole = torch.zeros(shape, dtype=part.dtype)
        whole[self.kept[name]] = part
        return whole


class Beyond(NamedTuple):
    """Why a client has to leave itself out."""

    layer: str
    why: str


class Mean(NamedTuple):
    """Of all who came."""

    message: Message
    loss: float


class Trees:
    """The trees of one sum, by what one client's are like; those of all others are like it.

    Args:
        clients: how many were asked; so many times the limit has to fit.
    """

    def __init__(self, secure: SecureSum, setup: Setup, plan: Plan, clients: int, like: Message):
        self._secure = secure
        self._round = plan.round
        alike = {"loss", *setup.method.uniform}
        self._alike = alike | ({"moments"} if "update" in alike else set())
        self._forms = {tree: _Tree.of(tree, x, secure, plan, clients) for tree, x in like.items()}

    @property
    def widths(self) -> dict[str, int]:
        return {tree: form.bits for tree, form in self._forms.items()}

    @property
    def longest(self) -> int:
        """Bytes of all elements, packed."""
        return sum((form.numel * form.bits + 7) // 8 for form in self._forms.values())

    @property
    def tensors(self) -> int:
        return sum(len(form.like) for form in self._forms.values())

    def refuses(self, trees: Message) -> Beyond | None:
        odd = next((tree for tree in {**trees, **self._forms} if tree not in trees or tree not in self._forms), None)
        for tree, form in self._forms.items():
            wrong = odd if odd is not None else form.refuses(trees[tree])
            if wrong is not None:
                layer = wrong if tree == "update" or odd is not None else f"{tree}/{wrong}"
                return Beyond(layer, f"an entry beyond secure.limit={self._secure.limit:g}")
        return None

    def elements(self, trees: Message, weight: float) -> dict[str, Ring]:
        """They must fit, and the weight be at most 1."""
        return {
            tree: form.elements(trees[tree], 1.0 if tree in self._alike else weight)
            for tree, form in self._forms.items()
        }

    def packed(self, client: int, hidden: Vectors, scalars: dict[str, float]) -> bytes:
        """In the frame of a message."""
        blobs = {
            tree: form.codec.encode(form.tensors(hidden[tree]), form.context) for tree, form in self._forms.items()
        }
        return frame.pack(frame.Frame("message", self._round, client, scalars, blobs))

    def unpacked(self, sections: Mapping[str, bytes]) -> tuple[dict[str, Ring], dict[str, wire.Size]]:
        """The elements, and what they weigh. Raises WireError E322, E34x for what is not of this form."""
        if sections.keys() != self._forms.keys():
            raise WireError(f"sections {sorted(sections)}, expected {sorted(self._forms)}", code="E345")
        elements, sizes = {}, {}
        for tree, form in self._forms.items():
            tensors = form.codec.decode(sections[tree], form.context)
            if tensors.keys() != form.like.keys():
                name = min(tensors.keys() ^ form.like.keys())
                raise WireError(f"{tree}/{name} is absent or was not asked for", code="E345")
            elements[tree] = form.flat(tensors)
            sizes[tree] = wire.sized(form.codec, sections[tree], form.context)
        return elements, sizes

    def mean(self, sums: Vectors, weights: Sequence[float], steps: Sequence[float]) -> Mean:
        """Of the clients that have these weights and made so many local steps, none for a probe."""
        over = {tree: float(len(weights)) if tree in self._alike else total(weights) for tree in self._forms}
        message = {tree: form.numbers(sums[tree], over[tree]) for tree, form in self._forms.items()}
        loss = float(message.pop("loss")["loss"])
        if steps:
            mean = total(n * w for n, w in zip(steps, weights, strict=True)) / total(weights)
            message["steps"] = {"steps": torch.tensor(mean, dtype=torch.float64)}
        return Mean(message, loss)
