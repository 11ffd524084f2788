"""Several clients at once, their weights stacked along a first dimension: for models whose operations are so small
that calling them takes longer than computing them.

    starts [K, ...]  ->  steps, the m clients that have one left  ->  weights [K, ...]  ->  K messages, or their mean

Clients come with most steps first, so those that still train are always the first m, a view of the stacks. One step is
that of `training.Trainer.train`, in the same order; `correct` is written for one client and mapped over them.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap

from lamina import wire
from lamina.client import Reply, Setup, Start, begin, finish, transmit_message
from lamina.data.transform import Batch
from lamina.method import Plan, Work
from lamina.random import generator
from lamina.store import Row
from lamina.training import Trainer, batches, passes
from lamina.tree import Message, Params, flatten, select, skeleton, sub, unflatten

WIDTH = 25  # clients in a stack: more no longer fit a core's cache at 50,000 parameters, fewer than ten are slower

BLOCK = 1 << 10  # examples fetched at once, for as many steps as that takes: fetching is a dozen small operations

Judge = Callable[[Params], Message]


class Minibatches(NamedTuple):
    """One minibatch of each of m clients. One of less than b examples is filled up with its own."""

    x: Batch  # [m, b, ...]
    y: Batch
    sizes: list[int]


class Gradient(Protocol):
    """The loss gradients of several clients, each at its own weights on its own minibatch."""

    def __call__(self, weights: Params, given: Minibatches) -> tuple[Params, Tensor]:
        """Gradients [m, ...] by name, and losses [m]."""
        ...

    @property
    def descend(self) -> Callable[[Params, Minibatches, float], Tensor] | None:
        """One step of plain SGD in place, at this learning rate; losses [m]. None: it makes gradients only."""
        ...


class Vmapped:
    """Any model without randomness and without buffers, by torch's vmap."""

    descend = None

    def __init__(self, trainer: Trainer):
        model = copy.deepcopy(trainer.model)  # should torch fail in the middle, it leaves its own tensors in there
        model.train()
        rest = {n: x.detach() for n, x in model.named_parameters() if n not in trainer.params}
        rest |= dict(model.named_buffers())

        def loss(weights: Params, x: Batch, y: Batch) -> Tensor:
            args, kwargs = ((), x) if isinstance(x, dict) else ((x,), None)
            with trainer.cast():
                return trainer.loss(functional_call(model, weights | rest, args, kwargs, tie_weights=False), y)

        self._each = vmap(grad_and_value(loss), randomness="error")

    def __call__(self, weights: Params, given: Minibatches) -> tuple[Params, Tensor]:
        """Clients whose minibatches have the same size go together: nothing is trained on what fills them up."""
        sizes = given.sizes
        if len(set(sizes)) == 1:
            return self._together(weights, given.x, given.y)
        grads = {name: torch.empty_like(w) for name, w in weights.items()}
        losses = torch.empty(len(sizes))
        for size in sorted(set(sizes), reverse=True):
            members = [i for i, n in enumerate(sizes) if n == size]
            x, y = _some(given.x, members, size), _some(given.y, members, size)
            some, value = self._together({n: w[members] for n, w in weights.items()}, x, y)
            for name, g in some.items():
                grads[name][members] = g
            losses[members] = value.to(losses.dtype)
        return grads, losses

    def _together(self, weights: Params, x: Batch, y: Batch) -> tuple[Params, Tensor]:
        grads, losses = self._each(weights, x, y)
        return grads, losses.detach()


class Alike(list[Reply]):
    """Replies with the same bytes and the same row, which holds no tensor; the first has the mean of all messages."""


class Together(NamedTuple):
    """What local training leaves behind, stacked."""

    params: Params
    grads: Params  # of each client's last minibatch, if somebody asked
    losses: list[float]
    steps: list[int]


class Stack:
    """Args: trainer: for its model, loss and data. gradient: of several clients. width: how many of them."""

    def __init__(self, trainer: Trainer, gradient: Gradient, width: int):
        self.trainer = trainer
        self.gradient = gradient
        self.width = width
        self._sizes: dict[frozenset[str], dict[str, wire.Size]] = {}

    def sizes(self, setup: Setup, plan: Plan, client: int, one: Message, loss: float) -> dict[str, wire.Size]:
        """Of a raw message, which follow from the names and shapes of what is sent."""
        if plan.upload not in self._sizes:
            _, self._sizes[plan.upload] = transmit_message(one, setup, plan, client, loss)
        return self._sizes[plan.upload]

    def train(
        self, setup: Setup, plan: Plan, clients: Sequence[int], starts: Sequence[Start], wanted: bool
    ) -> Together:
        """K local steps of each client; most steps first. `wanted`: the gradients of the last minibatches too."""
        local, method, data = setup.local, setup.method, setup.data
        weights = _stacked([start.params for start in starts])
        correct = _mapped(setup, plan, [start.row.method for start in starts]) if method.has("correct") else None
        descend = self.gradient.descend if descends(setup) and not wanted else None
        steps = [local.count(n) for n in data.sizes_of(clients)]
        source = minibatches(setup, plan.round, clients, steps, getattr(data.transform, "augments", True))
        self.trainer.model.train()
        velocity: Params = {}
        last = {name: torch.empty_like(w) for name, w in weights.items()} if wanted else {}
        total = torch.zeros(len(clients), dtype=torch.float64)
        w = weights
        for k, given in enumerate(source):
            m = len(given.sizes)
            if m < len(next(iter(w.values()))):
                w = {name: x[:m] for name, x in weights.items()}
            if descend is not None:
                total[:m] += descend(w, given, plan.lr)
                continue
            g, losses = self.gradient(w, given)
            total[:m] += losses
            if wanted:
                done = sum(n > k + 1 for n in steps)  # those behind it take their last step
                for name, x in g.items():
                    last[name][done:m] = x[done:]
            if correct is not None:
                g = correct(m, torch.tensor(k), w, g)
            if local.clip is not None:
                norm = torch.stack([x.flatten(1).norm(dim=1) for x in g.values()]).norm(dim=0)
                factor = (local.clip / norm).clamp(max=1.0)
                g = {name: x * factor.view(-1, *[1] * (x.dim() - 1)) for name, x in g.items()}
            if local.weight_decay:
                g = {name: x.add(w[name], alpha=local.weight_decay) for name, x in g.items()}
            if local.momentum:
                if not velocity:
                    velocity = {name: x.clone() for name, x in g.items()}
                    g = velocity
                else:
                    v = {name: x[:m] for name, x in velocity.items()}
                    for name, x in v.items():
                        x.mul_(local.momentum).add_(g[name])
                    g = v
            for name, x in w.items():
                x.add_(g[name], alpha=-plan.lr)
        means = (total / torch.tensor(steps, dtype=torch.float64)).tolist()
        return Together(weights, last, means, steps)


def descends(setup: Setup) -> bool:
    """Whether a local step is plain SGD, for which no gradient has to be made."""
    local, method = setup.local, setup.method
    hooked = method.has("correct") or method.has("report")
    return not (hooked or local.clip or local.weight_decay or local.momentum)


def minibatches(
    setup: Setup, round: int, clients: Sequence[int], steps: Sequence[int], draws: bool
) -> Iterator[Minibatches]:
    """Those of step 0, 1, ... of the clients that have one left.

    Args:
        steps: of each client, most first.
        draws: the transform draws random numbers, so every client needs a generator, and a minibatch for itself.
    """
    if draws:
        yield from _drawn(setup, round, clients, steps)
        return
    data, examples = setup.data, setup.data.sizes_of(clients)
    b = min(setup.local.batch_size or max(examples), max(examples))
    # Every client's minibatches as rows of b examples, the short ones filled up, client by client; then step by step.
    rows = [_rows(setup, round, c, b) for c in clients]
    sizes = [_sizes(n, b, count) for n, count in zip(examples, steps, strict=True)]
    starts = [0, *itertools.accumulate(map(len, rows))]
    members = [sum(n > k for n in steps) for k in range(max(steps))]
    order = torch.tensor([starts[i] + k for k, m in enumerate(members) for i in range(m)])
    ordered = torch.cat(rows)[order]
    at = k = 0
    while k < len(members):
        block = members[k : k + max(1, BLOCK // (members[k] * b))]
        x, y = data.examples(ordered[at : at + sum(block)].view(-1))
        at += sum(block)
        x = data.transform(x, None)
        done = 0
        for m in block:
            now = [sizes[i][k] for i in range(m)]
            span, done = slice(done * b, (done + m) * b), done + m
            yield Minibatches(_shaped(x, span, m, max(now)), _shaped(y, span, m, max(now)), now)
            k += 1


def _rows(setup: Setup, round: int, client: int, b: int) -> Tensor:
    """The minibatches of one client, [steps, b]: example indices, a short one filled up with its last."""
    filled = []
    for order in passes(setup.data, client, setup.local, setup.seed, round):
        short = -len(order) % b
        filled += [order, order[-1:].expand(short)] if short else [order]
    return (filled[0] if len(filled) == 1 else torch.cat(filled)).view(-1, b)


def _sizes(examples: int, b: int, steps: int) -> list[int]:
    """Of a client's minibatches."""
    one = [b] * (examples // b) + ([examples % b] if examples % b else [])
    return (one * -(-steps // len(one)))[:steps]


def _drawn(setup: Setup, round: int, clients: Sequence[int], steps: Sequence[int]) -> Iterator[Minibatches]:
    """Of a transform that draws random numbers: from each client's own generator, one minibatch after the other."""
    data = setup.data
    orders = [batches(data, c, setup.local, setup.seed, round) for c in clients]
    augment = [generator(setup.seed, "augment", round, c) for c in clients]
    for k in range(max(steps)):
        chunks = [next(order) for order, n in zip(orders, steps, strict=True) if n > k]
        parts = [data.examples(chunk) for chunk in chunks]
        xs = [data.transform(x, own) for (x, _), own in zip(parts, augment, strict=False)]
        sizes = [len(chunk) for chunk in chunks]
        yield Minibatches(_filled(xs, max(sizes)), _filled([y for _, y in parts], max(sizes)), sizes)


def stack_round(
    stack: Stack, setup: Setup, plan: Plan, clients: Sequence[int], rows: Sequence[Row | None], judge: Judge | None
) -> list[Reply]:
    """`client_round` of each of these clients. `judge`: a further tree of each message, from its local model."""
    starts = [begin(setup, plan, row) for row in rows]
    replies: dict[int, Reply] = {}
    groups = _alike(setup, clients, starts)
    for members in groups:
        some, begun = [clients[i] for i in members], [starts[i] for i in members]
        done = stack.train(setup, plan, some, begun, setup.method.has("report"))
        if judge is None and members == list(range(len(clients))) and says_nothing(setup, plan):
            made = _plain(stack, setup, plan, some, done)
            if made is not None:
                return made
        each = _finished(setup, plan, some, begun, done)
        if judge is not None:
            for i, reply in enumerate(each):
                reply.message.update(judge({n: x[i] for n, x in done.params.items()}))
        replies |= zip(members, each, strict=True)
    return [replies[i] for i in range(len(clients))]


def _alike(setup: Setup, clients: Sequence[int], starts: Sequence[Start]) -> list[list[int]]:
    """Positions of clients whose states have the same tensors, most steps first."""
    plain = not setup.method.has("init_client")
    groups: dict[str, list[int]] = {}
    count = [setup.local.count(n) for n in setup.data.sizes_of(clients)]
    for i in sorted(range(len(clients)), key=lambda i: -count[i]):
        state = () if plain else starts[i].row.method
        form = str([(path, x.shape, x.dtype) for path, x in flatten(state).items()]) + str(skeleton(state))
        groups.setdefault(form, []).append(i)
    return list(groups.values())


def _finished(setup: Setup, plan: Plan, clients: Sequence[int], starts: Sequence[Start], done: Together) -> list[Reply]:
    replies = []
    for i, (client, start) in enumerate(zip(clients, starts, strict=True)):
        params, grads = ({name: x[i] for name, x in tree.items()} for tree in (done.params, done.grads))
        work = Work(params, {}, grads, torch.tensor(done.steps[i]))
        replies.append(finish(setup, plan, client, start.row, work, done.losses[i]))
    return replies


def says_nothing(setup: Setup, plan: Plan) -> bool:
    """Whether every message is the raw update and no more, nobody remembers anything, and a mean of several will do."""
    method = setup.method
    silent = not any(method.has(hook) for hook in ("report", "settle", "init_client"))
    raw = setup.uplink == wire.Dense() and plan.mask is None and setup.carry is None
    return silent and raw and not setup.apart


def _plain(stack: Stack, setup: Setup, plan: Plan, clients: Sequence[int], done: Together) -> Alike | None:
    """`finish` for all clients at once, and the mean of their messages; None where some value is not finite."""
    update = sub(select(done.params, plan.upload), plan.params)  # [K, ...] - [...]
    trees: Message = {"update": update}
    if setup.moments:
        trees["moments"] = {name: _squares(x) for name, x in update.items()}
    trees["steps"] = {"steps": torch.tensor(done.steps, dtype=torch.float64)}
    fine = all(map(math.isfinite, done.losses))
    if not fine or not update:
        return None
    weights = torch.tensor(setup.weights_of(clients), dtype=torch.float64)
    shares, even = weights / weights.sum(), torch.full_like(weights, 1 / len(clients))
    uniform = {*setup.method.uniform, *({"moments"} if "update" in setup.method.uniform else ())}
    message: Message = {
        tree: {name: _mean(x, even if tree in uniform else shares) for name, x in content.items()}
        for tree, content in trees.items()
    }
    looked = message["moments" if setup.moments else "update"]  # a finite sum of squares has finite terms
    if not all(torch.isfinite(x).all() for x in looked.values()):
        return None
    one: Message = {
        "update": {name: x[0] for name, x in update.items()},
        "steps": {"steps": trees["steps"]["steps"][0]},
    }
    sizes = stack.sizes(setup, plan, clients[0], one, done.losses[0])
    row = Row(setup.method.init_client(plan.params), {})
    figures = zip(clients, done.losses, done.steps, strict=True)
    replies = [Reply(c, {}, row, sizes, loss, steps, None, within=True) for c, loss, steps in figures]
    replies[0] = replies[0]._replace(message=message, members=tuple(clients), within=False)
    return Alike(replies)


def _mean(x: Tensor, shares: Tensor) -> Tensor:
    """Weighted by shares [K]: of [K, ...], in its own precision."""
    if len(x) == 1:
        return x[0]
    made: Tensor = (shares.to(x.dtype) @ x.reshape(len(x), -1)).view(x.shape[1:])
    return made


def _squares(x: Tensor) -> Tensor:
    """Sums of squares [K] of [K, ...]: of each row in x's own precision, over the rows in float64."""
    rows = x.reshape(len(x), -1, x.shape[-1] if x.dim() > 1 else 1)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=2)
    return norms.double().square_().sum(1)


def _stacked(trees: Sequence[Params]) -> Params:
    first = trees[0]
    if all(tree is first for tree in trees):
        return {name: x.expand(len(trees), *x.shape).clone() for name, x in first.items()}
    return {name: torch.stack([tree[name] for tree in trees]) for name in first}


def _mapped(setup: Setup, plan: Plan, states: Sequence[Any]) -> Callable[[int, Tensor, Params, Params], Params]:
    """`method.correct` over the first m clients: mapped, or one after the other where torch cannot map it."""
    shape = skeleton(states[0])
    leaves = _stacked([flatten(state) for state in states])
    maps = True

    def one(own: Params, step: Tensor, params: Params, grads: Params) -> Params:
        return setup.method.correct(unflatten(states[0], shape, own), plan, step, params, grads)

    each = vmap(one, in_dims=(0, None, 0, 0), randomness="error")

    def correct(m: int, step: Tensor, params: Params, grads: Params) -> Params:
        nonlocal maps
        if maps:
            try:
                made: Params = each({path: x[:m] for path, x in leaves.items()}, step, params, grads)
                return made
            except RuntimeError:  # a hook that looks at values
                maps = False
        corrected = [
            setup.method.correct(states[i], plan, step, *({n: x[i] for n, x in t.items()} for t in (params, grads)))
            for i in range(m)
        ]
        return {name: torch.stack([tree[name] for tree in corrected]) for name in grads}

    return correct


def _longer(x: Tensor, b: int) -> Tensor:
    """Filled up to b rows with its first one."""
    return x if len(x) == b else torch.cat([x, x[:1].expand(b - len(x), *x.shape[1:])])


def _filled(parts: Sequence[Batch], b: int) -> Batch:
    first = parts[0]
    if isinstance(first, dict):
        return {key: torch.stack([_longer(part[key], b) for part in parts]) for key in first}  # type: ignore[index]
    return torch.stack([_longer(part, b) for part in parts])  # type: ignore[arg-type]


def _shaped(x: Batch, span: slice, m: int, b: int) -> Batch:
    """These rows as [m, b, ...], the first b of each client's."""
    if isinstance(x, dict):
        return {key: _cut(value[span], m, b) for key, value in x.items()}
    return _cut(x[span], m, b)


def _cut(x: Tensor, m: int, b: int) -> Tensor:
    x = x.view(m, -1, *x.shape[1:])
    return x if x.shape[1] == b else x[:, :b]


def _some(x: Batch, members: list[int], size: int) -> Batch:
    if isinstance(x, dict):
        return {key: value[members, :size] for key, value in x.items()}
    return x[members, :size]
