"""FederatedAveraging, McMahan et al. 2017, Algorithm 1."""

import copy

import torch
from torch.nn.functional import cross_entropy

from from_scratch.addresses import batches, cohort


def fedavg(model, clients, *, rounds, lr, momentum=0.0, weight_decay=0.0, clip=None, batch_size=32, epochs=1,
           steps=None, participants=None, weights="examples", seed=0):  # fmt: skip
    server = copy.deepcopy(model.state_dict())
    history = []
    for t in range(rounds):
        chosen = cohort(seed, t, len(clients), participants)
        sizes = [len(clients[k][0]) if weights == "examples" else 1 for k in chosen]
        locals_ = []
        for k in chosen:
            x, y = clients[k]
            local = copy.deepcopy(model).train()
            local.load_state_dict(server)
            velocity = [torch.zeros_like(w) for w in local.parameters()]
            for batch in batches(len(x), seed, t, k, batch_size, epochs, steps):
                local.zero_grad()
                cross_entropy(local(x[batch]), y[batch]).backward()
                with torch.no_grad():
                    norm = sum((w.grad**2).sum() for w in local.parameters()).sqrt()
                    for w, v in zip(local.parameters(), velocity, strict=True):
                        g = w.grad * (clip / norm) if clip and norm > clip else w.grad
                        v.copy_(momentum * v + g + weight_decay * w)
                        w -= lr * v
            locals_.append(local.state_dict())
        for name, x in server.items():
            if x.is_floating_point():
                server[name] = sum(n / sum(sizes) * local[name] for n, local in zip(sizes, locals_, strict=True))
            else:  # a counter of batches
                server[name] = max(local[name] for local in locals_)
        history.append(dict(server))
    return history
