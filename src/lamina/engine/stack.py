"""Several clients at once, their weights stacked along a first dimension: for models whose operations are so small
that calling them takes longer than computing them.

    starts [K, ...]  ->  steps, the m clients that have one left  ->  weights [K, ...]  ->  K messages

Clients come with most steps first, so those that still train are always the first m, a view of the stacks. One step is
that of `training.Trainer.train`, in the same order; `correct` is written for one client and mapped over them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap

from lamina.client import Reply, Setup, Start, begin, finish, transmit_message
from lamina.data.client_data import ClientData
from lamina.data.transform import Batch
from lamina.method import Plan, Work
from lamina.random import generator
from lamina.store import Row
from lamina.training import Trainer, batches
from lamina.tree import Message, Params, flatten, select, skeleton, sub, unflatten
from lamina.wire import Dense

WIDTH = 25  # clients in a stack: more no longer fit a core's cache at 50,000 parameters, fewer than ten are slower

BLOCK = 1 << 10  # examples fetched at once, for as many steps as that takes: fetching is a dozen small operations

Judge = Callable[[Params], Message]


class Minibatches(NamedTuple):
    """One minibatch of each of m clients. One of less than b examples is filled up with its first."""

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
    """Replies of one form. `stacks` are their messages, [K, ...]; nobody's row holds a tensor."""

    def __init__(self, replies: Sequence[Reply], stacks: Message):
        super().__init__(replies)
        self.stacks = stacks


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

    def train(
        self, setup: Setup, plan: Plan, clients: Sequence[int], starts: Sequence[Start], wanted: bool
    ) -> Together:
        """K local steps of each client; most steps first. `wanted`: the gradients of the last minibatches too."""
        local, method, data = setup.local, setup.method, setup.data
        weights = _stacked([start.params for start in starts])
        correct = _mapped(setup, plan, [start.row.method for start in starts]) if method.has("correct") else None
        plain = correct is None and not (local.clip or local.weight_decay or local.momentum or wanted)
        descend = self.gradient.descend if plain else None
        steps = [local.count(len(data.indices_of(c))) for c in clients]
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


def minibatches(
    setup: Setup, round: int, clients: Sequence[int], steps: Sequence[int], draws: bool
) -> Iterator[Minibatches]:
    """Those of step 0, 1, ... of the clients that have one left.

    Args:
        steps: of each client, most first.
        draws: the transform draws random numbers, so every client needs a generator, and a minibatch for itself.
    """
    data = setup.data
    orders = [batches(data, c, setup.local, setup.seed, round) for c in clients]
    augment = [generator(setup.seed, "augment", round, c) for c in clients] if draws else []
    waiting: list[tuple[list[int], Tensor]] = []
    held = 0
    for k in range(max(steps)):
        chunks = [next(order) for order, n in zip(orders, steps, strict=True) if n > k]
        sizes = [len(chunk) for chunk in chunks]
        if draws:
            parts = [data.examples(chunk) for chunk in chunks]
            xs = [data.transform(x, own) for (x, _), own in zip(parts, augment, strict=False)]
            yield Minibatches(_filled(xs, max(sizes)), _filled([y for _, y in parts], max(sizes)), sizes)
            continue
        waiting.append((sizes, torch.cat([_longer(chunk, max(sizes)) for chunk in chunks])))
        held += len(waiting[-1][1])
        if held >= BLOCK:
            yield from _fetched(data, waiting)
            waiting, held = [], 0
    yield from _fetched(data, waiting)


def _fetched(data: ClientData, waiting: Sequence[tuple[list[int], Tensor]]) -> Iterator[Minibatches]:
    if not waiting:
        return
    x, y = data.examples(torch.cat([indices for _, indices in waiting]))
    x, at = data.transform(x, None), 0
    for sizes, indices in waiting:
        span, at = slice(at, at + len(indices)), at + len(indices)
        yield Minibatches(_shaped(x, span, len(sizes)), _shaped(y, span, len(sizes)), sizes)


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
        made = _plain(setup, plan, some, done) if says_nothing(setup, plan) else None
        if judge is None and made is not None and members == list(range(len(clients))):
            return made
        each = made or _finished(setup, plan, some, begun, done)
        if judge is not None:
            for i, reply in enumerate(each):
                reply.message.update(judge({n: x[i] for n, x in done.params.items()}))
        replies |= zip(members, each, strict=True)
    return [replies[i] for i in range(len(clients))]


def _alike(setup: Setup, clients: Sequence[int], starts: Sequence[Start]) -> list[list[int]]:
    """Positions of clients whose states have the same tensors, most steps first."""
    groups: dict[str, list[int]] = {}
    count = [setup.local.count(len(setup.data.indices_of(c))) for c in clients]
    for i in sorted(range(len(clients)), key=lambda i: -count[i]):
        state = starts[i].row.method
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
    """Whether every message is the raw update and no more, and nobody remembers anything: then all have one form."""
    method = setup.method
    silent = not any(method.has(hook) for hook in ("report", "settle", "init_client"))
    raw = setup.uplink == Dense() and plan.mask is None and setup.carry is None
    return silent and raw


def _plain(setup: Setup, plan: Plan, clients: Sequence[int], done: Together) -> Alike | None:
    """`finish` for all clients at once; None where some value is not finite."""
    update = sub(select(done.params, plan.upload), plan.params)  # [K, ...] - [...]
    squares = {n: torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=torch.float64) ** 2 for n, x in update.items()}
    fine = torch.isfinite(torch.stack([*squares.values(), torch.tensor(done.losses, dtype=torch.float64)])).all()
    if not fine or not update:
        return None
    row = Row(setup.method.init_client(plan.params), {})
    each = {name: x.unbind() for name, x in update.items()}
    moments = {name: x.unbind() for name, x in squares.items()} if setup.moments else {}
    steps = torch.tensor(done.steps, dtype=torch.float64).unbind()
    first: Message = {"update": {name: x[0] for name, x in each.items()}, "steps": {"steps": steps[0]}}
    _, sizes = transmit_message(first, setup, plan, clients[0], done.losses[0])  # they follow from the shapes
    replies = []
    for i, client in enumerate(clients):
        message: Message = {"update": {name: x[i] for name, x in each.items()}}
        if setup.moments:
            message["moments"] = {name: x[i] for name, x in moments.items()}
        message["steps"] = {"steps": steps[i]}
        replies.append(Reply(client, message, row, sizes, done.losses[i], done.steps[i], None))
    stacks: Message = {"update": update, "steps": {"steps": torch.stack(steps)}}
    return Alike(replies, stacks | ({"moments": squares} if setup.moments else {}))


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


def _shaped(x: Batch, span: slice, m: int) -> Batch:
    """These rows as [m, b, ...]."""
    if isinstance(x, dict):
        return {key: value[span].view(m, -1, *value.shape[1:]) for key, value in x.items()}
    return x[span].view(m, -1, *x.shape[1:])


def _some(x: Batch, members: list[int], size: int) -> Batch:
    if isinstance(x, dict):
        return {key: value[members, :size] for key, value in x.items()}
    return x[members, :size]
