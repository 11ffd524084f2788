"""FedLUAR: equations (1)-(5) of arXiv 2503.11146, plain averaging SGD around them.

A layer is a parameter of more than one dimension. Where s is 0 the layer counts as the calmest one that moved. A round
draws by inverse CDF: one uniform number per layer, over the odds still in the urn, in model order.
"""

import copy
from typing import NamedTuple

import torch
from torch.nn.functional import cross_entropy

from from_scratch.addresses import batches, cohort, generator


class Round(NamedTuple):
    server: dict  # state dict after the round
    recycled: list  # layers that replayed in this round, in the order in which they were drawn
    s: dict  # layer -> relative size of its last fresh update


def fedluar(model, clients, *, recycle, rounds, lr, choose="inverse", replay=True, refresh=False, decay=None,
            momentum=0.0, weight_decay=0.0, clip=None, batch_size=32, epochs=1, participants=None, weights="examples",
            seed=0):  # fmt: skip
    """`decay`: round -> factor of the learning rate."""
    server = copy.deepcopy(model.state_dict())
    layers = [name for name, w in model.named_parameters() if w.ndim > 1]
    s, delta_hat, in_r = {}, {}, []
    before = None
    history = []
    for t in range(rounds):
        rate = lr * decay(t) if decay else lr
        if refresh and before is not None and rate < before:
            in_r = []
        before = rate
        active = cohort(seed, t, len(clients), participants)
        sizes = [len(clients[i][0]) if weights == "examples" else 1 for i in active]
        finished = []
        for i in active:
            data, labels = clients[i]
            local = copy.deepcopy(model).train()
            local.load_state_dict(server)
            velocity = [torch.zeros_like(w) for w in local.parameters()]
            for batch in batches(len(data), seed, t, i, batch_size, epochs):
                local.zero_grad()
                cross_entropy(local(data[batch]), labels[batch]).backward()
                with torch.no_grad():
                    norm = sum((w.grad**2).sum() for w in local.parameters()).sqrt()
                    for w, v in zip(local.parameters(), velocity, strict=True):
                        g = w.grad * (clip / norm) if clip and norm > clip else w.grad
                        v.copy_(momentum * v + g + weight_decay * w)
                        w -= rate * v
            finished.append(local.state_dict())
        after = {}
        for name, x in server.items():
            if not x.is_floating_point():
                after[name] = max(y[name] for y in finished)
                continue
            if name in in_r:  # whatever the clients have of it is not looked at
                after[name] = x + delta_hat[name] if replay else x.clone()
                continue
            delta = sum(n / sum(sizes) * (y[name] - x) for n, y in zip(sizes, finished, strict=True))  # (1)
            after[name] = x + delta
            if name in layers:
                delta_hat[name] = delta
                s[name] = delta.double().norm().item() / (x.double().norm().item() + 1e-6)  # (2)
        server = after
        history.append(Round(dict(server), list(in_r), dict(s)))
        in_r = draw(layers, s, recycle, choose, generator(seed, "round", t).initial_seed())
    return history


def draw(layers, s, recycle, choose, seed):
    uniform = torch.rand(recycle, dtype=torch.float64, generator=generator(seed, "recycle"))
    least = min([x for x in s.values() if x != 0] or [1.0])
    urn = list(layers)
    taken = []
    for u in uniform:
        inverse = torch.tensor([1.0 if choose == "uniform" else 1 / (s[name] or least) for name in urn]).double()
        p = inverse / inverse.sum()  # (3), renormalised after every draw
        taken.append(urn.pop(int((p.cumsum(0) <= u).sum())))
    return taken
