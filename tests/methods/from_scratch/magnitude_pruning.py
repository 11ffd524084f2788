"""FedAvg whose global model is pruned by magnitude, by the schedule of Zhu and Gupta 2017:

s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3    for t = t_0, t_0 + dt, ..., t_0 + n dt, with s_i = 0
"""

import copy
import math

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from from_scratch.addresses import batches, cohort


def magnitude_pruning(model, clients, *, sparsity, t0, n, dt, scope, rounds, lr, momentum=0.0, weight_decay=0.0,
                      batch_size=32, epochs=1, participants=None, weights="examples", seed=0):  # fmt: skip
    model = copy.deepcopy(model)
    names = [f"{name}.weight" for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    tensors = dict(model.named_parameters())
    alive = {name: torch.ones_like(tensors[name], dtype=torch.bool) for name in names}
    server = copy.deepcopy(model.state_dict())
    history = []
    for t in range(rounds):
        chosen = cohort(seed, t, len(clients), participants)
        sizes = [len(clients[i][0]) if weights == "examples" else 1 for i in chosen]
        mean = {name: torch.zeros_like(w) for name, w in server.items()}
        for i, size in zip(chosen, sizes, strict=True):
            x, y = clients[i]
            model.load_state_dict(server)
            sgd = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
            for batch in batches(len(x), seed, t, i, batch_size, epochs):
                sgd.zero_grad()
                cross_entropy(model(x[batch]), y[batch]).backward()
                for name in names:
                    tensors[name].grad[~alive[name]] = 0
                sgd.step()
            for name, w in model.state_dict().items():
                mean[name] += size / sum(sizes) * w
        server = mean
        if t0 <= t <= t0 + n * dt and (t - t0) % dt == 0:
            s = sparsity + (0 - sparsity) * (1 - (t - t0) / (n * dt)) ** 3
            groups = [[name] for name in names] if scope == "layer" else [names]
            for group in groups:
                size = sum(server[name].numel() for name in group)
                k = math.floor((1 - s) * size + 1e-9)  # 1 - s is a sum of other roundings than the density
                ranked = torch.cat([server[name].abs().flatten() for name in group]).sort(descending=True).values
                for name in group:
                    alive[name] &= server[name].abs() >= ranked[k - 1]
        for name in names:
            server[name] = torch.where(alive[name], server[name], torch.zeros_like(server[name]))
        history.append(dict(server))
    return history
