"""FedLAMA, Lee et al. 2023, Algorithms 1 and 2: every client keeps a whole model for a cycle of phi rounds.

The prefix is walked up to and including the first layer with 1 - lambda < delta. A layer is a tensor of more than one
dimension; everything else is aggregated every round.
"""

import copy
from typing import NamedTuple

import torch
from torch.nn.functional import cross_entropy

from from_scratch.addresses import batches, cohort


class Round(NamedTuple):
    server: dict  # state dict: last aggregated value of every tensor
    uploaded: set  # parameters
    values: int  # parameters uploaded, over all clients
    discrepancy: dict  # d of the layers aggregated in this round
    intervals: dict  # for the rounds to come
    spread: float  # largest difference between two clients' weights after the round


def fedlama(model, clients, *, phi, warmup, rounds, lr, momentum=0.0, weight_decay=0.0, clip=None, batch_size=32,
            epochs=1, participants=None, weights="examples", seed=0):  # fmt: skip
    server = copy.deepcopy(model.state_dict())
    parameters = [name for name, _ in model.named_parameters()]
    layers = [name for name, w in model.named_parameters() if w.ndim > 1]
    interval = dict.fromkeys(layers, 1)
    steps_since = dict.fromkeys(layers, 0.0)
    d = {}
    history = []
    for t in range(rounds):
        if t % phi == 0:
            active = cohort(seed, t, len(clients), participants)
            sizes = [len(clients[i][0]) if weights == "examples" else 1 for i in active]
            p = [n / sum(sizes) for n in sizes]
            local = {i: copy.deepcopy(model).train() for i in active}
            for i in active:
                local[i].load_state_dict(server)
        steps = []
        for i in active:
            data, labels = clients[i]
            velocity = [torch.zeros_like(w) for w in local[i].parameters()]
            order = batches(len(data), seed, t, i, batch_size, epochs)
            steps.append(len(order))
            for batch in order:
                local[i].zero_grad()
                cross_entropy(local[i](data[batch]), labels[batch]).backward()
                with torch.no_grad():
                    norm = sum((w.grad**2).sum() for w in local[i].parameters()).sqrt()
                    for w, v in zip(local[i].parameters(), velocity, strict=True):
                        g = w.grad * (clip / norm) if clip and norm > clip else w.grad
                        v.copy_(momentum * v + g + weight_decay * w)
                        w -= lr * v
        for name in layers:
            steps_since[name] += sum(p_i * k for p_i, k in zip(p, steps, strict=True))
        due = {name for name in parameters if (t + 1) % interval.get(name, 1) == 0}
        aggregated = {}
        for name in server:
            if name in parameters and name not in due:
                continue
            x = [local[i].state_dict()[name] for i in active]
            if not x[0].is_floating_point():
                u = max(x).clone()
            else:
                u = sum(p_i * x_i for p_i, x_i in zip(p, x, strict=True))
            if name in layers:  # measured before the clients' copies are overwritten
                squares = sum(p_i * ((u - x_i) ** 2).sum().item() for p_i, x_i in zip(p, x, strict=True))
                aggregated[name] = squares / (steps_since[name] * u.numel())
                steps_since[name] = 0.0
            server[name] = u
            for i in active:
                local[i].state_dict()[name].copy_(u)
        d.update(aggregated)
        if (t + 1) % phi == 0 and t + 1 > warmup:
            interval = adjust(d, {name: server[name].numel() for name in layers}, phi)
        first, *others = ([w.detach() for w in local[i].parameters()] for i in active)
        gaps = [(a - b).abs().max().item() for other in others for a, b in zip(first, other, strict=True)]
        values = len(active) * sum(server[name].numel() for name in due)
        history.append(Round(dict(server), due, values, aggregated, dict(interval), max(gaps, default=0.0)))
    return history


def adjust(d, dim, phi):
    whole_d = sum(d[name] * dim[name] for name in d)
    whole_dim = sum(dim.values())
    interval = dict.fromkeys(dim, 1)
    prefix_d = prefix_dim = 0
    for name in sorted(d, key=lambda name: d[name]):
        if whole_d == 0:
            break
        prefix_d += d[name] * dim[name]
        prefix_dim += dim[name]
        interval[name] = phi
        if 1 - prefix_dim / whole_dim < prefix_d / whole_d:
            break
    return interval
