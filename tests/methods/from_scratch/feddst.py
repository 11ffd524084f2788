"""FedDST, Bibikar et al. 2022: masked training; now and then clients prune by magnitude and regrow by gradient, and the
server averages every weight over those who kept it and cuts back to the layer's number of entries."""

import copy
import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from from_scratch.addresses import batches, cohort, generator


class Round(NamedTuple):
    server: dict
    masks: dict  # name -> set of kept flat positions


def feddst(model, clients, *, density, every, ratio, until, rounds, lr, momentum=0.0, weight_decay=0.0, batch_size=32,
           epochs=1, participants=None, weights="examples", seed=0):  # fmt: skip
    names = [f"{name}.weight" for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    x0 = {name: w.detach().clone() for name, w in model.named_parameters()}
    source = generator(seed, "mask")
    kept = {}
    for name in names:  # the same density for every layer
        n = x0[name].numel()
        drawn = torch.rand(x0[name].shape, generator=source, dtype=torch.float64).flatten().tolist()
        kept[name] = set(sorted(range(n), key=lambda j, d=drawn: -d[j])[: round(density * n)])
    server = {name: masked(w, kept.get(name)) for name, w in x0.items()}
    history = []
    for t in range(rounds):
        chosen = cohort(seed, t, len(clients), participants)
        sizes = [len(clients[i][0]) if weights == "examples" else 1 for i in chosen]
        readjust = ratio > 0 and t > 0 and t % every == 0 and t < until
        alpha = ratio * (1 + math.cos(math.pi * t / until)) / 2
        replies = []
        for i in chosen:
            x, y = clients[i]
            local = copy.deepcopy(model)
            local.load_state_dict(server)
            sgd = torch.optim.SGD(local.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
            tensors = dict(local.named_parameters())
            for batch in batches(len(x), seed, t, i, batch_size, epochs):
                sgd.zero_grad()
                cross_entropy(local(x[batch]), y[batch]).backward()
                grads = {name: w.grad.clone() for name, w in tensors.items()}
                sgd.step()
                for name in names:
                    tensors[name].data = masked(tensors[name].data, kept[name])
            own = {name: set(positions) for name, positions in kept.items()}
            if readjust:
                for name in names:
                    w, g = tensors[name].detach().flatten().tolist(), grads[name].flatten().tolist()
                    inside = sorted(kept[name], key=lambda j, w=w: (-abs(w[j]), j))
                    outside = sorted(set(range(len(w))) - kept[name], key=lambda j, g=g: (-abs(g[j]), j))
                    left = max(math.floor((1 - alpha) * len(inside)), len(inside) - len(outside))
                    own[name] = set(inside[:left]) | set(outside[: len(inside) - left])
                    tensors[name].data = masked(tensors[name].data, own[name])
            replies.append(({name: w.detach() for name, w in tensors.items()}, own))
        server = {
            name: sum(n * w[name] for n, (w, _) in zip(sizes, replies, strict=True)) / sum(sizes) for name in server
        }
        for name in names:
            votes = torch.zeros(server[name].numel(), dtype=torch.float64)
            for n, (_, own) in zip(sizes, replies, strict=True):
                votes[sorted(own[name])] += n
            together = sum(n * w[name].flatten() for n, (w, _) in zip(sizes, replies, strict=True))
            mean = torch.where(votes > 0, together / votes.clamp(min=1), 0).to(together.dtype)
            value, voted = mean.tolist(), votes.tolist()
            order = sorted(range(len(value)), key=lambda j, v=value, s=voted: (-abs(v[j]), -s[j], j))
            kept[name] = set(order[: len(kept[name])])
            server[name] = masked(mean.view_as(server[name]), kept[name])
        history.append(Round(dict(server), {name: set(positions) for name, positions in kept.items()}))
    return history


def masked(w, positions):
    if positions is None:
        return w
    flat = torch.zeros(w.numel(), dtype=w.dtype)
    at = sorted(positions)
    flat[at] = w.flatten()[at]
    return flat.view_as(w)
