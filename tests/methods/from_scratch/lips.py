"""LIPS, arXiv 2506.00932: a client starts from a copy of the model in which the middle layers were pruned.

`chosen`: names of the pruned tensors. `own`: names of tensors that stay with each client (none: all are shared).
"""

import copy
from typing import NamedTuple

import torch
from torch.nn.functional import cross_entropy

from from_scratch.addresses import batches, cohort


class Round(NamedTuple):
    server: dict  # state dict
    zeros: dict  # client -> pruned tensor -> positions that were zeroed at its start, flat
    own: dict  # client -> its personal tensors


def lips(model, clients, *, density, every, horizon, chosen, magnitude=False, own=(), rounds, lr, momentum=0.0,
         batch_size=32, epochs=1, participants=None, weights="examples", seed=0):  # fmt: skip
    server = copy.deepcopy(model.state_dict())
    last_gradient = {}  # client -> tensor -> gradient
    personal = {}
    d = 1
    history = []
    for t in range(rounds):
        active = cohort(seed, t, len(clients), participants)
        sizes = [len(clients[i][0]) if weights == "examples" else 1 for i in active]
        arrived, zeros = [], {}
        for i in active:
            data, labels = clients[i]
            local = copy.deepcopy(model).train()
            local.load_state_dict(server)
            tensors = dict(local.named_parameters())
            with torch.no_grad():
                for name, x in personal.get(i, {}).items():
                    tensors[name].copy_(x)
                zeros[i] = {name: prune(tensors[name], last_gradient.get(i, {}).get(name), d) for name in chosen}
            velocity = [torch.zeros_like(w) for w in local.parameters()]
            for batch in batches(len(data), seed, t, i, batch_size, epochs):
                local.zero_grad()
                cross_entropy(local(data[batch]), labels[batch]).backward()
                with torch.no_grad():
                    for w, v in zip(local.parameters(), velocity, strict=True):
                        v.copy_(momentum * v + w.grad)
                        w -= lr * v
            if not magnitude:
                last_gradient[i] = {name: tensors[name].grad.clone() for name in chosen}
            personal[i] = {name: tensors[name].detach().clone() for name in own}
            arrived.append(local.state_dict())
        for name, x in server.items():
            if name in own:
                continue
            if x.is_floating_point():
                server[name] = sum(n * local[name] for n, local in zip(sizes, arrived, strict=True)) / sum(sizes)
            else:
                server[name] = max(local[name] for local in arrived)
        d = min(density + (1 - density) * t / horizon, 1) if t % every == 0 else 1
        history.append(Round(dict(server), zeros, copy.deepcopy(personal)))
    return history


def prune(w, gradient, d):
    """Zeroes all but int(numel * d) entries, in place; the smaller flat index stays among equals."""
    flat = w.view(-1)
    score = flat.abs() if gradient is None else (flat * gradient.reshape(-1)).abs()
    ranked = sorted(range(flat.numel()), key=lambda i: (-score[i].item(), i))
    gone = sorted(ranked[int(flat.numel() * d) :])
    flat[gone] = 0
    return gone
